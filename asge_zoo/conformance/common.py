"""What a promise is, and what checks are made of."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from pydantic import ValidationError
from torch import Tensor

from asge_zoo.registry import Component
from asge_zoo.spec import describe


class BrokenPromise(AssertionError):
    """One line: the promise, what was seen, what to do."""


class NotChecked(SkipTest):
    """A promise can't be checked here, as where a dataset's files are not there; test runners count it as skipped."""


class NotMade(Exception):
    """The component can't be made with its options."""


@dataclass(frozen=True)
class Subject:
    """The class under check, and the options to make it with."""

    component: type[Component]
    options: Mapping[str, Any]

    def make(self) -> Any:
        """The component.

        Raises:
            NotMade: it refuses the options, or has one without a default.
        """
        try:
            return self.component.model_validate(dict(self.options))
        except ValidationError as error:
            raise NotMade(f"{self.component.__qualname__} can't be made ({describe(error)})") from error


class Check(NamedTuple):
    """A promise of every component of a group.

    Attributes:
        name: a few words.
        remedy: what to do where it is broken.
        run: raises an AssertionError that says what was seen, or whatever the component raises.
    """

    name: str
    remedy: str
    run: Callable[[Subject], None]


@dataclass(frozen=True)
class Promise:
    """One thing that a component promises, with the check of it."""

    name: str
    remedy: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return self.name

    def check(self) -> None:
        """Check it; torch's generator is left as it was.

        Raises:
            BrokenPromise: it is not kept.
            NotChecked: what the check needs is not there.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                self.run()
        except NotChecked:
            raise
        except NotMade as error:
            remedy = "give each option a valid default, or promises() the options to make it with"
            raise BrokenPromise(f"{self.name}: {error}; {remedy}") from error
        except Exception as error:
            text = str(error).strip() or "no message"
            seen = text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text.splitlines()[0]}"
            raise BrokenPromise(f"{self.name}: {textwrap.shorten(seen, 300)}; {self.remedy}") from error


def expect(holds: bool, seen: str) -> None:
    """Where it does not hold, an AssertionError with what was seen."""
    if not holds:
        raise AssertionError(seen)


def size(shape: tuple[int, ...]) -> str:
    """A shape for people: `2×3×8×8`."""
    return "×".join(map(str, shape))


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors have the same names and bitwise the same values."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same but for the order of float32 sums."""
    scale = float(other.detach().abs().max())
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-5 * max(1, scale))
