"""What was published: the paper's tables, what FusionBench measured on the hub's checkpoints, numbers of parameters.

Rows that stand beside ours are {"method": our name of it, "source": "paper", "hub" or another, "accuracy": task -> %,
"needs", "margin": points within which ours is claimed or None, "why"}. `python -m data.paper.published` prints with
which checkpoints and settings they were made, and ours (margins.json).
"""

import json
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import open_clip
import torch
from torch import nn

import wemoe


@cache
def read(name: str) -> dict:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def paper_tables() -> dict[str, dict]:
    """The paper's tables by their numbers, "1" to "11"; measured on the task-arithmetic authors' checkpoints."""
    return read("paper.json")["tables"]


PUBLISHED_TASKS = read("paper.json")["tasks"]
ROBUSTNESS_TASKS = paper_tables()["5"]["tasks"]


def adaptation_curves(arch: str) -> list[dict]:
    """The authors' accuracies after each 100 steps of adaptation, one curve for each learning rate (Figure 4)."""
    return read("hub_results.json")["adaptation_curves"]["models"].get(arch, [])


def table(arch: str, source: str | None, paper: str, hub: Iterable[dict] = ()) -> dict:
    """The table about an architecture: of the paper's with these numbers or of the hub's, as the source says."""
    known = {"paper": map(paper_tables().get, paper.split()), "hub": hub}.get(source, ())
    return next((found for found in known if found["model"] == arch), {"rows": [], "conditions": {}})


def eight_tasks(arch: str, source: str | None) -> list[dict]:
    """Tables 2 and 3; or the hub's rows and, beside them, the paper's WEMoE."""
    hub = [{"model": model, "rows": rows} for model, rows in read("hub_results.json")["main"].items()]
    paper = beside(table(arch, "paper", "2 3")["rows"], "paper", "other checkpoints") if source == "hub" else []
    rows = beside(table(arch, source, "2 3", hub)["rows"], source, arch)
    return rows + [row for row in paper if row["method"] == "WEMoE"]


def router_depths(arch: str, source: str | None) -> list[dict]:
    """Table 10, or the rows of its methods on the eight tasks."""
    return beside(table(arch, source, "10")["rows"], source, "depths") or eight_tasks(arch, source)


def routed_modules(arch: str, source: str | None) -> list[dict]:
    """Table 6; the hub has nothing like it."""
    return beside(table(arch, source, "6")["rows"], source, "modules")


def generalization(arch: str, source: str | None) -> Iterator[tuple[list[str], list[str], list[dict]]]:
    """Seen tasks, unseen tasks and rows: of Table 4, and of another choice of tasks that the hub has, too."""
    for hub in read("hub_results.json")["generalization"]:
        seen, unseen = hub["seen"], hub["unseen"]
        paper = "4" if unseen == paper_tables()["4"]["unseen"] else ""
        rows = table(arch, source, paper, [hub])["rows"]
        yield seen, unseen, beside(rows, source, "generalization", seen + unseen)


def robustness(arch: str, source: str | None, condition: str) -> list[dict]:
    """Table 5 (ViT-B-32) or 11 (ViT-B-16) under "clean" or a corruption, or the hub's rows (ViT-B-32)."""
    rows = table(arch, source, "5 11", [read("hub_results.json")["robustness"]])["conditions"].get(condition, [])
    return beside(rows, source, "clean" if condition == "clean" else "corrupted", ROBUSTNESS_TASKS)


def sweep(arch: str, condition: str) -> dict[str, dict[float, dict[str, float]]]:
    """Method -> λ -> task -> %: the points of Figures 5 (ViT-B-32) and 10 (ViT-B-16)."""
    return {
        our_name(method, "paper"): {float(lam): dict(zip(ROBUSTNESS_TASKS, p)) for lam, p in rows[condition].items()}
        for method, rows in read("paper_sweeps.json")["models"].get(arch, {}).items()
    }


def our_name(method: str, source: str) -> str:
    return read("margins.json")["names"].get(source, {}).get(method, method)


def beside(rows: list[dict], source: str | None, place: str, tasks: list[str] = PUBLISHED_TASKS) -> list[dict]:
    """Published rows as they stand beside ours: with the first entry of margins.json about source, method and place."""
    needed = {our_name(r["method"], "paper"): [n for n in r if r[n] is True] for r in paper_tables()["7"]["rows"]}
    found = []
    for row in rows:
        whose = row.get("source", source)
        name, cells = our_name(row["method"], whose), row.get("accuracy") or row["seen"] + row["unseen"]
        about = [e for e in read("margins.json")["rows"] if e["source"] == whose and name in e["methods"]]
        how = next(e for e in about if place in e.get("places", [place]))
        accuracy = {task: cell for task, cell in zip(tasks, cells) if cell is not None}
        more = {"needs": needed.get(name, []), "margin": how["margin"], "why": how["why"]}
        found.append({"method": name, "source": whose, "accuracy": accuracy, **more})
    return found


def compared() -> Iterator[tuple[str, int, str]]:
    """Row by row of Tables 1, 8 and 9: what it is, ours, and the paper's as it prints it.

    Ours are of the architectures, without weights. As in the paper, what the authors' image encoder has of CLIP counts:
    all but the Transformer of the text tower.
    """
    for what, arch, depth, tasks, kind, printed in read("margins.json")["parameters"]:
        with torch.device("meta"):
            clip = open_clip.CLIP(**open_clip.get_model_config(f"{arch}-quickgelu"))
            clip.transformer = nn.Identity()
            mlps = nn.ModuleList(block.mlp for block in clip.visual.transformer.resblocks if depth is not None)
            routers = nn.ModuleList(wemoe.Router(mlp[0].in_features, tasks, depth) for mlp in mlps)
        trainable, routed, single = (sum(p.numel() for p in part.parameters()) for part in (routers, mlps, clip))
        layer_wise = tasks * len(list(clip.parameters()))  # the λ of AdaMerging
        yield what, {"trainable": trainable, "all": single + tasks * routed + trainable, "λ": layer_wise}[kind], printed


def rounds_to(value: int, printed: str) -> bool:
    """Whether 7,159,392 is what "7.16M" stands for."""
    digits, unit = printed.rstrip("KMB"), {"K": 1e3, "M": 1e6, "B": 1e9}.get(printed[-1], 1)
    return f"{value / unit:.{len(digits.partition('.')[2])}f}" == digits


if __name__ == "__main__":  # README's table
    print("| published | made with | ours | claimed within |\n| --- | --- | --- | --- |")
    for row in read("margins.json")["rows"]:
        names = ", ".join(dict.fromkeys(name.split(" (")[0] for name in row["methods"]))
        where = " ".join([row["source"], *row.get("places", [])])
        claimed = ": ".join(filter(None, [f"{row['margin'] or 'no'}", row["why"]]))
        print(f"| {where}: {names} | {row['made']} | {row['ours']} | {claimed} |")
