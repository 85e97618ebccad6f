"""Group normalisation, by which DeeperForward hides a unit's goodness."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from asge_zoo.ops.norm import Norm


class SampleGroupNorm(nn.Module):
    """(x − mean) / sqrt(variance + eps) over (C / groups, H, W) of each group of a sample's channels; shape kept."""

    def __init__(self, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, eps=self.eps)


class GroupNorm(Norm):
    """Mean subtracted, divided by the standard deviation, over each group of channels of each sample."""

    kind: Literal["ff.group_norm"] = "ff.group_norm"
    api_version: ClassVar[int] = 1
    groups: PositiveInt = Field(
        default=1, description="Groups of channels: as many as classes hide DeeperForward's goodness; 1 is layer norm."
    )
    eps: PositiveFloat = Field(default=1e-5, description="Added to the variance.")

    def build(self) -> nn.Module:
        return SampleGroupNorm(self.groups, self.eps)
