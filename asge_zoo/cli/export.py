"""`asge-zoo export`."""

import json
from pathlib import Path

import click

from asge_zoo.cli import options


@click.command("export")
@click.argument("run", type=options.PATH)
@click.option("--timm", "file", type=options.PATH, help="The safetensors file to write, for timm.")
@click.option("--model", "folder", type=options.PATH, help="The folder to write, with what `push` would publish.")
@options.data_root
@options.device
@options.as_json
def export(
    run: Path, file: Path | None, folder: Path | None, data_root: Path | None, device: str | None, as_json: bool
) -> None:
    """Write what RUN (a run directory, by its best checkpoint) learned to a file or a folder, for use elsewhere.

    --timm: its backbone, which timm loads strictly into its own model without a classifier, a feature extractor.
    --model: all of it, measured on the test images, for `predict`, `eval` and asge_zoo.load.
    """
    if (file is None) == (folder is None):
        raise click.UsageError("write one of --timm FILE and --model FOLDER")
    if folder is not None:
        from asge_zoo.hub.prepare import export_model

        export_model(run, folder, device=device, data_root=data_root)
        print(json.dumps({"folder": str(folder)}) if as_json else f"{folder}: written")
        return
    from asge_zoo.export import export_timm

    assert file is not None
    arguments = export_timm(run, file)
    if as_json:
        print(json.dumps({"file": str(file), "create_model": arguments}))
        return
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    print(f"{file}: written; model = timm.create_model({call})")
    print(f"model.load_state_dict(safetensors.torch.load_file({str(file)!r}), strict=True)")
