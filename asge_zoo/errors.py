"""Errors that a user can act on: one line that says what is wrong, where, and what to do.

ZooError                exit code 2: bad input
├── SpecError           a spec, an override or a component's options
├── DataError           a dataset that is missing, unreadable or too small
├── CheckpointError     a run directory or checkpoint that is missing, damaged or in the way
└── DivergenceError     a loss that is no longer finite
"""


class ZooError(Exception):
    """Base of every error the command line turns into one line on stderr and its `exit_code`."""

    exit_code = 2


class SpecError(ZooError):
    """A spec, an override or a component's options can't be used."""


class DataError(ZooError):
    """A dataset is missing, unreadable or too small for the spec."""


class CheckpointError(ZooError):
    """A run directory or checkpoint is missing, damaged or in the way."""


class DivergenceError(ZooError):
    """A loss is no longer finite, so training stops."""
