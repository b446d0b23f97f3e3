"""GLUE as a suite, twice: RoBERTa with a head of its own for each task, and Flan-T5, which answers in words.

Models and data sets come from the hub, or from a mirror in which every repository is a folder of its own name.
"""

import json
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from datasets import load_dataset
from pandas import DataFrame
from torch import Tensor, nn

from data.paper.authors import reading
from data.paper.hub import ADAPTATION, TRAINING, files_of
from data.run import progress
from data.suite import Batch, Suite, accuracy_of, padded, run
from data.text.routing import route_texts

FACTS = json.loads(Path(__file__).with_name("glue.json").read_text(encoding="utf-8"))
GLUE: dict[str, dict] = FACTS["tasks"]
REGRESSIONS = tuple(task for task in GLUE if not GLUE[task]["classes"])
SENSELESS = ("Fisher Merging", "Simple Ensemble", "Traditional MTL")  # where heads, or answers, are a task's own


def glue_suite(name: str, tasks: list[str], *, seed, device, precision, steps, cache, workers, hub, limit) -> Suite:
    """The suite "roberta-glue" or "flan-t5-glue". Raises ValueError for what cannot be used."""
    facts, adaptation, in_words = FACTS["suites"][name], ADAPTATION.with_steps(steps), name == "flan-t5-glue"
    transformers.logging.set_verbosity_error()  # of weights that are not used, or tied in another way than it says
    transformers.logging.disable_progress_bar()
    places, most = repositories(facts, tasks, hub), min(filter(None, (facts["rows"], limit)), default=None)
    with reading(f"the tokenizer of {facts['base']}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(places[""][0])

    def load(task: str, split: str, count: int | None) -> tuple[Tensor, Tensor]:
        rows = examples(task, split, hub, cache, most if split == "test" else count)
        texts, labels = [[row[column] for row in rows] for column in GLUE[task]["columns"]], [r["label"] for r in rows]
        if in_words:
            texts = [[GLUE[task]["prompt"].format(**row) for row in rows]]
            labels = [round(label, 1) for label in labels]  # as they were to be answered
        how = {"truncation": True, "max_length": facts["longest"], "padding": True, "return_tensors": "pt"}
        return tokenizer(*texts, **how).input_ids, torch.tensor(labels)

    test = {task: load(task, "test", None) for task in tasks}
    made = {t: (flan_t5 if in_words else roberta)(t, p, tokenizer) for t, p in progress(places.items(), "Models")}
    usual = {task: min(facts["rows"] or spec["examples"], spec["examples"]) for task, spec in GLUE.items()}
    whole = {task: len(labels) for task, (_, labels) in test.items()} == usual
    metrics = {task: facts["metrics"].get(task, "accuracy") for task in tasks}
    figures = ", ".join(f"{metric} ({task})" for task, metric in metrics.items())
    why = "stsb is a regression, about which entropy says nothing: it is merged, but not adapted to. "
    return Suite(
        **{"name": name, "seed": seed, "device": torch.device(device), "precision": precision or "float32"},
        training=TRAINING,
        adaptation=adaptation,
        pretrained=made[""][0],
        experts={task: made[task][0] for task in tasks},
        heads={task: made[task][1].to(device) for task in tasks},
        test=test,
        load=load,
        normalise=partial(padded, padding=tokenizer.pad_token_id),
        origin=f"{hub} {limit}",
        source=facts["source"] if whole else None,
        published=tuple({"source": facts["source"], "margin": None, **row} for row in facts["published"] if whole),
        claimable=whole,
        shortened=adaptation != ADAPTATION,
        unadapted=REGRESSIONS,
        prepare=route_texts,
        metrics={task: partial(measured, metric.split(" and ")) for task, metric in metrics.items()},
        answer=partial(answer, tokenizer) if in_words else None,
        statistics=(lambda tower, batch: run(tower, {**batch, "whole": True})) if in_words else None,
        note=why * ("stsb" in tasks) + f"Figures: {figures}.",
    )


roberta_glue_suite, flan_t5_glue_suite = (partial(glue_suite, name) for name in FACTS["suites"])

# ---- RoBERTa: token ids (B, N) and their mask (B, N) -> the first token's last state (B, D) -> logits (B, C) ---------


def roberta(task: str, place: tuple[str, str], _) -> tuple[nn.Module, nn.Module | None]:
    """The expert's tower and head; of the task "" the pre-trained tower alone."""
    if not task:
        return first_token(read(transformers.AutoModel, *place, add_pooling_layer=False)), None
    model = read(transformers.RobertaForSequenceClassification, *place, num_labels=len(GLUE[task]["classes"]) or 1)
    order, last = class_order(task, model.config.id2label), model.classifier.out_proj
    last.weight.data, last.bias.data = last.weight[order], last.bias[order]
    return first_token(model.roberta), nn.Sequential(nn.Unflatten(1, (1, -1)), model.classifier)  # it takes (B, N, D)


def first_token(encoder: nn.Module) -> nn.Module:
    """Let a RobertaModel give its last state of the first token, and have its MLPs routed: each a module `mlp`."""
    for layer in encoder.encoder.layer:  # where an MLP's two linear layers lie apart
        mlp = nn.Sequential(layer.intermediate, layer.output.dense)
        layer.intermediate, layer.output.dense = nn.Sequential(OrderedDict(mlp=mlp)), nn.Identity()
    encoder.register_forward_hook(lambda _, inputs, output: output.last_hidden_state[:, 0])
    return encoder


def class_order(task: str, names: dict[int, str]) -> list[int]:
    """A model's number for each class of GLUE, by the names that it has for them, or else by number."""
    known = GLUE[task]["classes"] or ["0"]
    given = [re.sub("[^a-z0-9]+", "_", names[number].lower()).removeprefix("label_") for number in sorted(names)]
    by_number = not GLUE[task]["classes"] or sorted(given) == [str(i) for i in range(len(known))]
    if not by_number and sorted(given) != sorted(known):
        raise ValueError(f"{task}: an expert's config.json calls its classes {dict(names)}; known are {known}")
    return [given.index(str(i) if by_number else name) for i, name in enumerate(known)] if known != ["0"] else [0]


# ---- Flan-T5: token ids and their mask -> logits of the answer's first token (B, V) -> of its classes (B, C) ---------


class Answering(nn.Module):
    """A T5's logits of the answer's first token; `whole`: the answer itself, (B, 10)."""

    def __init__(self, t5: nn.Module):
        super().__init__()
        self.t5 = t5

    def forward(self, input_ids: Tensor, attention_mask: Tensor, whole: bool = False) -> Tensor:
        if whole:
            ids = self.t5.generate(input_ids, attention_mask=attention_mask, max_length=10, do_sample=False)
            return F.pad(ids, (0, 10 - ids.shape[1]), value=self.t5.config.pad_token_id)
        start = input_ids.new_full((len(input_ids), 1), self.t5.config.decoder_start_token_id)
        return self.t5(input_ids, attention_mask, decoder_input_ids=start, use_cache=False).logits[:, 0]


def flan_t5(task: str, place: tuple[str, str], tokenizer) -> tuple[nn.Module, nn.Module]:
    """The expert's tower, and a head that picks from its logits those of the tokens with which answers begin."""
    tower = Answering(read(transformers.T5ForConditionalGeneration, *place))
    first = [tokenizer(text).input_ids[0] for text in GLUE[task]["answers"]] if task else []
    head = nn.Linear(tower.t5.config.vocab_size, len(first), bias=False).requires_grad_(False)
    head.weight.copy_(F.one_hot(torch.tensor(first, dtype=torch.long), head.in_features))
    return tower, head


def answer(tokenizer, task: str, tower: nn.Module, batch: Batch) -> Tensor:
    texts = tokenizer.batch_decode(run(tower, {**batch, "whole": True}), skip_special_tokens=True)
    return torch.tensor([understood(task, text) for text in texts])


def understood(task: str, text: str) -> float:
    """The class of an answer, -1 for none of them; of a regression the number, 0 if it is none."""
    if task in REGRESSIONS:
        return float(text) if re.fullmatch(r"\s*-?(\d+\.?\d*|\.\d+)\s*", text) else 0.0
    return float(GLUE[task]["answers"].index(text)) if text in GLUE[task]["answers"] else -1.0


def measured(metrics: list[str], predicted: Tensor, labels: Tensor) -> float:
    """The mean of these metrics in per cent, of predictions (N,) and labels (N,). What is not defined (0 / 0) is 0."""
    pair = DataFrame({"x": predicted.double(), "y": labels.double()})
    values = {
        "accuracy": accuracy_of(predicted, labels),
        "F1": 200 * (predicted * labels).sum().item() / max(1, (predicted + labels).sum().item()),  # of class 1
        **dict.fromkeys(("Pearson", "Matthews"), 100 * pair.corr().x.y),  # of the classes 0 and 1, they are the same
        "Spearman": 100 * pair.corr("spearman").x.y,
    }
    return float(sum(values[metric] for metric in metrics if values[metric] == values[metric]) / len(metrics))


def repositories(facts: dict, tasks: list[str], hub: Path | None) -> dict[str, tuple[str, str]]:
    """Where a suite's models are, as repository and folder, by task ("": the pre-trained one)."""
    names = {"": facts["base"], **{task: facts["experts"].format(task=task) for task in tasks}}
    needed = dict.fromkeys([*names.values(), FACTS["data"]])
    if hub and (lacking := [name for name in needed if not any(map(Path.is_file, (hub / name).rglob("*")))]):
        how = f"`hf download NAME --local-dir {hub}/NAME` gets each ({FACTS['data']} with --repo-type dataset)"
        raise ValueError(f"the mirror {hub} lacks {', '.join(lacking)}: {how}")
    return {t: (f"{hub}/{n}" if hub else n, facts["folder"].format(task=t) * bool(t)) for t, n in names.items()}


def read(kind: type, source: str, folder: str, **options) -> nn.Module:
    """A model of transformers, to be evaluated, in float32."""
    with reading(f"{source} {folder}".strip()):
        options |= {"subfolder": folder, "output_loading_info": True, "dtype": torch.float32}
        model, found = kind.from_pretrained(source, **options)
        if found["missing_keys"]:
            raise ValueError(f"it lacks {', '.join(sorted(found['missing_keys'])[:5])}")
    return model.eval().requires_grad_(False)


def examples(task: str, split: str, hub: Path | None, cache: Path, count: int | None) -> list[dict]:
    """The first so many rows of a split, or all: texts by column, and `label`."""
    spec = GLUE[task]
    pattern = f"{task}/{spec['split'] if split == 'test' else split}-*.parquet"
    with reading(f"{pattern} of {FACTS['data']}"):
        files = [str(file) for file in files_of(FACTS["data"], "dataset", hub, pattern)]
        rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(cache / "datasets"))
        rows = rows.select_columns([*spec["columns"], "label"]).select(range(min(len(rows), count or len(rows))))
        wrong = [x for x in rows["label"] if not (x in range(len(spec["classes"])) if spec["classes"] else x >= 0)]
        if wrong:
            raise ValueError(f"a label is {wrong[0]}, where {spec['classes'] or 'numbers from 0'} are needed")
    return rows.to_list()
