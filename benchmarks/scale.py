"""How time and memory of a step grow with batch, width, depth and classes: our compiled step and eager backpropagation.

    uv run python benchmarks/scale.py --json benchmarks/scale.json --plot benchmarks/scale.png
    uv run python benchmarks/scale.py --point '{"network": "resnet50", "width": 1.0, "size": 224, "classes": 1000}'

Every point is a process of its own, which compiles first; images are random. The sizes are for a CPU. Prints a Markdown
table, which the README shows.
"""

import argparse
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

MIB = 2**20
VARIANTS = ("asge_compiled", "bp_eager")
BASE = {"batch": 32, "width": 0.25, "network": "vgg8", "classes": 10, "size": 32}
POINTS: dict[str, list[dict[str, Any]]] = {
    "batch": [{"batch": batch} for batch in (16, 32, 64, 128)],
    "width": [{"width": width} for width in (0.25, 0.5, 1.0)],
    "depth": [
        {"network": network, "width": 1.0, "size": 64, "batch": 8}
        for network in ("vgg8", "vgg11", "resnet18", "resnet50", "resnet101")
    ],
    "classes": [{"classes": classes} for classes in (10, 100, 1000, 21_000)],
}


def spec_of(point: dict[str, Any]) -> dict[str, Any]:
    """A point as a spec; its pictures need not be there."""
    vgg = point["network"].startswith("vgg")
    network = {"kind": point["network"]} if vgg else {"kind": "timm", "name": point["network"], "norm_weight": 0.2}
    return {
        "name": "scale",
        "data": {
            "kind": "imagefolder",
            "folder": "none",
            "classes": point["classes"],
            "size": point["size"],
            "batch_size": point["batch"],
        },
        "backbone": {**network, "width": point["width"]},
    }


def measure(point: dict[str, Any], rounds: int) -> None:
    """Print, as JSON, each variant's time and memory, and the bytes of a gradient for every parameter."""
    import torch

    from asge_zoo.bench.machine import machine
    from asge_zoo.bench.measure import peak_bytes, step_seconds
    from asge_zoo.bench.measure import rounds as timed
    from asge_zoo.bench.variants import random_batch, variants
    from asge_zoo.compiler.build import compile_spec
    from asge_zoo.engine.device import pick_device
    from asge_zoo.spec import load_spec

    spec, device = load_spec(spec_of(point)), pick_device()
    made = variants(spec, random_batch(spec, device))
    runs = {(name, way): made[name][way].make() for name in VARIANTS for way in made[name]}
    timers = {key: partial(step_seconds, run, device) for key, run in runs.items()}
    timed(timers, 2)
    times = {key: statistics.median(each) for key, each in timed(timers, rounds).items()}
    fastest = {name: min((key for key in runs if key[0] == name), key=times.__getitem__) for name in VARIANTS}
    found = {
        name: {"ms": 1000 * times[key], "peak_bytes": peak_bytes(runs[key], device)} for name, key in fastest.items()
    }
    parameters = sum(x.numel() for x in compile_spec(spec, device="meta").parameters())
    report = {**point, "variants": found, "gradient_bytes": 4 * parameters, **machine(torch.device(device))}
    print(json.dumps(report))


def row(point: dict[str, Any]) -> str:
    """A point as a row of a Markdown table."""
    cells = [str(point[key]) for key in BASE]
    for name in VARIANTS:
        variant = point["variants"][name]
        cells += [f"{variant['ms']:.0f}", f"{variant['peak_bytes'] / MIB:.0f}"]
    cells.append(f"{point['gradient_bytes'] / MIB:.0f}")
    return f"| {' | '.join(cells)} |"


def plot(found: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Time above, memory below, a column for each of the four."""
    from matplotlib.figure import Figure

    from asge_zoo.bench.plots import save

    figure = Figure(figsize=(14, 6), layout="constrained")
    axes = figure.subplots(2, len(found))
    for column, (what, points) in enumerate(found.items()):
        labels = [str(point["network"] if what == "depth" else point[what]) for point in points]
        for name in VARIANTS:
            milliseconds = [point["variants"][name]["ms"] for point in points]
            memory = [point["variants"][name]["peak_bytes"] / MIB for point in points]
            axes[0, column].plot(labels, milliseconds, marker="o", label=name)
            axes[1, column].plot(labels, memory, marker="o", label=name)
        axes[0, column].set(ylabel="ms a step", ylim=(0, None))
        axes[1, column].set(xlabel=what, ylabel="peak MiB", ylim=(0, None))
        if what == "depth":
            for each in axes[:, column]:
                each.tick_params(axis="x", labelrotation=20)  # networks' names are long
    axes[0, 0].legend()
    save(figure, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("scale.json"))
    parser.add_argument("--plot", type=Path, default=Path("scale.png"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--point", help="measure one point alone, a JSON object of what differs from the base; as JSON")
    options = parser.parse_args()
    if options.point:
        measure({**BASE, **json.loads(options.point)}, options.rounds)
        return
    columns = [*BASE, *(f"{name}: {what}" for name in VARIANTS for what in ("ms", "MiB")), "gradients: MiB"]
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    found: dict[str, list[dict[str, Any]]] = {}
    measured: dict[str, dict[str, Any]] = {}  # what two of the four have in common is measured once
    for what, points in POINTS.items():
        for point in ({**BASE, **point} for point in points):
            key = json.dumps(point)
            if key not in measured:
                command = [sys.executable, *sys.argv, "--point", key]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                measured[key] = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(what, []).append(measured[key])
            print(row(measured[key]), flush=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(found, options.plot)


if __name__ == "__main__":
    main()
