"""How much the engine adds to the compiled step: an epoch's wall time over steps × the step's own median time.

    uv run python benchmarks/engine_overhead.py specs/vgg8_cifar10_quarter.json

One process: the bare step is timed on one fixed batch right before and right after a real training epoch
(loader, augmentation, optimizer, schedule and metrics included, evaluation left out). Then checkpoints are saved
between further steps, as a run saves them, each fsynced and the oldest dropped. Prints JSON.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.base import data_root
from asge_zoo.engine.device import environment, pick_device
from asge_zoo.engine.keeper import CheckpointKeeper
from asge_zoo.engine.progress import RunProgress
from asge_zoo.engine.run_dir import start_run_dir
from asge_zoo.engine.signals import StopSignals
from asge_zoo.engine.state import begin
from asge_zoo.engine.train import train_epoch, train_step
from asge_zoo.evaluate import evaluate
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import load_spec

SAVES = 11


def time_steps(graph: LocalGraph, images: torch.Tensor, labels: torch.Tensor, count: int) -> list[float]:
    """Seconds of each of `count` bare steps on one batch, device work included."""
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        graph.step(images, labels).losses.cpu()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--data-root")
    parser.add_argument("--device")
    parser.add_argument("--run-root", help="where checkpoints are saved; default the system's temporary folder")
    parser.add_argument("--bare-steps", type=int, default=50, help="bare steps to time before and after the epoch")
    options = parser.parse_args()

    spec = load_spec(options.spec, overrides=options.overrides)
    device, root = pick_device(options.device), data_root(options.data_root)
    graph = compile_spec(spec, device=device)
    loader = parts(spec).data.loader(root, seed=spec.train.seed, device=device)
    images, labels = next(loader.train_batches(0))
    time_steps(graph, images, labels, 5)  # compiles, warms up

    bare = time_steps(graph, images, labels, options.bare_steps)
    state = begin(spec, graph, loader.steps(), time.perf_counter())
    with (
        tempfile.TemporaryDirectory(dir=options.run_root) as folder,
        RunProgress(spec.name, loader.steps() * loader.batch_size) as progress,
    ):
        keeper = CheckpointKeeper(Path(folder), spec.train.checkpoint)
        start_run_dir(Path(folder), spec, environment(device, root, spec.plugins), state, progress.warn)
        started = time.perf_counter()
        train_epoch(state, loader, keeper, StopSignals(), progress)
        epoch = time.perf_counter() - started
        bare += time_steps(graph, images, labels, options.bare_steps)
        state.end_epoch(evaluate(graph, itertools.islice(loader.split_batches("validation"), 1)))
        saves = []
        for batch in itertools.islice(loader.train_batches(1), SAVES):
            train_step(state, *batch)
            state.check_losses()  # waits for the device
            started = time.perf_counter()
            keeper.save(state)
            saves.append(time.perf_counter() - started)

    median = statistics.median(bare)
    report = {
        "spec": spec.name,
        "steps": loader.steps(),
        "epoch_seconds": epoch,
        "step_median_seconds": median,
        "step_quartiles_seconds": statistics.quantiles(bare, n=4)[::2],
        "ratio": epoch / (loader.steps() * median),
        "save_median_seconds": statistics.median(saves),
        "save_slowest_seconds": max(saves),
        "save_share_of_epoch": statistics.median(saves) / epoch,
        "environment": environment(device, root, spec.plugins),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
