"""Runs side by side, read from their files alone: neither a network nor a plugin is needed."""

import json
from pathlib import Path
from typing import Any

from asge_zoo.engine.checkpoint import SPEC, read_records
from asge_zoo.engine.run_dir import RESULT
from asge_zoo.errors import CheckpointError


def summarize(run_dir: Path) -> dict[str, Any]:
    """A run of one seed, or what there is of it: what it was, and what it came to at its best epoch.

    Returns:
        `run_dir`, `name`, `plugins` (see `Spec.plugins`), the spec's `backbone`, `rule` and `prediction` as JSON
        values, `epochs` done, `best_epoch`, and accuracies in percent: `validation_accuracy`, `unit_accuracy` (on the
        validation images), `test_accuracy` and `unit_test_accuracy` (None until the run is tested).

    Raises:
        CheckpointError: it is no run directory, no epoch is done, or a file is damaged.
    """
    spec = _json(run_dir / SPEC)
    records = read_records(run_dir)
    if not records:
        raise CheckpointError(f"{run_dir}: no epoch is done yet; go on with `asge-zoo train --resume`")
    best = max(records, key=lambda record: record.validation.accuracy)
    result = _json(run_dir / RESULT) if (run_dir / RESULT).exists() else {}
    return {
        "run_dir": str(run_dir),
        "name": spec.get("name"),
        "plugins": spec.get("plugins", []),
        **{field: spec.get(field) for field in ("backbone", "rule", "prediction")},
        "epochs": len(records),
        "best_epoch": best.epoch,
        "validation_accuracy": best.validation.accuracy,
        "unit_accuracy": best.validation.unit_accuracy,
        "test_accuracy": result.get("test_accuracy"),
        "unit_test_accuracy": result.get("unit_test_accuracy"),
    }


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise CheckpointError(f"{file}: is missing; name a run directory of one seed")
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: is damaged; restore it, or name another run")
    return value
