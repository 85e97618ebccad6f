"""Resuming: the very bytes of the run that was never broken off, wherever that happened; else one clear line."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Said
from fuzz_checkpoints import Power, with_fitting_manifest
from kill_and_resume import contents, differences
from tiny import TINY, tiny_spec

from asge_zoo.engine import train as engine
from asge_zoo.engine.checkpoint import check_files
from asge_zoo.engine.loading import find_checkpoint
from asge_zoo.engine.lock import locked
from asge_zoo.engine.run_dir import resume_command
from asge_zoo.engine.train import train
from asge_zoo.errors import CheckpointError, SpecError, Stopped
from asge_zoo.spec import Spec

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

Cli = Callable[..., Said]
STEPS = 6  # in an epoch of the tiny spec
SORTS = {
    "plain": (),
    "bp": ("rule.kind=bp", "prediction.kind=last"),
    "best unit": ("prediction.kind=best", "backbone.extra_conv=true"),
    "dropout": ("backbone.dropout=0.2",),
    "bfloat16": ("train.precision=bfloat16",),
    "sgd": ("optimizer.kind=sgd", "optimizer.lr=0.01"),
    "augmented": ("data.augment.crop_padding=2", "data.augment.flip=true"),
    "constant rate": ("schedule.kind=constant",),
    "deterministic": ("train.deterministic=true",),
}


def fail() -> None:
    raise Power


def run(spec: Spec, folder: Path, *, resume: bool = True) -> dict[str, Any]:
    """Train, and give what it came to."""
    train(spec, run_dir=folder, device="cpu", resume=resume)
    return contents(folder)


def break_off(spec: Spec, folder: Path, at_step: Callable, number: int) -> None:
    """Train until the power fails after so many steps."""
    at_step(number, fail)
    with pytest.raises(Power):
        run(spec, folder)


def kept(folder: Path) -> list[str]:
    """Names of the checkpoints in a run directory."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def flip(file: Path, position: int = -1) -> None:
    """Change a byte of a file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


# The very bytes.


@pytest.mark.parametrize("sort", SORTS)
def test_a_broken_run_ends_as_an_unbroken_one(sort: str, tmp_path: Path, at_step: Callable) -> None:
    """Broken off twice, between checkpoints in the middle of epochs."""
    spec = tiny_spec("train.epochs=2", "train.checkpoint.every_steps=4", *SORTS[sort])
    expected = run(spec, tmp_path / "whole")
    break_off(spec, tmp_path / "broken", at_step, 5)
    assert kept(tmp_path / "broken") == ["epoch-0000-step-000004"]
    break_off(spec, tmp_path / "broken", at_step, 6)
    assert differences(expected, run(spec, tmp_path / "broken")) == []


@pytest.mark.parametrize("number", range(1, 2 * STEPS + 1))
def test_wherever_it_is_broken_off(number: int, unbroken: dict[str, Any], tmp_path: Path, at_step: Callable) -> None:
    spec = tiny_spec("train.epochs=2")
    break_off(spec, tmp_path / "broken", at_step, number)
    assert differences(unbroken, run(spec, tmp_path / "broken")) == []


@pytest.mark.parametrize("number", [3, STEPS + 3, 2 * STEPS + 1])
def test_several_runs_go_on_where_they_were(number: int, tmp_path: Path, at_step: Callable) -> None:
    spec = tiny_spec("train.runs=3")
    break_off(spec, tmp_path / "broken", at_step, number)
    broken = run(spec, tmp_path / "broken")
    assert differences(run(spec, tmp_path / "whole"), broken) == []


def test_a_finished_run_is_tested_again_and_stays(tmp_path: Path) -> None:
    spec = tiny_spec("train.epochs=2")
    expected = run(spec, tmp_path)
    assert differences(expected, run(spec, tmp_path)) == []


def test_what_resumes_is_what_was_saved(tmp_path: Path, at_step: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is taken again that a checkpoint holds, and none is left out."""
    spec = tiny_spec("train.epochs=2", "train.checkpoint.every_steps=4")
    break_off(spec, tmp_path, at_step, STEPS + 3)  # saved: step 4, the epoch's end, step 8 of the run
    places = []
    real = engine.train_step
    monkeypatch.setattr(
        engine, "train_step", lambda state, *batch: (places.append(state.total_steps), real(state, *batch))
    )
    run(spec, tmp_path)
    assert places == [*range(8, 9), *range(9, 2 * STEPS)]


def test_nothing_to_resume_yet_starts_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tiny_spec()
    expected = run(spec, tmp_path / "whole", resume=False)
    capsys.readouterr()
    assert differences(expected, run(spec, tmp_path / "new")) == []
    assert "new: holds no checkpoint yet; starts from the beginning" in capsys.readouterr().err


@pytest.mark.parametrize("runs", [1, 2])
def test_nothing_is_resumed_where_no_run_is(runs: int, tmp_path: Path) -> None:
    """Somebody's other files stay as they are."""
    for name in ("notes.txt", ".tmp-notes", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match="not empty; it holds no run to go on with: give another --run-dir"):
        run(tiny_spec(f"train.runs={runs}"), tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.read_text() == "mine"}
    assert names == {"notes.txt", ".tmp-notes", "metrics.jsonl"}


@pytest.mark.parametrize("resume", [False, True])
def test_what_was_killed_before_its_first_file_is_taken_over(resume: bool, tmp_path: Path) -> None:
    (tmp_path / "run" / "seed-0").mkdir(parents=True)
    for name in (".lock", "seed-0/.lock", ".tmp-spec.json"):
        (tmp_path / "run" / name).touch()
    spec = tiny_spec("train.runs=2")
    assert differences(run(spec, tmp_path / "whole"), run(spec, tmp_path / "run", resume=resume)) == []


def test_half_written_leftovers_are_swept(unbroken: dict[str, Any], tmp_path: Path, at_step: Callable) -> None:
    spec = tiny_spec("train.epochs=2")
    break_off(spec, tmp_path, at_step, STEPS + 1)
    (tmp_path / "checkpoints" / ".tmp-epoch-0002.x").mkdir()
    (tmp_path / "checkpoints" / ".tmp-epoch-0002.x" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-result.json.x").write_bytes(b"half")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"epoch": 1, "tr')
    broken = run(spec, tmp_path)
    assert not [name for name in broken if ".tmp-" in name]
    assert differences(unbroken, broken) == []


def test_times_add_up(tmp_path: Path, at_step: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that stands still but for compiling (1,000 s), steps (1 s) and validation (100 s)."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def taking(seconds: float, name: str) -> None:
        real = getattr(engine, name)

        def slow(*arguments: Any) -> Any:
            now[0] += seconds
            return real(*arguments)

        monkeypatch.setattr(engine, name, slow)

    for seconds, name in ((1000, "try_step"), (1, "train_step"), (100, "select_and_validate")):
        taking(seconds, name)
    spec = tiny_spec("train.epochs=2", "train.checkpoint.every_steps=4")
    break_off(spec, tmp_path, at_step, STEPS + 4)  # saved: step 8 of the run, then two more
    result = train(spec, run_dir=tmp_path, device="cpu", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["seconds"], line["images_per_second"]) for line in lines] == [(STEPS, 64.0)] * 2
    assert result.seconds == 2 * 1000 + 2 * (STEPS + 100)


# When checkpoints are saved.


@pytest.mark.parametrize(
    ("policy", "saved"),
    [
        ((), [(1, 0), (2, 0), (3, 0)]),
        (("every_steps=4",), [(0, 4), (1, 0), (1, 2), (2, 0), (2, 4), (3, 0)]),
        (("every_steps=6",), [(1, 0), (2, 0), (3, 0)]),
        (("every_minutes=1e-9",), sorted([*product(range(3), range(1, STEPS)), (1, 0), (2, 0), (3, 0)])),
        (("every_minutes=60",), [(1, 0), (2, 0), (3, 0)]),
    ],
    ids=str,
)
def test_a_policy_says_when(
    policy: tuple[str, ...], saved: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch is the best so far, and the last is always saved."""
    found = []
    real = engine.TrainState.save

    def save(state: engine.TrainState, folder: Path) -> None:
        found.append((state.epoch, state.step))
        real(state, folder)

    monkeypatch.setattr(engine.TrainState, "save", save)
    run(tiny_spec("train.epochs=3", "optimizer.lr=1e-9", *(f"train.checkpoint.{line}" for line in policy)), tmp_path)
    assert found == saved


def test_epochs_that_are_no_best_wait_for_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([50.0, 40.0, 30.0, 60.0, 20.0, 10.0, 5.0])
    found = []
    real = engine.TrainState.save
    monkeypatch.setattr(
        engine,
        "select_and_validate",
        lambda *_: engine.Evaluation(1000, next(given), 90.0, 1.0, [50.0] * 7, [1.0] * 7),
    )
    monkeypatch.setattr(
        engine.TrainState, "save", lambda state, folder: (found.append(state.epoch), real(state, folder))[1]
    )
    run(tiny_spec("train.epochs=7", "train.checkpoint.every_epochs=3"), tmp_path)
    assert found == [1, 3, 4, 6, 7]
    assert kept(tmp_path) == ["epoch-0004", "epoch-0006", "epoch-0007"]


# Another spec.


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=0.5", "optimizer.lr was 0.001 and is now 0.5"),
        ("data.batch_size=32", "data.batch_size was 64 and is now 32"),
        ("optimizer.kind=sgd", 'optimizer.kind was "adamw" and is now "sgd"'),
        ("train.seed=7", "train.seed was 0 and is now 7"),
        ("train.runs=2", "train.runs was 1 and is now 2"),
        ("train.compile=true", "train.compile was false and is now true"),
        ("train.epochs=3", "train.epochs, which the cosine schedule depends on, was 2 and is now 3"),
    ],
)
def test_another_spec_is_refused(override: str, said: str, tmp_path: Path, at_step: Callable, cli: Cli) -> None:
    spec = tmp_path / "tiny.json"
    spec.write_text(json.dumps({**TINY, "train": {"epochs": 2, "compile": False}}))
    folder = tmp_path / "run"
    break_off(tiny_spec("train.epochs=2"), folder, at_step, STEPS + 1)
    before = contents(folder)
    line = cli("train", spec, "--run-dir", folder, "--resume", "--device", "cpu", "--set", override)
    assert (line.code, line.out, len(line.err.splitlines())) == (2, "", 1)
    assert said in line.err and "train.checkpoint and data.workers may change" in line.err
    assert contents(folder) == before
    command = re.findall("`(asge-zoo .*?)`", line.err)[0]
    assert cli(*shlex.split(command)[1:]).code == 0, "the remedy must work"


def test_epochs_may_grow_where_the_schedule_allows_it(tmp_path: Path, at_step: Callable) -> None:
    """Three epochs in one go, or two and then one more: the same; so the rate must not depend on their number."""
    constant = "schedule.kind=constant"
    expected = run(tiny_spec("train.epochs=3", constant), tmp_path / "whole")
    run(tiny_spec("train.epochs=2", constant), tmp_path / "grown")
    break_off(tiny_spec("train.epochs=3", constant), tmp_path / "grown", at_step, 2)
    stale = [name for name in ("result.json", "curves.png", "units.png") if (tmp_path / "grown" / name).exists()]
    assert stale == [], "what two epochs came to is not what this run comes to"
    grown = run(tiny_spec("train.epochs=3", constant), tmp_path / "grown")
    own_spec = [name for name in grown if name.endswith("spec.json") and name != "spec.json"]
    differing = differences(expected, grown)
    assert [name for name in differing if name not in own_spec and "safetensors" not in name] == []
    for name in ("last/model.safetensors", "last/optimizer.safetensors", "last/spec.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "grown" / name).read_bytes()
    assert json.loads((tmp_path / "grown" / "spec.json").read_text())["train"]["epochs"] == 3
    with pytest.raises(SpecError, match=r"train\.epochs, which may only grow, was 3 and is now 2"):
        run(tiny_spec("train.epochs=2", constant), tmp_path / "grown")


def test_when_to_save_may_change(tmp_path: Path, at_step: Callable) -> None:
    break_off(tiny_spec("train.epochs=2"), tmp_path / "changed", at_step, STEPS + 1)
    changed = run(tiny_spec("train.epochs=2", "train.checkpoint.every_steps=4"), tmp_path / "changed")
    expected = run(tiny_spec("train.epochs=2", "train.checkpoint.every_steps=4"), tmp_path / "whole")
    names = ("last", "result.json", "metrics.jsonl", "spec.json", "checkpoints/epoch-0002/model.safetensors")
    assert [name for name in names if changed[name] != expected[name]] == []


def test_which_run_to_resume_must_be_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert train(tiny_spec(), device="cpu").run_dir == str(Path("runs/tiny"))
    assert train(tiny_spec(), device="cpu", resume=True).run_dir == str(Path("runs/tiny"))
    assert train(tiny_spec(), device="cpu").run_dir == str(Path("runs/tiny-2"))
    with pytest.raises(CheckpointError, match=r"--resume: runs/tiny or runs/tiny-2\? say which with --run-dir"):
        train(tiny_spec(), device="cpu", resume=True)
    shutil.rmtree("runs/tiny")
    assert train(tiny_spec(), device="cpu", resume=True).run_dir == str(Path("runs/tiny-2"))


def test_other_surroundings_are_recorded_and_said(
    tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tiny_spec("train.epochs=2")
    break_off(spec, tmp_path, at_step, STEPS + 1)
    capsys.readouterr()
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    run(spec, tmp_path)
    assert "goes on with other variables than it began with" in capsys.readouterr().err
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert "OMP_DYNAMIC" not in recorded["variables"]
    assert [(start["epoch"], start["variables"]["OMP_DYNAMIC"]) for start in recorded["resumed"]] == [(1, "true")]
    assert {"packages", "device", "threads", "cxx", "cpu_capability", "deterministic", "git_revision"} <= set(recorded)
    assert json.loads((tmp_path / "spec.json").read_text())["train"]["compile"] is False


# Damage.


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl", "spec.json"]
)
def test_a_damaged_newest_falls_back_and_says_so(
    name: str, tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_spec("train.epochs=2", "train.checkpoint.every_steps=4")
    broken = tmp_path / "broken"
    break_off(spec, broken, at_step, STEPS + 3)
    assert kept(broken) == ["epoch-0001", "epoch-0001-step-000002"]
    flip(broken / "last" / name)
    capsys.readouterr()
    assert differences(run(spec, tmp_path / "whole"), run(spec, broken)) == []
    said = [line for line in capsys.readouterr().err.splitlines() if "whole" not in line]
    assert len(said) == 1
    assert "epoch-0001-step-000002" in said[0] and name in said[0] and f"falls back to {broken}" in said[0]


def test_a_damaged_best_falls_back_to_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest is whole, but the best it knows is not: the one before it still knows a whole one."""
    spec = tiny_spec("train.epochs=3")
    expected = run(spec, tmp_path)
    best = json.loads((tmp_path / "last" / "state.json").read_text())["best"]["name"]
    assert kept(tmp_path) == ["epoch-0002", "epoch-0003"] and best == "epoch-0002"
    flip(tmp_path / "checkpoints" / "epoch-0003" / "model.safetensors")
    assert differences(expected, run(spec, tmp_path)) == []
    assert "falls back to" in capsys.readouterr().err


def test_where_every_best_is_damaged_another_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of training are not given up for a checkpoint that is only tested."""
    spec = tiny_spec("train.epochs=3")
    expected = run(spec, tmp_path)
    flip(tmp_path / "best" / "model.safetensors")
    capsys.readouterr()
    found = run(spec, tmp_path)
    said = capsys.readouterr().err
    assert "epoch-0002/model.safetensors: its sha256 is not the manifest's; goes on from" in said
    assert "takes epoch-0003 for the best: the run may end with another best checkpoint" in said
    assert found["best"] == "checkpoints/epoch-0003"
    assert found["checkpoints/epoch-0003/model.safetensors"] == expected["checkpoints/epoch-0003/model.safetensors"]
    third = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][2]
    assert found["result.json"]["val_accuracy"] == third["validation"]["accuracy"]
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "epoch-0003", "eval takes the same"


def test_a_best_of_another_network_is_lost_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With sums that fit it."""
    spec = tiny_spec("train.epochs=3")
    run(spec, tmp_path)
    model = tmp_path / "best" / "model.safetensors"
    tensors = safetensors.torch.load_file(model)
    tensors["backbone.conv1.bias"] = torch.zeros(99)
    with_fitting_manifest(model.parent, tensors)
    capsys.readouterr()
    assert run(spec, tmp_path)["best"] == "checkpoints/epoch-0003"
    said = capsys.readouterr().err
    assert "epoch-0002/model.safetensors: does not fit its own spec" in said
    assert "takes epoch-0003 for the best" in said


def test_where_no_best_is_left_the_next_one_is(
    tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny_spec("train.epochs=3", "train.checkpoint.every_steps=2")
    broken = tmp_path / "broken"
    break_off(spec, broken, at_step, STEPS + 3)
    assert kept(broken) == ["epoch-0001", "epoch-0001-step-000002"]
    shutil.rmtree(broken / "checkpoints" / "epoch-0001")
    expected = run(spec, tmp_path / "whole")
    capsys.readouterr()
    break_off(spec, broken, at_step, 3)  # saved: step 10 of the run, which knows no best one
    assert "takes the next to come for the best" in capsys.readouterr().err
    assert kept(broken) == ["epoch-0001-step-000002", "epoch-0001-step-000004"]
    assert not (broken / "best").is_symlink()
    found = run(spec, broken)
    name = "checkpoints/epoch-0003/model.safetensors"
    assert found["best"] == "checkpoints/epoch-0002" and found[name] == expected[name]


def test_where_none_is_whole_nothing_is_touched(tmp_path: Path, at_step: Callable, cli: Cli) -> None:
    spec = tiny_spec("train.epochs=2")
    break_off(spec, tmp_path, at_step, STEPS + 1)
    flip(tmp_path / "last" / "optimizer.safetensors")
    before = {name: value for name, value in contents(tmp_path).items()}
    said = cli("train", tmp_path / "spec.json", "--run-dir", tmp_path, "--resume", "--device", "cpu")
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "optimizer.safetensors" in said.err and "put one back" in said.err
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_spec_is_found(tmp_path: Path, at_step: Callable, cli: Cli) -> None:
    """Whole in itself, yet not this run's."""
    for name, override in (("mine", "train.seed=0"), ("other", "train.seed=1")):
        break_off(tiny_spec("train.epochs=2", override), tmp_path / name, at_step, STEPS + 1)
    shutil.rmtree(tmp_path / "mine" / "checkpoints" / "epoch-0001")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "epoch-0001", tmp_path / "mine" / "checkpoints" / "epoch-0001")
    folder = tmp_path / "mine"
    for code, line in (
        (1, ("verify", folder)),
        (2, ("eval", folder)),
        (2, ("eval", folder / "last")),
        (2, ("train", folder / "spec.json", "--run-dir", folder, "--resume", "--device", "cpu")),
    ):
        said = cli(*line)
        assert said.code == code
        assert "epoch-0001/spec.json: is of another spec than" in said.out + said.err
        assert "train.seed" in said.out + said.err
        assert len(said.err.splitlines()) == (code == 2)


def test_a_checkpoint_under_the_name_of_another_is_found(tmp_path: Path, cli: Cli) -> None:
    """Whole in itself, and this run's."""
    run(tiny_spec("train.epochs=3"), tmp_path)
    best = (tmp_path / "best").resolve()
    assert kept(tmp_path) == ["epoch-0002", "epoch-0003"] and best.name == "epoch-0002"
    shutil.rmtree(best)
    shutil.copytree(tmp_path / "checkpoints" / "epoch-0003", best)
    for code, line in ((1, ("verify", tmp_path)), (2, ("eval", tmp_path)), (2, ("eval", best))):
        said = cli(*line)
        assert said.code == code
        assert "epoch-0002/state.json: is that of epoch-0003; give the folder that name back" in said.out + said.err


def test_a_manifest_of_another_run_is_found(tmp_path: Path, at_step: Callable, cli: Cli) -> None:
    for name, override in (("mine", "train.seed=0"), ("other", "train.seed=1")):
        break_off(tiny_spec("train.epochs=2", override), tmp_path / name, at_step, STEPS + 1)
    shutil.copy(tmp_path / "other" / "last" / "manifest.json", tmp_path / "mine" / "last" / "manifest.json")
    folder = tmp_path / "mine"
    assert cli("verify", folder).code == 1
    for line in (("eval", folder), ("train", folder / "spec.json", "--run-dir", folder, "--resume", "--device", "cpu")):
        said = cli(*line)
        assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
        assert "its sha256 is not the manifest's" in said.err


@pytest.mark.parametrize("name", ["spec.json", "environment.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe"])
def test_a_damaged_run_file_is_one_line(name: str, content: bytes, tmp_path: Path, at_step: Callable, cli: Cli) -> None:
    break_off(tiny_spec("train.epochs=2"), tmp_path / "run", at_step, STEPS + 1)
    good = tmp_path / "good.json"
    shutil.copy(tmp_path / "run" / "spec.json", good)
    (tmp_path / "run" / name).write_bytes(content)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = cli("train", good, "--run-dir", tmp_path / "run", "--resume", "--device", "cpu")
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert name in said.err
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {**before, Path("run/.lock"): b""} == {**after, Path("run/.lock"): b""}


# Signals.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("step", [1, 4, STEPS, STEPS + 2, 2 * STEPS])
def test_a_signal_saves_and_says_how_to_resume(
    number: signal.Signals, code: int, step: int, unbroken: dict[str, Any], tmp_path: Path, at_step: Callable, cli: Cli
) -> None:
    spec = tiny_spec("train.epochs=2")
    folder = tmp_path / "stopped"
    (tmp_path / "spec.json").write_text(json.dumps(spec.resolved()))
    at_step(step, lambda: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    said = cli("train", tmp_path / "spec.json", "--run-dir", folder, "--device", "cpu")
    assert (said.code, said.out) == (code, "")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    line = said.err.removesuffix("\n")
    epoch, done = divmod(step, STEPS) if step % STEPS else (step // STEPS - 1, STEPS)
    assert line.startswith(f"asge-zoo: stopped by {number.name}, its state saved as epoch-{epoch:04d}-step-{done:06d}")
    assert len(line.splitlines()) == 1
    command = re.findall("`(asge-zoo .*?)`", line)[0]
    assert command.endswith("--resume --device cpu")
    assert cli(*shlex.split(command)[1:]).code == 0
    stopped = contents(folder)
    names = ("best", "last", "metrics.jsonl", "result.json", "checkpoints/epoch-0002/model.safetensors")
    assert [name for name in names if unbroken[name] != stopped[name]] == []


def test_the_command_to_go_on_with_is_typed_as_it_stands() -> None:
    line = resume_command(Path("runs/my run"), "cuda:1", Path("/my data"))
    words = ["asge-zoo", "train", "runs/my run/spec.json", "--run-dir", "runs/my run", "--resume"]
    assert shlex.split(line) == [*words, "--device", "cuda:1", "--data-root", "/my data"]
    assert shlex.split(resume_command(Path("runs/my run"))) == words


def test_a_signal_during_validation_does_not_wait_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny_spec()
    real = engine.evaluate_alternatives
    seen = []

    def evaluate(graph: Any, batches: Any, ranks: Any) -> Any:
        for batch in batches:
            seen.append(len(batch[1]))
            os.kill(os.getpid(), signal.SIGTERM)
        return real(graph, batches, ranks)

    monkeypatch.setattr(engine, "evaluate_alternatives", evaluate)
    with pytest.raises(Stopped) as caught:
        run(spec, tmp_path / "stopped")
    assert (caught.value.exit_code, len(seen)) == (143, 1)
    assert kept(tmp_path / "stopped") == [f"epoch-0000-step-{STEPS:06d}"]
    monkeypatch.setattr(engine, "evaluate_alternatives", real)
    names = ("best", "last", "metrics.jsonl", "result.json", "checkpoints/epoch-0001/model.safetensors")
    whole, stopped = run(spec, tmp_path / "whole"), run(spec, tmp_path / "stopped")
    assert [name for name in names if whole[name] != stopped[name]] == []


def test_a_real_process_is_stopped_and_resumed(tmp_path: Path) -> None:
    """`kill`, from outside, while it trains."""
    spec, folder = tmp_path / "tiny.json", tmp_path / "run"
    spec.write_text(json.dumps({**TINY, "train": {"epochs": 400, "compile": False}}))
    command = [sys.executable, "-m", "asge_zoo", "train", str(spec), "--run-dir", str(folder), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    line = process.communicate(timeout=60)[1].strip()
    assert process.returncode == 143
    assert re.fullmatch(r"asge-zoo: stopped by SIGTERM, its state saved as (\S+); go on with `asge-zoo train .*`", line)
    newest = (folder / "last").resolve()
    assert newest.name in line and check_files(newest) == []
    assert (
        len((folder / "metrics.jsonl").read_text().splitlines())
        == json.loads((newest / "state.json").read_text())["epoch"]
    )


def test_a_second_signal_stops_at_once(unbroken: dict[str, Any], tmp_path: Path, at_step: Callable) -> None:
    """In the middle of the step; what was saved before is all there is."""
    spec = tiny_spec("train.epochs=2")
    went_on = []

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        went_on.append(True)

    at_step(STEPS + 2, twice)
    with pytest.raises(Stopped, match="stopped by SIGINT; go on with `asge-zoo train") as caught:
        run(spec, tmp_path / "stopped")
    assert caught.value.exit_code == 130
    assert went_on == [] and kept(tmp_path / "stopped") == ["epoch-0001"]
    assert differences(unbroken, run(spec, tmp_path / "stopped")) == []


def test_a_signal_is_taken_where_it_was_ignored(tmp_path: Path, at_step: Callable) -> None:
    """As a shell's `&` leaves SIGINT to what it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped, match="its state saved as epoch-0000-step-000002"):
            run(tiny_spec(), tmp_path)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_run_is_a_keyboard_interrupt(tmp_path: Path, at_step: Callable) -> None:
    """So that a sweep in a notebook stops, too."""
    at_step(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_spec(), tmp_path)


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    """Where signals can't be taken."""
    thread = threading.Thread(target=run, args=(tiny_spec(), tmp_path))
    thread.start()
    thread.join()
    assert (tmp_path / "result.json").is_file()


# One process at a time.

HOLD = """
import sys, time
from pathlib import Path
from asge_zoo.engine.loading import find_checkpoint
from asge_zoo.engine.lock import locked
with locked(Path(sys.argv[1])):
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path, cli: Cli) -> None:
    folder, held = tmp_path / "run", tmp_path / "held"
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(held)])
    while not held.exists():
        assert holder.poll() is None
    line = ("train", tmp_path / "tiny.json", "--run-dir", folder, "--resume", "--device", "cpu")
    said = cli(*line)
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert f"{folder}: in use by process {holder.pid} on " in said.err and "another --run-dir" in said.err
    holder.kill()
    holder.wait()
    assert json.loads((folder / ".lock").read_text())["pid"] == holder.pid, "its lock is still there"
    assert cli(*line).code == 0


def test_a_lock_within_a_process_holds_too(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(CheckpointError, match=f"in use by process {os.getpid()} on"):
        run(tiny_spec(), tmp_path / "run")


def test_a_lock_leaves_nothing_where_nothing_was_written(tmp_path: Path) -> None:
    with locked(tmp_path / "some" / "run"):
        assert (tmp_path / "some" / "run").is_dir()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert (tmp_path / "run" / "file").exists()
    with locked(tmp_path / "run"):
        shutil.rmtree(tmp_path / "run")


# Determinism.


def test_strict_determinism_is_switched_on_and_off_again(tmp_path: Path, at_step: Callable) -> None:
    seen = []
    at_step(1, lambda: seen.append(torch.are_deterministic_algorithms_enabled()))
    run(tiny_spec("train.deterministic=true"), tmp_path / "strict")
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    assert json.loads((tmp_path / "strict" / "environment.json").read_text())["deterministic"] is True
    plain = run(tiny_spec(), tmp_path / "plain")
    strict = contents(tmp_path / "strict")
    for name in ("metrics.jsonl", "result.json"):
        assert plain[name] == strict[name], "on the CPU the algorithms are the same ones"


def test_an_operation_that_has_no_deterministic_algorithm_is_one_line(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> None:
        torch.zeros(3).put_(torch.tensor([0, 1]), torch.ones(2))

    monkeypatch.setattr("asge_zoo.graph.local_graph.LocalGraph.step", step)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    line = ("train", tmp_path / "tiny.json", "--run-dir", tmp_path / "run", "--device", "cpu")
    said = cli(*line, "--set", "train.deterministic=true")
    assert (said.code, said.out, len(said.err.splitlines())) == (2, "", 1)
    assert "train.deterministic: part of the step has no deterministic algorithm here (put_" in said.err
    assert not (tmp_path / "run").exists()
