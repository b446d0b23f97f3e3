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


PUBLISHED_TASKS = read("paper.json")["tasks"]
ROBUSTNESS_TASKS = paper_tables()["5"]["tasks"]


def eight_tasks(arch: str, source: str | None) -> list[dict]:
    """Tables 2 and 3, or the hub's."""
    tables = paper_tables()
    needs = {our_name(row): [kind for kind, needed in row.items() if needed is True] for row in tables["7"]["rows"]}
    rows = {("paper", table["model"]): table["rows"] for table in (tables["2"], tables["3"])}
    rows |= {("hub", model): theirs for model, theirs in read("hub_results.json")["main"].items()}
    return [
        {**row, "needs": needs.get(row["method"], []), "claimed": (source, arch, row["method"]) not in UNLIKE}
        for row in _rows(rows.get((source, arch), []), source)
    ]


def router_depths(arch: str, source: str | None) -> list[dict]:
    """Table 10, or the hub's rows of its methods."""
    if (arch, source) == ("ViT-B-32", "paper"):
        return _rows(paper_tables()["10"]["rows"], source)
    return eight_tasks(arch, source)


def routed_modules(arch: str, source: str | None) -> list[dict]:
    """Table 6; the hub has nothing like it."""
    return _rows(paper_tables()["6"]["rows"], source) if (arch, source) == ("ViT-B-32", "paper") else []


def generalization(arch: str, source: str | None) -> list[tuple[list[str], list[str], list[dict]]]:
    """Seen tasks, unseen tasks and rows: of Table 4, and of another choice of tasks that the hub has, too."""
    table, found = paper_tables()["4"], []
    for split in read("hub_results.json")["generalization"]:
        seen, unseen = split["seen"], split["unseen"]
        rows = {"hub": split["rows"], "paper": table["rows"] if table["unseen"] == unseen else []}
        found.append((seen, unseen, _rows(rows.get(source, []) if arch == "ViT-B-32" else [], source, seen + unseen)))
    return found


def robustness(arch: str, source: str | None, condition: str) -> list[dict]:
    """Table 5 (ViT-B-32) or 11 (ViT-B-16) under "clean" or a corruption, or the hub's rows (ViT-B-32)."""
    tables = {("paper", "ViT-B-32"): paper_tables()["5"], ("paper", "ViT-B-16"): paper_tables()["11"]}
    tables["hub", "ViT-B-32"] = read("hub_results.json")["robustness"]
    table = tables.get((source, arch), {"conditions": {}})
    return _rows(table["conditions"].get(condition, []), source, ROBUSTNESS_TASKS)


def sweep(arch: str, condition: str) -> dict[str, dict[float, dict[str, float]]]:
    """Method -> λ -> task -> %: the points of Figures 5 (ViT-B-32) and 10 (ViT-B-16)."""
    return {
        our_name({"method": method}): {
            float(lam): dict(zip(ROBUSTNESS_TASKS, cells)) for lam, cells in conditions[condition].items()
        }
        for method, conditions in read("paper_sweeps.json")["models"].get(arch, {}).items()
    }


def our_name(row: dict) -> str:
    return OUR_NAMES.get(row["method"], row["method"])


def _rows(rows: list[dict], source: str | None, tasks: list[str] = PUBLISHED_TASKS) -> list[dict]:
    cells = {our_name(row): row.get("accuracy") or row["seen"] + row["unseen"] for row in rows}
    return [{"method": name, "source": source, "accuracy": dict(zip(tasks, cell))} for name, cell in cells.items()]
