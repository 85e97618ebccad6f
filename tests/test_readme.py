"""The README's own code runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_spec

from asge_zoo import registry
from asge_zoo.compiler.build import compile_spec
from asge_zoo.testing import promises

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def plugin(own_registry: None) -> type[registry.Component]:
    """The component of "Write a plugin in ten minutes"."""
    section = README.read_text(encoding="utf-8").split("### Write a plugin in ten minutes")[1].split("\n## ")[0]
    component, tests = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope: dict[str, Any] = {"__name__": "acme_soft"}
    exec(component, scope)
    exec(tests, scope)
    for mark in scope["test_promise"].pytestmark:
        assert [str(promise) for promise in mark.args[1]] == [str(promise) for promise in promises(scope["Soft"])]
    return scope["Soft"]


def test_its_plugin_keeps_every_promise(plugin: type[registry.Component]) -> None:
    for promise in promises(plugin):
        promise.check()


def test_its_plugin_trains(plugin: type[registry.Component]) -> None:
    registry.register(plugin)
    graph = compile_spec(tiny_spec("pooling.kind=acme.soft", "pooling.sharpness=2.0"))
    assert graph.step(torch.randn(4, 1, 16, 16), torch.arange(4)).losses.isfinite().all()
