"""Random crop and flip of whole batches, on whatever device they are."""

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt
from torch import Tensor

from asge_zoo.ranks import ALONE, Shard
from asge_zoo.registry import Options


class Augment(Options):
    """Random changes to training images."""

    crop_padding: NonNegativeInt = Field(default=0, description="Zero padding, in pixels, before a random crop.")
    flip: bool = Field(default=False, description="Horizontal flip, half of the time.")


def augment_batch(
    images: Tensor, options: Augment, generator: torch.Generator, *, batch_size: int, shard: Shard = ALONE
) -> Tensor:
    """Augment a batch, or a rank's part of it; every image draws its own crop and flip.

    Args:
        images: (b, C, H, W), any dtype.
        options: what to do.
        generator: a CPU generator, so that every device gets the same draws.
        batch_size: B, images in the whole batch, which the draws are made for.
        shard: the part that `images` are.

    Returns:
        (b, C, H, W), dtype and device of `images`.
    """
    if options.crop_padding:
        corners = torch.randint(2 * options.crop_padding + 1, (2, batch_size), generator=generator)
        images = padded_crop(images, options.crop_padding, *(shard.of(corner) for corner in corners))
    if options.flip:
        flipped = _on_device(shard.of(torch.rand(batch_size, generator=generator) < 0.5), images)
        images = torch.where(flipped[:, None, None, None], images.flip(3), images)
    return images


def padded_crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """Zero-pad (b, C, H, W) on all sides and cut a window of the same size at each image's `top`, `left`, both (b,)."""
    _, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    rows = torch.arange(len(images), device=images.device)
    return windows[rows, :, _on_device(top, images), _on_device(left, images)]


def _on_device(draws: Tensor, images: Tensor) -> Tensor:
    """Draws where the images are; to a GPU from pinned memory, which the host need not wait for."""
    return draws.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else draws
