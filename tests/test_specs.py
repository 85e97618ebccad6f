"""The shipped specs: each loads, says the paper's settings where it claims to, and stands in the schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asge_zoo.compiler.check import check_spec
from asge_zoo.registry import ROOMS, components
from asge_zoo.spec import json_schema, load_spec, shipped_specs

FOLDER = Path(__file__).parents[1] / "specs"
FILES = sorted(FOLDER.glob("*.json"))

# The paper's training settings, and the augmentation that stands where it is silent.
SMALL = {
    "epochs": 100,
    "batch_size": 128,
    "validation": 10000,
    "lr": 2e-4,
    "final_lr": 1e-5,
    "weight_decay": 1e-3,
    "runs": 3,
}
COLOUR = {**SMALL, "epochs": 400, "validation": 5000}
PAPER = {
    "mnist": {**SMALL, "augment": {"crop_padding": 0, "flip": False}},
    "fashion_mnist": {**SMALL, "augment": {"crop_padding": 0, "flip": True}},
    "cifar10": {**COLOUR, "augment": {"crop_padding": 4, "flip": True}},
    "cifar100": {**COLOUR, "augment": {"crop_padding": 4, "flip": True}},
}
FULL_SIZE = [f"{backbone}_{data}" for backbone in ("vgg8", "vgg11") for data in PAPER]
RESNETS = ["resnet18_cifar10", "resnet18_cifar10_quarter", "resnet50_cifar100"]
IMAGENET = {
    "epochs": 45,
    "batch_size": 512,
    "validation": 10000,
    "lr": 0.05,
    "final_lr": 0.0005,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "augment": {"scale": [0.08, 1.0], "ratio": [0.75, 4 / 3], "flip": True},
}
LARGE = {"vgg8_imagenet": 128, "vgg11_imagenet": 128, "resnet18_imagenet": 224, "resnet50_imagenet": 224}
# The method's parts as the paper has them, and as the README says where it is silent.
METHOD = {
    "pooling": {"kind": "rms"},
    "norm": {"kind": "layer", "affine": False, "eps": 1e-5},
    "rule": {
        "kind": "asge",
        "goodness": {"kind": "spatial", "alpha": 1.0, "bins": "adaptive"},
        "projection": {"kind": "gaussian", "scale": "std"},
    },
    "prediction": {"kind": "fusion", "features": "normalized", "lr": None},
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_loads_under_its_own_name(file: Path) -> None:
    spec = load_spec(file)
    assert spec.name == file.stem
    check_spec(spec)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_writes_out_what_is_worth_reading(file: Path) -> None:
    """A reader finds every component in the file, with its kind."""
    raw = json.loads(file.read_text())
    assert raw["schema_version"] == 1
    for part in ("data", "backbone", "pooling", "norm", "rule", "prediction", "optimizer", "schedule"):
        assert raw[part]["kind"]


def test_all_of_them_are_shipped() -> None:
    assert set(shipped_specs()) == {file.stem for file in FILES}
    expected = {*FULL_SIZE, *RESNETS, *LARGE, *(f"{name}_bp" for name in (*FULL_SIZE, *RESNETS, *LARGE))}
    assert expected | {"vgg11_imagenet_sample", "vgg8_digits", "vgg8_mnist_quarter", "vgg8_cifar10_quarter"} <= set(
        shipped_specs()
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_names_the_packages_it_needs(file: Path) -> None:
    """So that where one is missing, the error says what to install."""
    recorded = json.loads(file.read_text()).get("plugins", [])
    assert recorded == load_spec(file).resolved().get("plugins", [])


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_has_the_papers_settings(name: str) -> None:
    resolved = load_spec(FOLDER / f"{name}.json").resolved()
    backbone, _, data = name.partition("_")
    assert (resolved["backbone"]["kind"], resolved["backbone"]["width"]) == (backbone, 1.0)
    assert (resolved["data"]["kind"], resolved["data"]["size"]) == (data, None)
    assert (resolved["optimizer"]["kind"], resolved["schedule"]["kind"]) == ("adamw", "cosine")
    found = {**resolved["data"], **resolved["optimizer"], **resolved["schedule"], **resolved["train"]}
    assert {key: found[key] for key in PAPER[data]} == PAPER[data]
    assert {part: resolved[part] for part in METHOD} == METHOD


@pytest.mark.parametrize(("name", "size"), LARGE.items())
def test_imagenet_has_the_papers_settings(name: str, size: int) -> None:
    """And, where it is silent, the resolution that the README names; stems as on small images, or timm's."""
    resolved = load_spec(FOLDER / f"{name}.json").resolved()
    assert (resolved["data"]["kind"], resolved["data"]["size"]) == ("imagenet", size)
    assert (resolved["optimizer"]["kind"], resolved["schedule"]["kind"]) == ("sgd", "cosine")
    assert (
        resolved["backbone"].get("stem_stride", 1) == 1 and resolved["backbone"].get("stem", "imagenet") == "imagenet"
    )
    found = {**resolved["data"], **resolved["optimizer"], **resolved["schedule"], **resolved["train"]}
    assert {key: found[key] for key in IMAGENET} == IMAGENET
    assert {part: resolved[part] for part in METHOD} == METHOD


@pytest.mark.parametrize("name", ["resnet18_cifar10", "resnet50_cifar100"])
def test_resnets_have_the_papers_settings(name: str) -> None:
    """And batch norm as timm has it, which did better on validation than the spec's norm behind each unit, but for its
    weights' start."""
    resolved = load_spec(FOLDER / f"{name}.json").resolved()
    backbone, _, data = name.partition("_")
    assert resolved["data"]["kind"] == data
    assert resolved["backbone"] == {
        "kind": "timm",
        "name": backbone,
        "cut": "conv",
        "width": 1.0,
        "stem": "cifar",
        "norm": "keep",
        "norm_weight": 0.2,
        "pooling": "keep",
    }
    found = {**resolved["data"], **resolved["optimizer"], **resolved["schedule"], **resolved["train"]}
    assert {key: found[key] for key in PAPER[data]} == PAPER[data]
    assert {part: resolved[part] for part in METHOD} == METHOD


@pytest.mark.parametrize("name", [*FULL_SIZE, *RESNETS])
def test_the_control_differs_in_rule_and_prediction_alone(name: str) -> None:
    spec, control = (load_spec(FOLDER / f"{stem}.json").resolved() for stem in (name, f"{name}_bp"))
    assert {key for key in spec if spec[key] != control[key]} == {"name", "rule", "prediction"}
    assert control["rule"] == {"kind": "bp"}
    assert control["prediction"] == {"kind": "last", "features": "normalized", "lr": spec["prediction"]["lr"]}


@pytest.mark.parametrize(
    ("name", "width", "data"),
    [
        ("vgg8_digits", 0.25, "digits"),
        ("vgg8_mnist_quarter", 0.25, "mnist"),
        ("vgg8_cifar10_quarter", 0.25, "cifar10"),
        ("resnet18_cifar10_quarter", 0.25, "cifar10"),
        ("vgg8_mnist_cwc", 0.3125, "mnist"),
        ("vgg8_mnist_deeper_forward", 0.3125, "mnist"),
        ("vgg8_mnist_ff", 0.25, "mnist"),
        ("vgg8_mnist_symba", 0.25, "mnist"),
    ],
)
def test_cpu_sized(name: str, width: float, data: str) -> None:
    resolved = load_spec(FOLDER / f"{name}.json").resolved()
    assert resolved["backbone"]["width"] == width
    assert resolved["data"]["kind"] == data
    assert resolved["train"]["runs"] == 1
    if data != "digits":
        assert resolved["train"]["epochs"] == 10


# The JSON Schema, by which editors complete.


def objects_in(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that describes an object."""
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        for value in schema.values():
            yield from objects_in(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from objects_in(value)


def follow(schema: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The definition that a `$ref` points to, or the same part where there is none."""
    return schema["$defs"][reference["$ref"].removeprefix("#/$defs/")] if "$ref" in reference else reference


def assert_described(schema: dict[str, Any], part: dict[str, Any], value: dict[str, Any], path: str) -> None:
    """Every key of `value`, and of the objects in it, stands in the schema; every required one in `value`."""
    part = follow(schema, part)
    if "oneOf" in part:
        choices = [follow(schema, choice) for choice in part["oneOf"]]
        fitting = [choice for choice in choices if choice["properties"]["kind"]["const"] == value["kind"]]
        assert len(fitting) == 1, f"{path}: kind {value['kind']} stands {len(fitting)} times in the schema"
        part = fitting[0]
    assert set(value) <= set(part["properties"]), path
    assert set(part.get("required", [])) <= set(value), path
    for key, inner in value.items():
        if isinstance(inner, dict):
            assert_described(schema, part["properties"][key], inner, f"{path}.{key}")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_schema_describes_it(file: Path) -> None:
    resolved = load_spec(file).resolved()
    schema = json_schema()  # once the plugins that the spec names are loaded
    assert_described(schema, schema, json.loads(file.read_text()), file.stem)
    assert_described(schema, schema, resolved, file.stem)


def test_the_schema_forbids_unknown_keys_everywhere() -> None:
    found = list(objects_in(json_schema()))
    assert len(found) > sum(len(components(group)) for group in ROOMS)
    assert all(part.get("additionalProperties") is False for part in found)


@pytest.mark.parametrize("group", ROOMS)
def test_the_schema_knows_every_kind(group: str) -> None:
    kinds = [part["properties"]["kind"] for part in objects_in(json_schema()) if "kind" in part["properties"]]
    assert set(components(group)) <= {kind.get("const") for kind in kinds}  # that of an origin is any string


@pytest.mark.parametrize(
    ("part", "unnamed"),
    [
        ("data", []),
        ("backbone", []),
        ("pooling", ["rms"]),
        ("norm", ["layer"]),
        ("rule", ["asge"]),
        ("prediction", ["fusion"]),
        ("optimizer", ["adamw"]),
        ("schedule", ["cosine"]),
    ],
)
def test_the_schema_lets_the_default_kind_alone_go_unnamed(part: str, unnamed: list[str]) -> None:
    schema = json_schema()
    choices = [follow(schema, choice) for choice in schema["properties"][part]["oneOf"]]
    free = [c["properties"]["kind"]["const"] for c in choices if "kind" not in c.get("required", [])]
    assert free == unnamed


def test_the_schema_is_json_and_asks_for_what_has_no_default() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["name", "data", "backbone"]
    assert schema["properties"]["train"].get("$ref") == "#/$defs/Train"
