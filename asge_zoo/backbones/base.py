"""The contract of a backbone."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.registry import Component


@dataclass(frozen=True)
class Cutting:
    """Where a backbone is cut into units.

    Attributes:
        by: `conv`, before each convolution that depends on the one before it; `block`, there where a single tensor
            crosses; `stage`, at the first such place behind each of `stages`.
        stages: names of the submodules that end a stage.
    """

    by: Literal["conv", "block", "stage"] = "conv"
    stages: tuple[str, ...] = ()


class Backbone(Component):
    """Builds a plain module from images to a feature map, without a classifier; the compiler cuts it."""

    group: ClassVar[str] = "backbone"

    @abstractmethod
    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        """A module from (B, in_channels, H, W) to (B, C_L, H', W'), or pooled to (B, C_L).

        It must be traceable by torch.fx, but for what depends on shapes, which are known while it is traced.

        Args:
            in_channels: of the images.
            pooling: the spec's pooling, where the backbone pools.
            norm: the spec's norm, to stand behind every unit's goodness.
        """

    def cutting(self, module: nn.Module) -> Cutting:
        """Where to cut what `build` returned; a convolution a unit unless said otherwise."""
        return Cutting()

    def check(self, pooling: Pooling, norm: Norm) -> None:
        """Raise a SpecError, which names the field and what to do, for options that don't fit the spec's others."""

    def min_size(self) -> int:
        """Smallest height and width, in pixels, of images it takes."""
        return 1
