"""Poolings between units (equation 8 and the alternatives of Table 2)."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asge_zoo.registry import Component, register


class Pooling(Component):
    """Contract of a pooling: builds a module. If it has parameters, the unit that reads the pooled map trains them."""

    group: ClassVar[str] = "pooling"

    @abstractmethod
    def build(self, kernel_size: int) -> nn.Module:
        """A module from (B, C, H, W) to (B, C, H // kernel_size, W // kernel_size), dtype kept."""


def rms_pool2d(x: Tensor, kernel_size: int) -> Tensor:
    """Root mean square over non-overlapping windows: sqrt(mean(x²)), equation 8.

    The slope at an all-zero window is infinite; its gradient is taken as zero there, which leaves
    the values exact (no epsilon).

    Args:
        x: (B, C, H, W), floating point; half precisions are squared and averaged in float32.
        kernel_size: side of the window, in pixels, and its stride.

    Returns:
        (B, C, H // kernel_size, W // kernel_size), dtype of `x`.
    """
    square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    if square.is_cuda and torch.compiler.is_compiling():  # for `avg_pool2d` the compiler would store the squares
        rows, columns = (size // kernel_size for size in square.shape[-2:])
        even = square[..., : rows * kernel_size, : columns * kernel_size]
        mean_square = even.unflatten(-1, (columns, kernel_size)).unflatten(-3, (rows, kernel_size)).mean((-3, -1))
    else:
        mean_square = F.avg_pool2d(square, kernel_size)
    active = mean_square > 0
    return torch.where(active, torch.where(active, mean_square, 1.0).sqrt(), 0.0).to(x.dtype)


class RMSPool2d(nn.Module):
    """Module form of `rms_pool2d`."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return rms_pool2d(x, self.kernel_size)


@register
class RMS(Pooling):
    """Root mean square over the window (equation 8), the paper's default."""

    kind: Literal["rms"] = "rms"

    def build(self, kernel_size: int) -> nn.Module:
        return RMSPool2d(kernel_size)


@register
class Average(Pooling):
    """Mean over the window (Table 2)."""

    kind: Literal["avg"] = "avg"

    def build(self, kernel_size: int) -> nn.Module:
        return nn.AvgPool2d(kernel_size)


@register
class Max(Pooling):
    """Maximum over the window (Table 2)."""

    kind: Literal["max"] = "max"

    def build(self, kernel_size: int) -> nn.Module:
        return nn.MaxPool2d(kernel_size)
