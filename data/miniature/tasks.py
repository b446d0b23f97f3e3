"""The miniature: eight tasks with their pictures and heads, the small CLIP that knows their kind, and their suite.

`render` draws the pictures, 32 x 32 RGB, from a seed: any number of them, no two alike. checkpoint.safetensors holds
what pretraining.py has made. Eight more tasks are made of the first eight: their classes seen otherwise.
"""

import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file
from torch import Tensor

from data.miniature import drawing
from data.miniature.corruptions import corrupt
from data.run import make_experts
from data.suite import Adaptation, Suite, Training

CHECKPOINT = Path(__file__).with_name("checkpoint.safetensors")


class Drawn(NamedTuple):
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
    "Scenes": Drawn(drawing.draw_scene, 0.1, ["a photo of a {}"], words(SCENES)),
    "Cars": Drawn(drawing.draw_car, 0.1, ["a photo of a {}"], words(CARS)),
    "Aerial": Drawn(drawing.draw_aerial, math.pi, ["aerial imagery of a {}"], words(AERIAL)),
    "LandUse": Drawn(drawing.draw_land, math.pi, ["a photo of {}", "a satellite photo of {}"], words(LAND_USE)),
    "HouseNumbers": Drawn(drawing.draw_house_number, 0.15, ["a photo of a {}"], words(HOUSE_NUMBERS)),
    "Signs": Drawn(drawing.draw_sign, 0.12, ["a {} traffic sign"], words(SIGNS)),
    "Digits": Drawn(drawing.draw_digit, 0.15, ["a photo of a {}"], words(DIGITS)),
    "Textures": Drawn(drawing.draw_texture, math.pi, ["a {} texture"], words(TEXTURES)),
}


def seen_otherwise(look: Callable, sources: dict, name: str, rng: random.Random) -> drawing.Canvas:
    """The drawing of a class of another task, its image changed by `look`."""
    task, original = sources[name]
    canvas = TASKS[task].draw(original, rng)
    canvas.image = look(canvas.image)
    return canvas


def another_task(look: Callable, wording: int, part: slice, *tasks: str) -> Drawn:
    """A part of the classes of each of these tasks, seen otherwise and called by another of their wordings.

    So the text tower knows their names, and the vision tower something like their pictures, but not these.
    """
    originals = [(task, name) for task in tasks for name in TASKS[task].classes[part]]
    sources = {TASKS[task].wordings[name][wording]: (task, name) for task, name in originals}
    return Drawn(partial(seen_otherwise, look, sources), 0.1, ["a photo of a {}"], {name: [] for name in sources})


def coloured(dark: str, middle: str, light: str) -> Callable[[Image.Image], Image.Image]:
    return lambda image: ImageOps.colorize(ImageOps.grayscale(image), dark, light, middle)


def blended(look: Callable, share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: Image.blend(image, look(image), share)


def channels_rotated(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return Image.merge("RGB", (green, blue, red))


FIRST, LAST = slice(0, 5), slice(5, 10)
# For experiments with more tasks than the paper's. They are not in TASKS, on which vocabulary and pre-training depend.
MORE_TASKS = {
    "Negatives": another_task(blended(ImageOps.invert, 0.3), 0, FIRST, "Scenes", "Cars"),
    "Infrared": another_task(blended(coloured("navy", "red", "yellow"), 0.3), 0, FIRST, "Aerial", "LandUse"),
    "Sketches": another_task(blended(lambda image: image.filter(ImageFilter.CONTOUR), 0.5), 0, LAST, "Signs", "Scenes"),
    "Reliefs": another_task(blended(lambda i: i.filter(ImageFilter.EMBOSS), 0.6), 0, FIRST, "Digits", "Textures"),
    "NightViews": another_task(coloured("black", "midnightblue", "lightblue"), 1, LAST, "Aerial", "Cars"),
    "Posters": another_task(lambda image: ImageOps.posterize(image, 1), 1, FIRST, "Cars", "HouseNumbers"),
    "Solarised": another_task(blended(lambda image: ImageOps.solarize(image, 120), 0.5), 1, LAST, "Textures", "Digits"),
    "FalseColours": another_task(blended(channels_rotated, 0.6), 1, LAST, "LandUse", "Scenes"),
}
ALL_TASKS = TASKS | MORE_TASKS


def render(task: str, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` labelled images: uint8 (N, 3, 32, 32) and int64 (N,), the classes taking turns.

    Image i depends on task, split, seed and i alone, not on `count`. Pictures of the split "web" are for pre-training.
    """
    draw, turn, classes = ALL_TASKS[task].draw, ALL_TASKS[task].turn, ALL_TASKS[task].classes
    images = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        rng = random.Random(f"{task} {split} {seed} {i}")
        images[i] = drawing.photograph(draw(classes[i % len(classes)], rng), turn, rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % len(classes)


# ---- The model -------------------------------------------------------------------------------------------------------

CAPTIONS = ["{}", "a photo of a {}", "my picture of {}", "{} today", "look {}", "this is a {}"]
CAPTIONS += ["nice {} picture", "stock image {}"]
CONTEXT = 14


def spell(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def vocabulary() -> dict[str, int]:
    """Every word of the captions and prompts; 0 is padding, 1 a word never heard of, the last one ends a text."""
    texts = [*CAPTIONS]
    for task in TASKS.values():
        texts += [*task.templates, *task.classes, *sum(task.wordings.values(), [])]
    return {word: i for i, word in enumerate(sorted(set(spell(" ".join(texts)))), start=2)}


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
    model.load_state_dict(load_file(CHECKPOINT))  # as float32
    return model.eval()


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels to float32 of about zero mean and unit variance."""
    return (images.float() - 127.5) / 64


def zero_shot_head(model: open_clip.CLIP, task: str) -> Tensor:
    """The task's classifier, (embedding, classes), times CLIP's logit scale: logits = normalised features @ head."""
    classes, templates, device = ALL_TASKS[task].classes, ALL_TASKS[task].templates, model.logit_scale.device
    head = open_clip.build_zero_shot_classifier(model, tokenize, classes, templates, device=device)
    return head * model.logit_scale.exp().detach()


# ---- The suite -------------------------------------------------------------------------------------------------------

TEST_IMAGES = 400  # of each task
SEVERITY = 3  # of corruptions: at 5, task arithmetic has 30 % left of 94 %
TRAINING = Training(images=1500, steps=100, lr=5e-4)
STEPS = {"steps": 80, "lambda_steps": 60, "mask_steps": 60}
ADAPTATION = Adaptation(lr=1.6e-3, lambda_lr=1.6e-2, mask_lr=3e-2, **STEPS, batch_size=8, every=16)


def miniature_suite(
    tasks: list[str], *, seed: int, device: str, precision: str | None, steps: int | None, cache: Path, workers: int
) -> Suite:
    """The suite of these tasks. Experts are fine-tuned, if they are not in the folder `cache` from before."""
    model, load = load_pretrained(), partial(images, TRAINING.images, TEST_IMAGES)
    suite = Suite(
        name="miniature",
        seed=seed,
        device=torch.device(device),
        precision=precision or "float32",
        training=TRAINING,
        adaptation=ADAPTATION.with_steps(steps),
        pretrained=model.visual.requires_grad_(False),
        experts={},
        heads={task: zero_shot_head(model, task).to(device) for task in tasks},
        test={task: load(task, "test", None) for task in tasks},
        load=load,
        normalise=normalise,
        scalings=(0.2, 0.3, 0.4),
    )
    return replace(suite, experts=make_experts(suite, cache, workers))


def images(train: int, test: int, task: str, split: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Rendered images and labels: "train", "test", or a corruption's name for the test images that it has spoiled."""
    if split == "train":
        return render(task, "train", count or train, seed=0)
    pictures, labels = render(task, "test", test, seed=1)
    return (pictures if split == "test" else corrupt(pictures, split, SEVERITY)), labels
