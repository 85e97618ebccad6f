"""A spec small enough to train in about a second."""

from typing import Any

from asge_zoo.spec import Spec, load_spec

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"kind": "digits", "validation": 1000, "batch_size": 64},
    "backbone": {"kind": "vgg8", "width": 0.05},
    "prediction": {"kind": "fusion", "lr": 0.005},
    "optimizer": {"kind": "adamw", "lr": 0.001},
    "train": {"epochs": 1, "compile": False},
}


def tiny_spec(*overrides: str) -> Spec:
    """The tiny spec: six steps of VGG8 at a twentieth of its width; `overrides` as for `--set`."""
    return load_spec(TINY, overrides=overrides)
