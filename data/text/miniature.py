"""The miniature that reads: small tasks over sentences that a program writes, and a small Transformer encoder.

    python -m data.text.miniature      makes checkpoint.safetensors in some minutes on one CPU core

The encoder is pre-trained on sentences of all tasks with an answer to each, as people gave it: they take some answers
for others, now and then. The embeddings of a task's answers are its zero-shot head, as CLIP's class names are; experts
are fine-tuned on the true answers. Sentences differ in length, and batches are padded.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.files import derive_seed
from data.processes import progress
from data.suite import Adaptation, Suite, Training, make_experts, padded

# ---- The tasks: each writes a sentence and knows its answer ----------------------------------------------------------

PEOPLE = ["anna", "ben", "carla", "david", "emma"]
THINGS = ["book", "ball", "letter", "lamp", "dog", "cat"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
HEADINGS = ["north", "east", "south", "west"]
NUMBERS = ["two", "three", "four"]


def review(rng: random.Random) -> tuple[str, str]:
    """Opinions, some negated: are all of them good, all bad, or mixed?"""
    clauses, verdicts = [], set()
    for _ in range(rng.randint(1, 2)):
        good, negated = rng.random() < 0.5, rng.random() < 0.5
        adjective = rng.choice(["great", "fine", "warm"] if good else ["awful", "poor", "cold"])
        clauses.append(f"the {rng.choice(THINGS)} was {'not ' if negated else ''}{adjective}")
        verdicts.add("good" if good != negated else "bad")
    return " and ".join(clauses), "mixed" if len(verdicts) > 1 else verdicts.pop()


def route(rng: random.Random) -> tuple[str, str]:
    """Which way does one look after all turns?"""
    heading = rng.randrange(4)
    words = [rng.choice(PEOPLE), "looks", HEADINGS[heading]]
    for _ in range(rng.randint(1, 2)):
        turn = rng.choice(["right", "around", "left"])
        heading += 1 + ["right", "around", "left"].index(turn)
        words += ["then", "turns", turn]
    return " ".join(words), HEADINGS[heading % 4]


def gift(rng: random.Random) -> tuple[str, str]:
    """Who has the thing in the end?"""
    owner, *others = rng.sample(PEOPLE, 5)
    words = [owner, "has", "the", rng.choice(THINGS)]
    for other in others[: rng.randint(1, 2)]:
        if rng.random() < 0.5:
            words += ["then", owner, "gives", "it", "to", other]
        else:
            words += ["then", other, "takes", "it", "from", owner]
        owner = other
    return " ".join(words), owner


def date(rng: random.Random) -> tuple[str, str]:
    """Which day of the week is it?"""
    day, number, sign = rng.randrange(7), rng.randrange(3), rng.choice([1, -1])
    person = f"{rng.choice(PEOPLE)} comes " if rng.random() < 0.7 else ""
    words = f"{person}{NUMBERS[number]} days {'after' if sign > 0 else 'before'} {DAYS[day]}"
    return words, DAYS[(day + sign * (number + 2)) % 7]


def subject(rng: random.Random) -> tuple[str, str]:
    """Of all the things, which one waits or falls?"""
    who, *others = rng.sample(THINGS, rng.randint(1, 4))
    phrases = [f"{rng.choice(['near', 'behind'])} the {other}" for other in others]
    before = rng.randint(0, len(phrases))
    words = [*phrases[:before], f"the {who}", *phrases[before:], rng.choice(["falls", "waits"])]
    return " ".join(words), who


TASKS: dict[str, tuple[Callable, list[str]]] = {
    "Reviews": (review, ["good", "bad", "mixed"]),
    "Routes": (route, HEADINGS),
    "Gifts": (gift, PEOPLE),
    "Dates": (date, DAYS),
    "Subjects": (subject, THINGS),
}
ANSWERS = [answer for _, answers in TASKS.values() for answer in answers]
WORDS = [
    *("[pad]", "[start]", *PEOPLE, *THINGS, *DAYS, *HEADINGS, *NUMBERS),
    *("the", "was", "not", "and", "great", "fine", "warm", "awful", "poor", "cold", "looks", "then", "turns", "right"),
    *("around", "left", "has", "gives", "it", "to", "takes", "from", "comes", "days", "after", "before", "near"),
    *("behind", "falls", "waits"),
]
LENGTH = 18  # words at most, with [start]


def texts(task: str, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Sentences as numbers of words (N, LENGTH), padded with 0, and the numbers of their answers (N,)."""
    (write_one, answers), rng = TASKS[task], random.Random(derive_seed("texts", task, split))
    number = {word: i for i, word in enumerate(WORDS)}
    rows, labels = torch.zeros(count or SIZES[split], LENGTH, dtype=torch.long), []
    for row in rows:
        sentence, answer = write_one(rng)
        words = ["[start]", *sentence.split()]
        row[: len(words)] = torch.tensor([number[word] for word in words])
        labels.append(answers.index(answer))
    return rows, torch.tensor(labels)


# ---- The encoder -----------------------------------------------------------------------------------------------------

WIDTH, HEADS, DEPTH, SCALE = 64, 4, 3, 10.0


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # h (B, N, D), mask (B, N)
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D / heads)
        return self.out(F.scaled_dot_product_attention(q, k, v, mask[:, None, None] != 0).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        h = h + self.attention(self.norm_1(h), mask)
        return h + self.mlp(self.norm_2(h))


class Encoder(nn.Module):
    """Numbers of words (B, N) and where there are words (B, N) -> features of [start] (B, D)."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        h = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        for block in self.blocks:
            h = block(h, attention_mask)
        return self.norm(h[:, 0])


# ---- Pre-training, and the suite -------------------------------------------------------------------------------------

SIZES = {"web": 10000, "train": 2000, "test": 400}  # of each task
STEPS, BATCH = 1500, 32  # of pre-training; a batch has as many sentences of each task
MISTAKEN = (0.1, 0.5)  # how often an answer is taken for its neighbour in pre-training: drawn for each, from this range
TRAINING = Training(images=SIZES["train"], steps=200, lr=3e-3)
ADAPTATION = Adaptation(
    steps=200, lr=2e-3, lambda_lr=1.6e-2, lambda_steps=150, mask_lr=3e-2, mask_steps=80, batch_size=16, evaluations=5
)
CHECKPOINT = Path(__file__).with_name("checkpoint.safetensors")


def pretrain() -> dict[str, Tensor]:
    """The encoder's weights and the answers' embeddings (answers, D), trained on answers as people gave them."""
    torch.manual_seed(0)
    model, embeddings = Encoder(), nn.Parameter(torch.randn(len(ANSWERS), WIDTH))
    optimizer = torch.optim.AdamW([*model.parameters(), embeddings], 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1, cycle_momentum=False)
    data, first = [], 0
    for task, (_, answers) in TASKS.items():
        rows, labels = texts(task, "web")
        rates = torch.empty(len(answers)).uniform_(*MISTAKEN)
        mistaken = torch.rand(len(labels)) < rates[labels]
        data.append((rows, first + (labels + mistaken) % len(answers)))
        first += len(answers)
    for _ in progress(range(STEPS), "Pre-training", unit="step"):
        batches = [torch.randint(len(rows), (BATCH,)) for rows, _ in data]
        rows, answers = (torch.cat([part[b] for part, b in zip(parts, batches)]) for parts in zip(*data))
        logits = SCALE * F.normalize(model(**padded(rows)), dim=-1) @ F.normalize(embeddings, dim=-1).T
        optimizer.zero_grad()
        F.cross_entropy(logits, answers).backward()
        optimizer.step()
        schedule.step()
    return {**model.state_dict(), "answers": F.normalize(embeddings.detach(), dim=-1)}


def miniature_text_suite(arguments: argparse.Namespace) -> Suite:
    model, device = Encoder(), torch.device(arguments.device)
    state = {name: value.float() for name, value in load_file(CHECKPOINT).items()}
    embeddings = state.pop("answers").split([len(answers) for _, answers in TASKS.values()])
    model.load_state_dict(state)
    suite = Suite(
        name="miniature-text",
        seed=arguments.seed,
        device=device,
        precision=arguments.precision or "float32",
        adaptation=ADAPTATION.changed(arguments.steps, arguments.adapt_precision),
        pretrained=model.requires_grad_(False).eval(),
        heads={t: (SCALE * e.T).contiguous().to(device) for t, e in zip(TASKS, embeddings) if t in arguments.tasks},
        test={task: texts(task, "test") for task in arguments.tasks},
        load=texts,
        normalise=padded,
        training=TRAINING,
        scalings=(0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
    )
    make_experts(suite, arguments.cached, arguments.workers, depends_on=Path(__file__).read_bytes())
    return suite


if __name__ == "__main__":
    save_file({name: value.half().contiguous() for name, value in pretrain().items()}, CHECKPOINT)
