"""Data frames in; tables, as Markdown or for a console, and pictures out.

A *wide* frame has a row for each method and seed, and a column for each task or condition. A table is a frame of texts;
what is to be said below it stands in its `attrs["notes"]`.
"""

import itertools
import os

os.environ["MPLBACKEND"] = "agg"  # pictures go to files; the backend that a notebook names may not be installed here

import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import Tensor

# ---- Tables ----------------------------------------------------------------------------------------------------------

DETAILS = ["Seconds", "of evaluation", "Parameters", "learned", "MB", "Needs", "arXiv"]
WIDTH = 100  # of a console


def by(frame: DataFrame, columns: str) -> DataFrame:
    """Wide, of a tidy frame with method, seed and accuracy: means by "task", "condition" or another column of it."""
    return frame.pivot_table(values="accuracy", index=["method", "seed"], columns=columns, sort=False)


def averaged(wide: DataFrame, columns: dict[str, list[str]] | None = None) -> DataFrame:
    """For each group of tasks (of all: "Average") these and, named as it is, their average, where no task lacks."""
    parts = {name: wide.reindex(columns=tasks) for name, tasks in (columns or {"Average": list(wide)}).items()}
    return pd.concat([part.assign(**{name: part.mean(axis=1, skipna=False)}) for name, part in parts.items()], axis=1)


def spread(wide: DataFrame) -> DataFrame:
    """Method x columns: the mean over seeds, as text; of several, with the standard deviation."""
    seeds = wide.groupby(level=0, sort=False)
    text = seeds.mean().map("{:.1f}".format)
    if seeds.size().max() > 1:
        text += seeds.std().map(" ± {:.1f}".format)
    return text.where(seeds.mean().notna(), "").rename_axis("Method").rename_axis(columns=None)


def tables(measured, details: bool = False) -> dict[str, DataFrame]:
    """A table for each condition of an experiments.Measured; with `details`, in groups, and with times and sizes."""
    return {c.name if len(measured.conditions) > 1 else "": table(measured, c, details) for c in measured.conditions}


def table(measured, condition, details: bool) -> DataFrame:
    """Methods by tasks; below each, what was published of it and the difference."""
    about = {e["name"]: e for e in measured.entries if e["condition"] == condition.name}
    cells = by(measured.frame[measured.frame.condition == condition.name], "task")
    wide = averaged(cells, condition.columns)
    means, group, rows, notes = wide.groupby(level=0).mean(), None, [], {}
    for name, texts in spread(wide).iterrows():
        if details and about[name]["group"] != group:
            group = about[name]["group"]
            rows.append([f"*{group}*"])
        rows.append([name, *texts, *(detail(about[name]) if details else [])])
        for row in (row for row in condition.published if row["method"] == name):
            theirs = averaged(DataFrame([row["accuracy"]]).reindex(columns=list(cells)), condition.columns).iloc[0]
            needs = [""] * 5 + [", ".join(row.get("needs", []))] if details else []
            rows.append([f"  published ({row['source']})", *theirs.map("{:.1f}".format, na_action="ignore"), *needs])
            rows.append(["  difference", *(means.loc[name] - theirs).map("{:+.1f}".format, na_action="ignore")])
            if row["margin"] is None and row.get("why"):
                notes.setdefault(row["why"], []).append(f"{name} ({row['source']})")
    heading = ["Method", *wide, *(DETAILS if details else [])]
    found = DataFrame(itertools.zip_longest(*rows, fillvalue="")).T.set_axis(heading, axis=1)
    found = found.fillna("").set_index("Method")
    found.attrs["notes"] = [f"Not claimed: {', '.join(names)}: {why}" for why, names in notes.items()]
    return found


def detail(entry: dict) -> list[str]:
    """Times, sizes and needs of a method, as DETAILS names them; `entry` is one of results.json."""
    sizes = f"{entry['total_parameters']:,}", f"{entry.get('learned', entry['trainable_parameters']):,}"
    seconds = f"{entry['seconds']:.0f}", f"{entry['evaluation_seconds']:.1f}"
    return [*seconds, *sizes, f"{entry['bytes'] / 1e6:.1f}", ", ".join(entry["needs"]), entry["arxiv"]]


def markdown(shown: dict[str, DataFrame]) -> str:
    """Each table under its title, and its notes."""
    texts = []
    for title, one in shown.items():
        heading, *rows = one.to_csv(sep="|").splitlines()
        lines = [heading, "---|" + "|".join(["---:"] * one.shape[1]), *rows]
        table = "\n".join(f"| {line.strip().replace('|', ' | ')} |" for line in lines)
        texts += [*([f"**{title}**"] if title else []), table, *one.attrs.get("notes", [])]
    return "\n\n".join(texts) + "\n"


def console(shown: dict[str, DataFrame]) -> str:
    """The same without notes, in lines of at most WIDTH characters: of the details Seconds alone."""
    return "\n\n".join(title + "\n" * bool(title) + narrow(one) for title, one in shown.items()) + "\n"


def narrow(one: DataFrame) -> str:
    """Where there is no room only averages keep deviations, headings are cut, or the last columns stand alone."""
    longest = max(len(name) for name in one.index if "*" not in name)  # of methods, not of groups
    whole = one.drop(columns=DETAILS[1:], errors="ignore").rename(index=lambda name: name[:longest]).rename_axis(None)
    bare = whole.map(lambda cell: cell.split(" ±")[0])
    some = bare.assign(**{name: whole[name] for name in whole if name in ("Average", "Seen", "Unseen")})
    for part, room in itertools.product((whole, some, bare, bare.iloc[:, -3:]), range(40, 3, -1)):
        widths = part.map(len).max().clip(lower=room)
        text = part.set_axis([name[: widths[name]] for name in part], axis=1).to_string()
        if text.find("\n") <= WIDTH:
            break
    return text


# ---- Pictures --------------------------------------------------------------------------------------------------------


def panels(count: int, columns: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, list]:
    """A figure of so many axes, each of this size in inches."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(layout="constrained", figsize=(width * columns + 2.5, height * rows + 0.5))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes[:count]


def contact_sheet(pictures: dict[str, Tensor], columns: int = 24) -> Figure:
    """Images, uint8 (N, 3, H, W): for each name a row of the first ones."""
    figure, axes = panels(len(pictures), 1, 0.5 * columns, 0.5)
    for (name, images), axis in zip(pictures.items(), axes):
        images = images[:columns, :, :: max(1, images.shape[-2] // 64), :: max(1, images.shape[-1] // 64)]
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).numpy())  # side by side
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def accuracy(frame: DataFrame) -> Figure:
    """A heat map of the table under one condition."""
    return heat({"": averaged(by(frame, "task")).groupby(level=0, sort=False).mean()}, "accuracy (%)")


def routing(tasks: list[str], rows: dict[str, list[list[float]]]) -> Figure:
    """To which expert do images of which task go, in each routed module: mean λ, or as a share of the images."""
    maps = {name: DataFrame(values, tasks, tasks[: len(values[0])]) for name, values in rows.items()}
    return heat(maps, "mean λ, or share of images", ("task vector", "images of task"))


def heat(maps: dict[str, DataFrame], label: str, xy: tuple[str, str] = ("", "")) -> Figure:
    """Heat maps, a panel for each frame; of a single one, the values are written into it."""
    rows, columns = next(iter(maps.values())).shape
    low, high = min(m.min(axis=None) for m in maps.values()), max(m.max(axis=None) for m in maps.values())
    alone = len(maps) == 1
    figure, axes = panels(len(maps), 6, columns if alone else 3, 0.45 * rows if alone else 3.4)
    for axis, (name, values) in zip(axes, maps.items()):
        image = axis.imshow(values, vmin=low, vmax=high, aspect="auto")
        axis.set(title=name, xlabel=xy[0], ylabel=xy[1])
        axis.set_xticks(range(columns), values.columns, rotation=0 if alone else 90)
        axis.set_yticks(range(rows), values.index)
        for y, x in itertools.product(range(rows), range(columns)) if alone else ():
            colour = "k" if values.iloc[y, x] > (low + high) / 2 else "w"
            axis.text(x, y, f"{values.iloc[y, x]:.1f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    return figure


def lines(points: list[tuple], xlabel: str, ylabel: str = "accuracy (%)") -> Figure:
    """Of (panel, label, x, y, published: whether it was), a panel for each of these, in it a line for each label."""
    frame = DataFrame(points, columns=["panel", "label", "x", "y", "published"])
    names, labels = frame.panel.unique(), frame.label.unique()
    figure, axes = panels(len(names), 4, 3.2, 3.2, sharey=bool(ylabel))
    axis_of, colours = dict(zip(names, axes)), colormaps["tab10" if len(labels) < 11 else "tab20"].colors
    colour_of = dict(zip(labels, itertools.cycle(colours)))
    for (name, label, theirs), line in frame.groupby(["panel", "label", "published"], sort=False):
        style = {"color": colour_of[label], "label": f"{label}, published" if theirs else label}
        axis_of[name].plot(line.x, line.y, "^--" if theirs else ".-", **style)
    for name, axis in axis_of.items():
        axis.set(title=name, xlabel=xlabel)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure


def bars(wide: DataFrame) -> Figure:
    """Accuracy: for each column of a wide frame a group of bars, one for each method, with its deviation over seeds."""
    seeds = wide.groupby(level=0, sort=False)
    means, deviations, places = seeds.mean(), seeds.std().fillna(0), range(wide.shape[1])
    figure, (axis,) = panels(1, 1, 1.3 * wide.shape[1] + 2, 3.5)
    width = 0.85 / len(means)
    for i, name in enumerate(means.index):
        axis.bar([x + i * width for x in places], means.loc[name], width, yerr=deviations.loc[name], label=name)
    axis.set_xticks([x + 0.4 for x in places], list(wide), rotation=15)
    axis.set(ylabel="accuracy (%)", ylim=(0, 100))
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def costs(entries: list[dict], inputs: int) -> Figure:
    """Accuracy against parameters kept and the time of evaluation, by name, of entries of results.json."""
    about = DataFrame(entries).groupby(["name", "group"]).mean(numeric_only=True).sort_values("average")[::-1]
    sizes = {"parameters kept (millions)": about.total_parameters / 1e6}
    sizes |= {"evaluation (ms for each input)": 1e3 * about.evaluation_seconds / inputs}
    colours = dict(zip(about.index.unique("group"), colormaps["Dark2"].colors))
    apart = (about.average.max() - about.average.min()) / 65  # are names
    figure, axes = panels(2, 2, 6, 0.2 * len(about) + 3, sharey=True)
    for axis, (label, xs) in zip(axes, sizes.items()):
        named: list[tuple[float, float]] = []  # where names are
        for ((name, group), x), y in zip(xs.items(), about.average):
            axis.plot(x, y, "o", color=colours[group], label=group)
            y = min([y, *(height - apart for other, height in named if 0.4 < x / other < 2.5)])
            axis.text(1.06 * x, y, name, fontsize=8, va="center", color=colours[group])
            named.append((x, y))
        axis.set(xlabel=label, ylabel="accuracy (%)", xscale="log", xlim=(0.8 * xs.min(), 3 * xs.max()))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure
