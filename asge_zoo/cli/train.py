"""`asge-zoo train`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from asge_zoo.cli.options import AsJson, DataRoot, Device, Overrides, SpecSource


def train(
    spec: SpecSource,
    overrides: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory to write to; default runs/<name>.")] = None,
    data_root: DataRoot = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a spec's network and test its best checkpoint."""
    from asge_zoo.engine.train import train as train_spec
    from asge_zoo.spec import load_spec

    loaded = load_spec(spec, overrides=overrides or ())
    result = train_spec(loaded, run_dir=run_dir, device=device, data_root_dir=data_root)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    spread = "" if result.std is None else f" ± {result.std:.2f} ({len(result.runs)} runs)"
    print(f"test accuracy {result.test_accuracy:.2f} %{spread}, validation {result.val_accuracy:.2f} %")
    units = " ".join(f"{accuracy:.2f}" for accuracy in result.unit_test_accuracy)
    if units:
        print(f"test accuracy by unit: {units}")
    print(f"{result.epochs} epochs in {result.seconds:.0f} s; run directory: {result.run_dir}")
