"""The method: every number of a step against `reference.py`, in float64, and what a step must never do."""

from collections import OrderedDict
from typing import Any, Literal

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asge_zoo.backbones.base import Backbone
from asge_zoo.compiler.build import compile_spec
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.ops.goodness import MapShape, SpatialGoodness
from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling, rms_pool2d
from asge_zoo.ops.projection import linear_in_parts, linear_to_logits
from asge_zoo.ops.transfer import Transfer
from asge_zoo.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread")

DIVISOR = 16  # of the channels: 8, 16 and 32 for 128, 256 and 512, which leaves every ratio as it is
PRECISE = 1e-10
NETWORKS = ["vgg8", "vgg11"]
POOLINGS = ["rms", "avg", "max"]
# For α = 1.5 and 2, P divides neither 20 nor 28; maps of 5, 7 and 3 pixels come up behind the pools.
IMAGES = [pytest.param((1, 16), id="1x16"), pytest.param((3, 20), id="3x20"), pytest.param((1, 28), id="1x28")]


def build(
    network: str | Backbone = "vgg8",
    *,
    images: tuple[int, int] = (1, 16),
    alpha: float = 1.0,
    device: str = "cpu",
    precision: str = "float32",
    seed: int = 0,
    **parts: Any,
) -> LocalGraph:
    """A narrow network, its step not compiled; `parts` replace parts of its spec."""
    channels, side = images
    raw = {
        "name": "test",
        "data": {"kind": "digits" if channels == 1 else "cifar10", "size": side},
        "backbone": {"kind": network, "width": 1 / DIVISOR} if isinstance(network, str) else network,
        "rule": {"kind": "asge", "goodness": {"kind": "spatial", "alpha": alpha}},
        "train": {"compile": False, "precision": precision, "seed": seed},
    }
    return compile_spec(Spec.model_validate({**raw, **parts}), device=device)


def batch(images: tuple[int, int] = (1, 16), count: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Images and labels of ten classes."""
    channels, side = images
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)
    return pixels.to(dtype), torch.randint(10, (count,), generator=generator)


def layers_of(graph: LocalGraph, plans: list[reference.Plan]) -> list[reference.Layer]:
    """A VGG's tensors as the reference takes them; zeros for the projections of a rule without any."""
    tensors = graph.state_dict()
    none = torch.zeros(())
    return [
        reference.Layer(
            weight=tensors[f"backbone.conv{i + 1}.weight"],
            bias=tensors[f"backbone.conv{i + 1}.bias"],
            projection=tensors.get(f"local.{i}.projection.weight", none),
            offset=tensors.get(f"local.{i}.projection.bias", none),
            pooled=plan.pooled,
            partition=plan.partition,
        )
        for i, plan in enumerate(plans)
    ]


def head_of(graph: LocalGraph) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the classifier's linear layers."""
    tensors = [parameter.detach() for parameter in graph.head.parameters()]
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = PRECISE) -> None:
    """Equal to within `tolerance` of the largest expected entry, which is not zero."""
    assert actual.shape == expected.shape, what
    scale = expected.abs().max().item()
    assert scale > 0, f"{what}: nothing to compare, all zero"
    error = (actual - expected).abs().max().item() / scale
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names and bitwise the same tensors."""
    assert actual.keys() == expected.keys()
    differing = [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]
    assert not differing, f"differ: {differing}"


def copies(graph: LocalGraph) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those that are not saved included."""
    return {name: tensor.detach().clone() for name, tensor in (*graph.named_parameters(), *graph.named_buffers())}


def assert_slope(graph: LocalGraph, images: Tensor, labels: Tensor, name: str, unit: int) -> None:
    """The step's gradient of `name` is the slope of that unit's own loss, by central differences."""
    gradient = graph.step(images, labels).grads[name].flatten()
    entries = dict(graph.named_parameters())[name].detach().view(-1)
    for entry in gradient.abs().topk(min(3, len(gradient))).indices.tolist():
        before = entries[entry].item()
        losses = []
        for shift in (1e-5, -1e-5):
            entries[entry] = before + shift
            losses.append(graph.step(images, labels).losses[unit])
        entries[entry] = before
        assert_close((losses[0] - losses[1]) / 2e-5, gradient[entry], f"{name}[{entry}]", tolerance=1e-6)


# The step against the reference.


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_step_equals_the_reference(network: str, pooling: str, alpha: float, shape: tuple[int, int]) -> None:
    """Every unit's loss, logits and gradients, and the classifier's."""
    graph = build(network, images=shape, alpha=alpha, pooling={"kind": pooling}).double()
    plans = reference.plan(network, alpha=alpha, side=shape[1], divisor=DIVISOR)
    assert [(u.channels, u.height, u.width, u.partition) for u in graph.units] == [
        (p.channels, p.side, p.side, p.partition) for p in plans
    ]
    images, labels = batch(shape)
    result = graph.step(images, labels)
    steps = reference.asge_step(layers_of(graph, plans), images, labels, pooling)
    for i, step in enumerate(steps):
        where = f"unit {i + 1}, P = {plans[i].partition} of {plans[i].side}"
        assert_close(result.unit_logits[i], step.logits, f"{where}: logits")
        assert_close(result.losses[i], step.loss, f"{where}: loss")
        assert_close(result.grads[f"backbone.conv{i + 1}.weight"], step.weight_grad, f"{where}: weight")
        assert_close(result.grads[f"backbone.conv{i + 1}.bias"], step.bias_grad, f"{where}: bias")
    logits, loss, grads = reference.head_step([step.output for step in steps[1:]], head_of(graph), labels)
    assert result.logits is not None
    assert_close(result.logits, logits, "classifier: logits")
    assert_close(result.head_loss, loss, "classifier: loss")
    for name, grad in zip(graph.head_parameters, grads, strict=True):
        assert_close(result.grads[name], grad, name)


@pytest.mark.parametrize("side", [16, 32])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_step_equals_the_closed_form(network: str, alpha: float, side: int) -> None:
    """Equation 7, for every unit (P divides every map here)."""
    graph = build(network, images=(3, side), alpha=alpha).double()
    layers = layers_of(graph, reference.plan(network, alpha=alpha, side=side, divisor=DIVISOR))
    images, labels = batch((3, side))
    result = graph.step(images, labels)
    for i, step in enumerate(reference.asge_step(layers, images, labels, "rms")):
        weight_grad, bias_grad = reference.closed_form(layers[i], step.input, labels)
        assert_close(result.grads[f"backbone.conv{i + 1}.weight"], weight_grad, f"unit {i + 1}: weight")
        assert_close(result.grads[f"backbone.conv{i + 1}.bias"], bias_grad, f"unit {i + 1}: bias")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("prediction", ["last", "fusion"])
@pytest.mark.parametrize("network", NETWORKS)
def test_backpropagation_equals_autograd(network: str, prediction: str, pooling: str) -> None:
    """The control's gradients are plain autograd's."""
    parts: dict[str, Any] = {"rule": {"kind": "bp"}, "prediction": {"kind": prediction}, "pooling": {"kind": pooling}}
    graph = build(network, images=(3, 20), **parts).double()
    layers = layers_of(graph, reference.plan(network, alpha=0, side=20, divisor=DIVISOR))
    images, labels = batch((3, 20))
    result = graph.step(images, labels)
    loss, grads = reference.backprop(layers, head_of(graph), images, labels, pooling)
    assert len(head_of(graph)) == (1 if prediction == "last" else len(layers) - 1)
    assert_close(result.losses, loss[None], "loss")
    names = [name for name, _ in graph.named_parameters()]
    for name, grad in zip(names, grads, strict=True):
        assert_close(result.grads[name], grad, name)


@pytest.mark.parametrize("shape", [(7, 10, 3), (6, 9, 3), (5, 4, 4), (8, 8, 3)])
@pytest.mark.parametrize("bins", ["adaptive", "crop"])
def test_goodness_of_oblong_maps(bins: str, shape: tuple[int, int, int]) -> None:
    """Height and width are not mixed up; `crop` leaves the remainder out."""
    height, width, p = shape
    generator = torch.Generator().manual_seed(height)
    activation = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64).relu()
    map_shape = MapShape(3, height, width, last_channels=3 * p)
    goodness = SpatialGoodness.model_validate({"bins": bins})
    read = activation if bins == "adaptive" else activation[:, :, : height - height % p, : width - width % p]
    assert goodness.dim(map_shape) == 3 * p * p
    assert_close(goodness.build(map_shape).double()(activation), reference.goodness(read, p), "goodness")


# The paper's own figures.


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.0, {128: 1, 256: 1, 512: 1}),
        (0.5, {128: 2, 256: 1, 512: 1}),
        (1.0, {128: 4, 256: 2, 512: 1}),
        (1.5, {128: 6, 256: 3, 512: 1}),
        (2.0, {128: 8, 256: 4, 512: 2}),
    ],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_partitions_of_table_1(network: str, alpha: float, expected: dict[int, int]) -> None:
    """P by channels at full width on 3×32×32."""
    graph = build(network, images=(3, 32), alpha=alpha, device="meta", backbone={"kind": network})
    channels = [int(layer.split()[0]) for layer in reference.NETWORKS[network].split(", ")]
    assert [unit.channels for unit in graph.units] == channels
    assert [unit.partition for unit in graph.units] == [expected[c] for c in channels]


@pytest.mark.parametrize(("prediction", "expected"), [("fusion", 256_600), ("last", 51_300), ("best", 0)])
def test_classifier_parameters_of_table_3(prediction: str, expected: int) -> None:
    """VGG8's classifiers for CIFAR-100's hundred classes."""
    parts: dict[str, Any] = {"data": {"kind": "cifar100"}, "backbone": {"kind": "vgg8"}}
    graph = build(device="meta", prediction={"kind": prediction}, **parts)
    assert sum(parameter.numel() for parameter in graph.head.parameters()) == expected


def test_logits_in_parts_are_the_product() -> None:
    """What a GPU does for few logits."""
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 256), (256, 10), (10,)))
    torch.testing.assert_close(linear_in_parts(x, weight, bias), linear_to_logits(x, weight, bias))


def test_projections_are_fixed_and_normal() -> None:
    """Equation 5: standard deviation 1/√N, drawn by the seed, saved, and no parameters."""
    graph, again, other = build(alpha=2.0), build(alpha=2.0), build(alpha=2.0, seed=1)
    projections = {name: tensor for name, tensor in graph.state_dict().items() if name.startswith("local.")}
    assert len(projections) == 2 * len(graph.units)
    assert not projections.keys() & dict(graph.named_parameters()).keys()
    assert_same({name: again.state_dict()[name] for name in projections}, projections)
    assert all(not torch.equal(other.state_dict()[name], tensor) for name, tensor in projections.items())
    entries = torch.cat([tensor.flatten() for tensor in projections.values()])
    assert entries.std().item() == pytest.approx(10**-0.5, rel=0.02)
    assert abs(entries.mean().item()) < 0.01


# Locality.


@pytest.mark.parametrize("later", [1, 3, 6])
@pytest.mark.parametrize("changed", ["weight", "projection"])
def test_later_units_do_not_reach_earlier_ones(changed: str, later: int) -> None:
    """Changing a unit's weights or projection leaves all gradients before it bitwise as they were."""
    graph = build()
    images, labels = batch(dtype=torch.float32)
    before = graph.step(images, labels)
    name = f"backbone.conv{later + 1}.weight" if changed == "weight" else f"local.{later}.projection.weight"
    with torch.no_grad():
        graph.state_dict()[name].mul_(-1.5)
    after = graph.step(images, labels)
    for index, unit in enumerate(graph.units):
        untouched = index < later or (changed == "projection" and index > later)  # goodness does not feed forward
        for parameter in unit.parameters:
            assert torch.equal(before.grads[parameter], after.grads[parameter]) == untouched, parameter
        assert torch.equal(before.losses[index], after.losses[index]) == untouched, unit.name


def test_backpropagation_is_not_local() -> None:
    """What the test above would see of a rule that crosses layers."""
    graph = build(rule={"kind": "bp"})
    images, labels = batch(dtype=torch.float32)
    before = graph.step(images, labels).grads["backbone.conv1.weight"]
    with torch.no_grad():
        graph.state_dict()["backbone.conv7.weight"].mul_(-1.5)
    assert not torch.equal(graph.step(images, labels).grads["backbone.conv1.weight"], before)


@pytest.mark.parametrize("features", ["normalized", "activation"])
@pytest.mark.parametrize("prediction", ["last", "fusion"])
def test_head_trains_itself_alone(prediction: str, features: str) -> None:
    """The classifier's loss gives the head its gradient, and no unit any part of one."""
    graph = build(prediction={"kind": prediction, "features": features}).double()
    without = build(prediction={"kind": "best"}).double()
    images, labels = batch()
    result = graph.step(images, labels)
    units = {name: grad for name, grad in result.grads.items() if name not in graph.head_parameters}
    assert_same(units, without.step(images, labels).grads)
    plans = reference.plan("vgg8", alpha=1.0, side=16, divisor=DIVISOR)
    steps = reference.asge_step(layers_of(graph, plans), images, labels, "rms")
    maps = [step.output if features == "normalized" else step.activation for step in steps]
    _, loss, grads = reference.head_step(maps[-len(head_of(graph)) :], head_of(graph), labels)
    assert_close(result.head_loss, loss, "loss")
    for name, grad in zip(graph.head_parameters, grads, strict=True):
        assert_close(result.grads[name], grad, name)


# What a step leaves alone, and what it gives.


@pytest.mark.parametrize("rule", ["asge", "bp"])
def test_step_changes_nothing(rule: str) -> None:
    """Not a parameter, buffer, gradient, image or random state; a second step gives the same."""
    graph = build(BatchNormBackbone(), rule={"kind": rule})
    images, labels = batch(dtype=torch.float32)
    given = (images.clone(), labels.clone())
    before, random_state = copies(graph), torch.get_rng_state()
    result = graph.step(images, labels)
    assert_same(copies(graph), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in graph.parameters())
    assert torch.equal(images, given[0]) and torch.equal(labels, given[1])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(graph.step(images, labels).grads, result.grads)


VARIANTS: dict[str, dict[str, Any]] = {
    "affine": {"norm": {"kind": "layer", "affine": True}},
    "rms norm": {"norm": {"kind": "rms"}},
    "no bias": {"backbone": {"kind": "vgg8", "width": 1 / DIVISOR, "bias": False}},
    "one more": {"backbone": {"kind": "vgg11", "width": 1 / DIVISOR, "extra_conv": True}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("rule", "prediction"), [("asge", "fusion"), ("asge", "last"), ("asge", "best"), ("bp", "fusion"), ("bp", "last")]
)
def test_every_parameter_gets_a_finite_gradient(rule: str, prediction: str, variant: str) -> None:
    """One for each, of its shape and dtype, finite, not all zero and no part of a graph."""
    graph = build(**{"rule": {"kind": rule}, "prediction": {"kind": prediction}, **VARIANTS[variant]})
    result = graph.step(*batch(dtype=torch.float32))
    parameters = dict(graph.named_parameters())
    assert result.grads.keys() == parameters.keys()
    for name, grad in result.grads.items():
        assert (grad.shape, grad.dtype) == (parameters[name].shape, torch.float32), name
        assert grad.isfinite().all() and grad.any() and not grad.requires_grad, name
    assert result.losses.shape == (len(graph.units) if rule == "asge" else 1,)
    assert result.logits is not None and result.logits.shape == (5, 10)


@pytest.mark.parametrize("parts", [{}, {"norm": {"kind": "layer", "affine": True}}], ids=["plain", "affine"])
@pytest.mark.parametrize("network", NETWORKS)
def test_each_parameter_belongs_to_one_unit(network: str, parts: dict[str, Any]) -> None:
    """The units' parameters are the backbone's, each once."""
    graph = build(network, **parts)
    owned = [name for unit in graph.units for name in unit.parameters]
    assert sorted(owned) == sorted(f"backbone.{name}" for name, _ in graph.backbone.named_parameters())


# Best.


def chosen(unit: int, count: int = 7) -> list[float]:
    """Validation accuracies of which `unit` has the highest."""
    return [90.0 if index == unit else 50.0 + index for index in range(count)]


@pytest.mark.parametrize("unit", [0, 2, 6])
def test_best_stops_at_the_chosen_unit(unit: int) -> None:
    """`select` picks the highest accuracy, inference gives that unit's logits and runs nothing behind it."""
    graph = build(prediction={"kind": "best"})
    graph.prediction.select(graph.head, chosen(unit))
    images, labels = batch(dtype=torch.float32)
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in graph.backbone.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    logits = graph(images)
    assert ran == [f"conv{i + 1}" for i in range(unit + 1)]
    ran.clear()
    unit_logits = graph.unit_logits(images)
    assert len(ran) == len(unit_logits) == 7
    for hook in hooks:
        hook.remove()
    assert torch.equal(logits, unit_logits[unit])
    assert sum(torch.equal(logits, each) for each in unit_logits) == 1
    result = graph.step(images, labels)
    assert result.logits is not None
    assert torch.equal(result.logits, result.unit_logits[unit])
    assert torch.equal(result.head_loss, F.cross_entropy(result.logits, labels))


def test_best_choice_is_saved() -> None:
    """The chosen unit travels with the weights."""
    graph, copy = build(prediction={"kind": "best"}), build(prediction={"kind": "best"}, seed=3)
    graph.prediction.select(graph.head, chosen(2))
    copy.load_state_dict(graph.state_dict())
    images, _ = batch(dtype=torch.float32)
    assert torch.equal(copy(images), graph.unit_logits(images)[2])


@pytest.mark.parametrize("network", NETWORKS)
def test_best_has_one_more_convolution(network: str) -> None:
    """`extra_conv` puts a copy of the last convolution in the classifier's place."""
    backbone = {"kind": network, "width": 1 / DIVISOR, "extra_conv": True}
    graph, plain = build(backbone=backbone, prediction={"kind": "best"}), build(network)
    assert len(graph.units) == len(plain.units) + 1
    last, before = graph.units[-1], graph.units[-2]
    assert (last.channels, last.height, last.output_shape) == (before.channels, before.height, before.output_shape)
    assert_close(graph(batch()[0].float()), graph.unit_logits(batch()[0].float())[-1], "last unit answers", 0)


def test_best_needs_a_layer_local_rule() -> None:
    """Backpropagation's units have no logits of their own."""
    with pytest.raises(SpecError, match=r"^prediction\.kind: .*bp"):
        build(rule={"kind": "bp"}, prediction={"kind": "best"})


# RMS pooling.


def test_rms_pooling_values() -> None:
    """Exact roots, an odd row and column left out, and the dtype kept without overflow."""
    x = torch.tensor([[3.0, 4.0, 1.0, 1.0, 9.0], [0.0, 0.0, 1.0, 1.0, 9.0], [9.0] * 5])[None, None]
    assert torch.equal(rms_pool2d(x, 2), torch.tensor([[[[2.5, 1.0]]]]))
    large = torch.full((1, 1, 2, 2), 300.0, dtype=torch.float16)  # its square is more than float16 holds
    assert torch.equal(rms_pool2d(large, 2), large[:, :, :1, :1])
    assert rms_pool2d(x.bfloat16(), 2).dtype == torch.bfloat16
    assert torch.equal(rms_pool2d(torch.zeros(1, 1, 4, 4), 2), torch.zeros(1, 1, 2, 2))


def test_rms_pooling_slope() -> None:
    """x / (n · rms) in a live window, 0 in a window of zeros."""
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rms_pool2d(x[None, None], 2).sum().backward()
    assert x.grad is not None
    expected = torch.tensor([[0.3, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected, rtol=1e-15, atol=0)


def test_backpropagation_survives_dead_windows() -> None:
    """A pooled layer that is silent everywhere passes on gradients of zero, not NaN."""
    graph = build(rule={"kind": "bp"})
    with torch.no_grad():
        graph.state_dict()["backbone.conv2.bias"].fill_(-1e4)
    result = graph.step(*batch(dtype=torch.float32))
    assert all(grad.isfinite().all() for grad in result.grads.values())
    assert not any(result.grads[f"backbone.conv{i}.weight"].any() for i in (1, 2))
    assert result.grads["backbone.conv7.weight"].any()


# Precision.


@pytest.mark.parametrize("rule", ["asge", "bp"])
def test_bfloat16_stays_close(rule: str) -> None:
    """Convolutions round, parameters, gradients, logits and losses are float32, and all stays near float32's."""
    images, labels = batch(dtype=torch.float32)
    exact_graph, graph = (build(rule={"kind": rule}, precision=kind) for kind in ("float32", "bfloat16"))
    exact, rounded = (each.step(images, labels) for each in (exact_graph, graph))
    assert {p.dtype for p in graph.parameters()} == {torch.float32}
    assert rounded.logits is not None
    for tensor in (rounded.losses, rounded.logits, rounded.head_loss, *rounded.unit_logits, *rounded.grads.values()):
        assert tensor.dtype == torch.float32
    assert_close(rounded.losses, exact.losses, "losses", 0.02)
    for name, grad in exact.grads.items():
        error = ((rounded.grads[name] - grad).norm() / grad.norm()).item()
        assert 1e-5 < error < 0.1, f"{name}: relative error {error:.1e}"
    predicted, expected = graph(images), exact_graph(images)
    assert predicted.dtype == torch.float32 and not torch.equal(predicted, expected)
    assert_close(predicted, expected, "inference", 0.05)


# Backbones of other shapes.


class BatchNormBackbone(Backbone):
    """Two convolutions with batch normalisation."""

    kind: Literal["test_batchnorm"] = "test_batchnorm"

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        layers = OrderedDict[str, nn.Module]()
        for i, (entering, leaving) in enumerate([(in_channels, 4), (4, 6)], start=1):
            layers[f"conv{i}"] = nn.Conv2d(entering, leaving, kernel_size=3, padding=1, bias=False)
            layers[f"bn{i}"] = nn.BatchNorm2d(leaving)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"transfer{i}"] = Transfer(pooling=pooling.build(2), dropout=0.0, norm=norm.build())
        return nn.Sequential(layers)


class ResidualBackbone(Backbone):
    """A stem and one residual block whose shortcut is a projection."""

    kind: Literal["test_residual"] = "test_residual"
    shortcut_first: bool = False

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        stem = nn.Conv2d(in_channels, 4, kernel_size=3, padding=1)
        return nn.Sequential(OrderedDict(stem=stem, relu=nn.ReLU(), block=ResidualBlock(4, 6, self.shortcut_first)))


class ResidualBlock(nn.Module):
    """ReLU of two convolutions' result plus a 1×1 convolution of the input, all at half the resolution."""

    def __init__(self, entering: int, leaving: int, shortcut_first: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(entering, leaving, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(leaving, leaving, kernel_size=3, padding=1)
        self.shortcut = nn.Conv2d(entering, leaving, kernel_size=1, stride=2)
        self.shortcut_first = shortcut_first

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut_first:
            return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


@pytest.mark.parametrize("rule", ["asge", "bp"])
def test_running_statistics_come_back(rule: str) -> None:
    """`StepResult.buffers` holds what the plain module's buffers become in training mode."""
    graph = build(BatchNormBackbone(), rule={"kind": rule}).double()
    images, labels = batch()
    result = graph.step(images, labels)
    plain = build(BatchNormBackbone()).double().backbone
    first = plain.get_submodule("conv1")(images)
    plain.train()(images)
    expected = {f"backbone.{name}": buffer for name, buffer in plain.named_buffers()}
    assert len(expected) == 6 and result.buffers.keys() == expected.keys()
    for name, buffer in expected.items():
        torch.testing.assert_close(result.buffers[name], buffer, rtol=1e-12, atol=1e-14)
    assert_close(result.buffers["backbone.bn1.running_mean"], 0.1 * first.mean((0, 2, 3)), "running mean")


def test_batch_normalisation_learns_locally() -> None:
    """Its scale and shift belong to the unit they stand in."""
    graph = build(BatchNormBackbone()).double()
    images, labels = batch()
    for index, unit in enumerate(graph.units):
        names = (f"conv{index + 1}.weight", f"bn{index + 1}.weight", f"bn{index + 1}.bias")
        assert unit.parameters == tuple(f"backbone.{name}" for name in names)
        for name in unit.parameters:
            assert_slope(graph, images, labels, name, index)


def test_residual_block_is_cut_before_each_convolution() -> None:
    """The shortcut's convolution joins the unit that it is added in; the pieces compute what the whole does."""
    graph = build(ResidualBackbone()).double()
    assert [unit.name for unit in graph.units] == ["stem", "block.conv1", "block.conv2"]
    assert {name.removeprefix("backbone.") for name in graph.units[2].parameters} == {
        "block.conv2.weight",
        "block.conv2.bias",
        "block.shortcut.weight",
        "block.shortcut.bias",
    }
    images, _ = batch()
    outputs = [env[graph.units[index].output] for index, env in graph.walk(images)]
    assert torch.equal(outputs[-1], graph.backbone(images))
    assert [unit.output_shape for unit in graph.units] == [tuple(output.shape[1:]) for output in outputs]


def test_a_module_that_no_goodness_sees_is_refused() -> None:
    """A shortcut computed before its branch would join the unit before, and learn nothing, silently."""
    with pytest.raises(SpecError, match="'block.shortcut' does not lead to what goodness reads"):
        build(ResidualBackbone(shortcut_first=True))


def test_residual_block_learns_locally() -> None:
    """Every gradient is the slope of its own unit's loss, the skip connection a constant."""
    graph = build(ResidualBackbone()).double()
    images, labels = batch()
    for index, unit in enumerate(graph.units):
        for name in unit.parameters:
            assert_slope(graph, images, labels, name, index)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_affine_norm_belongs_to_the_next_unit(norm: str) -> None:
    """Its scale and shift start as the identity and follow the next unit's own loss."""
    graph, plain = (build(norm={"kind": norm, "affine": affine}).double() for affine in (True, False))
    images, labels = batch()
    result, expected = graph.step(images, labels), plain.step(images, labels)
    assert_same({name: grad for name, grad in result.grads.items() if name in expected.grads}, expected.grads)
    assert not any("affine" in name for name in graph.units[0].parameters)
    for index, unit in enumerate(graph.units[1:], start=1):
        names = [f"backbone.affine{index + 1}.{kind}" for kind in ("weight", "bias")]
        assert [name for name in unit.parameters if "affine" in name] == names
        for name in names:
            assert_slope(graph, images, labels, name, index)


@pytest.mark.parametrize("network", ["vgg8", "vgg11", BatchNormBackbone(), ResidualBackbone()], ids=str)
def test_evaluation_does_not_depend_on_the_batch(network: str | Backbone) -> None:
    """An image's logits are the same alone and among others."""
    graph = build(network).double()
    graph.load_state_dict(graph.step(*batch()).buffers, strict=False)  # running statistics that say something
    graph.eval()
    images, _ = batch()
    together, by_unit = graph.all_logits(images)
    assert torch.equal(graph(images), together)
    for i in range(len(images)):
        alone, alone_by_unit = graph.all_logits(images[i : i + 1])
        assert_close(alone[0], together[i], f"image {i}", 1e-12)
        for mine, others in zip(alone_by_unit, by_unit, strict=True):
            assert_close(mine[0], others[i], f"image {i}, a unit's own logits", 1e-12)
