"""`asge-zoo export`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("export")
@click.argument("run", type=options.PATH)
@click.option("--timm", "file", type=options.PATH, required=True, help="The safetensors file to write, for timm.")
@options.as_json
def export(run: Path, file: Path, as_json: bool) -> None:
    """Write the trained backbone of RUN (a run directory, by its best checkpoint, or a checkpoint folder) to a file.

    timm loads it strictly into its own model without a classifier: a feature extractor.
    """
    from asge_zoo.export import export_timm

    arguments = export_timm(run, file)
    if as_json:
        print(json.dumps({"file": str(file), "create_model": arguments}))
        return
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    print(f"{file}: written; model = timm.create_model({call})")
    print(f"model.load_state_dict(safetensors.torch.load_file({str(file)!r}), strict=True)")
