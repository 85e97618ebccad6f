"""From a picture, of any size, to an image as evaluation has it: the middle, resized, normalised."""

import textwrap
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from asge_zoo.errors import DataError
from asge_zoo.registry import Options

MAX_SIZE = 1024  # more can't be meant, and would not fit in memory
MODES = {1: "L", 3: "RGB"}  # Pillow's names, by channels

Side = Annotated[PositiveInt, Field(le=MAX_SIZE)]


class Preprocessing(Options):
    """What evaluation does to a picture.

    Attributes:
        channels: 1 for grey, 3 for RGB.
        height, width: in pixels, of the image.
        crop: side of the square in the middle that is shown, as a share of the picture's shorter side.
        mean, std: per channel, of pixel values in 0 to 1.
    """

    channels: PositiveInt
    height: Side
    width: Side
    crop: PositiveFloat = Field(le=1)
    mean: list[float]
    std: list[PositiveFloat]

    def read(self, path: Path) -> NDArray[np.uint8]:
        """The picture in a file: (height, width, channels), uint8, not yet normalised.

        Raises:
            DataError: it can't be read as a picture, or there is no picture of so many channels.
        """
        from PIL import Image

        if self.channels not in MODES:
            raise DataError(f"{path}: pictures are grey or RGB, and this model takes {self.channels} channels")
        try:
            with Image.open(path) as picture:
                side = max(1, round(min(picture.size) * self.crop))
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                pixels = picture_pixels(
                    picture, (left, top, left + side, top + side), (self.width, self.height), MODES[self.channels]
                )
        except MemoryError:
            raise
        except Exception as error:  # whatever a broken file makes Pillow raise
            raise DataError(unreadable(path, error)) from error
        return pixels.reshape(self.height, self.width, self.channels)

    def normalize(self, pixels: Tensor) -> Tensor:
        """From (B, height, width, channels), uint8, to (B, channels, height, width), float32, contiguous."""
        mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] * 255 for x in (self.mean, self.std))
        # convolutions give other bits for another layout, and the loaders' is this one
        images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return images.sub_(mean).div_(std)


def picture_pixels(picture: Any, box: tuple[int, int, int, int], size: tuple[int, int], mode: str) -> NDArray[np.uint8]:
    """Decode, convert, cut and resize: (size[1], size[0]) or (size[1], size[0], 3), uint8.

    Args:
        picture: one that Pillow has opened.
        box: left, top, right, bottom.
        size: width and height, in pixels.
        mode: `L` or `RGB`.
    """
    from PIL import Image

    if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow would take all above 255 for white
        picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    # bilinear: of Pillow's filters the nearest to FFCV's, which averages over areas
    return np.asarray(picture.convert(mode).resize(size, Image.Resampling.BILINEAR, box=box))


def unreadable(path: Path, error: Exception) -> str:
    """That a file can't be decoded, on one line."""
    reason = textwrap.shorten(str(error), 160, placeholder=" …") or type(error).__name__
    return f"{path}: can't be read as an image ({reason}); repair or remove it"
