"""Training: what a run comes to, what it leaves behind, and that it comes to the same again."""

import itertools
import json
import os
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Said, TrainedRun
from tiny import TINY, tiny_spec
from torch import Tensor

from asge_zoo.data.base import Images
from asge_zoo.data.digits import Digits
from asge_zoo.engine import train as engine
from asge_zoo.engine.loading import load_checkpoint
from asge_zoo.engine.run_dir import choose_run_dir
from asge_zoo.engine.train import train
from asge_zoo.errors import CheckpointError, DivergenceError
from asge_zoo.evaluate import Evaluation

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = 7
BP = ("rule.kind=bp", "prediction.kind=last")
BEST = ("prediction.kind=best", "backbone.extra_conv=true")
DROPOUT = ("backbone.dropout=0.2",)
BFLOAT16 = ("train.precision=bfloat16",)
SGD = ("optimizer.kind=sgd", "optimizer.lr=0.01")
AUGMENTED = ("data.augment.crop_padding=2", "data.augment.flip=true")


def records_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, read without the package."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """The same spec, progress and settings, and bitwise the same weights and moments."""
    for name in ("spec.json", "model.safetensors", "optimizer.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (json.loads((folder / "state.json").read_text()) for folder in (one, two))
    assert {key: first[key] for key in first if "seconds" not in key} == {
        key: second[key] for key in second if "seconds" not in key
    }


def assert_png(file: Path) -> None:
    """A PNG of a readable size."""
    head = file.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    assert width >= 400 and height >= 300


# The same again.


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("overrides", [("train.epochs=2",), BP, BEST, DROPOUT, BFLOAT16, SGD, AUGMENTED], ids=" ".join)
def test_the_same_seed_gives_bitwise_the_same(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, projections, moments and figures; whatever was drawn before."""
    spec = tiny_spec(*overrides)
    torch.manual_seed(1)
    first = train(spec, run_dir=tmp_path / "first", device="cpu")
    torch.manual_seed(2)
    second = train(spec, run_dir=tmp_path / "second", device="cpu")
    for checkpoint in ("best", "last"):
        assert_same_checkpoint(tmp_path / "first" / checkpoint, tmp_path / "second" / checkpoint)
    assert first.test_accuracy == second.test_accuracy
    assert first.unit_test_accuracy == second.unit_test_accuracy
    timed = ("seconds", "images_per_second")
    for one, two in zip(records_of(tmp_path / "first"), records_of(tmp_path / "second"), strict=True):
        assert {key: one[key] for key in one if key not in timed} == {key: two[key] for key in two if key not in timed}


@pytest.mark.usefixtures("no_pictures")
def test_another_seed_gives_another_network(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(tiny_spec(f"train.seed={seed}"), run_dir=tmp_path / str(seed), device="cpu")
    first, second = (weights_of(tmp_path / str(seed) / "last") for seed in (0, 1))
    assert first.keys() == second.keys()
    assert not [name for name in first if torch.equal(first[name], second[name])]


@pytest.mark.usefixtures("no_pictures")
def test_what_a_spec_asks_for_changes_the_weights(tmp_path: Path) -> None:
    """No two of these train the same network."""
    asked = ((), DROPOUT, BFLOAT16, SGD, AUGMENTED, BP, ("train.epochs=2",))
    for index, overrides in enumerate(asked):
        train(tiny_spec(*overrides), run_dir=tmp_path / str(index), device="cpu")
    trained = [weights_of(tmp_path / str(index) / "last")["backbone.conv2.weight"] for index in range(len(asked))]
    for one, two in itertools.combinations(range(len(asked)), 2):
        assert not torch.equal(trained[one], trained[two]), f"{asked[one]} and {asked[two]}"


@pytest.mark.usefixtures("no_pictures")
def test_training_leaves_projections_alone_and_moves_all_else(tmp_path: Path) -> None:
    spec = tiny_spec()
    drawn = {name: tensor.clone() for name, tensor in engine.compile_spec(spec).state_dict().items()}
    train(spec, run_dir=tmp_path / "run", device="cpu")
    after = weights_of(tmp_path / "run" / "last")
    assert after.keys() == drawn.keys()
    still = {name for name in drawn if torch.equal(drawn[name], after[name])}
    assert still == {name for name in drawn if name.startswith("local.")}
    assert len(still) == 2 * UNITS


# What it comes to.


def test_it_learns(trained: TrainedRun) -> None:
    """Three epochs on digits, chance being ten percent."""
    losses = [record["train"]["loss"] for record in records_of(trained.folder)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < losses[0] / 2
    assert trained.result.test_accuracy > 70
    assert trained.result.val_accuracy > 70
    assert max(trained.result.unit_test_accuracy) > 60


@pytest.mark.train
def test_bp_learns(tmp_path: Path) -> None:
    spec = tiny_spec("data.validation=180", "data.batch_size=32", "backbone.width=0.125", "train.epochs=2", *BP)
    assert train(spec, run_dir=tmp_path / "run", device="cpu").test_accuracy > 50


def test_result_is_written_and_is_what_eval_finds(trained: TrainedRun, cli: Callable[..., Said]) -> None:
    written = json.loads((trained.folder / "result.json").read_text())
    assert written == trained.result.to_json()
    assert set(written) == {"run_dir", "test_accuracy", "val_accuracy", "epochs", "seconds", "unit_test_accuracy"}
    assert written["run_dir"] == str(trained.folder)
    assert written["epochs"] == 3
    assert 0 < written["seconds"] < 600
    for source in (trained.folder, trained.folder / "best"):
        found = json.loads(cli("eval", source, "--json", "--device", "cpu").out)
        assert found["accuracy"] == written["test_accuracy"]
        assert found["unit_accuracy"] == written["unit_test_accuracy"]


def test_metrics_hold_a_line_an_epoch(trained: TrainedRun) -> None:
    records = records_of(trained.folder)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        for split, count in (("train", 39 * 32), ("validation", 180)):
            measured = record[split]
            assert measured["count"] == count
            assert len(measured["unit_accuracy"]) == len(measured["unit_loss"]) == UNITS
            assert all(0 <= accuracy <= 100 for accuracy in (measured["accuracy"], *measured["unit_accuracy"]))
            assert all(loss > 0 for loss in (measured["loss"], *measured["unit_loss"]))
        assert record["images_per_second"] == pytest.approx(39 * 32 / record["seconds"])
    rates = [record["lr"] for record in records]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-5)


def test_metrics_agree_with_the_result(trained: TrainedRun) -> None:
    best = max(record["validation"]["accuracy"] for record in records_of(trained.folder))
    assert trained.result.val_accuracy == best


def test_pictures_are_png(trained: TrainedRun) -> None:
    assert_png(trained.folder / "curves.png")
    assert_png(trained.folder / "units.png")


def test_spec_and_environment_are_kept(trained: TrainedRun) -> None:
    assert json.loads((trained.folder / "spec.json").read_text()) == trained.spec.resolved()
    environment = json.loads((trained.folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["device"] == "cpu"
    assert {"python", "platform", "device_name", "threads", "cpus", "git_revision", "command"} <= set(environment)


def test_bp_has_no_accuracy_by_unit(tmp_path: Path) -> None:
    result = train(tiny_spec(*BP), run_dir=tmp_path / "run", device="cpu")
    assert result.unit_test_accuracy == []
    record = records_of(tmp_path / "run")[0]
    assert record["train"]["unit_accuracy"] == record["validation"]["unit_accuracy"] == []
    assert record["train"]["unit_loss"] == []
    assert_png(tmp_path / "run" / "curves.png")
    assert not (tmp_path / "run" / "units.png").exists()
    assert not [name for name in weights_of(tmp_path / "run" / "last") if name.startswith("local.")]


@pytest.mark.usefixtures("no_pictures")
def test_bfloat16_keeps_its_weights_in_float32(tmp_path: Path) -> None:
    result = train(tiny_spec(*BFLOAT16), run_dir=tmp_path / "run", device="cpu")
    assert {tensor.dtype for tensor in weights_of(tmp_path / "run" / "last").values()} == {torch.float32}
    assert 0 <= result.test_accuracy <= 100


@pytest.mark.usefixtures("no_pictures")
def test_best_answers_by_the_unit_that_validates_best(tmp_path: Path) -> None:
    result = train(tiny_spec("train.epochs=2", *BEST), run_dir=tmp_path / "run", device="cpu")
    by_unit = max(records_of(tmp_path / "run"), key=lambda record: record["validation"]["accuracy"])
    accuracy = by_unit["validation"]["unit_accuracy"]
    chosen = int(weights_of(tmp_path / "run" / "best")["head.unit"])
    assert len(accuracy) == UNITS + 1
    assert accuracy[chosen] == max(accuracy) == by_unit["validation"]["accuracy"] == result.val_accuracy
    assert result.test_accuracy == result.unit_test_accuracy[chosen]


# Which checkpoint is best.


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("accuracies", "best"),
    [([50.0, 70.0, 60.0, 65.0], 2), ([50.0, 70.0, 70.0, 10.0], 2), ([10.0, 20.0, 30.0, 40.0], 4), ([0.0] * 4, 1)],
    ids=["in the middle", "first of equals", "last", "all wrong"],
)
def test_best_is_the_first_highest_validation_accuracy(
    accuracies: list[float], best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = iter(accuracies)
    monkeypatch.setattr(
        engine, "select_and_validate", lambda *_: Evaluation(1000, next(given), 90.0, 1.0, [50.0] * 7, [1.0] * 7)
    )
    folder = tmp_path / "run"
    result = train(tiny_spec("train.epochs=4"), run_dir=folder, device="cpu")
    assert result.val_accuracy == max(accuracies)
    assert (folder / "best").resolve().name == f"epoch-{best:04d}"
    assert (folder / "last").resolve().name == "epoch-0004"
    kept = {kept.name for kept in (folder / "checkpoints").iterdir()}
    assert kept >= {f"epoch-{best:04d}", "epoch-0003", "epoch-0004"} and len(kept) <= 4
    state = json.loads((folder / "best" / "state.json").read_text())
    assert (state["epoch"], state["step"]) == (best, 0)
    assert state["best"] == {"name": f"epoch-{best:04d}", "val_accuracy": max(accuracies)}


@pytest.mark.usefixtures("no_pictures")
def test_the_best_checkpoint_is_tested_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of three epochs is made the best; its test accuracy is a one-epoch network's."""
    given = iter([90.0, 80.0, 70.0])
    monkeypatch.setattr(
        engine, "select_and_validate", lambda *_: Evaluation(1000, next(given), 90.0, 1.0, [50.0] * 7, [1.0] * 7)
    )
    folder = tmp_path / "run"
    result = train(tiny_spec("train.epochs=3"), run_dir=folder, device="cpu")
    loader = Digits(validation=1000).loader(tmp_path, seed=0, device=torch.device("cpu"))
    tested = {}
    for name in ("best", "last"):
        graph = load_checkpoint(folder / name)[0]
        tested[name] = engine.evaluate(graph, loader.split_batches("test"))
    assert result.test_accuracy == tested["best"].accuracy
    assert tested["best"].loss != tested["last"].loss


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("what", ["labels", "images"])
def test_test_images_never_select(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other test labels or images leave every checkpoint bitwise as it was, and change the test alone."""
    spec = tiny_spec(*BEST)
    before = train(spec, run_dir=tmp_path / "before", device="cpu")
    read = Digits.read

    def read_other(self: Digits, root: Path) -> tuple[Images, Images]:
        train_images, test_images = read(self, root)
        if what == "labels":
            return train_images, Images(test_images.images, (test_images.labels + 1) % 10)
        return train_images, Images(255 - test_images.images, test_images.labels)

    monkeypatch.setattr(Digits, "read", read_other)
    after = train(spec, run_dir=tmp_path / "after", device="cpu")
    for checkpoint in ("best", "last"):
        assert_same_checkpoint(tmp_path / "before" / checkpoint, tmp_path / "after" / checkpoint)
    assert before.val_accuracy == after.val_accuracy
    assert before.unit_test_accuracy != after.unit_test_accuracy


# Several runs.


@pytest.mark.usefixtures("no_pictures")
def test_several_runs(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    spec = tiny_spec("train.runs=3", "train.seed=4")
    result = train(spec, run_dir=folder, device="cpu")
    single = [json.loads((folder / f"seed-{seed}" / "result.json").read_text()) for seed in (4, 5, 6)]
    accuracies = [one["test_accuracy"] for one in single]
    assert len(set(accuracies)) > 1
    assert result.test_accuracy == pytest.approx(sum(accuracies) / 3)
    assert result.std == pytest.approx(statistics.stdev(accuracies))
    assert result.val_accuracy == pytest.approx(sum(one["val_accuracy"] for one in single) / 3)
    for unit, mean in enumerate(result.unit_test_accuracy):
        assert mean == pytest.approx(sum(one["unit_test_accuracy"][unit] for one in single) / 3)
    assert len(result.unit_test_accuracy) == UNITS
    written = json.loads((folder / "result.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert written["runs"] == single
    assert json.loads((folder / "spec.json").read_text()) == spec.resolved()
    assert {child.name for child in folder.iterdir()} == {
        *("seed-4", "seed-5", "seed-6"),
        *("spec.json", "result.json", ".lock"),
    }
    assert json.loads((folder / "seed-5" / "spec.json").read_text()) == spec.for_seed(5).resolved()


@pytest.mark.usefixtures("no_pictures")
def test_a_run_among_several_is_that_run_alone(tmp_path: Path) -> None:
    train(tiny_spec("train.runs=2"), run_dir=tmp_path / "both", device="cpu")
    train(tiny_spec("train.seed=1"), run_dir=tmp_path / "alone", device="cpu")
    assert_same_checkpoint(tmp_path / "both" / "seed-1" / "best", tmp_path / "alone" / "best")


# Where it goes.


@pytest.mark.parametrize("runs", [1, 2])
def test_an_occupied_run_directory_is_left_alone(runs: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="run: exists already and is not empty; it holds no run to go on with"):
        train(tiny_spec(f"train.runs={runs}"), run_dir=folder, device="cpu")
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("mine.txt", "mine")]


def test_a_finished_run_is_not_written_over(trained: TrainedRun) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in trained.folder.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        train(trained.spec, run_dir=trained.folder, device="cpu")
    assert sorted((file.name, file.stat().st_mtime_ns) for file in trained.folder.rglob("*")) == before


def test_an_empty_run_directory_is_taken(tmp_path: Path) -> None:
    assert choose_run_dir(tiny_spec(), tmp_path, resume=False) == tmp_path
    train(tiny_spec(), run_dir=tmp_path, device="cpu")
    assert (tmp_path / "result.json").is_file()


def test_default_run_directories_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny-2", "tiny-3"):
        assert choose_run_dir(tiny_spec(), None, resume=False) == Path("runs") / name
        assert not (Path("runs") / name).exists(), "nothing is created before there is something to write"
        (Path("runs") / name).mkdir(parents=True)
    assert choose_run_dir(tiny_spec("name=other"), None, resume=False) == Path("runs/other")
    assert train(tiny_spec(), device="cpu").run_dir == str(Path("runs/tiny-4"))
    assert (tmp_path / "runs" / "tiny-4" / "result.json").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """The line names the unit, the epoch and the step; what was there before stays."""
    with pytest.raises(DivergenceError, match=r"unit conv1 is not finite in epoch 1, step 2; lower optimizer.lr"):
        train(tiny_spec("optimizer.lr=1e30"), run_dir=tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "spec.json").is_file()


@pytest.mark.compile
def test_without_a_compiler_nothing_is_written(tmp_path: Path) -> None:
    """One line that says what to install, or to train without; no run directory is left."""
    spec = tmp_path / "tiny.json"
    spec.write_text(json.dumps({**TINY, "train": {"epochs": 1}}))
    there = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "asge_zoo",
        "train",
        str(spec),
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    ended = subprocess.run(command, env=there, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("asge-zoo: train.compile: torch.compile does not work here")
    assert "install a C++ compiler (g++), or train with --set train.compile=false" in line
    assert not (tmp_path / "run").exists()
