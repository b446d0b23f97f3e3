"""Pictures of the classes of eight small tasks, drawn by a program: the miniature's photographs.

Each `draw_...` function makes a drawing of one class of its task, `photograph` takes a 32 x 32 picture of a drawing:
turned, zoomed, shifted, relit and blemished. All chance comes from the picture's own `random.Random`.
"""

import math
import random
from functools import cache, partial
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
WHITE, BLACK, GREY = (240, 240, 240), (25, 25, 25), (125, 125, 125)
RED, GREEN, BLUE, YELLOW = (200, 35, 40), (60, 140, 60), (40, 90, 200), (245, 200, 40)
SAND, BROWN, WATER, ROOF, GLASS = (225, 200, 140), (120, 85, 55), (50, 110, 190), (190, 90, 70), (150, 200, 225)
EVERYWHERE = (-1.5, -1.5, 1.5, 1.5)  # the box that covers a canvas

font = cache(ImageFont.load_default)  # size in pixels -> the font that Pillow brings along


def placed(x: float, y: float, width: float, height: float, *xy: float) -> list[float]:
    """The points of a shape (x, y pairs) after it is stretched by width and height and moved to (x, y)."""
    return [v for a, b in zip(xy[::2], xy[1::2]) for v in (x + width * a, y + height * b)]


class Canvas:
    """A drawing of 96 x 96 pixels. Its visible window is the square [-1, 1]², y pointing down.

    Every method takes the colour first, then lengths in units of half the window. `rng` is the picture's own.
    """

    def __init__(self, rng: random.Random, background: Colour):
        self.rng, self.image = rng, Image.new("RGB", (96, 96), background)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, fill: Colour, *xy: float) -> None:
        self.draw.rectangle([48 + 32 * v for v in xy], fill)

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

    def text(self, fill: Colour, size: int, x: float, y: float, text: str) -> None:
        self.draw.text((48 + 32 * x, 48 + 32 * y), text, fill, font(size), anchor="mm")

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
            y, left, right = horizon + 0.15 + 0.17 * k, x - u(0.1, 0.3), x + u(0.1, 0.3)
            c.line((250, 180, 100), 0.05, left, y, right, y)
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
    place = partial(placed, x0, y0, flip * size, size)
    paint = c.near(rng.choice([RED, (30, 60, 150), (30, 100, 60), (50, 50, 55), (190, 120, 20), (110, 40, 110)]))
    cabin = CABINS[name]
    front = 0.06 if name == "sports car" else 0
    rear = -0.52 if name == "hatchback" else -0.85
    c.poly(paint, *place(rear, 0.3, rear, 0.02, rear + 0.2, 0, 0.4, 0, 0.85, 0.06 + front, 0.88, 0.3))
    c.poly(paint, *place(*cabin))
    middle, glass = sum(cabin[::2]) / 4, c.near(GLASS, 30)
    if name == "bus":
        for k in range(5):
            left, right = -0.72 + 0.3 * k, -0.52 + 0.3 * k
            c.poly(glass, *place(left, -0.2, left, -0.55, right, -0.55, right, -0.2))
    else:  # the cabin, smaller
        window = placed(middle, -0.02, 0.75, 0.8, *placed(-middle, 0, 1, 1, *cabin))
        c.poly(glass, *place(*window))
    if name == "lorry":
        c.poly(c.any(60, 245), *place(-0.85, 0.15, -0.85, -0.75, 0.33, -0.75, 0.33, 0.15))
    if name in ("saloon", "estate car", "minivan"):  # the pillar between the windows
        c.line(paint, 0.07, *place(-0.08, 0, -0.08, -0.32))
    if name == "estate car":  # a roof rack
        c.line(BLACK, 0.07, *place(-0.7, -0.42, 0.15, -0.42))
    if name == "sports car":  # a spoiler
        c.poly(BLACK, *place(-0.95, -0.22, -0.65, -0.16, -0.7, -0.1, -0.95, -0.13))
    if name == "off-roader":  # the spare wheel
        c.disc(BLACK, *place(-0.9, -0.05), 0.16 * size)
    if name == "pickup":
        c.poly(c.near((60, 55, 50)), *place(-0.8, 0.08, -0.8, 0, -0.14, 0, -0.14, 0.08))
    if name == "convertible":
        c.disc((215, 170, 140), *place(-0.12, -0.12), 0.1)
    wheel = 0.24 if name in ("off-roader", "lorry") else 0.19
    for x in (rear + 0.3, 0.52):
        c.disc(BLACK, *place(x, 0.32), wheel * size)
        c.disc((180, 180, 185), *place(x, 0.32), 0.45 * wheel * size)
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
        for i, j in product(range(n), range(2)):
            tx, ty, r = x + 0.75 * (i - n / 2 + 0.5), y + 0.75 * (j - 0.5), 0.32 * u(0.8, 1.1)
            c.disc(c.near((75, 75, 75)), tx + 0.08, ty + 0.08, r)
            c.disc(shade, tx, ty, r)
    elif name == "railway":
        c.box(c.near((135, 120, 105)), x - 0.55, -1.5, x + 0.55, 1.5)
        for k in (-0.35, 0.0, 0.35)[: rng.choice([2, 3])]:
            for j in range(16):
                c.line(BROWN, 0.04, x + k - 0.12, -1.5 + 0.2 * j, x + k + 0.12, -1.5 + 0.2 * j)
            for rail in (x + k - 0.08, x + k + 0.08):
                c.line(c.near((70, 70, 75)), 0.05, rail, -1.5, rail, 1.5)
    elif name == "parking lot":
        c.box(c.near((100, 100, 105), 12), -1.1 * s, -1 * s, 1.1 * s, 1 * s)
        for i, j in product(range(6), range(3)):
            if rng.random() < 0.8:
                px, py = x - 0.95 + 0.33 * i, y - 0.8 + 0.65 * j
                c.box(c.any(40, 250), px, py, px + 0.2, py + 0.38)
    else:  # airplane
        c.box(c.near((165, 165, 165), 15), *EVERYWHERE)
        w, white = u(0.6, 0.85) * s, c.near((245, 245, 245), 10)
        for dx, dy, colour in ((0.08, 0.08, (110, 110, 115)), (0, 0, white)):
            place = partial(placed, x + dx, y + dy, 1, 1)
            c.disc(colour, *place(0, 0), 0.12 * s, 0.85 * s)
            c.poly(colour, *place(0, -0.3, -w, 0.2, -w, 0.32, 0, 0.1, w, 0.32, w, 0.2))
            c.poly(colour, *place(0, 0.5, -0.35, 0.8, 0.35, 0.8))
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
        for i, j in product(range(-4, 5), repeat=2):
            c.disc(c.near((55, 95, 50), 15), 0.33 * i + u(-0.03, 0.03), 0.33 * j + u(-0.03, 0.03), 0.12)
    elif name == "forest":
        c.box(c.near((40, 75, 45), 12), *EVERYWHERE)
        c.scatter((40, 80, 45), 40, 0.16, 16)
    elif name == "pasture":
        c.box(c.near((125, 185, 85), 18), *EVERYWHERE)
        c.scatter((125, 180, 85), 6, 0.4, 10)
        c.scatter((65, 110, 50), rng.randint(1, 4), 0.1)
    elif name == "heath":
        c.box(c.near((135, 120, 75), 15), *EVERYWHERE)
        c.scatter((125, 115, 75), 35, 0.14, 32)
    elif name == "motorway":
        x, bend = u(-0.3, 0.3), u(-0.4, 0.4)
        for k in (-0.14, 0.14):
            c.line(c.near((150, 150, 150)), 0.2, x + k - bend, -1.5, x + k, 0, x + k + bend, 1.5)
        c.line(c.near((90, 90, 80)), 0.06, x - bend, -1.5, x, 0, x + bend, 1.5)
    elif name == "industry":
        c.box(c.near((140, 135, 135), 12), *EVERYWHERE)
        for i, j in product(range(-1, 2), repeat=2):
            x, y = 0.95 * i + u(-0.1, 0.1), 0.8 * j + u(-0.1, 0.1)
            roof = rng.choice([(225, 225, 230), (190, 195, 205), (120, 140, 175)])
            c.box(roof, x - 0.38, y - 0.28, x + u(0.2, 0.4), y + 0.25)
    elif name == "homes":
        c.box(c.near((120, 140, 95), 15), *EVERYWHERE)
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
        c.box(c.near((35, 75, 130), 22), *EVERYWHERE)
        for _ in range(rng.randint(2, 8)):
            x, y = u(-1.2, 1.2), u(-1.2, 1.2)
            c.line(c.near((60, 100, 150), 12), 0.05, x, y, x + u(0.2, 0.6), y)
    return c


def draw_house_number(name: str, rng: random.Random) -> Canvas:
    u, c = rng.uniform, Canvas(rng, BLACK)
    wall = c.near((rng.randint(60, 200),) * 3, 30)
    c.box(wall, *EVERYWHERE)
    if rng.random() < 0.5:  # bricks or planks
        for k in range(-6, 7):
            c.line(c.near(wall, 18), 0.04, -1.5, 0.25 * k, 1.5, 0.25 * k)
    if rng.random() < 0.5:  # a plate
        wall = c.near((rng.randint(40, 215),) * 3, 30)
        c.box(wall, -1.5 if rng.random() < 0.6 else -0.75, -0.85, 1.5 if rng.random() < 0.6 else 0.75, 0.85)
    shift = 130 if sum(wall) < 380 else -130
    ink = tuple(min(255, max(0, v + shift + rng.randint(-30, 30))) for v in wall)
    size, step = rng.choice([50, 56, 62, 68]), u(1.15, 1.35)
    for k in (-1, 0, 1):  # neighbouring digits of the same number are distractors
        if k == 0 or rng.random() < 0.3:
            c.text(ink, size, step * k, 0, name if k == 0 else str(rng.randrange(10)))
    return c


def draw_sign(name: str, rng: random.Random) -> Canvas:
    u = rng.uniform
    c = Canvas(rng, rng.choice([(150, 190, 225), (120, 140, 95), (165, 165, 165), (85, 100, 80)]))
    c.scatter(c.any(60, 200), rng.randint(3, 8), 0.3, 40)
    x, y, s = u(-0.15, 0.15), u(-0.15, 0.15), u(0.7, 0.9)
    place = partial(placed, x, y, s, s)
    red, white, blue, black = c.near(RED), c.near(WHITE, 14), c.near(BLUE), c.near((40, 40, 40), 15)
    c.box(c.near(GREY), x - 0.06, y, x + 0.06, 1.5)
    if name == "stop":
        c.regular(white, 8, x, y, 1.0 * s, math.pi / 8)
        c.regular(red, 8, x, y, 0.9 * s, math.pi / 8)
        for k in (-0.5, -0.18, 0.14, 0.46):  # four letters are four strokes at this size
            c.box(white, *place(k, -0.22, k + 0.17, 0.22))
    elif name in ("give way", "danger", "road works"):
        turn = math.pi if name == "give way" else 0
        c.regular(red, 3, x, y, 1.1 * s, turn)
        c.regular(white, 3, x, y, 0.68 * s, turn)
        if name == "danger":
            c.line(black, 0.15 * s, *place(0, -0.35, 0, 0.08))
            c.disc(black, *place(0, 0.24), 0.09 * s)
        if name == "road works":
            c.poly(black, *place(-0.4, 0.3, -0.1, -0.1, 0.2, 0.3))
            c.line(black, 0.1 * s, *place(0, -0.3, 0.35, 0.3))
    elif name == "priority road":
        c.regular(white, 4, x, y, 1.0 * s)
        c.regular(c.near(YELLOW), 4, x, y, 0.72 * s)
    elif name == "no entry":
        c.disc(red, x, y, 0.9 * s)
        c.box(white, *place(-0.6, -0.17, 0.6, 0.17))
    elif name in ("speed limit", "no overtaking", "no vehicles"):
        c.disc(red, x, y, 0.92 * s)
        c.disc(white, x, y, 0.66 * s)
        if name == "speed limit":
            c.text(black, int(29 * s), x, y, rng.choice("345678") + "0")
        if name == "no overtaking":
            for k, colour in ((-0.28, red), (0.28, black)):
                c.box(colour, *place(k - 0.17, -0.22, k + 0.17, 0.22))
    else:  # an arrow on a blue disc
        c.disc(white, x, y, 0.95 * s)
        c.disc(blue, x, y, 0.87 * s)
        side = -1 if name == "turn left" else 1
        arrow = place(-0.35 * side, 0.5, -0.35 * side, -0.05, 0.3 * side, -0.05)
        if name == "straight ahead":
            arrow = place(0, 0.6, 0, -0.35)
        c.line(white, 0.17 * s, *arrow)
        x0, y0, x1, y1 = arrow[-4:]
        c.regular(white, 3, x1, y1, 0.3 * s, math.atan2(x1 - x0, y0 - y1))
    return c


# Pen strokes of the digits, in tenths of the half height: x, y pairs.
STROKES = {
    "zero": (0, -10, -6, -6, -7, 0, -6, 6, 0, 10, 6, 6, 7, 0, 6, -6, 0, -10),
    "one": (-3, -6, 1, -10, 0, 0, 0, 10),
    "two": (-6, -5, -3, -10, 4, -10, 6, -4, 0, 3, -7, 10, -2, 9, 7, 10),
    "three": (-6, -8, 0, -11, 7, -6, 3, -1, -2, -1, 4, 0, 8, 5, 1, 11, -6, 8),
    "four": (1, -10, -3, -4, -7, 3, 0, 3, 7, 3, 4, 3, 4, -3, 3, 10),
    "five": (6, -10, -4, -10, -5, -2, 1, -4, 7, 0, 6, 7, 0, 11, -6, 8),
    "six": (5, -10, -3, -6, -7, 3, -3, 10, 4, 9, 6, 3, 1, -1, -5, 4),
    "seven": (-7, -9, 0, -10, 7, -10, 3, -2, -2, 10),
    "eight": (5, -7, 0, -11, -6, -7, -2, -2, 4, 2, 6, 7, 0, 11, -6, 7, -3, 1, 3, -2, 5, -7),
    "nine": (5, -5, 1, -1, -5, -3, -5, -8, 0, -11, 5, -8, 6, -2, 3, 10),
}


def draw_digit(name: str, rng: random.Random) -> Canvas:
    c = Canvas(rng, BLACK)
    size, slant, squeeze = rng.uniform(0.6, 0.8), rng.gauss(0.05, 0.15), rng.uniform(0.75, 1.15)
    x, y = np.reshape([v / 10 + rng.gauss(0, 0.065) for v in STROKES[name]], (-1, 2)).T
    curve = size * np.stack([squeeze * x - slant * y, y])  # (2, points)
    for _ in range(2):  # Chaikin's corner cutting turns the strokes into a curve
        a, b = curve[:, :-1], curve[:, 1:]
        cut = np.stack([0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b], 2).reshape(2, -1)
        curve = np.hstack([curve[:, :1], cut, curve[:, -1:]])
    c.line((rng.randint(200, 255),) * 3, rng.uniform(0.13, 0.3), *curve.T.flatten())
    return c


def draw_texture(name: str, rng: random.Random) -> Canvas:
    u, c = rng.uniform, Canvas(rng, BLACK)
    back, ink = c.any(150, 240), c.any(20, 110)
    c.box(back, *EVERYWHERE)
    step, w = u(0.3, 0.5), u(0.08, 0.16)
    n = range(-int(1.5 / step) - 1, int(1.5 / step) + 2)
    cells = [(step * i, step * j, i, j) for i, j in product(n, repeat=2)]
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


def photograph(canvas: Canvas, turn: float, rng: random.Random) -> np.ndarray:
    """Turn the drawing by up to `turn` (radians), zoom, shift, relight and blemish it: uint8 (32, 32, 3)."""
    angle, zoom = rng.uniform(-turn, turn), rng.uniform(1.8, 2.2)
    a, b, dx, dy = zoom * math.cos(angle), zoom * math.sin(angle), rng.uniform(-4, 4), rng.uniform(-4, 4)
    affine = (a, -b, 48 + dx - 16 * (a - b), b, a, 48 + dy - 16 * (a + b))  # picture's pixel -> drawing's
    picture = canvas.image.transform((32, 32), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64))).standard_normal((32, 32, 3), np.float32)
    light = rng.uniform(0.75, 1.1) * np.asarray(picture, np.float32) + rng.uniform(-10, 25) + rng.uniform(2, 8) * noise
    return light.clip(0, 255).astype(np.uint8)
