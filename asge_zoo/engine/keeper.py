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
    Best,
    check_files,
    checkpoint_name,
    read_state,
)
from asge_zoo.engine.loading import newest_first
from asge_zoo.engine.state import TrainState
from asge_zoo.errors import CheckpointError, DivergenceError
from asge_zoo.files import point, remove
from asge_zoo.ranks import Ranks, here
from asge_zoo.spec import Checkpointing


class CheckpointKeeper:
    """Saves a run's checkpoints when they are due, and keeps the newest two and the best as each of these knows it.

    Args:
        folder: the run's; of several ranks, the first one alone writes there.
        policy: when they are due.
        ranks: that train it together, and must call the same methods.
    """

    def __init__(self, folder: Path, policy: Checkpointing, ranks: Ranks | None = None) -> None:
        self.folder, self._policy, self._ranks = folder, policy, ranks or Ranks()
        self._newest: str | None = None
        self._saved_at = time.monotonic()

    def restore(self, state: TrainState, warn: Callable[[str], None]) -> bool:
        """Bring every rank's `state` to where the first one's `_restore` finds the run; False where it finds nothing.

        Raises:
            CheckpointError: there are checkpoints, and none is whole; or this rank does not see the first one's.
        """
        found = self._ranks.first and self._restore(state, warn)
        place = self._ranks.share((state.name, state.best) if found else None)
        if place is not None and not self._ranks.first:
            name, best = place
            if not (self.folder / CHECKPOINTS / name).is_dir():
                raise CheckpointError(
                    f"{self.folder / CHECKPOINTS / name}: is not seen by {here()}; give a --run-dir that all machines "
                    f"share"
                )
            state.restore(self.folder / CHECKPOINTS / name)
            state.best = best
        return place is not None

    def _restore(self, state: TrainState, warn: Callable[[str], None]) -> bool:
        """Bring `state` to the newest checkpoint that is whole, and changes no file; False where there is none at all.

        One whose best is whole, too, comes before newer ones whose best is lost; only if there is none is the best
        chosen anew, among those left.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        found = newest_first(self.folder)
        problems: list[str] = []
        for candidate in found:
            if self._restored(state, candidate, problems, with_best=True):
                if problems:
                    warn(f"{'; '.join(problems)}; falls back to {candidate}")
                return True
        for candidate in found:
            if self._restored(state, candidate, [], with_best=False):
                state.best = self._best_left(state)
                best = state.best.name if state.best else "the next to come"
                warn(
                    f"{'; '.join(problems)}; goes on from {candidate}, and takes {best} for the best: the run may end "
                    f"with another best checkpoint than an unbroken one"
                )
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
        if self._policy.every_minutes is None:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return self._ranks.max(minutes >= self._policy.every_minutes) > 0  # their clocks differ

    def save(self, state: TrainState) -> None:
        """Save a checkpoint, then drop those that are no longer needed; every rank must call it.

        Raises:
            DivergenceError: what would be saved is not finite.
        """
        if state.name == self._newest:
            return
        state.check_finite()
        if self._ranks.first:
            folder = self.folder / CHECKPOINTS / state.name
            if os.path.lexists(folder):  # one that was damaged, so that training went back behind it
                remove(folder)
            state.save(folder)
        self.keep(state, newer=False)
        self._saved_at = time.monotonic()

    def keep(self, state: TrainState, *, newer: bool) -> None:
        """Make `state`'s checkpoint the last, and drop all but it, the one before it and the best that each knows.

        Args:
            state: saved or restored just now.
            newer: whether to keep newer ones: damaged, and worth a look until training has gone on from before them.
        """
        self._newest = state.name
        if not self._ranks.first:
            return
        checkpoints = self.folder / CHECKPOINTS
        point(self.folder / LAST, checkpoints / state.name)
        if state.best:
            point(self.folder / BEST, checkpoints / state.best.name)
        elif os.path.lexists(self.folder / BEST):  # went back to before it
            remove(self.folder / BEST)
        found = newest_first(self.folder)
        here = [path.name for path in found].index(state.name)
        kept = {path.name for path in found[here : here + 2]} | ({state.best.name} if state.best else set())
        for path in found[here : here + 2]:
            with contextlib.suppress(CheckpointError):  # a damaged one knows none
                best = read_state(path).best
                kept |= {best.name} if best else set()
        for path in found[here if newer else 0 :]:
            if path.name not in kept:
                remove(path)

    @contextlib.contextmanager
    def naming_last_good(self) -> Iterator[None]:
        """A DivergenceError within comes to name the last good checkpoint and what to do."""
        try:
            yield
        except DivergenceError as error:
            good = self.folder / CHECKPOINTS / self._newest if self._newest else "none, it was too early for one"
            raise DivergenceError(f"{error}; lower optimizer.lr (the last good checkpoint: {good})") from None

    def _restored(self, state: TrainState, candidate: Path, problems: list[str], *, with_best: bool) -> bool:
        """Whether a checkpoint, and the best that it knows if that is asked for, is whole; `state` is then there."""
        try:
            wrong = check_files(candidate, (MODEL, OPTIMIZER, STATE, METRICS, SPEC))
            best = None if wrong else read_state(candidate).best
            if with_best and best is not None and best.name != candidate.name:
                wrong = check_files(candidate.parent / best.name) or state.misfits(candidate.parent / best.name)
            if not wrong:
                state.restore(candidate)
        except CheckpointError as error:
            wrong = [str(error)]
        problems += [problem for problem in wrong[:1] if problem not in problems]
        return not wrong

    def _best_left(self, state: TrainState) -> Best | None:
        """The best of the epochs whose checkpoints are still whole; None if there are none."""
        left = []
        for record in state.records:
            folder = self.folder / CHECKPOINTS / checkpoint_name(record.epoch, 0)
            if not (check_files(folder) or state.misfits(folder)):
                left.append(Best(name=folder.name, val_accuracy=record.validation.accuracy))
        return max(left, key=lambda best: best.val_accuracy, default=None)
