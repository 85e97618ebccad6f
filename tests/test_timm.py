"""timm's networks in units: the same features, each parameter taught once, nothing across units; what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import Said, TrainedRun
from torch import Tensor, nn
from torch._dynamo.utils import counters

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.plan import plan
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import Spec, load_spec

pytestmark = pytest.mark.usefixtures("one_thread")

# Units with a convolution each.
UNITS = {
    "resnet18": 17,
    "resnet34": 33,
    "resnet50": 49,
    "resnet101": 100,
    "wide_resnet50_2": 49,
    "resnext50_32x4d": 49,
    "vgg11_bn": 10,
    "regnetx_002": 40,
    "mobilenetv3_small_050": 35,
    "efficientnet_b0": 49,
    "densenet121": 120,
    "convnext_atto": 40,
}
SIDE = 64
NARROW: dict[str, Any] = {"width": 0.125}


def timm_spec(name: str = "resnet18", *overrides: str, **backbone: Any) -> Spec:
    """A spec of one of timm's networks on colour images of 64 pixels, its step not compiled."""
    raw = {
        "name": "test",
        "data": {"kind": "cifar10", "size": SIDE, "batch_size": 4},
        "backbone": {"kind": "timm", "name": name, **backbone},
        "train": {"compile": False},
    }
    return load_spec(raw, overrides=overrides)


def build(name: str = "resnet18", *overrides: str, **backbone: Any) -> LocalGraph:
    return compile_spec(timm_spec(name, *overrides, **backbone))


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(10, (count,), generator=generator)


def original(graph: LocalGraph, name: str, **arguments: Any) -> nn.Module:
    """timm's own model with the graph's weights."""
    model = timm.create_model(name, num_classes=0, **arguments)
    model.load_state_dict(graph.backbone.state_dict(), strict=True)
    return model


def features(graph: LocalGraph, images: Tensor) -> Tensor:
    """What leaves the last unit."""
    *_, (_, env) = graph.walk(images)
    return env[graph.units[-1].output]


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-6) -> None:
    """Equal to within `tolerance` of the largest expected entry."""
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.1e}"


class Network(NamedTuple):
    """One of timm's by name, in units."""

    name: str
    graph: LocalGraph


@pytest.fixture(scope="module", params=UNITS)
def network(request: pytest.FixtureRequest) -> Network:
    """Built once for all tests that take it, which leave it as it was."""
    return Network(request.param, build(request.param))


def test_each_convolution_is_a_unit(network: Network) -> None:
    assert len(network.graph.units) == UNITS[network.name]


def test_features_equal_timms(network: Network) -> None:
    """In evaluation mode, and in training mode with what it does to running statistics."""
    (name, graph), (images, labels) = network, batch()
    model = original(graph, name).eval()
    with torch.no_grad():
        assert_close(features(graph.eval(), images), model(images), "evaluation")
        graph.train()
        model.train()
        found = graph.step(images, labels).buffers
        model(images)
        expected = dict(model.named_buffers())
        assert {f"backbone.{key}" for key in expected} == set(found)
        for key, value in expected.items():
            assert_close(found[f"backbone.{key}"].double(), value.double(), key)
        # Features in training mode; the walk updates the graph's own running statistics, which are put back.
        saved = {key: value.clone() for key, value in graph.state_dict().items()}
        model.load_state_dict(graph.backbone.state_dict())
        assert_close(features(graph, images), model(images), "training")
        graph.load_state_dict(saved)


def test_every_parameter_learns_in_one_unit(network: Network) -> None:
    """Its gradient is finite and not zero, but for biases that a batch norm takes away again."""
    name, graph = network.name, network.graph.train()
    taught = [parameter for unit in graph.units for parameter in unit.parameters]
    assert sorted(taught) == sorted(f"backbone.{key}" for key, _ in graph.backbone.named_parameters())
    grads = graph.step(*batch()).grads
    for parameter in taught:
        assert grads[parameter].isfinite().all(), parameter
        if not (name == "vgg11_bn" and parameter.endswith(".bias")):
            assert grads[parameter].any(), parameter


def assert_local(graph: LocalGraph, images: Tensor, labels: Tensor, at: int) -> None:
    """With unit `at` changed, the units before it have bitwise the same gradients and it has others."""
    before = graph.step(images, labels).grads
    state = graph.state_dict()
    name = next(name for name in graph.units[at].parameters if state[name].ndim == 4)
    saved = state[name].clone()
    state[name].mul_(-1.5)
    after = graph.step(images, labels).grads
    state[name].copy_(saved)
    for index, unit in enumerate(graph.units[: at + 1]):
        same = all(torch.equal(before[parameter], after[parameter]) for parameter in unit.parameters)
        assert same == (index < at), unit.name


def test_no_gradient_crosses_a_unit(network: Network) -> None:
    graph = network.graph.train()
    assert_local(graph, *batch(), at=len(graph.units) // 2)


def test_norms_start_where_the_spec_says() -> None:
    """The last one's of a branch, too."""
    for weight in (1.0, 0.2):
        norms = [m for m in build(norm_weight=weight, **NARROW).backbone.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) > 16 and all((norm.weight == weight).all() for norm in norms)


# Blocks and stages.


@pytest.mark.parametrize(
    ("name", "cut", "count", "names"),
    [
        ("resnet18", "conv", 17, ["conv1", "layer1.0.conv1", "layer1.0.conv2"]),
        ("resnet18", "block", 1 + 8, ["conv1", "layer1.0", "layer1.1", "layer2.0"]),
        ("resnet18", "stage", 1 + 4, ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("resnet50", "conv", 49, ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.conv3"]),
        ("resnet50", "block", 1 + 16, ["conv1", "layer1.0", "layer1.1", "layer1.2", "layer2.0"]),
        ("resnet50", "stage", 1 + 4, ["conv1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_cuts(name: str, cut: str, count: int, names: list[str]) -> None:
    planned = plan(timm_spec(name, cut=cut))
    assert planned["totals"]["units"] == count
    assert [unit["name"] for unit in planned["units"]][: len(names)] == names


@pytest.mark.parametrize("cut", ["conv", "block", "stage"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_backpropagation_equals_autograd_through_timm(name: str, cut: str) -> None:
    """In float64, in training mode, running statistics too."""
    graph = build(name, "rule.kind=bp", "prediction.kind=last", cut=cut, **NARROW).double()
    images, labels = batch()[0].double(), batch()[1]
    model = original(graph, name, channels=[8, 16, 32, 64]).double().train()
    result = graph.step(images, labels)
    weight, bias = (tensor.detach().requires_grad_() for tensor in graph.head.parameters())
    F.cross_entropy(F.linear(model(images), weight, bias), labels).backward()
    expected = {f"backbone.{key}": parameter.grad for key, parameter in model.named_parameters()}
    for key, grad in {**expected, "head.linears.0.weight": weight.grad, "head.linears.0.bias": bias.grad}.items():
        assert grad is not None
        assert_close(result.grads[key], grad, key, tolerance=1e-9)
    for key, value in model.named_buffers():
        assert_close(result.buffers[f"backbone.{key}"].double(), value.double(), key, tolerance=1e-12)


def test_a_block_learns_from_its_own_loss() -> None:
    """Its first convolution's gradient is the slope of the block's loss, and not of another."""
    graph = build(cut="block", **NARROW).double().train()
    images, labels = batch()[0].double(), batch()[1]
    gradient = graph.step(images, labels).grads["backbone.layer2.0.conv1.weight"].flatten()
    entries = dict(graph.named_parameters())["backbone.layer2.0.conv1.weight"].detach().view(-1)
    entry = int(gradient.abs().argmax())
    losses = []
    for shift in (1e-6, -2e-6):
        entries[entry] += shift
        losses.append(graph.step(images, labels).losses)
    changed = (losses[0] - losses[1]) / 2e-6
    index = [unit.name for unit in graph.units].index("layer2.0")
    assert_close(changed[index], gradient[entry], "slope", tolerance=1e-4)
    assert not changed[:index].any()


# The spec's own parts in timm's place.


def test_partition_is_by_the_last_units_channels() -> None:
    planned = plan(timm_spec())
    assert [unit["partition"] for unit in planned["units"]][::4] == [8, 8, 4, 2, 1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_specs_norm_stands_behind_goodness(name: str) -> None:
    """No batch norm is left; what enters each unit has mean 0 and variance 1 over a sample."""
    graph = build(name, stem="cifar", norm="spec", **NARROW).train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in graph.backbone.modules())
    assert len(graph.units) == UNITS[name]
    images, _ = batch()
    for index, env in graph.walk(images):
        unit = graph.units[index]
        if unit.makes:
            left = env[unit.makes[-1]].flatten(1)
            assert_close(left.var(1, correction=0), torch.ones(4), unit.name, tolerance=1e-2)
            assert not torch.equal(env[unit.activation], env[unit.output])
    grads = graph.step(*batch()).grads
    assert all(grad.any() for grad in grads.values())


def test_an_affine_norm_is_taught_by_the_next_unit() -> None:
    graph = build("resnet18", "norm.affine=true", stem="cifar", norm="spec", **NARROW).train()
    assert "backbone.maxpool.1.weight" in graph.units[1].parameters
    assert len(graph.units) == 17 and graph.step(*batch()).grads["backbone.maxpool.1.weight"].any()


def test_the_specs_pooling_stands_in_the_stem() -> None:
    graph = build("resnet18", "pooling.kind=avg", pooling="spec", **NARROW)
    stem = graph.units[0]
    assert (stem.height, stem.output_shape) == (32, (64, 16, 16))


def test_the_cifar_stem_keeps_the_size() -> None:
    stem = build(stem="cifar", **NARROW).units[0]
    assert (stem.channels, stem.height, stem.output_shape) == (64, 64, (64, 64, 64))


@pytest.mark.parametrize("prediction", ["fusion", "last", "best"])
def test_predictions(prediction: str) -> None:
    graph = build("resnet18", f"prediction.kind={prediction}", **NARROW).eval()
    images, _ = batch()
    with torch.no_grad():
        assert graph(images).shape == (4, 10)
        assert_close(graph(images), graph.all_logits(images)[0], prediction)


@pytest.mark.parametrize("unit", [0, 1, 2, 7, 16])
def test_best_stops_at_any_unit(unit: int) -> None:
    graph = build("resnet18", "prediction.kind=best", **NARROW).eval()
    graph.prediction.select(graph.head, [float(index == unit) for index in range(17)])
    images, _ = batch()
    with torch.no_grad():
        assert_close(graph(images), graph.unit_logits(images)[unit], "logits")


def test_images_leave_at_any_unit() -> None:
    """Early exit: constants on shortcuts leave the batch with their images."""
    graph = build(
        "resnet18", "prediction.kind=vote.early_exit", "prediction.threshold=0.999", stem="cifar", norm="spec", **NARROW
    ).eval()
    images, _ = batch(16)
    with torch.no_grad():
        logits, unit_logits = graph.all_logits(images)
        depth = graph.prediction.depth(graph.head, unit_logits)
        assert len(depth.unique()) > 1, "all images leave at one unit: nothing is tested"
        assert_close(graph(images), logits, "logits", tolerance=1e-5)


# Compiled.


@pytest.mark.compile
@pytest.mark.parametrize(("name", "graphs"), [("resnet18", 15), ("resnet50", 25)])
def test_compiled_by_structure(name: str, graphs: int) -> None:
    """One graph a structure, the gradients of the step that is not compiled, and local to the bit."""
    torch._dynamo.reset()
    counters.clear()
    eager = build(name)
    compiled = build(name, "train.compile=true")
    images, labels = batch()
    found, expected = compiled.step(images, labels), eager.step(images, labels)
    assert compiled.compiled_graphs == counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    for key, grad in expected.grads.items():
        error = (found.grads[key] - grad).norm() / grad.norm()
        assert error < 1e-3, f"{key}: {error:.1e}"
    assert found.buffers.keys() == expected.buffers.keys()
    for key, value in expected.buffers.items():
        assert_close(found.buffers[key].double(), value.double(), key, tolerance=1e-4)
    for tensor in compiled.state_dict().values():
        assert tensor.isfinite().all()
    assert_local(compiled, images, labels, at=len(compiled.units) - 3)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_maps_are_channels_last_where_a_network_can_train_so() -> None:
    """Not where oneDNN would write beyond a buffer."""
    assert build(width=0.25).layout is torch.channels_last
    assert build(width=0.125).layout is torch.contiguous_format


@pytest.mark.parametrize(
    ("name", "rule", "graphs"), [("resnet50", "asge", 25), ("resnet101", "asge", 25), ("resnet50", "bp", 1)]
)
def test_explain_says_how_many_graphs(name: str, rule: str, graphs: int) -> None:
    spec = timm_spec(name, "train.compile=true", f"rule.kind={rule}", "prediction.kind=last")
    assert plan(spec)["compiled_graphs"] == graphs


# Refused.


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["backbone.name=resnet19"], "backbone.name: timm has no model 'resnet19'; did you mean 'resnet1"),
        (["backbone.name=hf-hub:some/one"], "backbone.name: timm has no model"),
        (["backbone.name=densenet121", "backbone.stem=cifar"], "backbone.stem: is for timm's ResNets"),
        (["backbone.name=vgg11_bn", "backbone.width=0.5"], "backbone.width: is for timm's ResNets"),
        (["backbone.name=vit_tiny_patch16_224"], "backbone"),
        (["data.size=16"], "backbone.kind: timm needs images of at least 32 pixels a side"),
        (["norm.kind=rms"], "norm.kind: 'rms' with its options would not be used"),
        (["pooling.kind=avg"], "pooling.kind: 'avg' with its options would not be used"),
        (["backbone.stem=cifar", "backbone.pooling=spec"], "backbone.pooling: stem 'cifar' does not pool"),
        (["backbone.name=resnet26d", "backbone.norm=spec"], "backbone.norm: 'spec' needs a stem of one convolution"),
        (["backbone.norm=spec", "backbone.stem=cifar", "backbone.norm_weight=0.5"], "backbone.norm_weight: with norm"),
        (["backbone.name=ghostnet_100"], "backbone: 'blocks.1.0.ghost2.cheap_operation.0' does not lead to"),
        (["backbone.name=resnet50_gn", "backbone.width=0.1"], "backbone.name: timm can't make 'resnet50_gn' so"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(SpecError) as error:
        build("resnet18", *overrides)
    assert str(error.value).startswith(reason) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# Export.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network of timm's, on the digits."""
    from asge_zoo.engine.train import train

    raw = {
        "name": "test",
        "data": {"kind": "digits", "validation": 1000, "size": 32},
        "backbone": {"kind": "timm", "name": "resnet18", **NARROW},
        "train": {"epochs": 1, "compile": False},
    }
    folder = tmp_path_factory.mktemp("timm") / "run"
    train(load_spec(raw), run_dir=folder, device="cpu")
    return folder


def test_export(run: Path, tmp_path: Path, cli: Callable[..., Said]) -> None:
    """timm loads the file strictly, and gives the features that the trained network gives."""
    import asge_zoo

    file = tmp_path / "backbone.safetensors"
    said = cli("export", run, "--timm", file, "--json")
    assert said.code == 0, said.err
    model = timm.create_model(**json.loads(said.out)["create_model"])
    model.load_state_dict(safetensors.torch.load_file(file), strict=True)
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(model.eval()(images), features(asge_zoo.load(run), images), "features")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    plain = cli("export", run, "--timm", file)
    assert plain.code == 0 and "timm.create_model(model_name='resnet18', in_chans=1, num_classes=0" in plain.out


def test_export_refuses_what_timm_would_compute_otherwise(
    run: Path, trained: TrainedRun, tmp_path: Path, cli: Callable[..., Said]
) -> None:
    file = tmp_path / "backbone.safetensors"
    said = cli("export", trained.folder, "--timm", file)
    assert said.code == 2 and "its backbone is 'vgg8', and not timm's" in said.err
    said = cli("export", run, "--timm", tmp_path / "none" / "file")
    assert said.code == 2 and "can't be written" in said.err
    assert not file.exists()


def test_export_refuses_replaced_parts(tmp_path: Path, cli: Callable[..., Said]) -> None:
    from asge_zoo.engine.train import train

    raw = {
        "name": "test",
        "data": {"kind": "digits", "validation": 1300, "batch_size": 128},
        "backbone": {"kind": "timm", "name": "resnet18", "width": 0.05, "stem": "cifar", "norm": "spec"},
        "train": {"epochs": 1, "compile": False},
    }
    train(load_spec(raw), run_dir=tmp_path / "run", device="cpu")
    said = cli("export", tmp_path / "run", "--timm", tmp_path / "file")
    assert said.code == 2 and said.err.count("\n") == 1
    assert "stem and norm of 'resnet18' are not timm's own" in said.err
