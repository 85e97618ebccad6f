"""How much the engine adds to the compiled step: an epoch's wall time over steps × the step's own median time.

    uv run python benchmarks/engine_overhead.py specs/vgg8_cifar10_quarter.json

One process: the bare step is timed on one fixed batch right before and right after a real training epoch
(loader, augmentation, optimizer, schedule and metrics included, evaluation left out). Prints JSON.
"""

import argparse
import json
import statistics
import time

import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.base import data_root
from asge_zoo.engine.device import environment, pick_device
from asge_zoo.engine.progress import RunProgress
from asge_zoo.engine.train import build_optimizer, train_epoch
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import load_spec


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
    parser.add_argument("--bare-steps", type=int, default=50, help="bare steps to time before and after the epoch")
    options = parser.parse_args()

    spec = load_spec(options.spec, overrides=options.overrides)
    device, seed = pick_device(options.device), spec.train.seed
    graph = compile_spec(spec, device=device)
    loader = parts(spec).data.loader(data_root(options.data_root), seed=seed, device=device)
    optimizer, scheduler = build_optimizer(spec, graph, loader.steps())
    images, labels = next(loader.train_batches(0))
    time_steps(graph, images, labels, 5)  # compiles, warms up

    bare = time_steps(graph, images, labels, options.bare_steps)
    with RunProgress(spec.name, loader.steps() * loader.batch_size) as progress:
        started = time.perf_counter()
        train_epoch(graph, loader, optimizer, scheduler, epoch=0, seed=seed, progress=progress)
        epoch = time.perf_counter() - started
    bare += time_steps(graph, images, labels, options.bare_steps)

    median = statistics.median(bare)
    report = {
        "spec": spec.name,
        "steps": loader.steps(),
        "epoch_seconds": epoch,
        "step_median_seconds": median,
        "step_quartiles_seconds": statistics.quantiles(bare, n=4)[::2],
        "ratio": epoch / (loader.steps() * median),
        "environment": environment(device),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
