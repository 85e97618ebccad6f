"""Rules by which a unit's channels, in one group a class, compete: CwC and DeeperForward. One pass, no negatives."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asge_zoo.errors import SpecError
from asge_zoo.graph.rule import LayerLocalRule
from asge_zoo.ops.goodness import MapShape


class GroupMean(nn.Module):
    """Each class's goodness: the mean of its group of channels, (B, C, H, W) to (B, N), at least float32.

    Args:
        num_classes: N; the j-th of N equal runs of channels is class j's group.
        squared: whether the activations are squared first.
    """

    def __init__(self, num_classes: int, *, squared: bool) -> None:
        super().__init__()
        self.num_classes, self.squared = num_classes, squared

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        groups = x.unflatten(1, (self.num_classes, -1))  # (B, N, C / N, H, W)
        return (groups.square() if self.squared else groups).mean((2, 3, 4))


class ChannelGroups(LayerLocalRule):
    """What both share: a unit's logits are its groups' goodness, its loss their cross-entropy."""

    api_version: ClassVar[int] = 1

    @abstractmethod
    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> GroupMean: ...

    def check(self, shapes: Sequence[MapShape], num_classes: int) -> None:
        for index, shape in enumerate(shapes, start=1):
            if shape.channels % num_classes:
                raise SpecError(
                    f"rule.kind: {self.kind} needs a group of channels for each of {num_classes} classes, and the "
                    f"{shape.channels} channels of unit {index} are no multiple of that; choose another backbone.width"
                )

    def goodness_layout(self, shape: MapShape, num_classes: int) -> tuple[int, int]:
        return 1, num_classes

    def unit_loss(
        self, classify: Callable[[Tensor], Tensor], activation: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = classify(activation)
        return F.cross_entropy(logits, labels), logits


class CwC(ChannelGroups):
    """Channel-wise competitive learning (Papachristodoulou et al., 2024): the mean square of each class's channels.

    The paper reads goodness behind pooling and batch norm; here it is the unit's activation, as for every rule.
    """

    kind: Literal["ff.cwc"] = "ff.cwc"

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> GroupMean:
        return GroupMean(num_classes, squared=True)


class DeeperForward(ChannelGroups):
    """DeeperForward (Sun et al., 2025): the mean of each class's channels, which `ff.group_norm` hides from the next.

    The paper's prediction is `ff.sum` with `choose`.
    """

    kind: Literal["ff.deeper_forward"] = "ff.deeper_forward"

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> GroupMean:
        return GroupMean(num_classes, squared=False)
