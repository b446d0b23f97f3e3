"""What must be true of the paper's suite, on files of the real formats and layouts made here. Needs no network."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import sys
import threading
import types
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms import Compose
from transformers import CLIPVisionConfig, CLIPVisionModel

from data.files import InputError
from data.paper import authors, hub, images, published
from data.paper.hub import TASKS, Architecture, load_expert, load_pretrained, zero_shot_heads
from data.paper.images import class_order, image_set, normalise, notice

settings.register_profile("default", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
datasets.disable_progress_bars()

ROOM = Path(__file__).parent
FACTS = ROOM.parents[1].parent / "shared" / "facts"

TINY = Architecture("tiny", "tiny-quickgelu", "openai", "timm/tiny.openai", "tanganke/clip-tiny_{}")
TINY_VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
TINY_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """A small architecture that open_clip knows by name, with and without QuickGELU."""
    folder = tmp_path_factory.mktemp("configs")
    for name, quick in (("tiny-quickgelu", True), ("tiny-plain", False)):
        config = {"embed_dim": 48, "quick_gelu": quick, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def model():
    return tower_like(0).eval()


def tower_like(seed):
    torch.manual_seed(seed)
    return randomise(open_clip.create_model(TINY.model))


def randomise(module):
    """Different numbers in every entry, so that a mistaken mapping shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "logit_scale":
                p.uniform_(-0.1, 0.1).add_(p.ndim == 1 and name.endswith("weight"))
    return module


def hugging_face(**sizes):
    torch.manual_seed(1)
    return randomise(CLIPVisionModel(CLIPVisionConfig(hidden_act="quick_gelu", **sizes))).eval()


def tiny_hugging_face():
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hugging_face(**sizes, image_size=32, patch_size=8)


def bare(state):
    return {name.removeprefix("vision_model."): value.clone() for name, value in state.items()}


def refused(sentence):
    """Expects an InputError of one line that says so."""
    return pytest.raises(InputError, match=rf"\A(?-s:.)*{sentence}(?-s:.)*\Z")


# ------------------------------------------------------------------------------------------
# facts
# ------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_paper():
    classes = {"SUN397": 397, "Cars": 196, "RESISC45": 45, "EuroSAT": 10, "SVHN": 10, "GTSRB": 43, "MNIST": 10}
    assert {name: len(task.classes) for name, task in TASKS.items()} == {**classes, "DTD": 47}
    assert sum(task.images for task in TASKS.values()) == 87433
    assert all("{}" in template for task in TASKS.values() for template in task.templates)
    assert TASKS["SVHN"].config == "cropped_digits" and TASKS["Cars"].checkpoint_suffix == "stanford-cars"
    for table in ("2", "3", "10"):
        check_averages(published.paper_tables()[table]["rows"])
    for name in hub.ARCHITECTURES:
        assert {row["source"] for row in check_averages(published.hub_rows(name))} == {"hub"}
    assert [row["learning_rate"] for row in published.adaptation_curves("ViT-L-14")] == [1e-4]
    assert published.hub_rows("ViT-H-14") == published.adaptation_curves("ViT-B-16") == []
    assert published.paper_sweeps("ViT-B-32")["Task Arithmetic"]["clean"]["0.3"] == pytest.approx(
        published.paper_tables()["5"]["conditions"]["clean"][0]["accuracy"], abs=0.11
    )


def check_averages(rows):
    for row in rows:
        assert len(row["accuracy"]) == 8 and abs(np.mean(row["accuracy"]) - row["average"]) < 0.6, row
    return rows


@pytest.mark.skipif(not FACTS.is_dir(), reason="the project's facts are not beside the repository")
def test_carried_facts_are_the_projects_cell_by_cell():
    def fact(name):
        return json.loads((FACTS / name).read_text(encoding="utf-8"))

    for name in ("paper.json", "paper_sweeps.json"):
        assert published.read(name) == fact(name)
    assert json.loads((ROOM / "tasks.json").read_text(encoding="utf-8"))["tasks"] == fact("eight_tasks.json")
    theirs, ours = fact("published_results.json"), published.read("hub_results.json")
    for key in ("tasks", "adaptation_curves", "generalization", "robustness"):
        assert theirs[key] == ours[key]
    tables = published.paper_tables()
    of_the_paper = [row["accuracy"] for table in ("2", "3", "10") for row in tables[table]["rows"]]
    for arch, rows in theirs["main"].items():
        assert ours["main"][arch] == [row for row in rows if row["source"] == "hub"]
        assert all(row["accuracy"] in of_the_paper for row in rows if row["source"] == "paper")
    rows = [[row["tasks"], row["trainable"], row["total"]] for row in tables["8"]["rows"]]
    counts = [[*row] for row in zip(*(theirs["parameters"][key] for key in ("tasks", "trainable", "total")))]
    mine = [[*row] for row in zip(*(ours["parameters"][key] for key in ("tasks", "trainable", "total")))]
    assert mine + rows == counts and theirs["parameters"]["pretrained_total"] == tables["8"]["single_pretrained"]


@pytest.mark.parametrize("name", hub.ARCHITECTURES)
def test_architectures_are_open_clips_own(name):
    arch = hub.architecture(name)
    tag = open_clip.get_pretrained_cfg(arch.model, arch.pretrained)
    assert tag["hf_hub"] == f"{arch.repo}/" and tag["quick_gelu"]
    assert open_clip.get_model_config(arch.model)["quick_gelu"]
    assert hub.preprocessing(arch).input_size == (3, 224, 224)


def test_other_architectures():
    other = hub.architecture("ViT-B-16", "laion2b_s34b_b88k")
    assert (other.model, other.repo, other.experts) == ("ViT-B-16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", None)
    siglip = hub.preprocessing(hub.architecture("ViT-B-16-SigLIP", "webli"))
    assert siglip.mean == (0.5, 0.5, 0.5) and siglip.resize_mode == "squash"
    with refused("'nonsense' for 'ViT-B-16'.*openai"):
        hub.architecture("ViT-B-16", "nonsense")
    with refused("--finetune"):
        hub.expert_repo(other, "DTD")


# ------------------------------------------------------------------------------------------
# pre-trained model
# ------------------------------------------------------------------------------------------


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_load_pretrained_from_a_mirror(tmp_path, model):
    save_file(model.state_dict(), make(tmp_path / TINY.repo / "open_clip_model.safetensors"))
    loaded = load_pretrained(TINY, tmp_path)
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    x = torch.linspace(-4, 4, 99)
    for tower in (loaded.visual.transformer, loaded.transformer):
        for block in tower.resblocks:
            assert torch.allclose(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))
            assert not torch.allclose(block.mlp.gelu(x), F.gelu(x), atol=1e-3)


def test_load_pretrained_by_download(tmp_path, model, monkeypatch):
    """Without a mirror open_clip downloads by its tag; QuickGELU is forced where the tag needs it."""
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    tag = {"openai": {"hf_hub": "timm/tiny/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-plain", tag)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(path))
    loaded = load_pretrained(hub.architecture("tiny-plain", "openai"))
    assert isinstance(loaded.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert loaded.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)

    def fail(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", fail)
    with refused("tiny-plain from openai.*no route to host"):
        load_pretrained(hub.architecture("tiny-plain", "openai"))


@pytest.mark.parametrize("damage", ["absent", "garbage", "shape", "nan", "missing"])
def test_load_pretrained_refuses(tmp_path, model, damage):
    path = make(tmp_path / TINY.repo / "open_clip_model.safetensors")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if damage == "shape":
        state["visual.proj"] = torch.zeros(3, 3)
    elif damage == "nan":
        state["visual.proj"][0, 0] = float("nan")
    elif damage == "missing":
        del state["visual.proj"]
    if damage == "garbage":
        path.write_bytes(b"garbage")
    elif damage != "absent":
        save_file(state, path)
    with refused("open_clip_model" if damage == "garbage" else "(tiny.openai|visual.proj)"):
        load_pretrained(TINY, tmp_path)


# ------------------------------------------------------------------------------------------
# experts
# ------------------------------------------------------------------------------------------


def same_features(hf, visual, tower):
    pooled = []
    visual.load_state_dict(tower, assign=True)
    visual.ln_post.register_forward_hook(lambda *call: pooled.append(call[2][:, 0]))
    x = torch.randn(2, 3, *visual.image_size)
    with torch.no_grad():
        expected, projected = hf(pixel_values=x).pooler_output, visual(x)
    assert expected.std() > 0.1  # features that differ among themselves
    torch.testing.assert_close(pooled[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projected, expected @ tower["proj"], atol=1e-5, rtol=1e-5)


def test_conversion_at_small_size():
    hf, visual = tiny_hugging_face(), open_clip.create_model(TINY.model).visual
    projection = visual.proj.detach().clone()
    tower = hub.from_hugging_face(hf.state_dict(), visual, "file")
    assert list(tower) == list(visual.state_dict()) and torch.equal(tower["proj"], projection)
    tower["proj"] += 1  # a copy: the pre-trained tower stays as it was
    assert torch.equal(visual.proj, projection)
    tower["proj"] -= 1
    same_features(hf, visual.eval(), tower)


def test_conversion_at_the_size_of_b32():
    hf = hugging_face()  # CLIPVisionConfig's defaults are those of B/32
    assert sum(p.numel() for p in hf.parameters()) == 87_456_000
    with torch.device("meta"):
        visual = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).visual
    visual.proj = nn.Parameter(torch.randn(768, 512) / 30)
    same_features(hf, visual.eval(), hub.from_hugging_face(hf.state_dict(), visual, "file"))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_load_expert(tmp_path, model, file, prefix):
    state = {prefix + name: value for name, value in bare(tiny_hugging_face().state_dict()).items()}
    plain = hub.from_hugging_face(state, model.visual, "file")
    state[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    path = make(tmp_path / "tanganke/clip-tiny_stanford-cars" / file)
    state = {name: value.half() if "fc1" in name else value for name, value in state.items()}
    save_file(state, path) if file.endswith("safetensors") else torch.save(state, path)
    tower = load_expert(TINY, "Cars", model.visual, tmp_path)
    assert tower.keys() == plain.keys()
    for name, value in tower.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, plain[name].half().float() if "c_fc" in name else plain[name]), name


LAYER = "encoder.layers.0"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({f"{LAYER}.self_attn.q_proj.bias": None}, f"lacks {LAYER}.self_attn.q_proj.bias"),
        ({"text_model.embeddings": torch.zeros(3)}, "does not know: text_model.embeddings"),
        (
            {f"{LAYER}.self_attn.k_proj.weight": torch.zeros(64, 63)},
            r"k_proj.weight has the shape \(64, 63\), the architecture needs \(64, 64\)",
        ),
        ({f"{LAYER}.mlp.fc1.weight": torch.zeros(64, 256)}, r"fc1.weight has the shape \(64, 256\)"),
        ({"post_layernorm.bias": torch.full((64,), torch.inf)}, "post_layernorm.bias has values that are not finite"),
        ({"post_layernorm.bias": torch.zeros(64).long()}, "post_layernorm.bias has the dtype torch.int64"),
        ({"vision_model.post_layernorm.bias": torch.zeros(64)}, "lacks vision_model.embeddings.*and 32 more"),
    ],
)
def test_load_expert_refuses(tmp_path, model, change, sentence):
    state = {**bare(tiny_hugging_face().state_dict()), **change}
    path = make(tmp_path / "tanganke/clip-tiny_dtd/model.safetensors")
    save_file({name: value for name, value in state.items() if value is not None}, path)
    with refused(f"model.safetensors.*{sentence}"):
        load_expert(TINY, "DTD", model.visual, tmp_path)


def test_load_expert_refuses_unreadable_files(tmp_path, model):
    def refuses(sentence):
        with refused(sentence):
            load_expert(TINY, "DTD", model.visual, tmp_path)

    refuses("no files in .*clip-tiny_dtd; `hf download")
    folder = tmp_path / "tanganke/clip-tiny_dtd"
    make(folder / "config.json").write_text("{}")
    refuses("no model.safetensors or pytorch_model.bin; it has: config.json")
    bad, marker = folder / "pytorch_model.bin", tmp_path / "marker"
    torch.save(Evil(marker), bad)
    refuses("pytorch_model.bin is not a readable")
    assert not marker.exists()
    torch.save([1, 2], bad)
    refuses("should hold tensors by name")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-LFS pointer.*`git lfs pull`"),
        (b"\n <!DOCTYPE html><html>", "is a web page, not the file itself"),
        (b"<html>", "is a web page"),
        (b"<?xml version='1.0'?><Error>", "is a web page"),
        (b"", "is empty: download it again"),
        (bytes(99), "is nothing but zeros"),
        (b"<p\0\0\0\0\0\0", "is not a readable weight file"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_named(tmp_path, model, content, sentence):
    path = make(tmp_path / "tanganke/clip-tiny_dtd/model.safetensors")
    path.write_bytes(content)
    with refused(f"model.safetensors.*{sentence}"):
        load_expert(TINY, "DTD", model.visual, tmp_path)
    if "weight" not in sentence:
        path = make(tmp_path / TASKS["DTD"].repo / "data/test-00000-of-00001.parquet")
        path.write_bytes(content)
        with refused(f"test-00000-of-00001.parquet.*{sentence}"):
            image_set("DTD", PREP, tmp_path / "cache", tmp_path)


def with_header(length):
    """A safetensors file of which the header has this many bytes, filled up as the format allows."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(length)
    return len(header).to_bytes(8, "little") + header + bytes(8)


@given(st.integers(0, 255).filter(lambda k: k != 0))
def test_a_header_that_begins_as_a_web_page_is_none(tmp_path_factory, more):
    data = with_header(0x3C + 256 * more)
    assert data.startswith(b"<")
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(data)
    hub.refuse_mistaken(path)
    assert hub.read_weights(path)["a"].tolist() == [0, 0]


VALID = safetensors.torch.save({"a.weight": torch.ones(3, 5), "b": torch.arange(4), "c": torch.ones(2).half()})


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=6),
    st.none() | st.integers(0, len(VALID)),
    st.binary(max_size=20),
    st.sampled_from([None, 0, 7, 2**31, 2**63]),
)
def test_fuzzed_safetensors_load_or_are_refused(tmp_path_factory, changes, length, tail, header):
    data = bytearray(VALID)
    for place, byte in changes:
        data[place] = byte
    if header is not None:
        data[:8] = header.to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(bytes(data[:length]) + tail)
    try:
        state = hub.read_weights(path)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert sum(p.nbytes for p in state.values()) <= path.stat().st_size


# ------------------------------------------------------------------------------------------
# the authors' pickles
# ------------------------------------------------------------------------------------------


class Evil:
    """Unpickled in the ordinary way, it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class OldClasses:
    """The names that the authors' files use, importable while the files are written and gone afterwards."""

    def __enter__(self):
        self.package = types.ModuleType("src"), types.ModuleType("src.modeling")
        sys.modules["src"], sys.modules["src.modeling"] = self.package

        class ImageEncoder(nn.Module):
            pass

        class ClassificationHead(nn.Linear):
            pass

        class VisualTransformer(nn.Module):
            pass

        self.classes = ImageEncoder, ClassificationHead, VisualTransformer
        for cls, module in zip(self.classes, (self.package[1], self.package[1], open_clip.model)):
            cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
            setattr(module, cls.__name__, cls)
        return self

    def __exit__(self, *_):
        del sys.modules["src"], sys.modules["src.modeling"], open_clip.model.VisualTransformer

    def encoder(self, clip_model):
        """ImageEncoder.model.visual, the two preprocessing pipelines beside it, without the text transformer."""
        visual = self.classes[2]()
        visual.__dict__.update(clip_model.visual.__dict__)
        inner = nn.Module()
        inner.visual, inner.token_embedding, inner.logit_scale = visual, nn.Embedding(5, 4), clip_model.logit_scale
        inner.register_buffer("attn_mask", torch.full((3, 3), -torch.inf), persistent=False)
        encoder = self.classes[0]()
        encoder.model, encoder.cache_dir = inner, None
        encoder.train_preprocess = open_clip.image_transform(32, is_train=True)
        encoder.val_preprocess = open_clip.image_transform(32, is_train=False)
        return encoder

    def head(self, weight, normalize=True, bias=0.0):
        head = self.classes[1](weight.shape[1], weight.shape[0])
        head.normalize, head.weight = normalize, nn.Parameter(weight.clone())
        head.bias = nn.Parameter(torch.full_like(head.bias, bias))
        return head


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(request):
    def write(thing, path):
        torch.save(thing, make(Path(path)), _use_new_zipfile_serialization=request.param)

    return write


def test_authors_experts(tmp_path, save):
    folder, weight = tmp_path / "tiny", torch.randn(10, 48)
    pretrained, finetuned, half = tower_like(2), tower_like(3), tower_like(4).half()
    with OldClasses() as old:
        save(old.encoder(pretrained), folder / "zeroshot.pt")
        save(old.encoder(finetuned), folder / "MNIST/finetuned.pt")
        save(old.encoder(half), folder / "SVHN/finetuned.pt")
        for task in ("MNIST", "SVHN"):
            save(old.head(weight), folder / f"head_{task}.pt")
    with pytest.raises((AttributeError, ModuleNotFoundError)):  # the complaint under every repository of this family
        torch.load(folder / "zeroshot.pt", weights_only=False)
    before = set(sys.modules)
    found = authors.load_authors_experts(TINY, tmp_path, ["MNIST", "SVHN"])
    assert not any(name.split(".")[0] == "src" for name in set(sys.modules) - before)
    assert not found.visual.training and isinstance(found.visual, open_clip.transformer.VisionTransformer)
    for tower, source in ((found.visual.state_dict(), pretrained), (found.experts["MNIST"], finetuned)):
        expected = source.visual.state_dict()
        assert tower.keys() == expected.keys() and all(torch.equal(tower[n], expected[n]) for n in expected)
    assert all(v.dtype == torch.float32 for v in found.experts["SVHN"].values())
    assert torch.equal(found.experts["SVHN"]["conv1.weight"], half.visual.conv1.weight.float())
    assert torch.equal(found.heads["MNIST"], weight.T)
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(found.visual(x), pretrained.visual(x), atol=1e-6)


def test_authors_files_refused(tmp_path, save, model):
    shapes = {name: value.shape for name, value in model.visual.state_dict().items()}
    path = tmp_path / "finetuned.pt"

    def refuses(sentence):
        with refused(sentence):
            authors.read_tower(path, shapes)

    refuses("finetuned.pt is not a module.*No such file")
    with OldClasses() as old:
        other = tower_like(5)
        other.visual.ln_post.bias.data[0] = float("nan")
        save(old.encoder(other), path)
        refuses("finetuned.pt: ln_post.bias has values that are not finite")
        del other.visual.transformer.resblocks[1]
        save(old.encoder(other), path)
        refuses("finetuned.pt lacks transformer.resblocks.1")
        for head, sentence in (
            (old.head(torch.ones(9, 48)), r"weight has the shape \(9, 48\), the architecture needs \(10, 48\)"),
            (old.head(torch.ones(10, 48), bias=1.0), "no bias"),
            (old.head(torch.ones(10, 48), normalize=False), "should normalise"),
        ):
            save(head, path)
            with refused(sentence):
                authors.read_head(path, "MNIST", 48)
    save({"a": 1}, path)
    refuses("model.visual.*holds: nothing")


def test_truncated_files_are_refused(tmp_path, save):
    path = tmp_path / "head.pt"
    with OldClasses() as old:
        save(old.head(torch.randn(10, 48)), path)
    whole = path.read_bytes()
    assert authors.read_head(path, "MNIST", 48).shape == (48, 10)

    @settings(max_examples=60)
    @given(st.integers(0, len(whole) - 1))
    def check(length):
        path.write_bytes(whole[:length])
        with refused("head.pt"):
            authors.read_head(path, "MNIST", 48)

    check()


def test_malicious_pickles_execute_nothing(tmp_path, save):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    save(Evil(marker), path)
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file does work on the unwary
    marker.unlink()
    with refused("model.visual"):
        authors.read_tower(path, {})
    visual = tower_like(6).visual
    with OldClasses() as old:  # hidden within a module that is otherwise in order
        encoder = old.encoder(SimpleNamespace(visual=visual, logit_scale=nn.Parameter(torch.zeros(()))))
        encoder.trap = Evil(marker)
        encoder.model.visual.conv1.trap = [Evil(marker), {Evil: Evil(marker)}]
        save(encoder, path)
    tower = authors.read_tower(path, {n: v.shape for n, v in visual.state_dict().items()})
    assert torch.equal(tower["conv1.weight"], visual.conv1.weight)
    assert not marker.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"cposix\nsystem\n(S'touch MARKER'\ntR.",
        b"(S'touch MARKER'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARKER'\no.",
        b'cbuiltins\neval\n(S\'__import__("os").system("touch MARKER")\'\ntR.',
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch MARKER'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}S'__defaults__'\n(tsd\x86b.",  # state set on a function of the table
        b"ctorch\nload\n(S'MARKER'\ntR.",
        b"c__builtin__\nset\n(cos\nsystem\ntR.",
    ],
)
def test_hand_written_pickles_execute_nothing(tmp_path, body, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = torch._utils._rebuild_tensor_v2.__defaults__
    preamble = b"".join(pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
    for content in (body, preamble + body + pickle.dumps([])):
        Path("evil.pt").write_bytes(content)
        with pytest.raises(InputError):
            authors.read_tower(Path("evil.pt"), {})
    assert os.listdir(".") == ["evil.pt"] and torch._utils._rebuild_tensor_v2.__defaults__ == original


# ------------------------------------------------------------------------------------------
# the images
# ------------------------------------------------------------------------------------------

MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")
PREP = PreprocessCfg(size=(32, 32))
EXPECTED = open_clip.image_transform(32, is_train=False)


def picture(mode, width, height, seed=0, orientation=None):
    """An encoded image of the mode."""
    rng = np.random.default_rng(seed)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    sixteen = Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16))
    image = sixteen if mode == "I;16" else rgb.convert(mode)
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[Image.ExifTags.Base.Orientation] = orientation
    image.save(file, "JPEG" if mode == "CMYK" or orientation else "PNG", exif=exif)
    return file.getvalue()


def some_pictures(count):
    return [picture("RGB", 40, 30, seed) for seed in range(count)]


def write_parquet(path, pictures, labels, classes, image="image", label="label", dtype=None):
    """A file as `datasets` writes it; a picture is given as its bytes or as its path."""
    features = {image: datasets.Image(), label: dtype or datasets.ClassLabel(names=list(classes))}
    entries = [p and ({"path": p} if isinstance(p, str) else {"bytes": p}) for p in pictures]
    rows = {image: [e and {"bytes": None, "path": None, **e} for e in entries], label: labels}
    table = datasets.Dataset.from_dict(rows, datasets.Features(features)).data.table
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": note(features)}})})
    pq.write_table(table, make(path))


def note(features):
    return datasets.Features(features).to_dict()


def write_set(root, task, count=12, seed=0, split="test", shards=1, folder=None):
    spec = TASKS[task]
    sizes = np.random.default_rng(seed).integers(20, 70, (count, 2)).tolist()
    pictures = [picture(MODES[i % len(MODES)], *sizes[i], seed=seed + i) for i in range(count)]
    labels = [i % len(spec.classes) for i in range(count)]
    for k in range(shards):
        part = slice(k * count // shards, (k + 1) * count // shards)
        path = root / spec.repo / (folder or spec.config or "data") / f"{split}-{k:05d}-of-{shards:05d}.parquet"
        write_parquet(path, pictures[part], labels[part], spec.classes)
    return pictures, labels


def eurosat(root):
    return root / TASKS["EuroSAT"].repo / "data/test-00000-of-00001.parquet"


def prepared(data):
    return EXPECTED(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def same_images(pixels, pictures):
    expected = torch.stack([prepared(data) for data in pictures])
    torch.testing.assert_close(normalise(pixels), expected, atol=1e-6, rtol=0)


sides = st.integers(1, 90)


@settings(max_examples=80)
@given(st.sampled_from(MODES), sides, sides, st.integers(0, 99), st.sampled_from([None, 3, 6]))
def test_pixels_are_open_clips(mode, width, height, seed, orientation):
    data = picture(mode if orientation is None else "RGB", width, height, seed, orientation)
    transform = Compose(image_transform_v2(PREP, is_train=False).transforms[:-2])
    found = images.pixels(transform, {"bytes": data, "path": None}, None)
    same_images(torch.frombuffer(bytearray(found), dtype=torch.uint8).view(1, 3, 32, 32), [data])


def test_normalise_takes_the_models_own_mean():
    prep = PreprocessCfg(size=(32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    for c in range(3):
        torch.testing.assert_close(normalise(image, prep)[:, c], (image[:, c] / 255 - prep.mean[c]) / prep.std[c])


def test_image_set(tmp_path, monkeypatch):
    """All modes and sizes, shards in order, the configuration's folder; the second time from the cache alone."""
    root, cache = tmp_path / "mirror [of the hub]", tmp_path / "cache"
    pictures, labels = write_set(root, "SVHN", 25, shards=3)
    write_set(root, "SVHN", 4, seed=9, folder="full_numbers")
    write_set(root, "SVHN", 5, seed=8, split="train")
    pixels, found = image_set("SVHN", PREP, cache, root)
    assert pixels.dtype == torch.uint8 and found.dtype == torch.int64 and found.tolist() == labels
    same_images(pixels, pictures)
    monkeypatch.chdir(tmp_path)
    assert len(image_set("SVHN", PREP, Path("cache"), Path(root.name), split="train")[1]) == 5
    files = {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")}
    assert len(files) == 2 and all(path.suffix in (".npy", ".lock") for path in cache.iterdir())
    again, _ = image_set("SVHN", PREP, cache, root)
    again += 1  # private memory: the cache is not changed
    assert torch.equal(image_set("SVHN", PREP, cache, root)[0], pixels)
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")} == files
    assert image_set("SVHN", PreprocessCfg(size=(16, 16)), cache, root)[0].shape == (25, 3, 16, 16)


def test_several_processes_decode_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(images.os, "cpu_count", lambda: 3)
    pictures = [picture("RGB", 33, 34, seed) for seed in range(301)]
    write_parquet(eurosat(tmp_path), pictures, [k % 10 for k in range(301)], TASKS["EuroSAT"].classes)
    same_images(image_set("EuroSAT", PREP, tmp_path / "cache", tmp_path)[0], pictures)
    monkeypatch.setattr(images, "pixels", lambda *_: os._exit(1))
    with refused("EuroSAT, split test of tanganke/eurosat cannot be read: .*died"):
        image_set("EuroSAT", PREP, tmp_path / "other", tmp_path)
    assert not list(tmp_path.glob("other/*.npy*t"))


def test_changed_and_second_mirrors_are_seen(tmp_path):
    cache, sets = tmp_path / "cache", []
    for root, seed in ((tmp_path / "a", 0), (tmp_path / "a", 1), (tmp_path / "b", 2)):
        pictures, _ = write_set(root, "EuroSAT", 6, seed=seed)
        pixels, _ = image_set("EuroSAT", PREP, cache, root)
        same_images(pixels, pictures)
        sets.append(pixels.clone())
    assert not torch.equal(sets[0], sets[1]) and not torch.equal(sets[1], sets[2])


def counted(monkeypatch, fail_at=None, error=KeyboardInterrupt):
    calls, original = [], images.pixels

    def pixels(*args):
        calls.append(None)
        if len(calls) == fail_at:
            raise error
        return original(*args)

    monkeypatch.setattr(images, "pixels", pixels)
    return calls


def test_limit_decodes_no_more_and_is_kept_apart(tmp_path, monkeypatch):
    write_set(tmp_path, "MNIST", 20, folder="mnist", shards=2)

    def take(**options):
        return image_set("MNIST", PREP, tmp_path / "cache", tmp_path, **options)

    calls = counted(monkeypatch)
    few, labels = take(limit=12)
    assert len(calls) == 12 and few.shape == (12, 3, 32, 32) and len(labels) == 12
    everything, all_labels = take()
    assert len(everything) == 20
    assert torch.equal(few, everything[:12]) and torch.equal(labels, all_labels[:12])
    spaced = {12: [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 17, 19], 3: [0, 10, 19], 1: [0], 20: range(20), 50: range(20)}
    for limit, places in spaced.items():
        some, labels_of_some = take(limit=limit, spaced=True)
        assert torch.equal(some, everything[list(places)]) and torch.equal(labels_of_some, all_labels[list(places)])
    with refused("at least 1, not 0"):
        take(limit=0)


def test_interruption_leaves_nothing_behind(tmp_path, monkeypatch):
    pictures, _ = write_set(tmp_path, "DTD", 9)
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, fail_at=5)
        image_set("DTD", PREP, cache, tmp_path)
    (lock,) = cache.iterdir()
    unfinished = lock.with_suffix(".123.part")  # of a run that was killed
    unfinished.write_bytes(b"half")
    make(cache / f"{unfinished.name}.abcd/parquet/file").write_bytes(b"half")
    same_images(image_set("DTD", PREP, cache, tmp_path)[0], pictures)
    assert {path.suffix for path in cache.iterdir()} == {".npy", ".lock"}


def test_a_full_disk_is_said_to_be_one(tmp_path, monkeypatch):
    write_set(tmp_path, "DTD", 3)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from full

    def open_full(file, mode):
        if mode == "r+b":
            raise full
        return open(file, mode)

    def refuses():
        with refused("cannot write .*No space left on device.*: free some space or choose another"):
            image_set("DTD", PREP, tmp_path / "cache", tmp_path)
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]

    with monkeypatch.context() as patch:
        patch.setattr(images, "open", open_full, raising=False)
        refuses()
    monkeypatch.setattr(datasets, "load_dataset", fail)
    refuses()
    (tmp_path / "file").touch()
    with refused("cannot make the folder .*choose another --cache"):
        image_set("DTD", PREP, tmp_path / "file" / "cache", tmp_path)


def test_damage_to_the_cache_is_said(tmp_path):
    write_set(tmp_path, "DTD", 3)
    image_set("DTD", PREP, tmp_path / "cache", tmp_path)
    (file,) = tmp_path.glob("cache/*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    with refused(f"{file.name} is damaged .*delete it"):
        image_set("DTD", PREP, tmp_path / "cache", tmp_path)


def test_two_at_a_time_decode_once(tmp_path, monkeypatch):
    found = []
    write_set(tmp_path, "DTD", 9)
    calls = counted(monkeypatch)
    take = [
        threading.Thread(target=lambda: found.append(image_set("DTD", PREP, tmp_path / "cache", tmp_path)))
        for _ in range(3)
    ]
    [thread.start() for thread in take]
    [thread.join() for thread in take]
    assert len(calls) == 9 and len(found) == 3 and torch.equal(found[0][0], found[2][0])


def test_a_split_of_another_size_is_noticed():
    assert notice("SVHN", 26032) is None
    assert notice("SVHN", 100) == (
        "SVHN has 100 test images, not the published 26,032: not comparable with published figures"
    )


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("label", "EuroSAT, split test of tanganke/eurosat: image 3 has the label 12; 0 to 9 are known"),
        ("negative", "image 3 has the label -1;"),
        ("null", "image 3 has the label None;"),
        ("text", "image 0 has the label 'a';"),
        ("classes", r"has 3 classes \(a, b, c\), but tasks.json 10"),
        ("column", "has no column image; it has: img, label"),
        ("image", "EuroSAT, split test of tanganke/eurosat: image 4 cannot be decoded: cannot identify"),
        ("cut", "image 4 cannot be decoded: .*truncated"),
        ("none", "image 4 cannot be decoded"),
        ("parquet", "test-00000-of-00001.parquet is not a readable parquet file"),
        ("page", "EuroSAT, split test of tanganke/eurosat cannot be read"),
        ("empty", "EuroSAT, split test of tanganke/eurosat has no images"),
        ("split", "eurosat has no split 'test' in parquet files; it has: contrast, train"),
        ("shard", "all shards of the split 'test' in one folder, but has: data/test-00001-of-00003.parquet"),
        ("versions", "but has: data/test-00000-of-00001.parquet, other/test-00000-of-00001.parquet"),
        ("absent", "no files in .*tanganke/eurosat; `hf download tanganke/eurosat"),
    ],
)
def test_unusable_data_sets_are_refused(tmp_path, damage, sentence):
    classes, path = TASKS["EuroSAT"].classes, eurosat(tmp_path)
    pictures, labels, options = some_pictures(6), [0] * 6, {}
    if damage in ("label", "negative", "null"):
        labels[3] = {"label": 12, "negative": -1, "null": None}[damage]
        options = {"dtype": datasets.Value("int64")}
    elif damage == "text":
        labels, options = list("abcdef"), {"dtype": datasets.Value("string")}
    elif damage == "classes":
        classes = "abc"
    elif damage == "column":
        options = {"image": "img"}
    elif damage in ("image", "cut", "none"):
        pictures[4] = {"image": b"no image", "cut": pictures[4][:800], "none": None}[damage]
    elif damage == "empty":
        pictures, labels = [], []
    elif damage == "split":
        write_parquet(path.with_name("contrast-00000-of-00001.parquet"), pictures, labels, classes)
        path = path.with_name("train-00000-of-00001.parquet")
    elif damage == "shard":
        path = path.with_name("test-00001-of-00003.parquet")
    elif damage == "versions":
        write_parquet(path.parents[1] / "other" / path.name, pictures, labels, classes)
    if damage != "absent":
        write_parquet(path, pictures, labels, classes, **options)
    data = path.read_bytes() if damage in ("parquet", "page") else b""
    if damage == "parquet":
        path.write_bytes(data[:-20])
    elif damage == "page":
        path.write_bytes(data[:4] + bytes(400) + data[404:])
    with refused(sentence):
        image_set("EuroSAT", PREP, tmp_path / "cache", tmp_path)
    assert not list(tmp_path.glob("cache/*.npy"))


# ------------------------------------------------------------------------------------------
# the order of the classes
# ------------------------------------------------------------------------------------------

words = st.text("abcxyzé123 _-.", min_size=1, max_size=8)
class_lists = st.lists(words, min_size=2, max_size=12, unique_by=lambda w: re.sub(r"[\W_]+", "", w))


@given(class_lists, st.randoms(use_true_random=False))
def test_classes_in_another_order_are_told_by_name(classes, random):
    order = random.sample(range(len(classes)), len(classes))
    respelt = [random.choice([str, str.upper, str.title])(re.sub("[ _]", "-", classes[k])) for k in order]
    assert class_order(respelt, classes, "here") == order


@given(st.integers(1, 60), st.sampled_from([0, 1]), st.sampled_from([0, 5]))
def test_numbered_classes_in_the_order_of_text_are_told_by_number(count, first, width):
    names = sorted(str(k).zfill(width) for k in range(first, first + count))
    classes = [f"sign {chr(97 + k % 26)}{k}" for k in range(count)]
    assert class_order(names, classes, "here") == [int(name) - first for name in names]


@given(class_lists, st.randoms(use_true_random=False), st.data())
def test_names_worded_differently_keep_the_order_unless_one_is_elsewhere(classes, random, data):
    names = [f"the {k}th land: {name}" for k, name in enumerate(classes)]
    same = data.draw(st.sets(st.integers(0, len(classes) - 1), max_size=len(classes) - 1))
    names = [classes[k] if k in same else name for k, name in enumerate(names)]
    assert class_order(names, classes, "here") == list(range(len(classes)))
    a, b = random.sample(range(len(classes)), 2)
    names[a], names[b] = names[b], names[a]
    if a in same or b in same:
        with refused("here has .* as its class .*, which is the task's class .*names other classes differently"):
            class_order(names, classes, "here")
    with refused(f"here has {len(classes) + 1} classes"):
        class_order([*names, "more"], classes, "here")


def test_the_classes_of_all_tasks_are_found_in_any_order():
    for name, task in TASKS.items():
        order = np.random.default_rng(0).permutation(len(task.classes)).tolist()
        assert class_order([task.classes[k].upper() for k in order], task.classes, name) == order
    with refused("'1' as its class 0, which is the task's class 1"):  # the original SVHN calls the digit 0 its tenth
        class_order([str(k) for k in range(1, 11)], TASKS["SVHN"].classes, "SVHN")


def test_labels_follow_the_names(tmp_path):
    """EuroSAT from folders sorted by name; GTSRB from folders sorted as text: 0, 1, 10, 11."""
    for task, names in (("EuroSAT", sorted(TASKS["EuroSAT"].classes)[::-1]), ("GTSRB", sorted(map(str, range(43))))):
        spec, count = TASKS[task], len(names)
        path = tmp_path / spec.repo / "data/test-00000-of-00001.parquet"
        write_parquet(path, [picture("L", 8, 8)] * count, list(range(count)), names)
        _, labels = image_set(task, PREP, tmp_path / "cache", tmp_path)
        expected = [int(name) for name in names] if task == "GTSRB" else [spec.classes.index(name) for name in names]
        assert labels.tolist() == expected != list(range(count))


# ------------------------------------------------------------------------------------------
# mirrors as people have them
# ------------------------------------------------------------------------------------------


def test_an_unknown_feature_in_another_column_is_no_hindrance(tmp_path):
    path, spec = eurosat(tmp_path), TASKS["EuroSAT"]
    write_parquet(path, some_pictures(6), [5, 4, 3, 2, 1, 0], spec.classes[::-1])
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"huggingface"])
    about["info"]["features"]["mesh"] = {"_type": "OfTheFuture"}
    table = table.append_column("mesh", [list(range(6))])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    with pytest.raises(ValueError, match="OfTheFuture"):
        datasets.Features.from_arrow_schema(pq.read_schema(path))
    pixels, labels = image_set("EuroSAT", PREP, tmp_path / "cache", tmp_path)
    same_images(pixels, some_pictures(6))
    assert labels.tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("form", ["relative", "absolute", "text", "binary"])
def test_images_given_in_other_ways(tmp_path, form):
    """As paths in the mirror's folder, or in columns without any note of `datasets`."""
    path, pictures, spec = eurosat(tmp_path), some_pictures(4), TASKS["EuroSAT"]
    files = [make(path.parents[1] / f"pictures/{k}.png") for k in range(4)]
    [file.write_bytes(data.ljust(9999, b"\0")) for file, data in zip(files, pictures)]
    names = [str(file if form == "absolute" else file.relative_to(path.parents[1])) for file in files]
    write_parquet(path, names, [0, 1, 2, 3], spec.classes)
    if form in ("text", "binary"):
        rows = {"image": names if form == "text" else pictures, "label": [0, 1, 2, 3]}
        pq.write_table(datasets.Dataset.from_dict(rows).data.table.replace_schema_metadata(), path)

    def take():
        return image_set("EuroSAT", PREP, tmp_path / "cache", tmp_path)

    pixels, labels = take()
    same_images(pixels, pictures)
    assert labels.tolist() == [0, 1, 2, 3]
    if form != "binary":
        changed = picture("RGB", 50, 50, 77)
        files[1].write_bytes(changed.ljust(9999, b"\0"))  # no longer than before
        same_images(take()[0], [pictures[0], changed, *pictures[2:]])
        files[2].unlink()
        with refused(f"image 2 cannot be decoded: there is no file {files[2]}"):
            take()


def test_links_to_folders_are_followed(tmp_path, model):
    root, store = tmp_path / "mirror", tmp_path / "store"
    pictures, _ = write_set(store, "EuroSAT", 6)
    save_file(dict(tiny_hugging_face().state_dict()), make(store / "weights/model.safetensors"))
    spec = TASKS["EuroSAT"]
    make(root / spec.repo / "README.md").touch()
    (root / spec.repo / "data").symlink_to(store / spec.repo / "data")
    (root / spec.repo / "again").symlink_to(root)  # in a circle
    (store / spec.repo / "data" / "here").symlink_to(root / spec.repo / "data")
    (root / "tanganke/clip-tiny_eurosat").symlink_to(store / "weights")
    same_images(image_set("EuroSAT", PREP, tmp_path / "cache", root)[0], pictures)
    assert load_expert(TINY, "EuroSAT", model.visual, root)


# ------------------------------------------------------------------------------------------
# the heads
# ------------------------------------------------------------------------------------------


def test_zero_shot_heads(tmp_path, model, monkeypatch):
    heads = zero_shot_heads(model, TINY, tmp_path, ["EuroSAT", "MNIST"])
    assert heads["EuroSAT"].shape == (48, 10) and list(heads) == ["EuroSAT", "MNIST"]
    tokenizer, task = open_clip.get_tokenizer(TINY.model), TASKS["EuroSAT"]
    with torch.no_grad():
        for k in (0, 7):
            texts = model.encode_text(tokenizer([t.format(task.classes[k]) for t in task.templates]))
            mean = F.normalize(F.normalize(texts, dim=-1).mean(0), dim=0)
            torch.testing.assert_close(heads["EuroSAT"][:, k], model.logit_scale.exp() * mean)

    def again(model):
        return zero_shot_heads(model, TINY, tmp_path, ["EuroSAT"])["EuroSAT"]

    with monkeypatch.context() as patch:
        patch.setattr(hub, "zero_shot_head", lambda *_: pytest.fail("the cached head should do"))
        assert torch.equal(again(model), heads["EuroSAT"])
    other = open_clip.create_model(TINY.model)
    other.load_state_dict(model.state_dict())
    other.text_projection.data[0, 0] += 1
    assert not torch.equal(again(other), heads["EuroSAT"])
    monkeypatch.setitem(TASKS, "EuroSAT", task._replace(templates=["{}"]))
    assert not torch.equal(again(model), heads["EuroSAT"])


# ------------------------------------------------------------------------------------------
# the hub and the plan
# ------------------------------------------------------------------------------------------


def mirror(root, model, tasks=("EuroSAT", "SVHN"), count=8):
    """A whole mirror in the real layout, as `hf download --local-dir` makes it."""
    save_file(model.state_dict(), make(root / TINY.repo / "open_clip_model.safetensors"))
    for task in tasks:
        path = make(root / hub.expert_repo(TINY, task) / "model.safetensors")
        save_file(dict(tiny_hugging_face().state_dict()), path)
        write_set(root, task, count)
        (root / TASKS[task].repo / "README.md").write_text("---\n---\n")
    return root


class FakeHub:
    """huggingface_hub's metadata and downloads, served from a mirror."""

    def __init__(self, root, monkeypatch):
        self.root, self.downloaded = root, []
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.look_up)

    def repo_info(self, name, repo_type, files_metadata):
        assert files_metadata and repo_type == ("dataset" if name in {t.repo for t in TASKS.values()} else "model")
        files = [path for path in (self.root / name).rglob("*") if path.is_file()]
        siblings = [
            SimpleNamespace(rfilename=str(f.relative_to(self.root / name)), size=f.stat().st_size) for f in files
        ]
        splits = [{"name": "train", "num_examples": 1000}, {"name": "test", "num_examples": 50}]
        card = {"dataset_info": {"config_name": "default", "splits": splits}}
        if "svhn" in name:
            other = {"config_name": "full_numbers", "splits": [{"name": "test", "num_examples": 7}]}
            card = {"dataset_info": [other, {"config_name": "cropped_digits", "splits": splits}]}
        return SimpleNamespace(siblings=siblings, sha=f"commit of {name}", card_data=card)

    def download(self, name, file, repo_type, revision):
        assert revision == f"commit of {name}"
        self.downloaded.append((name, file))
        return str(self.root / name / file)

    def look_up(self, name, file, revision, repo_type):
        assert revision == f"commit of {name}"
        return str(self.root / name / file) if (name, file) in self.downloaded else None


def test_plan_from_the_hub(tmp_path, model, monkeypatch):
    root, cache = mirror(tmp_path / "hub", model), tmp_path / "cache"
    fake = FakeHub(root, monkeypatch)
    tasks, prep = ["EuroSAT", "SVHN"], hub.preprocessing(TINY)
    before = hub.plan(TINY, cache, tasks=tasks)
    assert not any(item.present for item in before) and not fake.downloaded
    files = {item.what: item.bytes for item in before if not item.what.endswith("decoded")}
    assert set(files) == {
        "timm/tiny.openai: open_clip_model.safetensors",
        "tanganke/clip-tiny_eurosat: model.safetensors",
        "tanganke/eurosat: data/test-00000-of-00001.parquet",
        "tanganke/clip-tiny_svhn: model.safetensors",
        "ufldl-stanford/svhn: cropped_digits/test-00000-of-00001.parquet",
    }
    for what, size in files.items():
        assert size == (root / what.replace(": ", "/")).stat().st_size > 0
    decoded = [item for item in before if item.what.endswith("images, decoded")]
    assert [item.bytes for item in decoded] == [50 * 3 * 32 * 32] * 2 and decoded[0].place == cache
    assert before[-1].bytes == max(size for what, size in files.items() if "parquet" in what)
    assert "to download" in hub.summary(before)
    hub.check_space(before)
    some = hub.plan(TINY, cache, tasks=["SVHN"], weights=False, experts=False, splits=["test"], limit=5)
    assert [item.bytes for item in some][1] == 5 * 3 * 32 * 32 and len(some) == 3

    image_set("SVHN", prep, cache)
    load_expert(TINY, "SVHN", model.visual)
    assert len(fake.downloaded) == 2
    after = {item.what: item for item in hub.plan(TINY, cache, tasks=tasks)}
    assert {what for what, item in after.items() if item.present} == {
        "tanganke/clip-tiny_svhn: model.safetensors",
        "ufldl-stanford/svhn: cropped_digits/test-00000-of-00001.parquet",
        "SVHN test images, decoded",
    }
    assert after["SVHN test images, decoded"].bytes == 8 * 3 * 32 * 32
    load_expert(TINY, "SVHN", model.visual)
    assert len(fake.downloaded) == 2


def test_plan_from_a_mirror(tmp_path, model, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("a mirror needs no network"))
    root, cache, tasks = mirror(tmp_path / "hub", model), tmp_path / "cache", ["EuroSAT", "SVHN"]
    items = hub.plan(TINY, cache, root, tasks=tasks)
    absent = [*(f"{task} test images, decoded" for task in tasks), "a passing copy of one split until it is decoded"]
    assert len(items) == 8 and [item.what for item in items if not item.present] == absent
    for task in tasks:
        image_set(task, hub.preprocessing(TINY), cache, root)
    assert all(item.present for item in hub.plan(TINY, cache, root, tasks=tasks))
    (root / "tanganke/clip-tiny_svhn/model.safetensors").unlink()
    with refused("clip-tiny_svhn"):
        hub.plan(TINY, cache, root, tasks=tasks)
    assert len(hub.plan(TINY, cache, root, tasks=["SVHN"], experts=False)) == 3
    path = root / TASKS["SVHN"].repo / "cropped_digits/test-00000-of-00001.parquet"
    path.write_bytes(b"PAR1 damaged PAR1")
    with refused("parquet file cannot be read"):
        hub.plan(TINY, cache, root, tasks=["SVHN"], experts=False)


def test_too_little_space_is_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    items = [hub.Item(f"file {k}", free // 2 + 10**8, False, tmp_path / "not/yet/there") for k in range(2)]
    hub.check_space(items[:1])
    with refused("GB free, but .* GB are needed there: .* to download"):
        hub.check_space(items)
    hub.check_space([items[0], items[1]._replace(present=True)])


@contextmanager
def offline(monkeypatch, cache):
    class Unreachable:
        def repo_info(self, *_, **__):
            raise RuntimeError("Name or service\nnot known")

    with monkeypatch.context() as patch:
        patch.setattr(hub, "HfApi", Unreachable)
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        yield


def test_without_a_network_what_was_downloaded_will_do(tmp_path, model, monkeypatch):
    """Files fetched by commit: no refs/main, links to blobs, and none of the files that nobody asked for."""
    source, cache = mirror(tmp_path / "source", model, ["EuroSAT"]), tmp_path / "hub"
    with offline(monkeypatch, cache), refused("cannot reach timm/tiny.openai.*Name or service not known.*--hub DIR"):
        hub.plan(TINY, tmp_path)
    expert = hub.expert_repo(TINY, "EuroSAT")
    for kind, name, file in (
        ("models", TINY.repo, "open_clip_model.safetensors"),
        ("models", expert, "model.safetensors"),
        ("datasets", TASKS["EuroSAT"].repo, "data/test-00000-of-00001.parquet"),
    ):
        folder = cache / f"{kind}--{name.replace('/', '--')}"
        blob = make(folder / "blobs" / "12ab")
        shutil.copy(source / name / file, blob)
        make(folder / "snapshots" / "c0ffee" / file).symlink_to(blob)
        (folder / "snapshots" / "c0ffee" / "README.md").touch()
        make(folder / "snapshots" / "newer" / "README.md").touch()
        for unfinished in range(2):
            (folder / "snapshots" / "newer" / f"{unfinished}.parquet").symlink_to(folder / "blobs" / "incomplete")
    with offline(monkeypatch, cache):
        items = hub.plan(TINY, tmp_path / "cache", tasks=["EuroSAT"])
        assert [item.present for item in items] == [True, True, True, False, False]
        assert len(image_set("EuroSAT", PREP, tmp_path / "cache")[0]) == 8
        assert load_expert(TINY, "EuroSAT", model.visual)
        with refused("tanganke--eurosat.*has no split 'train' in parquet files; it has: test"):
            image_set("EuroSAT", PREP, tmp_path / "cache", split="train")


def test_a_failed_download_is_one_sentence(tmp_path, model, monkeypatch):
    FakeHub(mirror(tmp_path / "hub", model, ["EuroSAT"]), monkeypatch)

    def broken(*_, **__):
        raise ConnectionError("reset\nby peer")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with refused("cannot download model.safetensors of tanganke/clip-tiny_eurosat: reset by peer"):
        load_expert(TINY, "EuroSAT", model.visual)


def test_images_given_as_paths_need_a_mirror(tmp_path, model, monkeypatch):
    write_parquet(eurosat(tmp_path), ["a.png"], [0], TASKS["EuroSAT"].classes)
    FakeHub(tmp_path, monkeypatch)
    with refused("image 0 cannot be decoded: it is given as a path; --hub DIR"):
        image_set("EuroSAT", PREP, tmp_path / "cache")


def test_a_whole_mirror_end_to_end(tmp_path, model):
    """Everything that reproduce.py asks for, in one go."""
    root, cache = mirror(tmp_path / "hub", model, ["EuroSAT"]), tmp_path / "cache"
    pretrained = load_pretrained(TINY, root)
    head = zero_shot_heads(pretrained, TINY, cache, ["EuroSAT"])["EuroSAT"]
    pixels, labels = image_set("EuroSAT", hub.preprocessing(TINY), cache, root)
    pretrained.visual.load_state_dict(load_expert(TINY, "EuroSAT", pretrained.visual, root))
    with torch.no_grad():
        logits = F.normalize(pretrained.visual(normalise(pixels)), dim=-1) @ head
    assert logits.shape == (8, 10) and logits.isfinite().all() and len(labels) == 8
    assert load_file(root / TINY.repo / "open_clip_model.safetensors")["logit_scale"].exp() == pytest.approx(1 / 0.07)
