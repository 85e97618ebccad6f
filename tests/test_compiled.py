"""The compiled step: one graph, the same numbers as eager, local to the bit. Three compilations in all."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from asge_zoo.backbones.base import Backbone
from asge_zoo.compiler.build import compile_spec
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.ops.transfer import Transfer
from asge_zoo.spec import Spec

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("one_thread")]


class BatchNormBackbone(Backbone):
    """Two convolutions, one with batch normalisation."""

    kind: Literal["test_compiled_batchnorm"] = "test_compiled_batchnorm"

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        layers = OrderedDict[str, nn.Module]()
        layers["conv1"] = nn.Conv2d(in_channels, 4, kernel_size=3, padding=1, bias=False)
        layers["bn1"] = nn.BatchNorm2d(4)
        layers["relu1"] = nn.ReLU()
        layers["transfer1"] = Transfer(pooling=pooling.build(2), dropout=0.0, norm=norm.build())
        layers["conv2"] = nn.Conv2d(4, 6, kernel_size=3, padding=1)
        return nn.Sequential(layers)


# Side 20 and α = 1.5: patches that divide their maps and patches that do not.
PARTS: dict[str, dict[str, Any]] = {
    "asge": {"rule": {"kind": "asge", "goodness": {"kind": "spatial", "alpha": 1.5}}},
    "bp": {"rule": {"kind": "bp"}, "prediction": {"kind": "last"}},
    "batchnorm": {"backbone": BatchNormBackbone()},
}


def build(name: str, *, compiled: bool) -> LocalGraph:
    """A tiny network; the same weights whether compiled or not."""
    raw = {
        "name": "test",
        "data": {"kind": "digits", "size": 20},
        "backbone": {"kind": "vgg8", "width": 1 / 16},
        "train": {"compile": compiled},
    }
    return compile_spec(Spec.model_validate({**raw, **PARTS[name]}))


def batch() -> tuple[Tensor, Tensor]:
    """Eight images and labels."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(8, 1, 20, 20, generator=generator), torch.randint(10, (8,), generator=generator)


class Compiled:
    """Compiled networks by name, each compiled once for the whole module."""

    def __init__(self) -> None:
        self._graphs: dict[str, LocalGraph] = {}
        self.dynamo_graphs: dict[str, int] = {}

    def __call__(self, name: str) -> LocalGraph:
        """The network; its step has run once."""
        if name not in self._graphs:
            before = counters["stats"]["unique_graphs"]
            self._graphs[name] = build(name, compiled=True)
            self._graphs[name].step(*batch())
            self.dynamo_graphs[name] = counters["stats"]["unique_graphs"] - before
        return self._graphs[name]


@pytest.fixture(scope="module")
def compiled(one_thread: None) -> Iterator[Compiled]:
    """Shared by all tests, on one thread: another number of threads compiles again."""
    torch._dynamo.reset()
    counters.clear()
    yield Compiled()
    torch._dynamo.reset()


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal to within 1e-5 of the largest expected entry."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"{what}: relative error {error:.1e}"


@pytest.mark.parametrize("name", PARTS)
def test_compiled_step_equals_eager(name: str, compiled: Compiled) -> None:
    """Gradients, losses, logits and running statistics."""
    actual, expected = compiled(name).step(*batch()), build(name, compiled=False).step(*batch())
    for field in ("losses", "logits", "head_loss"):
        assert_close(getattr(actual, field), getattr(expected, field), field)
    for index, (mine, theirs) in enumerate(zip(actual.unit_logits, expected.unit_logits, strict=True)):
        assert_close(mine, theirs, f"unit {index}")
    for group in ("grads", "buffers"):
        mine, theirs = getattr(actual, group), getattr(expected, group)
        assert mine.keys() == theirs.keys()
        for key in theirs:
            assert_close(mine[key], theirs[key], key)
    assert len(actual.buffers) == (3 if name == "batchnorm" else 0)


@pytest.mark.parametrize("name", PARTS)
def test_step_is_one_graph(name: str, compiled: Compiled) -> None:
    """No graph break; and steps with other weights don't compile it again."""
    graph = compiled(name)
    assert compiled.dynamo_graphs[name] == 1
    saved = {key: tensor.clone() for key, tensor in graph.state_dict().items()}
    made = counters["stats"]["unique_graphs"]
    for _ in range(3):
        result = graph.step(*batch())
        with torch.no_grad():
            for key, parameter in graph.named_parameters():
                parameter -= 0.01 * result.grads[key]
    graph.load_state_dict(saved)
    assert counters["stats"]["unique_graphs"] == made
    assert not counters["graph_break"]


def test_compiled_step_changes_nothing(compiled: Compiled) -> None:
    """Running statistics included: they come back as values."""
    graph = compiled("batchnorm")
    before = {key: tensor.clone() for key, tensor in graph.state_dict().items()}
    result = graph.step(*batch())
    assert all(torch.equal(tensor, before[key]) for key, tensor in graph.state_dict().items())
    assert not torch.equal(result.buffers["backbone.bn1.running_mean"], before["backbone.bn1.running_mean"])
    assert all(parameter.grad is None for parameter in graph.parameters())


@pytest.mark.parametrize("changed", ["weight", "projection"])
def test_later_units_do_not_reach_earlier_ones(changed: str, compiled: Compiled) -> None:
    """Changing unit 5 leaves the gradients of units 1 to 4 bitwise as they were."""
    graph = compiled("asge")
    name = "backbone.conv5.weight" if changed == "weight" else "local.4.projection.weight"
    tensor = graph.state_dict()[name]
    saved = tensor.clone()
    before = graph.step(*batch())
    tensor.mul_(-1.5)
    after = graph.step(*batch())
    tensor.copy_(saved)
    for index, unit in enumerate(graph.units[:5]):
        for parameter in unit.parameters:
            assert torch.equal(before.grads[parameter], after.grads[parameter]) == (index < 4), parameter
