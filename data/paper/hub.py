"""The paper's suite: CLIP, its fine-tuned vision towers and the eight data sets, from the model hub or a mirror of it.

`huggingface_hub` keeps what it downloads, and then needs no network; in a mirror a repository REPO is the folder that
`hf download REPO --local-dir MIRROR/REPO` makes. What a library cannot use is a ValueError of one sentence.
"""

import re
from collections.abc import Mapping
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
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from data.paper.authors import filled, load_authors, reading
from data.paper.published import adaptation_curves, eight_tasks, read
from data.run import fingerprint, make_experts, progress, write
from data.suite import Adaptation, Loaded, Suite, Training

# By name: the data set on the hub (repo, config, split, images), and what makes a zero-shot head (classes, templates).
TASKS = {task["name"]: SimpleNamespace(**task, **task["dataset"]) for task in read("tasks.json")["tasks"]}
ARCHITECTURES = read("tasks.json")["architectures"]  # where weights are, and vision towers fine-tuned on a task
TRAINING = Training(images=None, steps=4000, lr=1e-5, weight_decay=0, warmup=1)
ADAPTATION = Adaptation(steps=1000, lr=1e-4, lambda_steps=500, lambda_lr=1e-3, mask_steps=2000, mask_lr=1e-3)


def paper_suite(
    arch: str,
    tasks: list[str],
    *,
    images: Path,
    hub: Path | None = None,
    experts: Path | None = None,
    finetune: bool = False,
    limit: int | None = None,
    splits: tuple[str, ...] = (),
    whole: bool = False,
    **common,
) -> Suite:
    """The suite with the hub's experts (of a mirror `hub`), the authors' in the folder `experts`, or fine-tuned ones.

    `images` is where decoded images are kept, `limit` how many of each test split are taken, `splits` which others the
    experiment needs, `whole` whether the tasks are those of published figures. `common` is what all suites take: seed,
    device, precision, steps, cache, workers. Raises ValueError or OSError.
    """
    settings, device, (base, expert) = "paper" if experts or finetune else "hub", common["device"], ARCHITECTURES[arch]
    repos = {task: expert.format(TASKS[task].checkpoint_suffix) for task in tasks if settings == "hub"}
    needed = [*([] if experts else [base]), *repos.values(), *(TASKS[task].repo for task in tasks)]
    if hub and (missing := [repo for repo in needed if not (hub / repo).is_dir()]):
        raise ValueError(f"{hub} lacks {', '.join(missing)}: `hf download` gets each (data/paper/README.md)")
    with PartialState().main_process_first():  # which downloads and decodes for all
        if experts:
            tower, towers, heads = load_authors(arch, experts, {task: len(TASKS[task].classes) for task in tasks})
        else:
            tower, heads = load_pretrained(arch, tasks, hub, device)
            towers = Loaded({task: partial(load_expert, repo, tower, hub) for task, repo in repos.items()})
        refuse_twins(tower, towers)
        load = partial(image_set, hub, images, partial(pixels, size=tower.image_size[0], settings=settings), limit)
        test = {task: load(task, "test") for task in tasks}
        for task, split in ((task, split) for split in splits for task in tasks):
            load(task, split, 1)  # what is missing is refused now, not after hours
    odd = [task for task, (_, labels) in test.items() if len(labels) != TASKS[task].images]
    source = settings if whole and not limit and not finetune else None
    adaptation = ADAPTATION.with_steps(common["steps"])
    suite = Suite(
        name=arch,
        seed=common["seed"],
        device=torch.device(device),
        precision=common["precision"] or ("bfloat16" if device.startswith("cuda") else "float32"),
        training=TRAINING,
        adaptation=adaptation,
        pretrained=tower,
        experts=towers,
        heads={task: head.to(device) for task, head in heads.items()},
        test=test,
        load=load,
        normalise=normalise,
        origin=f"{hub} {experts} {finetune} {limit}",
        settings=settings,
        source=source,
        published=tuple(eight_tasks(arch, source)),
        curve=next((c for c in adaptation_curves(arch) if source and c["learning_rate"] == adaptation.lr), None),
        claimable=not odd,
        shortened=adaptation != ADAPTATION,
        note=f"Not held against published figures: not all test images of {', '.join(odd)} are there." if odd else "",
    )
    return replace(suite, experts=make_experts(suite, common["cache"], common["workers"])) if finetune else suite


@cache
def files_of(repo: str, kind: str, hub: Path | None, pattern: str) -> list[Path]:
    """Files of a "model" or "dataset" repository: in the mirror, or downloaded, now or before, by the hub's client."""
    wanted = pattern.replace("**/", "*")  # for the client a star is slashes, too
    with reading(f"{repo} of the model hub (--hub DIR reads a mirror)"):
        folder = hub / repo if hub else Path(snapshot_download(repo, repo_type=kind, allow_patterns=wanted))
    if found := sorted(folder.glob(pattern)):
        return found
    raise ValueError(f"{folder} has no {pattern}: `hf download {repo} --repo-type {kind} --local-dir {folder}` gets it")


def load_pretrained(arch: str, tasks: list[str], hub: Path | None, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The vision tower of open_clip's CLIP, and zero-shot heads (D, C) by task, times CLIP's logit scale.

    OpenAI's weights need QuickGELU: with open_clip's plain names they would load too, and silently lose accuracy.
    """
    name, heads = f"{arch}-quickgelu", {}
    (path,) = files_of(ARCHITECTURES[arch][0], "model", hub, "open_clip_model.safetensors")
    with reading(path):
        model = open_clip.create_model(name, str(path)).requires_grad_(False).eval().to(device)
    make = partial(open_clip.build_zero_shot_classifier, model, open_clip.get_tokenizer(name), device=device)
    for task in progress(tasks, "Zero-shot heads"):
        heads[task] = model.logit_scale.exp() * make(TASKS[task].classes, TASKS[task].templates)
    return model.visual.cpu(), heads


def load_expert(repo: str, tower: nn.Module, hub: Path | None) -> nn.Module:
    """A fine-tuned tower, of the same make as the pre-trained `tower`, from a CLIPVisionModel's weights.

    That lacks the projection into the joint space; it was not fine-tuned, so the pre-trained one is taken.
    """
    (path,) = files_of(repo, "model", hub, "model.safetensors")
    with reading(path):
        return filled(tower, {**from_hugging_face(load_file(path)), "proj": tower.proj})


# Parts of names in Hugging Face's CLIP, and what they are in open_clip's.
THEIRS = "position_embedding.weight patch_embedding encoder.layers pre_layrnorm post_layernorm layer_norm fc1 fc2"
OURS = "positional_embedding conv1 transformer.resblocks ln_pre ln_post ln_ c_fc c_proj"
NAMES = dict(zip(THEIRS.split(), OURS.split())) | {"self_attn": "attn", "vision_model.": "", "embeddings.": ""}


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPVisionModel's weights under open_clip's names; queries, keys and values 3 x (D, D) -> in_proj (3 D, D)."""
    converted = {}
    for name in sorted(state, key=lambda name: name.replace("q_proj", "a_proj")):  # queries before keys
        ours = re.sub("[qkv]_proj[.]", "in_proj_", name)
        for part, its_name in NAMES.items():
            ours = ours.replace(part, its_name)
        converted.setdefault(ours, []).append(state[name])
    return {name: torch.cat(parts) for name, parts in converted.items() if name != "position_ids"}


def refuse_twins(pretrained: nn.Module, experts: Mapping[str, nn.Module]) -> None:
    """Load each expert once. Raises ValueError if one is the pre-trained model or another one again."""
    seen = {}
    for name in progress(["pre-trained", *experts], "Experts"):
        weights = experts.get(name, pretrained).state_dict().values()
        if (twin := seen.setdefault(tuple(p.double().sum().item() for p in weights), name)) != name:
            raise ValueError(f"the model of {name} is that of {twin} again: a file is in the wrong place")


def image_set(
    hub: Path | None, cache: Path, prepare: partial, limit: int | None, task: str, split: str, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Images up to normalisation, uint8 (N, 3, H, W), decoded once and then memory-mapped; class numbers, int64 (N,).

    `prepare` is `pixels` with its arguments. Of a split for tests the first `limit` are taken; `count` takes so many of
    the whole split, which may be sorted by class. Raises ValueError.
    """
    spec, side = TASKS[task], prepare.keywords["size"]
    name = spec.split if split == "test" else split
    files = files_of(spec.repo, "dataset", hub, "/".join(filter(None, ("**", spec.config, f"{name}-*.parquet"))))
    rows = partial(datasets.load_dataset, "parquet", data_files=[*map(str, files)], split="train", streaming=True)
    with reading(f"{task}, split {split} in {files[0].parent},"):
        labels = class_numbers(rows(columns=[spec.label_column]), spec.label_column, spec.classes)
        chosen = np.arange(len(labels))[: None if split == "train" else limit]
        if count:
            chosen = np.linspace(0, len(labels) - 1, min(count, len(labels))).round().astype(int)
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        out = cache / f"{task}-{split}-{fingerprint(spec, split, prepare.keywords, stats, chosen.tolist())}.bin"
        if not out.exists():
            write(out, partial(decode, rows(columns=[spec.image_column]), spec.image_column, chosen, prepare))
        images = torch.from_file(str(out), size=out.stat().st_size, dtype=torch.uint8)
        return images.view(len(chosen), 3, side, side), torch.from_numpy(labels[chosen])


def class_numbers(rows: datasets.IterableDataset, name: str, classes: list[str]) -> np.ndarray:
    """The labels as numbers of the task's classes, int64 (N,): by name if the names are the same, or by number."""
    names, labels = getattr(rows.features[name], "names", classes), [row[name] for row in rows]
    if len(names) != len(classes) or not 0 <= min(labels) <= max(labels) < len(classes):
        raise ValueError(f"it has {len(names)} classes and labels to {max(labels)}, the task {len(classes)} classes")
    theirs, ours = ([re.sub(r"[\W_]+", "", name).casefold() for name in those] for those in (names, classes))
    return np.array([ours.index(name) for name in theirs])[labels] if set(theirs) == set(ours) else np.array(labels)


def decode(rows: datasets.IterableDataset, name: str, chosen: np.ndarray, prepare: partial, out: Path) -> None:
    """Write the images of these numbers to a file: uint8 (N, 3, H, W), without a header."""
    rows = rows.cast_column(name, datasets.Image(decode=False))
    rows = rows.filter(lambda _, number: number in chosen, with_indices=True).take(len(chosen))
    with out.open("wb") as file:
        for number, row in zip(progress(chosen, out.name.split("-")[0], unit="image"), rows):
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
