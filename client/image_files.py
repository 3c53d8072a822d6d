"""One image file -> pixels in [0, 1] of the declared size, by Pillow's decoders of four formats.

Covered:
    * formats by an allow-list, found by content; the size is read from the header and checked before a pixel is decoded;
    * more pixels than `max_pixels`, an unpacked size out of proportion, several images in one file, a file that ends early:
      each is refused; Pillow's own warning about decompression bombs is an error here;
    * only pixels are kept: no metadata, no palette, no transparency.
Not covered:
    * what is burnt into the pixels; the orientation that a camera wrote beside them (EXIF) is not applied;
    * a file whose proportions differ from the declared ones is stretched to them.
"""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from urna.client.readers import Limits, opened_file
from urna.protocol.errors import SiteConfigError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
BITS = {"1": 1, "L": 8, "P": 8, "LA": 16, "RGB": 24, "RGBA": 32, "CMYK": 32, "YCbCr": 24, "I;16": 16, "I;16L": 16, "I;16B": 16}
_MALFORMED = (  # what Pillow raises on files of hostile making; its texts may hold the file's name
    *(
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        EOFError,
        RuntimeError,
        AttributeError,
        MemoryError,
    ),
    *(struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)


def read_image(
    root: Path, relative: str, where: str, limits: Limits, height: int, width: int, channels: int
) -> npt.NDArray[np.float32]:
    """Decode one image and resize it (bilinear, area-weighted when it shrinks).

    Returns:
        (height, width), or (3, height, width) for three channels, in [0, 1].

    Raises:
        SiteConfigError: no such image, or more than the limits allow.
    """
    with opened_file(root, relative, where, limits.max_bytes) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        size = file.seek(0, 2)
        file.seek(0)
        try:
            image = Image.open(file, formats=FORMATS)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise _too_large(where, limits) from None
        except _MALFORMED:
            raise SiteConfigError(f"{where}: expected an image ({', '.join(FORMATS)}), found something else") from None
        if image.width * image.height > limits.max_pixels:
            raise _too_large(where, limits)
        if image.mode not in BITS:
            raise SiteConfigError(f"{where}: expected pixels of 8 or 16 bits, found mode {image.mode}: convert it")
        limits.check_expansion(image.width * image.height * BITS[image.mode] // 8, size, where)
        try:
            if getattr(image, "n_frames", 1) != 1:
                raise SiteConfigError(f"{where}: expected one image in the file, found several: split it")
            return _pixels(image, height, width, channels)
        except _MALFORMED:
            raise SiteConfigError(f"{where}: expected an image that can be decoded, found damage: replace the file") from None


def _too_large(where: str, limits: Limits) -> SiteConfigError:
    return SiteConfigError(f"{where}: expected an image of at most {limits.max_pixels} pixels, found more: raise max_pixels")


def _pixels(image: Image.Image, height: int, width: int, channels: int) -> npt.NDArray[np.float32]:
    if image.mode.startswith("I;16"):  # Pillow would clip it at 255
        grey = Image.fromarray(np.asarray(image).astype(np.float32) / np.float32(65_535))
        pixels = np.asarray(_resized(grey, height, width), np.float32)
        pixels = np.clip(pixels, 0, 1)
        return pixels if channels == 1 else np.stack([pixels] * 3)
    converted = _resized(image.convert("L" if channels == 1 else "RGB"), height, width)
    scaled = np.asarray(converted, np.float32) / np.float32(255)
    return scaled if channels == 1 else np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)
