"""The README's performance tables, from a JSON file with hardware and versions.

    uv run python benchmarks/performance.py --measure benchmarks/performance.json
    uv run python benchmarks/performance.py benchmarks/performance.json benchmarks/gpu.json

The first measures on a GPU, if there is one, else on the CPU, half an hour on two cores; the second prints the tables
in Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
# Network and spec, of images of 3×32×32 in batches of 128.
ON_CPU = {"VGG8": "vgg8_cifar10"}
ON_GPU = {**ON_CPU, "VGG11": "vgg11_cifar10", "resnet18": "resnet18_cifar10", "resnet50": "resnet50_cifar100"}
COLUMNS = {
    "ms a step (lowest to highest)": lambda measured: (
        f"{short(measured['ms'])} ({short(measured['lowest_ms'])} to {short(measured['highest_ms'])})"
    ),
    "images/s": lambda measured: short(measured["images_per_second"]),
    "time, of the kernels'": lambda measured: f"{measured['of_kernels']:.2f}",
    "time, of compiled backpropagation's": lambda measured: f"{measured['of_bp_compiled']:.2f}",
    "peak MiB": lambda measured: f"{measured['peak_bytes'] / MIB:.0f}" if "peak_bytes" in measured else "-",
}


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bench(arguments: list[str]) -> dict[str, Any]:
    """What `asge-zoo bench` finds, in a process of its own."""
    command = [sys.executable, "-m", "asge_zoo", "bench", *arguments, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def first_step(spec: str) -> dict[str, float]:
    """Seconds of a spec's first step in a fresh process, with empty caches and then with the caches that this left."""
    program = (
        "import json, sys, time, torch\n"
        "from asge_zoo.bench.variants import random_batch\n"
        "from asge_zoo.compiler.build import compile_spec\n"
        "from asge_zoo.engine.device import pick_device\n"
        "from asge_zoo.spec import load_spec\n"
        "spec, device = load_spec(sys.argv[1]), pick_device()\n"
        "graph, batch = compile_spec(spec, device=device).train(), random_batch(spec, device)\n"
        "started = time.perf_counter()\n"
        "graph.step(*batch).losses.tolist()\n"
        "print(json.dumps(time.perf_counter() - started))\n"
    )
    found = {}
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": caches}
        for when in ("cold", "warm"):
            command = [sys.executable, "-c", program, spec]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[when] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(title: str, found: dict[str, Any]) -> str:
    """One run as a Markdown table, the fastest first."""
    where = f"{found['device']}, {found['threads']} threads, torch {found['versions']['torch']}"
    lines = [f"**{title}** ({where})", "", f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for name, measured in sorted(found["variants"].items(), key=lambda item: item[1]["ms"]):
        lines.append(f"| `{name}` | {' | '.join(column(measured) for column in COLUMNS.values())} |")
    return "\n".join(lines)


def measure() -> dict[str, Any]:
    """Everything, in processes of their own; a file's content."""
    import torch

    networks, rounds = (ON_GPU, "7") if torch.cuda.is_available() else (ON_CPU, "21")  # which differ by far more there
    return {
        "runs": {
            f"{network}, 3×32×32, batch 128, {precision}": bench([spec, "--precision", precision, "--rounds", rounds])
            for network, spec in networks.items()
            for precision in ("float32", "bfloat16")
        },
        "startup": bench(["--startup"]),
        "first_step": first_step("vgg8_cifar10"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--measure", action="store_true", help="write the one file first")
    options = parser.parse_args()
    if options.measure:
        (file,) = options.files
        file.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    for file in options.files:
        found = json.loads(file.read_text(encoding="utf-8"))
        for title, run in found["runs"].items():
            print(table(title, run), end="\n\n")
        if "first_step" in found:
            first = found["first_step"]
            print(f"First step: {first['cold']:.1f} s with empty caches, {first['warm']:.1f} s in the next process.")
            for command, measured in found["startup"]["commands"].items():
                print(f"`{command}`: {measured['ms']:.0f} ms")


if __name__ == "__main__":
    main()
