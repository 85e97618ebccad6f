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
@click.option("--nproc", type=click.IntRange(min=1), help="Ranks to train on, on this machine; default 1.")
@click.option(
    "--time-limit", type=click.FloatRange(min=0), metavar="MINUTES", help="Save and stop then; default SLURM's, less 2."
)
@options.data_root
@options.device
@options.as_json
def train(
    spec: str,
    overrides: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    nproc: int | None,
    time_limit: float | None,
    data_root: Path | None,
    device: str | None,
    as_json: bool,
) -> int:
    """Train SPEC (a JSON file, or the name of a shipped spec) and test its best checkpoint."""
    from asge_zoo.engine.parallel import launch, one_voice
    from asge_zoo.ranks import is_first
    from asge_zoo.spec import load_spec

    if nproc is not None and nproc > 1:
        load_spec(spec, overrides=overrides)  # what is wrong with it is said once, and at once
        given = {"--run-dir": run_dir, "--time-limit": time_limit, "--data-root": data_root, "--device": device}
        options = [part for name, value in given.items() if value is not None for part in (name, str(value))]
        sets = [part for override in overrides for part in ("--set", override)]
        flags = ["--resume"] * resume + ["--json"] * as_json
        return launch(nproc, ["train", spec, *sets, *options, *flags], device)
    from asge_zoo.engine.train import train as train_spec  # which a launcher does not need

    try:
        with one_voice():
            loaded = load_spec(spec, overrides=overrides)
            result = train_spec(
                loaded, run_dir=run_dir, resume=resume, device=device, data_root=data_root, time_limit=time_limit
            )
    except Stopped as stopped:  # click would put an empty line before what a KeyboardInterrupt says
        if is_first():
            print(f"asge-zoo: {stopped}", file=sys.stderr)
        return stopped.exit_code
    if not is_first():
        return 0
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
