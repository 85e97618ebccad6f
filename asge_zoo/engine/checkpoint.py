"""Checkpoints: a folder of safetensors and JSON, with a manifest of sha256 sums written last.

    model.safetensors       weights, heads, projections; each tensor's sha256 in the metadata
    optimizer.safetensors   the optimizer's tensors, as `<parameter>|<name>`
    state.json              how far the run is, optimizer and schedule settings
    metrics.jsonl           a line an epoch, as in the run directory
    spec.json               the resolved spec of this single run
    manifest.json           sha256 of each file above

Order, augmentation and dropout are functions of (seed, epoch, step), so no random state needs saving. Equal states
give equal bytes, times apart (in `state.json` and `metrics.jsonl`).
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, TypeAdapter, ValidationError
from torch import Tensor

from asge_zoo.engine.meter import EpochRecord, MeterSums
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.files import json_bytes, sha256_file, write_folder
from asge_zoo.spec import Spec, describe, load_spec

MODEL, OPTIMIZER, STATE, METRICS, SPEC, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "metrics.jsonl",
    "spec.json",
    "manifest.json",
)
NAME = r"^epoch-(\d{4,})(?:-step-(\d{6,}))?$"
CHECKPOINTS, BEST, LAST = "checkpoints", "best", "last"  # where a run directory keeps them; links to two of them

_RECORD = TypeAdapter(EpochRecord)


def checkpoint_name(epoch: int, step: int) -> str:
    """`epoch-0003` after three epochs, `epoch-0003-step-000012` after twelve steps of the fourth."""
    return f"epoch-{epoch:04d}" + (f"-step-{step:06d}" if step else "")


class Best(BaseModel):
    """The checkpoint with the highest validation accuracy (percent) so far, the first of equals."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(pattern=NAME)
    val_accuracy: float


class SavedState(BaseModel):
    """What `state.json` holds.

    Attributes:
        epoch: epochs done.
        step: steps done of the epoch under way.
        best: None before the first epoch's end.
        meter: of the epoch under way.
        seconds, epoch_seconds: wall time of the run, and of training in the epoch under way.
        optimizer, schedule: `param_groups` and the schedule's state dict, as torch has them.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    epoch: NonNegativeInt
    step: NonNegativeInt
    best: Best | None
    meter: MeterSums
    seconds: NonNegativeFloat
    epoch_seconds: NonNegativeFloat
    optimizer: list[dict[str, Any]]
    schedule: dict[str, Any]


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Tensors as safetensors bytes, with each one's sha256 in the metadata; equal tensors give equal bytes."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: tensor_sha256(tensor) for name, tensor in packed.items()}
    content = safetensors.torch.save(packed, {**metadata, "sha256": json.dumps(sums, sort_keys=True)})
    # the library writes the metadata's keys in random order
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[end:]])


def write_checkpoint(
    folder: Path,
    *,
    spec: Spec,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: SavedState,
    records: Sequence[EpochRecord],
) -> None:
    """Write a checkpoint folder, atomically.

    Args:
        folder: where; must not exist.
        spec: the resolved spec of this single run.
        model: the graph's state dict.
        optimizer: its tensors, as `<parameter>|<name>`.
        state: how far the run is, and all that is no tensor.
        records: of the epochs done.
    """
    metadata = {"format": "pt", "spec_sha256": spec.digest()}
    files = {
        MODEL: pack(model, metadata),
        OPTIMIZER: pack(optimizer, metadata),
        STATE: json_bytes(state.model_dump(mode="json")),
        METRICS: metrics_bytes(records),
        SPEC: json_bytes(spec.resolved()),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_folder(folder, {**files, MANIFEST: json_bytes({"spec_sha256": spec.digest(), "sha256": sums})})


def metrics_bytes(records: Sequence[EpochRecord]) -> bytes:
    """The records as JSON lines."""
    return "".join(f"{json.dumps(asdict(record))}\n" for record in records).encode()


def read_state(folder: Path) -> SavedState:
    """A checkpoint's `state.json`.

    Raises:
        CheckpointError: it is missing or not what it should be, or the checkpoint is not the one its name says.
    """
    try:
        saved = SavedState.model_validate_json(_read(folder / STATE))
    except ValidationError as error:
        raise CheckpointError(f"{folder / STATE}: {describe(error)}") from None
    name = checkpoint_name(saved.epoch, saved.step)
    if os.path.basename(os.path.realpath(folder)) != name:
        raise CheckpointError(f"{folder / STATE}: is that of {name}; give the folder that name back")
    return saved


def read_records(folder: Path) -> list[EpochRecord]:
    """A checkpoint's `metrics.jsonl`.

    Raises:
        CheckpointError: it is missing or not what it should be.
    """
    try:
        return [_RECORD.validate_json(line) for line in _read(folder / METRICS).splitlines()]
    except ValidationError as error:
        raise CheckpointError(f"{folder / METRICS}: {describe(error)}") from None


def _read(file: Path) -> bytes:
    if not file.is_file():  # a pipe would keep its reader waiting
        raise CheckpointError(f"{file}: is missing")
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror})") from None


def check_files(folder: Path, needed: Sequence[str] = (MODEL, SPEC)) -> list[str]:
    """What is wrong with a checkpoint, one line each: its files against its manifest, its spec against its run's.

    Args:
        folder: the checkpoint.
        needed: what its manifest has to list.
    """
    manifest_file = folder / MANIFEST
    try:
        content = manifest_file.read_bytes() if manifest_file.is_file() else b"missing"
        manifest = json.loads(content)
        wanted = {str(name): str(value) for name, value in manifest["sha256"].items()}
        spec_sha256 = manifest["spec_sha256"]
        if json_bytes(manifest) != content:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{manifest_file}: is missing or damaged"]
    problems = [f"{manifest_file}: does not list {name}" for name in needed if name not in wanted]
    for name, wanted_sum in wanted.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            problems.append(f"{file}: is missing")
            continue
        try:
            if sha256_file(file) != wanted_sum:
                problems.append(f"{file}: its sha256 is not the manifest's")
        except OSError as error:
            problems.append(f"{file}: can't be read ({error.strerror})")
    return problems or _check_tensors(folder / MODEL, spec_sha256) or _check_run(folder)


def _check_tensors(file: Path, spec_sha256: str) -> list[str]:
    problems = []
    try:
        with safetensors.safe_open(file, framework="pt") as archive:
            if archive.metadata()["spec_sha256"] != spec_sha256:
                return [f"{file}: belongs to another spec than its manifest's"]
            sums = json.loads(archive.metadata()["sha256"])
            for name in archive.keys():
                tensor = archive.get_tensor(name)
                if tensor_sha256(tensor) != sums.get(name):
                    problems.append(f"{file}: tensor {name} does not have the sha256 of its metadata")
                elif not tensor.isfinite().all():
                    problems.append(f"{file}: tensor {name} holds values that are not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as e:
        return [f"{file}: can't be read as safetensors ({type(e).__name__})"]
    return problems


def _check_run(folder: Path) -> list[str]:
    """Whether a checkpoint that lies in a run directory is that run's, and the one that its name says."""
    folder = Path(os.path.realpath(folder))
    run_spec = folder.parent.parent / SPEC
    if folder.parent.name != CHECKPOINTS:
        return []
    try:
        read_state(folder)
        if not run_spec.exists() or _read(run_spec) == _read(folder / SPEC):  # equal ones need no plugin they name
            return []
        differing = [path for path in load_spec(run_spec).differences(load_spec(folder / SPEC)) if not may_change(path)]
    except (SpecError, CheckpointError) as error:
        return [str(error)]
    return [f"{folder / SPEC}: is of another spec than {run_spec} ({', '.join(differing)})"] if differing else []


def may_change(path: str) -> bool:
    """Whether the field at a JSON path may differ between checkpoints of one run (see `run_dir.check_resumable`)."""
    return path in ("train.epochs", "data.workers") or path.startswith("train.checkpoint.")
