"""What ends a run before its time: SIGINT, SIGTERM, SIGHUP, SIGUSR1 (SLURM's, ahead of its limit), a time limit.

The first one waits until nothing is half done; a second one does not.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from asge_zoo.errors import Stopped
from asge_zoo.ranks import Ranks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SLURM_END, SLURM_MARGIN = "SLURM_JOB_END_TIME", 120.0  # when SLURM ends the job, in Unix time; seconds to end before
Item = TypeVar("Item")


class StopRequested(Exception):
    """A signal waits, or the time is up, and nothing is half done: save and stop."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"stopped by {received.name}")
        self.signal = received


class StopSignals:
    """Takes the signals while it is open, as a context manager; in another thread than the main one, none.

    A signal raises `Stopped` at once; within `deferred`, the first one waits for `check`.

    Args:
        ranks: who stop together, once one of them is to. What starts and ends ranks may send each signal twice: with
            several, only the first one counts.
        time_limit: seconds from now after which to stop as if by SIGUSR1; None for two minutes before the end that
            SLURM has set, if it has.
    """

    def __init__(self, ranks: Ranks | None = None, time_limit: float | None = None) -> None:
        self.received: signal.Signals | None = None
        self._ranks = ranks or Ranks()
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}
        if time_limit is None and os.environ.get(SLURM_END, "").isdigit():
            time_limit = int(os.environ[SLURM_END]) - time.time() - SLURM_MARGIN
        self._deadline = None if time_limit is None else time.monotonic() + time_limit

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # also where a shell's `&` has them ignored: who sends one means it, and nothing is lost by it
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if self._ranks.several and self.received is not None and isinstance(error, RuntimeError):
            # what speaks to other ranks has failed, and the launcher is ending this one: it has nothing to add
            raise SystemExit(128 + self.received) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ranks.several and not self._deferred and number == signal.SIGTERM:
            raise SystemExit(128 + number)  # another rank is gone, or the launcher is told to end: it has the word
        if not self._deferred or (self.received is not None and not self._ranks.several):
            raise Stopped(signal.Signals(number))
        self.received = self.received or signal.Signals(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """The first signal within waits for `check`, or for the end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.received is not None:
            raise Stopped(self.received)

    def check(self) -> None:
        """Call where nothing is half done, on every rank.

        Raises:
            StopRequested: a signal waits, on this rank or another, or the time is up.
        """
        if number := self._ranks.max(int(self._waiting() or 0)):
            raise StopRequested(signal.Signals(number))

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with a `check` before each; of several ranks, those that have none left go on checking."""
        left = iter(items)
        item = next(left, None)
        while self._ranks.max(int(item is not None)):
            self.check()
            if item is not None:
                yield item
            item = next(left, None)

    def _waiting(self) -> signal.Signals | None:
        if self.received is None and self._deadline is not None and time.monotonic() > self._deadline:
            return signal.SIGUSR1
        return self.received
