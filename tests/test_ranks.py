"""Ranks: together they do what one does, evaluate every image once, and no one waits for a dead one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

BATCH = 12
VGG: dict[str, Any] = {
    "name": "vgg",
    "data": {"kind": "digits", "validation": 180, "batch_size": BATCH, "size": 16},
    "backbone": {"kind": "vgg11", "width": 0.0625},
    "train": {"compile": False},
}
RESNET = {**VGG, "backbone": {"kind": "timm", "name": "resnet18", "width": 0.125, "stem": "cifar", "norm": "spec"}}
BATCH_NORM = {**RESNET, "backbone": {**RESNET["backbone"], "norm": "keep"}}
BP = {**VGG, "rule": {"kind": "bp"}, "prediction": {"kind": "last"}}


def on_ranks(world_size: int, spec: dict[str, Any], folder: Path, *options: str) -> list[dict[str, Tensor]]:
    """What `steps_on_ranks` came to on each rank."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    script = Path(__file__).with_name("steps_on_ranks.py")
    line = [sys.executable, *launch, str(script), json.dumps(spec), str(folder / "state"), *options]
    subprocess.run(line, check=True, timeout=500, capture_output=True)
    return [safetensors.torch.load_file(folder / f"state.{rank}") for rank in range(world_size)]


def furthest(state: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of a tensor relative to its norm."""
    assert state.keys() == other.keys()
    floating = [name for name in state if state[name].is_floating_point()]
    return max(float((state[name] - other[name]).norm() / other[name].norm().clamp(min=1e-30)) for name in floating)
