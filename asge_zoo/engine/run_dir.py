"""The run directory: its layout, and which checkpoints it keeps."""

import shutil
from pathlib import Path
from typing import Any

import torch

from asge_zoo.engine.checkpoint import BEST, CHECKPOINTS, LAST, SPEC, save_checkpoint
from asge_zoo.engine.device import environment
from asge_zoo.engine.files import json_bytes, point, write_file
from asge_zoo.errors import CheckpointError
from asge_zoo.spec import Spec

ENVIRONMENT, METRICS, RESULT = "environment.json", "metrics.jsonl", "result.json"


def new_run_dir(spec: Spec, given: str | Path | None) -> Path:
    """The directory to write to: as given, or `runs/<name>`, numbered if that is taken. Creates nothing.

    Raises:
        CheckpointError: the given one exists and is not empty, or is no directory.
    """
    if given is not None:
        folder = Path(given)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder}: exists already and is not empty; give another --run-dir, or remove it")
        return folder
    folder, number = Path("runs") / spec.name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{spec.name}-{number}", number + 1
    return folder


def start_run_dir(folder: Path, spec: Spec, device: torch.device) -> None:
    """Create the directory, with the resolved spec and what it runs on.

    Raises:
        CheckpointError: it can't be written to.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True)
        write_file(folder / SPEC, json_bytes(spec.resolved()))
        write_file(folder / ENVIRONMENT, json_bytes(environment(device)))
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be written to ({error.strerror}); give another --run-dir") from error


def keep_checkpoint(folder: Path, improved: bool, *, progress: dict[str, Any], **state: Any) -> None:
    """Save a checkpoint as `last`, and as `best` if it improved; drop those that are neither.

    Args:
        folder: the run directory.
        improved: whether it is the best so far.
        progress: how far the run is; `epoch` names the checkpoint.
        **state: see `save_checkpoint`.
    """
    new = folder / CHECKPOINTS / f"epoch-{progress['epoch']:04d}"
    save_checkpoint(new, progress=progress, **state)
    point(folder / LAST, new)
    if improved:
        point(folder / BEST, new)
    kept = {(folder / name).resolve() for name in (BEST, LAST)}
    for old in (folder / CHECKPOINTS).iterdir():
        if old.resolve() not in kept:
            shutil.rmtree(old)
