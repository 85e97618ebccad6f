"""The run directory: its layout, which spec it is for, and which checkpoints it keeps."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asge_zoo.compiler.check import parts
from asge_zoo.engine.checkpoint import (
    CHECKPOINTS,
    METRICS,
    SPEC,
    may_change,
    metrics_bytes,
)
from asge_zoo.engine.files import TEMPORARY, json_bytes, sweep, write_file
from asge_zoo.engine.loading import newest_first
from asge_zoo.engine.lock import LOCK
from asge_zoo.engine.state import TrainState
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.spec import Spec, load_spec

ENVIRONMENT, RESULT = "environment.json", "result.json"
PER_START = ("command", "host", "platform")  # may differ and change no result


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
        rivals = sorted(
            path for path in first.parent.glob(f"{spec.name}-*") if path.name[len(spec.name) + 1 :].isdigit()
        )
        if rivals:
            raise CheckpointError(f"--resume: {first} or {', '.join(map(str, rivals))}? say which with --run-dir")
        return first
    folder, number = first, 2
    while folder.exists():
        folder, number = Path("runs") / f"{spec.name}-{number}", number + 1
    return folder


def check_unused(folder: Path) -> None:
    """Refuse a directory with more in it than a process killed before its first file leaves.

    Raises:
        CheckpointError: there is something in it.
    """
    if not all(path.name == LOCK or path.name.startswith(TEMPORARY) for path in folder.iterdir()):
        raise CheckpointError(
            f"{folder}: exists already and is not empty; go on with it by --resume, or give another --run-dir"
        )


def resume_command(folder: Path) -> str:
    """What to type to go on with a run."""
    return f"asge-zoo train {shlex.quote(str(folder / SPEC))} --run-dir {shlex.quote(str(folder))} --resume"


def check_spec_of(folder: Path, spec: Spec) -> None:
    """Refuse a spec other than the one that a run directory was begun by, if it was.

    `train.checkpoint` may change, and `train.epochs` may grow where the schedule's rates do not depend on it.

    Raises:
        SpecError: names the fields that differ.
        CheckpointError: the directory holds checkpoints and has lost its spec.
    """
    if not (folder / SPEC).exists():
        if newest_first(folder):
            raise CheckpointError(f"{folder / SPEC}: is missing; put it back: each of its checkpoints holds a copy")
        return
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
            f"--run-dir (train.checkpoint may change, and train.epochs may grow with an extendable schedule)"
        )


def start_run_dir(
    folder: Path, spec: Spec, environment: dict[str, Any], state: TrainState, warn: Callable[[str], None]
) -> None:
    """Bring a run directory to where `state` stands: its spec, what it runs on, its metrics; no leftovers.

    Args:
        folder: locked, and perhaps not yet begun.
        spec: of this run, as `check_spec_of` let it pass.
        environment: what this process runs on; kept beside those of the starts before.
        state: as begun or restored.
        warn: told what has changed since the first start.

    Raises:
        CheckpointError: the environment of the starts before can't be read.
    """
    (folder / CHECKPOINTS).mkdir(exist_ok=True)
    sweep(folder / CHECKPOINTS)
    write_spec(folder, spec)
    write_file(folder / ENVIRONMENT, json_bytes(_with_starts_before(folder, environment, state, warn)))
    if state.records or (folder / METRICS).exists():
        write_file(folder / METRICS, metrics_bytes(state.records))


def write_spec(folder: Path, spec: Spec) -> None:
    """Write a run directory's spec, where it is not the one that stands there, and sweep leftovers away."""
    sweep(folder)
    content = json_bytes(spec.resolved())
    if not (folder / SPEC).exists() or (folder / SPEC).read_bytes() != content:
        write_file(folder / SPEC, content)


def _with_starts_before(
    folder: Path, environment: dict[str, Any], state: TrainState, warn: Callable[[str], None]
) -> dict[str, Any]:
    file = folder / ENVIRONMENT
    if not file.exists():
        return environment
    try:
        first = json.loads(file.read_bytes())
        starts = [*first.get("resumed", ()), {"epoch": state.epoch, "step": state.step, **environment}]
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{file}: is damaged; remove it to go on without it") from None
    changed = [key for key in environment if key not in PER_START and first.get(key) != environment[key]]
    if changed:
        warn(
            f"{folder}: goes on with other {', '.join(changed)} than it began with ({file} has both); the last digits "
            f"may differ from those of an unbroken run"
        )
    return {**first, "resumed": starts}
