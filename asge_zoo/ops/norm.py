"""Normalisations between units. The paper says "layer normalisation"; its exact form is not known.

A norm stands behind the goodness of its own unit, so nothing in that unit could train it: it holds
no parameters. Its optional affine part is what the *next* unit applies first, and learns.
"""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from asge_zoo.registry import Component, register


class Norm(Component):
    """Contract of a norm: builds a module without parameters."""

    group: ClassVar[str] = "norm"

    affine: bool = Field(
        default=False, description="Whether the next unit scales and shifts each channel first (the paper: not known)."
    )

    @abstractmethod
    def build(self) -> nn.Module:
        """A module from (B, C, H, W) to the same shape, dtype kept."""


class ChannelAffine(nn.Module):
    """Scale and shift per channel, (B, C, H, W) to the same; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class SampleLayerNorm(nn.Module):
    """Layer normalisation of each sample over (C, H, W): (x − mean) / sqrt(variance + eps)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return F.layer_norm(x, x.shape[1:], eps=self.eps).to(x.dtype)  # autocast on a GPU makes it float32
        by_pixel = x.permute(0, 2, 3, 1)  # so that a map with channels last stays one
        return F.layer_norm(by_pixel, by_pixel.shape[1:], eps=self.eps).permute(0, 3, 1, 2).to(x.dtype)


class SampleRMSNorm(nn.Module):
    """Division of each sample by its root mean square over (C, H, W): x / sqrt(mean(x²) + eps)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[1:], eps=self.eps).to(x.dtype)


@register
class LayerNorm(Norm):
    """Mean subtracted, divided by the standard deviation, over (C, H, W) of each sample."""

    kind: Literal["layer"] = "layer"
    eps: PositiveFloat = Field(default=1e-5, description="Added to the variance.")

    def build(self) -> nn.Module:
        return SampleLayerNorm(self.eps)


@register
class RMSNorm(Norm):
    """Divided by the root mean square over (C, H, W) of each sample; no mean subtracted."""

    kind: Literal["rms"] = "rms"
    eps: PositiveFloat = Field(default=1e-5, description="Added to the mean square.")

    def build(self) -> nn.Module:
        return SampleRMSNorm(self.eps)
