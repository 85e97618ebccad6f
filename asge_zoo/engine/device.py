"""Where to compute, what it is, and whether it must be deterministic."""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from asge_zoo.errors import SpecError
from asge_zoo.ranks import local_rank, local_world_size, usable_cpus
from asge_zoo.registry import Origin

PACKAGES = (
    "asge-zoo",
    "torch",
    "triton",
    "torchvision",
    "timm",
    "pydantic",
    "safetensors",
    "scikit-learn",
    "numpy",
    "ffcv",
)


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or a CUDA GPU if there is one, else the CPU; of several ranks, each one's own GPU.

    Raises:
        SpecError: there is no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in name and local_world_size() > 1:
        raise SpecError(f"--device {name}: each rank has a GPU of its own; write --device cuda")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise SpecError(f"--device {name}: is neither cpu nor cuda (or cuda:1 …); `asge-zoo doctor` lists devices")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local_rank()) if device.index is None else device
            torch.cuda.set_device(device)  # NCCL and unnamed allocations go by it
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


# What in the process's environment may change arithmetic; folders apart.
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
VARIABLES = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "ATEN_", "TORCH_", "TORCHINDUCTOR_"),
    *("CUBLAS_", "CUDNN_", "NVIDIA_TF32_"),
)


def environment(device: torch.device, data_root: Path, plugins: Sequence[Origin]) -> dict[str, Any]:
    """What a run runs on: together with its spec, enough to say why two runs may differ."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "plugins": {str(origin.distribution): origin.version for origin in plugins},
        "device": str(device),
        "device_name": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "cpus": usable_cpus(),
        "cxx": _first_line([os.environ.get("CXX") or "g++", "--version"]),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "variables": {
            name: os.environ[name]
            for name in sorted(os.environ)
            if name.startswith(VARIABLES) and not name.endswith("_DIR")
        },
        "data_root": str(data_root),
        "git_revision": git_revision(),
        "host": socket.gethostname(),
        "command": sys.argv,
    }


@contextlib.contextmanager
def deterministic(strict: bool) -> Iterator[None]:
    """With `strict`, only torch's deterministic algorithms within: an operation that has none raises RuntimeError."""
    if not strict:
        yield
        return
    from torch._inductor import config as inductor  # takes seconds

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, ":4096:8")  # torch asks for it, and cuBLAS reads it at its first use
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        with inductor.patch(deterministic=True):  # no kernel is chosen by how fast it was
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[WORKSPACE]


def git_revision() -> str | None:
    """Commit of the checkout this package is run from, `-dirty` if changed; None if it is in none."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed: git would answer for whatever is around it
        return None
    described = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return _first_line(described)


def _first_line(command: list[str]) -> str | None:
    """What a command prints first; None if it does not work here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.splitlines()), "").strip() or None
