"""Goodness: what a local loss sees of a unit's activation map (equations 1 to 3)."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from asge_zoo.registry import Component, register


@dataclass(frozen=True)
class MapShape:
    """A unit's activation map (C, H, W), and C_L: the channels of the network's last unit."""

    channels: int
    height: int
    width: int
    last_channels: int


class Goodness(Component):
    """Contract of a goodness: builds a module from an activation map to a goodness vector."""

    group: ClassVar[str] = "goodness"

    @abstractmethod
    def build(self, shape: MapShape) -> nn.Module:
        """A module from (B, C, H, W) to (B, self.dim(shape)), at least float32."""

    @abstractmethod
    def dim(self, shape: MapShape) -> int:
        """Length of the goodness vector."""

    def partition(self, shape: MapShape) -> int:
        """Patches per side of the map; 1 where the map is not cut."""
        return 1


def partition_factor(alpha: float, shape: MapShape) -> int:
    """P = min(max(1, floor(alpha · C_L / C)), H, W), equation 3."""
    exact = Fraction(str(alpha)) * shape.last_channels / shape.channels  # 2.3 · 100 / 10 is 23, not 22.999…
    return min(max(1, math.floor(exact)), shape.height, shape.width)


def bin_weights(size: int, bins: int) -> Tensor:
    """Matrix (bins, size), float64, that averages a line over adaptive bins.

    Bin i spans floor(i · size / bins) to ceil((i + 1) · size / bins), as adaptive average pooling
    does: neighbouring bins overlap where `bins` does not divide `size`.
    """
    weights = torch.zeros(bins, size, dtype=torch.float64)
    for i in range(bins):
        start, stop = i * size // bins, -((i + 1) * size // -bins)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


class PatchMeanSquare(nn.Module):
    """Mean of the squared activations in each of P × P patches, equation 2.

    From (B, C, H, W) to (B, C · P²), channel-major. Where P divides the map, patches are reshaped and
    averaged; else fixed bin matrices do it (CUDA's adaptive pooling has no deterministic gradient).
    """

    row_bins: Tensor
    column_bins: Tensor

    def __init__(self, shape: MapShape, partition: int, *, crop: bool) -> None:
        super().__init__()
        self.partition = partition
        self.rows, self.columns = shape.height, shape.width
        if crop:
            self.rows -= shape.height % partition
            self.columns -= shape.width % partition
        self.even = self.rows % partition == 0 and self.columns % partition == 0
        if not self.even:
            self.register_buffer("row_bins", bin_weights(self.rows, partition), persistent=False)
            self.register_buffer("column_bins", bin_weights(self.columns, partition), persistent=False)

    def forward(self, activation: Tensor) -> Tensor:
        wide = torch.promote_types(activation.dtype, torch.float32)
        square = activation[..., : self.rows, : self.columns].to(wide).square()
        if self.even:
            p = self.partition
            batch, channels, height, width = square.shape
            parts = square.reshape(batch, channels, p, height // p, p, width // p)
            patches = parts.mean((3, 5)) if square.is_contiguous() else parts.mean(5).mean(3)  # faster, channels last
        else:
            patches = self.row_bins.to(wide) @ square @ self.column_bins.to(wide).mT
        return patches.flatten(1)


@register
class SpatialGoodness(Goodness):
    """Adaptive spatial goodness: the patch-wise mean square of the map (equations 1 to 3)."""

    kind: Literal["spatial"] = "spatial"
    alpha: NonNegativeFloat = Field(default=1.0, description="Scales the partition factor (equation 3, Table 1).")
    bins: Literal["adaptive", "crop"] = Field(
        default="adaptive",
        description="Where P does not divide the map: overlapping adaptive bins, or the rest cropped (ours; "
        "the paper is silent).",
    )

    def partition(self, shape: MapShape) -> int:
        return partition_factor(self.alpha, shape)

    def dim(self, shape: MapShape) -> int:
        return shape.channels * self.partition(shape) ** 2

    def build(self, shape: MapShape) -> nn.Module:
        return PatchMeanSquare(shape, self.partition(shape), crop=self.bins == "crop")
