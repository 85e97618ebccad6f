"""The plan: Table 1's partitions, Table 3's figures, the words of the report and their units."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Said
from tiny import tiny_spec

from asge_zoo.compiler.plan import plan
from asge_zoo.spec import load_spec

CHANNELS = [128, 256, 256, 512, 512, 512, 512]
SIDES = [32, 32, 16, 16, 8, 4, 2]
# Table 3, on CIFAR-100 with batches of 128: the classifier's parameters, and the bytes kept for it.
TABLE_3 = {"fusion": (256_600, 1_310_720), "last": (51_300, 262_144), "best": (0, 0)}
BACKPROP_BYTES = 157_286_400
# Table 1: patches per side for 128, 256 and 512 channels.
TABLE_1: dict[float, tuple[int, int, int]] = {
    0.0: (1, 1, 1),
    0.5: (2, 1, 1),
    1.0: (4, 2, 1),
    1.5: (6, 3, 1),
    2.0: (8, 4, 2),
}
UNIT_KEYS = {
    "name",
    "channels",
    "height",
    "width",
    "partition",
    "goodness_dim",
    "parameters",
    "macs",
    "activation_bytes",
}


def planned(*overrides: str, spec: str = "vgg8_cifar100") -> dict[str, Any]:
    """The plan of a shipped spec."""
    return plan(load_spec(spec, overrides=overrides))


@pytest.mark.parametrize("kind", TABLE_3)
def test_table_3(kind: str) -> None:
    prediction = planned(f"prediction.kind={kind}")["prediction"]
    assert prediction == {
        "kind": kind,
        "parameters": TABLE_3[kind][0],
        "activation_bytes": TABLE_3[kind][1],
    }


@pytest.mark.parametrize("overrides", [("prediction.kind=fusion",), ("prediction.kind=last",), ("rule.kind=bp",)])
def test_table_3_backpropagation(overrides: tuple[str, ...]) -> None:
    found = planned(*overrides)
    assert found["batch_size"] == 128
    assert found["memory"]["backprop_bytes"] == BACKPROP_BYTES
    assert sum(unit["activation_bytes"] for unit in found["units"]) == BACKPROP_BYTES


@pytest.mark.parametrize("alpha", TABLE_1)
def test_table_1(alpha: float) -> None:
    units = planned(f"rule.goodness.alpha={alpha}")["units"]
    by_channels: dict[int, int] = dict(zip([128, 256, 512], TABLE_1[alpha], strict=True))
    assert [unit["partition"] for unit in units] == [by_channels[channels] for channels in CHANNELS]
    assert [unit["goodness_dim"] for unit in units] == [c * by_channels[c] ** 2 for c in CHANNELS]


def test_units_of_vgg8() -> None:
    found = planned()
    entering = [3, *CHANNELS[:-1]]
    pooled = [32, 16, 16, 8, 4, 2, 2]
    assert found["input"] == [3, 32, 32] and found["num_classes"] == 100
    for index, unit in enumerate(found["units"]):
        channels, side = CHANNELS[index], SIDES[index]
        assert unit["name"] == f"conv{index + 1}"
        assert (unit["channels"], unit["height"], unit["width"]) == (channels, side, side)
        assert unit["parameters"] == channels * entering[index] * 9 + channels
        assert unit["macs"] == channels * entering[index] * 9 * side**2
        assert unit["activation_bytes"] == channels * pooled[index] ** 2 * 128 * 4


def test_totals_of_vgg8() -> None:
    found = planned()
    assert found["totals"]["units"] == 7
    assert found["totals"]["macs"] == 956_694_528
    assert found["totals"]["parameters"] == sum(unit["parameters"] for unit in found["units"]) + TABLE_3["fusion"][0]


@pytest.mark.parametrize("kind", TABLE_3)
def test_local_bytes_are_the_largest_units_and_the_predictions(kind: str) -> None:
    """VGG8's second unit is the largest: its input, its activation before pooling, its goodness of 256 · 2²."""
    largest = (128 * 32 * 32 + 256 * 32 * 32 + 256 * 4) * 128 * 4
    assert planned(f"prediction.kind={kind}")["memory"]["local_bytes"] == largest + TABLE_3[kind][1]


def test_extra_conv_adds_one_unit() -> None:
    before, after = planned("prediction.kind=best"), planned("prediction.kind=best", "backbone.extra_conv=true")
    assert after["units"][:7] == before["units"]
    assert after["units"][7:] == [{**before["units"][6], "name": "conv8"}]


@pytest.mark.parametrize(
    ("override", "factor"), [("data.batch_size=64", 0.5), ("data.batch_size=256", 2), ("train.precision=bfloat16", 1)]
)
def test_bytes_grow_with_the_batch_alone(override: str, factor: float) -> None:
    assert planned(override)["memory"]["backprop_bytes"] == BACKPROP_BYTES * factor
    assert planned(override)["prediction"]["activation_bytes"] == TABLE_3["fusion"][1] * factor


def test_bp_has_no_goodness() -> None:
    found = planned(spec="vgg8_cifar100_bp")
    assert [(unit["partition"], unit["goodness_dim"]) for unit in found["units"]] == [(0, 0)] * 7
    assert found["prediction"] == {"kind": "last", "parameters": 51_300, "activation_bytes": 262_144}


@pytest.mark.parametrize(("compiled", "graphs"), [("true", 1), ("false", 0)])
def test_compiled_graphs(compiled: str, graphs: int) -> None:
    assert planned(f"train.compile={compiled}")["compiled_graphs"] == graphs


def test_vgg11() -> None:
    found = planned(spec="vgg11_cifar100")
    assert [unit["channels"] for unit in found["units"]] == [128, 128, 128, 256, 256, 512, 512, 512, 512, 512]
    assert [unit["height"] for unit in found["units"]] == [32, 32, 32, 32, 16, 16, 8, 8, 4, 2]


@pytest.mark.parametrize("spec", ["vgg8_digits", "vgg8_cifar100", "vgg11_mnist_bp"])
def test_json_has_the_contracts_keys(spec: str, cli: Callable[..., Said]) -> None:
    said = cli("explain", spec, "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    assert found == planned(spec=spec)
    assert {"name", "input", "num_classes", "batch_size", "units", "prediction", "memory"} <= set(found)
    assert all(set(unit) >= UNIT_KEYS for unit in found["units"])
    assert set(found["prediction"]) >= {"kind", "parameters", "activation_bytes"}
    assert set(found["memory"]) >= {"backprop_bytes", "local_bytes"}
    assert found["name"] == spec


def test_people_read_the_same_figures(cli: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = cli("explain", "vgg8_cifar100")
    assert (said.code, said.err) == (0, "")
    for figure in ("956,694,528", "256,600", "1,310,720", "157,286,400", "conv7", "32×32", "compiled graphs: 1"):
        assert figure in said.out


def test_the_plan_reads_no_data_and_draws_nothing() -> None:
    """The same spec gives the same plan, a tiny one too; nothing random is in it."""
    assert plan(tiny_spec()) == plan(tiny_spec())
    assert [unit["channels"] for unit in plan(tiny_spec())["units"]] == [6, 13, 13, 26, 26, 26, 26]
