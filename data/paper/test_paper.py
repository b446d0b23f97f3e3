"""What must be true of the paper's suite, on files of the real formats and layouts made here. Needs no network."""

import io
import json
import os
import runpy
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data.methods import METHODS
from data.paper import authors, hub, published
from data.paper.hub import TASKS, image_set, pixels
from data.run import evaluate

ROOM = Path(__file__).parent
FACTS = ROOM.parents[1].parent / "shared" / "facts"

PRETRAINED, EXPERTS = "timm/tiny.openai/open_clip_model.safetensors", "tanganke/clip-tiny_{}"
EXPERT, REPO = f"{EXPERTS.format('eurosat')}/model.safetensors", TASKS["EuroSAT"].repo
HERE, DATA = ["EuroSAT", "SVHN"], f"{REPO}/data/test-00000-of-00001.parquet"
COMMON = {"seed": 0, "device": "cpu", "precision": None, "steps": None, "workers": 1}
MODES = ("RGB", "L", "LA", "P", "RGBA", "CMYK", "I;16", "1")
SIZES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """A small architecture that open_clip knows by name, and the suite, too."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-quickgelu.json")
    monkeypatch.setitem(hub.ARCHITECTURES, "tiny", ("timm/tiny.openai", EXPERTS))
    hub.files_of.cache_clear()


def clip_like(seed):
    torch.manual_seed(seed)
    return randomise(open_clip.create_model("tiny-quickgelu")).requires_grad_(False).eval()


def randomise(module):
    """Different numbers in every entry, so that a mistaken mapping shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name != "logit_scale":
                p.uniform_(-0.1, 0.1).add_(p.ndim == 1 and name.endswith("weight"))
    return module


def hugging_face(seed):
    """A CLIPVisionModel as small as the tiny CLIP."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    config = CLIPVisionConfig(hidden_act="quick_gelu", num_hidden_layers=2, **sizes)
    return randomise(CLIPVisionModel(config)).requires_grad_(False).eval()


def make(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def refused(sentence):
    """Expects a ValueError of one line that says so."""
    return pytest.raises(ValueError, match=rf"\A(?-s:.)*{sentence}(?-s:.)*\Z")


def all_rows(arch, source):
    lists = [published.eight_tasks(arch, source), published.router_depths(arch, source)]
    lists += [published.routed_modules(arch, source), *(rows for *_, rows in published.generalization(arch, source))]
    conditions = published.paper_tables()["5"]["conditions"]
    return sum(lists + [published.robustness(arch, source, condition) for condition in conditions], [])


@pytest.mark.parametrize("arch", ["ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_every_published_row_has_a_margin_or_says_why_not(arch):
    tag = open_clip.get_pretrained_cfg(f"{arch}-quickgelu", "openai")
    assert tag["hf_hub"] == f"{hub.ARCHITECTURES[arch][0]}/" and tag["quick_gelu"]
    for row in (rows := all_rows(arch, "paper") + all_rows(arch, "hub")):
        assert row["why"] if row["margin"] in (None, 2) else row["margin"] in (0.5, 0.8) and row["why"] is None, row
        assert row["method"] in METHODS and set(row["accuracy"]) <= set(TASKS)
    margins = {(row["method"], row["source"]): row["margin"] for row in published.eight_tasks(arch, "hub")}
    assert margins["WEMoE (as the hub ran it)", "hub"] == (0.8 if arch != "ViT-L-14" else None)
    assert margins.get(("WEMoE", "paper")) == (2 if arch != "ViT-B-16" else None) and len(rows) > 20


def test_readme_has_the_table_of_what_is_claimed(capsys):
    runpy.run_path(str(ROOM / "published.py"), run_name="__main__")
    assert capsys.readouterr().out in (ROOM / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not FACTS.is_dir(), reason="the project's facts are not beside the repository")
def test_carried_facts_are_the_projects_cell_by_cell():
    def found(rows):
        return [row for row in rows if "from" not in row and row.get("source", "hub") == "hub"]  # not looked up besides

    names = "paper", "paper_sweeps", "eight_tasks", "published_results"
    paper, sweeps, tasks, theirs = (json.loads((FACTS / f"{n}.json").read_text(encoding="utf-8")) for n in names)
    assert published.read("paper.json") == paper and published.read("paper_sweeps.json") == sweeps
    ours = published.read("hub_results.json")
    assert published.read("tasks.json")["tasks"][: len(tasks)] == tasks and ours["robustness"] == theirs["robustness"]
    assert ours["adaptation_curves"] == theirs["adaptation_curves"]
    assert all(found(ours["main"][arch]) == found(rows) for arch, rows in theirs["main"].items())
    for one, other in zip(theirs["generalization"], ours["generalization"], strict=True):
        assert one == {**other, "rows": found(other["rows"])}


def test_numbers_of_parameters_are_the_papers():
    assert all(published.rounds_to(ours, theirs) for _, ours, theirs in published.compared())
    assert not published.rounds_to(7_165_001, "7.16M") and published.rounds_to(1_950_400_000, "1.95B")
    printed = [row[-1] for row in published.compared() if row[0].endswith("tasks, all")]
    assert printed == [f"{row['total']}M" for row in published.paper_tables()["8"]["rows"]]


def test_a_converted_tower_computes_the_same():
    hf, visual = hugging_face(1), clip_like(0).visual
    before, projection = visual.proj.clone(), torch.randn(*visual.proj.shape) / 30
    state = {f"vision_model.{name}": p for name, p in hf.state_dict().items()}  # as older versions write it
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    tower = authors.filled(visual, {**hub.from_hugging_face(state), "proj": projection.double()})
    assert torch.equal(visual.proj, before) and not any(p.requires_grad for p in tower.parameters())
    x = torch.randn(2, 3, *visual.image_size)
    expected = hf(pixel_values=x).pooler_output
    assert expected.std() > 0.1  # features that differ among themselves
    torch.testing.assert_close(tower(x), expected @ projection, atol=1e-5, rtol=1e-5)


@contextmanager
def old_classes():
    """The names that the authors' files use, importable while the files are written and gone afterwards."""
    modeling = types.ModuleType("src.modeling")
    for name, base in (("ImageEncoder", nn.Module), ("ClassificationHead", nn.Linear)):
        setattr(modeling, name, type(name, (base,), {"__module__": "src.modeling"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "src", types.ModuleType("src"))
        patch.setitem(sys.modules, "src.modeling", modeling)
        yield modeling


def write_authors(root, classes=10, trap=None):
    """Checkpoints as theirs are, of the task MNIST; perhaps with a trap in an attribute, a part and a hook."""
    clips = {"zeroshot.pt": clip_like(2), "MNIST/finetuned.pt": clip_like(3).half()}
    with old_classes() as old:
        for name, clip in clips.items():
            encoder, clip.transformer = old.ImageEncoder(), nn.Identity()
            encoder.model, encoder.train_preprocess = clip, open_clip.image_transform(32, is_train=True)
            if trap:
                encoder.trap = encoder._modules["trap"] = encoder._state_dict_hooks[0] = trap
            torch.save(encoder, make(root / "tiny" / name))
            torch.load(root / "tiny" / name, weights_only=False)  # where the classes are there, and so does the trap
        torch.save(head := old.ClassificationHead(48, classes), root / "tiny/head_MNIST.pt")
    return clips["zeroshot.pt"].visual, clips["MNIST/finetuned.pt"].visual.float(), head.weight


def test_authors_checkpoints(tmp_path):
    pretrained, finetuned, weight = write_authors(tmp_path)
    with pytest.raises((AttributeError, ModuleNotFoundError)):  # the complaint under every repository of this family
        torch.load(tmp_path / "tiny/zeroshot.pt", weights_only=False)
    safe = set(torch.serialization.get_safe_globals())
    tower, experts, heads = authors.load_authors("tiny", tmp_path, {"MNIST": 10})
    assert "src" not in sys.modules and set(torch.serialization.get_safe_globals()) == safe
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in ((tower, pretrained), (experts["MNIST"], finetuned)):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)
        torch.testing.assert_close(ours(x), theirs(x))
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert torch.equal(heads["MNIST"], weight.T) and not heads["MNIST"].requires_grad
    write_authors(tmp_path, classes=9)
    for task, sentence in {"MNIST": "head_MNIST.pt cannot be used: .*size mismatch.*9", "DTD": "No such file"}.items():
        with refused(sentence):
            authors.load_authors("tiny", tmp_path, {task: 10})


def test_a_malicious_file_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_authors(tmp_path, trap=type("Evil", (), {"__reduce__": lambda self: (os.system, ("touch marker",))})())
    Path("marker").unlink()  # so the file works on the unwary
    with refused("zeroshot.pt cannot be used"):
        authors.load_authors("tiny", tmp_path, {"MNIST": 10})
    assert not Path("marker").exists()


def picture(mode, width, height, seed=0):
    """Of any mode; where it has one, with an alpha channel."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 400, (height, width), np.uint16))
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.linear_gradient("L").resize((width, height)))
    return image


def encoded(image):
    image.save(file := io.BytesIO(), "JPEG" if image.mode == "CMYK" else "PNG")
    return file.getvalue()


def processed(images):
    """The processor's pixels, of images in RGB as FusionBench gives it (alone, it makes transparent ones white)."""
    images = [image.convert("RGB") for image in images]
    return CLIPImageProcessorPil(**SIZES)(images, return_tensors="pt")["pixel_values"]


@given(st.sampled_from(MODES), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_pixels_are_those_of_the_published_figures(mode, width, height, seed):
    """The processor's own (by PIL, as it was when they were made); and open_clip's of an image that is RGB."""
    image = picture(mode, width, height, seed)
    by_open_clip = open_clip.image_transform(32, is_train=False)(image.convert("RGB"))
    for settings, expected in (("hub", processed([image])[0]), ("paper", by_open_clip)):
        found = hub.normalise(torch.tensor(pixels(image, size=32, settings=settings)))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    if not mode.endswith("A"):
        itself = CLIPImageProcessorPil(**SIZES)(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(itself, processed([image])[0])


def write_parquet(path, pictures, labels, classes, image="image", dtype=None):
    """A file as `datasets` writes it, of encoded pictures."""
    features = {image: datasets.Image(), "label": dtype or datasets.ClassLabel(names=list(classes))}
    rows = {image: [{"bytes": data, "path": None} for data in pictures], "label": labels}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(make(path))


def write_set(root, task, pictures, labels, split="test", shards=1):
    spec = TASKS[task]
    for k in range(shards):
        part = slice(k * len(labels) // shards, (k + 1) * len(labels) // shards)
        path = root / spec.repo / (spec.config or "data") / f"{split}-{k:05d}-of-{shards:05d}.parquet"
        write_parquet(path, [*map(encoded, pictures[part])], labels[part], spec.classes)


def some(count, seed=0):
    """Pictures of all modes."""
    sizes = np.random.default_rng(seed).integers(20, 70, (count, 2)).tolist()
    return [picture(MODES[i % len(MODES)], *size, seed + i) for i, size in enumerate(sizes)]


def take(root, task, count=None, limit=None):
    """Read the test split of a mirror: (images, labels)."""
    return image_set(root, root / "images", partial(pixels, size=32, settings="hub"), limit, task, "test", count)


def test_images_and_labels_are_read_once_and_again_when_files_change(tmp_path, monkeypatch):
    labels = [i % 10 for i in range(25)]
    write_set(tmp_path, "SVHN", some(25), labels, shards=3)
    write_parquet(tmp_path / TASKS["SVHN"].repo / "full_numbers/test-00000-of-00001.parquet", [], [], "ab")
    found, numbers = take(tmp_path, "SVHN")
    decoded = [Image.open(io.BytesIO(encoded(image))) for image in some(25)]
    expected = torch.tensor(np.stack([pixels(image, size=32, settings="hub") for image in decoded]))
    assert torch.equal(found, expected) and numbers.tolist() == labels and numbers.dtype == torch.int64
    assert torch.equal(take(tmp_path, "SVHN", limit=7)[0], expected[:7])
    assert torch.equal(take(tmp_path, "SVHN", count=3)[0], expected[[0, 12, 24]])
    with monkeypatch.context() as patch:
        patch.setattr(hub, "decode", lambda *_: pytest.fail("it is in the cache"))
        take(tmp_path, "SVHN")[0].add_(1)  # private memory: the cache is not changed
        assert torch.equal(take(tmp_path, "SVHN")[0], expected)
    write_set(tmp_path, "SVHN", some(25, seed=9), labels, shards=3)
    assert not torch.equal(take(tmp_path, "SVHN")[0], expected)
    names, order = TASKS["EuroSAT"].classes, np.random.default_rng(0).permutation(10).tolist()
    respelt = ["_".join(names[k].upper().split()) for k in order]  # labels follow names
    write_parquet(tmp_path / DATA, [encoded(picture("L", 8, 8))] * 10, list(range(10)), respelt)
    assert take(tmp_path, "EuroSAT")[1].tolist() == order
    for task in TASKS.values():  # which are there once
        assert len({"".join(filter(str.isalnum, name)).casefold() for name in task.classes}) == len(task.classes)


@pytest.fixture
def mirror(tmp_path):
    """A mirror whose labels are what transformers' models say of the processor's pixels, of images of all modes."""
    clip, tokenizer = clip_like(0), open_clip.get_tokenizer("tiny-quickgelu")
    save_file(clip.state_dict(), make(tmp_path / PRETRAINED))
    for seed, task in enumerate(HERE):
        expert, spec = hugging_face(seed + 2), TASKS[task]
        file = tmp_path / EXPERTS.format(spec.checkpoint_suffix) / "model.safetensors"
        save_file(dict(expert.state_dict()), make(file))
        head = open_clip.build_zero_shot_classifier(clip, tokenizer, spec.classes, spec.templates)
        for split in ("test", "train", "contrast"):
            pictures = some(24, seed)
            features = expert(pixel_values=processed(pictures)).pooler_output @ clip.visual.proj
            write_set(tmp_path, task, pictures, (F.normalize(features) @ head).argmax(1).tolist(), split)
    return tmp_path


def suite_of(mirror, **options):
    usual = {**COMMON, "tasks": HERE, "cache": mirror / "results", "images": mirror / "images", "hub": mirror}
    return hub.paper_suite("tiny", **{**usual, **options})


def test_the_suite_from_a_mirror(mirror):
    suite = suite_of(mirror, splits=("contrast",), whole=True)
    assert evaluate(suite, suite.experts) == dict.fromkeys(HERE, 100)
    assert evaluate(suite, suite.pretrained) != dict.fromkeys(HERE, 100)
    assert suite.settings == suite.source == "hub" and not suite.claimable and "EuroSAT, SVHN" in suite.note
    assert suite.experts["SVHN"] is not suite.experts["SVHN"]  # loaded at each access
    assert len(suite.load("SVHN", "train", 5)[1]) == 5 and len(suite.load("SVHN", "contrast", None)[1]) == 24
    few = suite_of(mirror, limit=3, steps=10, whole=True)
    assert few.source is None and few.shortened and len(few.load("SVHN", "contrast", None)[1]) == 3
    with refused("eurosat has no .*motion_blur"):
        suite_of(mirror, splits=("motion_blur",))
    models = ["timm/tiny.openai", *(EXPERTS.format(TASKS[task].checkpoint_suffix) for task in HERE)]
    with refused(f"empty lacks {', '.join([*models, *(TASKS[task].repo for task in HERE)])}: `hf download"):
        suite_of(mirror, hub=mirror / "empty")


def test_other_experts(mirror, monkeypatch):
    write_authors(mirror)
    write_set(mirror, "MNIST", some(6), [0, 1, 2, 3, 4, 5])
    suite = suite_of(mirror, tasks=["MNIST"], experts=mirror, whole=True)
    assert suite.settings == suite.source == "paper" and set(evaluate(suite, suite.experts)) == {"MNIST"}
    monkeypatch.setattr(hub, "TRAINING", replace(hub.TRAINING, steps=2))
    suite = suite_of(mirror, finetune=True, whole=True)
    with refused("the model of SVHN is that of pre-trained again"):
        hub.refuse_twins(suite.pretrained, {**suite.experts, "SVHN": suite.pretrained})
    assert suite.settings == "paper" and suite.source is None and list(suite.experts) == HERE


def test_what_is_read_is_downloaded_and_no_more(mirror, monkeypatch):
    def download(repo, repo_type, allow_patterns):
        files = [path.relative_to(mirror / repo).as_posix() for path in (mirror / repo).rglob("*.*")]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            make(mirror / "client" / repo / file).write_bytes((mirror / repo / file).read_bytes())
        return mirror / "client" / repo

    monkeypatch.setattr(hub, "snapshot_download", download)
    suite = suite_of(mirror, hub=None)
    assert evaluate(suite, suite.experts) == dict.fromkeys(HERE, 100)
    assert {path.name[:4] for path in (mirror / "client").rglob("*.parquet")} == {"test"}


LAYER, NUMBERS = "encoder.layers.0", {"classes": TASKS["EuroSAT"].classes, "dtype": datasets.Value("int64")}
UNUSABLE = [  # which file, what becomes of it: bytes, other rows or other entries; and what is said of it
    (DATA, {"labels": [0, 12, 0], **NUMBERS}, "EuroSAT, split test in .* 10 classes and labels to 12"),
    (DATA, {"classes": "abc"}, "has 3 classes.*the task 10"),
    (DATA, {**NUMBERS, "image": "img"}, "cannot be used: .*image"),
    (DATA, {**NUMBERS, "pictures": [b"", b"no image", b""]}, "image 0 cannot be used"),
    (DATA, None, r"eurosat has no \*\*/test-\*.parquet: `hf download tanganke/eurosat --repo-type dataset"),
    (EXPERT, b"garbage", "clip-tiny_eurosat/model.safetensors cannot be used: "),
    (EXPERT, None, "clip-tiny_eurosat has no model.safetensors: `hf download tanganke/clip-tiny_eurosat"),
    (EXPERT, {f"{LAYER}.self_attn.k_proj.bias": None}, "size mismatch for .*attn.in_proj_bias"),
    (EXPERT, {f"{LAYER}.mlp.fc1.bias": None}, "Missing key.*resblocks.0.mlp.c_fc.bias"),
    (EXPERT, {f"{LAYER}.mlp.fc1.weight": torch.zeros(64, 256)}, "size mismatch for .*c_fc.weight"),
    (EXPERT, hugging_face(3).state_dict(), "the model of SVHN is that of EuroSAT again: a file is in the wrong place"),
    (PRETRAINED, {"visual.proj": torch.zeros(3, 3)}, "open_clip_model.safetensors cannot be used: .*visual.proj"),
]


@pytest.mark.parametrize("file, content, sentence", UNUSABLE)
def test_unusable_files_are_refused(mirror, file, content, sentence):
    path = mirror / file
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else b"")
    if file == DATA and content:
        write_parquet(path, **{"pictures": [encoded(picture("RGB", 40, 30))] * 3, "labels": [0, 1, 2], **content})
    elif isinstance(content, dict):
        state = clip_like(0).state_dict() if file == PRETRAINED else dict(hugging_face(2).state_dict())
        save_file({name: value for name, value in {**state, **content}.items() if value is not None}, path)
    with refused(sentence):
        suite_of(mirror)
    assert not list(mirror.glob("images/EuroSAT*.bin"))
