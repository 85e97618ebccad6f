"""`asge-zoo train`."""

import json
import sys
from pathlib import Path

import click

from asge_zoo.cli import options
from asge_zoo.errors import Stopped


@click.command("train")
@options.spec_argument
@options.overrides
@click.option(
    "--run-dir", type=options.PATH, help="A new directory to write to, or one to resume; default runs/<name>."
)
@click.option("--resume", is_flag=True, help="Go on from the run directory's newest whole checkpoint.")
@options.data_root
@options.device
@options.as_json
def train(
    spec: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    data_root: Path | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Train SPEC (a JSON file, or the name of a shipped spec) and test its best checkpoint."""
    from asge_zoo.engine.train import train as train_spec
    from asge_zoo.spec import load_spec

    loaded = load_spec(spec, overrides=overrides)
    try:
        result = train_spec(loaded, run_dir=run_dir, resume=resume, device=device, data_root=data_root)
    except Stopped as stopped:  # click would put an empty line before what a KeyboardInterrupt says
        print(f"asge-zoo: {stopped}", file=sys.stderr)
        return stopped.exit_code
    if as_json:
        print(json.dumps(result.to_json()))
        return 0
    spread = "" if result.std is None else f" ± {result.std:.2f} ({len(result.runs)} runs)"
    print(f"test accuracy {result.test_accuracy:.2f} %{spread}, validation {result.val_accuracy:.2f} %")
    units = " ".join(f"{accuracy:.2f}" for accuracy in result.unit_test_accuracy)
    if units:
        print(f"test accuracy by unit: {units}")
    print(f"{result.epochs} epochs in {result.seconds:.0f} s; run directory: {result.run_dir}")
    return 0
