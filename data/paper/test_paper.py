"""What must be true of the paper's suite, on files of the real formats and layouts made here. Needs no network."""

import errno
import io
import json
import os
import re
import shutil
import sys
import types
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import datasets
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import Compose
from transformers import CLIPVisionConfig, CLIPVisionModel

from data.files import InputError
from data.paper import authors, hub, images, published
from data.paper.hub import TASKS, Architecture, load_expert, load_pretrained, zero_shot_heads
from data.paper.images import class_order, image_set, normalise, notice

ROOM = Path(__file__).parent
FACTS = ROOM.parents[1].parent / "shared" / "facts"

TINY = Architecture("tiny", "tiny-quickgelu", "openai", "timm/tiny.openai", "tanganke/clip-tiny_{}")
TINY_VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
TINY_TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
PRETRAINED = f"{TINY.repo}/open_clip_model.safetensors"
EXPERT = "tanganke/clip-tiny_dtd/model.safetensors"


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


@pytest.fixture
def take(tmp_path):
    """A function that reads a data set of the mirror in tmp_path: (images, labels)."""
    return lambda task="EuroSAT", root=tmp_path, **options: image_set(task, PREP, tmp_path / "cache", root, **options)


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


def hugging_face(small=True):
    """A CLIPVisionModel of two layers, as small as TINY, or else as ViT-B/32 is by default."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = CLIPVisionConfig(hidden_act="quick_gelu", num_hidden_layers=2, **(sizes if small else {}))
    torch.manual_seed(1)
    return randomise(CLIPVisionModel(config)).eval()


def bare_state():
    return {name.removeprefix("vision_model."): value for name, value in hugging_face().state_dict().items()}


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_mirror(root, model, tasks, count):
    """In the hub's layout a pre-trained model, and an expert and so many test images of each task."""
    save_file(model.state_dict(), make(root / PRETRAINED))
    for seed, task in enumerate(tasks):
        expert = hugging_face().state_dict()
        torch.manual_seed(seed)
        expert = {name: p + 0.05 * torch.randn_like(p) for name, p in expert.items()}
        save_file(expert, make(root / hub.expert_repo(TINY, task) / "model.safetensors"))
        write_set(root, task, count, seed)


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


def refused(sentence):
    """Expects an InputError of one line that says so."""
    return pytest.raises(InputError, match=rf"\A(?-s:.)*{sentence}(?-s:.)*\Z")


# ---- Facts -----------------------------------------------------------------------------------------------------------


def test_facts_are_those_of_the_paper():
    classes = {"SUN397": 397, "Cars": 196, "RESISC45": 45, "EuroSAT": 10, "SVHN": 10, "GTSRB": 43, "MNIST": 10}
    assert {name: len(task.classes) for name, task in TASKS.items()} == {**classes, "DTD": 47}
    assert sum(task.images for task in TASKS.values()) == 87433
    assert all("{}" in template for task in TASKS.values() for template in task.templates)
    assert TASKS["SVHN"].config == "cropped_digits" and TASKS["Cars"].checkpoint_suffix == "stanford-cars"
    tables = published.paper_tables()
    rows = [row for number in ("2", "3", "10") for row in tables[number]["rows"]]
    rows += sum(published.read("hub_results.json")["main"].values(), [])
    for row in rows:
        assert len(row["accuracy"]) == 8 and abs(np.mean(row["accuracy"]) - row["average"]) < 0.6, row
    assert published.read("hub_results.json")["tasks"] == published.PUBLISHED_TASKS
    assert [row["learning_rate"] for row in published.adaptation_curves("ViT-L-14")] == [1e-4]
    assert published.eight_tasks("ViT-H-14", "hub") == published.adaptation_curves("ViT-B-16") == []
    arithmetic = published.sweep("ViT-B-32", "clean")["Task Arithmetic"][0.3]
    assert arithmetic == pytest.approx(published.robustness("ViT-B-32", "paper", "clean")[0]["accuracy"], abs=0.11)


@pytest.mark.skipif(not FACTS.is_dir(), reason="the project's facts are not beside the repository")
def test_carried_facts_are_the_projects_cell_by_cell():
    def fact(name):
        return json.loads((FACTS / name).read_text(encoding="utf-8"))

    for name in ("paper.json", "paper_sweeps.json"):
        assert published.read(name) == fact(name)
    assert published.read("tasks.json")["tasks"] == fact("eight_tasks.json")
    theirs, ours, tables = fact("published_results.json"), published.read("hub_results.json"), published.paper_tables()
    assert theirs.keys() == ours.keys() and ours["main"].keys() == theirs["main"].keys()
    for key in ours.keys() - {"about", "main", "parameters"}:
        assert theirs[key] == ours[key]
    of_the_paper = [row["accuracy"] for table in ("2", "3", "10") for row in tables[table]["rows"]]
    for arch, rows in theirs["main"].items():
        carried = [row for row in ours["main"][arch] if "from" not in row]  # not of what was looked up besides
        assert carried == [row for row in rows if row["source"] == "hub"]
        assert all(row["accuracy"] in of_the_paper for row in rows if row["source"] == "paper")
    for key in ("tasks", "trainable", "total"):
        assert ours["parameters"][key] + [row[key] for row in tables["8"]["rows"]] == theirs["parameters"][key]
    assert theirs["parameters"]["pretrained_total"] == tables["8"]["single_pretrained"]


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


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_load_pretrained_from_a_mirror(tmp_path, model):
    save_file(model.state_dict(), make(tmp_path / PRETRAINED))
    loaded = load_pretrained(TINY, tmp_path)
    assert not loaded.training and all(p.dtype == torch.float32 for p in loaded.parameters())
    assert same(loaded.state_dict(), model.state_dict())
    x = torch.linspace(-4, 4, 99)
    for block in (*loaded.visual.transformer.resblocks, *loaded.transformer.resblocks):
        assert torch.allclose(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))
        assert not torch.allclose(block.mlp.gelu(x), F.gelu(x), atol=1e-3)


def test_load_pretrained_by_download(tmp_path, model, monkeypatch):
    """What is not on the hub open_clip downloads by its tag; QuickGELU is forced where the tag needs it."""
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    tag = {"openai": {"hf_hub": "", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-plain", tag)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(path))
    arch = hub.architecture("tiny-plain", "openai")
    loaded = load_pretrained(arch)
    assert isinstance(loaded.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    assert hub.preprocessing(arch).mean == (0.1, 0.2, 0.3)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", Mock(side_effect=OSError("no route\nto host")))
    with refused("tiny-plain from openai.*no route to host"):
        load_pretrained(arch)


@pytest.mark.parametrize("small", [True, False])
def test_a_converted_tower_computes_the_same(small):
    hf = hugging_face(small)
    config = open_clip.get_model_config(TINY.model if small else "ViT-B-32-quickgelu")
    config["vision_cfg"]["layers"] = 2
    with torch.device("meta"):
        visual = open_clip.CLIP(**config).visual
    projection = torch.randn(*visual.proj.shape) / 30
    visual.proj = nn.Parameter(projection.clone())
    tower = hub.from_hugging_face(hf.state_dict(), visual, "file")
    assert list(tower) == list(visual.state_dict()) and torch.equal(tower["proj"], projection)
    tower["proj"] *= 2  # a copy: the pre-trained tower stays as it was
    assert torch.equal(visual.proj, projection)
    visual.eval().load_state_dict(tower, assign=True)
    pooled, x = [], torch.randn(2, 3, *visual.image_size)
    visual.ln_post.register_forward_hook(lambda *call: pooled.append(call[2][:, 0]))
    with torch.no_grad():
        expected, projected = hf(pixel_values=x).pooler_output, visual(x)
    assert expected.std() > 0.1  # features that differ among themselves
    torch.testing.assert_close(pooled[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projected, expected @ (2 * projection), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_load_expert(tmp_path, model, file, prefix):
    state = {prefix + name: value for name, value in bare_state().items()}
    plain = hub.from_hugging_face(state, model.visual, "file")
    state[f"{prefix}embeddings.position_ids"] = torch.arange(17)[None]
    path = make(tmp_path / "tanganke/clip-tiny_stanford-cars" / file)
    state = {name: value.half() if "fc1" in name else value for name, value in state.items()}
    save_file(state, path) if file.endswith("safetensors") else torch.save(state, path)
    tower = load_expert(TINY, "Cars", model.visual, tmp_path)
    assert all(value.dtype == torch.float32 for value in tower.values())
    assert same(tower, {name: p.half().float() if "c_fc" in name else p for name, p in plain.items()})


def test_a_safetensors_file_in_the_folder_itself_comes_first(tmp_path):
    def first():
        return hub.repository("x", "model", tmp_path).first(*hub.WEIGHT_FILES, folder="cola/")

    make(tmp_path / "x/model.safetensors").touch()
    with refused("in cola/ has no model.safetensors or pytorch_model.bin; it has: nothing"):
        first()
    for name in ("cola/checkpoint-9/model.safetensors", "cola/pytorch_model.bin", "cola/model.safetensors"):
        make(tmp_path / "x" / name).touch()
        assert first() == name


class Evil:
    """Unpickled in the ordinary way, it makes a call: of a function that torch blocks, or of one that it does not."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


BLOCKED, UNBLOCKED = Evil(os.system, "touch marker"), Evil(eval, "open('marker', 'w')")
LAYER = "encoder.layers.0"
MISTAKEN = [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git-LFS pointer.*`git lfs pull`"),
    (b"\n <!DOCTYPE html><html>", "is a web page, not the file itself"),
    (b"<html>", "is a web page"),
    (b"<?xml version='1.0'?><Error>", "is a web page"),
    (b"", "is empty: download it again"),
    (bytes(99), "is nothing but zeros"),
]
BAD_WEIGHTS = [  # what becomes of a file: bytes, changes of its entries, or what is pickled in its place
    *((EXPERT, *mistaken) for mistaken in MISTAKEN),
    (PRETRAINED, *MISTAKEN[0]),
    (EXPERT, b"<p\0\0\0\0\0\0", "is not a readable weight file"),
    (EXPERT, None, "no files in .*clip-tiny_dtd; `hf download"),
    (EXPERT.replace("model.safetensors", "config.json"), b"{}", "no model.safetensors or pytorch_model.bin; it has: c"),
    (EXPERT, [1, 2], "pytorch_model.bin should hold tensors by name"),
    (EXPERT, BLOCKED, "pytorch_model.bin is not a readable .*never run.*safe format.*posix.system"),
    (EXPERT, {f"{LAYER}.self_attn.q_proj.bias": None}, f"lacks {LAYER}.self_attn.q_proj.bias"),
    (EXPERT, {"text_model.embeddings": torch.zeros(3)}, "does not know: text_model.embeddings"),
    (
        EXPERT,
        {f"{LAYER}.self_attn.k_proj.weight": torch.zeros(64, 63)},
        r"k_proj.weight has the shape \(64, 63\), the architecture needs \(64, 64\)",
    ),
    (EXPERT, {f"{LAYER}.mlp.fc1.weight": torch.zeros(64, 256)}, r"fc1.weight has the shape \(64, 256\)"),
    (EXPERT, {"post_layernorm.bias": torch.full((64,), torch.inf)}, "post_layernorm.bias has values that are not fin"),
    (EXPERT, {"post_layernorm.bias": torch.zeros(64).long()}, "post_layernorm.bias has the dtype torch.int64"),
    (EXPERT, {"vision_model.post_layernorm.bias": torch.zeros(64)}, "lacks vision_model.embeddings.*and 32 more"),
    (PRETRAINED, None, "no files in .*tiny.openai"),
    (PRETRAINED, b"garbage", "cannot load the weights of tiny-quickgelu from .*open_clip_model"),
    (PRETRAINED, {"visual.proj": torch.zeros(3, 3)}, "cannot load .*visual.proj"),
    (PRETRAINED, {"visual.proj": None}, "cannot load .*visual.proj"),
    (PRETRAINED, {"visual.proj": torch.full((64, 48), torch.nan)}, "visual.proj has values that are not finite"),
]


@pytest.mark.parametrize("file, content, sentence", BAD_WEIGHTS)
def test_unusable_weights_are_refused(tmp_path, model, monkeypatch, file, content, sentence):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / file)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        state = model.state_dict() if file == PRETRAINED else bare_state()
        save_file({name: value for name, value in {**state, **content}.items() if value is not None}, path)
    elif content is not None:
        torch.save(content, path.with_name("pytorch_model.bin"))
    with refused(sentence):
        load_pretrained(TINY, tmp_path) if file == PRETRAINED else load_expert(TINY, "DTD", model.visual, tmp_path)
    assert not Path("marker").exists()


@given(st.integers(1, 255))
def test_a_header_that_begins_as_a_web_page_is_none(tmp_path_factory, more):
    """A safetensors file whose header has 60 bytes and a multiple of 256, filled up as the format allows."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(60 + 256 * more)
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    assert path.read_bytes().startswith(b"<")
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


# ---- The authors' pickles --------------------------------------------------------------------------------------------


class OldClasses:
    """The names that the authors' files use, importable while the files are written and gone afterwards."""

    def __enter__(self):
        sys.modules["src"], sys.modules["src.modeling"] = types.ModuleType("src"), types.ModuleType("src.modeling")
        names = {"ImageEncoder": nn.Module, "ClassificationHead": nn.Linear, "VisualTransformer": nn.Module}
        for name, base in names.items():
            module = open_clip.model if name == "VisualTransformer" else sys.modules["src.modeling"]
            setattr(module, name, type(name, (base,), {"__module__": module.__name__}))
            setattr(self, name, getattr(module, name))
        return self

    def __exit__(self, *_):
        del sys.modules["src"], sys.modules["src.modeling"], open_clip.model.VisualTransformer

    def encoder(self, clip_model):
        """ImageEncoder.model.visual, the two preprocessing pipelines beside it, without the text transformer."""
        visual = self.VisualTransformer()
        visual.__dict__.update(clip_model.visual.__dict__)
        inner = nn.Module()
        inner.visual, inner.token_embedding, inner.logit_scale = visual, nn.Embedding(5, 4), clip_model.logit_scale
        inner.register_buffer("attn_mask", torch.full((3, 3), -torch.inf), persistent=False)
        encoder = self.ImageEncoder()
        encoder.model, encoder.cache_dir = inner, None
        encoder.train_preprocess = open_clip.image_transform(32, is_train=True)
        encoder.val_preprocess = open_clip.image_transform(32, is_train=False)
        return encoder

    def head(self, weight, normalize=True, bias=0.0):
        head = self.ClassificationHead(weight.shape[1], weight.shape[0])
        head.normalize, head.weight = normalize, nn.Parameter(weight.clone())
        head.bias = nn.Parameter(torch.full_like(head.bias, bias))
        return head


@pytest.fixture
def old():
    with OldClasses() as classes:
        yield classes


@pytest.fixture
def shapes(model):
    return {name: value.shape for name, value in model.visual.state_dict().items()}


def test_authors_experts(tmp_path):
    folder, weight = tmp_path / "tiny", torch.randn(10, 48)
    pretrained, finetuned, half = tower_like(2), tower_like(3), tower_like(4).half()
    with OldClasses() as old:
        torch.save(old.encoder(pretrained), make(folder / "zeroshot.pt"))
        torch.save(old.encoder(finetuned), make(folder / "MNIST/finetuned.pt"))
        torch.save(old.encoder(half), make(folder / "SVHN/finetuned.pt"))
        for task in ("MNIST", "SVHN"):
            torch.save(old.head(weight), folder / f"head_{task}.pt")
    with pytest.raises((AttributeError, ModuleNotFoundError)):  # the complaint under every repository of this family
        torch.load(folder / "zeroshot.pt", weights_only=False)
    before, safe = set(sys.modules), torch.serialization.get_safe_globals()
    visual, experts, heads = authors.load_authors_experts(TINY, tmp_path, ["MNIST", "SVHN"])
    assert not any(name.split(".")[0] == "src" for name in set(sys.modules) - before)
    assert set(torch.serialization.get_safe_globals()) == set(safe)
    assert not visual.training and isinstance(visual, open_clip.transformer.VisionTransformer)
    assert same(visual.state_dict(), pretrained.visual.state_dict())
    assert same(experts["MNIST"], finetuned.visual.state_dict())
    assert all(v.dtype == torch.float32 for v in experts["SVHN"].values())
    assert torch.equal(experts["SVHN"]["conv1.weight"], half.visual.conv1.weight.float())
    assert torch.equal(heads["MNIST"], weight.T) and not heads["MNIST"].requires_grad
    assert not any(value.requires_grad for value in experts["MNIST"].values())
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(visual(x), pretrained.visual(x), atol=1e-6)


def test_authors_files_refused(tmp_path, old, shapes):
    path = tmp_path / "finetuned.pt"

    def refuses(thing, sentence, legacy=False):
        torch.save(thing, path, _use_new_zipfile_serialization=not legacy)
        with refused(sentence):
            authors.read_head(path, "MNIST", 48) if "Head" in repr(thing) else authors.read_tower(path, shapes)

    with refused("there is no file .*finetuned.pt"):
        authors.read_tower(path, shapes)
    other = tower_like(5)
    other.visual.ln_post.bias.data[0] = float("nan")
    refuses(old.encoder(other), "finetuned.pt: ln_post.bias has values that are not finite")
    del other.visual.transformer.resblocks[1]
    refuses(old.encoder(other), "finetuned.pt lacks transformer.resblocks.1")
    refuses(old.head(torch.ones(9, 48)), r"weight has the shape \(9, 48\), the architecture needs \(10, 48\)")
    refuses(old.head(torch.ones(10, 48), bias=1.0), "no bias")
    refuses(old.head(torch.ones(10, 48), normalize=False), "should normalise")
    refuses({"a": 1}, "model.visual.*holds: nothing")
    refuses({"a": 1}, "finetuned.pt is not a module that torch.save wrote since torch 1.6", legacy=True)


def test_truncated_files_are_refused(tmp_path, old):
    path = tmp_path / "head.pt"
    torch.save(old.head(torch.randn(10, 48)), path)
    whole = path.read_bytes()
    assert authors.read_head(path, "MNIST", 48).shape == (48, 10)

    @settings(max_examples=60)
    @given(st.integers(0, len(whole) - 1))
    def check(length):
        path.write_bytes(whole[:length])
        with refused("head.pt"):
            authors.read_head(path, "MNIST", 48)

    check()


def test_malicious_modules_execute_nothing(tmp_path, old, shapes, monkeypatch):
    """Hidden within a module that is otherwise in order: the call is inert, or the file is refused."""
    monkeypatch.chdir(tmp_path)
    encoder = old.encoder(SimpleNamespace(visual=tower_like(6).visual, logit_scale=nn.Parameter(torch.zeros(()))))
    for trap in (UNBLOCKED, BLOCKED):
        encoder.trap = trap
        encoder.model.visual.conv1.trap = [trap, {"more": trap, Evil: [Mock]}]
        torch.save(encoder, "evil.pt")
        torch.load("evil.pt", weights_only=False)
        Path("marker").unlink()  # so the file does work on the unwary
        if trap is UNBLOCKED:
            tower = authors.read_tower(Path("evil.pt"), shapes)
            assert torch.equal(tower["conv1.weight"], encoder.model.visual.conv1.weight)
        else:
            with refused("evil.pt is not a module.*posix.system"):
                authors.read_tower(Path("evil.pt"), shapes)
        assert not Path("marker").exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"cposix\nsystem\n(S'touch MARKER'\ntR.",
        b"(S'touch MARKER'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARKER'\no.",
        b'cbuiltins\neval\n(S\'__import__("os").system("touch MARKER")\'\ntR.',
        b"cbuiltins\neval\n(X\x11\x00\x00\x00open('MARKER','w')tR.",
        b"c__builtin__\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch MARKER'\ntR.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__(ts\x86b.",  # state for a function it knows
        b"ctorch\nload\n(X\x06\x00\x00\x00MARKERtR.",
        b"c__builtin__\nset\n(cos\nsystem\ntR.",
    ],
)
def test_hand_written_pickles_execute_nothing(tmp_path, body, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = torch._utils._rebuild_tensor_v2.__defaults__
    torch.save({}, "empty.pt")
    with zipfile.ZipFile("empty.pt") as empty, zipfile.ZipFile("evil.pt", "w") as evil:
        for name in empty.namelist():
            evil.writestr(name, body if name.endswith("data.pkl") else empty.read(name))
    for content in (Path("evil.pt").read_bytes(), body):
        Path("evil.pt").write_bytes(content)
        with pytest.raises(InputError):
            authors.read_tower(Path("evil.pt"), {})
    assert sorted(os.listdir(".")) == ["empty.pt", "evil.pt"]
    assert torch._utils._rebuild_tensor_v2.__defaults__ == original


# ---- The images ------------------------------------------------------------------------------------------------------

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
    features = datasets.Features(features)
    entries = [p and ({"path": p} if isinstance(p, str) else {"bytes": p}) for p in pictures]
    rows = {image: [e and {"bytes": None, "path": None, **e} for e in entries], label: labels}
    table = datasets.Dataset.from_dict(rows, features).data.table
    note = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(table.replace_schema_metadata(note), make(path))


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


FILE = "data/test-00000-of-00001.parquet"
EUROSAT = f"{TASKS['EuroSAT'].repo}/{FILE}"


def same_images(pixels, pictures):
    images = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))) for data in pictures]
    torch.testing.assert_close(normalise(pixels), torch.stack([*map(EXPECTED, images)]), atol=1e-6, rtol=0)


@settings(max_examples=80)
@given(st.sampled_from(MODES), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99), st.sampled_from([0, 3, 6]))
def test_pixels_are_open_clips(mode, width, height, seed, orientation):
    data = picture("RGB" if orientation else mode, width, height, seed, orientation)
    transform = Compose(image_transform_v2(PREP, is_train=False).transforms[:-2])
    found = images.pixels(transform, {"bytes": data, "path": None}, ROOM)
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


def test_a_data_set_may_have_another_name_for_its_test_split(tmp_path, take, monkeypatch):
    pictures, _ = write_set(tmp_path, "DTD", 4, split="validation")
    monkeypatch.setitem(TASKS, "DTD", TASKS["DTD"]._replace(split="validation"))
    same_images(take("DTD")[0], pictures)
    assert hub.plan(TINY, tmp_path, tmp_path, tasks=["DTD"], weights=False, experts=False)["decode"]


def test_several_processes_decode_the_same(tmp_path, take, monkeypatch):
    monkeypatch.setattr(images.os, "cpu_count", lambda: 3)
    pictures = [picture("RGB", 33, 34, seed) for seed in range(301)]
    write_parquet(tmp_path / EUROSAT, pictures, [k % 10 for k in range(301)], TASKS["EuroSAT"].classes)
    same_images(take()[0], pictures)
    monkeypatch.setattr(images, "pixels", lambda *_: os._exit(1))
    with refused("EuroSAT, split test of tanganke/eurosat cannot be read: .*died"):
        take(limit=300)
    assert len(list(tmp_path.glob("cache/*.npy*"))) == 3  # an image file, and two locks


def test_changed_and_second_mirrors_are_seen(tmp_path, take):
    sets = []
    for root, seed in ((tmp_path / "a", 0), (tmp_path / "a", 1), (tmp_path / "b", 2)):
        pictures, _ = write_set(root, "EuroSAT", 6, seed=seed)
        sets.append(take(root=root)[0].clone())
        same_images(sets[-1], pictures)
    assert not torch.equal(sets[0], sets[1]) and not torch.equal(sets[1], sets[2])


@pytest.fixture
def decoding(monkeypatch):
    """Counts the images that are decoded."""
    mock = Mock(wraps=images.pixels)
    monkeypatch.setattr(images, "pixels", mock)
    return mock


def test_limit_decodes_no_more_and_is_kept_apart(tmp_path, take, decoding):
    write_set(tmp_path, "MNIST", 20, folder="mnist", shards=2)
    few, labels = take("MNIST", limit=12)
    assert decoding.call_count == 12 and few.shape == (12, 3, 32, 32) and len(labels) == 12
    everything, all_labels = take("MNIST")
    assert len(everything) == 20
    assert torch.equal(few, everything[:12]) and torch.equal(labels, all_labels[:12])
    spaced = {12: [0, 2, 3, 5, 7, 9, 10, 12, 14, 16, 17, 19], 3: [0, 10, 19], 1: [0], 20: range(20), 50: range(20)}
    for limit, places in spaced.items():
        some, labels_of_some = take("MNIST", limit=limit, spaced=True)
        assert torch.equal(some, everything[list(places)]) and torch.equal(labels_of_some, all_labels[list(places)])
    with refused("at least 1, not 0"):
        take("MNIST", limit=0)


def test_interruption_leaves_nothing_behind(tmp_path, take, decoding):
    pictures, _ = write_set(tmp_path, "DTD", 9)
    decoding.side_effect = [*[DEFAULT] * 4, KeyboardInterrupt, *[DEFAULT] * 9]
    with pytest.raises(KeyboardInterrupt):
        take("DTD")
    (lock,) = (tmp_path / "cache").iterdir()
    unfinished = lock.with_suffix(".123.part")  # of a run that was killed
    unfinished.write_bytes(b"half")
    make(unfinished.with_suffix(".part.abcd") / "parquet/file").write_bytes(b"half")
    same_images(take("DTD")[0], pictures)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".npy", ".lock"}


def test_a_full_disk_is_said_to_be_one(tmp_path, take, monkeypatch):
    write_set(tmp_path, "DTD", 3)
    full = OSError(errno.ENOSPC, "No space left on device")
    generation = datasets.exceptions.DatasetGenerationError("An error occurred")
    generation.__cause__ = full
    for owner, name, error in ((images, "open", full), (datasets, "load_dataset", generation)):
        with monkeypatch.context() as patch, refused("cannot write .*No space left on device.*: free some space or"):
            patch.setattr(owner, name, Mock(side_effect=error), raising=False)
            take("DTD")
        assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    with refused("cannot make the folder .*choose another .*--cache"):
        image_set("DTD", PREP, tmp_path / TASKS["DTD"].repo / FILE / "cache", tmp_path)


def test_damage_to_the_cache_is_said(tmp_path, take):
    write_set(tmp_path, "DTD", 3)
    take("DTD")
    (file,) = tmp_path.glob("cache/*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    with refused(f"{file.name} is damaged .*delete it"):
        take("DTD")


def test_two_at_a_time_decode_once(tmp_path, take, decoding):
    write_set(tmp_path, "DTD", 9)
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(take, ["DTD"] * 3)]
    assert decoding.call_count == 9 and torch.equal(found[0][0], found[2][0])


def test_a_split_of_another_size_is_noticed():
    said = "SVHN has 100 test images, not the published 26,032: not comparable with published figures"
    assert notice("SVHN", 26032) is None and notice("SVHN", 100) == said


Image.new("1", (20000, 20000)).save(BOMB := io.BytesIO(), "PNG")
NUMBERS, TEXTS = {"dtype": datasets.Value("int64")}, {"dtype": datasets.Value("string")}
HERE = "EuroSAT, split test of tanganke/eurosat"
BAD_DATA_SETS = [  # options of write_parquet and images that differ, names of the files, what becomes of their bytes
    ({"labels": [0, 0, 0, 12, 0, 0], **NUMBERS}, f"{HERE}: image 3 has the label 12; 0 to 9 are known"),
    ({"labels": [0, 0, 0, -1, 0, 0], **NUMBERS}, "image 3 has the label -1;"),
    ({"labels": [0, 0, 0, None, 0, 0], **NUMBERS}, "image 3 has the label None;"),
    ({"labels": list("abcdef"), **TEXTS}, "image 0 has the label 'a';"),
    ({"classes": "abc"}, r"has 3 classes \(a, b, c\), but tasks.json 10"),
    ({"image": "img"}, "has no column image; it has: img, label"),
    ({4: b"no image"}, f"{HERE}: image 4 cannot be decoded: cannot identify"),
    ({4: picture("RGB", 40, 30)[:800]}, "image 4 cannot be decoded: .*truncated"),
    ({4: BOMB.getvalue()}, "image 4 cannot be decoded: Image size .* exceeds limit"),
    ({4: None}, "image 4 cannot be decoded"),
    ({"pictures": [], "labels": []}, f"{HERE} has no images"),
    ({"bytes": lambda data: data[:-20]}, "test-00000-of-00001.parquet is not a readable parquet file"),
    ({"bytes": lambda data: data[:4] + bytes(400) + data[404:]}, f"{HERE} cannot be read"),
    ({"bytes": lambda _: MISTAKEN[0][0]}, f"{FILE} .*{MISTAKEN[0][1]}"),
    (
        {"files": [FILE.replace("test", "contrast"), FILE.replace("test", "train")]},
        "eurosat has no split 'test' in parquet files; it has: contrast, train",
    ),
    ({"files": ["data/test-00001-of-00003.parquet"]}, "all shards of the split 'test' in one folder, but has: data/te"),
    ({"files": [FILE, FILE.replace("data", "other")]}, f"but has: {FILE}, other/test-00000-of-00001.parquet"),
    ({"files": []}, "no files in .*tanganke/eurosat; `hf download tanganke/eurosat"),
]


@pytest.mark.parametrize("change, sentence", BAD_DATA_SETS)
def test_unusable_data_sets_are_refused(tmp_path, take, change, sentence):
    options = {"pictures": some_pictures(6), "labels": [0] * 6, "classes": TASKS["EuroSAT"].classes, **change}
    damage, files = options.pop("bytes", bytes), options.pop("files", [FILE])
    for index in [key for key in options if isinstance(key, int)]:
        options["pictures"][index] = options.pop(index)
    for file in files:
        path = tmp_path / TASKS["EuroSAT"].repo / file
        write_parquet(path, **options)
        path.write_bytes(damage(path.read_bytes()))
    with refused(sentence):
        take()
    assert not list(tmp_path.glob("cache/*.npy"))


# ---- The order of the classes ----------------------------------------------------------------------------------------

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


def test_labels_follow_the_names(tmp_path, take):
    """EuroSAT from folders sorted by name; GTSRB from folders sorted as text: 0, 1, 10, 11."""
    for task, names in (("EuroSAT", sorted(TASKS["EuroSAT"].classes)[::-1]), ("GTSRB", sorted(map(str, range(43))))):
        spec, count = TASKS[task], len(names)
        write_parquet(tmp_path / spec.repo / FILE, [picture("L", 8, 8)] * count, list(range(count)), names)
        expected = [int(name) for name in names] if task == "GTSRB" else [spec.classes.index(name) for name in names]
        assert take(task)[1].tolist() == expected != list(range(count))


# ---- Mirrors as people have them -------------------------------------------------------------------------------------


def test_an_unknown_feature_in_another_column_is_no_hindrance(tmp_path, take):
    path = tmp_path / EUROSAT
    write_parquet(path, some_pictures(6), [5, 4, 3, 2, 1, 0], TASKS["EuroSAT"].classes[::-1])
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"huggingface"])
    about["info"]["features"]["mesh"] = {"_type": "OfTheFuture"}
    table = table.append_column("mesh", [list(range(6))])
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), path)
    with pytest.raises(ValueError, match="OfTheFuture"):
        datasets.Features.from_arrow_schema(pq.read_schema(path))
    pixels, labels = take()
    same_images(pixels, some_pictures(6))
    assert labels.tolist() == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("form", ["relative", "absolute", "text", "binary"])
def test_images_given_in_other_ways(tmp_path, take, form):
    """As paths in the mirror's folder, or in columns without any note of `datasets`."""
    path, pictures = tmp_path / EUROSAT, some_pictures(4)
    files = [make(path.parents[1] / f"pictures/{k}.png") for k in range(4)]
    for file, data in zip(files, pictures):
        file.write_bytes(data.ljust(9999, b"\0"))
    names = [str(file if form == "absolute" else file.relative_to(path.parents[1])) for file in files]
    write_parquet(path, names, [0, 1, 2, 3], TASKS["EuroSAT"].classes)
    if form in ("text", "binary"):
        rows = {"image": names if form == "text" else pictures, "label": [0, 1, 2, 3]}
        pq.write_table(datasets.Dataset.from_dict(rows).data.table.replace_schema_metadata(), path)
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


def test_links_to_folders_are_followed(tmp_path, take, model):
    root, store, repo = tmp_path / "mirror", tmp_path / "store", TASKS["EuroSAT"].repo
    pictures, _ = write_set(store, "EuroSAT", 6)
    save_file(dict(hugging_face().state_dict()), make(store / "weights/model.safetensors"))
    make(root / repo / "README.md").touch()
    for link, target in (
        (root / repo / "data", store / repo / "data"),
        (root / repo / "again", root),  # in a circle
        (store / repo / "data/here", root / repo / "data"),
        (root / "tanganke/clip-tiny_eurosat", store / "weights"),
    ):
        link.symlink_to(target)
    same_images(take(root=root)[0], pictures)
    assert load_expert(TINY, "EuroSAT", model.visual, root)


# ---- The heads -------------------------------------------------------------------------------------------------------


def test_zero_shot_heads(tmp_path, model, monkeypatch):
    heads = zero_shot_heads(model, TINY, tmp_path / "cache", ["EuroSAT", "MNIST"])
    assert heads["EuroSAT"].shape == (48, 10) and list(heads) == ["EuroSAT", "MNIST"]
    tokenizer, task = open_clip.get_tokenizer(TINY.model), TASKS["EuroSAT"]
    with torch.no_grad():
        for k in (0, 7):
            texts = model.encode_text(tokenizer([t.format(task.classes[k]) for t in task.templates]))
            mean = F.normalize(F.normalize(texts, dim=-1).mean(0), dim=0)
            torch.testing.assert_close(heads["EuroSAT"][:, k], model.logit_scale.exp() * mean)

    def again(model):
        return zero_shot_heads(model, TINY, tmp_path / "cache", ["EuroSAT"])["EuroSAT"]

    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "build_zero_shot_classifier", lambda *_, **__: pytest.fail("it is in the cache"))
        assert torch.equal(again(model), heads["EuroSAT"])
    other = open_clip.create_model(TINY.model)
    other.load_state_dict(model.state_dict())
    other.text_projection.data[0, 0] += 1
    assert not torch.equal(again(other), heads["EuroSAT"])
    monkeypatch.setitem(TASKS, "EuroSAT", task._replace(templates=["{}"]))
    assert not torch.equal(again(model), heads["EuroSAT"])


# ---- The hub and the plan --------------------------------------------------------------------------------------------


@pytest.fixture
def mirror(tmp_path, model):
    """A whole mirror in the real layout, as `hf download --local-dir` makes it."""
    root = tmp_path / "mirror"
    write_mirror(root, model, ("EuroSAT", "SVHN"), count=8)
    (root / TASKS["EuroSAT"].repo / "README.md").touch()
    return root


class FakeHub:
    """The hub's metadata and downloads, served from a mirror.

    Downloads by commit leave the client's cache without refs/main, and without the files that nobody asked for.
    """

    def __init__(self, root, cache, monkeypatch):
        self.root, self.cache, self.online, self.downloaded = root, cache, True, []
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(hub, "HfFileSystem", lambda: self)
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def repo_info(self, name, repo_type, files_metadata):
        if not self.online:
            raise RuntimeError("Name or service\nnot known")
        assert files_metadata and repo_type == ("dataset" if name in {t.repo for t in TASKS.values()} else "model")
        files = {str(path.relative_to(self.root / name)): path for path in (self.root / name).rglob("*.*")}
        siblings = [SimpleNamespace(rfilename=file, size=path.stat().st_size) for file, path in files.items()]
        return SimpleNamespace(siblings=siblings, sha="c0ffee")

    def open(self, path, revision):
        assert revision == "c0ffee" and path.startswith("datasets/")
        return open(self.root / path.removeprefix("datasets/"), "rb")

    def snapshots(self, name, repo_type):
        return self.cache / f"{repo_type}s--{name.replace('/', '--')}" / "snapshots"

    def download(self, name, file, repo_type, revision):
        self.downloaded.append((name, file))
        path, blob = self.snapshots(name, repo_type) / revision / file, self.cache / "blobs" / str(len(self.downloaded))
        shutil.copy(self.root / name / file, make(blob))
        make(path).symlink_to(blob)
        return str(path)


@pytest.fixture
def fake(mirror, tmp_path, monkeypatch):
    return FakeHub(mirror, tmp_path / "client", monkeypatch)


PIXELS = 3 * 32 * 32
SVHN = f"{TASKS['SVHN'].repo}/cropped_digits/test-00000-of-00001.parquet"
TRAIN = SVHN.replace("test-", "train-")


def test_plan_from_the_hub(tmp_path, model, fake):
    cache, tasks = tmp_path / "cache", ["EuroSAT", "SVHN"]
    experts = [f"tanganke/clip-tiny_{task}/model.safetensors" for task in ("eurosat", "svhn")]
    write_set(fake.root, "SVHN", 7, split="train")
    size = {file: (fake.root / file).stat().st_size for file in (PRETRAINED, *experts, EUROSAT, SVHN, TRAIN)}
    before, passing = hub.plan(TINY, cache, tasks=tasks), max(size[EUROSAT], size[SVHN])
    assert before == Counter(download=sum(size.values()) - size[TRAIN], decode=2 * 8 * PIXELS + passing)
    assert not fake.downloaded
    assert "to download" in hub.summary(before)
    hub.check_space(before, cache)
    train = hub.plan(TINY, cache, tasks=["SVHN"], weights=False, experts=False, splits=("train",), limit=5)
    assert train == Counter(download=size[TRAIN], decode=7 * PIXELS + size[TRAIN])  # decoded whole
    some = hub.plan(TINY, cache, tasks=["SVHN"], weights=False, experts=False, limit=5)
    assert some == Counter(download=size[SVHN], decode=5 * PIXELS + size[SVHN])

    for _ in range(2):
        assert len(image_set("SVHN", hub.preprocessing(TINY), cache)[0]) == 8
        load_expert(TINY, "SVHN", model.visual)
        assert len(fake.downloaded) == 2
    after, got = hub.plan(TINY, cache, tasks=tasks), size[SVHN] + size[experts[1]]
    assert after["present"] == got + 8 * PIXELS and after["download"] == before["download"] - got
    assert after["decode"] == 8 * PIXELS + size[EUROSAT]


def test_plan_from_a_mirror(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda: pytest.fail("a mirror needs no network"))
    cache, tasks = tmp_path / "cache", ["EuroSAT", "SVHN"]
    before = hub.plan(TINY, cache, mirror, tasks=tasks)
    assert before["download"] == 0 < before["decode"]
    for task in tasks:
        image_set(task, hub.preprocessing(TINY), cache, mirror)
    after = hub.plan(TINY, cache, mirror, tasks=tasks)
    assert after == Counter(present=before["present"] + 2 * 8 * PIXELS)
    assert hub.plan(TINY, cache, mirror, tasks=["SVHN"], limit=3)["decode"] > 3 * PIXELS
    (mirror / "tanganke/clip-tiny_svhn/model.safetensors").unlink()
    with refused("clip-tiny_svhn"):
        hub.plan(TINY, cache, mirror, tasks=tasks)
    assert hub.plan(TINY, cache, mirror, tasks=tasks, experts=False)["present"] > 0
    (mirror / SVHN).write_bytes(b"PAR1 damaged PAR1")
    with refused("parquet file cannot be read"):
        hub.plan(TINY, cache, mirror, tasks=["SVHN"], experts=False)


def test_too_little_space_is_refused(tmp_path):
    free, place = shutil.disk_usage(tmp_path).free, tmp_path / "not/yet/there"
    hub.check_space(Counter(decode=free // 2, present=free), place)
    with refused("GB free, but .* GB are needed there: .* to download"):
        hub.check_space(Counter(decode=free + 10**9), place)


def test_without_a_network_what_was_downloaded_will_do(tmp_path, model, fake):
    cache, prep, repo = tmp_path / "cache", hub.preprocessing(TINY), TASKS["EuroSAT"].repo
    image_set("EuroSAT", prep, cache)
    load_expert(TINY, "EuroSAT", model.visual)
    load_pretrained(TINY)
    fake.download(repo, "README.md", "dataset", "c0ffee")
    newer = fake.snapshots(repo, "dataset") / "newer"
    make(newer / "README.md").touch()
    for unfinished in range(9):
        (newer / f"{unfinished}.parquet").symlink_to(fake.cache / "incomplete")
    fake.online = False
    plan = hub.plan(TINY, cache, tasks=["EuroSAT"])
    assert plan["present"] > 8 * PIXELS and plan["download"] == plan["decode"] == 0
    assert len(image_set("EuroSAT", prep, cache)[0]) == 8
    assert load_expert(TINY, "EuroSAT", model.visual)
    assert same(load_pretrained(TINY).state_dict(), model.state_dict())
    with refused("tanganke--eurosat.*has no split 'train' in parquet files; it has: test"):
        image_set("EuroSAT", prep, cache, split="train")
    with refused("cannot reach tanganke/clip-tiny_sun397.*Name or service not known.*--hub DIR"):
        hub.plan(TINY, cache)


def test_a_failed_download_is_one_sentence(model, fake, monkeypatch):
    monkeypatch.setattr(hub, "hf_hub_download", Mock(side_effect=ConnectionError("reset\nby peer")))
    with refused("cannot download model.safetensors of tanganke/clip-tiny_eurosat: reset by peer"):
        load_expert(TINY, "EuroSAT", model.visual)


def test_images_given_as_paths_need_a_mirror(take, fake):
    write_parquet(fake.root / EUROSAT, ["a.png"], [0], TASKS["EuroSAT"].classes)
    with refused("image 0 cannot be decoded: there is no file .*a.png; .*a mirror on disk, --hub DIR"):
        take(root=None)
