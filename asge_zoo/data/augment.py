"""Random crop and flip of whole batches, on whatever device they are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from asge_zoo.data.base import Augment


def augment_batch(images: Tensor, options: Augment, generator: torch.Generator) -> Tensor:
    """Augment a batch; every image draws its own crop and flip.

    Args:
        images: (B, C, H, W), any dtype.
        options: what to do.
        generator: a CPU generator, so that every device gets the same draws.

    Returns:
        (B, C, H, W), dtype and device of `images`.
    """
    if options.crop_padding:
        images = random_crop(images, options.crop_padding, generator)
    if options.flip:
        flipped = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)
    return images


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Zero-pad (B, C, H, W) on all sides and cut a window of the same size at a random place per image."""
    batch, _, height, width = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, batch), generator=generator).to(images.device)
    return windows[torch.arange(batch, device=images.device), :, top, left]
