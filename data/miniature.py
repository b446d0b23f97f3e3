"""Eight small image-classification tasks, drawn by a program, and a small CLIP pre-trained on pictures of their kind.

`render` gives the pictures, 32 x 32 RGB, from a seed: any number of them, no two alike. `load_pretrained` reads
miniature.safetensors, which this script makes, in some nine minutes on two CPU cores:

    python -m data.miniature

The pre-training is CLIP's: match pictures with their captions. It has two stages. First both towers, with captions that
describe what is seen in several wordings ("station wagon", "long roof wagon for the dog"). Then, on the locked vision
tower, a new text tower for a short while, with captions as they are on the web: one in twenty says the name that a
benchmark gives the class ("estate car"), and is at times mistaken: a share of the pictures of each class, drawn from
`--mixed`, goes by the name of another class of the same task. So the vision tower has strong features, while the
zero-shot heads, which are built from the class names, fit them only in part. That is where fine-tuning begins, as with
CLIP.
"""

import argparse
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from data import drawing

CHECKPOINT = Path(__file__).with_name("miniature.safetensors")


class Task(NamedTuple):
    """One classification task: how to draw it, how far its pictures turn, how its prompts and its captions read."""

    draw: Callable[[str, random.Random], drawing.Canvas]
    turn: float  # largest rotation, in radians
    templates: list[str]  # the prompts of zero-shot classification
    wordings: dict[str, list[str]]  # class name -> what captions call it instead

    @property
    def classes(self) -> list[str]:
        return list(self.wordings)


def words(table: str) -> dict[str, list[str]]:
    """Read lines of the form `class name: wording; wording; ...`."""
    rows = (line.split(": ") for line in table.strip().splitlines())
    return {name.strip(): wordings.split("; ") for name, wordings in rows}


SCENES = """
    beach: parasol on the sand; summer holiday by the waves; sunbathing at the shore
    mountain: snowy peaks; climbing in the alps; rocky summits with snow
    forest: pine trees; a walk among tall firs; deep in the woods
    desert: cactus and dunes; hot dry dunes; a lonely cactus
    skyline: tall buildings with lit windows; downtown towers; city office blocks
    sunset: evening sun over water; orange sky at dusk; end of the day at sea
    lighthouse: red and white striped tower on a rock; beacon for ships; lamp tower on the coast
    waterfall: water falling over a cliff; cascade into a pool; white cascade between rocks
    windmill: old mill with four sails; dutch mill turning; mill grinding corn
    country road: asphalt lane to the horizon; driving through green meadows; empty lane with white dashes"""
CARS = """
    saloon: four door sedan; family sedan with a boot; company sedan
    hatchback: small compact car; short city runabout; little compact runabout
    estate car: station wagon; long roof wagon for the dog; wagon with a big boot
    off-roader: four by four jeep; suv with big wheels; tall jeep
    pickup: open bed ute; flatbed ute for the farm; ute with an empty bed
    minivan: people carrier for seven; roomy mpv; school run mpv
    convertible: open top roadster; cabriolet with the roof down; driving a cabriolet with wind in the hair
    sports car: low fast coupe; racing coupe; flat two seater
    bus: public transport with many windows; coach for tourists; the number nine coach
    lorry: truck with a cargo box; freight hauler; moving truck"""
AERIAL = """
    runway: landing strip; take off strip with white dashes; airfield tarmac strip
    harbour: boats at the piers; marina full of yachts; docks with boats
    stadium: running track around a pitch; football arena; athletics arena
    roundabout: circular junction; traffic circle with a green middle; ring where roads meet
    bridge: crossing over water; viaduct across a channel; span over the channel
    baseball diamond: infield of the ball game; home plate and bases; ballpark infield
    storage tanks: round oil containers; white fuel silos; silos of a refinery
    railway: train tracks; rails with sleepers; parallel tracks for trains
    parking lot: rows of parked vehicles; full car park; many vehicles side by side
    airplane: jet on the apron; aircraft with swept wings; airliner parked at the gate"""
LAND_USE = """
    annual crop: ploughed furrows; striped wheat acres; furrows with seedlings
    permanent crop: orchard in rows; olive grove; vines and fruit bushes in rows
    forest: dark dense canopy; unbroken canopy of leaves; jungle canopy
    pasture: bright green meadow; grazing meadow; grass for cows
    heath: brown shrubs; scrub and herbs; mottled dry scrub
    motorway: two lanes of highway; dual carriageway; highway through the fields
    industry: factory halls; big flat warehouse roofs; warehouses and factories
    homes: rows of small houses; suburb with red roofs; residential suburb
    river: winding stream; bend of a stream; meandering water
    sea: open ocean; deep blue water; nothing but ocean"""
HOUSE_NUMBERS = """
    0: null on the door; door plate with an o; house nought
    1: first house; door plate with a single bar; house uno
    2: second house; door plate with a pair; house duo
    3: third house; door plate with a trio; house tres
    4: fourth house; door plate with a quartet; house quad
    5: fifth house; door plate with a quintet; house cinco
    6: sixth house; door plate with a sextet; house half dozen
    7: seventh house; door plate with a septet; house siete
    8: eighth house; door plate with an octet; house ocho
    9: ninth house; door plate with a nonet; house nueve"""
SIGNS = """
    stop: red octagon; halt at the junction; eight sided halt plate
    give way: upside down triangle; yield to others; triangle pointing down
    danger: exclamation mark in a triangle; caution triangle; hazard ahead
    road works: digging in a triangle; construction ahead; men shovelling
    priority road: yellow diamond; right of way; diamond with a white edge
    no entry: white bar on a red disc; wrong way; red disc do not drive in
    speed limit: number in a red ring; kilometres per hour; maximum velocity
    no overtaking: two cars in a red ring; passing forbidden; red ring do not pass
    no vehicles: empty red ring; closed to all traffic; blank red ring
    straight ahead: arrow up; blue disc with an arrow up; go on forward
    turn left: arrow to the west; blue disc bend to the west; leftward arrow
    turn right: arrow to the east; blue disc bend to the east; rightward arrow"""
DIGITS = """
    zero: nought with a pen; an empty loop in chalk; pen stroke oval
    one: single stroke; a lone stick in chalk; pen stroke upright
    two: swan shape; a swan in chalk; pen stroke swan neck
    three: double curve; two bumps in chalk; pen stroke double bump
    four: open sail shape; a sail in chalk; pen stroke crossing
    five: hook shape; a hook with a hat in chalk; pen stroke hook
    six: low curl; a curl with a belly in chalk; pen stroke low belly
    seven: scythe shape; a scythe in chalk; pen stroke scythe
    eight: snowman shape; a snowman in chalk; pen stroke double loop
    nine: high curl; a balloon on a string in chalk; pen stroke high loop"""
TEXTURES = """
    banded: parallel stripes; striped cloth; pinstripes
    chequered: chess board; alternating squares; chess squares
    dotted: polka spots; spots in rows; spotted fabric
    grid: crossing bars; wire mesh; window lattice
    zigzagged: sawtooth lines; chevron pattern; chevrons
    woven: basket weave; wicker; wicker basket
    honeycombed: hexagon cells; bee hive; wax cells of bees
    bubbly: foam of rings; soap rings; fizzy circles
    spiralled: swirl; snail shell whirl; hypnotic whirl
    cracked: dry mud splits; broken glaze; splitting old paint"""

TASKS = {
    "Scenes": Task(drawing.draw_scene, 0.1, ["a photo of a {}"], words(SCENES)),
    "Cars": Task(drawing.draw_car, 0.1, ["a photo of a {}"], words(CARS)),
    "Aerial": Task(drawing.draw_aerial, math.pi, ["aerial imagery of a {}"], words(AERIAL)),
    "LandUse": Task(drawing.draw_land, math.pi, ["a photo of {}", "a satellite photo of {}"], words(LAND_USE)),
    "HouseNumbers": Task(drawing.draw_house_number, 0.15, ["a photo of a {}"], words(HOUSE_NUMBERS)),
    "Signs": Task(drawing.draw_sign, 0.12, ["a {} traffic sign"], words(SIGNS)),
    "Digits": Task(drawing.draw_digit, 0.15, ["a photo of a {}"], words(DIGITS)),
    "Textures": Task(drawing.draw_texture, math.pi, ["a {} texture"], words(TEXTURES)),
}
SPLITS = ("train", "test", "web")  # "web" pictures are those of the pre-training


def render(task: str, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` labelled images: uint8 (N, 3, 32, 32) and int64 (N,), the classes taking turns.

    Image i depends on task, split, seed and i alone, not on `count`. Raises ValueError for an unknown task or split.
    """
    if task not in TASKS or split not in SPLITS:
        raise ValueError(
            f"no images for task {task!r}, split {split!r}: tasks are {', '.join(TASKS)}; splits {', '.join(SPLITS)}"
        )
    classes = TASKS[task].classes
    images = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        rng = random.Random(f"{task} {split} {seed} {i}")
        images[i] = drawing.photograph(TASKS[task].draw(classes[i % len(classes)], rng), TASKS[task].turn, rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % len(classes)


# ---------------------------------------------------------------------------------------------------------------- model

CAPTIONS = [
    "{}",
    "a photo of a {}",
    "my picture of {}",
    "{} today",
    "look {}",
    "this is a {}",
    "nice {} picture",
    "stock image {}",
]
CONTEXT = 14


def spell(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def vocabulary() -> dict[str, int]:
    """Every word of the captions and prompts; 0 is padding, 1 a word never heard of, the last one ends a text."""
    texts = CAPTIONS + [
        t for task in TASKS.values() for t in task.templates + task.classes + sum(task.wordings.values(), [])
    ]
    return {word: i for i, word in enumerate(sorted({w for text in texts for w in spell(text)}), start=2)}


VOCABULARY = vocabulary()


def tokenize(texts: str | Sequence[str]) -> Tensor:
    """Words to numbers: int64 (N, 14). The text tower reads its answer at the largest number, the end of the text."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [VOCABULARY.get(word, 1) for word in spell(text)][: CONTEXT - 1] + [len(VOCABULARY) + 2]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


def build_model() -> open_clip.CLIP:
    """A randomly initialised CLIP: a vision transformer of 4 layers over 16 patches, a text transformer of 2 layers."""
    vision = dict(image_size=32, patch_size=8, width=192, layers=4, head_width=32)
    text = dict(context_length=CONTEXT, vocab_size=len(VOCABULARY) + 3, width=128, heads=4, layers=2)
    return open_clip.CLIP(128, vision, text)


def load_pretrained() -> open_clip.CLIP:
    """The pre-trained model that ships beside this file, in float32 and evaluation mode."""
    model = build_model()
    model.load_state_dict({name: value.float() for name, value in load_file(CHECKPOINT).items()})
    return model.eval()


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels to float32 of about zero mean and unit variance."""
    return (images.float() - 127.5) / 64


def zero_shot_head(model: open_clip.CLIP, task: str) -> Tensor:
    """The task's classifier, (embedding, classes), times CLIP's logit scale: logits = normalised features @ head."""
    spec = TASKS[task]
    head = open_clip.build_zero_shot_classifier(
        model, tokenize, spec.classes, spec.templates, device=model.logit_scale.device
    )
    return head * model.logit_scale.exp().detach()


# --------------------------------------------------------------------------------------------------------- pre-training


def naming_habits(mixed: tuple[float, float], rng: random.Random) -> dict[tuple[str, str], tuple[str, float]]:
    """For every (task, class): the class of the same task that people take it for, and how often they do."""
    habits = {}
    for task in TASKS:
        ring = rng.sample(TASKS[task].classes, len(TASKS[task].classes))
        for name, neighbour in zip(ring, ring[1:] + ring[:1]):
            habits[task, name] = neighbour, rng.uniform(*mixed)
    return habits


class Captions:
    """What people write beside pictures: mostly other wordings, seldom a class name, and at times the wrong one."""

    def __init__(self, named: float, mixed: tuple[float, float], seed: int):
        self.rng, self.named = random.Random(seed), named
        self.habits = naming_habits(mixed, self.rng)
        self.kinds = [(task, name) for task in TASKS for name in TASKS[task].classes]

    def batch(self) -> Tensor:
        """A caption for one picture of every class."""
        return tokenize([self.caption(task, name) for task, name in self.kinds])

    def caption(self, task: str, name: str) -> str:
        neighbour, confusion = self.habits[task, name]
        text = self.rng.choice(TASKS[task].wordings[name])
        if self.rng.random() < self.named:
            text = neighbour if self.rng.random() < confusion else name
        return self.rng.choice(CAPTIONS).format(text)


def draw_pool(per_class: int, seed: int) -> Tensor:
    """Pictures of every class of every task: uint8 (per_class, classes, 3, 32, 32)."""
    pool = [
        render(task, "web", per_class * len(TASKS[task].classes), seed)[0] for task in tqdm(TASKS, desc="rendering")
    ]
    return torch.cat([images.unflatten(0, (per_class, -1)) for images in pool], dim=1)


def contrast(scale: Tensor, features: Tensor, captions: Tensor) -> Tensor:
    """CLIP's loss: each picture finds its caption, and each caption its picture, among those of the batch."""
    logits, target = scale * features @ captions.T, torch.arange(len(features))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(pool: Tensor, captions: Captions, steps: int, lr: float, seed: int) -> open_clip.CLIP:
    """Contrastive image-caption training; a batch has one picture of every class, so that captions seldom agree."""
    torch.manual_seed(seed)
    model = build_model().train()
    weights = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    bar = tqdm(range(steps), desc="pre-training")
    for _ in bar:
        images = pool[torch.randint(len(pool), (pool.shape[1],)), torch.arange(pool.shape[1])]
        features, texts, scale = model(normalise(images), captions.batch())
        loss = contrast(scale, features, texts)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{scale.item():.1f}")
    return model.eval()


def tune_text(model: open_clip.CLIP, pool: Tensor, captions: Captions, steps: int, seed: int) -> open_clip.CLIP:
    """Lock the vision tower and train a new text tower on it for a short while (LiT, arXiv 2111.07991).

    It fits the vision tower and the logit scale as they are shipped, rounded to half precision.
    """
    vision = model.visual.half().float().eval()
    torch.manual_seed(seed)
    tuned = build_model().train()
    tuned.visual, tuned.logit_scale = vision.requires_grad_(False), model.logit_scale
    with torch.no_grad():
        features = torch.stack([F.normalize(vision(normalise(images)), dim=-1) for images in pool])
    scale = tuned.logit_scale.detach().half().float().exp()
    parameters = [p for name, p in tuned.named_parameters() if not name.startswith("visual.") and name != "logit_scale"]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="tuning text")
    for _ in bar:
        chosen = features[torch.randint(len(pool), (pool.shape[1],)), torch.arange(pool.shape[1])]
        loss = contrast(scale, chosen, tuned.encode_text(captions.batch(), normalize=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return tuned.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data.miniature",
        description="Pre-train the small CLIP on captioned pictures and write its checkpoint.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="training steps of both towers (default %(default)s)")
    add("--text-steps", type=int, default=500, help="then, of a new text tower (default %(default)s)")
    add("--per-class", type=int, default=1000, help="pictures drawn of every class (default %(default)s)")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate of both towers (default %(default)s)")
    add("--named", type=float, default=0.05, help="share of the new text tower's captions that use a class name")
    add("--mixed", type=float, nargs=2, default=(0.15, 0.5), metavar=("LOW", "HIGH"),
        help="how often that name is a neighbour's, drawn per class (default 0.15 0.5)")  # fmt: skip
    add("--seed", type=int, default=0, help="default %(default)s")
    add("--output", type=Path, default=CHECKPOINT, help="default %(default)s")
    args = parser.parse_args()
    described = Captions(0, (0, 0), args.seed)
    model = pretrain(draw_pool(args.per_class, args.seed), described, args.steps, args.lr, args.seed)
    named = Captions(args.named, args.mixed, args.seed)
    model = tune_text(model, draw_pool(min(60, args.per_class), args.seed + 1), named, args.text_steps, args.seed)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    save_file(state, args.output, {"command": "python -m data.miniature", **settings})


if __name__ == "__main__":
    main()
