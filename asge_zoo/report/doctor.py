"""What this machine has for training, and what to do about what is missing."""

import os
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from asge_zoo.data.found import datasets_found
from asge_zoo.engine.device import device_name, package_versions, pick_device
from asge_zoo.ranks import usable_cpus

OPTIONAL = {"ffcv": "only for ImageNet at full speed: pip install 'asge-zoo[ffcv]'"}


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok, miss (something optional) or fail (training needs it)."""

    name: str
    status: str
    detail: str
    remedy: str = ""


def examine(root: Path) -> list[Check]:
    """All findings; compiles a small function for real, which takes seconds."""
    return [*_packages(), *_devices(), _threads(), _compiler(), *_data(root)]


def _packages() -> list[Check]:
    checks = []
    for package, version in package_versions().items():
        if version is not None:
            checks.append(Check(package, "ok", version))
        elif package in OPTIONAL:
            checks.append(Check(package, "miss", "not installed", OPTIONAL[package]))
        else:
            checks.append(Check(package, "fail", "not installed", f"pip install {package}"))
    return checks


def _devices() -> list[Check]:
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    checks = [Check(f"device {name}", "ok", device_name(torch.device(name))) for name in names]
    if len(names) == 1:
        checks.append(Check("GPU", "miss", "none found", "training runs on the CPU: take a quarter-width spec"))
    return checks


def _threads() -> Check:
    threads, cpus = torch.get_num_threads(), usable_cpus()
    if threads < cpus // 2:
        return Check("threads", "miss", f"torch uses {threads} of {cpus} CPUs", "unset OMP_NUM_THREADS or raise it")
    return Check("threads", "ok", f"torch uses {threads} of {cpus} CPUs")


def _compiler() -> Check:
    compiler = os.environ.get("CXX", "g++")
    try:
        compiled = torch.compile(lambda x: x.square().mean(), fullgraph=True)
        compiled(torch.ones(8, device=pick_device()))
    except Exception as error:  # whatever the compiler behind torch raises
        found = shutil.which(compiler) or f"{compiler} not found"
        reason = textwrap.shorten(str(error), 120, placeholder=" …")
        return Check(
            "torch.compile",
            "fail",
            f"does not work here ({found}; {reason})",
            "install a C++ compiler (Debian: apt-get install g++), or train with --set train.compile=false",
        )
    return Check("torch.compile", "ok", f"works ({shutil.which(compiler) or 'no g++ on the path'})")


def _data(root: Path) -> list[Check]:
    return [
        Check(f"data {row['dataset']}", "ok", row["found"])
        if row["found"]
        else Check(
            f"data {row['dataset']}",
            "miss",
            f"not under {root}",
            "name the folder it is in with --data-root or ASGE_ZOO_DATA; MNIST, Fashion-MNIST and CIFAR are "
            "downloaded on first use",
        )
        for row in datasets_found(root)
    ]
