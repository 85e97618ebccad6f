"""For authors of components: what a component promises, each promise with a check of it.

    @pytest.mark.parametrize("promise", promises(LpPool), ids=str)
    def test_promise(promise):
        promise.check()

`asge-zoo plugins check acme.lp` checks the same.
"""

from functools import partial
from typing import Any

from asge_zoo.conformance import backbones, datasets, graphs, maps, options
from asge_zoo.conformance.common import BrokenPromise, Check, NotChecked, Promise, Subject
from asge_zoo.plugins import GROUPS
from asge_zoo.registry import Component

__all__ = ["BrokenPromise", "NotChecked", "Promise", "promises"]


def promises(component_class: type[Component], **options: Any) -> list[Promise]:
    """What a component promises, as every one and as one of its group.

    Args:
        component_class: a final class; it need not be registered.
        options: its options, where its defaults are not what is to be checked.

    Raises:
        TypeError: its group is none of `plugins.GROUPS`.
    """
    group = getattr(component_class, "group", None)
    if group not in GROUPS:
        raise TypeError(f"{component_class.__qualname__} must derive from the contract of a {', '.join(GROUPS)}")
    subject = Subject(component_class, options)
    return [Promise(name, remedy, partial(run, subject)) for name, remedy, run in _checks(group)]


def _checks(group: str) -> tuple[Check, ...]:
    if group == "backbone":
        own = backbones.CHECKS
    elif group == "dataset":
        own = datasets.CHECKS
    elif group in ("rule", "prediction"):
        own = graphs.checks(group)
    else:
        own = maps.checks(group)
    return (*options.CHECKS, *own)
