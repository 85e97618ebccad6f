"""The run directory: where it is, which spec it is for, and what lies in it beside the checkpoints."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asge_zoo.compiler.check import parts
from asge_zoo.engine.checkpoint import CHECKPOINTS, METRICS, SPEC, may_change, metrics_bytes
from asge_zoo.engine.loading import newest_first
from asge_zoo.engine.lock import LOCK
from asge_zoo.engine.state import TrainState
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.files import TEMPORARY, json_bytes, make_folder, remove, sweep, write_file
from asge_zoo.ranks import local_world_size, world_size
from asge_zoo.spec import Spec, load_spec

ENVIRONMENT, RESULT, CURVES, UNITS = "environment.json", "result.json", "curves.png", "units.png"
STOPPED = "stopped"  # there while a run waits to be gone on with: the signal that stopped it
PER_START = ("command", "host", "platform", "data_root", "job")  # may differ and change no result


def choose_run_dir(spec: Spec, given: str | Path | None, *, resume: bool) -> Path:
    """The directory to write to: as given, or `runs/<name>`, numbered if that is taken. Creates nothing.

    Raises:
        CheckpointError: the given one exists and is not empty, or is no directory; or it is not clear which to resume.
    """
    if given is not None:
        folder = Path(given)
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder}: is no directory; give another --run-dir")
        if folder.exists() and not resume:
            check_unused(folder)
        return folder
    first = Path("runs") / spec.name
    if resume:
        numbered = (path for path in first.parent.glob(f"{spec.name}-*") if path.name[len(spec.name) + 1 :].isdigit())
        begun = [path for path in (first, *sorted(numbered)) if path.exists()] or [first]
        if len(begun) > 1:
            raise CheckpointError(f"--resume: {' or '.join(map(str, begun))}? say which with --run-dir")
        return begun[0]
    folder, number = first, 2
    while folder.exists():
        folder, number = Path("runs") / f"{spec.name}-{number}", number + 1
    return folder


def check_unused(folder: Path) -> None:
    """Refuse a directory with more in it than a process killed before its first file leaves.

    Raises:
        CheckpointError: there is something in it.
    """
    if not _is_unused(folder):
        what = "go on with it by --resume, or" if (folder / SPEC).exists() else "it holds no run to go on with:"
        raise CheckpointError(f"{folder}: exists already and is not empty; {what} give another --run-dir")


def _is_unused(folder: Path) -> bool:
    return all(
        path.name in (LOCK, TEMPORARY + SPEC) or (path.match("seed-*") and path.is_dir() and _is_unused(path))
        for path in folder.iterdir()
    )


def resume_command(folder: Path, device: str | None = None, data_root: str | Path | None = None) -> str:
    """What to type to go on with a run, with the device and data root that were asked for, on as many ranks."""
    line = ["asge-zoo", "train", folder / SPEC, "--run-dir", folder, "--resume"]
    line += [] if device is None else ["--device", device]
    line += [] if data_root is None else ["--data-root", data_root]
    if world_size() > local_world_size():
        return f"the same torchrun command and --resume, or {shlex.join(map(str, line))}"
    line += ["--nproc", local_world_size()] if local_world_size() > 1 else []
    return shlex.join(map(str, line))


def check_resumable(folder: Path, spec: Spec) -> None:
    """Refuse what a run can't go on from: another spec than it was begun by, a directory that is no run.

    `train.checkpoint` and `data.workers` may change, and `train.epochs` may grow where the schedule's rates do not
    depend on it.

    Raises:
        SpecError: names the fields that differ.
        CheckpointError: the directory holds checkpoints and has lost its spec, or something that is no run, or the
            environment of the starts before can't be read.
    """
    if not (folder / SPEC).exists():
        if newest_first(folder):
            raise CheckpointError(f"{folder / SPEC}: is missing; put it back: each of its checkpoints holds a copy")
        check_unused(folder)
        return
    _first_start(folder)
    begun = load_spec(folder / SPEC)
    differing = {path: values for path, values in begun.differences(spec).items() if not may_change(path)}
    if spec.train.epochs != begun.train.epochs:
        schedule = parts(begun).schedule
        if not schedule.extendable:
            differing[f"train.epochs, which the {schedule.kind} schedule depends on,"] = (
                begun.train.epochs,
                spec.train.epochs,
            )
        elif spec.train.epochs < begun.train.epochs:
            differing["train.epochs, which may only grow,"] = (begun.train.epochs, spec.train.epochs)
    if differing:
        fields = "; ".join(
            f"{path} was {json.dumps(was)} and is now {json.dumps(now)}" for path, (was, now) in differing.items()
        )
        raise SpecError(
            f"{folder}: was begun by another spec: {fields}. Go on with `{resume_command(folder)}`, or give another "
            f"--run-dir (train.checkpoint and data.workers may change, and train.epochs may grow with an extendable "
            f"schedule)"
        )


def start_run_dir(
    folder: Path, spec: Spec, environment: dict[str, Any], state: TrainState, warn: Callable[[str], None]
) -> None:
    """Bring a run directory to where `state` stands: its spec, what it runs on, its metrics; no leftovers.

    Args:
        folder: locked, and perhaps not yet begun.
        spec: of this run, as `check_resumable` let it pass.
        environment: what this process runs on; kept beside those of the starts before.
        state: as begun or restored.
        warn: told what has changed since the first start.
    """
    first = _first_start(folder)
    if first:
        changed = [key for key in environment if key not in PER_START and first.get(key) != environment[key]]
        if changed:
            warn(
                f"{folder}: goes on with other {', '.join(changed)} than it began with ({folder / ENVIRONMENT} has "
                f"both); the last digits may differ from those of an unbroken run"
            )
        this = {"epoch": state.epoch, "step": state.step, **environment}
        environment = {**first, "resumed": [*first.get("resumed", []), this]}
    write_spec(folder, spec)
    if (folder / STOPPED).exists():
        remove(folder / STOPPED)
    make_folder(folder / CHECKPOINTS)
    sweep(folder / CHECKPOINTS)
    write_file(folder / ENVIRONMENT, json_bytes(environment))
    if state.records or (folder / METRICS).exists():
        write_file(folder / METRICS, metrics_bytes(state.records))


def write_spec(folder: Path, spec: Spec) -> None:
    """Write a run directory's spec, where it is not the one that stands there, and sweep leftovers away.

    What came of the run by another spec (fewer epochs, that is) goes with it.
    """
    sweep(folder)
    content = json_bytes(spec.resolved())
    if not (folder / SPEC).exists() or (folder / SPEC).read_bytes() != content:
        for name in (RESULT, CURVES, UNITS):
            if (folder / name).exists():
                remove(folder / name)
        write_file(folder / SPEC, content)


def job_of(folder: Path) -> str | None:
    """The torchrun job that last went on with a run; None for none.

    Raises:
        CheckpointError: `environment.json` is damaged.
    """
    first = _first_start(folder) or {}
    return [first, *first.get("resumed", [])][-1].get("job")


def _first_start(folder: Path) -> dict[str, Any] | None:
    """What a run began on, and under `resumed` what it went on on since; None before its first start."""
    file = folder / ENVIRONMENT
    if not os.path.lexists(file):
        return None
    try:
        first = json.loads(file.read_bytes() if file.is_file() else b"")  # a pipe would keep its reader waiting
        if isinstance(first, dict) and isinstance(first.get("resumed", []), list):
            return first
    except (OSError, ValueError, RecursionError):
        pass
    raise CheckpointError(f"{file}: is damaged; remove it to go on without it")
