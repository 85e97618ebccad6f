"""`bench --startup`: how long commands take that read no data and train nothing."""

import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from asge_zoo.bench.machine import machine
from asge_zoo.errors import SpecError

IN_PYTHON = [sys.executable, "-c"]
ASGE_ZOO = [sys.executable, "-m", "asge_zoo"]
COMMANDS = {
    "asge-zoo --help": [*ASGE_ZOO, "--help"],
    "asge-zoo validate vgg8_digits": [*ASGE_ZOO, "validate", "vgg8_digits"],
    "asge-zoo ls specs": [*ASGE_ZOO, "ls", "specs"],
    "import asge_zoo": [*IN_PYTHON, "import asge_zoo"],
}


def bench_startup(*, count: int) -> dict[str, Any]:
    """Wall time of commands, each in a process of its own, as JSON values.

    Args:
        count: rounds, each of which runs every command once; one more, before them, fills the disk's cache.

    Returns:
        `commands`: by command line `ms` (the rounds' median), `lowest_ms` and `highest_ms`; and what it ran on.

    Raises:
        SpecError: a command does not work here.
    """
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(count + 1):
        for name, command in COMMANDS.items():
            taken = _seconds(name, command)
            if number:
                times[name].append(1000 * taken)
    commands = {
        name: {"ms": statistics.median(own), "lowest_ms": min(own), "highest_ms": max(own)}
        for name, own in times.items()
    }
    return {"commands": commands, "rounds": count, **machine(torch.device("cpu"))}


def _seconds(name: str, command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        reason = " ".join(done.stderr.split()[-20:])
        raise SpecError(f"--startup: `{name}` does not work here ({reason}); `asge-zoo doctor` tells more")
    return taken
