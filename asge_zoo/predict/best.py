"""Best: the unit whose own logits do best on the validation images; inference stops there."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.unit import Unit
from asge_zoo.registry import register


class ChosenUnit(nn.Module):
    """Holds the chosen unit's index; picks its logits (B, N) from those of the units run."""

    unit: Tensor

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.register_buffer("unit", torch.tensor([unit]))

    def forward(self, unit_logits: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(unit_logits)).index_select(0, self.unit)[0]


@register
class Best(Prediction):
    """No classifier: the unit chosen on validation accuracy answers, and later units don't run (Table 3, "Best")."""

    kind: Literal["best"] = "best"
    uses_unit_logits: ClassVar[bool] = True

    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        return ChosenUnit(len(units) - 1)

    def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor | None:
        return None

    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        return head(unit_logits)

    def last_unit(self, head: nn.Module, num_units: int) -> int:
        assert isinstance(head, ChosenUnit)
        return int(head.unit)

    def select(self, head: nn.Module, accuracy: Sequence[float]) -> bool:
        assert isinstance(head, ChosenUnit)
        before, best = int(head.unit), max(range(len(accuracy)), key=accuracy.__getitem__)
        head.unit.fill_(best)
        return best != before
