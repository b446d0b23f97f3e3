"""Seven ways to spoil pictures, each in five severities: what the robustness experiment tests on.

The kinds are those of Hendrycks and Dietterich (arXiv 1903.12261) that the paper reports, made anew: lengths are shares
of the picture, so that 32 x 32 and 224 x 224 pictures suffer alike. At severity 5 a person can still tell most classes.
`corrupt` is the way in; the functions above it take float images (N, 3, H, W) from 0 to 255, a level from CORRUPTIONS
and a random generator, and return floats, which `corrupt` rounds.
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def motion_blur(images: Tensor, length: float, rng: np.random.Generator) -> Tensor:
    """y(p) = mean of x(p + s d) over -length/2 <= s <= length/2, where d is the image's own random direction.

    Beyond its edges, the picture goes on as its outermost pixels.
    """
    direction = F.normalize(torch.from_numpy(rng.standard_normal((len(images), 1, 1, 2), np.float32)), dim=3)
    still = F.affine_grid(torch.eye(2, 3)[None], [1, *images.shape[1:]], align_corners=False)  # (1, H, W, 2)
    steps = 1 + math.ceil(length * max(images.shape[2:]))  # no more than a pixel apart
    shifts = torch.linspace(-length, length, steps)  # grid_sample's coordinates: a side runs from -1 to 1
    views = (F.grid_sample(images, still + s * direction, padding_mode="border", align_corners=False) for s in shifts)
    return sum(views) / steps


def impulse_noise(images: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """y = 0 with probability share/2, 255 with probability share/2, else x; red, green and blue draw separately."""
    u = torch.from_numpy(rng.random(images.shape, np.float32))
    return images.masked_fill(u < share / 2, 0).masked_fill(u >= 1 - share / 2, 255)


def gaussian_noise(images: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """y = x + 255 deviation n, n from a standard normal distribution, for every value of every pixel."""
    return images + 255 * deviation * torch.from_numpy(rng.standard_normal(images.shape, np.float32))


def pixelate(images: Tensor, blocks: int, rng: np.random.Generator) -> Tensor:
    """y(p) = mean of x over p's block, `blocks` of them to a side; a side with fewer pixels keeps them all."""
    height, width = images.shape[2:]
    coarse = F.interpolate(images, (min(blocks, height), min(blocks, width)), mode="area")
    return F.interpolate(coarse, (height, width), mode="nearest-exact")


def spatter(images: Tensor, share: float, rng: np.random.Generator) -> Tensor:
    """y = (1 - m) x + m mud, with the mask m = 4 (g - z) cut to [0, 1]: drops of mud, thinner towards their edges.

    g is a smooth random field of 12 x 12 hills and hollows, z the height that `share` of its pixels exceed.
    """
    hills = torch.from_numpy(rng.standard_normal((len(images), 1, 12, 12), np.float32))
    field = F.interpolate(hills, images.shape[2:], mode="bicubic", align_corners=False)  # (N, 1, H, W)
    dry = max(1, round((1 - share) * math.prod(images.shape[2:])))  # pixels of an image that stay as they are
    height = field.flatten(1).kthvalue(dry).values[:, None, None, None]
    mask = (4 * (field - height)).clamp(0, 1)
    return (1 - mask) * images + mask * torch.tensor([75.0, 50.0, 25.0])[:, None, None]


def contrast(images: Tensor, kept: float, rng: np.random.Generator) -> Tensor:
    """y = c + kept (x - c), where c is the image's mean colour."""
    mean = images.mean((2, 3), keepdim=True)
    return mean + kept * (images - mean)


def jpeg_compression(images: Tensor, quality: int, rng: np.random.Generator) -> Tensor:
    """y = decode(encode(x, quality)), by Pillow."""

    def round_trip(picture: np.ndarray) -> np.ndarray:
        Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    pictures = images.byte().permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    spoiled = np.array([round_trip(picture) for picture in pictures], np.float32).reshape(pictures.shape)
    return torch.from_numpy(spoiled).permute(0, 3, 1, 2).contiguous()


CORRUPTIONS: dict[str, tuple[Callable[[Tensor, float, np.random.Generator], Tensor], tuple[float, ...]]] = {
    # name: how, and the levels of severities 1 to 5
    "motion_blur": (motion_blur, (0.06, 0.1, 0.15, 0.2, 0.25)),  # length of the motion, in sides of the picture
    "impulse_noise": (impulse_noise, (0.03, 0.07, 0.12, 0.2, 0.3)),  # share of the values replaced
    "gaussian_noise": (gaussian_noise, (0.06, 0.1, 0.15, 0.22, 0.3)),  # standard deviation, where white is 1
    "pixelate": (pixelate, (24, 16, 12, 10, 8)),  # blocks along each side
    "spatter": (spatter, (0.1, 0.2, 0.3, 0.4, 0.5)),  # share of the pixels covered
    "contrast": (contrast, (0.6, 0.45, 0.3, 0.2, 0.1)),  # share of the contrast kept
    "jpeg_compression": (jpeg_compression, (30, 20, 15, 11, 8)),  # JPEG quality, of 100
}


def corrupt(images: Tensor, name: str, severity: int = 5, seed: int = 0) -> Tensor:
    """A corrupted copy of `images`, uint8 (N, 3, H, W); `name` is one of CORRUPTIONS, `severity` from 1 to 5.

    What happens to image i depends on name, severity, seed and i alone, not on N: each corruption draws from its random
    stream once, image after image. The stream is the same for every severity, so a picture worsens step by step.
    """
    (spoil, levels), rng = CORRUPTIONS[name], np.random.default_rng([seed, *name.encode()])
    parts = (spoil(part.float(), levels[severity - 1], rng) for part in images.split(128))  # not all as floats at once
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])
