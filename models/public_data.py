"""The public data behind the candidates: rendered characters.

Characters are drawn as by a pen: each glyph of a font is thinned to its centre line, the line is bent, slanted and
turned at random, and a pen of random width is drawn along it. The bitmap is then reduced as the NIST forms behind the
well-known 8x8 digits were: normalised to 32x32 black and white, and counted over 4x4 blocks. No private record, and
nothing measured on one, has a part in it.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

from urna.models.vision import SIDE

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"  # the 47 classes
_SAME_SHAPE = "cijklmopsuvwxyz"  # small letters that look like their capitals at one size, as in EMNIST "balanced"
_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
_CANVAS = 48  # side, in pixels, on which glyphs are thinned and bent
_GLYPH = 36  # longer side of a glyph on the canvas
_BITMAP = 32  # side of the black-and-white bitmap that is counted over 4x4 blocks
_MAX_TURN = np.deg2rad(15.0)
_MAX_SHEAR = 0.3
_MAX_STRETCH = 0.25  # of the logarithm of width over height
_BEND = 0.055  # standard deviation of the elastic displacement, in half canvases
_PEN_PIXELS = (1.2, 2.6)  # half the width of the pen, on the bitmap


def characters(number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Render random characters.

    Returns:
        float32 (number, 1, 8, 8) in multiples of 1/16, and int64 (number,) classes in 0..46.
    """
    distances, classes = _centre_lines()
    images, labels = [], []
    for start in range(0, number, 1000):  # bounds memory
        chosen = torch.randint(len(classes), (min(1000, number - start),), generator=generator)
        images.append(_draw(distances[chosen], generator))
        labels.append(classes[chosen])
    return torch.cat(images), torch.cat(labels)


@lru_cache(maxsize=1)
def _centre_lines() -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to the centre line for every font and character, float32 (g, 1, 48, 48), and its class (g,)."""
    folder = Path(get_data_path()) / "fonts" / "ttf"
    glyphs, classes = [], []
    for font_name in _FONTS:
        font = ImageFont.truetype(folder / f"{font_name}.ttf", 80)
        for character in CHARACTERS + _SAME_SHAPE:
            glyphs.append(_glyph(character, font))
            classes.append(CHARACTERS.index(character if character in CHARACTERS else character.upper()))
    lines = torch.from_numpy(_thin(np.stack(glyphs)))
    every_pixel = torch.ones(_CANVAS, _CANVAS).nonzero().float()  # (48 * 48, 2)
    distances = [torch.cdist(every_pixel, line.nonzero().float()).amin(1).view(1, _CANVAS, _CANVAS) for line in lines]
    return torch.stack(distances), torch.tensor(classes)


def _glyph(character: str, font: ImageFont.FreeTypeFont) -> NDArray[np.bool_]:
    """Render one character large, crop it, and centre it on the canvas: (48, 48)."""
    page = Image.new("L", (200, 200))
    ImageDraw.Draw(page).text((60, 40), character, fill=255, font=font)
    cropped = page.crop(page.getbbox())
    ratio = _GLYPH / max(cropped.size)
    width, height = (max(2, round(side * ratio)) for side in cropped.size)
    canvas = Image.new("L", (_CANVAS, _CANVAS))
    resized = cropped.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(resized, ((_CANVAS - width) // 2, (_CANVAS - height) // 2))
    return np.asarray(canvas) > 127


def _thin(bitmaps: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Thin strokes to centre lines one pixel wide (Zhang and Suen 1984), all bitmaps at once; (g, h, w) both ways."""
    ink = bitmaps.copy()
    while True:
        before = ink.copy()
        for step in (0, 1):
            padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
            n, s = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]
            w, e = padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
            ring = (n, padded[:, :-2, 2:], e, padded[:, 2:, 2:], s, padded[:, 2:, :-2], w, padded[:, :-2, :-2])
            neighbours = np.zeros(ink.shape, np.uint8)
            crossings = np.zeros(ink.shape, np.uint8)
            for here, following in zip(ring, ring[1:] + ring[:1], strict=True):
                neighbours += here
                crossings += ~here & following
            kept_sides = (n & e & s) | (e & s & w) if step == 0 else (n & e & w) | (n & s & w)
            ink &= ~((neighbours >= 2) & (neighbours <= 6) & (crossings == 1) & ~kept_sides)
        if np.array_equal(before, ink):
            return ink


def _uniform(number: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(number, generator=generator)


def _draw(distances: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Bend and slant centre lines and draw a pen along them: (b, 1, 48, 48) -> (b, 1, 8, 8) in [0, 1]."""
    number = len(distances)
    turn = _uniform(number, -_MAX_TURN, _MAX_TURN, generator)
    shear = _uniform(number, -_MAX_SHEAR, _MAX_SHEAR, generator)
    stretch = _uniform(number, -_MAX_STRETCH, _MAX_STRETCH, generator).exp()
    affine = torch.zeros(number, 2, 3)
    affine[:, 0, 0], affine[:, 0, 1] = turn.cos() * stretch, shear - turn.sin()
    affine[:, 1, 0], affine[:, 1, 1] = turn.sin(), turn.cos() / stretch
    bend = _BEND * torch.randn((number, 2, 4, 4), generator=generator)
    bend = functional.interpolate(bend, size=_CANVAS, mode="bicubic", align_corners=True)
    grid = functional.affine_grid(affine, [number, 1, _CANVAS, _CANVAS], align_corners=False)
    warped = _sample(distances, grid + bend.permute(0, 2, 3, 1))

    # normalise size: the inked box, longer side first, fills the bitmap, as in the forms of the public description
    ratio, centre = _inked_box(warped.squeeze(1) < 1.0)  # (b,), (b, 2)
    box = torch.zeros(number, 2, 3)
    box[:, 0, 0] = box[:, 1, 1] = ratio
    box[:, :, 2] = centre
    grid = functional.affine_grid(box, [number, 1, _BITMAP, _BITMAP], align_corners=False)
    on_bitmap = _sample(warped, grid) * (_BITMAP / _CANVAS) / ratio[:, None, None, None]  # distance in bitmap pixels
    pen = _uniform(number, *_PEN_PIXELS, generator)[:, None, None, None]
    return functional.avg_pool2d((on_bitmap < pen).float(), _BITMAP // SIDE)


def _sample(images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _inked_box(ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the longer side (b,) and the centre (b, 2) as (x, y) of each bitmap's inked box; the canvas is [-1, 1]."""
    side = ink.shape[-1]
    ends = []
    for axis in (1, 2):  # over rows gives columns, so x; over columns gives y
        occupied = ink.any(axis).to(torch.uint8)
        first = occupied.argmax(1)
        last = side - occupied.flip(1).argmax(1)
        ends.append(torch.stack([first, last], 1) * (2.0 / side) - 1.0)
    low_high = torch.stack(ends, 1)  # (b, 2, 2)
    ratio = (low_high[..., 1] - low_high[..., 0]).amax(1) / 2.0
    return ratio.clamp(min=0.1) * 1.06, low_high.mean(2)
