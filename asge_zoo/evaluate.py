"""Accuracy of a graph's prediction and of each of its units, in one pass."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asge_zoo.data.base import Batch
from asge_zoo.graph.local_graph import LocalGraph

TOP_K = 5


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a split; accuracies in percent, losses in nats.

    Attributes:
        count: images seen.
        accuracy, top5, loss: of the prediction strategy.
        unit_accuracy, unit_loss: of each unit's own logits; empty for a rule without local logits.
        mean_depth: units that an image needed, on average, of a strategy that exits early; else None.
    """

    count: int
    accuracy: float
    top5: float
    loss: float
    unit_accuracy: list[float]
    unit_loss: list[float]
    mean_depth: float | None = None


@torch.no_grad()
def evaluate(graph: LocalGraph, batches: Iterable[Batch]) -> Evaluation:
    """Measure `graph` on batches of images (B, C, H, W) and labels (B,); leaves it in evaluation mode."""
    graph.eval()
    count = 0
    totals: list[torch.Tensor] = []
    for images, labels in batches:
        logits, unit_logits = graph.all_logits(images)
        top = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]
        sums = [top.sum(), _depth(graph, unit_logits), *(_measure(each, labels) for each in (logits, *unit_logits))]
        totals.append(torch.cat([part.double().flatten() for part in sums]))
        count += len(labels)
    total = (torch.stack(totals).sum(0) / count).tolist()
    accuracy, loss = [100 * share for share in total[2::2]], total[3::2]
    depth = total[1] if graph.prediction.exits_early else None
    return Evaluation(count, accuracy[0], 100 * total[0], loss[0], accuracy[1:], loss[1:], depth)


def _depth(graph: LocalGraph, unit_logits: list[torch.Tensor]) -> torch.Tensor:
    """Units that a batch's images need, summed; zero where all run the same ones."""
    if not graph.prediction.exits_early:
        return torch.zeros((), device=next(graph.parameters()).device)
    return graph.prediction.depth(graph.head, unit_logits).clamp(max=len(unit_logits)).sum()


def _measure(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct answers and summed cross-entropy, as one tensor (2,)."""
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([correct.float(), F.cross_entropy(logits, labels, reduction="sum")])
