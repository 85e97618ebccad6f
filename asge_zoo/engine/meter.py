"""What an epoch came to, as its training batches and then the validation images had it."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asge_zoo.errors import DivergenceError
from asge_zoo.evaluate import Evaluation
from asge_zoo.graph.rule import StepResult
from asge_zoo.ranks import Ranks


@dataclass(frozen=True)
class TrainStats:
    """Means over an epoch's batches, as they were trained on; accuracies in percent, losses in nats.

    Attributes:
        count: images seen.
        accuracy, loss: of the prediction strategy; for a rule with candidate labels, None and the mean local loss.
        unit_accuracy: of each unit's own logits; empty for a rule without them, or with candidate labels.
        unit_loss: local losses; empty for a rule without local classifiers.
    """

    count: int
    accuracy: float | None
    loss: float
    unit_accuracy: list[float]
    unit_loss: list[float]


@dataclass(frozen=True)
class EpochRecord:
    """A line of metrics.jsonl.

    Attributes:
        epoch: from 1.
        train, validation: what was measured.
        lr: the learning rate after the epoch.
        seconds: of training, validation left out.
        images_per_second: of training.
    """

    epoch: int
    train: TrainStats
    validation: Evaluation
    lr: float
    seconds: float
    images_per_second: float


@dataclass
class MeterSums:
    """Sums over an epoch's batches so far; the prediction comes first, then each unit with a classifier of its own.

    Attributes:
        batches, images: how many.
        right: right answers; empty for a rule with candidate labels.
        loss: sums of the batches' mean losses, in nats.
    """

    batches: int = 0
    images: int = 0
    right: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


class Stopwatch:
    """Wall time of what runs within `running`, begun at what was measured before.

    Args:
        before: seconds.
    """

    def __init__(self, before: float = 0.0) -> None:
        self._before = before
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """So far."""
        return self._before + (0.0 if self._since is None else time.perf_counter() - self._since)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time within."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._since = self.seconds, None


class TrainMeter:
    """Sums losses and right answers of all ranks; a step need not wait for the host, which `settle` brings up to date.

    Args:
        sums: to go on from.
        ranks: whose batches are parts of one.
    """

    def __init__(self, sums: MeterSums | None, ranks: Ranks) -> None:
        self.sums, self._ranks = sums or MeterSums(), ranks
        self._pending: list[Tensor] = []
        self._images = 0

    def update(self, result: StepResult, labels: Tensor) -> None:
        """Add a batch."""
        if result.logits is None:
            self._pending.append(torch.cat([result.head_loss[None], result.losses])[None])  # (1, 1 + units)
        else:
            logits = torch.stack([result.logits, *result.unit_logits])  # (1 + units, B, N)
            right = (logits.argmax(2) == labels).sum(1)
            losses = torch.cat([result.head_loss[None], result.losses[: len(result.unit_logits)]])
            self._pending.append(torch.stack([losses, right.to(losses.dtype)]))  # (2, 1 + units)
        self._images += len(labels)

    def settle(self, names: Sequence[str], epoch: int) -> None:
        """Add up, batch by batch, so that sums are the same wherever a run was cut off; every rank must call it.

        Args:
            names: of the units.
            epoch: from 1.

        Raises:
            DivergenceError: a loss is not finite; names the first step, counted from 1, and the first unit in it.
        """
        if not self._pending:
            return
        batches, images = torch.stack(self._pending).double(), self._images
        self._pending, self._images = [], 0
        if self._ranks.several:
            batches[:, 0] *= images  # means over a rank's part become sums
            total = self._ranks.sum(torch.cat([batches.new_tensor([images]), batches.flatten()]))
            images, batches = int(total[0]), total[1:].reshape(batches.shape)
            batches[:, 0] /= images
        self.sums.images += images
        bad = (~batches[:, 0].isfinite()).nonzero().tolist()
        if bad:
            step, column = min(bad, key=lambda place: (place[0], place[1] or len(names) + 1))
            of = f"unit {names[column - 1]}" if column else "the prediction"
            raise DivergenceError(
                f"the loss of {of} is not finite in epoch {epoch}, step {self.sums.batches + step + 1}"
            )
        zeros = [0.0] * batches.shape[2]
        for loss, *right in batches.tolist():
            self.sums.loss = [sum(pair) for pair in zip(self.sums.loss or zeros, loss, strict=True)]
            for answers in right:
                self.sums.right = [sum(pair) for pair in zip(self.sums.right or zeros, answers, strict=True)]
            self.sums.batches += 1

    def finish(self) -> TrainStats:
        """Means over the epoch, once all is settled; begins the next."""
        sums, self.sums = self.sums, MeterSums()
        accuracy = [100 * right / sums.images for right in sums.right]
        loss = [total / sums.batches for total in sums.loss]
        return TrainStats(sums.images, accuracy[0] if accuracy else None, loss[0], accuracy[1:], loss[1:])
