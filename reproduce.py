"""Reproduce the WEMoE paper's experiment: eight fine-tuned models, merged into one in several ways, on eight test sets.

    python reproduce.py            the eight tasks in miniature: everything embedded, no download, no GPU needed
    python reproduce.py ViT-B-32   the paper's experiment (also ViT-B-16, ViT-L-14): real CLIP weights and data sets
    python reproduce.py --methods all               every method of the family, not only the six that tell the story
    python reproduce.py --experiment list           the paper's other tables and figures, by name or by number:
    python reproduce.py ViT-B-32 --experiment table6 --experts DIR         beside the paper's own, cell by cell
    python reproduce.py ViT-B-32 --settings hub     adapted as the hub's rows were made, not as the paper's
    python reproduce.py bench      speed and memory, ours beside the literal per-sample loop and the dense model
    torchrun --nproc-per-node=4 reproduce.py ViT-L-14          the same on four GPUs
    python reproduce.py miniature-text    small tasks over sentences: text, as little; roberta-glue, flan-t5-glue: GLUE

A suite is data: tasks, zero-shot heads, test images, a pre-trained vision tower and its fine-tuned experts. A method
turns the experts into one model, or into one for each task: METHODS has them all. An experiment runs methods under
several conditions and says what it shows: EXPERIMENTS, in data/experiments.py. In every table but that of taskfree, the
head of an image is that of its own task; the merged tower does not know the task. Results go to `results/<suite>/`:
results.json, table.md and figures. What is finished is kept in `cache/` there, and a run started again goes on from it.
"""

import os
import signal
import sys

if __name__ == "__main__":  # loading the libraries takes seconds
    for each_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each_signal, lambda *_: (print("\nreproduce.py: interrupted", file=sys.stderr), os._exit(130)))

import argparse
import copy
import json
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import wemoe
from data import baselines, experiments, report
from data.bench import bench
from data.experiments import EXPERIMENTS, RANKS, STORY, Measured
from data.files import InputError, Parser, alone, check_numbers, check_output, write
from data.methods import LEARNED, STATIC, TRAINING_IMAGES, VALIDATION, Method, Result, entry_of, model_bytes, trainable
from data.miniature.suite import miniature_suite
from data.miniature.tasks import ALL_TASKS, TASKS
from data.paper.hub import ARCHITECTURES
from data.paper.hub import TASKS as PAPER_TASKS
from data.paper.published import PUBLISHED_TASKS
from data.paper.suite import paper_suite
from data.processes import choose_device, command, each, progress, rank, say, world
from data.suite import Suite, evaluate, fine_tune, mean, routing
from data.text.glue import GLUE, SENSELESS, flan_t5_glue_suite, roberta_glue_suite
from data.text.miniature import TASKS as TEXT_TASKS
from data.text.miniature import miniature_text_suite

SUITES = {  # what makes it, and its tasks
    "miniature": (miniature_suite, TASKS),
    **dict.fromkeys(ARCHITECTURES, (paper_suite, PAPER_TASKS)),
    "miniature-text": (miniature_text_suite, TEXT_TASKS),
    "roberta-glue": (roberta_glue_suite, GLUE),
    "flan-t5-glue": (flan_t5_glue_suite, GLUE),
}
MINIATURES, GLUE_SUITES = ("miniature", "miniature-text"), ("roberta-glue", "flan-t5-glue")
TEXTS = ("miniature-text", *GLUE_SUITES)

# ---- Methods: the experts -> one model for all tasks, or a dict with one for each ------------------------------------


def with_weights(suite: Suite, state: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def task_vectors(suite: Suite) -> Iterable[dict[str, Tensor]]:
    return (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())


def merge(suite: Suite, vectors: Iterable[dict[str, Tensor]] | None = None, scaling: float = 0.3) -> nn.Module:
    """θ_0 + λ Σ_t τ_t, of all task vectors unless others are given."""
    vectors = task_vectors(suite) if vectors is None else vectors
    return with_weights(suite, wemoe.task_arithmetic(suite.pretrained, vectors, scaling))


def static(suite: Suite, rule: Callable | None = None, scaling: float = 0.3) -> Result:
    """θ_0 + λ Σ_t τ_t, or λ times what the rule makes of all τ_t; with the accuracy at the λ that the suite tries."""
    vectors, curve = [rule(list(task_vectors(suite)))] if rule else None, []
    for lam in progress(suite.scalings, "Trying λ", unit="λ", delay=1):
        accuracy = evaluate(suite, merge(suite, vectors, lam))
        curve.append({"scaling": lam, "accuracy": accuracy, "average": mean(accuracy)})
    return merge(suite, vectors, scaling), {"curve": curve} if curve else {}


def samples(suite: Suite, count: int = 32) -> dict[str, Tensor]:
    return {task: suite.inputs(suite.load(task, "train", count)[0]) for task in suite.experts}


def fisher_merging(suite: Suite) -> Result:
    heads = {task: suite.logits(task) for task in suite.experts}
    return with_weights(suite, baselines.fisher_merging(suite.experts, samples(suite), heads))


def regmean(suite: Suite, rule: Callable = baselines.regmean) -> Result:
    return with_weights(suite, rule(suite.experts, samples(suite)))


def twin_merging(suite: Suite) -> Result:
    inputs = samples(suite)
    model = baselines.twin_merging(suite.pretrained, suite.experts, inputs, features=suite.features).to(suite.device)
    return model, {"routing": routing(suite, model)["routing"]}


def under(mask: dict[str, Tensor], tau: dict[str, Tensor]) -> dict[str, Tensor]:
    return {entry: mask[entry] * value for entry, value in tau.items()}


def masked(suite: Suite, unify: Callable) -> Result:
    """For each task the entries of one vector that its mask leaves, times a number where the method has one."""
    unified, masks, *numbers = unify(list(task_vectors(suite)))
    numbers = numbers[0] if numbers else [1.0] * len(masks)
    models = {t: merge(suite, [under(mask, unified)], n) for t, mask, n in zip(suite.experts, masks, numbers)}
    # What has to be kept: the pre-trained model, one vector, and for every task one bit a parameter and one number.
    bits = sum(mask.numel() for mask in masks[0].values())
    size = 2 * model_bytes(suite.pretrained) + len(models) * (bits // 8 + 4)
    return models, {"bytes": size, "total_parameters": 2 * bits + len(models)}


def learn(suite: Suite, adapt: Callable, model: baselines.AdaMerging, **options) -> Result:
    """What is merged when λ or masks have been adapted; `options` are those of adapt."""
    curve = adapt(model.to(suite.device), **options)
    with torch.no_grad():
        return with_weights(suite, model.merged()), {"adaptation": curve, "learned": trainable(model)}


def ada_merging(suite: Suite, adapt: Callable, layer_wise: bool = True, edit: Callable = list) -> Result:
    """`edit` makes of the task vectors those that are merged."""
    settings, vectors = suite.adaptation, edit(task_vectors(suite))
    clamp = settings.settings == "paper"
    model = baselines.AdaMerging(suite.pretrained, vectors, layer_wise, settings.init_lambda, clamp)
    return learn(suite, adapt, model, steps=settings.lambda_steps, lr=settings.lambda_lr)


def concrete(suite: Suite, adapt: Callable, then_lambda: bool = False) -> Result:
    """Learn a mask; then, if so wanted, λ for the masked task vectors.

    The paper of the method learns the mask for λ after one step of descent; the step is left out here.
    """
    settings, model = suite.adaptation, baselines.ConcreteMask(suite.pretrained, task_vectors(suite))
    merged, record = learn(suite, adapt, model, steps=settings.mask_steps, lr=settings.mask_lr, part="mask")
    if not then_lambda:
        return merged, record
    with torch.no_grad():
        masks = {entry: mask.cpu() for entry, mask in model.masks().items()}
    merged, then = ada_merging(suite, adapt, edit=lambda vectors: [under(masks, tau) for tau in vectors])
    return merged, then | {"learned": record["learned"] + then["learned"]}


def ada_rank(suite: Suite, adapt: Callable) -> Result:
    settings, vectors = suite.adaptation, task_vectors(suite)
    model = baselines.AdaRank(suite.pretrained, vectors, init_lambda=settings.init_lambda)
    return learn(suite, adapt, model, steps=settings.mask_steps, lr=settings.lambda_lr)


def mixture(
    suite: Suite, adapt: Callable, objective: Callable = wemoe.mean_entropy, shared=False, elsewhere=None, **options
) -> Result:
    """WEMoE, adapted to the unlabelled test images; `options` are those of wemoe.upscale.

    `elsewhere` makes one vector of all task vectors, for what is not routed; None: task arithmetic.
    """
    settings = suite.adaptation
    model = wemoe.upscale(suite.pretrained, suite.experts, init_lambda=settings.init_lambda, **options)
    if elsewhere:
        model.load_state_dict(not_routed(suite, model, elsewhere), strict=False)
    model = baselines.share_router(model) if shared else model
    model = baselines.average_over_batch(model) if settings.settings == "hub" else model
    curve = adapt(model.to(suite.device), steps=settings.steps, lr=settings.lr, objective=objective)
    return model, {"adaptation": curve, **routing(suite, model)}


def not_routed(suite: Suite, model: nn.Module, rule: Callable | None) -> dict[str, Tensor]:
    """A static merge's weights for what is not routed in the upscaled model, where names are the same."""
    merged, _ = static(suite, rule, 1.0 if rule else 0.3)
    return {name: p for name, p in merged.state_dict().items() if name in model.state_dict()}


def deepest_routed(suite: Suite, adapt: Callable, share: float) -> Result:
    return mixture(suite, adapt, modules=experiments.deepest_mlps(suite.pretrained, share))


def unloaded(suite: Suite, adapt: Callable) -> Result:
    model, record = mixture(suite, adapt, router_depth=0)
    return wemoe.unload(model), record


def oracle_routing(suite: Suite, elsewhere: Callable | None = None) -> Result:
    """For each task its own expert's MLPs, and all else merged: what routers could reach that know the task."""
    merged = not_routed(suite, wemoe.upscale(suite.pretrained, suite.experts, router_depth=0), elsewhere)
    return {task: with_weights(suite, expert.state_dict() | merged) for task, expert in suite.experts.items()}


def mass(suite: Suite) -> Result:
    """Routed at the MLP of the block before the last but one, as in the authors' program: the 10th of 12, from 0."""
    if not hasattr(suite.pretrained, "transformer"):
        raise InputError("MASS routes in open_clip's own vision transformers: leave it out of --methods")
    layer = f"transformer.resblocks.{len(suite.pretrained.transformer.resblocks) - 2}.mlp.c_fc"
    return baselines.Mass(suite.pretrained, suite.experts, layer)


def multi_task_learning(suite: Suite) -> Result:
    """One model, fine-tuned on all tasks: as many steps as an expert, with half its batch size of every task."""
    half = replace(suite, training=replace(suite.training, batch_size=max(1, suite.training.batch_size // 2)))
    return fine_tune(half, list(suite.experts), "Traditional MTL")


GIVEN = "given training images, or the task of every image"
SINCE, ROUTED, REFERENCE = "static, newer than WEMoE", "routed without training", "for reference"
PLUS_PLUS = partial(ada_merging, edit=baselines.trim_and_elect)
E_WEMOE = partial(mixture, layer=partial(baselines.SparseLinear, keep=0.1), shared=True)


def low_rank(rank: int) -> Method:
    return Method(LEARNED, partial(mixture, layer=partial(baselines.LowRankLinear, rank=rank)), 70)


METHODS = {
    "Weight Averaging": Method(STATIC, lambda s: merge(s, scaling=1 / len(s.experts)), 3, "2203.05482"),
    "Task Arithmetic": Method(STATIC, static, 25, "2212.04089", VALIDATION),
    "TIES-Merging": Method(STATIC, partial(static, rule=baselines.ties), 25, "2306.01708", VALIDATION),
    "Consensus Merging": Method(SINCE, partial(static, rule=baselines.consensus), 4, "2405.07813"),
    "TSV-M": Method(SINCE, partial(static, rule=baselines.tsv_merge, scaling=1.0), 6, "2412.00081"),
    "Iso-C": Method(SINCE, partial(static, rule=baselines.iso_c, scaling=1.0), 4, "2502.04959"),
    "Iso-CTS": Method(SINCE, partial(static, rule=baselines.iso_cts, scaling=1.0), 6, "2502.04959"),
    # Adam's steps as long as they were in fine-tuning, and so as in the paper, which takes 1e-5 for both.
    "WUDI": Method(SINCE, lambda s: static(s, partial(baselines.wudi, lr=s.training.lr), 1.0), 21, "2503.08099"),
    "Fisher Merging": Method(GIVEN, fisher_merging, 20, "2111.09832", TRAINING_IMAGES),
    "RegMean": Method(GIVEN, regmean, 5, "2212.09849", TRAINING_IMAGES),
    "Twin-Merging": Method(GIVEN, twin_merging, 30, "2406.15479", TRAINING_IMAGES),
    "RegMean++": Method(GIVEN, partial(regmean, rule=baselines.regmean_plus_plus), 8, "2508.03121", TRAINING_IMAGES),
    "EMR-Merging": Method(GIVEN, partial(masked, unify=baselines.emr), 5, "2405.17461"),
    "TALL Masks": Method(GIVEN, partial(masked, unify=baselines.tall_masks), 5, "2405.07813"),
    "AdaMerging (task-wise)": Method(LEARNED, partial(ada_merging, layer_wise=False), 45, "2310.02575"),
    "AdaMerging (layer-wise)": Method(LEARNED, ada_merging, 45, "2310.02575"),
    "AdaMerging++ (task-wise)": Method(LEARNED, partial(PLUS_PLUS, layer_wise=False), 45, "2310.02575"),
    "AdaMerging++ (layer-wise)": Method(LEARNED, PLUS_PLUS, 45, "2310.02575"),
    "Concrete Task Arithmetic": Method(LEARNED, concrete, 40, "2312.06173"),
    "Concrete AdaMerging": Method(LEARNED, partial(concrete, then_lambda=True), 85, "2312.06173"),
    "AdaRank": Method(LEARNED, ada_rank, 110, "2503.22178"),
    "WEMoE (0-layer)": Method(LEARNED, partial(mixture, router_depth=0), 50, "2402.00433"),
    "WEMoE (1-layer)": Method(LEARNED, partial(mixture, router_depth=1), 110, "2402.00433"),
    "WEMoE": Method(LEARNED, mixture, 110, "2402.00433"),
    "WEMoE (rank 16)": low_rank(16),
    "E-WEMoE": Method(LEARNED, E_WEMOE, 140, "2410.21804"),
    "SMILE": Method(ROUTED, lambda s: baselines.Smile(s.pretrained, s.experts), 11, "2408.10174"),
    "MASS": Method(ROUTED, mass, 30, "2504.05342"),
    "Pre-trained": Method(REFERENCE, lambda s: s.pretrained, 3),
    "Simple Ensemble": Method(REFERENCE, lambda s: baselines.Ensemble(s.experts.values()), 25),
    "Traditional MTL": Method(REFERENCE, multi_task_learning, 50, given=TRAINING_IMAGES),
    "Individual": Method(REFERENCE, lambda s: s.experts, 4),
}
MAIN = list(METHODS)
METHODS |= {  # for other experiments than the main one
    **{name: low_rank(rank) for rank, name in RANKS.items()},
    **{name: Method(LEARNED, partial(deepest_routed, share=share), 90) for share, name in experiments.SHARES.items()},
    "WEMoE + diversity": Method(LEARNED, partial(mixture, objective=wemoe.negative_information), 110),
    "TIES-Merging (mean)": Method(STATIC, partial(static, rule=partial(baselines.ties, merge="mean"), scaling=1.0), 25),
    experiments.SEPARATELY: Method(LEARNED, partial(mixture, router_depth=1, modules=r"\.(attn|mlp)$"), 300),
    experiments.BLOCKS: Method(LEARNED, partial(mixture, router_depth=1, modules=baselines.BLOCKS), 300),
    experiments.UNLOADED: Method(LEARNED, unloaded, 50),
    "WEMoE (TSV-M elsewhere)": Method(LEARNED, partial(mixture, elsewhere=baselines.tsv_merge), 120),
    "Oracle routing": Method(GIVEN, oracle_routing, 6),
    "Oracle routing (TSV-M elsewhere)": Method(GIVEN, partial(oracle_routing, elsewhere=baselines.tsv_merge), 12),
    experiments.LANDSCAPE: Method(STATIC, experiments.landscape, 60),
}


# ---- Run: every method under each of the experiment's conditions -----------------------------------------------------


def run(arguments: argparse.Namespace) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    output, experiment = arguments.folder, EXPERIMENTS[arguments.experiment]
    measured = measure(arguments, experiment) if experiment.conditions else None
    if rank() > 0:  # the first process of a distributed run reports for all
        return True
    shown = experiment.show(measured)
    text = shown.text or report.tables(measured.conditions, measured.entries, experiment.details)
    text += f"\n{measured.suite.note}\n" if measured and measured.suite.note else ""
    if measured and (measured.suite.source or arguments.settings == "hub"):
        text += f"\nMethods that adapt did so with the settings of the {SETTINGS[arguments.settings]}.\n"
    results = report.results_of(arguments, measured, shown.claims)
    write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    write(output / "table.md", lambda path: path.write_text(text))
    for name, figure in shown.figures.items():
        write(output / f"{name}.png", partial(report.save, figure))
    say("\n" + text)
    if measured and not measured.suite.published and arguments.suite not in MINIATURES:
        say("Other tasks, fewer images or another model than published: no comparison with published figures.")
    for entry in shown.claims:
        say(f"{'✓' if entry['holds'] else '✗'} {entry['claim']}: {entry['detail']}")
    say(f"\nResults and figures are in {output}/.")
    return all(entry["holds"] for entry in shown.claims)


def measure(arguments: argparse.Namespace, experiment: experiments.Experiment) -> Measured:
    """Run every method under each of its conditions, or read what is kept, for every seed."""
    if arguments.on_cores:
        torch.set_num_threads(1)  # always, so that the number of workers does not change results
        seconds = [METHODS[name].seconds for name in arguments.methods]
        minutes = experiment.minutes * arguments.seeds / experiment.seeds
        if arguments.experiment == "main":  # experts first, then the methods side by side
            minutes = (60 + max(max(seconds), sum(seconds) / arguments.workers)) * arguments.seeds / 60
        say(
            f"{len(seconds)} methods on {len(arguments.tasks)} tasks, {arguments.seeds} seed(s): "
            f"from nothing some {minutes:.0f} minutes on this kind of machine (2 cores)."
        )
    entries: dict[str, dict[str, list[dict]]] = {}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        suite = SUITES[arguments.suite][0](argparse.Namespace(**{**vars(arguments), "seed": seed}))
        if arguments.experiment != "main":  # only there all suites say which λ to try
            suite.scalings = experiment.scalings
        conditions, key = experiment.conditions(suite, arguments.methods), suite.key
        pairs = [(condition, name) for condition in conditions for name in condition.methods]
        pairs.sort(key=lambda pair: -METHODS[pair[1]].seconds)  # the long ones first
        calls = [(name, key, arguments.cached, {**c.change, **c.settings.get(name, {})}) for c, name in pairs]
        for (condition, name), entry in zip(pairs, each(suite, run_method, calls, arguments.workers)):
            entries.setdefault(condition.name, {}).setdefault(name, []).append(entry)
    entries = {c.name: {name: entries[c.name][name] for name in c.methods} for c in conditions}
    comparable = [replace(c, published=experiments.comparable(suite, c.published, entries[c.name])) for c in conditions]
    return Measured(suite, comparable, entries)


def run_method(suite: Suite, name: str, key: str, cache: Path, change: dict) -> dict:
    return entry_of(suite, name, METHODS[name], key, cache, change)  # workers are handed names, not lambdas


# ---- The command line ------------------------------------------------------------------------------------------------

PRECISIONS = ("float32", "bfloat16")
SETTINGS = {"paper": "paper", "hub": "hub: λ is the mean over a batch of one task's images, in evaluation, too"}


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The options, and what follows from them. Raises InputError."""
    parser = Parser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("suite", nargs="?", default="miniature", choices=SUITES, help="default: %(default)s")
    add("--experiment", default="main", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}, or list (default: main)")
    add("--tasks", nargs="+", metavar="TASK", help="only these, where the experiment allows it (default: all eight)")
    add("--methods", nargs="+", metavar="NAME", help=f"all, or {', '.join(MAIN)} (in miniature, {', '.join(STORY)})")
    add("--steps", type=int, help="adaptation steps of routers (default: 160 in the miniature, 1000 in the paper)")
    add("--seed", type=int, default=0, help="of fine-tuning and adaptation (default: %(default)s)")
    add("--seeds", type=int, help="how many, from --seed on: mean ± deviation (default: 1; 5 in collapse)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add("--settings", choices=SETTINGS, default="paper", help="of adaptation: the paper's (default) or the hub rows'")
    add("--precision", choices=PRECISIONS, help="of evaluation (default: bfloat16 for CLIP on a GPU, else float32)")
    add("--adapt-precision", choices=PRECISIONS, help="of adaptation (default: float32)")
    add("--workers", type=int, help="processes with one thread each (default: 2 in the miniature on a CPU, else 1)")
    add("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    add = parser.add_argument_group("for the paper's suites").add_argument
    add("--hub", type=Path, metavar="DIR", help="read a mirror of the model hub instead of downloading")
    add("--experts", type=Path, metavar="DIR", help="the task-arithmetic authors' checkpoints instead of the hub's")
    add("--finetune", action="store_true", help="make the experts from the train splits instead of downloading them")
    add("--arch", help="with --finetune: another architecture of open_clip's")
    add("--pretrained", default="openai", help="with --finetune: which of its weights (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N images of every test set, for a quick look")
    add("--cache", type=Path, default=Path.home() / ".cache" / "wemoe", help="decoded images (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    if parsed.experiment == "list":
        return parsed
    numbers = {number: name for name, experiment in EXPERIMENTS.items() for number in experiment.paper}
    number = re.sub(r"[ .]", "", parsed.experiment.lower()).replace("figure", "fig")  # "Figure 3", "Appendix B.3"
    (parsed.experiment,) = choose("experiment", [numbers.get(number, parsed.experiment)], list(EXPERIMENTS))
    check_numbers(parsed, {"steps": 1, "seed": 0, "seeds": 1, "limit": 1, "workers": 1})
    check_output(parsed.output)
    parsed.device = choose_device(parsed.device)
    parsed.on_cores = parsed.suite in MINIATURES and parsed.device == "cpu" and world() == 1
    check_together(parsed)
    choose_tasks_and_methods(parsed)
    experiment = EXPERIMENTS[parsed.experiment]
    parsed.steps = parsed.steps or (experiment.steps if parsed.suite in MINIATURES else None)
    parsed.seeds = parsed.seeds or experiment.seeds
    parsed.workers = parsed.workers or (min(2, os.cpu_count() or 1) if parsed.on_cores else 1)
    parsed.name = parsed.suite if not parsed.arch else f"{parsed.arch}-{parsed.pretrained}"
    variants = {"experts": parsed.experts, "finetune": parsed.finetune, f"first{parsed.limit}": parsed.limit}
    variants["hub-settings"] = parsed.settings == "hub"
    parsed.folder = parsed.output / "-".join([parsed.name, *(name for name, on in variants.items() if on)])
    parsed.cached = parsed.folder / "cache"
    parsed.folder /= "" if parsed.experiment == "main" else parsed.experiment
    return parsed


def check_together(parsed: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together."""
    text, hub, own_tasks = parsed.suite in TEXTS, parsed.settings == "hub", EXPERIMENTS[parsed.experiment].tasks
    images_only = text and parsed.experiment not in ("main", "depths", "ablation")
    real = [name for name in SUITES if name not in MINIATURES]
    suites = {"hub": real, "limit": real, **dict.fromkeys(("experts", "finetune", "arch"), ARCHITECTURES)}
    odd = next((option for option in suites if getattr(parsed, option) and parsed.suite not in suites[option]), None)
    another = (parsed.arch or parsed.pretrained != "openai") and not parsed.finetune
    workers = (parsed.workers or 1) > 1 and not parsed.on_cores
    for wrong, sentence in (
        (images_only, f"{parsed.suite} has main, depths and ablation: {parsed.experiment} is about images"),
        (parsed.tasks and own_tasks, f"--tasks is not for the experiment {parsed.experiment}, which has its own"),
        (odd, f"--{odd} is for {', '.join(suites.get(odd, ()))}"),
        (another, "--arch and --pretrained need --finetune: no experts are published for them"),
        (parsed.finetune and parsed.experts, "--finetune makes the experts, --experts reads them: choose one"),
        (workers, "--workers is for the miniature on a CPU; on several GPUs use torchrun"),
        (hub and text, "--settings hub is for images: of texts, the hub has no rows of methods that adapt"),
        (hub and world() > 1, "--settings hub averages routing weights over whole batches: it runs in one process"),
    ):
        if wrong:
            raise InputError(sentence)


def choose_tasks_and_methods(parsed: argparse.Namespace) -> None:
    """In the place of names, those of the experiment that are wanted; and what has to be read for them."""
    experiment = EXPERIMENTS[parsed.experiment]
    known = list(ALL_TASKS if experiment.more_tasks and parsed.suite == "miniature" else SUITES[parsed.suite][1])
    usual = PUBLISHED_TASKS if parsed.suite in ARCHITECTURES else known
    usual = experiments.in_suite(known, experiment.tasks) if experiment.tasks else usual
    parsed.tasks = choose("task", parsed.tasks or usual, known)
    parsed.whole = bool(experiment.tasks) or parsed.tasks == PUBLISHED_TASKS  # as what is published
    senseless = SENSELESS if parsed.suite in GLUE_SUITES else ()
    senseless += ("MASS",) if parsed.suite in TEXTS else ()  # which routes by images
    methods = [name for name in (MAIN if experiment.methods is None else experiment.methods) if name not in senseless]
    untrained = [name for name in methods if METHODS[name].given != TRAINING_IMAGES]
    usual = (experiment.usual or methods) if parsed.suite in MINIATURES else untrained
    everything = "all" in map(str.lower, parsed.methods or ())
    kind = "method" if parsed.experiment == "main" else f"method of the experiment {parsed.experiment}"
    parsed.methods = choose(kind, methods if everything else parsed.methods or usual, methods)
    trains = any(METHODS[name].given == TRAINING_IMAGES for name in parsed.methods)
    parsed.splits = experiment.splits + (("train",) if trains else ())


def choose(kind: str, wanted: list[str], known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter."""
    wanted, exact = {name.lower(): name for name in wanted}, {name.lower(): name for name in known}
    if unknown := [name for lower, name in wanted.items() if lower not in exact]:
        raise InputError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known)) or 'nothing'}")
    return [name for lower, name in exact.items() if lower in wanted]


@command
def main(arguments: list[str]) -> bool:
    if arguments[:1] == ["bench"]:
        return bench(arguments[1:])
    parsed = parse_arguments(arguments)
    if parsed.experiment == "list":
        say(experiments.listed())
        return True
    with alone(parsed.cached.parent) if rank() == 0 else nullcontext():  # the first process has it for all
        return run(parsed)


if __name__ == "__main__":
    sys.exit(main())
