"""Fixed random projections from goodness to class logits (equations 4 and 5)."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from asge_zoo.registry import Component, register

PART = 64  # features
FEW = 128  # logits


def linear_to_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b: `torch.addmm`, on a GPU in parts where there are few logits, which one multiprocessor alone would sum.

    Args:
        x: (B, D), floating point.
        weight: (D, N).
        bias: (N,).
    """
    if x.is_cuda and weight.shape[1] <= FEW and weight.shape[0] % PART == 0:
        return linear_in_parts(x, weight, bias)
    return torch.addmm(bias, x, weight)


def linear_in_parts(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b as the sum of products of `PART` features each; shapes as for `linear_to_logits`, D a multiple."""
    parts = x.unflatten(1, (-1, PART)).transpose(0, 1)  # (D / PART, B, PART)
    return torch.bmm(parts, weight.unflatten(0, (-1, PART))).sum(0) + bias


class Projection(Component):
    """Contract of a projection: builds a module whose tensors are drawn once and never trained."""

    group: ClassVar[str] = "projection"

    @abstractmethod
    def build(self, dim: int, num_classes: int, generator: torch.Generator) -> nn.Module:
        """A module from goodness (B, dim) to logits (B, num_classes), drawn from `generator` (CPU)."""


class FixedLinear(nn.Module):
    """a = g W + b with W of shape (dim, N) and b of shape (N,) held as buffers, equation 4."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, goodness: Tensor) -> Tensor:
        return linear_to_logits(goodness, self.weight, self.bias)


@register
class GaussianProjection(Projection):
    """Normal entries that scale with the number of classes N (equation 5)."""

    kind: Literal["gaussian"] = "gaussian"
    scale: Literal["std", "variance"] = Field(
        default="std",
        description="What 1/sqrt(N) is in the paper's N(0, 1/sqrt(N)): the standard deviation, or the variance.",
    )

    def build(self, dim: int, num_classes: int, generator: torch.Generator) -> nn.Module:
        std = 1 / math.sqrt(num_classes)
        if self.scale == "variance":
            std = math.sqrt(std)
        draw = torch.randn(dim + 1, num_classes, generator=generator) * std
        return FixedLinear(draw[:dim].clone(), draw[dim].clone())
