"""The training loop, from a spec to a run directory.

    spec.json, environment.json   what was run, on what
    metrics.jsonl                 a line an epoch
    checkpoints/epoch-0007/       see `checkpoint`; `best` and `last` link to two of them
    curves.png, units.png         accuracy and loss by epoch; accuracy by unit
    result.json                   the test, when all is done

With several runs, each seed has such a directory of its own, `seed-0` and so on; `spec.json` and `result.json` of
them all join them when the last is done.
"""

import json
import statistics
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.base import Loader
from asge_zoo.data.base import data_root as find_data_root
from asge_zoo.engine.checkpoint import BEST, SPEC, load_checkpoint
from asge_zoo.engine.device import pick_device
from asge_zoo.engine.files import append_line, json_bytes, write_file
from asge_zoo.engine.meter import TrainMeter, TrainStats
from asge_zoo.engine.plots import plot_curves, plot_units
from asge_zoo.engine.progress import RunProgress
from asge_zoo.engine.run_dir import METRICS, RESULT, keep_checkpoint, new_run_dir, start_run_dir
from asge_zoo.errors import SpecError
from asge_zoo.evaluate import Evaluation, evaluate
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.seeding import keyed_seed
from asge_zoo.spec import Spec


@dataclass(frozen=True)
class RunResult:
    """What a run, or several runs together, came to; accuracies in percent, means over the runs.

    Attributes:
        run_dir: where everything lies.
        test_accuracy: of the checkpoint with the best validation accuracy, on the test images.
        val_accuracy: that checkpoint's validation accuracy.
        epochs: trained.
        seconds: wall time, everything included.
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


def train(
    spec: Spec,
    *,
    run_dir: str | Path | None = None,
    device: str | None = None,
    data_root: str | Path | None = None,
) -> RunResult:
    """Train by a spec, every run of it, and test each run's best checkpoint.

    Args:
        spec: what to train.
        run_dir: where to write, a new directory; `runs/<name>` if not given.
        device: a torch device; if not given, a CUDA GPU if there is one, else the CPU.
        data_root: where datasets lie; if not given, $ASGE_ZOO_DATA, else the user's cache.

    Raises:
        SpecError: the spec's parts do not fit together, there is no such device, or torch.compile does not work.
        DataError: the dataset is missing or unreadable.
        CheckpointError: the run directory is in use already.
        DivergenceError: a loss is no longer finite.
    """
    chosen, root = pick_device(device), find_data_root(data_root)
    folder = new_run_dir(spec, run_dir)
    with torch.random.fork_rng(devices=[chosen] if chosen.type == "cuda" else []):  # the caller's stays as it was
        return _train_runs(spec, folder, chosen, root)


def _train_runs(spec: Spec, folder: Path, device: torch.device, root: Path) -> RunResult:
    if spec.train.runs == 1:
        return _train_seed(spec, folder, device, root)
    started = time.perf_counter()
    seeds = range(spec.train.seed, spec.train.seed + spec.train.runs)
    results = tuple(_train_seed(spec.for_seed(seed), folder / f"seed-{seed}", device, root) for seed in seeds)
    accuracy = [result.test_accuracy for result in results]
    result = RunResult(
        run_dir=str(folder),
        test_accuracy=statistics.mean(accuracy),
        val_accuracy=statistics.mean(result.val_accuracy for result in results),
        epochs=spec.train.epochs,
        seconds=time.perf_counter() - started,
        unit_test_accuracy=[
            statistics.mean(unit) for unit in zip(*(r.unit_test_accuracy for r in results), strict=True)
        ],
        std=statistics.stdev(accuracy),
        runs=results,
    )
    write_file(folder / SPEC, json_bytes(spec.resolved()))
    write_file(folder / RESULT, json_bytes(result.to_json()))
    return result


def _train_seed(spec: Spec, folder: Path, device: torch.device, root: Path) -> RunResult:
    started = time.perf_counter()
    seed, epochs = spec.train.seed, spec.train.epochs
    graph = compile_spec(spec, device=device)
    loader = parts(spec).data.loader(root, seed=seed, device=device)
    optimizer, scheduler = build_optimizer(spec, graph, epochs * loader.steps())
    best = -1.0
    with RunProgress(spec.name, epochs * loader.steps() * loader.batch_size) as progress:
        if spec.train.compile:
            progress.say(f"{spec.name}: compiling the step, about half a minute if it is not cached")
            compile_step(graph, loader)
        start_run_dir(folder, spec, device)
        progress.say(f"{spec.name}: seed {seed} on {device}, writing to {folder}")
        for epoch in range(epochs):
            epoch_started = time.perf_counter()
            trained = train_epoch(graph, loader, optimizer, scheduler, epoch=epoch, seed=seed, progress=progress)
            seconds = time.perf_counter() - epoch_started
            validation = select_and_validate(graph, loader)
            record = {
                "epoch": epoch + 1,
                "train": asdict(trained),
                "validation": asdict(validation),
                "lr": scheduler.get_last_lr()[0],
                "seconds": seconds,
                "images_per_second": trained.count / seconds,
            }
            append_line(folder / METRICS, json.dumps(record))
            progress.epoch(record, epochs)
            improved = validation.accuracy > best
            best = max(best, validation.accuracy)
            state = {"epoch": epoch + 1, "val_accuracy": validation.accuracy, "best_val_accuracy": best}
            keep_checkpoint(
                folder, improved, spec=spec, graph=graph, optimizer=optimizer, scheduler=scheduler, progress=state
            )
    return _test_best(spec, folder, device, loader, best, started)


def _test_best(
    spec: Spec, folder: Path, device: torch.device, loader: Loader, val_accuracy: float, started: float
) -> RunResult:
    """Test the best checkpoint, as it lies on disk, and write what came of the run."""
    graph, _ = load_checkpoint(folder / BEST, device=device)
    test = evaluate(graph, loader.split_batches("test"))
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    plot_curves(records, folder / "curves.png", title=spec.name)
    if test.unit_accuracy:
        plot_units(records, [unit.name for unit in graph.units], folder / "units.png", title=spec.name)
    result = RunResult(
        run_dir=str(folder),
        test_accuracy=test.accuracy,
        val_accuracy=val_accuracy,
        epochs=spec.train.epochs,
        seconds=time.perf_counter() - started,
        unit_test_accuracy=test.unit_accuracy,
    )
    write_file(folder / RESULT, json_bytes(result.to_json()))
    return result


def build_optimizer(
    spec: Spec, graph: LocalGraph, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The spec's optimizer, the prediction's head a group of its own, and its schedule over all steps."""
    named = list(graph.tensors()[0].items())
    head = set(graph.head_parameters)
    groups: list[dict[str, Any]] = [{"params": [item for item in named if item[0] not in head]}]
    if head:
        rate = {} if graph.prediction.head_lr is None else {"lr": graph.prediction.head_lr}
        groups.append({"params": [item for item in named if item[0] in head], **rate})
    optimizer = parts(spec).optimizer.build(groups)
    return optimizer, parts(spec).schedule.build(optimizer, total_steps)


def compile_step(graph: LocalGraph, loader: Loader) -> None:
    """Compile the training step, by running it once on the first batch; changes nothing else.

    Raises:
        SpecError: torch's compiler does not work here.
    """
    graph.train()
    try:
        graph.step(*next(loader.train_batches(0)))
    except Exception as error:  # whatever torch's compiler, or the C++ compiler behind it, raises
        reason = textwrap.shorten(str(error), 160, placeholder=" …")
        raise SpecError(
            f"train.compile: torch.compile does not work here ({reason}); install a C++ compiler (g++), or train with "
            f"--set train.compile=false; `asge-zoo doctor` tells more"
        ) from error


def select_and_validate(graph: LocalGraph, loader: Loader) -> Evaluation:
    """Validation accuracy, once the prediction has chosen (the best unit, say) by the units' own."""
    measured = evaluate(graph, loader.split_batches("validation"))
    if graph.prediction.select(graph.head, measured.unit_accuracy):
        return evaluate(graph, loader.split_batches("validation"))
    return measured


def train_epoch(
    graph: LocalGraph,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    *,
    epoch: int,
    seed: int,
    progress: RunProgress,
) -> TrainStats:
    """One pass over the training images; returns means over its batches, as they were trained on.

    Raises:
        DivergenceError: a loss was not finite.
    """
    graph.train()
    parameters, buffers = dict(graph.named_parameters()), dict(graph.named_buffers())
    meter = TrainMeter()
    for step, (images, labels) in enumerate(loader.train_batches(epoch)):
        torch.manual_seed(keyed_seed(seed, "step", epoch, step))  # for dropout: by (seed, epoch, step) alone
        result = graph.step(images, labels)
        for name, gradient in result.grads.items():
            parameters[name].grad = gradient
        optimizer.step()
        scheduler.step()
        for name, value in result.buffers.items():
            buffers[name].copy_(value)
        meter.update(result, labels)
        progress.advance(len(labels))
    meter.check_finite([unit.name for unit in graph.units], epoch + 1)
    return meter.means()
