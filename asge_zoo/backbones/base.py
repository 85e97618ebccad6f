"""The contract of a backbone."""

from abc import abstractmethod
from typing import ClassVar

from torch import nn

from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.registry import Component


class Backbone(Component):
    """Builds a plain module from images to a feature map, without a classifier; the compiler cuts it."""

    group: ClassVar[str] = "backbone"

    @abstractmethod
    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        """A module from (B, in_channels, H, W) to (B, C_L, H', W'), traceable by torch.fx.

        Args:
            in_channels: of the images.
            pooling: the spec's pooling, where the backbone pools.
            norm: the spec's norm, to stand behind every unit's goodness.
        """

    def min_size(self) -> int:
        """Smallest height and width, in pixels, of images it takes."""
        return 1
