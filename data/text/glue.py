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
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from data.files import InputError
from data.paper import hub
from data.paper.hub import Repository, repository
from data.paper.suite import ADAPTATION, TRAINING, refuse_twins
from data.processes import progress, say
from data.suite import Batch, Suite, accuracy_of, padded, run


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
# Methods to which heads of their own, a regression or answers in words leave no meaning.
SENSELESS = ("Fisher Merging", "Simple Ensemble", "Traditional MTL")


def roberta_glue_suite(arguments: argparse.Namespace) -> Suite:
    from data.text import models

    base, fine = (repository(name, "model", arguments.hub) for name in ("roberta-base", FACTS["roberta experts"]))
    files = {task: (fine, fine.first(*hub.WEIGHT_FILES, folder=f"{task}/")) for task in arguments.tasks}

    def head(task: str, _: Tokenizer, *source) -> nn.Module:
        return models.roberta_head(*source, outputs=len(GLUE[task].answers or ["a number"]))

    def example(task: str, row: dict) -> tuple:
        texts = tuple(row[name] for name in GLUE[task].columns)
        return texts if len(texts) > 1 else texts[0], row["label"]

    suite, _ = glue_suite(arguments, base, files, models.roberta, head, example, longest=128)
    suite.metrics = {task: METRICS[GLUE[task].metric] for task in suite.tasks}
    suite.note = note(suite.tasks, "; ".join(f"{task}: {GLUE[task].metric}" for task in suite.tasks))
    suite.features = lambda tower, batch: models.mean_state(tower.encoder, batch)
    return suite


def flan_t5_glue_suite(arguments: argparse.Namespace) -> Suite:
    from data.text import models

    base = repository("google/flan-t5-base", "model", arguments.hub)
    repos = {t: repository(f"tanganke/flan-t5-base_glue-{t}", "model", arguments.hub) for t in arguments.tasks}
    files = {task: (repo, repo.first(*hub.WEIGHT_FILES)) for task, repo in repos.items()}

    def head(task: str, tokenizer: Tokenizer, *_) -> nn.Module:
        answers = GLUE[task].answers or ["1", "5"]  # of a regression, a head that nobody asks
        first = [tokenizer.encode(text).ids[0] for text in answers]
        if task not in REGRESSIONS and len(set(first)) < len(first):
            raise InputError(f"{task}: {', '.join(answers)} begin with the same token: there is no entropy to minimise")
        return models.FirstAnswers(first)

    def example(task: str, row: dict) -> tuple:
        label = float(f"{row['label']:.1f}") if task in REGRESSIONS else row["label"]  # as it was to be answered
        return GLUE[task].prompt.format(**row), label

    def answer(task: str, tower: nn.Module, batch: Batch) -> Tensor:
        texts = tokenizer.decode_batch(run(tower, {**batch, "whole": True}).tolist())  # without special tokens
        return torch.tensor([understood(task, text) for text in texts])

    suite, tokenizer = glue_suite(arguments, base, files, models.t5, head, example, longest=512)
    suite.metrics, suite.answer = {task: spearman for task in suite.tasks if task in REGRESSIONS}, answer
    suite.note = note(suite.tasks, "the share of exactly matching answers, in per cent; stsb: Spearman")
    suite.features = lambda tower, batch: models.mean_state(tower.t5.encoder, batch)
    return suite


def note(tasks: list[str], figures: str) -> str:
    """What a reader of the table has to know."""
    why = "is a regression, about which entropy says nothing: it is merged, but not adapted to. "
    return "".join(f"{task} {why}" for task in REGRESSIONS if task in tasks) + f"Figures are {figures}."


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
    base: Repository,
    files: dict[str, tuple[Repository, str]],
    tower: Callable,
    head: Callable,
    example: Callable,
    longest: int,
) -> tuple[Suite, Tokenizer]:
    """The suite of the base model and of the experts in these files, by task, and their tokenizer.

    `tower` takes config, weights and their file, `head` a task and the tokenizer, too; `example` makes of a task and
    its row of the data set what is tokenised, up to the `longest`, and a label.
    """
    from data.text import models

    device = torch.device(arguments.device)
    files = {"": (base, base.first(*hub.WEIGHT_FILES)), **files}
    announce(arguments, [(base, "config.json"), (base, "tokenizer.json"), *files.values()])
    path = base.fetch("config.json")
    with hub.refusing(f"{path} is not a JSON file with a model's configuration"):
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    tokenizer = models.read_tokenizer(base.fetch("tokenizer.json"))
    towers, heads = {}, {}
    with progress(files.items(), "Models") as items:
        for task, (repo, file) in items:
            path = repo.fetch(file)
            source = config, hub.read_weights(path), path
            towers[task] = tower(*source).requires_grad_(False)
            if task:
                heads[task] = head(task, tokenizer, *source).to(device)

    def load(task: str, split: str, count: int | None) -> tuple[Tensor, Tensor]:
        rows = read_examples(arguments, task, split, count)
        texts, labels = zip(*(example(task, row) for row in rows))
        return models.tokenise(tokenizer, texts, longest), torch.tensor(labels)

    test = {task: load(task, "test", arguments.limit) for task in arguments.tasks}
    pretrained = towers.pop("")
    refuse_twins(pretrained.state_dict(), {task: expert.state_dict() for task, expert in towers.items()})
    whole = all(len(labels) == GLUE[task].examples for task, (_, labels) in test.items())
    suite = Suite(
        name=arguments.suite,
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or "float32",
        training=TRAINING,
        adaptation=ADAPTATION.changed(arguments.steps, arguments.adapt_precision),
        pretrained=pretrained,
        heads=heads,
        test=test,
        load=load,
        normalise=partial(padded, padding=tokenizer.token_to_id("<pad>")),
        experts=towers,
        published=published_rows(arguments.suite) if whole and arguments.tasks == list(GLUE) else {},
        unadapted=REGRESSIONS,
    )
    return suite, tokenizer


def published_rows(suite: str) -> dict[str, dict]:
    """Method -> figures by task. Those of merged RoBERTas were published as shares, of settings that are not ours."""
    facts = FACTS["published"][suite]
    figures = dict(facts["figures"])
    for name, shares in facts["shares of the individual models' figures"].items():
        figures[name] = [own * share / 100 for own, share in zip(figures["Individual"], shares)]
    return {
        name: {
            "method": name,
            "source": facts["source"],
            "accuracy": dict(zip(GLUE, row)),
            "claimed": name in facts["claimed"],
        }
        for name, row in figures.items()
    }


# ---- Metrics, in per cent: predictions (N,), labels (N,) -> a number. What is not defined (0 / 0) counts 0 -----------


def f1(predicted: Tensor, labels: Tensor) -> float:
    """The harmonic mean of precision and recall of class 1."""
    found, there = predicted == 1, labels == 1
    total = (found.sum() + there.sum()).item()
    return 100 * 2 * (found & there).sum().item() / total if total else 0.0


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation; of two classes, the numbers 0 and 1, it is Matthews'."""
    return 100 * torch.corrcoef(torch.stack([predicted, labels]).double())[0, 1].nan_to_num().item()


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Pearson's correlation of ranks; of equal values, the mean of their ranks."""
    return pearson(ranks(predicted), ranks(labels))


def ranks(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


METRICS = {
    "accuracy": accuracy_of,
    "matthews": pearson,
    "accuracy and F1": lambda predicted, labels: (accuracy_of(predicted, labels) + f1(predicted, labels)) / 2,
    "Pearson and Spearman": lambda predicted, labels: (pearson(predicted, labels) + spearman(predicted, labels)) / 2,
}


# ---- Files -----------------------------------------------------------------------------------------------------------


def shards(arguments: argparse.Namespace, task: str, split: str) -> list[tuple[Repository, str]]:
    repo = repository("nyu-mll/glue", "dataset", arguments.hub)
    return [(repo, file) for file in hub.shards(repo, task, split, GLUE[task].split)]


def announce(arguments: argparse.Namespace, needed: list[tuple[Repository, str]]) -> None:
    """Say how much a run downloads, the data sets too, and raise InputError if there is no room for it."""
    for task, split in product(arguments.tasks, ("test", *arguments.splits)):
        needed = needed + shards(arguments, task, split)
    size = sum((repo.bytes_of(file) for repo, file in needed), Counter())
    say(f"{arguments.suite}: {size['download'] / 1e9:.1f} GB to download")
    hub.check_space(size, arguments.cache)


def read_examples(arguments: argparse.Namespace, task: str, split: str, count: int | None) -> list[dict]:
    """The first so many examples of a split, or all: its texts by column, and `label`. Raises InputError."""
    spec, examples, files = GLUE[task], [], shards(arguments, task, split)
    for repo, file in files:
        path = repo.fetch(file)
        with hub.refusing(f"{task}: {path} is not a readable parquet file"):
            examples += pq.read_table(path, columns=[*spec.columns, "label"]).to_pylist()
    classes = range(len(spec.answers or ()))
    for index, example in enumerate(examples):
        label = example.get("label")
        known = label in classes if classes else isinstance(label, int | float)
        if not known or not all(isinstance(example.get(name), str) for name in spec.columns):
            wanted = f"texts {', '.join(spec.columns)} and a label" + (f" from 0 to {classes[-1]}" if classes else "")
            raise InputError(f"{task}: example {index} of the split {split} is {example}; needed are {wanted}")
    if not examples:
        raise InputError(f"{task}: the split {split} in {repo.where} has no examples")
    return examples[:count]
