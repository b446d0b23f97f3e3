"""What the paper claims, checked on the numbers of a run: each claim with whether it holds, and the figures."""

import statistics
from collections.abc import Callable

from data.report import averages
from data.suite import CURVE_IMAGES

STATIC = "static"  # the group of the methods that look at no image


def check_published(published: dict[str, dict], tasks: list[str], methods: dict[str, dict]) -> list[dict]:
    """Our averages against the published ones: within 0.5 points, or 0.8 where something is learned.

    Where the published figure depends on a choice that is not known (of training images, of λ, of steps), none is made.
    """
    claims = []
    for name, row in published.items():
        if name in methods and name in COMPARABLE:
            ours, theirs = methods[name]["average"], statistics.mean(row["accuracy"][task] for task in tasks)
            margin = 0.8 if "adaptation" in methods[name] else 0.5
            text = f"{name} is within {margin} points of the published average ({row['source']})"
            detail = f"{ours:.2f} against {theirs:.2f}"
            claims.append({"claim": text, "holds": abs(ours - theirs) <= margin, "detail": detail})
    return claims


def check_miniature(methods: dict[str, dict]) -> list[dict]:
    """The paper's claims, each on our own numbers; those about methods that were not run are left out."""
    average = {name: method["average"] for name, method in methods.items()}
    if "Task Arithmetic" in methods:  # the strongest static merge, at its best λ, which no label-free method could know
        merges = [method for method in methods.values() if method["group"] == STATIC]
        points = [point["average"] for method in merges for point in method.get("curve", [method])]
        average["Best static"] = round(max(points), 2)
    claims = []

    def claim(text: str, needs: tuple[str, ...], holds: Callable[..., bool], detail: str = "") -> None:
        if all(name in average for name in needs):
            values = [average[name] for name in needs]
            claims.append({"claim": text, "holds": bool(holds(*values)), "detail": detail.format(*values)})

    claim(
        "Every expert's task is within its reach: the individual models average at least 90 %",
        ("Individual",), lambda i: i >= 90, "{0:.1f}",
    )  # fmt: skip
    claim(
        "Static merging loses at least 8 points against the individual models, even at the best λ",
        ("Best static", "Individual"), lambda s, i: s <= i - 8, "{0:.1f} ≤ {1:.1f} - 8",
    )  # fmt: skip
    claim(
        "The order is the paper's: pre-trained < averaging and task arithmetic < WEMoE ≤ individual",
        ("Pre-trained", "Weight Averaging", "Task Arithmetic", "WEMoE", "Individual"),
        lambda p, a, t, w, i: p < min(a, t) and max(a, t) < w <= i,
        "{0:.1f} < {1:.1f}, {2:.1f} < {3:.1f} ≤ {4:.1f}",
    )
    claim(
        "WEMoE is at least 5 points better than every static merge",
        ("WEMoE", "Best static"), lambda w, s: w >= s + 5, "{0:.1f} ≥ {1:.1f} + 5",
    )  # fmt: skip
    claim(
        "WEMoE recovers at least 95 % of the individual models' accuracy",
        ("WEMoE", "Individual"), lambda w, i: w >= 0.95 * i, "{0:.1f} ≥ 0.95 · {1:.1f}",
    )  # fmt: skip
    claim(
        "Routers that look at the input are not worse than constant ones",
        ("WEMoE (0-layer)", "WEMoE (1-layer)", "WEMoE"), lambda zero, one, two: zero <= min(one, two),
        "0, 1, 2 layers: {0:.1f}, {1:.1f}, {2:.1f}",
    )  # fmt: skip
    if "WEMoE" in methods:
        curve = methods["WEMoE"]["adaptation"]
        tenth = max(1, len(curve["entropy"]) // 10)
        entropy = [sum(part) / tenth for part in (curve["entropy"][:tenth], curve["entropy"][-tenth:])]
        accuracy = [curve["accuracy"][0], curve["accuracy"][-1]]
        claims.append({
            "claim": f"As the entropy falls, accuracy rises (on {CURVE_IMAGES} test images of each task)",
            "holds": entropy[1] < entropy[0] and accuracy[1] > accuracy[0],
            "detail": "entropy {:.2f} → {:.2f} nats, accuracy {:.1f} → {:.1f}".format(*entropy, *accuracy),
        })  # fmt: skip
    return claims


COMPARABLE = ("Pre-trained", "Individual", "Weight Averaging", "Task Arithmetic", "WEMoE (1-layer)", "WEMoE", "E-WEMoE")


def check_generalization(columns: dict[str, dict[str, list[str]]], measured: dict) -> list[dict]:
    """`columns`: condition -> "Seen" -> tasks; `measured`: condition -> method -> an entry for every seed."""
    claims = []
    for condition, tasks in columns.items():
        seen = {name: averages(entries, tasks["Seen"])[0] for name, entries in measured[condition].items()}
        if len(seen) > 1 and "WEMoE" in seen:
            best = max(value for name, value in seen.items() if name != "WEMoE")
            text = f"WEMoE is the best on the tasks that were {condition}"
            detail = f"{seen['WEMoE']:.1f} > {best:.1f}"
            claims.append({"claim": text, "holds": seen["WEMoE"] > best, "detail": detail})
    return claims


def check_collapse(columns: dict[str, dict[str, list[str]]], measured: dict) -> list[dict]:
    """Means over seeds: the worst task under noise, and what the cure gives there and costs on clean images."""
    methods = ("Task Arithmetic", "WEMoE", "WEMoE + diversity")
    if not all(measured[condition].keys() >= set(methods) for condition in columns):
        return []
    clean, noise = columns
    tasks = columns[clean]["Average"]

    def accuracy(condition: str, method: str, tasks: list[str]) -> float:
        return statistics.mean(averages(measured[condition][method], tasks))

    worst = min(tasks, key=lambda t: accuracy(noise, "WEMoE", [t]) - accuracy(noise, "Task Arithmetic", [t]))
    arithmetic, plain, cured = (accuracy(noise, method, [worst]) for method in methods)
    gain, cost = (accuracy(c, "WEMoE + diversity", tasks) - accuracy(c, "WEMoE", tasks) for c in (noise, clean))
    claims = (
        (f"Under {noise}, WEMoE makes the worst-hit task ({worst}) worse than task arithmetic leaves it",
         plain < arithmetic, f"{plain:.1f} < {arithmetic:.1f}"),
        ("With diverse predictions it does not, and the average is better", cured > arithmetic and gain > 0,
         f"{worst} {cured:.1f} > {arithmetic:.1f}, average {gain:+.1f} against WEMoE without"),
        ("That costs at most half a point on clean images", cost >= -0.5, f"{cost:+.1f}"),
    )  # fmt: skip
    return [{"claim": claim, "holds": holds, "detail": detail} for claim, holds, detail in claims]
