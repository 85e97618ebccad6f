"""Accuracy of a graph's prediction and of each of its units, in one pass."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from asge_zoo.data.base import Batch
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.ranks import Ranks

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


def evaluate(graph: LocalGraph, batches: Iterable[Batch], ranks: Ranks | None = None) -> Evaluation:
    """Measure `graph` on batches of images (B, C, H, W) and labels (B,); leaves it in evaluation mode.

    Args:
        graph: the same on every rank.
        batches: of this rank; of several, one may have none.
        ranks: whose batches together are the split.
    """
    return evaluate_alternatives(graph, batches, ranks)[0]


@torch.no_grad()
def evaluate_alternatives(
    graph: LocalGraph, batches: Iterable[Batch], ranks: Ranks | None = None
) -> tuple[Evaluation, list[float]]:
    """As `evaluate`, and the accuracy (percent) of each of the prediction's alternatives, in the same pass."""
    graph.eval()
    ranks, count, units = ranks or Ranks(), 0, len(graph.local)
    totals: list[torch.Tensor] = []
    for images, labels in batches:
        logits, unit_logits = graph.all_logits(images)
        top = logits.topk(min(TOP_K, logits.shape[1])).indices == labels[:, None]
        measured = [_measure(each, labels) for each in (logits, *unit_logits)]
        choices = [_correct(each, labels) for each in graph.prediction.alternatives(graph.head, unit_logits)]
        sums = [top.sum(), _depth(graph, unit_logits), *measured, *choices]
        totals.append(torch.cat([part.double().flatten() for part in sums]))
        count += len(labels)
    width = ranks.max(len(totals[0]) if totals else 0)
    empty = torch.zeros(width, dtype=torch.float64, device=next(graph.parameters()).device)
    summed = ranks.sum(torch.cat([empty.new_tensor([count]), sum(totals, empty)]))
    count, total = int(summed[0]), (summed[1:] / summed[0]).tolist()
    end = 2 + 2 * (1 + units)
    accuracy, loss = [100 * share for share in total[2:end:2]], total[3:end:2]
    depth = total[1] if graph.prediction.exits_early else None
    found = Evaluation(count, accuracy[0], 100 * total[0], loss[0], accuracy[1:], loss[1:], depth)
    return found, [100 * share for share in total[end:]]


def _depth(graph: LocalGraph, unit_logits: list[torch.Tensor]) -> torch.Tensor:
    """Units that a batch's images need, summed; zero where all run the same ones."""
    if not graph.prediction.exits_early:
        return torch.zeros((), device=next(graph.parameters()).device)
    return graph.prediction.depth(graph.head, unit_logits).clamp(max=len(unit_logits)).sum()


def _measure(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct answers and summed cross-entropy, as one tensor (2,)."""
    return torch.stack([_correct(logits, labels).float(), F.cross_entropy(logits, labels, reduction="sum")])


def _correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Correct answers, ()."""
    return (logits.argmax(1) == labels).sum()
