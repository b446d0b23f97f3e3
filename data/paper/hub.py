"""The paper's suite: tasks and architectures, the repositories that hold them, what a run needs on disk, the weights.

Everything comes from the model hub, or (`hub`) from a mirror of it on disk in which every repository is a folder of its
own name, as `hf download REPO --repo-type … --local-dir DIR/REPO` makes it. What cannot be used is refused with an
InputError.
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import open_clip
import pyarrow.parquet as pq
import torch
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download
from huggingface_hub.file_download import repo_folder_name
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.utils import to_2tuple
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from data.files import InputError, fingerprint, one_line, read_kept, some, write


class Task(NamedTuple):
    """A classification task: its data set on the hub, and the class names and prompts that make its zero-shot head."""

    name: str
    about: str
    checkpoint_suffix: str
    templates: list[str]
    classes: list[str]
    repo: str
    config: str | None
    split: str
    images: int
    image_column: str
    label_column: str


class Architecture(NamedTuple):
    """A CLIP: open_clip's name and tag for it, and where the hub keeps its weights and its fine-tuned vision towers."""

    name: str
    model: str
    pretrained: str
    repo: str
    experts: str | None


TASKS = {
    task["name"]: Task(**task.pop("dataset"), **task)
    for task in json.loads(Path(__file__).with_name("tasks.json").read_text(encoding="utf-8"))["tasks"]
}
# OpenAI's weights need QuickGELU; with open_clip's plain names they would load too, and silently lose accuracy.
ARCHITECTURES = {
    name: Architecture(name, f"{name}-quickgelu", "openai", f"timm/{timm}_clip_224.openai", f"tanganke/{expert}_{{}}")
    for name, timm, expert in (
        ("ViT-B-32", "vit_base_patch32", "clip-vit-base-patch32"),
        ("ViT-B-16", "vit_base_patch16", "clip-vit-base-patch16"),
        ("ViT-L-14", "vit_large_patch14", "clip-vit-large-patch14"),
    )
}


def architecture(name: str, pretrained: str = "openai") -> Architecture:
    """One of the paper's architectures, or any other that open_clip has weights for (without published experts)."""
    if name in ARCHITECTURES and pretrained == "openai":
        return ARCHITECTURES[name]
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none: no architecture of that name"
        raise InputError(f"open_clip has no weights {pretrained!r} for {name!r}; it has: {known}")
    return Architecture(name, name, pretrained, os.path.split(tag.get("hf_hub", ""))[0], None)


def preprocessing(arch: Architecture) -> PreprocessCfg:
    """How open_clip prepares images for this model: size (H, W), interpolation, cropping, mean and deviation."""
    size = open_clip.get_model_config(arch.model)["vision_cfg"].get("image_size", 224)
    tag = open_clip.get_pretrained_cfg(arch.model, arch.pretrained)
    return PreprocessCfg(**merge_preprocess_dict({**tag, "size": to_2tuple(size)}, {}))


# ------------------------------------------------------------------------------------------------ the hub or its mirror


@contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Whatever goes wrong meanwhile is an InputError: the sentence, and the cause. Libraries raise what they like."""
    try:
        yield
    except Exception as error:
        # Of torch.load, without its advice to run what is in the file.
        cause = error.__context__ if isinstance(error, UnpicklingError) else error
        raise InputError(f"{sentence}: {one_line(cause or error)}") from error


class Repository(NamedTuple):
    """One repository's files and their sizes in bytes, in a folder of a mirror or of the hub client's cache.

    `revision` is the commit on the hub from which the cache gets the files that it lacks; None without a hub.
    """

    name: str
    kind: str
    folder: Path
    sizes: dict[str, int]
    revision: str | None = None

    @property
    def where(self) -> object:
        return self.folder if self.revision is None else self.name

    def on_disk(self, file: str) -> Path | None:
        """Where a file is already; None: still to download."""
        path = self.folder / file
        return path if self.revision is None or path.exists() else None

    def fetch(self, file: str) -> Path:
        """The file on disk, downloaded if need be. Raises InputError when that fails or something else lies there."""
        path = self.on_disk(file)
        with refusing(f"cannot download {file} of {self.name}"):
            path = path or Path(hf_hub_download(self.name, file, repo_type=self.kind, revision=self.revision))
        refuse_mistaken(path)
        return path

    def bytes_of(self, *files: str) -> Counter[str]:
        """The bytes of these files that are to "download", and of those that are "present"."""
        size = Counter()
        for file in files:
            size["present" if self.on_disk(file) else "download"] += self.sizes.get(file, 0)
        return size

    def rows(self, file: str) -> int:
        """How many a parquet file has. It says so in its last bytes: no more is read of one that is on the hub."""
        with refusing("a parquet file cannot be read"):
            source = self.on_disk(file) or HfFileSystem().open(f"datasets/{self.name}/{file}", revision=self.revision)
            return pq.read_metadata(source).num_rows

    def first(self, *names: str, folder: str = "") -> str:
        """The first of these files in a folder, or in the nearest below it. Raises InputError when there is none."""
        files = [file for file in self.sizes if file.startswith(folder)]
        found = [file for file in files if Path(file).name in names]
        if not found:
            where = f"{self.where}{folder and ' in ' + folder}"
            raise InputError(f"{where} has no {' or '.join(names)}; it has: {some(files)}")
        return min(found, key=lambda file: (file.count("/"), names.index(Path(file).name)))


def repository(name: str, kind: str, hub: Path | None) -> Repository:
    """List a repository: `kind` is "model" or "dataset". Without a network, what an earlier run has downloaded will do:
    the fullest, then latest, snapshot in the hub client's cache, be it partial.

    (`snapshot_download` without a network finds only what refs/main names, and a download by commit writes none.)
    Raises InputError when it is neither in the mirror, nor on the hub, nor in the cache.
    """
    folder, trouble = Path(hub or "", name), None
    if hub is None:
        snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "snapshots")
        try:
            info = HfApi().repo_info(name, repo_type=kind, files_metadata=True)
            sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            return Repository(name, kind, snapshots / info.sha, sizes, info.sha)
        except Exception as error:
            trouble = f"cannot reach {name} on the model hub ({one_line(error)}); --hub DIR reads a mirror on disk"
        kept = snapshots.glob("*")
        folder = max(kept, key=lambda path: (len(files_in(path)), path.stat().st_mtime), default=snapshots)
    if sizes := files_in(folder):
        return Repository(name, kind, folder, sizes)
    command = f"hf download {name} --repo-type {kind} --local-dir {folder}"
    raise InputError(trouble or f"the mirror has no files in {folder}; `{command}` gets them")


def files_in(folder: Path) -> dict[str, int]:
    """The sizes of all files below a folder by their paths in it; links are followed, but not in a circle."""
    sizes = {}
    for here, folders, files in os.walk(folder, followlinks=True):
        above = {os.path.realpath(path) for path in (Path(here), *Path(here).parents)}
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(here, name)) not in above]
        paths = [Path(here, name) for name in files]
        sizes |= {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}
    return sizes


SHARD = re.compile(r"((?P<folder>.*)/)?(?P<split>[^/]+?)(-(?P<number>\d{5})-of-(?P<count>\d{5})(-\w+)?)?\.parquet")


def shards(repo: Repository, config: str | None, split: str, test: str) -> list[str]:
    """The parquet files of one split, in order: [CONFIG/]SPLIT-00000-of-0000N.parquet in one folder, all N of them.

    The split "test" is the one that the data set calls `test`. Raises InputError for a missing split, for missing
    shards, and for shards of several versions or configurations.
    """
    split = test if split == "test" else split
    found = [match for file in sorted(repo.sizes) if (match := SHARD.fullmatch(file))]
    found = [match for match in found if config in (None, Path(match["folder"] or "").name)]
    parts = [(m["folder"], int(m["count"] or 1), int(m["number"] or 0)) for m in found if m["split"] == split]
    where = f"{repo.where}{f', configuration {config},' if config else ''}"
    if not parts:
        splits = some({match["split"] for match in found})
        raise InputError(f"{where} has no split {split!r} in parquet files; it has: {splits}")
    files = [match[0] for match in found if match["split"] == split]
    folder, count, _ = parts[0]
    if parts != [(folder, count, number) for number in range(count)]:
        raise InputError(f"{where} should have all shards of the split {split!r} in one folder, but has: {some(files)}")
    return files


def refuse_mistaken(path: Path) -> None:
    """Raise InputError for what is often found in the place of a large file."""
    with refusing(f"{path} cannot be read"), open(path, "rb") as file:
        start = file.read(2**16)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a git-LFS pointer, not the file itself: `git lfs pull` gets it")
    # The first byte would not do: a safetensors file of which the header has 60 bytes begins with "<", too.
    page = re.match(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", start, re.IGNORECASE)
    if page or not start.strip(b"\0"):
        what = "a web page, not the file itself" if page else "nothing but zeros" if start else "empty"
        raise InputError(f"{path} is {what}: download it again")


# ------------------------------------------------------------------------------------------------------------- the plan


def plan(
    arch: Architecture,
    cache: Path,
    hub: Path | None = None,
    *,
    tasks: Iterable[str] = TASKS,
    weights: bool = True,
    experts: bool = True,
    splits: Collection[str] = ("test",),
    limit: int | None = None,
) -> Counter[str]:
    """The bytes of weights, experts and images that a run will "download", "decode" into `cache`, and has "present".

    Raises InputError when the hub cannot be reached or a file is missing, so that a long run does not start in vain.
    """
    size, passing, prep = Counter(), 0, preprocessing(arch)
    if weights and arch.repo:
        repo = repository(arch.repo, "model", hub)
        size += repo.bytes_of(repo.first(*PRETRAINED_FILES))
    for task in map(TASKS.get, tasks):
        if experts:
            repo = repository(expert_repo(arch, task.name), "model", hub)
            size += repo.bytes_of(repo.first(*WEIGHT_FILES))
        repo = repository(task.repo, "dataset", hub)
        for split in splits:
            files = shards(repo, task.config, split, task.split)
            size += repo.bytes_of(*files)
            most = limit if split != "train" else None  # which is decoded whole
            count = sum(map(repo.rows, files))
            done = cache_path(task, prep, cache, repo, files, split, most).exists()
            size["present" if done else "decode"] += min(count, most or count) * math.prod(prep.input_size)
            passing = max(passing, 0 if done else sum(repo.sizes[file] for file in files))
    size["decode"] += passing  # a copy of one split at a time, until it is decoded
    return size


def cache_path(
    task: Task, prep: PreprocessCfg, cache: Path, repo: Repository, files: list[str], split: str, limit: int | None
) -> Path:
    """The decoded images' file, named after all that they depend on: the source files' sizes and times among it."""
    kinds = Image.registered_extensions()  # a parquet file may name images that lie beside it
    beside = [file for file in sorted(repo.sizes) if Path(file).suffix.lower() in kinds]
    paths = filter(None, map(repo.on_disk, [*files, *beside]))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = fingerprint(task.repo, task.config, task.image_column, split, vars(prep), stats)
    first = f"-first{limit}" if limit else ""
    return Path(cache) / f"{task.name}-{split}{first}-{key}.npy"


def check_space(size: Counter[str], cache: Path) -> None:
    """Raise InputError when what is to be made does not fit the free space of the file systems that it goes to."""
    needed: Counter[int] = Counter()  # by file system
    for what, folder in (("download", Path(constants.HF_HUB_CACHE)), ("decode", Path(cache))):
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        device = place.stat().st_dev
        needed[device] += size[what]
        if needed[device] > (free := shutil.disk_usage(place).free):
            short = f"{place} has {free / 1e9:.1f} GB free, but {needed[device] / 1e9:.1f} GB are needed there"
            raise InputError(f"{short}: {summary(size)}; free some, or move --cache or the hub's HF_HOME")


def summary(size: Counter[str]) -> str:
    """The plan in one line."""
    download, decode, present = (f"{size[key] / 1e9:.1f} GB" for key in ("download", "decode", "present"))
    return f"{download} to download and {decode} for decoding images ({present} are there already)"


# ---------------------------------------------------------------------------------------------------------- the weights

PRETRAINED_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def load_pretrained(arch: Architecture, hub: Path | None = None) -> open_clip.CLIP:
    """The pre-trained CLIP in float32 and evaluation mode; what is not on the hub, open_clip downloads.

    Raises InputError when the file is missing, unreadable, made for another architecture, or not finite.
    """
    tag = open_clip.get_pretrained_cfg(arch.model, arch.pretrained)
    source = arch.pretrained
    if arch.repo or hub is not None:
        repo = repository(arch.repo, "model", hub)
        source = str(repo.fetch(repo.first(*PRETRAINED_FILES)))
    with refusing(f"cannot load the weights of {arch.model} from {source}"):
        model = open_clip.create_model(arch.model, source, force_quick_gelu=tag.get("quick_gelu", False))
    refuse_infinite(model.state_dict(), source)
    return model.eval()


def expert_repo(arch: Architecture, task: str) -> str:
    if arch.experts is None:
        raise InputError(f"no experts are published for {arch.name}; --finetune makes them, --experts DIR reads them")
    return arch.experts.format(TASKS[task].checkpoint_suffix)


def load_expert(arch: Architecture, task: str, visual: nn.Module, hub: Path | None = None) -> dict[str, Tensor]:
    """The vision tower fine-tuned on a task, as a state dict for `visual`, open_clip's pre-trained vision tower.

    The hub keeps it in the format of Hugging Face's CLIPVisionModel; see `from_hugging_face`. Raises InputError.
    """
    repo = repository(expert_repo(arch, task), "model", hub)
    path = repo.fetch(repo.first(*WEIGHT_FILES))
    return from_hugging_face(read_weights(path), visual, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name. Code in a pickle is never run. Raises InputError, saying what is there."""
    safe = path.suffix == ".safetensors"
    advice = "" if safe else " (code in a pickle is never run, and model.safetensors is the safe format)"
    with refusing(f"{path} is not a readable weight file{advice}"):
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} should hold tensors by name, the state dict of a CLIPVisionModel, and nothing else")
    return state


def from_hugging_face(state: Mapping[str, Tensor], visual: nn.Module, source: Any) -> dict[str, Tensor]:
    """Convert a CLIPVisionModel's state dict to that of open_clip's vision tower `visual`, in float32.

    Queries, keys and values are stacked: 3 x (D, D) -> in_proj (3 D, D). A CLIPVisionModel has no projection into the
    joint space; it was not fine-tuned, so the pre-trained one is taken. Raises InputError naming the entry at fault.
    """
    own = visual.state_dict()
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in state) else ""
    parts = {name: [prefix + part for part in hugging_face_names(name)] for name in own if name != "proj"}
    shapes = {part: own[name].chunk(len(names))[0].shape for name, names in parts.items() for part in names}
    refuse_unusable({n: p for n, p in state.items() if not n.endswith("position_ids")}, shapes, source)
    tower = {name: torch.cat([state[part].float() for part in names]) for name, names in parts.items()}
    return {name: tower[name] if name in tower else own[name].clone() for name in own}


def hugging_face_names(name: str) -> list[str]:
    """Hugging Face's name for an entry of open_clip's vision tower; three names for stacked query, key and value."""
    name = re.sub(r"^transformer\.resblocks", "encoder.layers", name)
    for ours, theirs in (
        ("class_embedding", "embeddings.class_embedding"),
        ("positional_embedding", "embeddings.position_embedding.weight"),
        ("conv1", "embeddings.patch_embedding"),
        ("ln_pre", "pre_layrnorm"),
        ("ln_post", "post_layernorm"),
        ("ln_1", "layer_norm1"),
        ("ln_2", "layer_norm2"),
        (".attn", ".self_attn"),
        ("c_fc", "fc1"),
        ("c_proj", "fc2"),
    ):
        name = name.replace(ours, theirs)
    return [name.replace("in_proj_", f"{part}_proj.") for part in "qkv"] if "in_proj_" in name else [name]


def refuse_unusable(state: Mapping[str, Tensor], shapes: Mapping[str, Iterable[int]], source: Any) -> None:
    """Raise InputError for an entry that is missing, surplus, misshapen, an integer or not finite."""
    if missing := shapes.keys() - state.keys():
        raise InputError(f"{source} lacks {some(missing)}")
    if surplus := state.keys() - shapes.keys():
        raise InputError(f"{source} has entries that the architecture does not know: {some(surplus)}")
    for name, value in state.items():
        if (shape := tuple(value.shape)) != (needed := tuple(shapes[name])):
            raise InputError(f"{source}: {name} has the shape {shape}, the architecture needs {needed}")
        if not value.is_floating_point():
            raise InputError(f"{source}: {name} has the dtype {value.dtype}; floating-point weights are needed")
    refuse_infinite(state, source)


def refuse_infinite(state: Mapping[str, Tensor], source: Any) -> None:
    for name, value in state.items():
        if not value.isfinite().all():
            raise InputError(f"{source}: {name} has values that are not finite")


# ------------------------------------------------------------------------------------------------------------ the heads


def zero_shot_heads(
    model: open_clip.CLIP, arch: Architecture, cache: Path, tasks: Iterable[str] = TASKS
) -> dict[str, Tensor]:
    """The tasks' classifiers (D, C), times CLIP's logit scale: logits = normalised image features @ head.

    They are kept in `cache` under the text tower's weights, the class names and the templates.
    """
    text = fingerprint(*(p.cpu().numpy() for name, p in model.state_dict().items() if not name.startswith("visual.")))
    heads, device, tokenizer = {}, model.logit_scale.device, open_clip.get_tokenizer(arch.model)
    for task in tqdm(list(tasks), desc="zero-shot heads"):
        prompts = TASKS[task].classes, TASKS[task].templates
        path = Path(cache) / f"head-{task}-{fingerprint(arch.model, text, *prompts)}.safetensors"
        if not path.exists():
            head = open_clip.build_zero_shot_classifier(model, tokenizer, *prompts, device=device)
            head = (head * model.logit_scale.exp().detach()).cpu().contiguous()
            write(path, partial(save_file, {"head": head}))
        heads[task] = read_kept(path, load_file)["head"].to(device)
    return heads
