"""Eight small image-classification tasks drawn by a program, and a small CLIP pre-trained on pictures of their kind.

`render` draws the pictures, 32 x 32 RGB, from a seed: any number of them, no two alike. `load_pretrained` reads
miniature.safetensors, which this script makes, in some twelve minutes on two CPU cores:

    python data/miniature.py

The pre-training is CLIP's: match pictures with their captions. Captions are written as on the web: they describe what
is seen in several wordings ("station wagon", "long roof wagon for the dog"), say the name that a benchmark gives the
class ("estate car") in one of 33, and then are at times mistaken: a share of the pictures of each class, drawn from
`--mixed`, goes by the name of another class of the same task. It has two stages: both towers together; then a new text
tower for a short while, with the vision tower locked. So the vision tower has strong features, while the zero-shot
heads, which are built from the class names, fit them only in part. That is where fine-tuning begins, as with CLIP.
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
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

Colour = tuple[int, int, int]
WHITE, BLACK, GREY, RED, GREEN, BLUE = (
    (240, 240, 240),
    (25, 25, 25),
    (125, 125, 125),
    (200, 35, 40),
    (60, 140, 60),
    (40, 90, 200),
)
YELLOW, SAND, BROWN, WATER, ROOF, GLASS = (
    (245, 200, 40),
    (225, 200, 140),
    (120, 85, 55),
    (50, 110, 190),
    (190, 90, 70),
    (150, 200, 225),
)

CHECKPOINT = Path(__file__).with_name("miniature.safetensors")


class Canvas:
    """A drawing of 96 x 96 pixels. Its visible window is the square [-1, 1]², y pointing down.

    Every method takes the colour first, then lengths in units of half the window. `rng` is the picture's own.
    """

    def __init__(self, rng: random.Random, background: Colour):
        self.rng, self.image = rng, Image.new("RGB", (96, 96), background)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, fill: Colour, x0: float, y0: float, x1: float, y1: float) -> None:
        self.draw.rectangle([48 + 32 * v for v in (x0, y0, max(x0, x1), max(y0, y1))], fill)

    def disc(self, fill: Colour, x: float, y: float, rx: float, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self.draw.ellipse([48 + 32 * v for v in (x - rx, y - ry, x + rx, y + ry)], fill)

    def poly(self, fill: Colour, *xy: float) -> None:
        self.draw.polygon([48 + 32 * v for v in xy], fill)

    def line(self, fill: Colour, width: float, *xy: float) -> None:
        self.draw.line([48 + 32 * v for v in xy], fill, max(1, round(32 * width)), joint="curve")

    def regular(self, fill: Colour, sides: int, x: float, y: float, radius: float, turn: float = 0.0) -> None:
        angles = [turn + 2 * math.pi * k / sides for k in range(sides)]
        self.poly(fill, *(v for a in angles for v in (x + radius * math.sin(a), y - radius * math.cos(a))))

    def near(self, colour: Colour, spread: int = 22) -> Colour:
        return tuple(min(255, max(0, v + self.rng.randint(-spread, spread))) for v in colour)

    def any(self, low: int = 20, high: int = 235) -> Colour:
        return tuple(self.rng.randint(low, high) for _ in range(3))

    def scatter(self, colour: Colour, count: int, radius: float, spread: int = 22) -> None:
        """`count` blobs at random places: foliage, pebbles, passers-by."""
        u = self.rng.uniform
        for _ in range(count):
            self.disc(self.near(colour, spread), u(-1.3, 1.3), u(-1.3, 1.3), radius * u(0.6, 1.4), radius * u(0.6, 1.4))


def draw_scene(name: str, rng: random.Random) -> Canvas:
    u, horizon = rng.uniform, rng.uniform(-0.15, 0.3)
    c = Canvas(rng, rng.choice([(130, 185, 235), (165, 200, 225), (195, 195, 205), (225, 190, 160)]))
    for _ in range(rng.randint(0, 3)):
        c.disc(c.near(WHITE, 15), u(-1, 1), u(-1, -0.4), u(0.1, 0.4), u(0.05, 0.15))
    ground = SAND if name in ("beach", "desert") else WATER if name in ("sunset", "lighthouse") else (95, 150, 70)
    c.box(c.near(ground), -1.5, horizon, 1.5, 1.5)
    x, s = u(-0.5, 0.5), u(0.8, 1.2)
    if name == "beach":
        c.box(c.near(WATER), -1.5, horizon, 1.5, horizon + 0.3 * s)
        c.line(WHITE, 0.08, -1.5, horizon + 0.3 * s, 1.5, horizon + 0.3 * s)
        c.line(BROWN, 0.06, x, 0.9, x, 0.3)
        c.poly(c.any(), x - 0.35, 0.45, x, 0.2, x + 0.35, 0.45)
    elif name == "mountain":
        for k in range(3):
            x, top, w = u(-0.4, 0.4) + 0.7 * (k - 1), horizon - u(0.5, 0.9), u(0.6, 0.8)
            c.poly(c.near((110, 105, 115)), x - w, horizon, x, top, x + w, horizon)
            c.poly(WHITE, x - w * 0.3, top + (horizon - top) * 0.3, x, top, x + w * 0.3, top + (horizon - top) * 0.3)
    elif name == "forest":
        for _ in range(10):
            x, y, h = u(-1.1, 1.1), horizon + u(0, 0.7), u(0.6, 1)
            c.line(BROWN, 0.08, x, y, x, y + 0.15)
            c.poly(c.near((35, 95, 50), 25), x - h * 0.3, y, x, y - h, x + h * 0.3, y)
    elif name == "desert":
        for _ in range(4):
            c.disc(c.near((215, 175, 110), 18), u(-1, 1), horizon + u(0.2, 0.9), u(0.5, 1), u(0.15, 0.35))
        c.line(c.near(GREEN), 0.14, x, 0.6, x, 0.6 - 0.8 * s)
        c.line(c.near(GREEN), 0.1, x - 0.25, -0.1 * s, x - 0.25, 0.2, x + 0.25, 0.2, x + 0.25, -0.2 * s)
    elif name == "skyline":
        for k in range(7):
            x, top, shade = -1.2 + 0.36 * k + u(-0.05, 0.05), horizon - u(0.2, 1.0), c.near((90, 95, 110), 30)
            c.box(shade, x, top, x + 0.32, horizon + 0.2)
            for _ in range(4):
                wx, wy = x + u(0.03, 0.25), u(top, horizon)
                c.box((250, 230, 150), wx, wy, wx + 0.06, wy + 0.06)
    elif name == "sunset":
        c.box(c.near((235, 130, 70)), -1.5, -1.5, 1.5, horizon)
        c.disc(c.near((255, 225, 110), 15), x, horizon - u(-0.1, 0.2), 0.35 * s)
        c.box(c.near((70, 60, 110)), -1.5, horizon, 1.5, 1.5)
        for k in range(4):
            c.line(
                (250, 180, 100),
                0.05,
                x - u(0.1, 0.3),
                horizon + 0.15 + 0.17 * k,
                x + u(0.1, 0.3),
                horizon + 0.15 + 0.17 * k,
            )
    elif name == "lighthouse":
        c.disc(c.near((90, 80, 75)), x, 0.9, 0.8, 0.4)
        for k in range(5):
            c.box(WHITE if k % 2 else c.near(RED), x - 0.15, 0.5 - 0.25 * k, x + 0.15, 0.75 - 0.25 * k)
        c.box(YELLOW, x - 0.12, -0.68, x + 0.12, -0.5)
        c.poly(BLACK, x - 0.2, -0.68, x, -0.85, x + 0.2, -0.68)
    elif name == "waterfall":
        c.box(c.near((95, 90, 80)), -1.5, horizon - 0.6, 1.5, 0.65)
        c.scatter((60, 105, 55), 14, 0.14)
        c.box(c.near((225, 240, 250), 12), x - 0.25 * s, horizon - 0.6, x + 0.25 * s, 0.7)
        c.disc(c.near(WATER), x, 0.95, 0.9, 0.35)
        c.disc(WHITE, x, 0.7, 0.4, 0.12)
    elif name == "windmill":
        c.poly(c.near((205, 180, 150)), x - 0.3, 0.7, x - 0.15, -0.2, x + 0.15, -0.2, x + 0.3, 0.7)
        c.poly(c.near(ROOF), x - 0.2, -0.2, x, -0.45, x + 0.2, -0.2)
        turn = u(0, 1.57)
        for k in range(4):
            a, b = 0.8 * math.sin(turn + 1.57 * k), 0.8 * math.cos(turn + 1.57 * k)
            c.line(c.near((70, 50, 40)), 0.09, x, -0.25, x + a, -0.25 + b)
    else:  # country road
        c.poly(c.near(GREY), x - 0.07, horizon, x + 0.07, horizon, 0.9 * s, 1.5, -0.9 * s, 1.5)
        for k in range(3):
            y = horizon + 0.1 + 0.3 * k
            c.line(WHITE, 0.03 + 0.03 * k, x * (1 - 0.33 * k), y, x * (0.8 - 0.33 * k), y + 0.15)
        for _ in range(3):
            c.disc(c.near((50, 110, 55)), rng.choice([-1, 1]) * u(0.6, 1.1), horizon, 0.2, 0.25)
    return c


# Cars: the outline of the cabin (x, y pairs on a body from -0.8 to 0.8, facing right) and of the body's upper edge.
CABINS = {
    "saloon": (-0.5, 0, -0.3, -0.33, 0.2, -0.33, 0.42, 0),
    "hatchback": (-0.5, 0, -0.45, -0.4, 0.1, -0.4, 0.36, 0),
    "estate car": (-0.83, 0, -0.78, -0.33, 0.2, -0.33, 0.45, 0),
    "off-roader": (-0.75, 0, -0.75, -0.5, 0.2, -0.5, 0.3, 0),
    "pickup": (-0.1, 0, -0.08, -0.42, 0.3, -0.42, 0.48, 0),
    "minivan": (-0.8, 0, -0.72, -0.62, 0.25, -0.62, 0.82, 0.05),
    "convertible": (0.12, 0, 0.02, -0.28, 0.1, -0.28, 0.26, 0),
    "sports car": (-0.6, 0, -0.2, -0.24, 0.05, -0.24, 0.4, 0.06),
    "bus": (-0.8, 0, -0.8, -0.7, 0.8, -0.7, 0.8, 0),
    "lorry": (0.4, 0, 0.4, -0.5, 0.7, -0.5, 0.8, 0),
}


def draw_car(name: str, rng: random.Random) -> Canvas:
    u, flip = rng.uniform, rng.choice([-1, 1])
    back = rng.choice([(200, 205, 215), (215, 200, 180), (185, 205, 185), (170, 195, 225)])
    c = Canvas(rng, back)
    for _ in range(3):  # the street behind
        x = u(-1.2, 1)
        c.box(c.near(back, 25), x, u(-1.2, -0.4), x + u(0.2, 0.7), 0.5)
    c.box(c.near((150, 150, 155), 12), -1.5, 0.3, 1.5, 1.5)
    size, x0, y0 = u(0.95, 1.1), u(-0.08, 0.08), u(0.15, 0.3)
    paint = c.near(rng.choice([RED, (30, 60, 150), (30, 100, 60), (50, 50, 55), (190, 120, 20), (110, 40, 110)]))

    def place(xy: Sequence[float]) -> list[float]:
        return [x0 + flip * size * v if k % 2 == 0 else y0 + size * v for k, v in enumerate(xy)]

    cabin = CABINS[name]
    front = 0.06 if name == "sports car" else 0
    rear = -0.52 if name == "hatchback" else -0.85
    c.poly(paint, *place((rear, 0.3, rear, 0.02, rear + 0.2, 0, 0.4, 0, 0.85, 0.06 + front, 0.88, 0.3)))
    c.poly(paint, *place(cabin))
    middle, glass = sum(cabin[::2]) / 4, c.near(GLASS, 30)
    if name == "bus":
        for k in range(5):
            c.poly(
                glass,
                *place((-0.72 + 0.3 * k, -0.2, -0.72 + 0.3 * k, -0.55, -0.52 + 0.3 * k, -0.55, -0.52 + 0.3 * k, -0.2)),
            )
    else:
        c.poly(
            glass, *place([middle + (v - middle) * 0.75 if k % 2 == 0 else v * 0.8 - 0.02 for k, v in enumerate(cabin)])
        )
    if name == "lorry":
        c.poly(c.any(60, 245), *place((-0.85, 0.15, -0.85, -0.75, 0.33, -0.75, 0.33, 0.15)))
    if name in ("saloon", "estate car", "minivan"):  # the pillar between the windows
        c.line(paint, 0.07, *place((-0.08, 0, -0.08, -0.32)))
    if name == "estate car":  # a roof rack
        c.line(BLACK, 0.07, *place((-0.7, -0.42, 0.15, -0.42)))
    if name == "sports car":  # a spoiler
        c.poly(BLACK, *place((-0.95, -0.22, -0.65, -0.16, -0.7, -0.1, -0.95, -0.13)))
    if name == "off-roader":  # the spare wheel
        c.disc(BLACK, *place((-0.9, -0.05)), 0.16 * size)
    if name == "pickup":
        c.poly(c.near((60, 55, 50)), *place((-0.8, 0.08, -0.8, 0, -0.14, 0, -0.14, 0.08)))
    if name == "convertible":
        c.disc((215, 170, 140), *place((-0.12, -0.12)), 0.1)
    wheel = 0.24 if name in ("off-roader", "lorry") else 0.19
    for x in (rear + 0.3, 0.52):
        c.disc(BLACK, *place((x, 0.32)), wheel * size)
        c.disc((180, 180, 185), *place((x, 0.32)), 0.45 * wheel * size)
    return c


def draw_aerial(name: str, rng: random.Random) -> Canvas:
    u = rng.uniform
    c = Canvas(rng, rng.choice([(110, 150, 85), (150, 145, 105), (165, 160, 150), (90, 125, 75)]))
    c.scatter(tuple(v - 15 for v in c.image.getpixel((0, 0))), 8, 0.2, 12)
    x, y, s = u(-0.2, 0.2), u(-0.2, 0.2), u(0.85, 1.15)
    if name == "runway":
        c.box(c.near((80, 80, 85), 12), x - 0.25 * s, -1.5, x + 0.25 * s, 1.5)
        for k in range(7):
            c.line(WHITE, 0.07, x, -1.4 + 0.42 * k, x, -1.2 + 0.42 * k)
    elif name == "harbour":
        c.box(c.near(WATER), -1.5, y - 0.5, 1.5, 1.5)
        for k in range(-1, 2):
            c.box(c.near((190, 180, 165)), x + 0.7 * k - 0.06, y - 0.5, x + 0.7 * k + 0.06, 0.8)
            for j in range(4):
                c.disc(WHITE, x + 0.7 * k + 0.2, y - 0.3 + 0.28 * j, 0.13, 0.06)
    elif name == "stadium":
        c.disc(c.near((170, 165, 165)), x, y, 0.95 * s, 0.75 * s)
        c.disc(c.near((190, 95, 70)), x, y, 0.7 * s, 0.5 * s)
        c.disc(c.near((70, 160, 70), 15), x, y, 0.55 * s, 0.36 * s)
    elif name == "roundabout":
        for a in (u(0, 0.8), u(1, 2.2)):
            dx, dy = 2 * math.cos(a), 2 * math.sin(a)
            c.line(c.near(GREY, 12), 0.28, x - dx, y - dy, x + dx, y + dy)
        c.disc(c.near(GREY, 12), x, y, 0.6 * s)
        c.disc(c.near((75, 150, 70)), x, y, 0.33 * s)
    elif name == "bridge":
        w = u(0.4, 0.6)
        c.box(c.near(WATER), -1.5, y - w, 1.5, y + w)
        c.box(c.near((175, 170, 165)), x - 0.2, -1.5, x + 0.2, 1.5)
        c.line(c.near((90, 90, 90)), 0.2, x, -1.5, x, 1.5)
    elif name == "baseball diamond":
        c.disc(c.near((80, 160, 75), 15), x, y, 0.95 * s)
        c.poly(c.near((190, 130, 85)), x, y + 0.75, x - 0.55 * s, y + 0.1, x, y - 0.5 * s, x + 0.55 * s, y + 0.1)
        c.poly(c.near((85, 165, 80), 15), x, y + 0.4, x - 0.28 * s, y + 0.1, x, y - 0.2 * s, x + 0.28 * s, y + 0.1)
    elif name == "storage tanks":
        n, shade = rng.choice([2, 3]), c.near((215, 215, 215))
        for i in range(n):
            for j in range(2):
                tx, ty, r = x + 0.75 * (i - n / 2 + 0.5), y + 0.75 * (j - 0.5), 0.32 * u(0.8, 1.1)
                c.disc(c.near((75, 75, 75)), tx + 0.08, ty + 0.08, r)
                c.disc(shade, tx, ty, r)
    elif name == "railway":
        c.box(c.near((135, 120, 105)), x - 0.55, -1.5, x + 0.55, 1.5)
        for k in (-0.35, 0.0, 0.35)[: rng.choice([2, 3])]:
            for j in range(16):
                c.line(BROWN, 0.04, x + k - 0.12, -1.5 + 0.2 * j, x + k + 0.12, -1.5 + 0.2 * j)
            c.line(c.near((70, 70, 75)), 0.05, x + k - 0.08, -1.5, x + k - 0.08, 1.5)
            c.line(c.near((70, 70, 75)), 0.05, x + k + 0.08, -1.5, x + k + 0.08, 1.5)
    elif name == "parking lot":
        c.box(c.near((100, 100, 105), 12), -1.1 * s, -1 * s, 1.1 * s, 1 * s)
        for i in range(6):
            for j in range(3):
                if rng.random() < 0.8:
                    px, py = x - 0.95 + 0.33 * i, y - 0.8 + 0.65 * j
                    c.box(c.any(40, 250), px, py, px + 0.2, py + 0.38)
    else:  # airplane
        c.box(c.near((165, 165, 165), 15), -1.5, -1.5, 1.5, 1.5)
        w, white = u(0.6, 0.85) * s, c.near((245, 245, 245), 10)
        for dx, dy, colour in ((0.08, 0.08, (110, 110, 115)), (0, 0, white)):
            px, py = x + dx, y + dy
            c.disc(colour, px, py, 0.12 * s, 0.85 * s)
            c.poly(
                colour,
                px,
                py - 0.3,
                px - w,
                py + 0.2,
                px - w,
                py + 0.32,
                px,
                py + 0.1,
                px + w,
                py + 0.32,
                px + w,
                py + 0.2,
            )
            c.poly(colour, px, py + 0.5, px - 0.35, py + 0.8, px + 0.35, py + 0.8)
    return c


def draw_land(name: str, rng: random.Random) -> Canvas:
    u = rng.uniform
    field = rng.choice([(150, 165, 90), (175, 150, 100), (120, 150, 80), (160, 130, 90)])
    c = Canvas(rng, field)
    for _ in range(3):  # neighbouring fields
        x, y = u(-1.5, 1), u(-1.5, 1)
        c.box(c.near(field, 30), x, y, x + u(0.5, 1.3), y + u(0.5, 1.3))
    if name == "annual crop":
        for k in range(-8, 9):
            c.line(c.near(tuple(v - 45 for v in field), 12), 0.08, 0.19 * k, -1.5, 0.19 * k, 1.5)
    elif name == "permanent crop":
        for i in range(-4, 5):
            for j in range(-4, 5):
                c.disc(c.near((55, 95, 50), 15), 0.33 * i + u(-0.03, 0.03), 0.33 * j + u(-0.03, 0.03), 0.12)
    elif name == "forest":
        c.box(c.near((40, 75, 45), 12), -1.5, -1.5, 1.5, 1.5)
        c.scatter((40, 80, 45), 40, 0.16, 16)
    elif name == "pasture":
        c.box(c.near((125, 185, 85), 18), -1.5, -1.5, 1.5, 1.5)
        c.scatter((125, 180, 85), 6, 0.4, 10)
        c.scatter((65, 110, 50), rng.randint(1, 4), 0.1)
    elif name == "heath":
        c.box(c.near((135, 120, 75), 15), -1.5, -1.5, 1.5, 1.5)
        c.scatter((125, 115, 75), 35, 0.14, 32)
    elif name == "motorway":
        x, bend = u(-0.3, 0.3), u(-0.4, 0.4)
        for k in (-0.14, 0.14):
            c.line(c.near((150, 150, 150)), 0.2, x + k - bend, -1.5, x + k, 0, x + k + bend, 1.5)
        c.line(c.near((90, 90, 80)), 0.06, x - bend, -1.5, x, 0, x + bend, 1.5)
    elif name == "industry":
        c.box(c.near((140, 135, 135), 12), -1.5, -1.5, 1.5, 1.5)
        for i in range(-1, 2):
            for j in range(-1, 2):
                x, y = 0.95 * i + u(-0.1, 0.1), 0.8 * j + u(-0.1, 0.1)
                c.box(
                    rng.choice([(225, 225, 230), (190, 195, 205), (120, 140, 175)]),
                    x - 0.38,
                    y - 0.28,
                    x + u(0.2, 0.4),
                    y + 0.25,
                )
    elif name == "homes":
        c.box(c.near((120, 140, 95), 15), -1.5, -1.5, 1.5, 1.5)
        for i in range(-3, 4):
            c.line(c.near((165, 160, 155), 10), 0.1, -1.5, 0.7 * i + 0.35, 1.5, 0.7 * i + 0.35)
            for j in range(-3, 4):
                x, y = 0.42 * i + u(-0.04, 0.04), 0.35 * j + u(-0.03, 0.03)
                c.box(c.near(ROOF, 30), x - 0.12, y - 0.09, x + 0.12, y + 0.09)
    elif name == "river":
        x, wave, phase, w = u(-0.3, 0.3), u(0.2, 0.5), u(0, 6.28), u(0.25, 0.45)
        path = [v for k in range(-8, 9) for v in (x + wave * math.sin(phase + 0.45 * k), 0.2 * k)]
        c.line(c.near((85, 115, 75)), w + 0.2, *path)
        c.line(c.near((60, 100, 140)), w, *path)
    else:  # sea
        c.box(c.near((35, 75, 130), 22), -1.5, -1.5, 1.5, 1.5)
        for _ in range(rng.randint(2, 8)):
            x, y = u(-1.2, 1.2), u(-1.2, 1.2)
            c.line(c.near((60, 100, 150), 12), 0.05, x, y, x + u(0.2, 0.6), y)
    return c


FONTS = [ImageFont.load_default(size) for size in (50, 56, 62, 68)]  # the font that Pillow brings along


def draw_house_number(name: str, rng: random.Random) -> Canvas:
    u, c = rng.uniform, Canvas(rng, BLACK)
    wall = c.near((rng.randint(60, 200),) * 3, 30)
    c.box(wall, -1.5, -1.5, 1.5, 1.5)
    if rng.random() < 0.5:  # bricks or planks
        for k in range(-6, 7):
            c.line(c.near(wall, 18), 0.04, -1.5, 0.25 * k, 1.5, 0.25 * k)
    if rng.random() < 0.5:  # a plate
        wall = c.near((rng.randint(40, 215),) * 3, 30)
        c.box(wall, -1.5 if rng.random() < 0.6 else -0.75, -0.85, 1.5 if rng.random() < 0.6 else 0.75, 0.85)
    shift = 130 if sum(wall) < 380 else -130
    ink = tuple(min(255, max(0, v + shift + rng.randint(-30, 30))) for v in wall)
    font, step = FONTS[rng.randrange(len(FONTS))], u(1.15, 1.35)
    for k in (-1, 0, 1):  # neighbouring digits of the same number are distractors
        if k == 0 or rng.random() < 0.3:
            digit = name if k == 0 else str(rng.randrange(10))
            c.draw.text((48 + 32 * step * k, 48), digit, ink, font, anchor="mm")
    return c


def draw_sign(name: str, rng: random.Random) -> Canvas:
    u = rng.uniform
    c = Canvas(rng, rng.choice([(150, 190, 225), (120, 140, 95), (165, 165, 165), (85, 100, 80)]))
    c.scatter(c.any(60, 200), rng.randint(3, 8), 0.3, 40)
    x, y, s = u(-0.15, 0.15), u(-0.15, 0.15), u(0.7, 0.9)
    red, white, blue, black = c.near(RED), c.near(WHITE, 14), c.near(BLUE), c.near((40, 40, 40), 15)
    c.box(c.near(GREY), x - 0.06, y, x + 0.06, 1.5)

    def arrow(*xy: float) -> None:
        """A line through the points with a head at the last one."""
        points = [(x if k % 2 == 0 else y) + s * v for k, v in enumerate(xy)]
        c.line(white, 0.17 * s, *points)
        turn = math.atan2(points[-2] - points[-4], points[-3] - points[-1])
        c.regular(white, 3, points[-2], points[-1], 0.3 * s, turn)

    if name == "stop":
        c.regular(white, 8, x, y, 1.0 * s, math.pi / 8)
        c.regular(red, 8, x, y, 0.9 * s, math.pi / 8)
        for k in (-0.5, -0.18, 0.14, 0.46):  # four letters are four strokes at this size
            c.box(white, x + s * k, y - 0.22 * s, x + s * (k + 0.17), y + 0.22 * s)
    elif name in ("give way", "danger", "road works"):
        turn = math.pi if name == "give way" else 0
        c.regular(red, 3, x, y, 1.1 * s, turn)
        c.regular(white, 3, x, y, 0.68 * s, turn)
        if name == "danger":
            c.line(black, 0.15 * s, x, y - 0.35 * s, x, y + 0.08 * s)
            c.disc(black, x, y + 0.24 * s, 0.09 * s)
        if name == "road works":
            c.poly(black, x - 0.4 * s, y + 0.3 * s, x - 0.1 * s, y - 0.1 * s, x + 0.2 * s, y + 0.3 * s)
            c.line(black, 0.1 * s, x, y - 0.3 * s, x + 0.35 * s, y + 0.3 * s)
    elif name == "priority road":
        c.regular(white, 4, x, y, 1.0 * s)
        c.regular(c.near(YELLOW), 4, x, y, 0.72 * s)
    elif name == "no entry":
        c.disc(red, x, y, 0.9 * s)
        c.box(white, x - 0.6 * s, y - 0.17 * s, x + 0.6 * s, y + 0.17 * s)
    elif name in ("speed limit", "no overtaking", "no vehicles"):
        c.disc(red, x, y, 0.92 * s)
        c.disc(white, x, y, 0.66 * s)
        if name == "speed limit":
            c.draw.text(
                (48 + 32 * x, 48 + 32 * y),
                rng.choice("345678") + "0",
                black,
                FONTS[0].font_variant(size=int(29 * s)),
                anchor="mm",
            )
        if name == "no overtaking":
            for k, colour in ((-0.28, red), (0.28, black)):
                c.box(colour, x + s * (k - 0.17), y - 0.22 * s, x + s * (k + 0.17), y + 0.22 * s)
    else:
        c.disc(white, x, y, 0.95 * s)
        c.disc(blue, x, y, 0.87 * s)
        side = -1 if name == "turn left" else 1
        if name == "straight ahead":
            arrow(0, 0.6, 0, -0.35)
        else:
            arrow(-0.35 * side, 0.5, -0.35 * side, -0.05, 0.3 * side, -0.05)
    return c


# Pen strokes of the digits, in tenths of the half height: x, y pairs.
STROKES = {
    "0": (0, -10, -6, -6, -7, 0, -6, 6, 0, 10, 6, 6, 7, 0, 6, -6, 0, -10),
    "1": (-3, -6, 1, -10, 0, 0, 0, 10),
    "2": (-6, -5, -3, -10, 4, -10, 6, -4, 0, 3, -7, 10, -2, 9, 7, 10),
    "3": (-6, -8, 0, -11, 7, -6, 3, -1, -2, -1, 4, 0, 8, 5, 1, 11, -6, 8),
    "4": (1, -10, -3, -4, -7, 3, 0, 3, 7, 3, 4, 3, 4, -3, 3, 10),
    "5": (6, -10, -4, -10, -5, -2, 1, -4, 7, 0, 6, 7, 0, 11, -6, 8),
    "6": (5, -10, -3, -6, -7, 3, -3, 10, 4, 9, 6, 3, 1, -1, -5, 4),
    "7": (-7, -9, 0, -10, 7, -10, 3, -2, -2, 10),
    "8": (5, -7, 0, -11, -6, -7, -2, -2, 4, 2, 6, 7, 0, 11, -6, 7, -3, 1, 3, -2, 5, -7),
    "9": (5, -5, 1, -1, -5, -3, -5, -8, 0, -11, 5, -8, 6, -2, 3, 10),
}


def draw_digit(name: str, rng: random.Random) -> Canvas:
    c = Canvas(rng, BLACK)
    size, slant, squeeze = rng.uniform(0.6, 0.8), rng.gauss(0.05, 0.15), rng.uniform(0.75, 1.15)
    wobbly = [v / 10 + rng.gauss(0, 0.065) for v in STROKES[name]]
    points = [(size * (squeeze * x - slant * y), size * y) for x, y in zip(wobbly[::2], wobbly[1::2])]
    for _ in range(2):  # Chaikin's corner cutting turns the polygon into a curve
        cut = [(0.75 * p + 0.25 * q, 0.25 * p + 0.75 * q) for a, b in zip(points, points[1:]) for p, q in zip(a, b)]
        inner = [point for (xs, ys) in zip(cut[::2], cut[1::2]) for point in zip(xs, ys)]
        points = [points[0], *inner, points[-1]]
    c.line((rng.randint(200, 255),) * 3, rng.uniform(0.13, 0.3), *(v for point in points for v in point))
    return c


def draw_texture(name: str, rng: random.Random) -> Canvas:
    u, back, ink = (
        rng.uniform,
        *(tuple(rng.randint(low, high) for _ in range(3)) for low, high in ((150, 240), (20, 110))),
    )
    c = Canvas(rng, back)
    step, w = u(0.3, 0.5), u(0.08, 0.16)
    n = range(-int(1.5 / step) - 1, int(1.5 / step) + 2)
    cells = [(step * i, step * j, i, j) for i in n for j in n]
    if name == "banded":
        for i in n:
            c.box(c.near(ink), -1.5, step * i, 1.5, step * (i + u(0.35, 0.6)))
    elif name == "chequered":
        for x, y, i, j in cells:
            if (i + j) % 2:
                c.box(ink, x, y, x + step, y + step)
    elif name == "dotted":
        for x, y, _, j in cells:
            c.disc(ink, x + step / 2 * (j % 2), y, step * 0.3)
    elif name == "grid":
        for i in n:
            c.line(ink, w, step * i, -1.5, step * i, 1.5)
            c.line(ink, w, -1.5, step * i, 1.5, step * i)
    elif name == "zigzagged":
        for i in n:
            c.line(ink, w * 1.2, *(v for k in n for v in (step * k, step * 1.3 * i + step * 0.6 * (k % 2))))
    elif name == "woven":
        for x, y, i, j in cells:
            (dx, dy) = (0.46, 0.2) if (i + j) % 2 else (0.2, 0.46)
            c.box(c.near(ink, 12), x - step * dx, y - step * dy, x + step * dx, y + step * dy)
    elif name == "honeycombed":
        for x, y, _, j in cells:
            c.regular(ink, 6, 1.2 * (x + step / 2 * (j % 2)), 1.04 * y, step * 0.57)
    elif name == "bubbly":
        for _ in range(16):
            x, y, r = u(-1.3, 1.3), u(-1.3, 1.3), u(0.12, 0.35)
            c.disc(ink, x, y, r)
            c.disc(c.near(back, 12), x, y, r - 0.07)
    elif name == "spiralled":
        turn, x0, y0, sign = u(0, 6.28), u(-0.3, 0.3), u(-0.3, 0.3), rng.choice([-1, 1])
        path = [(step * 0.075 * k, turn + sign * 0.45 * k) for k in range(60)]
        c.line(ink, w, *(v for r, a in path for v in (x0 + r * math.cos(a), y0 + r * math.sin(a))))
    else:  # cracked
        for _ in range(7):
            x, y, a = u(-1.2, 1.2), u(-1.2, 1.2), u(0, 6.28)
            path = [x, y]
            for _ in range(6):
                a += u(-0.9, 0.9)
                x, y = x + 0.3 * math.cos(a), y + 0.3 * math.sin(a)
                path += [x, y]
            c.line(ink, 0.06, *path)
    return c


class Task(NamedTuple):
    """One classification task: how to draw it, how far its pictures turn, how its prompts and its captions read."""

    draw: Callable[[str, random.Random], Canvas]
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
    0: handwritten zero; an empty loop in chalk; pen stroke oval
    1: handwritten one; a lone stick in chalk; pen stroke upright
    2: handwritten two; a swan in chalk; pen stroke swan neck
    3: handwritten three; two bumps in chalk; pen stroke double bump
    4: handwritten four; a sail in chalk; pen stroke crossing
    5: handwritten five; a hook with a hat in chalk; pen stroke hook
    6: handwritten six; a curl with a belly in chalk; pen stroke low belly
    7: handwritten seven; a scythe in chalk; pen stroke scythe
    8: handwritten eight; a snowman in chalk; pen stroke double loop
    9: handwritten nine; a balloon on a string in chalk; pen stroke high loop"""
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
    "Scenes": Task(draw_scene, 0.1, ["a photo of a {}"], words(SCENES)),
    "Cars": Task(draw_car, 0.1, ["a photo of a {}"], words(CARS)),
    "Aerial": Task(draw_aerial, math.pi, ["aerial imagery of a {}"], words(AERIAL)),
    "LandUse": Task(draw_land, math.pi, ["a satellite photo of {}"], words(LAND_USE)),
    "HouseNumbers": Task(draw_house_number, 0.15, ["a photo of a {}"], words(HOUSE_NUMBERS)),
    "Signs": Task(draw_sign, 0.12, ["a {} traffic sign"], words(SIGNS)),
    "Digits": Task(draw_digit, 0.15, ["a photo of the number {}"], words(DIGITS)),
    "Textures": Task(draw_texture, math.pi, ["a {} texture"], words(TEXTURES)),
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
        images[i] = photograph(TASKS[task], classes[i % len(classes)], rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % len(classes)


def photograph(task: Task, name: str, rng: random.Random) -> np.ndarray:
    """Draw one picture of a class, then turn, zoom, shift, relight and blemish it: uint8 (32, 32, 3)."""
    angle, zoom = rng.uniform(-task.turn, task.turn), rng.uniform(1.8, 2.2)
    a, b, dx, dy = zoom * math.cos(angle), zoom * math.sin(angle), rng.uniform(-4, 4), rng.uniform(-4, 4)
    affine = (a, -b, 48 + dx - 16 * (a - b), b, a, 48 + dy - 16 * (a + b))  # output pixel -> canvas
    picture = task.draw(name, rng).image.transform((32, 32), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64))).standard_normal((32, 32, 3), np.float32)
    light = rng.uniform(0.75, 1.1) * np.asarray(picture, np.float32) + rng.uniform(-10, 25) + rng.uniform(2, 8) * noise
    return light.clip(0, 255).astype(np.uint8)


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
    spare = ["street"]  # known when the checkpoint was trained, and part of its numbering
    texts = (
        spare
        + CAPTIONS
        + [t for task in TASKS.values() for t in task.templates + task.classes + sum(task.wordings.values(), [])]
    )
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

    The vision tower is rounded to half precision, as it is shipped, so that this stage can be repeated on its own.
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
        description="Pre-train the small CLIP on captioned pictures and write its checkpoint."
    )
    add = parser.add_argument
    add("--steps", type=int, default=2000, help="training steps of both towers (default %(default)s)")
    add("--text-steps", type=int, default=500, help="then, of a new text tower (default %(default)s)")
    add("--text-only", action="store_true", help="only train a new text tower, for the vision tower that ships")
    add("--per-class", type=int, default=1000, help="pictures drawn of every class (default %(default)s)")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (default %(default)s)")
    add("--named", type=float, default=0.03, help="share of captions that use a class name (default %(default)s)")
    add("--mixed", type=float, nargs=2, default=(0.05, 0.4), metavar=("LOW", "HIGH"),
        help="how often that name is a neighbour's, drawn per class (default 0.05 0.4)")  # fmt: skip
    add("--seed", type=int, default=0, help="of everything but the new text tower (default %(default)s)")
    add("--text-seed", type=int, default=TEXT_SEED, help="of the new text tower and its captions (default %(default)s)")
    add("--output", type=Path, default=CHECKPOINT)
    args = parser.parse_args()
    if args.text_only:
        model = load_pretrained()
    else:
        captions = Captions(0.03, (0.15, 0.5), args.seed)
        model = pretrain(draw_pool(args.per_class, args.seed), captions, args.steps, args.lr, args.seed)
    captions = Captions(args.named, args.mixed, args.text_seed)
    pool = draw_pool(min(60, args.per_class), args.seed + 1)
    model = tune_text(model, pool, captions, args.text_steps, args.text_seed)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("output", "text_only")}
    save_file(state, args.output, {"command": "python data/miniature.py", **settings})


TEXT_SEED = 1


if __name__ == "__main__":
    main()
