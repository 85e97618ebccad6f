"""How long the first training step takes where nothing is cached: the compiler's time, by network.

    python benchmarks/cold_compile.py resnet18 resnet50 resnet101 --repeats 3

Each measurement is a process of its own with empty caches; networks are timm's, on images of 64×64 pixels, 8 a batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time


def measure(name: str) -> None:
    """Print, as JSON, the seconds of a network's first step, those of its second, and the graphs compiled."""
    import torch
    from torch._dynamo.utils import counters

    from asge_zoo.compiler.build import compile_spec
    from asge_zoo.spec import load_spec

    spec = {
        "name": "cold",
        "data": {"kind": "cifar10", "size": 64, "batch_size": 8},
        "backbone": {"kind": "timm", "name": name},
    }
    graph = compile_spec(load_spec(spec))
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        graph.step(images, labels)
        seconds.append(time.perf_counter() - start)
    found = {"cold": seconds[0], "second": seconds[1], "graphs": counters["stats"]["unique_graphs"]}
    print(json.dumps({**found, "units": len(graph.units)}))


def in_a_fresh_process(name: str) -> dict[str, float]:
    """What `measure` finds with empty caches."""
    with tempfile.TemporaryDirectory() as caches:
        places = {key: caches for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        command = [sys.executable, __file__, "--measure", name]
        done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["resnet18", "resnet50", "resnet101"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.networks}
    for _ in range(arguments.repeats):  # in turns, so that a slow minute does not fall on one network alone
        for name, runs in found.items():
            runs.append(in_a_fresh_process(name))
            print(f"{name}: {runs[-1]}", file=sys.stderr)
    for name, runs in found.items():
        cold = [run["cold"] for run in runs]
        print(
            f"{name}: {runs[0]['units']} units, {runs[0]['graphs']} graphs, {statistics.median(cold):.1f} s "
            f"({min(cold):.1f} to {max(cold):.1f})"
        )


if __name__ == "__main__":
    main()
