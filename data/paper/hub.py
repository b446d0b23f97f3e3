"""The paper's suite: CLIP, its fine-tuned vision towers and the eight data sets, from the model hub or a mirror of it.

`huggingface_hub` keeps what it downloads, and then needs no network; in a mirror a repository REPO is the folder that
`hf download REPO --local-dir MIRROR/REPO` makes. What a library cannot use is a ValueError of one sentence.
"""

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import open_clip
import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from data.paper.authors import filled, load_authors, reading
from data.paper.published import adaptation_curves, eight_tasks, read
from data.run import Adaptation, Loaded, Suite, Training, fingerprint, make_experts, progress, write

# By name: the data set on the hub (repo, config, split, images), and what makes a zero-shot head (classes, templates).
TASKS = {task["name"]: SimpleNamespace(**task, **task["dataset"]) for task in read("tasks.json")["tasks"]}
ARCHITECTURES = read("tasks.json")["architectures"]  # where weights are, and vision towers fine-tuned on a task
TRAINING = Training(images=None, steps=4000, lr=1e-5, weight_decay=0, warmup=1)
ADAPTATION = Adaptation(steps=1000, lr=1e-4, lambda_steps=500, lambda_lr=1e-3, mask_steps=2000, mask_lr=1e-3)
column = partial(datasets.load_dataset, "parquet", split="train", streaming=True)  # rows of parquet files


def paper_suite(
    arch: str,
    tasks: list[str],
    *,
    seed: int,
    device: str,
    precision: str | None,
    steps: int | None,
    cache: Path,
    workers: int = 1,
    hub: Path | None = None,
    experts: Path | None = None,
    finetune: bool = False,
    limit: int | None = None,
    images: Path | None = None,
    splits: tuple[str, ...] = (),
    whole: bool = False,
) -> Suite:
    """The suite with the hub's experts (of a mirror `hub`), the authors' in the folder `experts`, or fine-tuned ones.

    `images` is where decoded images are kept, `limit` how many of each test split are taken, `splits` which others the
    experiment needs, `whole` whether the tasks are those of published figures. Raises ValueError or OSError.
    """
    settings, device = "paper" if experts or finetune else "hub", torch.device(device)
    images = images or cache / "images"
    with PartialState().main_process_first():  # which downloads and decodes for all
        if experts:
            tower, towers, heads = load_authors(arch, experts, {task: len(TASKS[task].classes) for task in tasks})
        else:
            tower, heads = load_pretrained(arch, tasks, hub, device, images)
            towers = {} if finetune else Loaded({task: partial(load_expert, arch, tower, hub, task) for task in tasks})
        refuse_odd(tower, towers)
        read_set = partial(image_set, hub, images, partial(pixels, size=tower.image_size[0], settings=settings))
        test = {task: read_set(task, "test", limit) for task in tasks}
        for task, split in ((task, split) for split in splits for task in tasks):
            read_set(task, split, 1)  # what is missing is refused now, not after hours
    adaptation, comparable = ADAPTATION.with_steps(steps), whole and not limit and not finetune
    odd = [f"{t}, {len(y):,} for {TASKS[t].images:,}" for t, (_, y) in test.items() if len(y) != TASKS[t].images]
    note = f"Test splits have not as many images as published, so nothing is claimed: {'; '.join(odd)}."
    curve = next((curve for curve in adaptation_curves(arch) if curve["learning_rate"] == adaptation.lr), None)
    suite = Suite(
        name=arch,
        seed=seed,
        device=device,
        precision=precision or ("bfloat16" if device.type == "cuda" else "float32"),
        training=TRAINING,
        adaptation=adaptation,
        pretrained=tower,
        experts=towers,
        heads={task: head.to(device) for task, head in heads.items()},
        test=test,
        load=lambda task, split, n: read_set(task, split, n or (None if split == "train" else limit), n is not None),
        normalise=normalise,
        origin=f"{hub} {experts} {finetune} {limit}",
        settings=settings,
        source=settings if comparable else None,
        published=tuple(eight_tasks(arch, settings)) if comparable else (),
        curve=curve if comparable else None,
        claimable=not odd,
        shortened=adaptation != ADAPTATION,
        note=note if odd and not limit else "",
    )
    return replace(suite, experts=make_experts(suite, cache, workers)) if finetune else suite


@cache
def files_of(repo: str, kind: str, hub: Path | None, pattern: str) -> list[Path]:
    """Files of a "model" or "dataset" repository: in the mirror, or downloaded, now or before, by the hub's client."""
    wanted = pattern.replace("**/", "*")  # for the client a star is slashes, too
    with reading(f"{repo} of the model hub (--hub DIR reads a mirror)"):
        folder = hub / repo if hub else Path(snapshot_download(repo, repo_type=kind, allow_patterns=wanted))
    if found := sorted(folder.glob(pattern)):
        return found
    raise ValueError(f"{folder} has no {pattern}: `hf download {repo} --repo-type {kind} --local-dir {folder}` gets it")


def load_pretrained(
    arch: str, tasks: list[str], hub: Path | None, device: torch.device, cache: Path
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The vision tower of open_clip's CLIP, and zero-shot heads (D, C) by task, times CLIP's logit scale.

    OpenAI's weights need QuickGELU: with open_clip's plain names they would load too, and silently lose accuracy.
    """
    name, heads = f"{arch}-quickgelu", {}
    (path,) = files_of(ARCHITECTURES[arch][0], "model", hub, "open_clip_model.safetensors")
    with reading(path, path):
        model = open_clip.create_model(name, str(path)).to(device).eval()
    tokenizer, sums = open_clip.get_tokenizer(name), [p.sum(dtype=torch.double).item() for p in model.parameters()]
    for task in progress(tasks, "Zero-shot heads"):
        prompts = TASKS[task].classes, TASKS[task].templates
        kept = cache / f"head-{task}-{fingerprint(prompts, sums)}.safetensors"
        if not kept.exists():
            head = open_clip.build_zero_shot_classifier(model, tokenizer, *prompts, device=device)
            write(kept, partial(save_file, {"head": (head * model.logit_scale.exp().detach()).cpu().contiguous()}))
        heads[task] = load_file(kept)["head"]
    return model.visual.cpu().requires_grad_(False), heads


def load_expert(arch: str, tower: nn.Module, hub: Path | None, task: str) -> nn.Module:
    """The tower fine-tuned on a task, of the same make as the pre-trained `tower`, from a CLIPVisionModel's weights.

    That lacks the projection into the joint space; it was not fine-tuned, so the pre-trained one is taken.
    """
    repo = ARCHITECTURES[arch][1].format(TASKS[task].checkpoint_suffix)
    (path,) = files_of(repo, "model", hub, "model.safetensors")
    with reading(path, path):
        return filled(tower, {**from_hugging_face(load_file(path)), "proj": tower.proj})


# Parts of names in Hugging Face's CLIP, and what they are in open_clip's.
THEIRS = "position_embedding.weight patch_embedding encoder.layers pre_layrnorm post_layernorm layer_norm fc1 fc2"
OURS = "positional_embedding conv1 transformer.resblocks ln_pre ln_post ln_ c_fc c_proj"
NAMES = dict(zip(THEIRS.split(), OURS.split())) | {"self_attn": "attn", "q_proj.": "in_proj_"}


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPVisionModel's weights under open_clip's names; queries, keys and values 3 x (D, D) -> in_proj (3 D, D)."""
    converted = {}
    for name in (name for name in state if not re.search("k_proj|v_proj|position_ids", name)):
        parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"] if "q_proj" in name else [name]
        ours = name.replace("vision_model.", "").replace("embeddings.", "")
        for part, its_name in NAMES.items():
            ours = ours.replace(part, its_name)
        converted[ours] = torch.cat([state[part] for part in parts])
    return converted


def refuse_odd(pretrained: nn.Module, experts: Loaded | dict[str, nn.Module]) -> None:
    """Load each expert once. Raises ValueError if one is not finite, or the pre-trained model or another one again."""
    seen: dict[tuple, str] = {}
    for name in progress(["pre-trained", *experts], "Experts"):
        tower = experts.get(name, pretrained)
        sums = tuple(value.double().sum().item() for value in tower.state_dict().values())
        if sums in seen or not np.isfinite(sums).all():
            what = f"that of {seen[sums]} again: a file is in the wrong place" if sums in seen else "not finite"
            raise ValueError(f"the model of {name} is {what}")
        seen[sums] = name


def image_set(
    hub: Path | None, cache: Path, prepare: partial, task: str, split: str, count: int | None, spaced: bool = False
) -> tuple[Tensor, Tensor]:
    """Images up to normalisation, uint8 (N, 3, H, W), decoded once and then memory-mapped; class numbers, int64 (N,).

    `prepare` is `pixels` with its arguments; `count` takes the first images only or, `spaced`, as many from the whole
    split, which may be sorted by class. Raises ValueError.
    """
    spec = TASKS[task]
    name = spec.split if split == "test" else split
    files = files_of(spec.repo, "dataset", hub, "/".join(filter(None, ("**", spec.config, f"{name}-*.parquet"))))
    names = [str(file) for file in files]
    with reading(f"{task}, split {split} in {files[0].parent},", *files):
        rows = column(data_files=names, columns=[spec.label_column])
        labels = class_numbers(rows, spec.label_column, spec.classes)
        count = min(count or len(labels), len(labels))
        chosen = np.linspace(0, (len(labels) if spaced else count) - 1, count).round().astype(int)
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        out = cache / f"{task}-{split}-{fingerprint(spec, split, prepare.keywords, stats, count, spaced)}.npy"
        if not out.exists():
            rows = column(data_files=names, columns=[spec.image_column])
            write(out, partial(decode, rows, spec.image_column, chosen.tolist(), prepare, task))
        return torch.from_numpy(np.load(out, mmap_mode="c")), torch.from_numpy(labels[chosen])


def class_numbers(rows: datasets.IterableDataset, name: str, classes: list[str]) -> np.ndarray:
    """The labels as numbers of the task's classes, int64 (N,): by name if the names are the same, or by number.

    Raises ValueError for other numbers of classes, or a class known by its name in another place than the task's.
    """
    names, labels = getattr(rows.features[name], "names", classes), [row[name] for row in rows]
    if len(names) != len(classes) or not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(f"it has {len(names)} classes and labels to {max(labels)}, the task {len(classes)} classes")
    theirs, ours = ([re.sub(r"[\W_]+", "", name).casefold() for name in those] for those in (names, classes))
    order = [ours.index(name) for name in theirs] if sorted(theirs) == sorted(ours) else list(range(len(ours)))
    if moved := [names[k] for k, name in enumerate(theirs) if name in ours and ours[order[k]] != name]:
        raise ValueError(f"class {moved[0]!r} has another number in the task, and not all names are the task's")
    return np.array(order)[labels]


def decode(
    rows: datasets.IterableDataset, name: str, chosen: list[int], prepare: partial, task: str, out: Path
) -> None:
    """Write the images of these numbers to a file, as numpy.save would: uint8 (N, 3, H, W)."""
    wanted, size = set(chosen), prepare.keywords["size"]
    shape = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), 3, size, size)}
    rows = rows.cast_column(name, datasets.Image(decode=False)).filter(lambda _, i: i in wanted, with_indices=True)
    with out.open("wb") as file:  # (mapped memory would kill the process on a full disk)
        np.lib.format.write_array_header_1_0(file, shape)
        for number, row in zip(progress(chosen, task, unit="image"), rows.take(len(chosen))):
            with reading(f"image {number}"):
                file.write(prepare(datasets.Image().decode_example(row[name])).tobytes())  # turned as its EXIF tag says


def pixels(image: Image.Image, size: int, settings: str) -> np.ndarray:
    """RGB first, then resized (bicubic) and cropped in its middle: uint8 (3, size, size).

    So were the images of the hub's figures (FusionBench's ImageClassificationDataset, Hugging Face's processor by PIL),
    and of the paper's (torchvision's ImageFolder, open_clip's transform), for which odd margins have another middle.
    """
    image = image.convert("RGB")
    image = image.resize([size * side // min(image.size) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 if settings == "hub" else round((side - size) / 2) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels (..., 3, H, W) to the float32 input of CLIP, with OpenAI's mean and deviation."""
    return normalize(images / 255, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
