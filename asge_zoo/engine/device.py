"""Where to compute, and what it is."""

import os
import platform
import subprocess
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from asge_zoo.errors import SpecError

PACKAGES = ("asge-zoo", "torch", "torchvision", "pydantic", "safetensors", "scikit-learn", "numpy", "ffcv")


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or a CUDA GPU if there is one, else the CPU.

    Raises:
        SpecError: there is no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise SpecError(f"--device {name}: is neither cpu nor cuda (or cuda:1 …); `asge-zoo doctor` lists devices")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = textwrap.shorten(str(error), 100, placeholder=" …")
        raise SpecError(f"--device {name}: can't be used here ({reason}); `asge-zoo doctor` lists devices") from None
    return device


def package_versions() -> dict[str, str | None]:
    """Version of each package a run depends on; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: torch.device) -> dict[str, Any]:
    """What a run runs on: enough to say why two runs may differ."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "device": str(device),
        "device_name": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpus": usable_cpus(),
        "git_revision": _git_revision(),
        "command": sys.argv,
    }


def _git_revision() -> str | None:
    """Commit of the checkout this package is run from, `-dirty` if changed; None if it is in none."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed: git would answer for whatever is around it
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=checkout,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
