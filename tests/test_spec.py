"""Specs: what is refused and how, overrides, and what resolving and hashing promise."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny import TINY, tiny_spec

from asge_zoo.compiler.check import check_spec
from asge_zoo.errors import DataError, SpecError
from asge_zoo.spec import Spec, apply_override, json_schema, load_spec, shipped_specs

# Overrides of the tiny spec, and what the one line that refuses them must say.
REFUSED = [
    # an unknown key, at every level
    ("tran.epochs=3", "tran: unknown key, did you mean 'train'?"),
    ("train.epoch=3", "train.epoch: unknown key, did you mean 'epochs'?"),
    ("data.batchsize=3", "data.batchsize: unknown key, did you mean 'batch_size'?"),
    ("data.augment.flipp=true", "data.augment.flipp: unknown key, did you mean 'flip'?"),
    ("backbone.widht=1", "backbone.widht: unknown key, did you mean 'width'?"),
    ("pooling.size=2", "pooling.size: unknown key; choose from kind"),
    ("norm.epss=1", "norm.epss: unknown key, did you mean 'eps'?"),
    ("rule.goodnes=1", "rule.goodnes: unknown key, did you mean 'goodness'?"),
    ("rule.goodness.alhpa=1", "rule.goodness.alhpa: unknown key, did you mean 'alpha'?"),
    ("rule.projection.scal=std", "rule.projection.scal: unknown key, did you mean 'scale'?"),
    ("prediction.feature=x", "prediction.feature: unknown key, did you mean 'features'?"),
    ("optimizer.weight_decy=0", "optimizer.weight_decy: unknown key, did you mean 'weight_decay'?"),
    ("schedule.final=0", "schedule.final: unknown key, did you mean 'final_lr'?"),
    # a wrong type or value
    ("train.epochs=ten", 'train.epochs: input should be a valid integer, got "ten"'),
    ("train.epochs=1.5", "train.epochs: input should be a valid integer, got 1.5"),
    ("train.epochs=true", "train.epochs: input should be a valid integer, got true"),
    ("train.epochs=0", "train.epochs: input should be greater than 0, got 0"),
    ("train.runs=0", "train.runs: input should be greater than 0, got 0"),
    ("train.seed=-1", "train.seed: input should be greater than or equal to 0, got -1"),
    ("train.compile=1", "train.compile: input should be a valid boolean, got 1"),
    ("train.compile=yes", 'train.compile: input should be a valid boolean, got "yes"'),
    ("train.precision=float16", "train.precision: input should be 'float32' or 'bfloat16', got \"float16\""),
    ("train=3", "train: input should be a valid dictionary"),
    ("name=3", "name: input should be a valid string, got 3"),
    ("name=a/b", "name: string should match pattern"),
    ("name=", "name: string should match pattern"),
    ("name=two\nlines", "name: string should match pattern"),
    ("schema_version=2", "schema_version: input should be 1, got 2"),
    ("rule.goodness.alpha=-0.5", "rule.goodness.alpha: input should be greater than or equal to 0, got -0.5"),
    ("rule.goodness.alpha=NaN", "rule.goodness.alpha: input should be a finite number, got NaN"),
    ("backbone.width=0", "backbone.width: input should be greater than 0, got 0"),
    ("backbone.width=-1", "backbone.width: input should be greater than 0, got -1"),
    ("backbone.width=1e999", "backbone.width: input should be a finite number, got Infinity"),
    ("backbone.width=wide", 'backbone.width: input should be a valid number, got "wide"'),
    ("backbone.dropout=1", "backbone.dropout: input should be less than 1, got 1"),
    ("data.augment.crop_padding=-1", "data.augment.crop_padding: input should be greater than or equal to 0, got -1"),
    ("optimizer.lr=0", "optimizer.lr: input should be greater than 0, got 0"),
    # an unknown or missing kind
    ("data.kind=digit", "data.kind: unknown dataset 'digit', did you mean 'digits'?"),
    ("data.kind=7", "data.kind: unknown dataset '7'; choose from cifar10, "),
    ("backbone.kind=vgg9", "backbone.kind: unknown backbone 'vgg9', did you mean 'vgg8'?"),
    ("pooling.kind=mean", "pooling.kind: unknown pooling 'mean'; choose from avg, "),
    ("norm.kind=layr", "norm.kind: unknown norm 'layr', did you mean 'layer'?"),
    ("rule.kind=asg", "rule.kind: unknown rule 'asg', did you mean 'asge'?"),
    ("rule.goodness.kind=spatal", "rule.goodness.kind: unknown goodness 'spatal', did you mean 'spatial'?"),
    ("rule.projection.kind=gauss", "rule.projection.kind: unknown projection 'gauss'"),
    ("prediction.kind=lst", "prediction.kind: unknown prediction 'lst', did you mean 'last'?"),
    ("optimizer.kind=adam", "optimizer.kind: unknown optimizer 'adam', did you mean 'adamw'?"),
    ("schedule.kind=cosin", "schedule.kind: unknown schedule 'cosin', did you mean 'cosine'?"),
    ("data={}", "data: needs a 'kind', one of cifar10, "),
    ("backbone={}", "backbone: needs a 'kind', one of "),
    ("backbone=vgg8", "backbone: must be an object with a 'kind'"),
    ("rule.goodness=null", "rule.goodness: must be an object with a 'kind'"),
]

# Parts that each are right and do not fit together.
MISFITS = [
    ("data.batch_size=438", "data.batch_size: 438 is more than the 437 training images"),
    ("data.validation=1437", "data.validation: 1437 of 1437 training images leave none to train on; lower it"),
    ("data.validation=1000000", "data.validation: 1000000 of 1437"),
    ("data.size=15", "backbone.kind: vgg8 needs images of at least 16 pixels a side"),
    ("data.size=null", "digits gives 8×8; set data.size"),
]


def refusal(*overrides: str) -> str:
    """What the tiny spec with these overrides is refused with; holds that it is one line."""
    with pytest.raises(SpecError) as caught:
        check_spec(tiny_spec(*overrides))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(("override", "said"), REFUSED)
def test_a_wrong_value_is_named_with_its_path(override: str, said: str) -> None:
    assert refusal(override).startswith(f"spec: {said}")


@pytest.mark.parametrize(("override", "said"), MISFITS)
def test_parts_that_do_not_fit_are_named(override: str, said: str) -> None:
    assert said in refusal(override)


def test_the_largest_sizes_that_fit_are_taken() -> None:
    check_spec(tiny_spec("data.batch_size=437", "data.size=16"))
    check_spec(tiny_spec("data.validation=1436", "data.batch_size=1"))


def test_best_needs_a_rule_with_local_logits() -> None:
    said = refusal("rule.kind=bp", "prediction.kind=best")
    assert "prediction.kind: 'best'" in said and "choose last or fusion" in said


def test_several_errors_are_counted() -> None:
    assert refusal("train.epochs=0", "train.seed=-1", "rule.goodness.alpha=-1").endswith("(and 2 more)")


@pytest.mark.parametrize("field", ["name", "data", "backbone"])
def test_what_has_no_default_must_be_given(field: str) -> None:
    with pytest.raises(SpecError, match=f"spec: {field}: [Ff]ield required"):
        load_spec({key: value for key, value in TINY.items() if key != field})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "must read path.to.field=value, such as train.epochs=10"),
        ("", "must read path.to.field=value"),
        ("=3", "must read path.to.field=value"),
        (".=3", "must read path.to.field=value"),
        ("train..epochs=3", "must read path.to.field=value"),
        ("train.=3", "must read path.to.field=value"),
        ("train.epochs.most=3", "train.epochs is not an object, so it has no fields"),
        ("name.first=3", "name is not an object, so it has no fields"),
    ],
)
def test_a_malformed_override_is_quoted(override: str, said: str) -> None:
    message = refusal(override)
    assert message.startswith(f"--set {override}: ") and said in message


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000], ids=["a very long number", "very deep brackets"])
def test_an_override_json_can_not_hold_is_refused(text: str) -> None:
    refusal(f"train.epochs={text}")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("a=1", 1),
        ("a=1.5", 1.5),
        ("a=2e-4", 2e-4),
        ("a=true", True),
        ("a=null", None),
        ("a=[1, 2]", [1, 2]),
        ('a={"b": 1}', {"b": 1}),
        ('a="7"', "7"),
        ("a=fusion", "fusion"),
        ("a=True", "True"),
        ("a=", ""),
        ("a=b=c", "b=c"),
        (" a =1", 1),
    ],
)
def test_an_overrides_value_is_json_or_else_a_string(override: str, value: Any) -> None:
    raw: dict[str, Any] = {}
    apply_override(raw, override)
    assert raw == {"a": value}
    assert type(raw["a"]) is type(value)


def test_overrides_go_into_nested_objects_in_order() -> None:
    raw: dict[str, Any] = {"a": {"b": {"c": 1, "d": 2}}}
    for override in ("a.b.c=3", "a.b.c=4", "a.e.f=5"):
        apply_override(raw, override)
    assert raw == {"a": {"b": {"c": 4, "d": 2}, "e": {"f": 5}}}


def test_another_kind_drops_the_old_kinds_options() -> None:
    spec = tiny_spec("rule.kind=asge", "rule.goodness.alpha=0.5", "rule.kind=bp", "prediction.kind=last")
    assert spec.resolved()["rule"] == {"kind": "bp"}
    assert spec.resolved()["prediction"]["lr"] is None


def test_the_same_kind_keeps_the_options() -> None:
    assert tiny_spec("prediction.kind=fusion").resolved()["prediction"]["lr"] == 0.005
    assert tiny_spec("prediction.kind=last", "prediction.lr=0.1").resolved()["prediction"]["lr"] == 0.1


def test_overrides_leave_the_given_values_alone() -> None:
    before = json.dumps(TINY)
    tiny_spec("train.epochs=7", "rule.kind=bp")
    assert json.dumps(TINY) == before


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rule.kind=bp", "prediction.kind=last"),
        ("prediction.kind=best", "backbone.extra_conv=true"),
        ("optimizer.kind=sgd", "norm.affine=true", "data.augment.flip=true"),
        ("data.kind=cifar100", "backbone.kind=vgg11"),
    ],
    ids=" ".join,
)
def test_a_resolved_spec_is_the_same_spec(overrides: tuple[str, ...], tmp_path: Path) -> None:
    spec = tiny_spec(*overrides)
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.resolved()))
    for again in (load_spec(spec.resolved()), load_spec(file), load_spec(str(file))):
        assert again == spec
        assert again.digest() == spec.digest()


def test_resolved_writes_every_default_out() -> None:
    resolved = tiny_spec().resolved()
    assert resolved["schedule"] == {"kind": "cosine", "final_lr": 1e-5}
    assert resolved["data"]["augment"] == {"crop_padding": 0, "flip": False}
    assert resolved["rule"]["projection"] == {"kind": "gaussian", "scale": "std"}
    assert resolved["train"] == {
        **{"epochs": 1, "seed": 0, "runs": 1, "precision": "float32", "compile": False, "deterministic": False},
        "checkpoint": {"every_epochs": 1, "every_steps": None, "every_minutes": None},
    }
    assert set(resolved) == set(Spec.model_fields) - {"schema_", "plugins"}, "and there are no plugins to record"


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "data.kind=mnist",
        "data.validation=999",
        "data.batch_size=31",
        "data.size=17",
        "data.augment.crop_padding=1",
        "data.augment.flip=true",
        "backbone.kind=vgg11",
        "backbone.width=0.06",
        "backbone.extra_conv=true",
        "backbone.bias=false",
        "backbone.init=kaiming",
        "backbone.dropout=0.1",
        "pooling.kind=avg",
        "norm.kind=rms",
        "norm.affine=true",
        "norm.eps=1e-6",
        "rule.kind=bp",
        "rule.goodness.alpha=0.5",
        "rule.goodness.bins=crop",
        "rule.projection.scale=variance",
        "prediction.kind=last",
        "prediction.features=activation",
        "prediction.lr=0.004",
        "optimizer.kind=sgd",
        "optimizer.lr=0.002",
        "optimizer.weight_decay=0",
        "schedule.final_lr=0",
        "train.epochs=2",
        "train.seed=1",
        "train.runs=2",
        "train.precision=bfloat16",
        "train.compile=true",
    ],
)
def test_any_field_changes_the_digest(override: str) -> None:
    assert tiny_spec(override).digest() != tiny_spec().digest()


def test_a_default_written_out_does_not_change_the_digest() -> None:
    assert tiny_spec("pooling.kind=rms", "schedule.final_lr=1e-5").digest() == tiny_spec().digest()
    assert tiny_spec("rule.goodness.alpha=1").digest() == tiny_spec("rule.goodness.alpha=1.0").digest()


def test_a_spec_can_not_be_changed() -> None:
    spec = tiny_spec()
    for part, field in ((spec, "name"), (spec.train, "epochs"), (spec.backbone, "width")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)


def test_for_seed_is_one_run_with_that_seed() -> None:
    spec = tiny_spec("train.runs=3", "train.seed=4")
    assert spec.for_seed(5) == tiny_spec("train.runs=1", "train.seed=5")
    assert spec.train.runs == 3


def test_an_editors_schema_key_is_taken_and_left_out() -> None:
    spec = load_spec({"$schema": "./spec.schema.json", **TINY})
    assert spec.digest() == tiny_spec().digest()
    assert "$schema" not in spec.resolved()
    assert "$schema" in json_schema()["properties"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{\n  "name": "x",\n  "data": }', "line 3, column 11"),
        ('{"name": "x"', "line 1, column 13"),
        ("", "line 1, column 1"),
        ('{"name": "x",}', "line 1, column"),
        ("\ufeff{}", "line 1, column 1"),
    ],
)
def test_malformed_json_is_named_with_its_place(text: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError, match=f"spec.json: not valid JSON at {place}") as caught:
        load_spec(file)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1]", "a spec is a JSON object, and this is none"),
        (b"3", "a spec is a JSON object, and this is none"),
        (b"\xff\xfe{}", "can't be read as a spec"),
        (b"[" * 100_000, "can't be read as a spec|not valid JSON"),
        (b'{"name": ' + b"9" * 5000 + b"}", "can't be read as a spec|not valid JSON"),
    ],
    ids=["list", "number", "not text", "very deep", "very long number"],
)
def test_a_file_that_is_no_spec_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_bytes(content)
    with pytest.raises(SpecError, match=said) as caught:
        load_spec(file)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file, nor a shipped spec"):
        load_spec(tmp_path)


def test_a_missing_file_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such file, nor a shipped spec; `asge-zoo ls specs` lists those"):
        load_spec(tmp_path / "none.json")


def test_a_shipped_spec_goes_by_its_name() -> None:
    assert load_spec("vgg8_digits") == load_spec(shipped_specs()["vgg8_digits"])


def test_a_file_here_goes_before_a_shipped_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vgg8_digits").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    assert load_spec("vgg8_digits").name == "tiny"


def test_data_errors_and_spec_errors_are_bad_input() -> None:
    assert SpecError.exit_code == DataError.exit_code == 2
