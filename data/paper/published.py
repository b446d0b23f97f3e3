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


def adaptation_curves(arch: str) -> list[dict]:
    """The authors' accuracies after each 100 steps of adaptation, one curve for each learning rate (Figure 4)."""
    return read("hub_results.json")["adaptation_curves"]["models"].get(arch, [])


# ---- Rows to stand beside ours: {method: our name of it, source, accuracy: task -> %} --------------------------------
# Source "paper": its own tables, on the task-arithmetic authors' checkpoints; "hub": FusionBench's, on the hub's. What
# adapts did so with the settings of the same name (data.suite.Adaptation).

# Not quite with these, and so shown, but not claimed: the hub's Concrete AdaMerging learns its mask after one step of
# descent, which ours leaves out; its E-WEMoE prunes biases, too; for ViT-L/14 its routed methods averaged over 4
# images, on each of four GPUs or on one (docs/modelpool/clip_vit.md and examples/sparse_we_moe in its repository).
UNLIKE = {("hub", "ViT-B-32", "Concrete AdaMerging"), ("hub", "ViT-L-14", "WEMoE")}
UNLIKE |= {("hub", arch, "E-WEMoE") for arch in ("ViT-B-32", "ViT-B-16", "ViT-L-14")}

OUR_NAMES = {
    "WEMoE (2-layer)": "WEMoE",
    "WEMoE (1-layer router)": "WEMoE (1-layer)",
    "Weight-Ensembling MoE": "WEMoE",
    "E-WEMoE (90%)": "E-WEMoE",
    "Ties-Merging": "TIES-Merging",
    "ISO-C": "Iso-C",
    "ISO-CTS": "Iso-CTS",
    "WUDI-Merging": "WUDI",
    "AdaMerging": "AdaMerging (layer-wise)",
    "Layer-wise AdaMerging": "AdaMerging (layer-wise)",
    "Concrete AdaMerging (layer-wise)": "Concrete AdaMerging",
    "MLP only": "WEMoE (1-layer)",
    "Attention + MLP (separately)": "WEMoE (1-layer, attention and MLP)",
    "Entire Transformer Block": "WEMoE (1-layer, blocks)",
}


def eight_tasks(arch: str, source: str | None) -> list[dict]:
    """Tables 2 and 3, or the hub's."""
    tables, rows = paper_tables(), []
    needs = {our_name(row): [kind for kind, needed in row.items() if needed is True] for row in tables["7"]["rows"]}
    if source == "paper":
        rows = [row for number in "23" if tables[number]["model"] == arch for row in _table(number)]
    elif source == "hub":
        rows = _rows(hub_rows(arch), source, read("hub_results.json")["tasks"])
    return [
        {**row, "needs": needs.get(row["method"], []), "claimed": (source, arch, row["method"]) not in UNLIKE}
        for row in rows
    ]


def router_depths(arch: str, source: str | None) -> list[dict]:
    """Table 10, or the hub's rows of its methods."""
    return _table("10") if (arch, source) == ("ViT-B-32", "paper") else eight_tasks(arch, source)


def routed_modules(arch: str, source: str | None) -> list[dict]:
    """Table 6; the hub has nothing like it."""
    return _table("6") if (arch, source) == ("ViT-B-32", "paper") else []


def generalization(arch: str, source: str | None) -> list[tuple[list[str], list[str], list[dict]]]:
    """Seen tasks, unseen tasks and rows: of Table 4, and of another choice of tasks that the hub has, too."""
    found = []
    for split in read("hub_results.json")["generalization"]:
        table = paper_tables()["4"]
        if source == "paper":
            split = table if split["unseen"] == table["unseen"] else {**split, "rows": []}
        rows = split["rows"] if source and arch == "ViT-B-32" else []
        found.append((split["seen"], split["unseen"], _rows(rows, source, split["seen"] + split["unseen"])))
    return found


PUBLISHED_TASKS = read("paper.json")["tasks"]
ROBUSTNESS_TASKS = paper_tables()["5"]["tasks"]


def robustness(arch: str, source: str | None, condition: str) -> list[dict]:
    """Table 5 (ViT-B-32) or 11 (ViT-B-16) under "clean" or a corruption, or the hub's rows (ViT-B-32)."""
    tables = {("ViT-B-32", "paper"): paper_tables()["5"], ("ViT-B-16", "paper"): paper_tables()["11"]}
    tables["ViT-B-32", "hub"] = read("hub_results.json")["robustness"]
    table = tables.get((arch, source), {"conditions": {}})
    return _rows(table["conditions"].get(condition, []), source, ROBUSTNESS_TASKS)


def sweep(arch: str, condition: str) -> dict[str, dict[float, dict[str, float]]]:
    """Method -> λ -> task -> %: the points of Figures 5 (ViT-B-32) and 10 (ViT-B-16)."""
    return {
        OUR_NAMES.get(method, method): {
            float(lam): dict(zip(ROBUSTNESS_TASKS, cells)) for lam, cells in conditions[condition].items()
        }
        for method, conditions in paper_sweeps(arch).items()
    }


def our_name(row: dict) -> str:
    return OUR_NAMES.get(row["method"], row["method"])


def _table(number: str) -> list[dict]:
    return _rows(paper_tables()[number]["rows"], "paper", PUBLISHED_TASKS)


def _rows(rows: list[dict], source: str, tasks: list[str]) -> list[dict]:
    cells = {our_name(row): row.get("accuracy") or row["seen"] + row["unseen"] for row in rows}
    return [{"method": name, "source": source, "accuracy": dict(zip(tasks, cell))} for name, cell in cells.items()]
