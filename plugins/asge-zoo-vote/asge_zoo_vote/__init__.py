"""Predictions without a classifier, for asge-zoo: the units' own logits vote, or the first confident unit answers."""

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.unit import Unit


class UnitLogits(Prediction):
    """What both share: they read the units' own logits, and have nothing to train."""

    uses_unit_logits: ClassVar[bool] = True
    api_version: ClassVar[int] = 1

    def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor | None:
        return None

    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        return head(unit_logits)


class WeightedVote(nn.Module):
    """The weighted mean of the units' votes, as log-probabilities (B, N)."""

    weight: Tensor

    def __init__(self, num_units: int, *, hard: bool) -> None:
        super().__init__()
        self.hard = hard
        self.register_buffer("weight", torch.full((num_units,), 1 / num_units))

    def forward(self, unit_logits: Sequence[Tensor]) -> Tensor:
        votes = torch.stack([logits.softmax(1) for logits in unit_logits])  # (units, B, N)
        if self.hard:
            votes = torch.nn.functional.one_hot(votes.argmax(2), votes.shape[2]).to(votes.dtype)
        shares = (self.weight[:, None, None].to(votes.dtype) * votes).sum(0)
        return shares.clamp_min(torch.finfo(shares.dtype).tiny).log()


class Vote(UnitLogits):
    """Every unit votes, with its validation accuracy for a weight."""

    kind: Literal["vote.weighted"] = "vote.weighted"
    hard: bool = Field(default=False, description="Whether a unit votes for its first class alone, not by probability.")

    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        return WeightedVote(len(units), hard=self.hard)

    def select(self, head: nn.Module, accuracy: Sequence[float]) -> bool:
        assert isinstance(head, WeightedVote)
        weight = torch.tensor(accuracy, dtype=head.weight.dtype, device=head.weight.device)
        weight = weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / len(weight))
        changed = not torch.equal(weight, head.weight)
        head.weight.copy_(weight)
        return changed


class FirstConfident(nn.Module):
    """The logits (B, N) of each image's first unit that is confident; of the last one given where none is."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def depth(self, unit_logits: Sequence[Tensor]) -> Tensor:
        """(B,), int64: the place of that unit, from 1; one more than are given where none is confident."""
        confidence = torch.stack([logits.softmax(1).amax(1) for logits in unit_logits])  # (units, B)
        confident = confidence >= self.threshold
        return torch.where(confident.any(0), confident.int().argmax(0), len(unit_logits)) + 1

    def forward(self, unit_logits: Sequence[Tensor]) -> Tensor:
        chosen = self.depth(unit_logits).clamp(max=len(unit_logits)) - 1
        every = torch.stack(list(unit_logits), dim=1)  # (B, units, N)
        return every.gather(1, chosen[:, None, None].expand(-1, 1, every.shape[2])).squeeze(1)


class EarlyExit(UnitLogits):
    """An image's first unit whose largest probability reaches a threshold answers, and later units don't run for it."""

    kind: Literal["vote.early_exit"] = "vote.early_exit"
    exits_early: ClassVar[bool] = True
    threshold: float = Field(default=0.9, gt=0, le=1, description="The probability its first class must have.")

    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        return FirstConfident(self.threshold)

    def depth(self, head: nn.Module, unit_logits: Sequence[Tensor]) -> Tensor:
        assert isinstance(head, FirstConfident)
        return head.depth(unit_logits)
