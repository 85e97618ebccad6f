"""How long a training step waits for its images, by the loader that a spec names.

    python benchmarks/data_wait.py specs/vgg11_imagenet_sample.json --set data.size=160 --set backbone.width=1.0

Times real training steps, once the first few have filled what is read ahead, and prints JSON: the share of the time
spent waiting for the loader, and how many images a second the loader alone gives, for where it is the limit.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.data.base import Batch, Loader, data_root
from asge_zoo.engine.device import device_name, package_versions, pick_device
from asge_zoo.engine.state import begin
from asge_zoo.engine.train import train_step
from asge_zoo.spec import load_spec

WARM = 3  # steps that are not timed


def batches_of(loader: Loader) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.train_batches(epoch)
        epoch += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--device")
    given = parser.parse_args()
    spec, device = load_spec(given.spec, overrides=given.set), pick_device(given.device)
    loader = parts(spec).data.loader(data_root(given.data_root), seed=spec.train.seed, device=device)
    graph = compile_spec(spec, device=device)
    state = begin(spec, graph, loader.steps(), time.perf_counter())
    graph.train()
    batches = batches_of(loader)
    waited, started = 0.0, 0.0
    for step in range(WARM + given.steps):
        if step == WARM:
            state.check_losses()  # waits for the device
            waited, started = 0.0, time.perf_counter()
        asked = time.perf_counter()
        images, labels = next(batches)
        waited += time.perf_counter() - asked
        train_step(state, images, labels)
    state.check_losses()
    seconds = time.perf_counter() - started
    began = time.perf_counter()
    alone = sum(len(next(batches)[1]) for _ in range(given.steps)) / (time.perf_counter() - began)
    report = {
        "spec": spec.name,
        "set": given.set,
        "loader": loader.described,
        "device": device_name(device),
        "packages": package_versions(),
        "step_ms": 1000 * seconds / given.steps,
        "images_per_second": loader.batch_size * given.steps / seconds,
        "waiting_share": waited / seconds,
        "loader_alone_images_per_second": alone,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
