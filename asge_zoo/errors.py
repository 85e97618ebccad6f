"""Errors that a user can act on: one line that says what is wrong, where, and what to do.

ZooError                exit code 2: bad input
├── SpecError           a spec, an override or a component's options
├── DataError           a dataset that is missing, unreadable or too small
├── PluginError         a component of an installed package that does not work
├── CheckpointError     a run directory or checkpoint that is missing, damaged or in the way
├── DivergenceError     losses or weights that are no longer finite
├── RankError           another of the processes that train together is gone
└── HubError            exit code 3: the network, or the Hub's answer

Stopped (a KeyboardInterrupt, and no error) ends what a signal stopped: exit code 128 and its number, 130 for SIGINT.
"""

from signal import Signals


class ZooError(Exception):
    """Base of every error the command line turns into one line on stderr and its `exit_code`."""

    exit_code = 2


class SpecError(ZooError):
    """A spec, an override or a component's options can't be used."""


class DataError(ZooError):
    """A dataset is missing, unreadable or too small for the spec."""


class PluginError(ZooError):
    """A component that an installed package provides can't be used."""


class CheckpointError(ZooError):
    """A run directory or checkpoint is missing, damaged or in the way."""


class DivergenceError(ZooError):
    """Losses or weights are no longer finite, so training stops."""


class RankError(ZooError):
    """Another of the processes that train together is gone, so training stops."""


class HubError(ZooError):
    """The Hub can't be reached, or answers that it can't be done.

    Args:
        message: one line.
        unreachable: whether nothing was learnt of what was asked for, so that a copy in the cache may stand in.
    """

    exit_code = 3

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM, SIGHUP or SIGUSR1 came, or the time is up; the message says what is saved and how to go on.

    Args:
        signal: which of them; SIGUSR1 for the time.
        message: for the user.
    """

    def __init__(self, signal: Signals, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.name}")
        self.signal = signal

    @property
    def exit_code(self) -> int:
        """As shells have it: 128 and the signal's number."""
        return 128 + self.signal
