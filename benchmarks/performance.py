"""The README's performance tables, from one JSON file with hardware and versions.

    uv run python benchmarks/performance.py --measure benchmarks/performance.json
    uv run python benchmarks/performance.py benchmarks/performance.json

The first measures, a quarter of an hour on two cores; the second prints the tables in Markdown.
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
# By title: arguments of `asge-zoo bench`.
RUNS = {
    "VGG8, 3×32×32, batch 128, float32": ["vgg8_cifar10", "--rounds", "7"],
    "VGG8, 3×32×32, batch 128, bfloat16": ["vgg8_cifar10", "--precision", "bfloat16", "--rounds", "7"],
}
COLUMNS = {
    "ms a step (lowest to highest)": lambda measured: (
        f"{measured['ms']:.0f} ({measured['lowest_ms']:.0f} to {measured['highest_ms']:.0f})"
    ),
    "images/s": lambda measured: f"{measured['images_per_second']:.1f}",
    "time, of the kernels'": lambda measured: f"{measured['of_kernels']:.2f}",
    "time, of compiled backpropagation's": lambda measured: f"{measured['of_bp_compiled']:.2f}",
    "peak MiB": lambda measured: f"{measured['peak_bytes'] / MIB:.0f}" if "peak_bytes" in measured else "-",
}


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
        "from asge_zoo.spec import load_spec\n"
        "spec = load_spec(sys.argv[1])\n"
        "graph, batch = compile_spec(spec).train(), random_batch(spec, torch.device('cpu'))\n"
        "started = time.perf_counter()\n"
        "graph.step(*batch)\n"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--measure", action="store_true", help="write the file first")
    options = parser.parse_args()
    if options.measure:
        measured = {
            "runs": {title: bench(arguments) for title, arguments in RUNS.items()},
            "startup": bench(["--startup"]),
            "first_step": first_step("vgg8_cifar10"),
        }
        options.file.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    found = json.loads(options.file.read_text(encoding="utf-8"))
    for title, run in found["runs"].items():
        print(table(title, run), end="\n\n")
    first = found["first_step"]
    print(f"First step: {first['cold']:.1f} s with empty caches, {first['warm']:.1f} s in the next process.")
    for command, measured in found["startup"]["commands"].items():
        print(f"`{command}`: {measured['ms']:.0f} ms")


if __name__ == "__main__":
    main()
