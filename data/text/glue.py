"""GLUE as a suite, twice: RoBERTa with a head of its own for each task, and Flan-T5, which answers in words.

Models and data sets come from the hub or from a mirror of it, as images do (data/paper/hub.py); `transformers` is
imported only when one of these suites is made. What cannot be used is refused with an InputError.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from data.files import InputError, one_line, some
from data.paper import hub
from data.paper.hub import Repository, repository
from data.paper.suite import ADAPTATION, TRAINING, refuse_twins
from data.processes import progress, say
from data.suite import Batch, Suite, padded, run
from data.text.metrics import METRICS, spearman


class Task(NamedTuple):
    """A task of GLUE: its columns in order, its split and how many examples that has; prompt and answers for Flan-T5.

    The answers are in the order of the labels. Without any it is a regression.
    """

    columns: list[str]
    split: str
    examples: int
    metric: str
    prompt: str
    answers: list[str] | None


FACTS = json.loads(Path(__file__).with_name("glue.json").read_text(encoding="utf-8"))
GLUE = {name: Task(**task) for name, task in FACTS["tasks"].items()}
REGRESSIONS = tuple(name for name, task in GLUE.items() if task.answers is None)
NOTE = (
    f"{', '.join(REGRESSIONS)} is a regression, about which entropy says nothing: it is merged, but not adapted to. "
    "Figures are "
)
# Methods to which heads of their own, a regression or answers in words leave no meaning.
SENSELESS = ("Fisher Merging", "Simple Ensemble", "Traditional MTL")


def roberta_glue_suite(arguments: argparse.Namespace) -> Suite:
    from data.text import models

    mirror, tasks = arguments.hub, arguments.tasks
    base, fine = (repository(name, "model", mirror) for name in ("roberta-base", FACTS["roberta experts"]))
    files = {task: (fine, weights_in(fine, f"{task}/")) for task in tasks}
    announce(arguments, base, [*files.values()])
    config, tokenizer = read_json(base.fetch("config.json")), models.read_tokenizer(base.fetch("tokenizer.json"))
    path = base.fetch(weights_in(base))
    pretrained = models.roberta(config, hub.read_weights(path), path)
    experts, heads = {}, {}
    with progress(files.items(), "Experts") as items:
        for task, (repo, file) in items:
            path = repo.fetch(file)
            state = hub.read_weights(path)
            outputs = 1 if task in REGRESSIONS else len(GLUE[task].answers)
            experts[task] = models.roberta(config, state, path)
            heads[task] = models.roberta_head(config, state, outputs, path)

    def load(task: str, split: str, count: int | None) -> tuple[Tensor, Tensor]:
        examples = read_examples(arguments, task, split, count)
        first, *second = ([e[name] for e in examples] for name in GLUE[task].columns)
        texts = list(zip(first, *second)) if second else first
        return models.tokenise(tokenizer, texts, 128), torch.tensor([e["label"] for e in examples])

    suite = glue_suite(arguments, pretrained, experts, heads, load, tokenizer.token_to_id("<pad>"))
    suite.metrics = {task: METRICS[GLUE[task].metric] for task in tasks}
    suite.note = NOTE + "; ".join(f"{task}: {GLUE[task].metric}" for task in tasks) + "."
    suite.features = lambda tower, batch: models.mean_state(tower.encoder, batch)
    return suite


def flan_t5_glue_suite(arguments: argparse.Namespace) -> Suite:
    from data.text import models

    mirror, tasks = arguments.hub, arguments.tasks
    base = repository("google/flan-t5-base", "model", mirror)
    repos = {task: repository(f"tanganke/flan-t5-base_glue-{task}", "model", mirror) for task in tasks}
    files = {task: (repo, weights_in(repo)) for task, repo in repos.items()}
    announce(arguments, base, [*files.values()])
    config, tokenizer = read_json(base.fetch("config.json")), models.read_tokenizer(base.fetch("tokenizer.json"))
    path = base.fetch(weights_in(base))
    pretrained, experts = models.t5(config, hub.read_weights(path), path), {}
    with progress(files.items(), "Experts") as items:
        for task, (repo, file) in items:
            path = repo.fetch(file)
            experts[task] = models.t5(config, hub.read_weights(path), path)
    heads = {}
    for task in tasks:
        answers = GLUE[task].answers or ["1", "5"]  # of a regression, a head that nobody asks
        first = [tokenizer.encode(text).ids[0] for text in answers]
        if task not in REGRESSIONS and len(set(first)) < len(first):
            raise InputError(f"{task}: {', '.join(answers)} begin with the same token: there is no entropy to minimise")
        heads[task] = models.FirstAnswers(first)

    def load(task: str, split: str, count: int | None) -> tuple[Tensor, Tensor]:
        examples = read_examples(arguments, task, split, count)
        labels = [e["label"] for e in examples]
        if task in REGRESSIONS:
            labels = [float(f"{label:.1f}") for label in labels]  # as it was to be answered
        texts = [GLUE[task].prompt.format(**e) for e in examples]
        return models.tokenise(tokenizer, texts, 512), torch.tensor(labels)

    def answer(task: str, tower: nn.Module, batch: Batch) -> Tensor:
        texts = tokenizer.decode_batch(run(tower, {**batch, "whole": True}).tolist())  # without special tokens
        return torch.tensor([understood(task, text) for text in texts])

    suite = glue_suite(arguments, pretrained, experts, heads, load, tokenizer.token_to_id("<pad>"))
    suite.metrics, suite.answer = {task: spearman for task in tasks if task in REGRESSIONS}, answer
    suite.note = NOTE + "the share of exactly matching answers, in per cent; stsb: Spearman."
    suite.features = lambda tower, batch: models.mean_state(tower.t5.encoder, batch)
    return suite


def understood(task: str, text: str) -> float:
    """The class of an answer, -1 for none of them; of a regression the number, 0 if it is none."""
    if task not in REGRESSIONS:
        return float(GLUE[task].answers.index(text)) if text in GLUE[task].answers else -1.0
    try:
        return float(text) if math.isfinite(float(text)) else 0.0
    except ValueError:
        return 0.0


def glue_suite(
    arguments: argparse.Namespace,
    pretrained: nn.Module,
    experts: dict[str, nn.Module],
    heads: dict[str, nn.Module],
    load: Callable,
    padding: int,
) -> Suite:
    device = torch.device(arguments.device)
    test = {task: load(task, "test", arguments.limit) for task in arguments.tasks}
    refuse_twins(pretrained.state_dict(), {task: expert.state_dict() for task, expert in experts.items()})
    suite = Suite(
        name=arguments.suite,
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or "float32",
        training=TRAINING,
        adaptation=ADAPTATION.changed(arguments.steps, arguments.adapt_precision),
        pretrained=pretrained.requires_grad_(False),
        heads={task: head.to(device) for task, head in heads.items()},
        test=test,
        load=load,
        normalise=partial(padded, padding=padding),
        experts={task: expert.requires_grad_(False) for task, expert in experts.items()},
        unadapted=REGRESSIONS,
    )
    whole = all(len(labels) == GLUE[task].examples for task, (_, labels) in test.items())
    if whole and arguments.tasks == list(GLUE):
        suite.published = published_rows(arguments.suite)
    return suite


def published_rows(suite: str) -> dict[str, dict]:
    """Method -> figures by task. Those of merged RoBERTas were published as shares, of settings that are not ours."""
    figures, source = dict(FACTS["published"][suite]), "FusionBench"
    if suite == "roberta-glue":
        source, individual = "Twin-Merging", figures["individual"]
        shares = figures["shares of the individual models' figures"]
        figures = {name: [x * share / 100 for x, share in zip(individual, row)] for name, row in shares.items()}
        figures["Individual"] = individual
    return {
        name: {
            "method": name,
            "source": source,
            "accuracy": dict(zip(GLUE, row)),
            "claimed": suite == "flan-t5-glue" or name == "Individual",
        }
        for name, row in figures.items()
    }


# ---- Files -----------------------------------------------------------------------------------------------------------


def weights_in(repo: Repository, folder: str = "") -> str:
    """The weight file in a repository's folder, or in the nearest folder below. Raises InputError if there is none."""
    found = [f for f in repo.sizes if f.startswith(folder) and Path(f).name in hub.WEIGHT_FILES]
    if not found:
        have = some(file for file in repo.sizes if file.startswith(folder))
        where = f"{repo.where}{folder and ' in ' + folder}"
        raise InputError(f"{where} has no {' or '.join(hub.WEIGHT_FILES)}; it has: {have}")
    return min(found, key=lambda file: (file.count("/"), hub.WEIGHT_FILES.index(Path(file).name)))


def shards(arguments: argparse.Namespace, task: str, split: str) -> tuple[Repository, list[str]]:
    repo = repository("nyu-mll/glue", "dataset", arguments.hub)
    return repo, hub.shards(repo, task, GLUE[task].split if split == "test" else split)


def announce(arguments: argparse.Namespace, base: Repository, experts: list[tuple[Repository, str]]) -> None:
    """Say how much a run downloads, and raise InputError if there is no room for it."""
    needed = [(base, file) for file in ("config.json", "tokenizer.json", weights_in(base))] + experts
    for task in arguments.tasks:
        for split in ("test", *arguments.splits):
            repo, files = shards(arguments, task, split)
            needed += [(repo, file) for file in files]
    size: Counter[str] = Counter()
    for repo, file in needed:
        size["present" if repo.on_disk(file) else "download"] += repo.sizes.get(file, 0)
    say(f"{arguments.suite}: {size['download'] / 1e9:.1f} GB to download")
    hub.check_space(size, arguments.cache)


def read_examples(arguments: argparse.Namespace, task: str, split: str, count: int | None) -> list[dict]:
    """The first so many examples of a split, or all: its texts by column, and `label`. Raises InputError."""
    repo, files = shards(arguments, task, split)
    spec, examples = GLUE[task], []
    for path in map(repo.fetch, files):
        try:
            examples += pq.read_table(path, columns=[*spec.columns, "label"]).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{task}: {path} is not a readable parquet file: {one_line(error)}") from error
    kinds, classes = (int, float) if spec.answers is None else int, range(len(spec.answers or ()))
    for index, example in enumerate(examples):
        label, texts = example.get("label"), [example.get(name) for name in spec.columns]
        known = isinstance(label, kinds) and (spec.answers is None or label in classes)
        if not known or not all(isinstance(text, str) for text in texts):
            columns = ", ".join(spec.columns)
            wanted = f"texts {columns} and a label" + (f" from 0 to {len(classes) - 1}" if classes else "")
            raise InputError(f"{task}: example {index} of the split {split} is {example}; needed are {wanted}")
    if not examples:
        raise InputError(f"{task}: the split {split} in {repo.where} has no examples")
    return examples[:count]


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a JSON file with a model's configuration: {one_line(error)}") from error
