"""What was published: the paper's own tables, and what FusionBench measured on the model hub's checkpoints."""

import json
from functools import cache
from pathlib import Path


@cache
def read(name: str) -> dict:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def paper_tables() -> dict[str, dict]:
    """The paper's tables by their numbers, "1" to "11"; measured on the task-arithmetic authors' checkpoints."""
    return read("paper.json")["tables"]


def paper_sweeps(arch: str) -> dict[str, dict]:
    """Figures 5 and 10, and Tables 5 and 11 at λ = 0.3: method -> condition -> λ -> accuracies on four tasks."""
    return read("paper_sweeps.json")["models"].get(arch, {})


def hub_rows(arch: str) -> list[dict]:
    """FusionBench's accuracies on the eight tasks: {method, source, accuracy, average}; no rows for other models."""
    return read("hub_results.json")["main"].get(arch, [])


def hub_generalization() -> list[dict]:
    """FusionBench's accuracies on six seen and two unseen tasks, ViT-B-32: the paper's Table 4, and another choice."""
    return read("hub_results.json")["generalization"]


def hub_robustness() -> dict:
    """FusionBench's accuracies on corrupted test images, ViT-B-32: by condition, as the paper's Table 5."""
    return read("hub_results.json")["robustness"]


def adaptation_curves(arch: str) -> list[dict]:
    """The authors' accuracies after each 100 steps of adaptation, one curve for each learning rate (Figure 4)."""
    return read("hub_results.json")["adaptation_curves"]["models"].get(arch, [])
