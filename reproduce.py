"""Reproduce the WEMoE paper's experiment: eight fine-tuned models, merged into one in several ways, on eight test sets.

    python reproduce.py            the eight tasks in miniature: everything embedded, no download, no GPU needed
    python reproduce.py ViT-B-32   the paper's experiment (also ViT-B-16, ViT-L-14): real CLIP weights and data sets
    python reproduce.py --methods all               every method of the family, not only the six that tell the story
    python reproduce.py --experiment list           the paper's other tables and figures, by name or by number
    python reproduce.py bench      speed and memory, ours beside the literal per-sample loop and the dense model
    torchrun --nproc-per-node=4 reproduce.py ViT-L-14          the same on four GPUs
    python reproduce.py miniature-text    small tasks over sentences: text, as little; roberta-glue, flan-t5-glue: GLUE

A suite (data/suite.py) is data: tasks, zero-shot heads, test images, a pre-trained tower and its experts. A method
(data/methods.py) makes of the experts one model, or one for each task. An experiment (data/experiments.py) runs methods
under several conditions and says what it shows. An image is given the head of its own task, which the merged tower does
not know. Results go to `results/<suite>/`: results.json, table.md, figures. What is finished is kept in `cache/` there.
"""

import argparse
import io
import json
import os
import platform
import re
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import fill

import open_clip
import torch
from accelerate import PartialState

from data import experiments, figures
from data.bench import bench
from data.experiments import EXPERIMENTS, Experiment, Measured, Shown
from data.methods import METHODS, TRAINING_IMAGES
from data.miniature.tasks import ALL_TASKS, TASKS, miniature_suite
from data.paper.hub import ARCHITECTURES, paper_suite
from data.paper.hub import TASKS as PAPER_TASKS
from data.paper.published import PUBLISHED_TASKS
from data.run import each, kept, measure, say
from data.suite import Suite
from data.text import miniature as text
from data.text.glue import GLUE, SENSELESS, flan_t5_glue_suite, roberta_glue_suite

SUITES = {  # what makes it, and its tasks
    "miniature": (miniature_suite, TASKS),
    **dict.fromkeys(ARCHITECTURES, (paper_suite, PAPER_TASKS)),
    "miniature-text": (text.miniature_text_suite, text.TASKS),
    "roberta-glue": (roberta_glue_suite, GLUE),
    "flan-t5-glue": (flan_t5_glue_suite, GLUE),
}
MINIATURES, GLUE_SUITES = ("miniature", "miniature-text"), ("roberta-glue", "flan-t5-glue")
MAIN = [method.name for method in METHODS.values() if method.main]


def run(parsed: argparse.Namespace, experiment: Experiment) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    parsed.folder.mkdir(parents=True, exist_ok=True)
    measured = measure_all(parsed, experiment) if experiment.conditions else None
    if not PartialState().is_main_process:  # the first process of a distributed run reports for all
        return True
    shown = experiment.show(measured)
    report(parsed, measured, shown)
    for entry in shown.claims:
        say(fill(f"{'✓' if entry['holds'] else '✗'} {entry['claim']}: {entry['detail']}", 100))
    say(f"\nResults and figures are in {parsed.folder}/.")
    return all(entry["holds"] for entry in shown.claims)


def measure_all(parsed: argparse.Namespace, experiment: Experiment) -> Measured:
    """Run every method under each of its conditions, or read what is kept, for every seed."""
    if parsed.on_cores:
        torch.set_num_threads(1)  # always, so that the number of workers does not change results
        say(f"With its usual methods, {experiment.name} takes some {experiment.minutes} minutes on 2 cores.")
    entries = []
    for seed in range(parsed.seed, parsed.seed + parsed.seeds):
        suite = make_suite(parsed, seed)
        if experiment.name != "main":  # only there all suites say which λ to try
            suite = replace(suite, scalings=experiment.scalings)
        conditions = experiment.conditions(suite, parsed.methods)
        calls = [(c.name, name, {**c.change, **c.settings.get(name, {})}) for c in conditions for name in c.methods]
        files = [kept(suite, METHODS[name], change, parsed.cached) for _, name, change in calls]
        if there := {name: None for file, (_, name, _) in zip(files, calls) if file.exists()}:
            say(fill(f"There from before (seed {seed}): {', '.join(there)}", 100))
        todo = {file: (suite, METHODS[name], change, file) for file, (_, name, change) in zip(files, calls)}
        order = sorted(todo.values(), key=lambda call: -call[1].seconds)  # the long ones first
        each(measure, [call for call in order if not call[3].exists()], parsed.workers, "Methods")
        found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        entries += [{**e, "condition": condition, "seed": seed} for e, (condition, _, _) in zip(found, calls)]
    rows = [experiments.comparable(suite, condition.published, entries) for condition in conditions]
    return Measured(suite, [replace(c, published=published) for c, published in zip(conditions, rows)], entries)


def make_suite(parsed: argparse.Namespace, seed: int) -> Suite:
    make, _ = SUITES[parsed.suite]
    options = {name: getattr(parsed, name) for name in ("device", "precision", "steps", "workers")}
    options |= {"seed": seed, "cache": parsed.cached}
    if parsed.suite not in MINIATURES:
        options |= {"hub": parsed.hub, "limit": parsed.limit}
    if parsed.suite not in ARCHITECTURES:
        return make(parsed.tasks, **options)
    more = {name: getattr(parsed, name) for name in ("experts", "finetune", "splits", "whole")}
    return make(parsed.suite, parsed.tasks, **options, **more, images=parsed.cache or parsed.output / "images")


def report(parsed: argparse.Namespace, measured: Measured | None, shown: Shown) -> None:
    """Write results.json, table.md and figures, and print what a console has room for."""
    say("\n" + figures.console(shown.tables))
    results = {name: getattr(parsed, name) for name in ("suite", "experiment", "seed", "seeds", "device", "limit")}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "open_clip": open_clip.__version__}
    results |= {"versions": versions, "claims": shown.claims}
    table = figures.markdown(shown.tables)
    if measured:
        suite = measured.suite
        table += f"\n{suite.note}\n" if suite.note else ""
        say(fill(suite.note, 100))
        results |= {"tasks": suite.tasks, "precision": suite.precision, "settings": suite.settings}
        results |= {"adaptation": asdict(suite.adaptation), "conditions": [asdict(c) for c in measured.conditions]}
        results |= {"methods": measured.entries}
    (parsed.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (parsed.folder / "table.md").write_text(table, encoding="utf-8")
    for name, figure in shown.figures.items():
        figure.savefig(parsed.folder / f"{name}.png", dpi=150)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, and what follows from them. Raises ValueError; argparse ends the program."""
    parser = argparse.ArgumentParser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("suite", nargs="?", default="miniature", help=f"{', '.join(SUITES)}, or bench (default: %(default)s)")
    add("--experiment", default="main", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or list (default: main)")
    add("--tasks", nargs="+", metavar="TASK", help="only these, where the experiment allows it (default: all eight)")
    add("--methods", nargs="+", metavar="NAME", help=f"all, or {', '.join(MAIN)} (in miniature, the six of the story)")
    add("--steps", type=positive, help="adaptation steps of routers (default: 80 in the miniature, 1000 in the paper)")
    add("--seed", type=int, default=0, help="of fine-tuning and adaptation (default: %(default)s)")
    add("--seeds", type=positive, help="how many, from --seed on: mean ± deviation (default: 1; 5 in collapse)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--precision", choices=("float32", "bfloat16"), help="of evaluation (default: bfloat16 for CLIP on a GPU)")
    add("--workers", type=positive, help="processes with one thread each (default: 2 in the miniature on a CPU)")
    add("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    group = parser.add_argument_group("for the suites of real models")
    group.add_argument("--hub", type=Path, metavar="DIR", help="read a mirror of the model hub instead of downloading")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N test inputs of each task")
    group.add_argument("--cache", type=Path, metavar="DIR", help="decoded images (default: images/ in --output)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--experts", type=Path, metavar="DIR", help="the task-arithmetic authors' checkpoints instead of the hub's")
    add("--finetune", action="store_true", help="make the experts from the train splits instead of downloading them")
    parsed = parser.parse_args(arguments)
    (parsed.suite,) = choose("suite", [parsed.suite], list(SUITES))
    numbers = {number: name for name, experiment in EXPERIMENTS.items() for number in experiment.paper}
    number = re.sub(r"[ .]", "", parsed.experiment.lower()).replace("figure", "fig")  # "Figure 3", "Appendix B.3"
    (parsed.experiment,) = choose("experiment", [numbers.get(number, parsed.experiment)], [*EXPERIMENTS, "list"])
    if parsed.experiment != "list":
        complete(parsed, EXPERIMENTS[parsed.experiment])
    return parsed


def complete(parsed: argparse.Namespace, experiment: Experiment) -> None:
    """Choose device, tasks and methods, say where results go, and refuse options that do not go together."""
    real, clip = parsed.suite not in MINIATURES, parsed.suite in ARCHITECTURES
    of_texts = not clip and parsed.suite != "miniature"
    parsed.device = choose_device(parsed.device)
    parsed.on_cores = parsed.device == "cpu" and PartialState().num_processes == 1 and not real
    for wrong, sentence in (
        (of_texts and experiment.name not in ("main", "depths", "ablation"), f"{experiment.name} is about images"),
        (parsed.tasks and experiment.tasks, f"--tasks: the experiment {experiment.name} has its own"),
        ((parsed.hub or parsed.limit) and not real, "--hub and --limit are for suites of real models"),
        ((parsed.experts or parsed.finetune or parsed.cache) and not clip, "--experts, --finetune, --cache: for CLIP"),
        ((parsed.workers or 1) > 1 and not parsed.on_cores, "--workers: in miniature, on a CPU; on GPUs, torchrun"),
    ):
        if wrong:
            raise ValueError(sentence)
    known = list(ALL_TASKS if experiment.more_tasks and not of_texts and not real else SUITES[parsed.suite][1])
    usual = experiments.in_suite(known, experiment.tasks) if experiment.tasks else PUBLISHED_TASKS if clip else known
    parsed.tasks = choose("task", parsed.tasks or usual, known)
    parsed.whole = bool(experiment.tasks) or parsed.tasks == list(PUBLISHED_TASKS)  # as what is published
    senseless = SENSELESS if parsed.suite in GLUE_SUITES else ()
    settings = ("", "hub") if clip and not parsed.experts and not parsed.finetune else ("",)
    methods = [name for name in experiment.methods or MAIN if METHODS[name].only in settings and name not in senseless]
    needy = [name for name in methods if TRAINING_IMAGES in METHODS[name].needs]
    usual = [name for name in methods if name not in needy] if real else experiment.usual or methods
    parsed.methods = choose("method", methods if parsed.methods == ["all"] else parsed.methods or usual, methods)
    parsed.splits = (*experiment.splits, *(["train"] if set(needy) & set(parsed.methods) else []))
    parsed.steps = parsed.steps or (None if real else experiment.steps)
    parsed.seeds = parsed.seeds or experiment.seeds
    parsed.workers = parsed.workers or (min(2, os.cpu_count() or 1) if parsed.on_cores else 1)
    variants = {"experts": parsed.experts, "finetune": parsed.finetune, f"first{parsed.limit}": parsed.limit}
    folder = parsed.output / "-".join([parsed.suite, *(name for name, on in variants.items() if on)])
    parsed.cached, parsed.folder = folder / "cache", folder / ("" if experiment.name == "main" else experiment.name)


def choose(kind: str, wanted: list[str], known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter. Raises ValueError for any other."""
    wanted, exact = {name.lower(): name for name in wanted}, {name.lower(): name for name in known}
    if unknown := [name for lower, name in wanted.items() if lower not in exact]:
        raise ValueError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known)) or 'nothing'}")
    return [name for lower, name in exact.items() if lower in wanted]


def choose_device(name: str | None) -> str:
    """The device to run on; in a distributed run, each process has a GPU of its own. Raises ValueError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    ranks = PartialState(cpu=not name.startswith("cuda"))
    device = str(ranks.device) if ranks.num_processes > 1 else name
    try:
        torch.zeros(1, device=device)
    except Exception as error:  # of torch, or of a module that a device needs
        raise ValueError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); cpu always is") from error
    return device


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # on a terminal that has no ✓
    try:
        if arguments[:1] == ["bench"]:
            return 0 if bench(arguments[1:]) else 1
        parsed = parse(arguments)
        if parsed.experiment == "list":
            say("\n".join(fill(line, 100, subsequent_indent="  ") for line in experiments.listed().splitlines()))
            return 0
        return 0 if run(parsed, EXPERIMENTS[parsed.experiment]) else 1
    except KeyboardInterrupt:
        print("\nreproduce.py: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError, MemoryError, torch.OutOfMemoryError, BrokenProcessPool) as error:
        print("reproduce.py: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does, workers too
    sys.exit(main())
