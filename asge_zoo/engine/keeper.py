"""Which checkpoints a run saves and keeps, and which it goes back to."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from asge_zoo.engine.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    METRICS,
    MODEL,
    OPTIMIZER,
    SPEC,
    STATE,
    check_files,
    read_state,
)
from asge_zoo.engine.files import point, remove
from asge_zoo.engine.loading import newest_first
from asge_zoo.engine.state import TrainState
from asge_zoo.errors import CheckpointError, DivergenceError
from asge_zoo.spec import Checkpointing


class CheckpointKeeper:
    """Saves a run's checkpoints when they are due, and keeps the newest two and the best as each of these knows it."""

    def __init__(self, folder: Path, policy: Checkpointing) -> None:
        self.folder, self._policy = folder, policy
        self._newest: str | None = None
        self._saved_at = time.monotonic()

    def restore(self, state: TrainState, warn: Callable[[str], None]) -> bool:
        """Bring `state` to the newest checkpoint that is whole, as is its best; False where there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        problems: list[str] = []
        for candidate in newest_first(self.folder):
            try:
                self._check(candidate)
                state.restore(candidate)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                warn(f"{'; '.join(problems)}; falls back to {candidate}")
            self._point(state)
            self._drop_old(state, newer=False)
            return True
        if problems:
            raise CheckpointError(
                f"{problems[0]}; no whole checkpoint is left: put one back, or remove {self.folder / CHECKPOINTS} to "
                f"start over"
            )
        return False

    def due(self, state: TrainState, *, improved: bool = False) -> bool:
        """Whether to save now: after a step, or after an epoch, which may be the best so far."""
        if state.step == state.steps_per_epoch:
            return False  # once it is validated
        if state.step == 0 and (improved or state.finished or state.epoch % self._policy.every_epochs == 0):
            return True
        if self._policy.every_steps and state.total_steps % self._policy.every_steps == 0:
            return True
        minutes = (time.monotonic() - self._saved_at) / 60
        return self._policy.every_minutes is not None and minutes >= self._policy.every_minutes

    def save(self, state: TrainState) -> None:
        """Save a checkpoint, then drop those that are no longer needed.

        Raises:
            DivergenceError: what would be saved is not finite.
        """
        if state.name == self._newest or state.total_steps == 0:
            return
        self.check_finite(state)
        folder = self.folder / CHECKPOINTS / state.name
        if os.path.lexists(folder):  # one that was damaged, so that training went back behind it
            remove(folder)
        state.save(folder)
        self._point(state)
        self._drop_old(state, newer=True)
        self._saved_at = time.monotonic()

    def check_losses(self, state: TrainState) -> None:
        """Refuse to go on from losses that are not finite; raises as `check_finite` does."""
        with self._naming_last_good():
            state.check_losses()

    def check_finite(self, state: TrainState) -> None:
        """Refuse to go on once losses or weights are not finite.

        Raises:
            DivergenceError: names the unit, the step and the last good checkpoint.
        """
        with self._naming_last_good():
            state.check_finite()

    @contextlib.contextmanager
    def _naming_last_good(self) -> Iterator[None]:
        try:
            yield
        except DivergenceError as error:
            good = self.folder / CHECKPOINTS / self._newest if self._newest else "none, it was too early for one"
            raise DivergenceError(f"{error}; lower optimizer.lr (the last good checkpoint: {good})") from None

    def _check(self, candidate: Path) -> None:
        """Raise CheckpointError if a checkpoint or the best one it knows is damaged."""
        problems = check_files(candidate, (MODEL, OPTIMIZER, STATE, METRICS, SPEC))
        best = None if problems else read_state(candidate).best
        if best is not None and best.name != candidate.name:
            problems = check_files(candidate.parent / best.name)
        if problems:
            raise CheckpointError(problems[0])

    def _point(self, state: TrainState) -> None:
        """`state`'s checkpoint is the newest now."""
        self._newest = state.name
        checkpoints = self.folder / CHECKPOINTS
        point(self.folder / LAST, checkpoints / state.name)
        if state.best:
            point(self.folder / BEST, checkpoints / state.best.name)

    def _drop_old(self, state: TrainState, *, newer: bool) -> None:
        """Drop all but the newest two up to `state`'s, and the best that each of them knows.

        Args:
            state: saved or restored just now.
            newer: whether to drop newer ones as well: damaged ones, once training has gone on from before them.
        """
        found = newest_first(self.folder)
        here = [path.name for path in found].index(state.name)
        kept = {path.name for path in found[here : here + 2]}
        for path in found[here : here + 2]:
            with contextlib.suppress(CheckpointError):  # a damaged one knows none
                best = read_state(path).best
                kept |= {best.name} if best else set()
        for path in found[0 if newer else here :]:
            if path.name not in kept:
                remove(path)
