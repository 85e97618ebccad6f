"""Cutting: which backbones are refused, and with what reason."""

from types import MethodType
from typing import Any, Literal, cast

import pytest
import torch
from tiny import tiny_spec
from torch import Tensor, nn

from asge_zoo.backbones.base import Backbone
from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.cut import cut
from asge_zoo.errors import SpecError
from asge_zoo.graph.functional import own_code
from asge_zoo.ops.norm import ChannelAffine, Norm, SampleLayerNorm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.ops.transfer import Transfer

IMAGE = (3, 8, 8)


def conv(entering: int = 3, leaving: int = 3) -> nn.Conv2d:
    return nn.Conv2d(entering, leaving, kernel_size=3, padding=1)


class Shared(nn.Module):
    """One convolution, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu())


class DataBranch(nn.Module):
    """Asks its input before it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x


class FreeParameter(nn.Module):
    """A parameter of its own, outside any module the tracer keeps whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


def behind_the_goodness() -> nn.Module:
    transfer = Transfer(pooling=None, dropout=0.0, norm=SampleLayerNorm(1e-5))
    return nn.Sequential(conv(), nn.ReLU(), transfer, ChannelAffine(3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "holds no convolution"),
        (Shared(), "'conv' is used twice"),
        (DataBranch(), "can't be traced"),
        (FreeParameter(), "uses 'scale' outside a module"),
        (behind_the_goodness(), "'3' learns behind the goodness of the last unit"),
        (nn.Sequential(conv(4)), "does not take images of 3×8×8"),
        (nn.Sequential(conv(), nn.MaxPool2d(16)), "does not take images of 3×8×8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(module: nn.Module, reason: str) -> None:
    """Each in one line that says why."""
    with pytest.raises(SpecError, match=reason) as error:
        cut(module, IMAGE)
    assert "\n" not in str(error.value)


def test_functions_and_methods_become_steps() -> None:
    """Whatever stands between modules runs as it did, in the unit before the next convolution."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(), conv(6)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([self.first(x).relu(), x], dim=1)
            return self.second(y.mul(0.5)).flatten(2).unflatten(2, (8, 8))

    module, image = Mixed(), torch.randn(2, *IMAGE)
    env: dict[str, Any] = {"input": image}
    pieces = cut(module, IMAGE).units
    for piece in pieces:
        for step in piece.steps:
            env[step.name] = step(env, None)
        env = {name: env[name] for name in (*piece.keeps, piece.output)}
    assert [piece.name for piece in pieces] == ["first", "second"]
    assert torch.equal(env[pieces[-1].output], module(image))


class FrozenScale(Backbone):
    """A convolution and a batch normalisation whose scale is frozen."""

    kind: Literal["test_frozen"] = "test_frozen"

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        batch_norm = nn.BatchNorm2d(4)
        batch_norm.weight.requires_grad_(False)
        return nn.Sequential(conv(in_channels, 4), batch_norm, nn.ReLU())


@pytest.mark.parametrize("rule", ["asge", "bp"])
def test_frozen_parameters_stay_out(rule: str) -> None:
    """What a backbone froze is used as it is, and gets no gradient."""
    spec = tiny_spec(f"rule.kind={rule}").model_copy(update={"backbone": FrozenScale()})
    graph = compile_spec(spec)
    params, state = graph.tensors()
    assert "backbone.1.weight" in state and "backbone.1.weight" not in params
    assert set(graph.step(torch.randn(4, 1, 16, 16), torch.arange(4)).grads) == set(params)


def test_each_graph_has_a_step_of_its_own() -> None:
    """torch counts recompilations by code object: two graphs must not share one."""
    graphs = [compile_spec(tiny_spec()) for _ in range(2)]
    codes = {cast(MethodType, own_code(cast(MethodType, graph.step_fn))).__func__.__code__ for graph in graphs}
    assert len(codes) == 2
