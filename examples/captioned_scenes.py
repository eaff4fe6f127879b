"""Captioned scenes, drawn from a seed: image-text data for experiments, without a download.

A scene shows one captioned object (a colour, a shape) on a textured background, among smaller objects that the caption
does not name. `centering` says how strongly the captioned object sits at the centre, from 1 (always exactly there, as a
photographer would frame it) to 0 (anywhere). So whatever a mask does to the centre of an image can be studied where the
truth is known: random and centred masks see the same number of patches, and only the place of the object differs.

The captioned object is told from the distractors by its size alone, wherever it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COLORS = {
    "red": (220, 50, 47),
    "green": (60, 170, 70),
    "blue": (45, 95, 220),
    "yellow": (240, 215, 60),
    "purple": (150, 60, 190),
    "orange": (245, 140, 40),
    "cyan": (70, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star", "bar", "crescent")
BACKGROUNDS = ("dark", "grey", "brown")
_BACKGROUND_COLORS = ((28, 30, 42), (120, 122, 125), (112, 78, 52))

CLASSNAMES = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
TEMPLATES = [f"a {{}} on a {background} background." for background in BACKGROUNDS]

_SUPERSAMPLING = 2


class Scenes(NamedTuple):
    """Images (N, 3, size, size) uint8, their captions, and labels (N,) int64 into `CLASSNAMES`."""

    images: Tensor
    captions: list[str]
    labels: Tensor


def make_scenes(
    num_scenes: int,
    *,
    image_size: int = 32,
    centering: float = 1.0,
    num_distractors: int = 2,
    object_size: float = 0.4,
    seed: int = 0,
) -> Scenes:
    """Draw `num_scenes` scenes; the same arguments draw the same scenes.

    Args:
        image_size: side of the square images, in pixels.
        centering: 1 puts the captioned object at the centre, 0 anywhere inside the image with equal chance; between
            them its offset from the centre shrinks in proportion.
        num_distractors: how many smaller objects, at random places and of random colour and shape, lie under it.
        object_size: mean diameter of the captioned object, as a share of the image's side; distractors have half of it.
        seed: of the scenes. Use different ones for training and test.

    Raises:
        ValueError: for a centering outside [0, 1] or an object_size outside (0, 1).
    """
    if not 0 <= centering <= 1:
        raise ValueError(f"centering must lie in [0, 1], got {centering!r}")
    if not 0 < object_size < 1:
        raise ValueError(f"object_size must lie in (0, 1), got {object_size!r}")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSNAMES), (num_scenes,), generator=generator)
    backgrounds = torch.randint(len(BACKGROUNDS), (num_scenes,), generator=generator)
    images = torch.cat(
        [
            _draw(*chunk, image_size, centering, num_distractors, object_size, generator)
            for chunk in zip(labels.split(1024), backgrounds.split(1024), strict=True)
        ]
    )
    captions = [
        TEMPLATES[background].format(CLASSNAMES[label])
        for label, background in zip(labels.tolist(), backgrounds.tolist(), strict=True)
    ]
    return Scenes(images, captions, labels)


def _draw(
    labels: Tensor,
    backgrounds: Tensor,
    image_size: int,
    centering: float,
    num_distractors: int,
    object_size: float,
    generator: torch.Generator,
) -> Tensor:
    """Images (B, 3, size, size) uint8."""
    batch_size, side = len(labels), image_size * _SUPERSAMPLING
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(batch_size, *shape, generator=generator) * (high - low) + low

    canvas = torch.tensor(_BACKGROUND_COLORS, dtype=torch.float32)[backgrounds][:, :, None, None]
    texture = torch.nn.functional.interpolate(uniform(-30, 30, 3, 6, 6), size=(side, side), mode="bilinear")
    canvas = canvas + texture

    for layer in range(num_distractors + 1):
        captioned = layer == num_distractors  # drawn last, over the distractors
        radius = object_size * uniform(0.85, 1.15) * (1.0 if captioned else 0.5)  # half of the side is 1
        reach = (1 - radius).unsqueeze(1) * (1 - centering if captioned else 1.0)
        place = uniform(-1, 1, 2) * reach
        kind = labels if captioned else torch.randint(len(CLASSNAMES), (batch_size,), generator=generator)
        color = palette[kind // len(SHAPES)] + uniform(-20, 20, 3)
        inside = _stamp(kind % len(SHAPES), place, radius, uniform(-0.4, 0.4), side)
        canvas = torch.where(inside[:, None], color[:, :, None, None], canvas)

    canvas = torch.nn.functional.avg_pool2d(canvas, _SUPERSAMPLING) + uniform(-12, 12, 3, image_size, image_size)
    return canvas.round().clamp(0, 255).to(torch.uint8)


def _stamp(shapes: Tensor, place: Tensor, radius: Tensor, angle: Tensor, side: int) -> Tensor:
    """Which pixels (B, side, side) lie inside the shape of each scene; `place` is (y, x) in [-1, 1]^2."""
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    y = (axis[None, :, None] - place[:, :1, None]) / radius[:, None, None]
    x = (axis[None, None, :] - place[:, 1:, None]) / radius[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    y, x = y * cos - x * sin, y * sin + x * cos
    inside = torch.empty(len(shapes), side, side, dtype=torch.bool)
    for index, shape in enumerate(SHAPES):
        rows = shapes == index
        inside[rows] = _contains(shape, y[rows], x[rows])
    return inside


def _contains(shape: str, y: Tensor, x: Tensor) -> Tensor:
    """The shape of radius 1 around 0."""
    distance = (y.square() + x.square()).sqrt()
    if shape == "circle":
        return distance < 0.9
    if shape == "square":
        return torch.maximum(y.abs(), x.abs()) < 0.78
    if shape == "triangle":
        return (y < 0.6) & (y > 2 * x.abs() - 1)
    if shape == "ring":
        return (distance > 0.55) & (distance < 1)
    if shape == "cross":
        return (torch.minimum(y.abs(), x.abs()) < 0.25) & (torch.maximum(y.abs(), x.abs()) < 0.95)
    if shape == "star":
        return distance < 0.62 + 0.38 * torch.cos(5 * (torch.atan2(x, -y)))
    if shape == "bar":
        return (y.abs() < 0.3) & (x.abs() < 1)
    if shape == "crescent":
        return (distance < 1) & ((x - 0.5).square() + y.square() > 0.7**2)
    raise ValueError(f"unknown shape {shape!r}")
