"""Images become what an installed vision model reads: resized whole, grey made three channels, centred as it was trained.

Each image is treated alone, by public constants; nothing is cropped and nothing is drawn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from urna.models.candidate_file import PictureInput
from urna.protocol.errors import ModelError

if TYPE_CHECKING:
    from urna.models.loading import Inputs

PIXELS = "pixel_values"  # as Hugging Face names a vision model's input


@dataclass(frozen=True)
class PictureAdapter:
    """Images to a batch of pixels.

    Args:
        settings: Of the candidate.
    """

    settings: PictureInput

    def length_classes(self, inputs: "Inputs") -> NDArray[np.int64]:
        """All alike: zeros, int64 (n,)."""
        return np.zeros(len(inputs), np.int64)

    def batch(self, inputs: "Inputs", length: int | None = None) -> dict[str, torch.Tensor]:  # noqa: ARG002 - for texts
        """Resize and centre.

        Args:
            inputs: (n, H, W) grey or (n, 3, H, W), values in [0, 1]; n may be 0.
            length: Of no meaning here.

        Returns:
            ``pixel_values``, float32 (n, 3, height, width), contiguous.

        Raises:
            ModelError: not floating point, of another shape, not finite, or outside [0, 1].
        """
        images = _checked(inputs)
        height, width = self.settings.height, self.settings.width
        pixels = torch.from_numpy(np.array(images, np.float32, order="C"))
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)  # (n, 1, H, W)
        if not len(pixels):  # torch does not resize an empty batch
            return {PIXELS: torch.zeros((0, 3, height, width))}
        if pixels.shape[2:] != (height, width):
            mode = self.settings.interpolation
            pixels = functional.interpolate(pixels, (height, width), mode=mode, align_corners=False, antialias=True)
        pixels = pixels.clamp(0.0, 1.0).expand(-1, 3, -1, -1)  # bicubic interpolation overshoots
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.settings.mean, self.settings.std))
        return {PIXELS: ((pixels - mean) / std).contiguous()}


def _checked(images: "Inputs") -> NDArray[np.floating]:
    if not isinstance(images, np.ndarray) or not np.issubdtype(images.dtype, np.floating):
        found = getattr(images, "dtype", type(images).__name__)
        raise ModelError(f"images must be floating point in [0, 1], found {found}: divide by the largest grey value")
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[1] == 3)
    if not fits or 0 in images.shape[1:]:
        raise ModelError(f"images must be (n, H, W) or (n, 3, H, W), found shape {images.shape}: convert them first")
    # written so that NaN fails too
    if images.size and not (images.min() >= 0.0 and images.max() <= 1.0):
        raise ModelError(
            f"images must lie in [0, 1], found {images.min():g} to {images.max():g}: divide by the largest grey value"
        )
    return images
