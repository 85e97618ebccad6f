"""What a run came to, or several runs together."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from asge_zoo.data.base import Loader
from asge_zoo.engine.checkpoint import CHECKPOINTS, checkpoint_name
from asge_zoo.engine.loading import load_checkpoint
from asge_zoo.engine.run_dir import CURVES, RESULT, UNITS
from asge_zoo.engine.state import TrainState
from asge_zoo.evaluate import evaluate
from asge_zoo.files import json_bytes, write_file


@dataclass(frozen=True)
class RunResult:
    """What a run, or several runs together, came to; accuracies in percent, means over the runs.

    Attributes:
        run_dir: where everything lies.
        test_accuracy: of the checkpoint with the best validation accuracy, on the test images.
        val_accuracy: that checkpoint's validation accuracy.
        epochs: trained.
        seconds: wall time, everything included; of a resumed run, up to its checkpoints and from there on.
        unit_test_accuracy: of each unit's own logits, on the test images.
        std: standard deviation (n − 1) of the test accuracy over the runs; None for one run.
        runs: the single results; empty for one run.
    """

    run_dir: str
    test_accuracy: float
    val_accuracy: float
    epochs: int
    seconds: float
    unit_test_accuracy: list[float]
    std: float | None = None
    runs: tuple["RunResult", ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `std` and `runs` only where there are several runs."""
        values = asdict(self)
        if self.runs:
            return {**values, "runs": [run.to_json() for run in self.runs]}
        return {key: values[key] for key in values if key not in ("std", "runs")}


def test_best(folder: Path, state: TrainState, loader: Loader) -> RunResult:
    """Test a finished run's best checkpoint, as it lies on disk, and write what came of the run.

    Every rank must call it: each evaluates its part, the first one writes, and all get its result.
    """
    assert state.best is not None
    ranks = state.ranks
    ranks.share(None)  # once the first one has written the checkpoint
    device = next(state.graph.parameters()).device
    graph, spec = load_checkpoint(folder / CHECKPOINTS / state.best.name, device=device)
    test = evaluate(graph, loader.split_batches("test"), ranks)
    best = next(record for record in state.records if checkpoint_name(record.epoch, 0) == state.best.name)
    result = RunResult(
        run_dir=str(folder),
        test_accuracy=test.accuracy,
        val_accuracy=best.validation.accuracy,
        epochs=state.epoch,
        seconds=time.perf_counter() - state.started,
        unit_test_accuracy=test.unit_accuracy,
    )
    if ranks.first:
        from asge_zoo.engine import plots  # takes matplotlib, half a second to import, which most processes don't need

        plots.plot_curves(state.records, folder / CURVES, title=spec.name)
        if test.unit_accuracy:
            plots.plot_units(best, [unit.name for unit in graph.units], folder / UNITS, title=spec.name)
        write_file(folder / RESULT, json_bytes(result.to_json()))
    return ranks.share(result)


def combine(folder: Path, results: Sequence[RunResult]) -> RunResult:
    """Mean and standard deviation of several runs that lie in a directory."""
    accuracy = [result.test_accuracy for result in results]
    return RunResult(
        run_dir=str(folder),
        test_accuracy=statistics.mean(accuracy),
        val_accuracy=statistics.mean(result.val_accuracy for result in results),
        epochs=results[0].epochs,
        seconds=sum(result.seconds for result in results),
        unit_test_accuracy=[
            statistics.mean(unit) for unit in zip(*(r.unit_test_accuracy for r in results), strict=True)
        ],
        std=statistics.stdev(accuracy),
        runs=tuple(results),
    )
