"""Trained backbones for use elsewhere."""

import json
from pathlib import Path
from typing import Any

from asge_zoo.backbones.timm import Timm
from asge_zoo.compiler.check import parts
from asge_zoo.compiler.nodes import PREFIX
from asge_zoo.engine.checkpoint import pack
from asge_zoo.engine.loading import find_checkpoint, load_checkpoint
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.files import WriteError, write_file


def export_timm(path: str | Path, file: Path) -> dict[str, Any]:
    """Write a trained backbone as timm's own state dict, without a classifier, in safetensors, atomically.

    Args:
        path: a checkpoint folder, or a run directory, whose best one is taken.
        file: what to write; replaced if it is there.

    Returns:
        What `timm.create_model` takes for a model that loads it strictly: `model_name`, `in_chans` and so on. It stands
        in the file's metadata, too, as JSON under `timm`.

    Raises:
        CheckpointError: there is no whole checkpoint, or the file can't be written.
        SpecError: the backbone is not timm's, or part of it has been replaced.
    """
    folder = find_checkpoint(path)
    graph, spec = load_checkpoint(folder)
    part = parts(spec)
    if not isinstance(part.backbone, Timm):
        raise SpecError(f"{folder}: its backbone is '{part.backbone.kind}', and not timm's; export another run")
    if replaced := part.backbone.replaced():
        raise SpecError(
            f"{folder}: {' and '.join(replaced)} of '{part.backbone.name}' are not timm's own here, so timm would "
            f"compute something else; export a run with backbone.{replaced[0]} as timm has it"
        )
    arguments = {
        "model_name": part.backbone.name,
        "in_chans": part.data.info().channels,
        **part.backbone.arguments(),
    }
    tensors = {name.removeprefix(PREFIX): x for name, x in graph.state_dict().items() if name.startswith(PREFIX)}
    metadata = {"format": "pt", "timm": json.dumps(arguments), "spec_sha256": spec.digest()}
    try:
        write_file(file, pack(tensors, metadata))
    except WriteError as error:
        raise CheckpointError(f"{error.filename}: can't be written ({error.strerror}); {error.remedy}") from error
    return arguments
