"""Random resized crops and flips by key: what an image gets is a function of (seed, epoch, sample) alone.

So it is the same for any number of workers and ranks, after any resume, and whichever library decodes the image. The
numbers come from a counter-based hash, which gives the draws of any one image without those of the others.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from asge_zoo.registry import Options
from asge_zoo.seeding import keyed_seed

Integers = NDArray[np.int64]
# JSON has lists only, and options are strict
Range = Annotated[
    tuple[float, float], BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)
]

TRIES = 10  # as torchvision
EVAL_SHARE = 0.875  # of the shorter side: the field's 224 of 256

_STEP = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


class ResizedCrop(Options):
    """Random changes to training images; evaluation takes the middle, 7/8 of the shorter side, resized."""

    scale: Range = Field(default=(0.08, 1.0), description="Least and greatest share of the image's area.")
    ratio: Range = Field(default=(0.75, 4 / 3), description="Least and greatest width over height.")
    flip: bool = Field(default=True, description="Horizontal flip, half of the time.")

    @model_validator(mode="after")
    def _in_order(self) -> "ResizedCrop":
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, float("inf"))):
            if not 0 < low <= high <= most:
                what = "positive numbers" if name == "ratio" else "numbers above 0 and not above 1"
                raise PydanticCustomError("range", "must be two {what}, in order", {"key": name, "what": what})
        return self


def random_boxes(
    seed: int, epoch: int, samples: Integers, heights: Integers, widths: Integers, options: ResizedCrop
) -> Integers:
    """Boxes to cut out of images before they are resized, by the algorithm of torchvision's RandomResizedCrop.

    A share of the area and an aspect ratio (its logarithm evenly) are drawn up to ten times, until such a box fits, and
    then its place. Where none fits: the largest box in the middle whose ratio is allowed.

    Args:
        seed, epoch: the key, with
        samples: (n,), int64: the images' numbers in the training set.
        heights, widths: (n,), int64, in pixels, of the images as they are decoded.
        options: the ranges.

    Returns:
        (n, 4), int64: top, left, height, width, within the image.
    """
    area_draw, ratio_draw, top_draw, left_draw = _uniforms(
        keyed_seed(seed, "crop", epoch), samples, TRIES * 4
    ).T.reshape(4, TRIES, len(samples))
    (least, most), (narrow, wide) = options.scale, np.log(options.ratio)
    area = heights * widths * (least + (most - least) * area_draw)
    ratio = np.exp(narrow + (wide - narrow) * ratio_draw)
    width, height = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (0 < width) & (width <= widths) & (0 < height) & (height <= heights)
    top, left = np.floor(top_draw * (heights - height + 1)), np.floor(left_draw * (widths - width + 1))
    first = (fits.argmax(axis=0), np.arange(len(samples)))
    drawn = np.stack([each[first] for each in (top, left, height, width)], axis=1).astype(np.int64)
    return np.where(fits.any(axis=0)[:, None], drawn, _fallback(heights, widths, options))


def _fallback(heights: Integers, widths: Integers, options: ResizedCrop) -> Integers:
    narrow, wide = options.ratio
    height = np.minimum(heights, np.rint(widths / narrow).astype(np.int64))
    width = np.minimum(widths, np.rint(heights * wide).astype(np.int64))
    return _centred(np.maximum(height, 1), np.maximum(width, 1), heights, widths)


def center_boxes(heights: Integers, widths: Integers, share: float = EVAL_SHARE) -> Integers:
    """The square in the middle of each image, its side `share` of the shorter one: (n, 4), as `random_boxes`."""
    side = np.maximum(1, np.rint(np.minimum(heights, widths) * share).astype(np.int64))
    return _centred(side, side, heights, widths)


def _centred(height: Integers, width: Integers, heights: Integers, widths: Integers) -> Integers:
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)


def flips(seed: int, epoch: int, samples: Integers) -> NDArray[np.bool_]:
    """Which of the samples (n,) are mirrored in that epoch: (n,), half of them."""
    return _uniforms(keyed_seed(seed, "flip", epoch), samples, 1)[:, 0] < 0.5


def _uniforms(key: int, samples: Integers, draws: int) -> NDArray[np.float64]:
    """Numbers from 0 to below 1, (n, draws): each sample's own stream of splitmix64 (Steele, Lea and Flood, 2014)."""
    streams = _mixed(_mixed(samples.astype(np.uint64)) ^ np.uint64(key))
    counts = np.arange(1, draws + 1, dtype=np.uint64) * _STEP
    return (_mixed(streams[:, None] + counts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    for shift, factor in _ROUNDS:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> np.uint64(31))
