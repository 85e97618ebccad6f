"""`asge-zoo bench`: steps side by side, both loaders on the same pictures, commands."""

import importlib.util
import json
import multiprocessing
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import Said
from pictures import make_folder
from torch import nn

from asge_zoo import registry
from asge_zoo.backbones.base import Backbone
from asge_zoo.bench.closed_form import ClosedForm, has_closed_form
from asge_zoo.bench.kernels import bare_kernels, convolutions
from asge_zoo.bench.measure import peak_bytes, process_peak_bytes
from asge_zoo.bench.share import own_process
from asge_zoo.bench.variants import random_batch, variants
from asge_zoo.compiler.build import compile_spec
from asge_zoo.errors import ZooError
from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.ops.transfer import Transfer
from asge_zoo.spec import load_spec

Cli = Callable[..., Said]
needs_ffcv = pytest.mark.skipif(importlib.util.find_spec("ffcv") is None, reason="ffcv is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")


@needs_ffcv
def test_both_loaders_are_timed_at_every_size(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path / "pictures", classes=2, per_class=160)
    where = ["bench", "--data", tmp_path / "pictures", "--workers", "1", "--rounds", "2", "--device", "cpu"]
    said = cli(*where, "--size", "32", "--size", "48", "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert list(found["sizes"]) == ["32", "48"]
    assert found["loaders"] == {name: found["sizes"]["32"][name] for name in ("ffcv", "torch")}
    assert (found["pictures"], found["workers"], found["rounds"]) == (320, 1, 2)
    assert found["versions"]["ffcv"] and found["cpus"] >= 1 and found["device"]
    for measured in found["sizes"].values():
        for name in ("ffcv", "torch"):
            pace = measured[name]
            assert 0 < pace["lowest"] <= pace["images_per_second"] <= pace["highest"]
        assert measured["ratio"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures"]


@needs_ffcv
def test_too_few_pictures_are_one_line(cli: Cli, tmp_path: Path) -> None:
    make_folder(tmp_path, classes=2, per_class=2)
    said = cli("bench", "--data", tmp_path)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "has 4 pictures, and" in said.err


@needs_ffcv
def test_no_pictures_are_one_line(cli: Cli, tmp_path: Path) -> None:
    said = cli("bench", "--data", tmp_path / "nowhere")
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert f"{tmp_path / 'nowhere'}: no such folder" in said.err


class ThreeConvolutions(Backbone):
    """Wide maps, one of them pooled, and little to compile."""

    kind: Literal["test_bench_three"] = "test_bench_three"

    def build(self, in_channels: int, *, pooling: Pooling, norm: Norm) -> nn.Module:
        layers = OrderedDict[str, nn.Module]()
        for number, (entering, leaving) in enumerate(((in_channels, 16), (16, 16), (16, 16))):
            layers[f"conv{number}"] = nn.Conv2d(entering, leaving, kernel_size=3, padding=1, bias=number > 0)
            layers[f"relu{number}"] = nn.ReLU()
            pool = pooling.build(2) if number == 1 else None
            layers[f"transfer{number}"] = Transfer(pooling=pool, dropout=0.0, norm=norm.build())
        return nn.Sequential(layers)


SPEC: dict[str, Any] = {
    "name": "bench",
    "data": {"kind": "digits", "validation": 180, "batch_size": 32, "size": 32},
    "backbone": {"kind": "test_bench_three"},
}


@pytest.fixture
def spec_file(own_registry: None, tmp_path: Path) -> Path:
    """A spec of three convolutions."""
    registry.register(ThreeConvolutions)
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(SPEC))
    return file


@pytest.mark.compile
def test_steps_are_compared(cli: Cli, spec_file: Path, tmp_path: Path) -> None:
    said = cli("bench", spec_file, "--rounds", "3", "--device", "cpu", "--json", "--plot", tmp_path / "bars.png")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    names = ["kernels", "asge_compiled", "asge_eager", "bp_compiled", "bp_eager", "asge_closed_form", "layer_loop"]
    assert list(found["variants"]) == names
    assert (found["batch_size"], found["precision"], found["rounds"]) == (32, "float32", 3)
    assert found["device"] and found["versions"]["torch"]
    for name, measured in found["variants"].items():
        assert 0 < measured["lowest_ms"] <= measured["ms"] <= measured["highest_ms"]
        assert measured["images_per_second"] == pytest.approx(32_000 / measured["ms"])
        assert measured["of_kernels"] > 0 and measured["of_bp_compiled"] > 0
        assert ("peak_bytes" in measured) == (name != "kernels")
    ours, theirs = found["variants"]["asge_compiled"], found["variants"]["bp_compiled"]
    assert ours["of_kernels"] > found["variants"]["kernels"]["of_kernels"] == 1
    one_map = 32 * 16 * 32 * 32 * 4
    assert one_map < ours["peak_bytes"] < theirs["peak_bytes"] < 20 * one_map
    for name in ("asge_compiled", "bp_compiled"):
        assert found["variants"][name]["compile_seconds"]["cold"] > found["variants"][name]["compile_seconds"]["warm"]
    assert found["variants"]["bp_eager"]["compile_seconds"] is None
    chosen = {name for name, measured in found["variants"].items() if "chosen" in measured}
    assert chosen == {"kernels", "bp_compiled", "bp_eager", "layer_loop"}
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_of_ours_that_ends_is_one_line(spec_file: Path) -> None:
    spec, key = load_spec(spec_file, overrides=["train.compile=false"]), ("asge_eager", "")
    with own_process(spec, torch.device("cpu")) as other:
        assert other.warm_up([key]) == {key: None}
        assert other.step_seconds(key) > 0
        (process,) = multiprocessing.active_children()
        process.kill()
        with pytest.raises(ZooError, match="has ended; where memory ran out, give a lower --batch-size") as caught:
            other.step_seconds(key)
        assert len(str(caught.value).splitlines()) == 1
    assert multiprocessing.active_children() == []


def test_a_process_of_ours_ends_in_order_when_interrupted(spec_file: Path) -> None:
    """Killed, it would leave semaphores, of which Python warns at its end."""
    spec, key = load_spec(spec_file, overrides=["train.compile=false"]), ("asge_eager", "")
    started = []
    with pytest.raises(KeyboardInterrupt), own_process(spec, torch.device("cpu")) as other:
        other.warm_up([key])
        started += multiprocessing.active_children()
        raise KeyboardInterrupt
    assert [process.exitcode for process in started] == [0]


def test_the_floor_is_every_convolution_once(spec_file: Path) -> None:
    """With its own bias or none, forward and weight gradient: what autograd gives for them."""
    network = ThreeConvolutions().build(3, pooling=load_part("pooling"), norm=load_part("norm"))
    found = convolutions(network.to("meta"), (3, 8, 8), batch_size=2)
    assert [(each.input, each.weight, each.bias) for each in found] == [
        ((2, 3, 8, 8), (16, 3, 3, 3), False),
        ((2, 16, 8, 8), (16, 16, 3, 3), True),
        ((2, 16, 4, 4), (16, 16, 3, 3), True),
    ]
    gradients = [
        x for x in bare_kernels(found, torch.float32, torch.device("cpu"), torch.channels_last)() if x.numel() > 1
    ]
    assert [tuple(x.shape) for x in gradients] == [(16, 3, 3, 3), (16, 16, 3, 3), (16,), (16, 16, 3, 3), (16,)]


def load_part(field: str) -> Any:
    """A spec's component by default."""
    return getattr(load_spec(SPEC | {"backbone": {"kind": "vgg8"}}), field)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_closed_form_is_the_step(precision: str, spec_file: Path) -> None:
    spec = load_spec(spec_file, overrides=["train.compile=false", f"train.precision={precision}"])
    graph, batch = compile_spec(spec), random_batch(spec, torch.device("cpu"))
    assert has_closed_form(graph)
    with torch.no_grad():
        found = ClosedForm(graph).gradients(*graph.tensors(), *batch)
    expected = graph.step(*batch).grads
    assert found.keys() == expected.keys() - set(graph.head_parameters)
    for name, gradient in found.items():
        tolerance = {"float32": 1e-5, "bfloat16": 2e-2}[precision]
        assert (gradient - expected[name]).abs().max() <= tolerance * expected[name].abs().max(), name


def test_a_plain_loop_learns_what_the_step_learns(spec_file: Path) -> None:
    """One step of each, by SGD, from the same weights."""
    spec = load_spec(spec_file, overrides=["optimizer.kind=sgd", "train.compile=false"])
    batch = random_batch(spec, torch.device("cpu"))
    before = compile_spec(spec).state_dict()
    after = [_trained(next(iter(variants(spec, batch)[name].values())).make()) for name in ("asge_eager", "layer_loop")]
    for name, one in after[0].items():
        assert torch.allclose(one, after[1][name], rtol=0, atol=1e-6), name
    assert any(not torch.equal(one, before[name]) for name, one in after[0].items())


def _trained(run: Any) -> dict[str, torch.Tensor]:
    run()
    owner = next(cell.cell_contents for cell in run.__closure__ if hasattr(cell.cell_contents, "graph"))
    return owner.graph.state_dict()


def test_without_a_closed_form_or_local_units_the_rest_is_compared() -> None:
    cpu = torch.device("cpu")
    uneven = load_spec("vgg8_digits", overrides=["rule.goodness.alpha=1.5"])
    assert "asge_closed_form" not in variants(uneven, random_batch(uneven, cpu))
    bp = load_spec("vgg8_digits", overrides=["rule.kind=bp", "prediction.kind=last"])
    assert set(variants(bp, random_batch(bp, cpu))) == {
        "kernels",
        "asge_compiled",
        "asge_eager",
        "bp_compiled",
        "bp_eager",
    }


def test_memory_is_what_is_held_at_once() -> None:
    cpu, size = torch.device("cpu"), 2**24

    def one_after_the_other() -> None:
        for _ in range(2):
            torch.ones(size // 4)

    def at_once() -> list[torch.Tensor]:
        return [torch.ones(size // 4) for _ in range(2)]

    assert peak_bytes(one_after_the_other, cpu) == size
    assert peak_bytes(at_once, cpu) == 2 * size
    resident = process_peak_bytes(at_once)
    assert resident is None or 1.5 * size < resident < 3 * size


def test_commands_are_timed(cli: Cli) -> None:
    said = cli("bench", "--startup", "--rounds", "1", "--json")
    assert (said.code, said.err) == (0, "")
    commands = json.loads(said.out)["commands"]
    assert list(commands) == [
        *("asge-zoo --help", "asge-zoo validate vgg8_digits", "asge-zoo ls specs", "import asge_zoo")
    ]
    for measured in commands.values():
        assert 0 < measured["lowest_ms"] <= measured["ms"] <= measured["highest_ms"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of SPEC, --data FOLDER and --startup"),
        (["vgg8_digits", "--startup"], "one of SPEC, --data FOLDER and --startup"),
        (["--startup", "--batch-size", "8"], "--batch-size goes with SPEC"),
        (["vgg8_digits", "--workers", "1"], "--workers goes with --data"),
        (["vgg8_digits", "--batch-size", "5000"], "data.batch_size"),
        (["vgg9"], "vgg9"),
    ],
)
def test_what_can_not_be_measured_is_one_line(arguments: list[str], words: str, cli: Cli) -> None:
    said = cli("bench", *arguments)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert words in said.err
