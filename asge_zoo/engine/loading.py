"""Checkpoints found and loaded."""

import contextlib
import os
import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.engine.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    MANIFEST,
    MODEL,
    NAME,
    SPEC,
    STATE,
    check_files,
    read_state,
)
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import Spec, load_spec


def newest_first(run_dir: Path) -> list[Path]:
    """A run directory's checkpoints, whole or not, by their names."""
    kept = run_dir / CHECKPOINTS
    named = ((re.match(NAME, path.name), path) for path in (kept.iterdir() if kept.is_dir() else ()))
    places = {path: (int(match[1]), int(match[2] or 0)) for match, path in named if match}
    return sorted(places, key=places.__getitem__, reverse=True)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or a run directory's best, as its newest has it.

    Raises:
        CheckpointError: it is neither, or the newest is damaged, or there is no best one yet.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = newest_first(path)
    if found:
        problems = check_files(found[0], (MODEL, SPEC, STATE))
        if problems:
            older = "go on from the one before by `asge-zoo train --resume`, or name" if found[1:] else "take"
            raise CheckpointError(f"{problems[0]}; {older} another checkpoint")
        best = read_state(found[0]).best
        if best is None:
            raise CheckpointError(
                f"{path}: no epoch is done yet, so there is no best checkpoint; go on with `asge-zoo train --resume`, "
                f"or name {found[0]}"
            )
        known, chosen = path / CHECKPOINTS / best.name, Path(os.path.realpath(path / BEST))
        if chosen != Path(os.path.realpath(known)) and chosen.is_dir() and check_files(known):
            return chosen  # by `--resume`, which found the other one lost
        return known
    if (path / SPEC).is_file() and (path / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{path}: holds no checkpoint yet; go on with `asge-zoo train --resume`")
    seeds = sorted(child.name for child in path.glob("seed-*"))
    if seeds:
        raise CheckpointError(f"{path}: holds several runs; name one of {', '.join(seeds)}, such as {path / seeds[0]}")
    what = "no such file or folder" if not path.exists() else "neither a checkpoint nor a run directory"
    raise CheckpointError(f"{path}: {what}; give a run directory, or a checkpoint folder with a {MANIFEST}")


def all_checkpoints(path: str | Path) -> list[Path]:
    """Every checkpoint folder that a path holds: itself, or all of a run directory's, of every seed.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return [path]
    found = {
        Path(os.path.realpath(folder))  # resolve() raises on links that go round
        for run in (path, *path.glob("seed-*"))
        for folder in (*newest_first(run), *_referred_to(run))
    }
    return sorted(found) or [find_checkpoint(path)]


def verify(path: str | Path) -> dict[Path, list[str]]:
    """What is wrong with each checkpoint folder that a path holds, one line each.

    Raises:
        CheckpointError: there is none.
    """
    found = {folder: check_files(folder) for folder in all_checkpoints(path)}
    if any(found.values()):
        here = all_checkpoints(path)  # a run under way drops old ones meanwhile
        return {folder: problems for folder, problems in found.items() if folder in here}
    return found


def _referred_to(run_dir: Path) -> list[Path]:
    """What a run's links and its newest checkpoint refer to, there or not."""
    found = [link for link in (run_dir / BEST, run_dir / LAST) if link.is_symlink()]
    for newest in newest_first(run_dir)[:1]:
        with contextlib.suppress(CheckpointError):  # a damaged one is found as such
            best = read_state(newest).best
            found += [run_dir / CHECKPOINTS / best.name] if best else []
    return found


def load_checkpoint(folder: Path, *, device: str | torch.device = "cpu") -> tuple[LocalGraph, Spec]:
    """A checkpoint's graph, in evaluation mode, and the spec it was trained by; its sums are checked first.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit its spec.
    """
    problems = check_files(folder)
    if problems:
        raise CheckpointError(f"{problems[0]}; take another checkpoint, or train again")
    try:
        spec = load_spec(folder / SPEC)
    except SpecError as error:
        raise CheckpointError(str(error)) from error
    try:
        graph = compile_spec(spec, device=device)
        graph.load_state_dict(safetensors.torch.load_file(folder / MODEL))
    except (SpecError, RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: does not fit its own spec ({' '.join(str(error).split())})") from error
    return graph.eval(), spec
