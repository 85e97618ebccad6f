"""L_p pooling for asge-zoo: mean, RMS and maximum are its cases p = 1, 2 and infinity."""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from asge_zoo.ops.pooling import Pooling


def lp_pool2d(x: Tensor, p: Tensor, kernel_size: int) -> Tensor:
    """Normalised L_p norm over non-overlapping windows: mean(|x|^p)^(1/p).

    Computed relative to each window's maximum, so that no p overflows; that factor cancels, and needs no gradient.
    At an all-zero window both gradients are taken as zero.

    Args:
        x: (B, C, H, W), floating point; half precisions are computed in float32.
        p: (), at least 1.
        kernel_size: side of the window, in pixels, and its stride.

    Returns:
        (B, C, H // kernel_size, W // kernel_size), dtype of `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    height, width = wide.shape[2] // kernel_size, wide.shape[3] // kernel_size
    cropped = wide[..., : height * kernel_size, : width * kernel_size]
    windows = cropped.unflatten(3, (width, kernel_size)).unflatten(2, (height, kernel_size))  # (B, C, h, k, w, k)
    largest = windows.detach().amax((3, 5), keepdim=True)
    share = windows / torch.where(largest > 0, largest, 1.0)
    active = share > 0  # 0^p has no logarithm
    power = torch.where(active, (p * torch.where(active, share, 1.0).log()).exp(), 0.0)
    mean = power.mean((3, 5))
    norm = (torch.where(mean > 0, mean, 1.0).log() / p).exp()
    return (largest.squeeze(5).squeeze(3) * norm).to(x.dtype)


class LpPool2d(nn.Module):
    """Module form of `lp_pool2d`; p is a buffer's 1 + softplus(rho), or a trained rho's (Gulcehre et al. 2014)."""

    rho: Tensor

    def __init__(self, kernel_size: int, p: float, *, learnable: bool) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        excess = p - 1
        rho = torch.tensor(excess + math.log(-math.expm1(-excess)))  # the inverse of softplus
        if learnable:
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)

    @property
    def p(self) -> Tensor:
        """(), greater than 1."""
        return 1 + F.softplus(self.rho)

    def forward(self, x: Tensor) -> Tensor:
        return lp_pool2d(x, self.p, self.kernel_size)


class LpPool(Pooling):
    """Normalised L_p norm over the window (Gulcehre et al. 2014, equation 1); RMS is p = 2.

    A learned p is one number for each pooling of the network; the loss of the unit that reads the pooled map trains it.
    """

    kind: Literal["lp.pool"] = "lp.pool"
    api_version: ClassVar[int] = 1
    p: float = Field(default=2.0, gt=1, le=1000, description="The order of the norm; where it is learned, its start.")
    learnable: bool = Field(default=False, description="Whether p is trained.")

    def build(self, kernel_size: int) -> nn.Module:
        return LpPool2d(kernel_size, self.p, learnable=self.learnable)
