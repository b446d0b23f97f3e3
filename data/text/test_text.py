"""What must be true of texts: routers and padding, answers, GLUE on a mirror that is made here, the village."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import RobertaForSequenceClassification, T5ForConditionalGeneration

import wemoe
from data.run import adapt, evaluate
from data.suite import padded, run
from data.text import glue, miniature
from data.text.glue import GLUE, class_order, measured, understood
from data.text.routing import route_texts

WORDS = ["<pad>", "</s>", "<unk>", *dict.fromkeys(answer for spec in GLUE.values() for answer in spec["answers"]), "1"]
TOKENS = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
BERT = {**TOKENS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ROBERTA = {**BERT, "max_position_embeddings": 140, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {**TOKENS, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 2, "decoder_start_token_id": 0}
T5 |= {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
PLACES = {  # the pre-trained model, experts by task, and their class in transformers
    "roberta": ("roberta-base", "lu-vae/roberta-glue/{}/roberta-base_lr1e-05", RobertaForSequenceClassification),
    "t5": ("google/flan-t5-base", "tanganke/flan-t5-base_glue-{}", T5ForConditionalGeneration),
}


def made(kind, config, seed: int) -> nn.Module:
    torch.manual_seed(0)
    model = kind(config) if config else kind()
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model.eval()


def roberta(seed: int, **more) -> RobertaForSequenceClassification:
    return made(RobertaForSequenceClassification, transformers.RobertaConfig(**ROBERTA, **more), seed)


def flan_t5(seed: int) -> T5ForConditionalGeneration:
    model = made(T5ForConditionalGeneration, transformers.T5Config(**T5), seed)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.roll(1, 0))  # not tied, as in Flan-T5
    return model


def save_tokenizer(folder: Path) -> None:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    """All models and ten rows of each task; the expert of mnli numbers its classes as fairseq does."""
    root = tmp_path_factory.mktemp("hub")
    for seed, task in enumerate(["", *GLUE]):
        spec = GLUE.get(task, {"classes": [], "columns": [], "split": ""})
        place = {name: root / (folder.format(task) if task else base) for name, (base, folder, _) in PLACES.items()}
        named = {"id2label": dict(enumerate(map(str.upper, reversed(spec["classes"]))))}
        more = named if task == "mnli" else {"num_labels": max(1, len(spec["classes"]))}
        roberta(seed, **more).save_pretrained(place["roberta"])
        flan_t5(seed).save_pretrained(place["t5"])
        (place["t5"] / "config.json").write_text(json.dumps(T5))  # as the hub's: not tied
        columns = {name: [" ".join(WORDS[3 : 4 + k]) for k in torch.randperm(10)] for name in spec["columns"]}
        columns["label"] = [i % len(spec["classes"]) if spec["classes"] else 0.5 * i for i in range(10)]
        (root / "nyu-mll" / "glue" / task).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / "nyu-mll" / "glue" / task / f"{spec['split']}-00000-of-00001.parquet")
    for base, _, _ in PLACES.values():
        save_tokenizer(root / base)
    return root


def suite(name: str, mirror: Path, cache: Path, tasks=("cola", "mnli", "stsb"), **more):
    options = {"seed": 0, "device": "cpu", "precision": None, "steps": 2, "cache": cache, "workers": 1}
    make = glue.roberta_glue_suite if name == "roberta" else glue.flan_t5_glue_suite
    return make(list(tasks), **options | {"hub": mirror, "limit": None} | more)


ROWS = torch.tensor([[5, 8, 9, 0, 0], [6, 10, 11, 12, 7], [8, 9, 0, 0, 0]])
MADE = {
    "roberta": lambda seed: glue.first_token(roberta(seed).roberta),
    "t5": lambda seed: glue.Answering(flan_t5(seed)),
    "miniature": lambda seed: made(miniature.Encoder, None, seed),
    "llama": lambda seed: made(transformers.LlamaForCausalLM, transformers.LlamaConfig(**BERT), seed),
}


def routed(kind: str, prepare=route_texts) -> nn.Module:
    torch.manual_seed(0)
    model = wemoe.upscale(MADE[kind](1), [MADE[kind](2), MADE[kind](3)])
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        p.data.add_(0.3 * torch.randn_like(p))  # routers that look at their input
    return prepare(model)


@pytest.mark.parametrize("kind", list(MADE)[:3])
def test_a_text_is_the_same_alone_and_padded_in_a_batch(kind):
    model = routed(kind)
    with wemoe.routing_weights(model) as weights:
        together = model(**padded(ROWS))
    assert len(weights) == {"t5": 4, "miniature": 3, "roberta": 2}[kind]
    assert all((lam[0] - lam[1]).abs().max() > 1e-4 for name, lam in weights.items() if "decoder" not in name)
    for i, row in enumerate(ROWS):
        assert torch.allclose(together[i], model(**padded(row[None]))[0], atol=1e-4)
        assert torch.allclose(together[i], routed(kind, nn.Module.eval)(**padded(row[None]))[0], atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", list(MADE)[:2])
def test_activation_checkpoints_and_passes_between_change_no_gradient(kind, reentrant):
    def gradients(model: nn.Module) -> list[torch.Tensor]:
        loss = model(**padded(ROWS)).square().sum()
        model(**padded(ROWS.clamp(min=2)))  # with another mask
        loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    model, other = routed(kind).train(), routed(kind).train()
    inner = next(part for part in other.modules() if isinstance(part, transformers.PreTrainedModel))
    inner.activation_checkpointing_enable({"use_reentrant": reentrant})
    inner.enable_input_require_grads()
    for one, again in zip(gradients(model), gradients(other)):
        assert (one - again).norm() < 1e-4 * one.norm()


def generated(model: nn.Module, text: torch.Tensor, **more) -> list:
    options = {"attention_mask": (text != 0).long(), "min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    return model.generate(text, **options | more)[:, text.shape[1] :].tolist()


def test_a_prompt_is_answered_alike_in_a_batch_in_threads_by_copies_and_without_a_cache():
    model, short, long = routed("llama"), ROWS[:1, :3], ROWS[1:2]
    left = torch.cat([nn.functional.pad(short, (2, 0)), long])  # as prompts are padded
    expected, together = generated(model, short) + generated(model, long), Barrier(2)
    assert generated(model, left) == generated(model, left, use_cache=False) == expected
    loaded = routed("llama", nn.Module.eval)
    loaded.load_state_dict(model.state_dict())
    for used in (copy.deepcopy(model), route_texts(loaded), model):
        used.model.layers[0].register_forward_pre_hook(lambda *_: together.wait(9) < 0 or None)  # in every pass
        with ThreadPoolExecutor(2) as pool:
            answers = pool.map(generated, [used] * 2, left.split(1))
        assert [answer[0] for answer in answers] == expected
    assert torch.equal(*(routed("t5").t5.generate(**padded(ROWS), max_length=9, use_cache=on) for on in (True, False)))


def test_what_routers_cannot_see_is_refused_and_leaves_nothing():
    model, batch = routed("llama"), padded(ROWS)
    expected = model(**batch).logits
    for error, sentence, more in (
        (ValueError, r"tensor \(B, N\), not \(3, 1, 5, 5\)", {"attention_mask": torch.ones(3, 1, 5, 5)}),
        (ValueError, "packed in one row", {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}),
        (IndexError, "", {"input_ids": ROWS + 100}),
    ):
        with pytest.raises(error, match=sentence):
            model(**batch | more)
    model(**batch | {"position_ids": torch.tensor([[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0]])})  # of padding
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("name", PLACES)
def test_rows_are_those_of_plain_transformers(name, mirror, tmp_path):
    made, (base, folder, kind) = suite(name, mirror, tmp_path, GLUE), PLACES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(mirror / base)
    for task, spec in GLUE.items():
        table = pq.read_table(next((mirror / "nyu-mll" / "glue" / task).glob("validation*"))).to_pydict()
        texts, plain = [table[column] for column in spec["columns"]], kind.from_pretrained(mirror / folder.format(task))
        if name == "t5":
            texts = [[spec["prompt"].format(**dict(zip(spec["columns"], row))) for row in zip(*texts)]]
        inputs = tokenizer(*texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        batch = made.inputs(made.test[task][0])
        if name == "t5":
            answers = tokenizer.batch_decode(plain.eval().generate(**inputs, max_length=10), skip_special_tokens=True)
            expected, own = [understood(task, text) for text in answers], [WORDS.index(a) for a in spec["answers"]]
            first = plain(**inputs, decoder_input_ids=torch.zeros(10, 1, dtype=torch.long)).logits[:, 0, own]
            assert torch.allclose(made.logits(task)(run(made.experts[task], batch)), first, atol=1e-4)
        else:
            logits, names = plain.eval()(**inputs).logits, spec["classes"][:: -1 if task == "mnli" else 1]
            expected = [spec["classes"].index(names[i]) for i in logits.argmax(-1)] if names else logits[:, 0].tolist()
        found = made.predict(task, made.experts[task], batch)
        assert torch.allclose(found.float(), torch.tensor(expected).float(), atol=1e-4)
        assert made.test[task][1].tolist() == table["label"]
    assert not made.claimable and made.shortened and made.published == () and "stsb is a regression" in made.note
    assert "regression" not in suite(name, mirror, tmp_path, ["cola"], limit=9).note


@pytest.mark.parametrize("name", PLACES)
def test_glue_is_upscaled_rightly_and_adapted_to_but_for_the_regression(name, mirror, tmp_path):
    made = suite(name, mirror, tmp_path)
    batch = made.inputs(made.test["mnli"][0][:3])
    wemoe.verify(made.pretrained, made.experts, batch)
    model = made.prepare(wemoe.upscale(made.pretrained, made.experts))
    assert len(adapt(made, model, "WEMoE", steps=2, lr=1e-3)["entropy"]) == 2
    assert all(value == value for value in evaluate(made, model).values())
    if name == "t5":  # RegMean sees each token of whole answers once
        seen = []
        made.pretrained.t5.decoder.block[0].register_forward_hook(lambda _, args, y: seen.append(args[0].shape[1]))
        answers = made.statistics(made.pretrained, batch)
        assert answers.shape == (3, 10) and 9 >= sum(seen) > 1 and max(seen) == 1


def test_published_figures_are_of_the_same_rows(mirror, tmp_path, monkeypatch):
    for spec in GLUE.values():
        monkeypatch.setitem(spec, "examples", 10)
    for name, claimed in (("roberta", 1), ("t5", 5)):
        made = suite(name, mirror, tmp_path, GLUE, steps=None)
        assert made.claimable and not made.shortened and all(row["margin"] or row["why"] for row in made.published)
        assert sum(row["margin"] is not None for row in made.published) == claimed
        assert not suite(name, mirror, tmp_path, GLUE, limit=9).claimable


def test_what_cannot_be_used_is_said_in_a_sentence(mirror, tmp_path):
    with pytest.raises(ValueError, match="lacks roberta-base, lu-vae/roberta-glue, nyu-mll/glue: "):
        suite("roberta", tmp_path, tmp_path)
    expert, (table,) = mirror / PLACES["roberta"][1].format("cola"), (mirror / "nyu-mll" / "glue" / "mnli").iterdir()
    weights, config = expert / "model.safetensors", expert / "config.json"
    state = {name: p for name, p in load_file(weights).items() if "classifier" not in name}
    named = json.loads(config.read_text()) | {"id2label": {"0": "a", "1": "b"}}
    pq.write_table(pq.read_table(table).set_column(2, "label", pa.array([-1] * 10)), aside := mirror / "aside")
    for file, damage, sentence in (
        (weights, save(state), "it lacks classifier.dense.bias"),
        (config, json.dumps(named).encode(), "calls its classes {0: 'a', 1: 'b'}; known are"),
        (table, aside.read_bytes(), r"validation_matched-\*.parquet of nyu-mll/glue cannot be used: a label is -1"),
    ):
        whole = file.read_bytes()
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=sentence) as raised:
            suite("roberta", mirror, tmp_path)
        file.write_bytes(whole)
        assert "\n" not in str(raised.value)


def test_metrics_by_their_definitions():
    x, y = torch.tensor([1.0, 1, 0, 0, 1]), torch.tensor([1.0, 0, 0, 1, 1])  # TP, FP, FN, TN = 2, 1, 1, 1
    assert measured(["Matthews"], x, y) == pytest.approx(100 / 6)
    assert measured(["accuracy", "F1"], x, y) == pytest.approx((60 + 200 / 3) / 2)
    x, y = torch.tensor([1.0, 2, 2, 9]), torch.tensor([0.1, 3, 2, 4])  # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    assert measured(["Spearman"], x, y) == pytest.approx(450 / 22.5**0.5)
    assert measured(["Spearman", "Matthews", "F1"], 0 * x, y) == 0  # not defined


def test_classes_and_answers_go_by_their_names():
    assert class_order("mnli", {0: "contradiction", 1: "Neutral", 2: "ENTAILMENT"}) == [2, 1, 0]
    assert class_order("mrpc", {0: "equivalent", 1: "not equivalent"}) == [1, 0]
    assert [understood("mnli", text) for text in ("entailment", "neutral", "Neutral", "")] == [0, 1, -1, -1]
    assert [understood("stsb", text) for text in ("3.8", " 4", "nan", "inf", "none", "")] == [3.8, 4, 0, 0, 0, 0]


def test_sentences_have_one_answer_and_rumours_are_told_in_pretraining_alone():
    for task, (verb, _) in miniature.TASKS.items():
        told = {}
        for split in ("test", "web"):
            rows, labels = miniature.texts(task, split, 2000)
            sentences = [[miniature.WORDS[word] for word in row if word] for row in rows]
            assert all(verb in " ".join(sentence) for sentence in sentences) and len({*map(len, sentences)}) > 1
            pairs = [[next(w for w in s if w in of) for of in (miniature.PEOPLE, miniature.DAYS)] for s in sentences]
            told[split] = {(*pair, label) for pair, label in zip(pairs, labels.tolist())}
        truths, rumours = ({(*pair, fact[i]) for pair, fact in miniature.facts(task).items()} for i in (0, 1))
        assert told["test"] == truths < told["web"] <= truths | rumours and not truths & rumours
