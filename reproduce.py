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
turns the experts into one model, or into one for each task. An experiment runs methods under several conditions and
says what it shows. In every table, the head of an image is that of its own task; the merged tower does not know the
task. Results go to `results/<suite>/`: results.json, table.md and figures. What is finished is kept in `cache/` there,
and a run started again goes on from it.
"""

import os
import signal
import sys

if __name__ == "__main__":  # loading the libraries takes seconds
    for each_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each_signal, lambda *_: (print("\nreproduce.py: interrupted", file=sys.stderr), os._exit(130)))

import argparse
import copy
import inspect
import io
import json
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn

import wemoe
from data import baselines, experiments, report
from data.bench import bench
from data.dependencies import code_of
from data.experiments import (
    ADAPTATION,
    BLOCKS,
    DEPTHS,
    LANDSCAPE,
    MLP_ONLY,
    RANKS,
    SEPARATELY,
    SHARES,
    STATIC,
    TRAINING_IMAGES,
    UNLOADED,
    VALIDATION,
    Condition,
    Measured,
    Shown,
    deepest_mlps,
    landscape,
)
from data.files import InputError, Parser, alone, check_numbers, check_output, fingerprint, one_line, read_kept, write
from data.miniature.corruptions import CORRUPTIONS
from data.miniature.suite import COUNTERPARTS, miniature_suite
from data.miniature.tasks import ALL_TASKS, TASKS
from data.paper.hub import ARCHITECTURES
from data.paper.hub import TASKS as PAPER_TASKS
from data.paper.published import PUBLISHED_TASKS, ROBUSTNESS_TASKS, routed_modules, router_depths
from data.paper.suite import paper_suite
from data.processes import barrier, choose_device, each, progress, rank, say, world
from data.suite import Suite, adapt, evaluate, evaluate_task_free, fine_tune, mean, routing
from data.text.glue import GLUE, SENSELESS, flan_t5_glue_suite, roberta_glue_suite
from data.text.miniature import TASKS as TEXT_TASKS
from data.text.miniature import miniature_text_suite

SAMPLES = 32  # of each task's training images, for the methods that look at some
SUITES = {"miniature": (miniature_suite, list(TASKS))}
SUITES.update({name: (paper_suite, list(PAPER_TASKS)) for name in ARCHITECTURES})
SUITES["miniature-text"] = miniature_text_suite, list(TEXT_TASKS)
SUITES |= {"roberta-glue": (roberta_glue_suite, list(GLUE)), "flan-t5-glue": (flan_t5_glue_suite, list(GLUE))}
MINIATURES, TEXTS = ("miniature", "miniature-text"), ("miniature-text", "roberta-glue", "flan-t5-glue")

# ---- The methods: experts -> one model for all tasks, or a dict with one for each ------------------------------------

Model = nn.Module | dict[str, nn.Module]
Result = Model | tuple[Model, dict]  # with what else there is to tell, for results.json and the figures


def with_weights(suite: Suite, state: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(suite.pretrained)
    model.load_state_dict({**model.state_dict(), **state})
    return model


def merge(suite: Suite, vectors: Iterable[dict[str, Tensor]], scaling: float = 0.3) -> nn.Module:
    return with_weights(suite, wemoe.task_arithmetic(suite.pretrained, vectors, scaling))


def task_vectors(suite: Suite) -> Iterable[dict[str, Tensor]]:
    return (wemoe.task_vector(suite.pretrained, expert) for expert in suite.experts.values())


def with_curve(suite: Suite, vectors: Callable[[], Iterable[dict[str, Tensor]]], usual: float = 0.3) -> Result:
    """The merge at the usual λ, with the accuracy at other λ where the suite asks for it."""
    curve = []
    with progress(suite.scalings, "Trying λ", unit="λ") as scalings:
        for scaling in scalings:
            accuracy = evaluate(suite, merge(suite, vectors(), scaling))
            curve.append({"scaling": scaling, "accuracy": accuracy, "average": mean(accuracy)})
    return merge(suite, vectors(), usual), {"curve": curve} if curve else {}


def samples(suite: Suite) -> dict[str, Tensor]:
    return {task: suite.inputs(suite.load(task, "train", SAMPLES)[0]) for task in suite.experts}


def weight_averaging(suite: Suite) -> Result:
    return merge(suite, task_vectors(suite), 1 / len(suite.experts))


def task_arithmetic(suite: Suite) -> Result:
    return with_curve(suite, partial(task_vectors, suite))


def ties(suite: Suite, merge: str = "sum", usual: float = 0.3) -> Result:
    tau = baselines.ties(list(task_vectors(suite)), keep=0.2, merge=merge)
    return with_curve(suite, lambda: [tau], usual)


def ada_merging(suite: Suite, adapt: Callable, layer_wise: bool = True, elect: bool = False) -> Result:
    vectors = list(task_vectors(suite))
    return learn_lambda(suite, adapt, baselines.trim_and_elect(vectors) if elect else vectors, layer_wise)


def learn_lambda(suite: Suite, adapt: Callable, vectors: list[dict[str, Tensor]], layer_wise: bool = True) -> Result:
    settings = suite.adaptation
    clamp = settings.settings == "paper"
    model = baselines.AdaMerging(suite.pretrained, vectors, layer_wise, settings.init_lambda, clamp).to(suite.device)
    curve = adapt(model, steps=settings.lambda_steps, lr=settings.lambda_lr)
    weights = {entry: p.detach() for entry, p in model.merged().items()}
    return with_weights(suite, weights), {"adaptation": curve, "learned": model.lam.numel()}


def concrete(suite: Suite, adapt: Callable, then_lambda: bool = False) -> Result:
    """Learn a mask; then, if so wanted, λ for the masked task vectors.

    The paper of the method learns the mask for λ after one step of descent; the step is left out here.
    """
    settings = suite.adaptation
    model = baselines.ConcreteMask(suite.pretrained, list(task_vectors(suite))).to(suite.device)
    curve = adapt(model, steps=settings.mask_steps, lr=settings.mask_lr, part="mask" if then_lambda else "")
    with torch.no_grad():
        merged, masks = model.merged(), {entry: mask.cpu() for entry, mask in model.masks().items()}
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not then_lambda:
        return with_weights(suite, merged), {"adaptation": curve, "learned": learned}
    vectors = [{entry: masks[entry] * value for entry, value in tau.items()} for tau in task_vectors(suite)]
    model, record = learn_lambda(suite, adapt, vectors)
    return model, record | {"learned": record["learned"] + learned}


def mixture(
    suite: Suite,
    adapt: Callable,
    depth: int = 2,
    objective: Callable[[Tensor], Tensor] = wemoe.mean_entropy,
    layer: Callable | None = None,
    shared: bool = False,
    modules: str | None = None,
    elsewhere: Callable | None = None,
) -> Result:
    """WEMoE with routers of this depth, adapted to the unlabelled test images.

    `elsewhere` makes one vector of all task vectors, for what is not routed; None: task arithmetic.
    """
    settings = suite.adaptation
    options = {"router_depth": depth, "init_lambda": settings.init_lambda, "layer": layer, "modules": modules}
    model = wemoe.upscale(suite.pretrained, suite.experts, **options)
    if elsewhere:
        model.load_state_dict(not_routed(model, one_vector(suite, elsewhere)), strict=False)
    model = baselines.share_router(model) if shared else model
    model = baselines.average_over_batch(model) if settings.settings == "hub" else model
    model = model.to(suite.device)
    curve = adapt(model, steps=settings.steps, lr=settings.lr, objective=objective)
    return model, {"adaptation": curve, **routing(suite, model)}


def not_routed(model: nn.Module, merged: nn.Module) -> dict[str, Tensor]:
    """The merged model's weights for what is not routed in the upscaled one, where names are the same."""
    return {name: p for name, p in merged.state_dict().items() if name in model.state_dict()}


def oracle_routing(suite: Suite, elsewhere: Callable | None = None) -> Result:
    """For each task its own expert's MLPs, and all else merged: what routers could reach that know the task."""
    upscaled = wemoe.upscale(suite.pretrained, suite.experts, router_depth=0)
    models, merged = {}, one_vector(suite, elsewhere) if elsewhere else merge(suite, task_vectors(suite))
    for task, expert in suite.experts.items():
        models[task] = copy.deepcopy(expert)
        models[task].load_state_dict(not_routed(upscaled, merged), strict=False)
    return models


def deepest_routed(suite: Suite, adapt: Callable, share: float) -> Result:
    return mixture(suite, adapt, modules=deepest_mlps(suite.pretrained, share))


def unloaded(suite: Suite, adapt: Callable) -> Result:
    model, record = mixture(suite, adapt, depth=0)
    return wemoe.unload(model), record


def twin_merging(suite: Suite) -> Result:
    inputs = samples(suite)
    model = baselines.twin_merging(suite.pretrained, suite.experts, inputs, features=suite.features).to(suite.device)
    return model, {"routing": routing(suite, model)["routing"]}


def fisher_merging(suite: Suite) -> Result:
    heads = {task: suite.logits(task) for task in suite.experts}
    return with_weights(suite, baselines.fisher_merging(suite.experts, samples(suite), heads))


def regmean(suite: Suite, merge: Callable = baselines.regmean) -> Result:
    return with_weights(suite, merge(suite.experts, samples(suite)))


def one_vector(suite: Suite, rule: Callable, scaling: float = 1.0) -> Result:
    """θ_0 plus α times what the rule makes of all task vectors."""
    return merge(suite, [rule(list(task_vectors(suite)))], scaling)


def wudi(suite: Suite) -> Result:
    """With Adam's steps as long as they were in fine-tuning, and so as in the paper, which takes 1e-5 for both."""
    return one_vector(suite, partial(baselines.wudi, lr=suite.training.lr))


def ada_rank(suite: Suite, adapt: Callable) -> Result:
    settings, vectors = suite.adaptation, list(task_vectors(suite))
    model = baselines.AdaRank(suite.pretrained, vectors, init_lambda=settings.init_lambda).to(suite.device)
    curve = adapt(model, steps=settings.mask_steps, lr=settings.lambda_lr)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        return with_weights(suite, model.merged()), {"adaptation": curve, "learned": learned}


def smile(suite: Suite) -> Result:
    return baselines.Smile(suite.pretrained, suite.experts).to(suite.device)


def mass(suite: Suite) -> Result:
    """Routed at the MLP of the block before the last but one, as in the authors' program: the 10th of 12, from 0."""
    layer = f"transformer.resblocks.{len(suite.pretrained.transformer.resblocks) - 2}.mlp.c_fc"
    return baselines.Mass(suite.pretrained, suite.experts, layer).to(suite.device)


def masked(suite: Suite, unify: Callable) -> Result:
    """For each task the entries of one vector that its mask leaves, times a number where the method has one."""
    unified, masks, *rescalers = unify(list(task_vectors(suite)))
    models, bits = {}, sum(mask.numel() for mask in masks[0].values())
    for task, mask, rescaler in zip(suite.experts, masks, *rescalers or [[1.0] * len(masks)]):
        models[task] = merge(suite, [{entry: mask[entry] * tau for entry, tau in unified.items()}], rescaler)
    # What has to be kept: the pre-trained model, one vector, and for every task one bit a parameter and one number.
    size = 2 * model_bytes(suite.pretrained) + len(models) * (bits // 8 + 4)
    return models, {"bytes": size, "total_parameters": 2 * bits + len(models)}


def multi_task_learning(suite: Suite) -> Result:
    """One model, fine-tuned on all tasks: as many steps as an expert, with half its batch size of every task."""
    half = replace(suite, training=replace(suite.training, batch_size=max(1, suite.training.batch_size // 2)))
    return fine_tune(half, list(suite.experts), "Traditional MTL")


@dataclass(frozen=True)
class Method:
    """`seconds` is about what it takes in the miniature, on one core of two; `arxiv` the paper that defines it."""

    group: str
    make: Callable[..., Result]  # from the suite and, where it adapts, `adapt`
    seconds: int
    needs_training_images: bool = False
    needs_validation: bool = False  # to choose λ by
    arxiv: str = ""

    @property
    def needs(self) -> list[str]:  # Table 7
        kinds = {
            TRAINING_IMAGES: self.needs_training_images,
            VALIDATION: self.needs_validation,
            ADAPTATION: self.group == LEARNED,
        }
        return [kind for kind, needed in kinds.items() if needed]


GIVEN = "given training images, or the task of every image"
SINCE, ROUTED = "static, newer than WEMoE", "routed without training"
LEARNED, REFERENCE = "learned without labels", "for reference"


def low_rank(rank: int) -> Method:
    return Method(LEARNED, partial(mixture, layer=partial(baselines.LowRankLinear, rank=rank)), 70)


E_WEMOE = partial(mixture, layer=partial(baselines.SparseLinear, keep=0.1), shared=True)
DIVERSE = partial(mixture, objective=wemoe.negative_information)
METHODS = {
    "Weight Averaging": Method(STATIC, weight_averaging, 3, arxiv="2203.05482"),
    "Task Arithmetic": Method(STATIC, task_arithmetic, 25, needs_validation=True, arxiv="2212.04089"),
    "TIES-Merging": Method(STATIC, ties, 25, needs_validation=True, arxiv="2306.01708"),
    "Consensus Merging": Method(
        SINCE, partial(one_vector, rule=baselines.consensus, scaling=0.3), 4, arxiv="2405.07813"
    ),
    "TSV-M": Method(SINCE, partial(one_vector, rule=baselines.tsv_merge), 6, arxiv="2412.00081"),
    "Iso-C": Method(SINCE, partial(one_vector, rule=baselines.iso_c), 4, arxiv="2502.04959"),
    "Iso-CTS": Method(SINCE, partial(one_vector, rule=baselines.iso_cts), 6, arxiv="2502.04959"),
    "WUDI": Method(SINCE, wudi, 21, arxiv="2503.08099"),
    "Fisher Merging": Method(GIVEN, fisher_merging, 20, needs_training_images=True, arxiv="2111.09832"),
    "RegMean": Method(GIVEN, regmean, 5, needs_training_images=True, arxiv="2212.09849"),
    "Twin-Merging": Method(GIVEN, twin_merging, 30, needs_training_images=True, arxiv="2406.15479"),
    "RegMean++": Method(
        GIVEN, partial(regmean, merge=baselines.regmean_plus_plus), 8, needs_training_images=True, arxiv="2508.03121"
    ),
    "EMR-Merging": Method(GIVEN, partial(masked, unify=baselines.emr), 5, arxiv="2405.17461"),
    "TALL Masks": Method(GIVEN, partial(masked, unify=baselines.tall_masks), 5, arxiv="2405.07813"),
    "AdaMerging (task-wise)": Method(LEARNED, partial(ada_merging, layer_wise=False), 45, arxiv="2310.02575"),
    "AdaMerging (layer-wise)": Method(LEARNED, ada_merging, 45, arxiv="2310.02575"),
    "AdaMerging++ (task-wise)": Method(
        LEARNED, partial(ada_merging, layer_wise=False, elect=True), 45, arxiv="2310.02575"
    ),
    "AdaMerging++ (layer-wise)": Method(LEARNED, partial(ada_merging, elect=True), 45, arxiv="2310.02575"),
    "Concrete Task Arithmetic": Method(LEARNED, concrete, 40, arxiv="2312.06173"),
    "Concrete AdaMerging": Method(LEARNED, partial(concrete, then_lambda=True), 85, arxiv="2312.06173"),
    "AdaRank": Method(LEARNED, ada_rank, 110, arxiv="2503.22178"),
    "WEMoE (0-layer)": Method(LEARNED, partial(mixture, depth=0), 50, arxiv="2402.00433"),
    "WEMoE (1-layer)": Method(LEARNED, partial(mixture, depth=1), 110, arxiv="2402.00433"),
    "WEMoE": Method(LEARNED, mixture, 110, arxiv="2402.00433"),
    "WEMoE (rank 16)": low_rank(16),
    "E-WEMoE": Method(LEARNED, E_WEMOE, 140, arxiv="2410.21804"),
    "SMILE": Method(ROUTED, smile, 11, arxiv="2408.10174"),
    "MASS": Method(ROUTED, mass, 30, arxiv="2504.05342"),
    "Pre-trained": Method(REFERENCE, lambda suite: suite.pretrained, 3),
    "Simple Ensemble": Method(REFERENCE, lambda suite: baselines.Ensemble(suite.experts.values()), 25),
    "Traditional MTL": Method(REFERENCE, multi_task_learning, 50, needs_training_images=True),
    "Individual": Method(REFERENCE, lambda suite: suite.experts, 4),
}
MAIN = list(METHODS)
STORY = ["Pre-trained", "Weight Averaging", "Task Arithmetic", "AdaMerging (layer-wise)", "WEMoE", "Individual"]
# For other experiments than the main one.
METHODS.update({name: low_rank(rank) for rank, name in RANKS.items() if name not in METHODS})
METHODS["WEMoE + diversity"] = Method(LEARNED, DIVERSE, 110)
METHODS["TIES-Merging (mean)"] = Method(STATIC, partial(ties, merge="mean", usual=1.0), 25)
METHODS[SEPARATELY] = Method(LEARNED, partial(mixture, depth=1, modules=r"\.(attn|mlp)$"), 300)
METHODS[BLOCKS] = Method(LEARNED, partial(mixture, depth=1, modules=baselines.BLOCKS), 300)
METHODS |= {name: Method(LEARNED, partial(deepest_routed, share=share), 90) for share, name in SHARES.items()}
METHODS[UNLOADED] = Method(LEARNED, unloaded, 50)
ON_TSV, ORACLE, ORACLE_ON_TSV = "WEMoE (TSV-M elsewhere)", "Oracle routing", "Oracle routing (TSV-M elsewhere)"
METHODS[ON_TSV] = Method(LEARNED, partial(mixture, elsewhere=baselines.tsv_merge), 120)
METHODS[ORACLE] = Method(GIVEN, oracle_routing, 6)
METHODS[ORACLE_ON_TSV] = Method(GIVEN, partial(oracle_routing, elsewhere=baselines.tsv_merge), 12)
METHODS[LANDSCAPE] = Method(STATIC, landscape, 60)


def run_method(suite: Suite, name: str, key: str, cache: Path, change: dict) -> dict:
    """The method's entry in results.json, read from the cache if it is there.

    `change` is what suite.variant takes, and `task_free`: whether the accuracy without the task is measured, too.
    """
    method, task_free = METHODS[name], change.get("task_free", False)
    change = {setting: value for setting, value in change.items() if setting != "task_free"}
    scalings = suite.scalings if method.group == STATIC else ()  # others try none
    key = fingerprint(key, name, change, scalings, code_of(method.make), code_of(evaluate), code_of(adapt))
    folder = cache / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("task_free.json" if task_free else "result.json")  # with one adaptation for both
    barrier()
    about = {"name": name, "group": method.group, "needs": method.needs, "arxiv": method.arxiv}
    if file.exists():
        return read_kept(file, lambda path: json.loads(path.read_text())) | about
    start = time.perf_counter()
    torch.manual_seed(suite.seed)
    suite = suite.variant(**change)

    def adapt_this(model: nn.Module, part: str = "", **options) -> dict:
        label = f"{name}, {part}" if part else name
        return adapt(suite, model, label, folder / f"{part or 'adaptation'}.pt", **options)

    offered = {"suite": suite, "adapt": adapt_this}
    needed = inspect.signature(method.make).parameters
    result = method.make(**{name: value for name, value in offered.items() if name in needed})
    model, record = result if isinstance(result, tuple) else (result, {})
    before = time.perf_counter()
    accuracy = evaluate(suite, model)
    after = time.perf_counter()
    models = list(model.values()) if isinstance(model, dict) else [model]
    parameters = [p for model in models for p in model.parameters()]
    entry = {
        **about,
        "accuracy": {task: round(value, 2) for task, value in accuracy.items()},
        "average": round(mean(accuracy), 2),
        "seconds": round(after - start, 1),
        "evaluation_seconds": round(after - before, 4),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
        "bytes": sum(map(model_bytes, models)),
        **record,
        **({"task_free": evaluate_task_free(suite, model)} if task_free else {}),
    }
    if rank() == 0:
        write(file, lambda path: path.write_text(json.dumps(entry)))
    barrier()
    return entry


def model_bytes(model: nn.Module) -> int:
    """What its parameters and buffers take, in memory and on disk; a tensor with two names counts once."""
    return sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})


# ---- The experiments: their names, what they run and what they show --------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    about: str
    conditions: Callable[[Suite, list[str]], list[Condition]]
    show: Callable[[Measured], Shown]
    methods: list[str]  # that it may run
    minutes: int  # some, that it takes in the miniature on 2 cores: an estimate, by its methods' seconds
    paper: tuple[str, ...] = ()  # its numbers in the paper
    usual: list[str] | None = None  # that it runs unless told otherwise; None: all of them
    tasks: list[str] | None = None  # of the paper's suites; in the miniature, their counterparts
    all_tasks: bool = False  # whether it needs all of them
    more_tasks: bool = False  # whether it takes all that the miniature can draw, and not the first eight only
    splits: tuple[str, ...] = ()  # of the data sets, besides the test split
    seeds: int = 1
    steps: int | None = None  # of adaptation, in the miniature; None: as many as usual
    scalings: tuple[float, ...] = ()  # λ that methods which merge once try, besides their own
    details: bool = False  # whether its tables tell time and size, too
    needs_suite: bool = True


SHIFTED = ["Task Arithmetic", "TIES-Merging", "Fisher Merging", "RegMean", "AdaMerging (layer-wise)"]
SHIFTED += ["AdaMerging++ (layer-wise)", "WEMoE (0-layer)", "WEMoE"]
CORRUPTED = {"tasks": ROBUSTNESS_TASKS, "splits": tuple(CORRUPTIONS)}
EXPERIMENTS = {
    "main": Experiment(
        "methods on every task, and what each needs besides the experts",
        experiments.one_table,
        experiments.show_main,
        MAIN,
        4,
        ("table2", "table3", "table7"),
        usual=STORY,
        details=True,
    ),
    "depths": Experiment(
        "routers of no, one and two layers",
        partial(experiments.one_table, rows=router_depths),
        experiments.show_depths,
        ["AdaMerging (layer-wise)", *DEPTHS.values()],
        4,
        ("table10",),
    ),
    "modules": Experiment(
        "what is routed: MLPs, attention and MLPs, or entire blocks, by one-layer routers",
        partial(experiments.one_table, rows=routed_modules),
        experiments.show_modules,
        [MLP_ONLY, SEPARATELY, BLOCKS],
        10,
        ("table6",),
    ),
    "generalization": Experiment(
        "six tasks merged, eight tested",
        experiments.generalization_conditions,
        experiments.show_generalization,
        ["Pre-trained", *SHIFTED],
        8,
        ("table4",),
        all_tasks=True,
    ),
    "robustness": Experiment(
        "four tasks merged, tested under seven corruptions",
        experiments.corrupted_conditions,
        experiments.show_robustness,
        [*SHIFTED, "WEMoE + diversity"],
        20,
        ("table5", "table11"),
        **CORRUPTED,
    ),
    "sweep": Experiment(
        "accuracy against λ, under corruptions",
        experiments.sweep_conditions,
        experiments.show_sweep,
        ["Task Arithmetic", "TIES-Merging", DEPTHS[0], DEPTHS[2]],
        5,
        ("fig5", "fig10"),
        **CORRUPTED,
        steps=40,
        scalings=experiments.LAMBDAS,
    ),
    "ablation": Experiment(
        "settings of WEMoE, one at a time, and accuracy during adaptation by learning rate",
        experiments.ablation_conditions,
        experiments.show_ablation,
        [*DEPTHS.values(), *RANKS.values()],
        15,
        ("fig4",),
    ),
    "layers": Experiment(
        "only the deeper MLPs routed: accuracy, parameters and time",
        experiments.one_table,
        experiments.show_layers,
        ["Task Arithmetic", *SHARES.values(), "WEMoE"],
        5,
        ("appendixd",),
    ),
    "unload": Experiment(
        "constant routers merged once and for all: the same accuracies from a dense model",
        experiments.one_table,
        experiments.show_unload,
        ["Task Arithmetic", DEPTHS[0], UNLOADED],
        2,
        ("appendixb3",),
        details=True,
    ),
    "routing": Experiment(
        "mean routing weights and first choices, by layer and task",
        experiments.one_table,
        experiments.show_routing,
        ["WEMoE"],
        3,
        ("fig11", "fig12"),
    ),
    "vectors": Experiment(
        "lengths and angles of task vectors by layer, attention against MLP",
        experiments.no_conditions,
        experiments.show_vectors,
        [],
        1,
        ("fig3",),
    ),
    "landscape": Experiment(
        "the loss over (λ1, λ2) for pairs of tasks",
        experiments.pairs_of_tasks,
        experiments.show_landscapes,
        [LANDSCAPE],
        3,
        ("fig7",),
    ),
    "parameters": Experiment(
        "numbers of parameters, computed from the architectures: no weights, no download",
        experiments.no_conditions,
        experiments.show_parameters,
        [],
        1,
        ("table8", "table1", "table9"),
        needs_suite=False,
    ),
    "taskfree": Experiment(
        "accuracy where nobody tells the task of an image: the head is chosen, too",
        experiments.task_free,
        experiments.show_task_free,
        MAIN,
        6,
        usual=["Task Arithmetic", "TSV-M", "AdaMerging (layer-wise)", "WEMoE", "SMILE", "MASS", "Individual"],
    ),
    "tasks": Experiment(
        "accuracy against the number of tasks, and what limits it",
        experiments.numbers_of_tasks,
        experiments.show_numbers_of_tasks,
        ["Task Arithmetic", "TSV-M", "AdaMerging (layer-wise)", "WEMoE (rank 16)", "WEMoE", ON_TSV, ORACLE]
        + [ORACLE_ON_TSV, "Individual"],
        12,
        more_tasks=True,
        steps=80,
    ),
    "collapse": Experiment(
        "where minimising the entropy goes wrong, and its cure, over five seeds",
        partial(experiments.corrupted_conditions, kinds=("impulse_noise",)),
        experiments.show_collapse,
        ["Task Arithmetic", "WEMoE", "WEMoE + diversity"],
        20,
        tasks=ROBUSTNESS_TASKS,
        splits=("impulse_noise",),
        seeds=5,
    ),
}


def run(arguments: argparse.Namespace) -> bool:
    """The whole experiment. Returns whether every claim holds."""
    output, experiment = arguments.folder, EXPERIMENTS[arguments.experiment]
    for folder in (arguments.cached, output):
        folder.mkdir(parents=True, exist_ok=True)
    measured = measure(arguments, experiment) if experiment.needs_suite else None
    if rank() > 0:  # the first process of a distributed run reports for all
        return True
    shown = experiment.show(measured)
    text = shown.text or report.tables(measured.conditions, measured.entries, experiment.details)
    text += f"\n{measured.suite.note}\n" if measured and measured.suite.note else ""
    if measured and (measured.suite.source or arguments.settings == "hub"):
        text += f"\nMethods that adapt did so with the settings of the {SETTINGS[arguments.settings]}.\n"
    results = results_of(arguments, measured, shown.claims)
    write(output / "results.json", lambda path: path.write_text(json.dumps(results, indent=1)))
    write(output / "table.md", lambda path: path.write_text(text))
    for name, figure in shown.figures.items():
        write(output / f"{name}.png", partial(report.save, figure))
    say("\n" + text)
    if measured is not None and not measured.suite.published and arguments.suite not in MINIATURES:
        say("Fewer tasks or images than published, or another model: no comparison with published figures.")
    for entry in shown.claims:
        say(f"{'✓' if entry['holds'] else '✗'} {entry['claim']}: {entry['detail']}")
    say(f"\nResults and figures are in {output}/.")
    return all(entry["holds"] for entry in shown.claims)


def measure(arguments: argparse.Namespace, experiment: Experiment) -> Measured:
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


def results_of(arguments: argparse.Namespace, measured: Measured | None, claims: list[dict]) -> dict:
    """What results.json holds."""
    results = {
        "suite": arguments.name,
        "experiment": arguments.experiment,
        "seed": arguments.seed,
        "seeds": arguments.seeds,
        "device": arguments.device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
        },
        "claims": claims,
    }
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


# ---- The command line ------------------------------------------------------------------------------------------------

PRECISIONS = ("float32", "bfloat16")
SETTINGS = {"paper": "paper", "hub": "hub: λ is the mean over a batch of one task's images, in evaluation, too"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py",
        description="Merge fine-tuned models in several ways, measure them, and check the claims of the WEMoE paper.",
        epilog="Exit status: 0 if every claim holds, 1 if one does not, 2 for a usage error or bad input.",
    )
    add = parser.add_argument
    add("suite", nargs="?", default="miniature", choices=SUITES, help="default: %(default)s")
    add(
        "--experiment", default="main", metavar="NAME", help=f"{', '.join(EXPERIMENTS)} (default: %(default)s), or list"
    )
    add("--tasks", nargs="+", metavar="TASK", help="only these, where the experiment allows it (default: all eight)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"all, or some of {', '.join(MAIN)} (default: {', '.join(STORY)})",
    )
    add("--steps", type=int, help="adaptation steps of routers (default: 160 in the miniature, 1000 in the paper)")
    add("--seed", type=int, default=0, help="of fine-tuning and adaptation (default: %(default)s)")
    add("--seeds", type=int, help="how many, from --seed on: mean ± deviation (default: 1; 5 in collapse)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    add(
        "--settings",
        choices=SETTINGS,
        default="paper",
        help="of adaptation: the paper's, or those of the library that made the hub's rows (default: %(default)s)",
    )
    add("--precision", choices=PRECISIONS, help="of evaluation (default: bfloat16 for CLIP on a GPU, else float32)")
    add("--adapt-precision", choices=PRECISIONS, help="of adaptation (default: float32)")
    add("--workers", type=int, help="processes with one thread each (default: 2 in the miniature on a CPU, else 1)")
    add("--output", type=Path, default=Path("results"), help="a folder (default: %(default)s)")
    paper = parser.add_argument_group("for the paper's suites")
    add = paper.add_argument
    add("--hub", type=Path, metavar="DIR", help="read a mirror of the model hub instead of downloading")
    add("--experts", type=Path, metavar="DIR", help="the task-arithmetic authors' checkpoints instead of the hub's")
    add("--finetune", action="store_true", help="make the experts from the train splits instead of downloading them")
    add("--arch", help="with --finetune: another architecture of open_clip's")
    add("--pretrained", default="openai", help="with --finetune: which of its weights (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="only the first N images of every test set, for a quick look")
    add("--cache", type=Path, default=Path.home() / ".cache" / "wemoe", help="decoded images (default: %(default)s)")
    parsed = parser.parse_args(arguments)
    check_numbers(parsed, {"steps": 1, "seed": 0, "seeds": 1, "limit": 1, "workers": 1})
    paper, glue = parsed.suite not in MINIATURES, parsed.suite.endswith("-glue")
    numbers = {number: name for name, experiment in EXPERIMENTS.items() for number in experiment.paper}
    parsed.experiment = numbers.get(parsed.experiment.lower().replace(" ", ""), parsed.experiment)
    (parsed.experiment,) = choose("experiment", [parsed.experiment], list(EXPERIMENTS))
    experiment = EXPERIMENTS[parsed.experiment]
    if parsed.suite in TEXTS and parsed.experiment not in ("main", "depths", "ablation"):
        raise InputError(f"{parsed.suite} has main, depths and ablation: {parsed.experiment} is about images")
    if parsed.tasks and (experiment.tasks or experiment.all_tasks):
        raise InputError(f"--tasks is not for the experiment {parsed.experiment}, which has its own")
    if experiment.tasks:
        parsed.tasks = [task if paper else COUNTERPARTS[task] for task in experiment.tasks]
    known = list(ALL_TASKS) if experiment.more_tasks and parsed.suite == "miniature" else SUITES[parsed.suite][1]
    parsed.tasks = choose("task", parsed.tasks, known)
    parsed.whole = bool(experiment.tasks) or parsed.tasks == PUBLISHED_TASKS  # as what is published
    if not paper and experiment.steps:
        parsed.steps = parsed.steps or experiment.steps
    senseless = (SENSELESS if glue else ()) + (("MASS",) if parsed.suite in TEXTS else ())  # of which routes by images
    methods = [name for name in experiment.methods if name not in senseless]
    usual = experiment.usual if experiment.usual and not paper else methods
    usual = [name for name in methods if name in usual]
    usual = [name for name in usual if not (paper and METHODS[name].needs_training_images)]
    kind = "method" if parsed.experiment == "main" else f"method of the experiment {parsed.experiment}"
    if [name.lower() for name in parsed.methods or ()] == ["all"]:
        parsed.methods = methods
    parsed.methods = choose(kind, parsed.methods, methods) if parsed.methods else usual
    trains = any(METHODS[name].needs_training_images for name in parsed.methods)
    parsed.splits = experiment.splits + (("train",) if trains else ())
    parsed.seeds = parsed.seeds or experiment.seeds
    refused = () if paper else ("hub", "limit")
    refused += () if paper and not glue else ("experts", "finetune", "arch")
    for option in refused:
        if getattr(parsed, option):
            raise InputError(f"--{option} is for the paper's suites: {', '.join(ARCHITECTURES)}")
    if (parsed.arch or parsed.pretrained != "openai") and not parsed.finetune:
        raise InputError("--arch and --pretrained need --finetune: no experts are published for them")
    if parsed.finetune and parsed.experts:
        raise InputError("--finetune makes the experts, --experts reads them: choose one")
    parsed.device = choose_device(parsed.device)
    parsed.on_cores = not paper and parsed.device == "cpu" and world() == 1
    if (parsed.workers or 1) > 1 and not parsed.on_cores:
        raise InputError("--workers is for the miniature on a CPU; on several GPUs use torchrun")
    parsed.workers = parsed.workers or (min(2, os.cpu_count() or 1) if parsed.on_cores else 1)
    if parsed.settings == "hub" and parsed.suite in TEXTS:
        raise InputError("--settings hub is for images: of texts, the hub has no rows of methods that adapt")
    if parsed.settings == "hub" and world() > 1:
        raise InputError("--settings hub averages routing weights over whole batches: it runs in one process")
    check_output(parsed.output)
    parsed.name = parsed.suite if not parsed.arch else f"{parsed.arch}-{parsed.pretrained}"
    variants = {"experts": parsed.experts, "finetune": parsed.finetune, f"first{parsed.limit}": parsed.limit}
    variants["hub-settings"] = parsed.settings == "hub"
    parsed.folder = parsed.output / "-".join([parsed.name, *(name for name, on in variants.items() if on)])
    parsed.cached = parsed.folder / "cache"
    parsed.folder /= "" if parsed.experiment == "main" else parsed.experiment
    return parsed


def choose(kind: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """The known names that are wanted, in their own order; case does not matter."""
    if wanted is None:
        return known
    exact = {name.lower(): name for name in known}
    if unknown := [name for name in wanted if name.lower() not in exact]:
        raise InputError(f"unknown {kind} {unknown[0]!r}: choose among {', '.join(map(repr, known))}")
    return [name for name in known if name.lower() in {name.lower() for name in wanted}]


def list_experiments() -> None:
    for name, experiment in EXPERIMENTS.items():
        needs = f"{len(experiment.tasks)} tasks" if experiment.tasks else "the suite"
        needs += " and their corrupted test images" if experiment.splits else ""
        needs = needs if experiment.needs_suite else "nothing"
        numbers = f" ({', '.join(experiment.paper)})" if experiment.paper else ""
        say(f"{name}{numbers}: {experiment.about}; needs {needs}; in the miniature, some {experiment.minutes} min")


OUT_OF_MEMORY = """out of memory; what is finished is kept. Adaptation takes most: --adapt-precision bfloat16
halves its activations, --methods leaves methods out, --device cpu has more room"""


def interrupt(*_) -> None:
    for each_signal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each_signal, signal.SIG_IGN)  # once is enough
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each_signal: signal.signal(each_signal, interrupt) for each_signal in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # on a terminal that has no ✓
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # started by torchrun
        dist.init_process_group()
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments[:1] == ["bench"]:
            return 0 if bench(arguments[1:]) else 1
        if "list" in arguments and "--experiment" in arguments:
            return list_experiments() or 0
        parsed = parse_arguments(arguments)
        if rank() > 0:  # the first process of a distributed run has the folder for all
            return 0 if run(parsed) else 1
        with alone(parsed.cached.parent):
            return 0 if run(parsed) else 1
    except (InputError, OSError, FloatingPointError) as error:
        return fail(error)
    except torch.linalg.LinAlgError as error:
        return fail(f"a decomposition failed ({one_line(error)}); --methods leaves out what is of low rank")
    except BrokenProcessPool:
        return fail("a worker was killed, perhaps for want of memory; the same command goes on, --workers 1 takes less")
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)  # on a CPU
        if not known:
            raise
        return fail(f"{OUT_OF_MEMORY} ({one_line(error)})")
    except KeyboardInterrupt:
        hint = "" if arguments[:1] == ["bench"] else "; the same command goes on from what is finished"
        print(f"\nreproduce.py: interrupted{hint}", file=sys.stderr)
        return 130
    finally:
        for each_signal, handler in before.items():
            signal.signal(each_signal, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def fail(error: object) -> int:
    print("reproduce.py: error: " + " ".join(str(error).split()), file=sys.stderr)
    if world() > 1:
        os._exit(2)  # the other processes wait for this one: torchrun ends them
    return 2


if __name__ == "__main__":
    sys.exit(main())
