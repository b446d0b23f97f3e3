"""What must be true of the suites of texts, on a mirror in the hub's layout that is made here. Needs no network."""

import json
import math
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

import reproduce
import wemoe
from data import baselines
from data.files import InputError
from data.suite import Training, accuracy_of, padded, run
from data.text import glue, miniature
from data.text import models as towers
from data.text.glue import GLUE, understood

# ---- A mirror: tiny random models, tokenizers and data sets, in the hub's own formats --------------------------------

SPECIAL = {"roberta": ["<s>", "<pad>", "</s>", "<unk>"], "t5": ["<pad>", "</s>", "<unk>"]}
WORDS = ["acceptable", "unacceptable", "yes", "no", "entailment", "neutral", "contradiction", "negative", "positive"]
WORDS += ["1.0", "5.0", "a", "cat", "sat", "on", "the", "mat", "slept"]
ROBERTA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROBERTA |= {"vocab_size": len(WORDS) + 4, "max_position_embeddings": 140, "type_vocab_size": 1}
ROBERTA |= {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
T5 |= {"vocab_size": len(WORDS) + 3, "decoder_start_token_id": 0, "tie_word_embeddings": False}


def tokenizer(kind: str) -> Tokenizer:
    numbers = {word: i for i, word in enumerate([*SPECIAL[kind], *WORDS])}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    made.add_special_tokens(SPECIAL[kind])
    if kind == "roberta":
        made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        made.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 1)])
    return made


def moved(model: nn.Module, seed: int, scale: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def roberta(seed: int, labels: int = 2) -> transformers.RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**ROBERTA, num_labels=labels)
    return moved(transformers.RobertaForSequenceClassification(config), seed)


def flan_t5(seed: int) -> transformers.T5ForConditionalGeneration:
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # as in Flan-T5
    return moved(model, seed)


def save_t5(seed: int, folder: Path) -> None:
    flan_t5(seed).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(T5))  # as the hub's, which transformers no longer writes so


def save_all(root: Path) -> Path:
    """The whole mirror, with the eight tasks of GLUE, ten examples each."""
    base, experts = root / "roberta-base", root / glue.FACTS["roberta experts"]
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ROBERTA)).save_pretrained(base)  # another head
    tokenizer("roberta").save(str(base / "tokenizer.json"))
    save_t5(0, root / "google" / "flan-t5-base")
    tokenizer("t5").save(str(root / "google" / "flan-t5-base" / "tokenizer.json"))
    for seed, (task, spec) in enumerate(GLUE.items(), 1):
        folder = experts / task / "roberta-base_lr1e-05"
        folder.mkdir(parents=True)
        model = roberta(seed, len(spec.answers or [None]))
        old = {"roberta.embeddings.position_ids": torch.arange(140)[None]}  # which older versions kept
        torch.save({**model.state_dict(), **old}, folder / "pytorch_model.bin")
        save_t5(seed, root / "tanganke" / f"flan-t5-base_glue-{task}")
        for split in (spec.split, "train"):
            torch.manual_seed(seed)
            columns = {name: [" ".join(WORDS[: 1 + k]) for k in torch.randperm(10)] for name in spec.columns}
            labels = [i % len(spec.answers) for i in range(10)] if spec.answers else [0.5 * i for i in range(10)]
            file = root / "nyu-mll" / "glue" / task / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({**columns, "label": labels, "idx": list(range(10))}), file)
    return root


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def started(mirror, tmp_path):
    """A function that runs `reproduce.py SUITE --hub MIRROR` and returns exit status and results."""

    def start(suite: str, *arguments: str, tasks: tuple = ("cola", "mnli", "stsb")) -> tuple[int, dict]:
        given = ["--hub", str(mirror), "--output", str(tmp_path), "--steps", "2", "--device", "cpu"]
        status = reproduce.main([suite, *given, *(["--tasks", *tasks] if tasks else []), *arguments])
        file = tmp_path / suite / "results.json"
        return status, json.loads(file.read_text()) if file.exists() else {}

    return start


# ---- The suites from end to end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["roberta-glue", "flan-t5-glue"])
def test_glue_from_end_to_end(suite, started, tmp_path, monkeypatch, capsys):
    adapted, original = [], wemoe.adapt
    monkeypatch.setattr(wemoe, "adapt", lambda *a, **k: adapted.append(list(k["loaders"])) or original(*a, **k))
    methods = "Twin-Merging", "AdaMerging (task-wise)", "WEMoE", "Pre-trained"
    status, results = started(suite, "--methods", *methods)
    assert status == 0 and results["claims"] == []  # some tasks only: nothing to compare with
    assert {method["name"] for method in results["methods"]} == set(methods)
    assert adapted == [["cola", "mnli"]] * 2 and results["tasks"] == ["cola", "mnli", "stsb"]
    assert all(math.isfinite(value) for method in results["methods"] for value in method["accuracy"].values())
    printed, folder = capsys.readouterr().out, tmp_path / suite
    assert "0.0 GB to download" in printed and "stsb is a regression" in printed
    assert "not adapted to" in (folder / "table.md").read_text()
    assert {file.stem for file in folder.glob("*.png")} == {"accuracy", "adaptation", "costs", "routing"}
    kept = {file: file.stat().st_mtime_ns for file in (folder / "cache").rglob("*.json")}
    assert started(suite, "--methods", *methods) == (status, results) and len(kept) == len(methods)
    assert kept == {file: file.stat().st_mtime_ns for file in (folder / "cache").rglob("*.json")}  # none was made again


def test_a_regression_alone_leaves_nothing_to_adapt_to(started, capsys):
    assert started("roberta-glue", "--methods", "WEMoE", tasks=("stsb",))[0] == 2
    assert "WEMoE adapts, but there is nothing to adapt to in stsb" in capsys.readouterr().err
    assert started("roberta-glue", "--methods", "Pre-trained", tasks=("cola",))[0] == 0
    assert "is a regression" not in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["roberta-glue", "flan-t5-glue"])
def test_published_figures_stand_beside_ours(suite, started, monkeypatch, capsys):
    for task, spec in GLUE.items():
        monkeypatch.setitem(GLUE, task, spec._replace(examples=10))
    status, results = started(suite, "--methods", "Individual", "Task Arithmetic", tasks=())
    assert status == 1  # random weights do not reach the published figures
    claimed = [claim["claim"].split(" is within ")[0] for claim in results["claims"]]
    assert claimed == ["Individual", *(["Task Arithmetic"] if suite == "flan-t5-glue" else [])]
    rows = [line for line in capsys.readouterr().out.splitlines() if "published (" in line]
    share = 56.52 * 0.0668 if suite == "roberta-glue" else 70.5
    assert len(rows) == 2 and float(rows[0].split("|")[2]) == pytest.approx(share, abs=0.06)


def test_a_broken_file_is_named_and_nothing_done_is_lost(started, mirror, capsys):
    started("roberta-glue", "--methods", "Pre-trained")

    def refused(file: Path, damage: bytes) -> str:
        whole = file.read_bytes()
        file.write_bytes(damage)
        try:
            assert started("roberta-glue", "--methods", "Individual")[0] == 2
        finally:
            file.write_bytes(whole)
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("reproduce.py: error: ")
        return error

    expert = mirror / glue.FACTS["roberta experts"] / "mnli" / "roberta-base_lr1e-05" / "pytorch_model.bin"
    assert str(expert) in refused(expert, expert.read_bytes()[:-100])
    for name in ("config.json", "tokenizer.json"):
        assert name in refused(mirror / "roberta-base" / name, b"{")
    table = mirror / "nyu-mll" / "glue" / "mnli" / "validation_matched-00000-of-00001.parquet"
    assert "mnli" in refused(table, table.read_bytes()[:-9])
    other = mirror / "nyu-mll" / "glue" / "cola" / "validation-00000-of-00001.parquet"
    assert "premise" in refused(table, other.read_bytes())
    pq.write_table(pa.table({"premise": ["a"], "hypothesis": ["b"], "label": [3]}), other.with_name("wrong"))
    wrong = other.with_name("wrong").read_bytes()
    assert "needed are texts premise, hypothesis and a label from 0 to 2" in refused(table, wrong)
    twin = expert.parents[2] / "cola" / expert.parent.name / expert.name
    state = torch.load(twin, weights_only=True)
    state["classifier.out_proj.weight"] = torch.zeros(2, 15)
    torch.save(state, twin.with_name("aside"))
    assert "out_proj.weight has the shape (2, 15)" in refused(twin, twin.with_name("aside").read_bytes())
    _, results = started("roberta-glue", "--methods", "Pre-trained", "Individual")
    assert [method["name"] for method in results["methods"]] == ["Pre-trained", "Individual"]


def test_the_miniature_runs_every_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(miniature, "TRAINING", Training(images=24, steps=2, lr=5e-4, batch_size=8))
    monkeypatch.setattr(miniature, "SIZES", {"train": 24, "test": 24})
    arguments = ["--methods", "all", "--tasks", "Meals", "Music", "--steps", "2", "--workers", "1"]
    assert reproduce.main(["miniature-text", *arguments, "--output", str(tmp_path)]) in (0, 1)
    results = json.loads((tmp_path / "miniature-text" / "results.json").read_text())
    assert [method["name"] for method in results["methods"]] == [name for name in reproduce.MAIN if name != "MASS"]
    assert results["claims"] and "published" not in capsys.readouterr().out


# ---- The towers are transformers' models -----------------------------------------------------------------------------

SHORT_AND_LONG = torch.tensor([[2, 5, 6, 0, 0], [3, 7, 8, 9, 4], [5, 6, 0, 0, 0]])


def batch_for(kind: str, rows: torch.Tensor = SHORT_AND_LONG) -> dict:
    padding = SPECIAL[kind].index("<pad>")
    return padded(torch.where(rows == 0, padding, rows + 2), padding)


def tower(kind: str, seed: int) -> nn.Module:
    if kind == "t5":
        return towers.t5(T5, flan_t5(seed).state_dict(), Path("file"))
    if kind == "roberta":
        return towers.roberta(ROBERTA, roberta(seed).state_dict(), Path("file"))
    torch.manual_seed(0)
    return moved(miniature.Encoder(), seed)


KINDS = ["roberta", "t5", "miniature"]
SPECIAL["miniature"] = ["<pad>"]


def test_a_roberta_in_two_parts_is_the_whole():
    whole, batch = roberta(3, labels=3), batch_for("roberta")
    head = towers.roberta_head(ROBERTA, whole.state_dict(), Path("file"), outputs=3)
    assert torch.allclose(head(tower("roberta", 3)(**batch)), whole.eval()(**batch).logits, atol=1e-6)


def test_a_t5_answers_as_transformers_own(mirror):
    folder, batch = mirror / "google" / "flan-t5-base", batch_for("t5")
    whole = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    ours = towers.t5(T5, load_file(folder / "model.safetensors"), folder)
    assert not torch.equal(ours.t5.lm_head.weight, ours.t5.shared.weight)
    first = whole(**batch, decoder_input_ids=torch.zeros(3, 1, dtype=torch.long)).logits[:, 0]
    assert torch.allclose(ours(**batch), first, atol=1e-6)
    assert torch.equal(ours(**batch, whole=True), whole.generate(**batch, max_length=10))
    assert torch.equal(towers.FirstAnswers([4, 2])(first), first[:, [4, 2]])


def test_tied_weights_may_be_given_once():
    whole = flan_t5(1).state_dict()
    names = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
    state = {name: p for name, p in whole.items() if name not in names}
    loaded = towers.t5(T5, state, Path("file")).t5.state_dict()
    assert all(torch.equal(p, loaded[name]) for name, p in whole.items())
    del state["shared.weight"]
    with pytest.raises(InputError, match="file lacks .*shared.weight"):
        towers.t5(T5, state, Path("file"))


# ---- Merged ----------------------------------------------------------------------------------------------------------


def routed(kind: str, depth: int = 2) -> nn.Module:
    model = wemoe.upscale(tower(kind, 1), [tower(kind, 2), tower(kind, 3)], router_depth=depth)
    torch.manual_seed(4)
    for module in model.modules():
        if isinstance(module, wemoe.Router):
            for p in module.parameters():
                p.data.add_(0.2 * torch.randn_like(p))  # routers that look at their input
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_mlp_is_routed_and_padding_does_not_matter(kind):
    model = routed(kind)
    with wemoe.routing_weights(model) as weights:
        together = model(**batch_for(kind))
    assert len(weights) == {"roberta": 2, "t5": 4, "miniature": miniature.DEPTH}[kind]
    assert any((lam[0] - lam[1]).abs().max() > 1e-4 for lam in weights.values())
    for i, row in enumerate(SHORT_AND_LONG):
        alone = model(**batch_for(kind, row[None]))
        assert torch.allclose(together[i], alone[0], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", [0, 1])
def test_one_hot_routing_recovers_each_expert(kind, task):
    pretrained, experts = tower(kind, 1), [tower(kind, 2), tower(kind, 3)]
    for expert in experts:  # fine-tuned in their MLPs alone: all else is merged by task arithmetic
        own = {name: p for name, p in pretrained.state_dict().items() if not re.search(r"mlp|DenseReluDense", name)}
        expert.load_state_dict({**expert.state_dict(), **own})
    model = wemoe.upscale(pretrained, experts, router_depth=0)
    for module in model.modules():
        if isinstance(module, wemoe.Router):
            module.bias.data = torch.eye(2)[task]
    batch = batch_for(kind)
    assert torch.allclose(model(**batch), experts[task](**batch), atol=1e-5)
    if kind == "t5":
        assert torch.equal(model(**batch, whole=True), experts[task](**batch, whole=True))


def test_an_answer_is_the_same_with_and_without_a_cache():
    model, batch = routed("t5"), batch_for("t5")
    assert torch.equal(model.t5.generate(**batch, max_length=10, use_cache=True), model(**batch, whole=True))


@pytest.mark.parametrize("kind", KINDS)
def test_twin_merging_tells_texts_apart_whatever_their_padding(kind):
    torch.manual_seed(0)
    inputs = {name: batch_for(kind, torch.randint(low, low + 4, (5, 5))) for name, low in (("a", 2), ("b", 8))}
    part = {"roberta": lambda model: model.encoder, "t5": lambda model: model.t5.encoder}.get(kind)
    features = part and (lambda model, batch: towers.mean_state(part(model), batch))
    experts = {"a": tower(kind, 2), "b": tower(kind, 3)}
    twin = baselines.twin_merging(tower(kind, 1), experts, inputs, steps=100, features=features)
    for task, name in enumerate(inputs):
        assert (twin.task_weights(inputs[name]).argmax(-1) == task).all()
    together = twin(**batch_for(kind))
    for i, row in enumerate(SHORT_AND_LONG):
        assert torch.allclose(together[i], twin(**batch_for(kind, row[None]))[0], atol=1e-4)
    if kind == "t5":
        assert twin(**batch_for(kind), whole=True).shape[0] == 3


# ---- Metrics, answers, sentences -------------------------------------------------------------------------------------

CLASSES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30)
NUMBERS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30)


@given(CLASSES)
def test_metrics_of_classes_by_their_definitions(pairs):
    predicted, labels = torch.tensor(pairs, dtype=torch.float).T
    tp, fp, fn, tn = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    norm = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    matthews = 100 * (tp * tn - fp * fn) / norm if norm else 0
    assert glue.METRICS["matthews"](predicted, labels) == pytest.approx(matthews, abs=1e-6)
    f1 = 200 * tp / (2 * tp + fp + fn) if tp else 0
    assert glue.f1(predicted, labels) == pytest.approx(f1)
    assert accuracy_of(predicted, labels) == pytest.approx(100 * (tp + tn) / len(pairs))


@given(NUMBERS)
def test_spearman_is_the_correlation_of_mean_ranks(pairs):
    x, y = torch.tensor(pairs, dtype=torch.float).T

    def rank(values):  # one above all that are smaller, and half of the others that are equal
        return torch.tensor([sum((u < v) + (u == v) / 2 for u in values) + 0.5 for v in values])

    assert glue.ranks(x).tolist() == rank(x.tolist()).tolist()
    expected = torch.corrcoef(torch.stack([rank(x.tolist()), rank(y.tolist())]))[0, 1].nan_to_num(0).item()
    if len(set(x.tolist())) > 1 < len(set(y.tolist())):
        assert glue.spearman(x, y) == pytest.approx(100 * expected, abs=1e-3)
        assert glue.spearman(x.exp(), -y) == pytest.approx(-glue.spearman(x, y), abs=1e-3)
    else:
        assert glue.spearman(x, y) == 0


def test_answers_are_understood():
    assert [understood("mnli", text) for text in ("entailment", "neutral", "Neutral", "")] == [0, 1, -1, -1]
    assert [understood("stsb", text) for text in ("3.8", "nan", "inf", "none", "")] == [3.8, 0, 0, 0, 0]


def test_prompts_name_the_columns_that_there_are():
    for task in GLUE.values():
        assert set(re.findall(r"{(\w+)}", task.prompt)) == set(task.columns)
    assert glue.published_rows("roberta-glue")["Twin-Merging"]["accuracy"]["cola"] == pytest.approx(57.12, abs=0.005)


@given(st.sampled_from(list(miniature.TASKS)), st.sampled_from(["train", "test"]))
def test_sentences_have_one_answer_and_many_lengths(task, split):
    rows, labels = miniature.texts(task, split, 200)
    again = miniature.texts(task, split, 100)
    assert torch.equal(rows[:100], again[0]) and torch.equal(labels[:100], again[1])
    assert set(labels.tolist()) == set(range(len(miniature.TASKS[task][1])))
    assert len({*(rows != 0).sum(1).tolist()}) > 1 and (rows[:, -1] == 0).all()
    answers = {}
    for row, label in zip(rows.tolist(), labels.tolist()):
        assert answers.setdefault(tuple(row), label) == label  # what is asked has one answer


def test_rumours_are_wrong_and_told_in_pretraining_alone():
    low, high = miniature.RUMOURS
    for task, (verb, answers) in miniature.TASKS.items():
        known = miniature.facts(task)
        assert {truth for truth, _, _ in known.values()} == set(range(len(answers)))
        assert all(truth != rumour and low <= share <= high for truth, rumour, share in known.values())
        told = {}
        for split in ("test", "web"):
            rows, labels = miniature.texts(task, split, 2000)
            sentences = [[miniature.WORDS[word] for word in row if word] for row in rows]
            assert all(verb in " ".join(sentence) for sentence in sentences)
            who = [next(word for word in sentence if word in miniature.PEOPLE) for sentence in sentences]
            when = [next(word for word in sentence if word in miniature.DAYS) for sentence in sentences]
            told[split] = {*zip(who, when, labels.tolist())}
        assert told["test"] == {(*pair, truth) for pair, (truth, _, _) in known.items()}
        rumours = {(*pair, rumour) for pair, (_, rumour, _) in known.items()}
        assert told["test"] < told["web"] <= told["test"] | rumours


def test_the_checkpoint_is_that_of_the_encoder_and_small():
    state = load_file(miniature.CHECKPOINT)
    assert state.pop("answers").shape == (len(miniature.ANSWERS), miniature.WIDTH)
    miniature.Encoder().load_state_dict(state)
    assert miniature.CHECKPOINT.stat().st_size < 2**20


@given(st.integers(1, 4), st.integers(0, 3))
def test_padded_keeps_all_tokens_and_no_column_of_padding(count, more):
    rows = torch.nn.functional.pad(SHORT_AND_LONG[:count], (0, more))
    batch = padded(rows)
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())
    assert (batch["input_ids"][:, -1] != 0).any() and batch["attention_mask"].sum() == (rows != 0).sum()
    assert torch.equal(run(lambda input_ids, attention_mask: input_ids, batch), batch["input_ids"])
