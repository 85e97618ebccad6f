"""What was measured on."""

import platform
from typing import Any

import torch

from asge_zoo.engine.device import device_name, package_versions
from asge_zoo.ranks import usable_cpus


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, as JSON values."""
    return {
        "device": device_name(device),
        "cpu": device_name(torch.device("cpu")),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **package_versions()},
    }
