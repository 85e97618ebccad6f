"""`asge-zoo eval`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from asge_zoo.cli.options import AsJson, DataRoot, Device


class Split(StrEnum):
    """What may be measured."""

    TEST = "test"
    VALIDATION = "validation"


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run directory (its best checkpoint) or a checkpoint folder.")],
    split: Annotated[Split, typer.Option(help="Which images.")] = Split.TEST,
    data_root: DataRoot = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a trained network on its dataset."""
    from asge_zoo.compiler.check import parts
    from asge_zoo.data.base import data_root as find_root
    from asge_zoo.engine.checkpoint import find_checkpoint, load_checkpoint
    from asge_zoo.engine.device import pick_device
    from asge_zoo.evaluate import evaluate as measure

    chosen, root = pick_device(device), find_root(data_root)
    graph, spec = load_checkpoint(find_checkpoint(checkpoint), device=chosen)
    loader = parts(spec)[0].loader(root, seed=spec.train.seed, device=chosen)
    found = measure(graph, loader.split_batches(split))
    report = {
        "accuracy": found.accuracy,
        "top5": found.top5,
        "count": found.count,
        "unit_accuracy": found.unit_accuracy,
        "loss": found.loss,
        "split": split.value,
        "name": spec.name,
        "spec_sha256": spec.digest(),
    }
    if as_json:
        print(json.dumps(report))
        return
    print(f"{spec.name}: {found.accuracy:.2f} % of {found.count} {split.value} images (top 5: {found.top5:.2f} %)")
    for unit, accuracy in zip(graph.units, found.unit_accuracy, strict=False):
        print(f"  {unit.name}: {accuracy:.2f} %")
