"""The registry: what may be filed, what a wrong name is answered with, and components of third parties."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from tiny import TINY, tiny_spec
from torch import Tensor, nn

from asge_zoo import registry
from asge_zoo.compiler.build import compile_spec
from asge_zoo.errors import SpecError
from asge_zoo.graph.rule import Rule
from asge_zoo.ops.goodness import Goodness, MapShape
from asge_zoo.ops.pooling import Pooling
from asge_zoo.registry import ROOMS, Component, components, near_miss, register
from asge_zoo.spec import json_schema, load_spec

BUILT_IN = {
    "backbone": ["vgg11", "vgg8"],
    "rule": ["asge", "bp"],
    "goodness": ["spatial"],
    "projection": ["gaussian"],
    "pooling": ["avg", "max", "rms"],
    "norm": ["layer", "rms"],
    "prediction": ["best", "fusion", "last"],
    "dataset": ["cifar10", "cifar100", "digits", "fashion_mnist", "mnist"],
    "optimizer": ["adamw", "sgd"],
    "schedule": ["cosine"],
}


class Minimum(Pooling):
    """Minimum over the window, times a factor."""

    kind: Literal["test_min"] = "test_min"
    factor: float = 1.0

    def build(self, kernel_size: int) -> nn.Module:
        return MinPool(kernel_size, self.factor)


class MinPool(nn.Module):
    """(B, C, H, W) to (B, C, H // kernel_size, W // kernel_size)."""

    def __init__(self, kernel_size: int, factor: float) -> None:
        super().__init__()
        self.kernel_size, self.factor = kernel_size, factor

    def forward(self, x: Tensor) -> Tensor:
        return -self.factor * nn.functional.max_pool2d(-x, self.kernel_size)


class MeanGoodness(Goodness):
    """The mean of each channel."""

    kind: Literal["test_mean"] = "test_mean"

    def build(self, shape: MapShape) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def dim(self, shape: MapShape) -> int:
        return shape.channels


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Component]], type[Component]]:
    """`register`, on a copy of the registry that is thrown away after the test."""
    filed = {group: components(group) for group in ROOMS}
    monkeypatch.setattr(registry, "_components", filed)
    return register


@pytest.mark.parametrize("group", ROOMS)
def test_built_ins(group: str) -> None:
    found = components(group)
    assert set(BUILT_IN[group]) <= set(found)
    assert list(found) == sorted(found)
    assert all(component.group == group for component in found.values())


@pytest.mark.parametrize("group", ROOMS)
def test_every_component_explains_itself_and_has_defaults(group: str) -> None:
    for kind, component in components(group).items():
        assert (component.__doc__ or "").strip(), kind
        assert component.model_validate({}) == component.model_validate({"kind": kind})


def test_a_second_class_of_one_kind_is_refused(third_party: Callable[[Any], Any]) -> None:
    class OtherRMS(Minimum):
        """In the way."""

        kind: Literal["rms"] = "rms"  # pyright: ignore[reportIncompatibleVariableOverride]

    with pytest.raises(ValueError, match="pooling 'rms' is registered twice: RMS, .*OtherRMS"):
        third_party(OtherRMS)
    assert components("pooling")["rms"].__name__ == "RMS"


def test_filing_the_same_class_again_changes_nothing(third_party: Callable[[Any], Any]) -> None:
    assert third_party(Minimum) is Minimum
    assert third_party(Minimum) is Minimum


def test_a_kind_may_stand_in_two_groups() -> None:
    assert components("pooling")["rms"] is not components("norm")["rms"]


def test_a_class_outside_the_groups_is_refused(third_party: Callable[[Any], Any]) -> None:
    class Stray(Component):
        kind: Literal["stray"] = "stray"

    with pytest.raises(TypeError, match="Stray must derive from a contract, such as Pooling or Rule"):
        third_party(Stray)


def test_a_class_of_an_unknown_group_is_refused(third_party: Callable[[Any], Any]) -> None:
    class Stray(Component):
        group = "colour"
        kind: Literal["stray"] = "stray"

    with pytest.raises(TypeError, match="must derive from a contract"):
        third_party(Stray)


def test_a_class_without_a_kind_is_refused(third_party: Callable[[Any], Any]) -> None:
    class Nameless(Pooling):
        def build(self, kernel_size: int) -> nn.Module:
            return nn.Identity()

    with pytest.raises(TypeError, match=r"Nameless must give its kind: `kind: Literal\['name'\] = 'name'`"):
        third_party(Nameless)


def test_a_third_partys_component_works_in_a_spec_at_once(third_party: Callable[[Any], Any]) -> None:
    with pytest.raises(SpecError, match="unknown pooling 'test_min'"):
        tiny_spec("pooling.kind=test_min")
    third_party(Minimum)
    spec = tiny_spec("pooling.kind=test_min", "pooling.factor=2.0")
    assert spec.resolved()["pooling"] == {"kind": "test_min", "factor": 2.0}
    assert load_spec(spec.resolved()).digest() == spec.digest()
    assert "test_min" in str(json_schema()["properties"]["pooling"])
    graph = compile_spec(spec)
    assert any(isinstance(module, MinPool) for module in graph.modules())
    losses = graph.step(torch.randn(4, 1, 16, 16), torch.arange(4)).losses
    assert losses.isfinite().all()
    with pytest.raises(SpecError, match=r"pooling\.factr: unknown key, did you mean 'factor'\?"):
        tiny_spec("pooling.kind=test_min", "pooling.factr=2.0")


def test_a_third_partys_component_works_inside_another(third_party: Callable[[Any], Any]) -> None:
    third_party(MeanGoodness)
    spec = tiny_spec("rule.goodness.kind=test_mean")
    assert spec.resolved()["rule"]["goodness"] == {"kind": "test_mean"}
    graph = compile_spec(spec)
    assert [unit.goodness_dim for unit in graph.units] == [unit.channels for unit in graph.units]


def test_what_a_test_registers_is_gone_after_it() -> None:
    assert "test_min" not in components("pooling")
    assert "test_mean" not in components("goodness")


def test_a_nested_component_is_filled_in() -> None:
    spec = load_spec({**TINY, "rule": {"goodness": {"alpha": 0.5}}})
    assert spec.resolved()["rule"] == {
        "kind": "asge",
        "goodness": {"kind": "spatial", "alpha": 0.5, "bins": "adaptive"},
        "projection": {"kind": "gaussian", "scale": "std"},
    }


def test_a_component_of_another_group_does_not_fit() -> None:
    pooling = components("pooling")["rms"].model_validate({})
    with pytest.raises(ValidationError, match="must be an object with a 'kind'"):
        components("rule")["asge"].model_validate({"goodness": pooling})


def test_a_component_may_be_given_as_an_object() -> None:
    goodness = components("goodness")["spatial"].model_validate({"alpha": 2.0})
    rule: Any = components("rule")["asge"].model_validate({"goodness": goodness})
    assert isinstance(rule, Rule)
    assert rule.model_dump()["goodness"]["alpha"] == 2.0


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("vgg9", ", did you mean 'vgg8'?"),
        ("asgee", ", did you mean 'asge'?"),
        ("zzz", "; choose from asge, bp, vgg8"),
        ("", "; choose from asge, bp, vgg8"),
    ],
)
def test_near_miss(word: str, hint: str) -> None:
    assert near_miss(word, ["vgg8", "bp", "asge"]) == hint
