"""Numbers of parameters, of architectures alone, beside those of the paper's Tables 1, 8 and 9."""

from collections.abc import Iterator

import open_clip
import torch
from torch import nn

import wemoe
from data.paper import published
from data.paper.hub import ARCHITECTURES


def parameters(arch: str, depth: int | None, num_tasks: int) -> dict[str, int]:
    """What an architecture with such routers has, without weights, on torch's meta device; depth None: no routers.

    As in the paper, what the authors' image encoder has of CLIP counts: all but the Transformer of the text tower.
    """
    config = open_clip.get_model_config(ARCHITECTURES[arch].model)
    with torch.device("meta"):
        clip = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
        clip.transformer = nn.Identity()
        mlps = [module for name, module in clip.visual.named_modules() if name.endswith(".mlp") and depth is not None]
        routers = [wemoe.Router(mlp[0].in_features, num_tasks, depth) for mlp in mlps]
    trainable, routed, single = (count(group) for group in (routers, mlps, [clip]))
    total, tensors = single + num_tasks * routed + trainable, len(list(clip.parameters()))
    return {"trainable": trainable, "all": total, "tensors": tensors}


def count(modules: list[nn.Module]) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def compared() -> Iterator[tuple[str, int, str]]:
    """Row by row of the tables: what it is, ours, and the paper's as it prints it."""
    tables = published.paper_tables()
    for row in tables["1"]["rows"]:
        ours, millions = parameters(row["model"], row["depth"], 8), row["total_millions"]
        theirs = str(row["trainable"]) if "trainable" in row else f"{row['trainable_millions']}M"
        name = f"Table 1: {row['model']}, {row['depth']}-layer routers"
        yield f"{name}, trainable", ours["trainable"], theirs
        yield f"{name}, all", ours["all"], f"{millions}M" if millions < 1000 else f"{millions / 1000:.2f}B"
    for row in tables["8"]["rows"]:
        ours = parameters("ViT-B-32", 2, row["tasks"])
        yield f"Table 8: {row['tasks']} tasks, trainable", ours["trainable"], f"{row['trainable']}M"
        yield f"Table 8: {row['tasks']} tasks, all", ours["all"], f"{row['total']}M"
    single = parameters("ViT-B-32", None, 8)
    yield "Table 8: the pre-trained model", single["all"], f"{tables['8']['single_pretrained']}M"
    learned = [8 * single["tensors"], *(parameters("ViT-B-32", depth, 8)["trainable"] for depth in (1, 2))]
    for row, ours in zip(tables["9"]["rows"], learned):  # AdaMerging (layer-wise), routers of one and two layers
        yield f"Table 9: {published.our_name(row)}, trainable", ours, row["trainable"]


def rounds_to(value: int, printed: str) -> bool:
    """Whether 7,159,392 is what "7.16M" stands for."""
    digits = printed.rstrip("KMB")
    unit = {"K": 1e3, "M": 1e6, "B": 1e9}.get(printed[-1], 1)
    return f"{value / unit:.{len(digits.partition('.')[2])}f}" == digits
