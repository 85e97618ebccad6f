"""Forward-forward rules: their promises, their losses and gradients by hand, what they see and what they refuse."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from asge_zoo_forward_forward.groups import ChannelGroups, CwC, DeeperForward, GroupMean
from asge_zoo_forward_forward.labels import class_waves, other_labels
from asge_zoo_forward_forward.norm import GroupNorm
from asge_zoo_forward_forward.pairs import FF, LabelPairs, MeanSquare, SymBa
from asge_zoo_forward_forward.prediction import Sum, UnitRange
from pydantic import ValidationError
from torch import Tensor

from asge_zoo.cli.main import run
from asge_zoo.compiler.build import compile_spec
from asge_zoo.engine import train as engine
from asge_zoo.engine.train import train
from asge_zoo.errors import DivergenceError, SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.registry import Component
from asge_zoo.spec import Spec, load_spec
from asge_zoo.testing import Promise, promises

PAIRS, GROUPS = ("ff.ff", "ff.symba"), ("ff.cwc", "ff.deeper_forward")
MADE: list[tuple[type[Component], dict[str, Any]]] = [
    (FF, {}),
    (SymBa, {}),
    (CwC, {}),
    (DeeperForward, {}),
    (GroupNorm, {}),
    (Sum, {}),
    (Sum, {"first": -3, "last": -2}),
    (Sum, {"first": 0, "choose": True}),
]
PROMISES = [
    pytest.param(promise, id=f"{component.__name__} {options}: {promise}")
    for component, options in MADE
    for promise in promises(component, **options)
]


@pytest.mark.parametrize("promise", PROMISES)
def test_promise(promise: Promise) -> None:
    promise.check()


def tiny(kind: str, prediction: Any = None, **overrides: Any) -> Spec:
    """A rule, by its kind, in VGG8 of 10 to 40 channels, on digits: six steps an epoch."""
    values = {
        "name": "forward",
        "data": {"kind": "digits", "validation": 1000, "batch_size": 64},
        "backbone": {"kind": "vgg8", "width": 10 / 128},
        "rule": {"kind": kind},
        "prediction": prediction or {"kind": "ff.sum"},
        "train": {"epochs": 1, "compile": False},
    }
    return load_spec({**values, **overrides})


def some(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Labels.


def test_a_wrong_label_is_never_the_right_one() -> None:
    torch.manual_seed(0)
    labels = torch.arange(10).repeat_interleave(900)
    wrong = other_labels(labels, 10)
    assert not (wrong == labels).any() and wrong.min() == 0 and wrong.max() == 9
    counts = torch.zeros(10, 10).index_put((labels, wrong), torch.ones(9000), accumulate=True)
    assert ((counts - 100).abs()[~torch.eye(10, dtype=torch.bool)] < 50).all(), "uniform over the nine others"
    assert torch.equal(other_labels(torch.tensor([0, 1]), 2), torch.tensor([1, 0]))


@pytest.mark.parametrize("num_classes", [10, 100])
def test_each_class_has_a_wave_of_its_own(num_classes: int) -> None:
    waves = class_waves(num_classes, 28, 28)
    assert waves.shape == (num_classes, 28, 28) and waves.abs().max() <= 1
    assert (waves.square().mean((1, 2)) - 0.5).abs().max() < 0.1, "equally strong"
    likeness = torch.corrcoef(waves.flatten(1)) - torch.eye(num_classes)
    assert likeness.abs().max() < 0.8
    if num_classes == 10:
        assert likeness.abs().max() < 0.3


# Losses by hand, and their gradients in closed form.


def test_losses_of_pairs() -> None:
    right, wrong = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    sigmoid = [1 / (1 + math.exp(-x)) for x in (3 - 2, 1 - 2, 1 - 2, 2 - 2)]
    entropy = -sum(math.log(p) for p in (sigmoid[0], sigmoid[1], 1 - sigmoid[2], 1 - sigmoid[3])) / 4
    assert FF(threshold=2.0, steepness=1.0).pair_loss(right, wrong).item() == pytest.approx(entropy)
    steeper = FF(threshold=1.0, steepness=2.0).pair_loss(right / 2, wrong / 2)
    assert steeper.item() == pytest.approx(entropy), "the same of goodness and θ half as large"
    paired = (math.log(1 + math.exp(-0.5 * 2)) + math.log(1 + math.exp(0.5 * 1))) / 2
    assert SymBa(alpha=0.5).pair_loss(right, wrong).item() == pytest.approx(paired)
    torch.testing.assert_close(SymBa().pair_loss(right + 7, wrong + 7), SymBa().pair_loss(right, wrong))
    assert SymBa().pair_loss(right - 1e6, wrong).isfinite(), "no overflow"
    assert not torch.isclose(SymBa().pair_loss(right, wrong.flip(0)), SymBa().pair_loss(right, wrong)), "by row"


def gradient(rule: ChannelGroups | LabelPairs, classify: Any, activation: Tensor, labels: Tensor) -> Tensor:
    """Of the rule's loss, with respect to an activation."""
    activation = activation.clone().requires_grad_()
    loss, _ = rule.unit_loss(classify, activation, labels)
    return torch.autograd.grad(loss, activation)[0]


@pytest.mark.parametrize("rule", [FF(threshold=0.5, steepness=3.0), SymBa(alpha=3.0)], ids=lambda rule: rule.kind)
def test_gradients_of_pairs(rule: LabelPairs) -> None:
    """With s = 1 for the right label: FF's is k/(B·CHW) · (σ(k(G − θ)) − s) · z, SymBa's ∓2α/(B·CHW) · σ(−αΔ) · z."""
    activation, batch = some(6, 4, 3, 2), 3
    goodness = activation.square().mean((1, 2, 3))
    if isinstance(rule, FF):
        target = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat_interleave(batch)
        slope = rule.steepness / batch
        factor = slope * (torch.sigmoid(rule.steepness * (goodness - rule.threshold)) - target)
    else:
        assert isinstance(rule, SymBa)
        slope = rule.alpha * torch.sigmoid(-rule.alpha * (goodness[:batch] - goodness[batch:])) / batch
        factor = 2 * torch.cat([-slope, slope])
    expected = factor[:, None, None, None] * activation / 24
    found = gradient(rule, MeanSquare(), activation, torch.zeros(batch, dtype=torch.int64))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rule", [CwC(), DeeperForward()], ids=lambda rule: rule.kind)
def test_gradients_of_groups(rule: ChannelGroups) -> None:
    """(p − t) of the class over B·S·H·W; times 2y for the squared activations of CwC."""
    activation, labels = some(5, 6, 2, 4), torch.tensor([0, 1, 2, 2, 0])
    squared = isinstance(rule, CwC)
    values = activation.square() if squared else activation
    goodness = torch.stack([values[:, 2 * j : 2 * j + 2].mean((1, 2, 3)) for j in range(3)], dim=1)
    classify = GroupMean(3, squared=squared)
    torch.testing.assert_close(classify(activation), goodness)
    error = goodness.softmax(1) - torch.nn.functional.one_hot(labels, 3)
    expected = error.repeat_interleave(2, 1)[:, :, None, None].expand_as(activation) / (5 * 2 * 2 * 4)
    expected = 2 * activation * expected if squared else expected
    found = gradient(rule, classify, activation, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


# What a network sees.


@pytest.mark.parametrize("rule", PAIRS)
def test_a_step_sees_each_image_with_its_own_label_and_a_wrong_one(rule: str) -> None:
    graph = compile_spec(tiny(rule, rule={"kind": rule, "label_strength": 0.5}))
    seen = []
    graph.backbone.get_submodule("conv1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images, labels = torch.zeros(8, 1, 16, 16), torch.arange(8)
    torch.manual_seed(1)
    result = graph.step_fn(*graph.tensors(), images, labels)
    torch.manual_seed(1)
    shown = torch.cat([labels, other_labels(labels, 10)])
    torch.testing.assert_close(seen[0].detach(), 0.5 * class_waves(10, 16, 16)[shown][:, None])
    assert result.logits is None and result.unit_logits == ()
    torch.testing.assert_close(result.head_loss, result.losses.mean())


@pytest.mark.parametrize("rule", PAIRS)
def test_a_class_is_answered_by_its_own_pass(rule: str) -> None:
    graph = compile_spec(tiny(rule)).eval()
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = graph.unit_logits(images)
        for index, env in graph.walk(images + class_waves(10, 16, 16)[4]):
            goodness = env[graph.units[index].activation].square().mean((1, 2, 3))
            torch.testing.assert_close(logits[index][:, 4], goodness)
        torch.testing.assert_close(graph(images), torch.stack(logits[1:]).sum(0))


def test_group_norm_hides_the_goodness() -> None:
    """Every class's mean is zero behind it."""
    hidden = GroupNorm(groups=3).build()(some(4, 6, 5, 5).relu())
    assert GroupMean(3, squared=False)(hidden).abs().max() < 1e-12


# The sum of units.


def units() -> list[Tensor]:
    return [some(4, 10, seed=seed) for seed in range(3)]


def test_a_range_is_summed() -> None:
    logits = units()
    torch.testing.assert_close(UnitRange(1, 2)(logits), logits[1] + logits[2])
    torch.testing.assert_close(UnitRange(0, 1)(logits), logits[0] + logits[1])
    torch.testing.assert_close(UnitRange(0, 1)(logits[:2]), logits[0] + logits[1])


def test_the_range_is_chosen_on_validation_accuracy() -> None:
    strategy, head, logits = Sum(first=0, choose=True), UnitRange(0, 2), units()
    choices = strategy.alternatives(head, logits)
    assert len(choices) == 6
    for index, choice in enumerate(choices):
        accuracy = [float(other == index) for other in range(6)]
        strategy.select(head, accuracy)
        assert not strategy.select(head, accuracy)
        torch.testing.assert_close(head(logits), choice)
        assert strategy.last_unit(head, 3) == int(head.ends[1])
    assert Sum().alternatives(head, logits) == [] and not Sum().select(head, [])


@pytest.mark.parametrize(("first", "last"), [(7, None), (-8, None), (3, 2), (0, 7), (0, -8)])
def test_what_is_no_range_is_refused(first: int, last: int | None) -> None:
    with pytest.raises(SpecError, match="prediction.first: .* is no range of 7 units; choose prediction.first and"):
        compile_spec(tiny("asge", {"kind": "ff.sum", "first": first, "last": last}), device="meta")


# In runs.


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.train
@pytest.mark.parametrize("prediction", ["ff.sum", "best", "vote.weighted"])
@pytest.mark.parametrize("rule", PAIRS)
def test_a_run_of_pairs_has_no_training_accuracy(rule: str, prediction: str, tmp_path: Path) -> None:
    assert train(tiny(rule, {"kind": prediction}), run_dir=tmp_path, device="cpu").test_accuracy > 0
    (record,) = records(tmp_path)
    trained, validation = record["train"], record["validation"]
    assert trained["accuracy"] is None and trained["unit_accuracy"] == []
    assert trained["loss"] == pytest.approx(sum(trained["unit_loss"]) / 7) and len(trained["unit_loss"]) == 7
    assert len(validation["unit_accuracy"]) == len(validation["unit_loss"]) == 7
    assert (tmp_path / "curves.png").exists() and (tmp_path / "units.png").exists()


@pytest.mark.parametrize(
    "prediction",
    [{"kind": "ff.sum", "first": 0, "choose": True}, {"kind": "fusion"}, {"kind": "last"}, {"kind": "vote.early_exit"}],
    ids=lambda prediction: prediction["kind"],
)
@pytest.mark.parametrize("rule", GROUPS)
def test_a_run_of_groups(rule: str, prediction: dict[str, Any], tmp_path: Path) -> None:
    norm = {"kind": "ff.group_norm", "groups": 10}
    result = train(tiny(rule, prediction, norm=norm), run_dir=tmp_path, device="cpu")
    (record,) = records(tmp_path)
    assert len(record["train"]["unit_accuracy"]) == 7 and record["train"]["accuracy"] >= 0
    if "choose" in prediction:
        assert result.val_accuracy >= max(record["validation"]["unit_accuracy"])


@pytest.mark.train
@pytest.mark.parametrize("rule", [*PAIRS, "ff.deeper_forward"])
def test_a_broken_run_ends_as_an_unbroken_one(rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = {"kind": "ff.sum", "first": 0, "choose": True}
    spec = tiny(rule, choose, train={"epochs": 2, "compile": False, "checkpoint": {"every_steps": 4}})
    real, taken = engine.train_step, []

    def step(*arguments: Any) -> None:
        real(*arguments)
        taken.append(None)
        if len(taken) == 10:
            raise KeyboardInterrupt

    train(spec, run_dir=tmp_path / "whole", device="cpu")
    with monkeypatch.context() as broken:
        broken.setattr(engine, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(spec, run_dir=tmp_path / "broken", device="cpu")
    train(spec, run_dir=tmp_path / "broken", device="cpu", resume=True)
    for name in ("best/model.safetensors", "last/model.safetensors", "last/optimizer.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for one, two in zip(records(tmp_path / "whole"), records(tmp_path / "broken"), strict=True):
        assert (one["train"], one["validation"]) == (two["train"], two["validation"])


def test_a_loss_that_is_not_finite_names_its_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(self: FF, right: Tensor, wrong: Tensor) -> Tensor:
        return (right - wrong).mean() * math.nan

    monkeypatch.setattr(FF, "pair_loss", spoilt)
    with pytest.raises(DivergenceError, match="the loss of unit conv1 is not finite in epoch 1, step 1"):
        train(tiny("ff.ff"), run_dir=tmp_path, device="cpu")


# What does not fit is an error in the spec.


@pytest.mark.parametrize("rule", GROUPS)
def test_classes_must_divide_the_channels(rule: str) -> None:
    with pytest.raises(
        SpecError, match=f"rule.kind: {rule} needs .* 10 classes, and the 12 channels of unit 1 .*width"
    ):
        compile_spec(tiny(rule, backbone={"kind": "vgg8", "width": 12 / 128}), device="meta")


def test_validate_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["validate", "vgg8_mnist_cwc"]) == 0
    assert run(["validate", "vgg8_mnist_cwc", "--set", "backbone.width=0.25"]) == 2
    assert "the 32 channels of unit 1 are no multiple of that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prediction", "said"),
    [
        ("fusion", "'fusion' does not read the units' own logits, and rule 'ff.ff'"),
        ("last", "'last' does not read the units' own logits, and rule 'ff.ff'"),
        ("vote.early_exit", "'vote.early_exit' exits early, which rule 'ff.ff' can't"),
    ],
)
def test_pairs_serve_predictions_on_unit_logits_alone(prediction: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"prediction.kind: {said}"):
        compile_spec(tiny("ff.ff", {"kind": prediction}), device="meta")


def test_pairs_serve_neither_heads_nor_features() -> None:
    class Weighted(Sum):
        """Weighs the sum, and trains that."""

        def build(self, units: Any, num_classes: int) -> torch.nn.Module:
            return torch.nn.Linear(1, 1)

    class Looks(Sum):
        """Keeps feature maps beside the logits."""

        def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor:
            return output.mean((2, 3))

    for prediction in (Weighted(), Looks()):
        spec = tiny("ff.ff").model_copy(update={"prediction": prediction})
        with pytest.raises(SpecError, match="prediction.kind: 'ff.sum' reads feature maps or has a head to train"):
            compile_spec(spec, device="meta")


@pytest.mark.parametrize(
    ("component", "options"),
    [(FF, {"threshold": 0.0}), (FF, {"label_strength": -1.0}), (SymBa, {"alpha": 0.0}), (GroupNorm, {"groups": 0})],
)
def test_nonsense_is_refused(component: type[Component], options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        component.model_validate(options)


def test_a_network_learns_to_tell_labels_apart() -> None:
    """SymBa's loss falls in every unit."""
    graph: LocalGraph = compile_spec(tiny("ff.symba"))
    images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(graph.parameters(), lr=0.003)
    torch.manual_seed(0)
    losses = []
    for _ in range(40):
        result = graph.step(images, torch.arange(8))
        for name, parameter in graph.named_parameters():
            parameter.grad = result.grads[name]
        optimizer.step()
        losses.append(result.losses)
    assert (torch.stack(losses[-5:]).mean(0) < torch.stack(losses[:5]).mean(0)).all()
