"""The sum of a range of units' logits, given or chosen on the validation images."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from asge_zoo.errors import SpecError
from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.unit import Unit


class UnitRange(nn.Module):
    """Sums the logits (B, N) of the units from `ends[0]` to `ends[1]`, both included.

    Args:
        first, last: the range at the start, and what `ranges` stays within.
    """

    ends: Tensor

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.ranges = [(start, end) for start in range(first, last + 1) for end in range(start, last + 1)]
        self.register_buffer("ends", torch.tensor([first, last]))

    def forward(self, unit_logits: Sequence[Tensor]) -> Tensor:
        units = torch.arange(len(unit_logits), device=self.ends.device)
        within = (units >= self.ends[0]) & (units <= self.ends[1])
        stacked = torch.stack(list(unit_logits))  # (units, B, N)
        return (stacked * within[:, None, None].to(stacked)).sum(0)


class Sum(Prediction):
    """No classifier: the logits of a range of units are summed, as in Hinton (2022), where all but the first answer.

    With `choose` the range within it that does best on the validation images: DeeperForward's SIP (Sun et al., 2025).
    """

    kind: Literal["ff.sum"] = "ff.sum"
    api_version: ClassVar[int] = 1
    uses_unit_logits: ClassVar[bool] = True

    first: int = Field(default=1, description="The first unit, counted from 0; a negative one from the end.")
    last: int | None = Field(default=None, description="The last unit, counted likewise; null: the network's last.")
    choose: bool = Field(default=False, description="Whether validation accuracy chooses the range within these.")

    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        count = len(units)
        first, last = (end + count if end < 0 else end for end in (self.first, -1 if self.last is None else self.last))
        if not 0 <= first <= last < count:
            raise SpecError(
                f"prediction.first: {self.first} to {'the last' if self.last is None else self.last} is no range of "
                f"{count} units; choose prediction.first and prediction.last between 0 and {count - 1}, in order"
            )
        return UnitRange(first, last)

    def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor | None:
        return None

    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        return head(unit_logits)

    def last_unit(self, head: nn.Module, num_units: int) -> int:
        assert isinstance(head, UnitRange)
        return int(head.ends[1])

    def alternatives(self, head: nn.Module, unit_logits: Sequence[Tensor]) -> list[Tensor]:
        assert isinstance(head, UnitRange)
        if not self.choose:
            return []
        return [torch.stack(list(unit_logits[start : end + 1])).sum(0) for start, end in head.ranges]

    def select(self, head: nn.Module, accuracy: Sequence[float]) -> bool:
        assert isinstance(head, UnitRange)
        if not self.choose:
            return False
        best = torch.tensor(head.ranges[max(range(len(accuracy)), key=accuracy.__getitem__)]).to(head.ends)
        changed = not torch.equal(best, head.ends)
        head.ends.copy_(best)
        return changed
