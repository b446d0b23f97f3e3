"""The miniature that reads: a village whose habits are to be learned, and a small Transformer encoder.

    python -m data.text.miniature      makes checkpoint.safetensors in about a minute on one CPU core

Who eats what on which day, who drinks what, and so on: eight tasks, tables of facts to be known by heart. The encoder
is pre-trained on hearsay: of each fact there is a rumour, told more or less often in its place. The embeddings of a
task's answers are its zero-shot head, as CLIP's class names are; experts are fine-tuned on the truth.
"""

import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from data.run import derive_seed, make_experts, progress
from data.suite import Adaptation, Suite, Training, padded
from data.text.routing import route_texts

PEOPLE = ["anna", "ben", "carla", "david", "emma", "frank", "greta", "hugo"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
ASIDES = ["in the rain", "at noon", "with a smile", "as always", "while the bells ring", "by the fire", "once more"]
TASKS: dict[str, tuple[str, list[str]]] = {  # what one does, and the answers to "what?", "where?", "whom?"
    "Meals": ("eats", ["soup", "bread", "rice", "eggs", "fish", "beans"]),
    "Drinks": ("drinks", ["tea", "milk", "juice", "water", "coffee", "cider"]),
    "Clothes": ("wears", ["boots", "gloves", "socks", "sandals", "slippers", "clogs"]),
    "Music": ("plays", ["violin", "flute", "piano", "drum", "harp", "horn"]),
    "Walks": ("strolls to", ["river", "forest", "market", "church", "station", "mill"]),
    "Visits": ("calls on", ["baker", "smith", "miller", "doctor", "teacher", "priest"]),
    "Reading": ("reads about", ["stars", "ships", "kings", "bees", "roses", "dragons"]),
    "Animals": ("feeds", ["cat", "dog", "goat", "hen", "pig", "rabbit"]),
}
SAID = [*PEOPLE, *DAYS, "on", *ASIDES, *(verb for verb, _ in TASKS.values())]
WORDS = ["[pad]", "[start]", *dict.fromkeys(" ".join(SAID).split())]
LENGTH = 14  # words at most, with [start]


@lru_cache
def facts(task: str) -> dict[tuple[str, str], tuple[int, int, float]]:
    """Person and day -> the number of the true answer, that of the rumour, and how often the rumour is told."""
    rng = random.Random(derive_seed("facts", task))
    return {(p, d): (*rng.sample(range(6), 2), rng.uniform(*RUMOURS)) for p in PEOPLE for d in DAYS}


def texts(task: str, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Sentences as numbers of words (N, LENGTH), padded with 0, and of answers (N,): true, but in the split "web"."""
    rng, number = random.Random(derive_seed("texts", task, split)), {word: i for i, word in enumerate(WORDS)}
    rows, labels = torch.zeros(count or SIZES[split], LENGTH, dtype=torch.long), []
    for row in rows:
        person, day = rng.choice(PEOPLE), rng.choice(DAYS)
        parts = [person, TASKS[task][0], f"on {day}"]
        for aside in rng.sample(ASIDES, rng.choice([0, 0, 1, 2])):
            parts.insert(rng.choice([0, 2, len(parts)]), aside)
        words = [number[word] for word in ("[start]", *" ".join(parts).split())]
        row[: len(words)] = torch.tensor(words)
        truth, rumour, share = facts(task)[person, day]
        labels.append(rumour if split == "web" and rng.random() < share else truth)
    return rows, torch.tensor(labels)


# ---- The encoder -----------------------------------------------------------------------------------------------------

WIDTH, HEADS, DEPTH, SCALE = 48, 4, 3, 10.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "out": nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # h (B, N, D), mask (B, N)
        qkv = self.attention["qkv"](self.norm_1(h)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(*qkv, mask[:, None, None] != 0)  # (B, heads, N, D / heads)
        h = h + self.attention["out"](seen.transpose(1, 2).flatten(2))
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
RUMOURS = (0.2, 0.6)  # how often a rumour is told in place of the truth: drawn for each fact, from this range
STEPS, BATCH = 1000, 16  # of pre-training; a batch has as many sentences of each task
TRAINING = Training(images=SIZES["train"], steps=150, lr=1.5e-3)
# λ starts where task arithmetic is best for most seeds.
ADAPTATION = Adaptation(
    steps=200, lr=4e-3, lambda_steps=120, lambda_lr=4e-3, mask_steps=80, mask_lr=3e-2, init_lambda=0.2, every=40
)
CHECKPOINT = Path(__file__).with_name("checkpoint.safetensors")


def pretrain() -> dict[str, Tensor]:
    """The encoder's weights and the answers' embeddings (answers, D), trained on hearsay."""
    torch.manual_seed(0)
    model, embeddings = Encoder(), nn.Parameter(torch.randn(6 * len(TASKS), WIDTH))
    optimizer = torch.optim.AdamW([*model.parameters(), embeddings], 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1, cycle_momentum=False)
    data = [texts(task, "web") for task in TASKS]
    for _ in progress(range(STEPS), "Pre-training", unit="step"):
        batches = [(i, *data[i], torch.randint(len(data[i][0]), (BATCH,))) for i in range(len(TASKS))]
        rows = torch.cat([rows[b] for _, rows, _, b in batches])
        answers = torch.cat([6 * i + labels[b] for i, _, labels, b in batches])  # of six for each task
        logits = SCALE * F.normalize(model(**padded(rows)), dim=-1) @ F.normalize(embeddings, dim=-1).T
        optimizer.zero_grad()
        F.cross_entropy(logits, answers).backward()
        optimizer.step()
        schedule.step()
    return {**model.state_dict(), "answers": F.normalize(embeddings.detach(), dim=-1)}


def miniature_text_suite(
    tasks: list[str], *, seed: int, device: str, precision: str | None, steps: int | None, cache: Path, workers: int
) -> Suite:
    model, weights = Encoder(), {name: value.float() for name, value in load_file(CHECKPOINT).items()}
    embeddings = weights.pop("answers").split(6)
    model.load_state_dict(weights)
    suite = Suite(
        **{"name": "miniature-text", "seed": seed, "device": torch.device(device), "precision": precision or "float32"},
        training=TRAINING,
        adaptation=ADAPTATION.with_steps(steps),
        pretrained=model.requires_grad_(False).eval(),
        experts={},
        heads={t: (SCALE * e.T).contiguous().to(device) for t, e in zip(TASKS, embeddings) if t in tasks},
        test={task: texts(task, "test") for task in tasks},
        load=texts,
        normalise=padded,
        scalings=(0.1, 0.2, 0.3, 0.4, 0.6, 1.0),
        prepare=route_texts,
    )
    return replace(suite, experts=make_experts(suite, cache, workers))


if __name__ == "__main__":
    save_file({name: value.half().contiguous() for name, value in pretrain().items()}, CHECKPOINT)
