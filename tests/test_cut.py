"""Cutting: which backbones are refused, and with what reason."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Literal, cast

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiny import tiny_spec
from torch import Tensor, nn

from asge_zoo.backbones.base import Backbone, Cutting
from asge_zoo.compiler.agree import check_units
from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.cut import cut
from asge_zoo.engine.train import train
from asge_zoo.errors import SpecError
from asge_zoo.graph.functional import own_code
from asge_zoo.graph.unit import Unit
from asge_zoo.ops.norm import ChannelAffine, Norm, SampleLayerNorm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.ops.transfer import Transfer
from asge_zoo.registry import register
from asge_zoo.spec import Spec

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


class ThirdParty(nn.Module):
    """As somebody else would write it: functions, tensors of its own, and branches on shapes."""

    mask: Tensor

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, kernel_size=3, padding=1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.register_buffer("mask", torch.linspace(0.5, 1, 8)[:, None, None])
        self.last = nn.Conv2d(8, 10, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        if x.shape[-1] > 8:
            x = F.avg_pool2d(x, 2)
        y = F.conv2d(x, self.kernel, padding=1) * self.scale
        y = F.relu(y).mul_(self.mask)
        batch, channels, height, width = y.shape
        assert y.size() == x.shape and len(x.shape) == x.dim()
        left, right = y.view(batch, channels, height * width).chunk(2, dim=1)
        y = torch.cat([right, left], dim=1).view(batch, channels, height, width)
        y += x
        return torch.flatten(F.adaptive_avg_pool2d(F.relu(self.last(y)), 1), 1)


class Gated(nn.Module):
    """Squeeze and excitation by convolutions, behind the second of three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()
        self.squeeze, self.excite = nn.Conv2d(3, 2, kernel_size=1), nn.Conv2d(2, 3, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.third(x)


class Flagged(nn.Module):
    """Decides by a flag of its own, which tracing can't see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), training=self.training)


class Constant(nn.Module):
    """Holds a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shift = conv(), torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shift


class Pair(nn.Module):
    """Gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


class TwoInputs(Pair):
    """Takes more than images."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.conv(x + y)


class Three(nn.Module):
    """Three convolutions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


class Tied(Three):
    """The first convolution's weight is the third's."""

    def __init__(self) -> None:
        super().__init__()
        self.third.weight = self.first.weight


class Unused(Three):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2, bias=False)


class Tokens(Three):
    """Turns its map into tokens, which it mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(super().forward(x).flatten(2))


class Everywhere(Three):
    """Computes something of a parameter once, for two units."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.shift * 2
        return self.third(self.second(self.first(x) + shift) + shift)


class Masked(Three):
    """Multiplies each map by a mask made from the images, which is no gate."""

    def forward(self, x: Tensor) -> Tensor:
        mask = (x.sum(1, keepdim=True) > 0).to(x.dtype)
        return self.third(self.second(self.first(x) * mask) * mask) * mask


class Normalised(Three):
    """Uses its weights by way of functions of them, and a mask that is a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.register_buffer("mask", torch.tensor([True, False, True])[:, None, None])

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        x = F.relu_(self.first(x)) * ~self.mask
        x = F.conv2d(x, F.normalize(self.weight.flatten(1)).view(3, 3, 3, 3), padding=1).relu()
        return self.third(self.second(x) if extra is None else extra)


class ChannelsLast(Three):
    """Turns its maps for linear layers and norms, as ConvNeXt does."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.third = conv(), nn.Linear(3, 8)
        self.norm = nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.second(self.first(x).relu()).permute(0, 2, 3, 1))
        return self.third(x).relu().permute(0, 3, 1, 2)


class Aliased(Three):
    """Reads a map again after it was changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.third(self.second(self.relu(x)) + x)


class Parallel(nn.Module):
    """Two convolutions of one input, each passed on by itself: goodness sees one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.last = conv(), conv(), conv(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x), self.other(x)], dim=1).relu())


def behind_the_goodness() -> nn.Module:
    transfer = Transfer(pooling=None, dropout=0.0, norm=SampleLayerNorm(1e-5))
    return nn.Sequential(conv(), nn.ReLU(), transfer, ChannelAffine(3))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "holds no convolution"),
        (Shared(), "'conv.weight' is used twice"),
        (DataBranch(), "can't be traced"),
        (Constant(), "is a tensor but no parameter or buffer"),
        (Pair(), "must give one tensor"),
        (TwoInputs(), "can't be traced into units .*missing 1 required positional argument"),
        (Tied(), "'third.weight' is used twice"),
        (Unused(), "'unused.weight' is a parameter that nothing uses"),
        (Tokens(), "'mix' is a linear layer on tokens"),
        (Everywhere(), "which has no image a row, passes to unit 'second'"),
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


class ThirdPartyBackbone(Backbone):
    """Names that module in a spec."""

    kind: Literal["test_third_party"] = "test_third_party"
    module: Literal["third_party", "flagged", "data_branch", "aliased"] = "third_party"

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        if self.module == "third_party":
            return ThirdParty(in_channels)
        if self.module == "aliased":
            module = Aliased()
            module.first = conv(in_channels)
            return module
        module = Flagged() if self.module == "flagged" else DataBranch()
        module.conv = conv(in_channels)
        return module


def third_party(**options: Any) -> Spec:
    return tiny_spec().model_copy(update={"backbone": ThirdPartyBackbone(**options)})


def test_a_third_partys_module_is_cut() -> None:
    """Its own parameters belong to the unit that uses them, and any number of images goes through."""
    graph = compile_spec(third_party())
    assert [unit.name for unit in graph.units] == ["first", "kernel", "last"]
    assert [unit.parameters for unit in graph.units] == [
        ("backbone.first.weight", "backbone.first.bias"),
        ("backbone.kernel", "backbone.scale"),
        ("backbone.last.weight", "backbone.last.bias"),
    ]
    assert [(unit.channels, unit.height) for unit in graph.units] == [(8, 16), (8, 8), (10, 8)]
    for count in (1, 2, 5):
        images = torch.randn(count, 1, 16, 16)
        env = dict(graph.walk(images))[2]
        assert torch.equal(env[graph.units[-1].output], graph.backbone(images))
    result = graph.step(torch.randn(4, 1, 16, 16), torch.arange(4))
    assert set(result.grads) == set(graph.tensors()[0]) and all(grad.any() for grad in result.grads.values())


@pytest.mark.usefixtures("no_pictures", "own_registry")
def test_a_third_partys_module_is_trained(tmp_path: Path) -> None:
    register(ThirdPartyBackbone)
    spec = third_party()
    before = compile_spec(spec).state_dict()
    train(spec, run_dir=tmp_path / "run", device="cpu")
    after = safetensors.torch.load_file(tmp_path / "run" / "last" / "model.safetensors")
    for name in ("backbone.kernel", "backbone.scale", "backbone.first.weight"):
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (
            "flagged",
            "gives another answer in training mode than whole|gives another answer in evaluation mode than whole",
        ),
        ("aliased", "gives another answer in evaluation mode than whole"),
        ("data_branch", "can't be traced into units .* a branch may depend on shapes, not on values"),
    ],
)
def test_a_third_partys_module_is_refused(module: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as error:
        compile_spec(third_party(module=module))
    assert "\n" not in str(error.value)


def test_a_gate_stays_with_what_it_gates() -> None:
    pieces = cut(Gated(), IMAGE).units
    assert [piece.name for piece in pieces] == ["first", "second", "third"]
    assert {"backbone.squeeze.weight", "backbone.excite.weight"} <= set(pieces[1].parameters)


def test_a_parallel_convolution_joins() -> None:
    pieces = cut(Parallel(), IMAGE).units
    assert [piece.name for piece in pieces] == ["one", "last"]
    assert "backbone.other.weight" in pieces[0].parameters


def test_macs_count_functional_convolutions() -> None:
    units = cut(ThirdParty(), (3, 16, 16)).units
    assert [unit.macs for unit in units] == [8 * 256 * 27, 8 * 64 * 72, 10 * 64 * 72]


def answer_of(module: nn.Module) -> tuple[list[Unit], Tensor, Tensor]:
    """A module's units, what they give together for two images, and what it gives."""
    image = torch.randn(2, *IMAGE)
    expected = module(image)
    units, answer, _ = cut(module, IMAGE)
    env = {"input": image}
    for unit in units:
        env = unit.run(env)
    return units, env[answer], expected


@pytest.mark.parametrize("module", [Masked(), Normalised(), ChannelsLast()], ids=lambda module: type(module).__name__)
def test_units_give_what_the_whole_gives(module: nn.Module) -> None:
    _, found, expected = answer_of(module)
    assert torch.equal(found, expected)


def test_a_mask_is_no_gate() -> None:
    assert [unit.name for unit in answer_of(Masked())[0]] == ["first", "second", "third"]


def test_functions_of_weights_belong_to_the_unit_that_uses_them() -> None:
    units = answer_of(Normalised())[0]
    assert [unit.name for unit in units] == ["first", "conv2d", "second", "third"]
    assert units[1].parameters == ("backbone.weight",) and units[0].constants == ("backbone.mask",)


def test_maps_with_channels_last_are_turned() -> None:
    """What goodness reads and what is kept have their channels first, whatever the unit passes on."""
    units, values = cut(ChannelsLast(), IMAGE).units, cut(ChannelsLast(), IMAGE).values
    assert [(unit.name, unit.channels, unit.height, unit.width) for unit in units] == [
        ("first", 3, 8, 8),
        ("second", 3, 8, 8),
        ("third", 8, 8, 8),
    ]
    assert [unit.output_shape for unit in units] == [(3, 8, 8), (3, 8, 8), (8, 8, 8)]
    assert values[units[1].makes[0]].shape[1:] == (8, 8, 3) != values[units[1].output].shape[1:]


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: x.view(x.size(0), -1),
        lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1),
        lambda x: x.flatten(2).mean(-1),
    ],
)
def test_goodness_reads_the_map_before_it_is_flattened(flatten: Callable[[Tensor], Tensor]) -> None:
    class Flat(Three):
        def forward(self, x: Tensor) -> Tensor:
            return flatten(super().forward(x).relu())

    last = cut(Flat(), IMAGE).units[-1]
    assert (last.channels, last.height, last.width) == (3, 8, 8)


def test_cutting_by_blocks_needs_some() -> None:
    class Dense(Three):
        def forward(self, x: Tensor) -> Tensor:
            one = self.first(x)
            two = self.second(one.relu()) + one + x
            return self.third(two) + one + two + x

    for cutting in (Cutting("block"), Cutting("stage")):
        with pytest.raises(SpecError, match=f"has no {cutting.by}s"):
            cut(Dense(), IMAGE, cutting)


def test_the_check_leaves_randomness_alone() -> None:
    """Seeds give different networks, and the comparison of units and whole draws from its own generator."""
    module = ThirdParty()
    pieces = cut(module, (3, 16, 16))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_units(copy.deepcopy(module), module, pieces, (3, 16, 16))
    assert torch.equal(torch.rand(3), expected)
