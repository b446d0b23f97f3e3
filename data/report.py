"""The report of an experiment: numbers in; results.json, tables as Markdown and pictures as matplotlib figures out."""

import argparse
import itertools
import math
import platform
import statistics
from dataclasses import asdict
from pathlib import Path

import open_clip
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor


def results_of(arguments: argparse.Namespace, measured, claims: list[dict]) -> dict:
    """What results.json holds; `measured` is an experiments.Measured, or None where there is no suite."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__}
    results = {name: getattr(arguments, name) for name in ("experiment", "seed", "seeds", "device")}
    results = {"suite": arguments.name, **results, "versions": versions, "claims": claims}
    if measured is None:
        return results
    suite, conditions, entries = measured.suite, measured.conditions, measured.entries
    adaptation = asdict(suite.adaptation)
    results["settings"] = {"precision": suite.precision, "adaptation": adaptation, "limit": arguments.limit}
    results["tasks"] = suite.tasks
    if arguments.experiment == "main":
        results["methods"] = [seeds[0] for seeds in entries["main"].values()]
        results["published"] = conditions[0].published
    if arguments.experiment != "main" or arguments.seeds > 1:
        results["conditions"] = [dict(asdict(c), methods=entries[c.name]) for c in conditions]
    return results


def averages(entries: list[dict], tasks: list[str]) -> list[float]:
    """For every seed, the average accuracy over these tasks."""
    return [statistics.mean(entry["accuracy"][task] for task in tasks) for entry in entries]


def table(
    columns: dict[str, list[str]], methods: dict[str, list[dict]], published: list[dict], details: bool = False
) -> str:
    """Accuracy in percent by method and task (± deviation over seeds), as Markdown that is legible on a console too."""
    headings, cells, rows = ["Method"], [], []
    for average, tasks in columns.items():
        headings += [*tasks, average]
        cells += [*([task] for task in tasks), tasks]
    headings += ["Seconds", "of evaluation", "Parameters", "learned", "MB", "Needs", "arXiv"] if details else []
    theirs = {row["method"]: row for row in published}
    group = None
    for name, entries in methods.items():
        if details and group != entries[0]["group"]:
            group = entries[0]["group"]
            rows.append([f"*{group}*", *[""] * (len(headings) - 1)])
        values = [averages(entries, tasks) for tasks in cells]
        rows.append([name, *(spread(value) for value in values)])
        if details:
            learned = entries[0].get("learned", entries[0]["trainable_parameters"])
            times = f"{entries[0]['seconds']:.0f}", f"{entries[0]['evaluation_seconds']:.1f}"
            sizes = f"{entries[0]['total_parameters']:,}", f"{learned:,}", f"{entries[0]['bytes'] / 1e6:.1f}"
            rows[-1] += [*times, *sizes, ", ".join(entries[0]["needs"]), entries[0]["arxiv"]]
        if row := theirs.get(name):
            known = [averages([row], tasks)[0] for tasks in cells]
            rest = [""] * (len(headings) - 1 - len(known))
            settings = f", {row['source']} settings" if "adaptation" in entries[0] else ""
            rows.append([f"  published ({row['source']}{settings})", *(f"{value:.1f}" for value in known), *rest])
            if details:
                rows[-1][-2] = ", ".join(row.get("needs", []))
            rows.append(["  difference", *(f"{statistics.mean(a) - b:+.1f}" for a, b in zip(values, known)), *rest])
    return markdown(headings, rows)


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    lines = [
        "| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in [headings, *rows]
    ]
    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "".join(line + " |\n" for line in [lines[0], rule, *lines[1:]])


def by_group(groups: dict[str, dict[str, list[float]]]) -> str:
    """A table of means over seeds: methods by groups."""
    methods = next(iter(groups.values()))
    rows = [[name, *(spread(group.get(name)) for group in groups.values())] for name in methods]
    return markdown(["Method", *groups], rows)


def tables(conditions: list, entries: dict[str, dict[str, list[dict]]], details: bool) -> str:
    """A table for every condition; one method alone, nothing published beside it, joins the one before, if it fits."""
    shown: list[tuple[object, dict[str, list[dict]]]] = []
    for condition in conditions:
        rows = entries[condition.name]
        if alone := len(rows) == 1 < len(conditions) and not condition.published:
            rows = {f"{name}, {condition.name}": seeds for name, seeds in rows.items()}
        if alone and shown and shown[-1][0].columns == condition.columns:
            shown[-1][1].update(rows)
        else:
            shown.append((condition, dict(rows)))
    texts = [(c.name, table(c.columns, rows, c.published, details)) for c, rows in shown]
    return texts[0][1] if len(texts) == 1 else "\n".join(f"## {name}\n\n{text}" for name, text in texts)


def spread(values: list[float] | None) -> str:
    """Mean ± standard deviation, of several."""
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=150)


def panels(rows: int = 1, columns: int = 1, sharey: bool = False, **options):
    """A figure and its axes, an array of (rows, columns); no window system is asked for one."""
    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def draw_tasks(test: dict[str, tuple[Tensor, Tensor]], columns: int = 24) -> Figure:
    """A contact sheet: test images of every task, one row each, the classes taking turns."""
    size = (12, 0.6 * len(test))
    figure, axes = panels(len(test), figsize=size)
    for (task, (images, _)), axis in zip(test.items(), axes[:, 0]):
        images = images[:columns]
        images = images[..., :: max(1, images.shape[-2] // 64), :: max(1, images.shape[-1] // 64)]
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).numpy())  # side by side
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(task, rotation=0, ha="right", va="center")
    return figure


def draw_accuracy(tasks: list[str], methods: list[dict]) -> Figure:
    """A heat map of the table: methods by tasks."""
    values = [[*(method["accuracy"][task] for task in tasks), method["average"]] for method in methods]
    figure, ((axis,),) = panels(figsize=(1.05 * len(tasks) + 3, 0.45 * len(methods) + 1))
    lowest = min(map(min, values))
    axis.imshow(values, cmap="viridis", vmin=lowest, vmax=100, aspect="auto")
    axis.set_xticks(range(len(tasks) + 1), [*tasks, "Average"])
    axis.set_yticks(range(len(methods)), [method["name"] for method in methods])
    axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            bold = "bold" if x == len(tasks) else "normal"
            colour = "k" if value > (lowest + 100) / 2 else "w"
            axis.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, weight=bold)
    axis.axvline(len(tasks) - 0.5, color="w", linewidth=3)
    for y, (above, below) in enumerate(itertools.pairwise(methods)):
        if above["group"] != below["group"]:
            axis.axhline(y + 0.5, color="w", linewidth=3)
    return figure


def draw_costs(methods: dict[str, list[dict]], images: int) -> Figure:
    """Accuracy against parameters kept, and against the time of evaluation for each image; a colour for each group."""
    figure, axes = panels(1, 2, figsize=(14, 0.2 * len(methods) + 3), sharey=True)
    groups = dict.fromkeys(entries[0]["group"] for entries in methods.values())
    colours = dict(zip(groups, colormaps["Dark2"].colors))
    accuracies = {name: statistics.mean(entry["average"] for entry in entries) for name, entries in methods.items()}
    apart = max(0.5, max(accuracies.values()) - min(accuracies.values())) / 50  # names, at least
    for axis, key, unit, label in (
        (axes[0, 0], "total_parameters", 1e6, "parameters kept (millions)"),
        (axes[0, 1], "evaluation_seconds", images / 1e3, "evaluation (ms for each image)"),
    ):
        named: list[tuple[float, float]] = []  # where names are
        for name, y in sorted(accuracies.items(), key=lambda item: -item[1]):
            x = statistics.mean(entry[key] for entry in methods[name]) / unit
            colour = colours[methods[name][0]["group"]]
            axis.plot(x, y, "o", color=colour, markersize=5)
            near = [height for other, height in named if abs(math.log(x / other)) < 0.8]
            named.append((x, min([y, *(height - apart for height in near)])))
            axis.text(1.06 * x, named[-1][1], name, fontsize=8, va="center", color=colour)
        axis.set(xlabel=label, xscale="log")
        axis.set_xlim(axis.get_xlim()[0], 2.5 * axis.get_xlim()[1])  # room for names
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3)
    for group, colour in colours.items():
        axes[0, 0].plot([], [], "o", color=colour, label=group)
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    return figure


def draw_adaptation(curves: dict[str, dict], averages: dict[str, float], images: int, authors: dict | None) -> Figure:
    """Entropy and accuracy during adaptation, one line for each method that adapts, and the authors' WEMoE."""
    figure, ((left, right),) = panels(1, 2, figsize=(13, 4.5))
    colours = colormaps["tab20"].colors
    for colour, (name, curve) in zip(itertools.cycle(colours), curves.items()):
        window = max(1, len(curve["entropy"]) // 10)
        smooth = [statistics.mean(curve["entropy"][max(0, i - window) : i + 1]) for i in range(len(curve["entropy"]))]
        left.plot(range(1, len(smooth) + 1), smooth, color=colour)
        right.plot(curve["steps"], curve["accuracy"], "o-", color=colour, label=name, markersize=3)
    for name, style in (("Individual", "--"), ("Task Arithmetic", ":")):
        if name in averages:
            label = f"{name} (all test inputs)"
            right.axhline(averages[name], color="grey", linestyle=style, label=label)
    if authors:
        label = "WEMoE, the authors' (all test inputs)"
        right.plot(authors["steps"], authors["average"], "k^--", label=label, markersize=4)
    title = "What is minimised (moving average)"
    left.set(xlabel="adaptation step", ylabel="mean entropy (nats)", ylim=(0, None), title=title)
    title = f"What is gained ({images} test inputs of each task)"
    right.set(xlabel="adaptation step", ylabel="accuracy (%)", title=title)
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
    return figure


def draw_routing(tasks: list[str], routing: dict[str, list[list[float]]], first: bool = False) -> Figure:
    """Heat maps, one for every routed module: to which expert do images of which task go, with which λ or first?"""
    columns = min(6, len(routing))
    rows = -(-len(routing) // columns)
    size = (3.2 * columns + 1, 4 * rows + 1)
    figure, axes = panels(rows, columns, figsize=size, sharey=True)
    limit = max(abs(value) for rows in routing.values() for row in rows for value in row)
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 1} if first else {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    for axis, (name, matrix) in zip(axes.flat, routing.items()):
        image = axis.imshow(matrix, **scale)
        axis.set_title(name.removeprefix("transformer."), fontsize=9)
        axis.set_xticks(range(len(matrix[0])), tasks[: len(matrix[0])], rotation=90)
        axis.set_xlabel("task vector")
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set_ylabel("images of task")
    label = "share of images: first choice" if first else "mean routing weight λ"
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def draw_landscapes(surfaces: dict[str, tuple[tuple[str, str], list[float], list[list[float]]]]) -> Figure:
    """Contours of the loss over (λ1, λ2), a panel for each pair of tasks: their names, the grid, loss[i][j]."""
    figure, axes = panels(1, len(surfaces), figsize=(3.6 * len(surfaces), 3.4))
    for axis, ((one, two), grid, loss) in zip(axes[0], surfaces.values()):
        contours = axis.contourf(grid, grid, list(zip(*loss)), levels=20, cmap="viridis")  # λ1 to the right
        axis.plot([0, 1, 0], [0, 0, 1], "wo", markersize=4)  # θ_0 and the two experts
        axis.set(xlabel=f"λ1: {one}", ylabel=f"λ2: {two}", aspect="equal")
        figure.colorbar(contours, ax=axis, label="loss (nats)", shrink=0.8)
    return figure


def draw_lines(
    panels_of: dict[str, dict[str, dict[float | str, float]]],
    theirs: dict[str, dict[str, dict[float, float]]] | None = None,
    ylabel: str = "accuracy (%)",
    columns: int = 5,
) -> Figure:
    """A panel for each x axis or condition, a line for each label: x -> y; dashed, what was published.

    Where x are words, they are evenly spaced.
    """
    theirs, rows = theirs or {}, -(-len(panels_of) // columns)
    columns = min(columns, len(panels_of))
    figure, axes = panels(rows, columns, figsize=(3 * columns + 2.5, 3.2 * rows), sharey=ylabel == "accuracy (%)")
    labels = list(dict.fromkeys(label for lines in panels_of.values() for label in lines))
    colours = dict(zip(labels, itertools.cycle(colormaps["tab10"].colors)))
    for axis in axes.flat[len(panels_of) :]:
        axis.axis("off")
    for (name, lines), axis in zip(panels_of.items(), axes.flat):
        for label, points in lines.items():
            axis.plot(list(points), list(points.values()), "o-", color=colours[label], label=label, markersize=4)
        for label, points in theirs.get(name, {}).items():
            style = {"color": colours.get(label, "k"), "label": f"{label}, published", "markersize": 4}
            axis.plot(list(points), list(points.values()), "^--", **style)
        axis.set(xlabel=name)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return figure


def draw_conditions(conditions: dict[str, dict[str, list[float]]]) -> Figure:
    """Bars of accuracy: a group for every condition, a bar for every method in it, with its deviation over seeds."""
    names = list(dict.fromkeys(name for methods in conditions.values() for name in methods))
    figure, ((axis,),) = panels(figsize=(1.3 * len(conditions) + 3, 4))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        known = {x: methods[name] for x, methods in enumerate(conditions.values()) if name in methods}
        means = [statistics.mean(values) for values in known.values()]
        deviations = [statistics.stdev(values) if len(values) > 1 else 0 for values in known.values()]
        axis.bar([x + i * width for x in known], means, width, yerr=deviations if any(deviations) else None, label=name)
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(conditions))], [c.replace("_", " ") for c in conditions])
    axis.set(ylabel="accuracy (%)", ylim=(0, 100))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_times(by_batch: dict[int, dict[str, float]], by_tasks: dict[int, dict[str, float]]) -> Figure:
    """Seconds of a forward pass against the batch size, and against the number of tasks."""
    figure, axes = panels(1, 2, figsize=(10, 4))
    for axis, points, label in zip(axes[0], (by_batch, by_tasks), ("batch size B", "tasks T")):
        for name in dict.fromkeys(name for seconds in points.values() for name in seconds):
            known = {x: seconds[name] for x, seconds in points.items() if name in seconds}
            axis.plot(list(known), list(known.values()), "o-", label=name)
        axis.set(xlabel=label, ylabel="seconds a forward pass", xscale="log", yscale="log")
        axis.legend()
    return figure


def draw_mechanism() -> Figure:
    """What a WEMoE module does with an input, as README shows it: router → λ → merged weights → MLP."""
    figure, ((axis,),) = panels(figsize=(9.2, 3.3))
    axis.set(xlim=(0, 10), ylim=(0, 3.6))
    axis.axis("off")
    blue, orange, grey = "#cfe2f3", "#fce5cd", "#eeeeee"

    def box(x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
        axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", fc=colour, ec="black", lw=0.8))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=10)

    def arrow(start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 1.2, "color": "black"})
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axis.text(middle[0], middle[1] + 0.12, label, ha="center", va="bottom", fontsize=9)

    box(0.1, 0.5, 1.5, 0.8, "h  (B, N, D)\ntokens of B inputs", grey)
    box(2.3, 2.3, 2.0, 0.8, "router\nmean of r(h) over tokens", orange)
    box(5.2, 2.3, 2.7, 0.8, "θ(x) = θ₀ + Σₜ λₜ(x) τₜ\nmerged for each input", blue)
    box(8.6, 2.3, 1.3, 0.8, "θ₀ and all τₜ,\nfrozen", grey)
    box(5.2, 0.5, 2.7, 0.8, "MLP with weights θ(x)", blue)
    box(8.6, 0.5, 1.3, 0.8, "output\n(B, N, D)", grey)
    arrow((1.0, 1.4), (2.2, 2.6))
    arrow((4.4, 2.7), (5.1, 2.7), "λ (B, T)")
    arrow((8.5, 2.7), (8.0, 2.7))
    arrow((6.55, 2.2), (6.55, 1.4))
    arrow((1.7, 0.9), (5.1, 0.9))
    arrow((8.0, 0.9), (8.5, 0.9))
    return figure


if __name__ == "__main__":  # python -m data.report: README's drawing
    save(draw_mechanism(), Path(".github/figures/mechanism.png"))
