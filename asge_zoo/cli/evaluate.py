"""`asge-zoo eval`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("eval")
@click.argument("model")
@options.revision
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="Which images.")
@click.option("--data", help="Other images than the model's own: a dataset's kind, or its JSON object as in a spec.")
@options.data_root
@options.device
@options.as_json
def evaluate(
    model: str,
    revision: str | None,
    split: str,
    data: str | None,
    data_root: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL on its dataset.

    MODEL is a run directory, by its best checkpoint, a checkpoint, a pulled folder, one of `asge-zoo ls models`, or
    user/name on the Hub.
    """
    from asge_zoo.data.base import data_root as find_root
    from asge_zoo.engine.device import pick_device
    from asge_zoo.evaluate import evaluate as measure
    from asge_zoo.hub.models import load_model

    chosen, root = pick_device(device), find_root(data_root)
    loaded = load_model(model, revision=revision, device=chosen, warn=options.warn)
    graph, spec = loaded.graph, loaded.spec
    loader = loaded.dataset(data).loader(root, seed=spec.train.seed, device=chosen)
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
