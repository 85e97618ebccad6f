"""What an epoch's training batches came to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from asge_zoo.errors import DivergenceError
from asge_zoo.graph.local_graph import StepResult


@dataclass(frozen=True)
class TrainStats:
    """Means over an epoch's batches, as they were trained on; accuracies in percent, losses in nats.

    Attributes:
        count: images seen.
        accuracy, loss: of the prediction strategy.
        unit_accuracy, unit_loss: of each unit's own logits; empty for a rule without local logits.
    """

    count: int
    accuracy: float
    loss: float
    unit_accuracy: list[float]
    unit_loss: list[float]


class TrainMeter:
    """Sums losses and right answers on the device, so that a step need not wait for the host."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._count = 0

    def update(self, result: StepResult, labels: Tensor) -> None:
        """Add a batch."""
        logits = torch.stack([result.logits, *result.unit_logits])  # (1 + units, B, N)
        right = (logits.argmax(2) == labels).sum(1)
        losses = torch.cat([result.head_loss[None], result.losses[: len(result.unit_logits)]])
        self._batches.append(torch.stack([right.to(losses.dtype), losses]))  # (2, 1 + units)
        self._count += len(labels)

    def check_finite(self, names: Sequence[str], epoch: int) -> None:
        """Refuse to go on from a loss that is not finite.

        Args:
            names: of the units.
            epoch: from 1.

        Raises:
            DivergenceError: names the first step, counted from 1, and the first unit in it.
        """
        losses = torch.stack([batch[1] for batch in self._batches])  # (batches, 1 + units)
        bad = (~losses.isfinite()).nonzero().tolist()
        if bad:
            step, column = min(bad, key=lambda place: (place[0], place[1] or len(names) + 1))
            of = f"unit {names[column - 1]}" if column else "the prediction"
            raise DivergenceError(
                f"the loss of {of} is not finite in epoch {epoch}, step {step + 1}; lower optimizer.lr (the run "
                f"directory keeps the checkpoints of the epochs before)"
            )

    def means(self) -> TrainStats:
        """Means of all batches so far."""
        right, losses = torch.stack(self._batches).double().unbind(1)  # each (batches, 1 + units)
        accuracy, loss = (100 * right.sum(0) / self._count).tolist(), losses.mean(0).tolist()
        return TrainStats(self._count, accuracy[0], loss[0], accuracy[1:], loss[1:])
