"""`asge-zoo eval`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("eval")
@click.argument("checkpoint", type=options.PATH)
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Which images.")
@options.data_root
@options.device
@options.as_json
def evaluate(checkpoint: Path, split: str, data_root: Path | None, device: str | None, as_json: bool) -> None:
    """Measure CHECKPOINT (a run directory, by its best one, or a checkpoint folder) on its dataset."""
    from asge_zoo.compiler.check import parts
    from asge_zoo.data.base import data_root as find_root
    from asge_zoo.engine.device import pick_device
    from asge_zoo.engine.loading import find_checkpoint, load_checkpoint
    from asge_zoo.evaluate import evaluate as measure

    chosen, root = pick_device(device), find_root(data_root)
    graph, spec = load_checkpoint(find_checkpoint(checkpoint), device=chosen)
    loader = parts(spec).data.loader(root, seed=spec.train.seed, device=chosen)
    found = measure(graph, loader.split_batches(split))
    report = {
        "accuracy": found.accuracy,
        "top5": found.top5,
        "count": found.count,
        "unit_accuracy": found.unit_accuracy,
        "loss": found.loss,
        "mean_depth": found.mean_depth,
        "split": split,
        "name": spec.name,
        "spec_sha256": spec.digest(),
    }
    if as_json:
        print(json.dumps(report))
        return
    print(f"{spec.name}: {found.accuracy:.2f} % of {found.count} {split} images (top 5: {found.top5:.2f} %)")
    if found.mean_depth is not None:
        print(f"  mean depth: {found.mean_depth:.2f} of {len(graph.units)} units")
    for unit, accuracy in zip(graph.units, found.unit_accuracy, strict=False):
        print(f"  {unit.name}: {accuracy:.2f} %")
