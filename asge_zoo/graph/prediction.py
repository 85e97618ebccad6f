"""The contract of prediction strategies."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from asge_zoo.graph.unit import Unit
from asge_zoo.registry import Component


class Prediction(Component):
    """Contract of a prediction strategy: what it keeps of each unit, its head, and where it may stop."""

    group: ClassVar[str] = "prediction"
    uses_unit_logits: ClassVar[bool] = False
    exits_early: ClassVar[bool] = False

    @property
    def head_lr(self) -> float | None:
        """Learning rate of the head; None for the optimizer's own."""
        return None

    @abstractmethod
    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        """The head: its parameters are trained on what is kept, its buffers hold what is chosen."""

    @abstractmethod
    def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor | None:
        """What the head needs of unit `index`, of shape (B, …), or None.

        The place may decide whether there is something to keep, not how it is computed: units that are alike share a
        compiled step.

        Args:
            index: the unit's place, from 0.
            num_units: how many units there are.
            activation: (B, C, H, W), what goodness reads.
            output: (B, C, H', W'), what the next unit reads.
        """

    @abstractmethod
    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        """Class logits (B, N) from what was kept, in the units' order, and the units' own logits."""

    def last_unit(self, head: nn.Module, num_units: int) -> int:
        """Index of the last unit that inference needs to run."""
        return num_units - 1

    def depth(self, head: nn.Module, unit_logits: Sequence[Tensor]) -> Tensor:
        """For a strategy that `exits_early`: how many units each image needs, (B,), int64.

        Args:
            head: the head.
            unit_logits: of the first units, each (B, N); where they don't suffice, the depth is one more than they are.
        """
        raise NotImplementedError(f"{type(self).__qualname__} exits early, and does not say when")

    def alternatives(self, head: nn.Module, unit_logits: Sequence[Tensor]) -> list[Tensor]:
        """What `select` chooses from: class logits (B, N) of each alternative, here the units' own.

        Args:
            head: the head.
            unit_logits: of all units, each (B, N); empty for a rule without local logits.
        """
        return list(unit_logits)

    def select(self, head: nn.Module, accuracy: Sequence[float]) -> bool:
        """Settle what is chosen by the alternatives' validation accuracy (percent), in the head's buffers.

        Returns:
            Whether the choice changed, and with it the prediction.
        """
        return False
