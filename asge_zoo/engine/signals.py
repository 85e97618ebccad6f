"""SIGINT and SIGTERM: the first one waits until nothing is half done, the second one does not."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from asge_zoo.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Item = TypeVar("Item")


class StopRequested(Exception):
    """A signal waits, and nothing is half done: save and stop."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"stopped by {received.name}")
        self.signal = received


class StopSignals:
    """Takes SIGINT and SIGTERM while it is open, as a context manager; in another thread than the main one, none.

    A signal raises `Stopped` at once; within `deferred`, the first one waits for `check`.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # also where a shell's `&` has them ignored: who sends one means it, and nothing is lost by it
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self.received is not None:
            raise Stopped(signal.Signals(number))
        self.received = signal.Signals(number)

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
        """Call where nothing is half done.

        Raises:
            StopRequested: a signal waits.
        """
        if self.received is not None:
            raise StopRequested(self.received)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with a `check` before each."""
        for item in items:
            self.check()
            yield item
