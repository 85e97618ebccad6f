"""What breaks under a run: one line that names file and remedy, exit code 2, and what was there before stays."""

import contextlib
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import Said
from fuzz_checkpoints import broken_run, fuzz, with_fitting_manifest
from kill_and_resume import contents, differences
from tiny import TINY

from asge_zoo.engine import train as engine
from asge_zoo.engine.checkpoint import check_files

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

Cli = Callable[..., Said]
STEPS = 6  # in an epoch of the tiny spec
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl", "spec.json", "manifest.json"]
TWO_EPOCHS = json.dumps({**TINY, "train": {"epochs": 2, "compile": False}})


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """Two epochs of the tiny spec."""
    file = tmp_path / "tiny.json"
    file.write_text(TWO_EPOCHS)
    return file


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was broken off with a single checkpoint, after its first epoch. Not to be changed."""
    return broken_run(tmp_path_factory.mktemp("broken"))


@pytest.fixture
def copy(broken: Path, tmp_path: Path) -> Path:
    """A copy of that run, to damage."""
    return Path(shutil.copytree(broken, tmp_path / "run", symlinks=True))


def start_line(spec: Path, folder: Path) -> tuple[str | Path, ...]:
    """The command line that starts a run."""
    return ("train", spec, "--run-dir", folder, "--device", "cpu")


def resume_line(spec: Path, folder: Path) -> tuple[str | Path, ...]:
    """The command line that resumes it."""
    return (*start_line(spec, folder), "--resume")


def assert_one_line(said: Said, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds these words."""
    assert (said.code, said.out) == (2, ""), said
    assert len(said.err.splitlines()) == 1, said.err
    for word in words:
        assert word in said.err


# While training.


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """A file system of its own at `folder`; skips where mounting is not allowed."""
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting file systems is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def assert_saved_and_resumes(folder: Path, spec: Path, unbroken: dict[str, Any], cli: Cli) -> None:
    """The first epoch's checkpoint is whole, and the run goes on to the end of the unbroken one."""
    assert check_files(folder / "checkpoints" / "epoch-0001") == []
    assert not list(folder.rglob(".tmp-*"))
    assert cli(*resume_line(spec, folder)).code == 0
    assert differences(unbroken, contents(folder)) == []


def test_a_full_disk(spec_file: Path, tmp_path: Path, unbroken: dict[str, Any], at_step: Callable, cli: Cli) -> None:
    disk, filler = tmp_path / "disk", tmp_path / "disk" / "filler"
    disk.mkdir()
    with mounted(disk, "-t", "tmpfs", "-o", "size=4m", "tmpfs"):

        def fill() -> None:
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))

        at_step(STEPS + 2, fill)
        said = cli(*start_line(spec_file, disk / "run"))
        assert_one_line(said, f"{disk / 'run'}/", "No space left on device")
        assert "make room on the disk, then go on with `asge-zoo train" in said.err
        filler.unlink()
        assert_saved_and_resumes(disk / "run", spec_file, unbroken, cli)


@pytest.fixture
def size_limit() -> Iterator[Callable[[int], None]]:
    """Sets the largest file that this process may write, in bytes; lifted afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit(
    spec_file: Path, tmp_path: Path, unbroken: dict[str, Any], at_step: Callable, cli: Cli, size_limit: Callable
) -> None:
    folder = tmp_path / "run"
    at_step(STEPS + 2, lambda: size_limit(8192))
    said = cli(*start_line(spec_file, folder))
    size_limit(resource.RLIM_INFINITY)
    assert_one_line(said, f"{folder}/checkpoints/epoch-0002/model.safetensors: can't be written (File too large)")
    assert "raise the file-size limit (ulimit -f), then go on with" in said.err
    assert_saved_and_resumes(folder, spec_file, unbroken, cli)


def test_a_read_only_directory(
    spec_file: Path, tmp_path: Path, unbroken: dict[str, Any], at_step: Callable, cli: Cli
) -> None:
    folder = tmp_path / "run"
    with contextlib.ExitStack() as mounts:

        def make_read_only() -> None:
            mounts.enter_context(mounted(folder, "--bind", str(folder)))
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

        at_step(STEPS + 2, make_read_only)
        said = cli(*start_line(spec_file, folder))
        assert_one_line(said, f"{folder}/", "Read-only file system", "make the file system writable, then go on with")
        before = contents(folder)
        assert_one_line(cli(*resume_line(spec_file, folder)), str(folder), "Read-only file system", "writable")
        assert contents(folder) == before
    assert_saved_and_resumes(folder, spec_file, unbroken, cli)


@pytest.mark.parametrize("what", [".", "checkpoints"])
def test_a_directory_removed_under_way(what: str, spec_file: Path, tmp_path: Path, at_step: Callable, cli: Cli) -> None:
    folder = tmp_path / "run"
    at_step(STEPS + 2, lambda: shutil.rmtree(folder / what))
    said = cli(*start_line(spec_file, folder))
    assert_one_line(said, f"{folder}/", "No such file or directory", "put back what was removed or moved under way")


def test_a_directory_moved_under_way_can_be_put_back(
    spec_file: Path, tmp_path: Path, unbroken: dict[str, Any], at_step: Callable, cli: Cli
) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    at_step(STEPS + 2, lambda: folder.rename(elsewhere))
    assert_one_line(cli(*start_line(spec_file, folder)), f"{folder}/", "put back")
    elsewhere.rename(folder)
    assert_saved_and_resumes(folder, spec_file, unbroken, cli)


@pytest.fixture
def poison(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int, Callable[[engine.TrainState], torch.Tensor], float], None]:
    """Sets a value of one of the state's tensors, after so many steps of the run."""
    real = engine.train_step

    def poison(steps: int, tensor: Callable[[engine.TrainState], torch.Tensor], value: float) -> None:
        def step(state: engine.TrainState, *batch: Any) -> None:
            real(state, *batch)
            if state.total_steps == steps:
                with torch.no_grad():
                    tensor(state).view(-1)[4] = value  # the middle of the first 3×3 kernel, or of a bias

        monkeypatch.setattr(engine, "train_step", step)

    return poison


@pytest.mark.parametrize("unit", ["conv1", "conv3", "conv7"])
@pytest.mark.parametrize("step", [1, STEPS + 2, STEPS + 5])
def test_weights_that_are_not_finite(
    unit: str, step: int, spec_file: Path, tmp_path: Path, poison: Callable, cli: Cli
) -> None:
    """Put in behind the step, so that the next one's loss is the first to show it."""
    poison(step, lambda state: state.parameters[f"backbone.{unit}.weight"], math.nan)
    folder = tmp_path / "run"
    said = cli(*start_line(spec_file, folder))
    epoch, after = divmod(step, STEPS)
    good = folder / "checkpoints" / "epoch-0001" if epoch else "none"
    assert_one_line(
        said,
        f"the loss of unit {unit} is not finite in epoch {epoch + 1}, step {after + 1};",
        "lower optimizer.lr",
        f"the last good checkpoint: {good}",
    )
    assert not epoch or check_files(folder / "checkpoints" / "epoch-0001") == []


def test_weights_that_are_not_finite_are_never_saved(
    spec_file: Path, tmp_path: Path, poison: Callable, cli: Cli
) -> None:
    """After the last step of an epoch, no loss shows them any more."""
    poison(2 * STEPS, lambda state: state.parameters["backbone.conv5.bias"], math.inf)
    said = cli(*start_line(spec_file, tmp_path / "run"))
    assert_one_line(said, "the weights of unit conv5 are not finite after epoch 2, step 6 (backbone.conv5.bias)")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-0001"]


@pytest.mark.parametrize(("place", "of"), [(0, "the prediction"), (1, "unit conv1"), (7, "unit conv7")])
def test_a_validation_loss_that_is_not_finite(
    place: int, of: str, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    real, epochs = engine.select_and_validate, iter((False, True))

    def validate(*given: Any) -> engine.Evaluation:
        measured = real(*given)
        losses = [measured.loss, *measured.unit_loss]
        losses[place] = math.nan if next(epochs) else losses[place]
        return dataclasses.replace(measured, loss=losses[0], unit_loss=losses[1:])

    monkeypatch.setattr(engine, "select_and_validate", validate)
    said = cli(*start_line(spec_file, tmp_path / "run"))
    good = tmp_path / "run" / "checkpoints" / "epoch-0001"
    assert_one_line(said, f"the validation loss of {of} is not finite after epoch 2; lower optimizer.lr", str(good))
    assert check_files(good) == []


def test_moments_that_are_not_finite_are_never_saved(
    spec_file: Path, tmp_path: Path, poison: Callable, cli: Cli
) -> None:
    """AdamW would stop updating those weights, and no loss would show it."""
    weight = "backbone.conv5.bias"
    poison(STEPS + 2, lambda state: state.optimizer.state[state.parameters[weight]]["exp_avg_sq"], math.inf)
    said = cli(*start_line(spec_file, tmp_path / "run"))
    assert_one_line(said, "the moments of unit conv5 are not finite after epoch 2, step 6 (backbone.conv5.bias|exp_a")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-0001"]


def test_a_loss_is_looked_at_within_a_long_epoch(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SETTLE_EVERY", 2)
    taken = []
    real = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda *given: (taken.append(1), real(*given)))
    (tmp_path / "tiny.json").write_text(TWO_EPOCHS)
    said = cli(*start_line(tmp_path / "tiny.json", tmp_path / "run"), "--set", "optimizer.lr=1e30")
    assert_one_line(said, "the loss of unit conv1 is not finite in epoch 1, step 2")
    assert len(taken) == 2


# Damaged checkpoints.


def asked(copy: Path, spec: Path) -> dict[str, tuple[str | Path, ...]]:
    """The commands that must find the damage."""
    return {"verify": ("verify", copy), "eval": ("eval", copy), "resume": resume_line(spec, copy)}


def assert_found(name: str, copy: Path, spec: Path, cli: Cli, commands: tuple[str, ...]) -> None:
    """Each command names the damaged file (or the one that no longer fits its manifest) and changes nothing."""
    named = "epoch-0001/" if name == "manifest.json" else f"epoch-0001/{name}"
    for command in commands:
        before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
        said = cli(*asked(copy, spec)[command])
        if command == "verify":
            assert (said.code, said.err) == (1, "") and named in said.out
        else:
            assert_one_line(said, named)
        assert before == {
            path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"
        }


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_twenty_places(name: str, copy: Path, spec_file: Path, cli: Cli) -> None:
    file = copy / "checkpoints" / "epoch-0001" / name
    content = file.read_bytes()
    draw = random.Random(0)
    for number, length in enumerate([0, 1, len(content) - 1, *(draw.randrange(len(content)) for _ in range(17))]):
        file.write_bytes(content[:length])
        assert_found(name, copy, spec_file, cli, ("verify", "eval", "resume") if number < 4 else ("verify", "eval"))
    file.write_bytes(content)
    assert check_files(file.parent) == []


@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_at_two_hundred_places(name: str, copy: Path, spec_file: Path, cli: Cli) -> None:
    file = copy / "checkpoints" / "epoch-0001" / name
    content = file.read_bytes()
    draw = random.Random(0)
    for number in range(200):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        assert_found(name, copy, spec_file, cli, ("verify", "eval", "resume") if number < 4 else ("verify", "eval"))


def test_weights_that_are_not_finite_are_not_loaded(copy: Path, spec_file: Path, cli: Cli) -> None:
    """Whatever wrote them, with all sums as they should be."""
    folder = copy / "checkpoints" / "epoch-0001"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["backbone.conv3.weight"][0, 0, 0, 0] = torch.nan
    with_fitting_manifest(folder, tensors)
    said = "model.safetensors: tensor backbone.conv3.weight holds values that are not finite"
    assert said in cli("verify", copy).out
    assert_one_line(cli("eval", copy), said)
    assert_one_line(cli(*resume_line(spec_file, copy)), said)


def change(file: Path, **values: Any) -> None:
    """Change values of a JSON object, and make its checkpoint's manifest fit."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    with_fitting_manifest(file.parent)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epoch": 2}, "state.json: is that of epoch-0002"),
        ({"epoch": -1}, "state.json: epoch: "),
        ({"step": "three"}, "state.json: step: "),
        ({"best": None}, "state.json: does not fit its metrics"),
        ({"best": {"name": "../../x", "val_accuracy": 1.0}}, "state.json: best.name: "),
        ({"best": {"name": "epoch-0000-step-000001", "val_accuracy": 1.0}}, "epoch-0000-step-000001/manifest.json"),
        ({"schedule": {"step": 1}}, "does not fit its own spec"),
        ({"schedule": {}}, "does not fit its own spec"),
        ({"optimizer": []}, "does not fit its own spec"),
        ({"meter": {"batches": 3, "images": 1, "right": [], "loss": []}}, "does not fit its metrics"),
        ({"meter": {"batches": 0, "images": 0, "right": [1.0], "loss": []}}, "does not fit its metrics"),
        ({"meter": {"batches": 0, "images": -1, "right": [], "loss": []}}, "does not fit its metrics"),
        ({"more": 1}, "state.json: more: "),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit(values: dict[str, Any], said: str, copy: Path, spec_file: Path, cli: Cli) -> None:
    """Although its sums do."""
    change(copy / "checkpoints" / "epoch-0001" / "state.json", **values)
    assert_one_line(cli(*resume_line(spec_file, copy)), said)


@pytest.mark.parametrize("what", ["missing", "more", "other shape", "not finite"])
def test_moments_that_do_not_fit(what: str, copy: Path, spec_file: Path, cli: Cli) -> None:
    """Although their sums do."""
    file = copy / "checkpoints" / "epoch-0001" / "optimizer.safetensors"
    tensors = safetensors.torch.load_file(file)
    moment = "backbone.conv2.bias|exp_avg"
    said = "other optimizer tensors"
    if what == "not finite":
        tensors[moment][0] = torch.inf
        said = "optimizer tensors that are not finite"
    elif what == "missing":
        del tensors[moment]
    elif what == "more":
        tensors["backbone.conv2.bias|more"] = tensors[moment].clone()
    else:
        tensors[moment] = torch.zeros(99)
    safetensors.torch.save_file(tensors, file)
    with_fitting_manifest(file.parent)
    assert_one_line(cli(*resume_line(spec_file, copy)), f"does not fit its own spec ({said})")


# At random.


def test_some_mutated_runs(tmp_path: Path) -> None:
    """`fuzz_checkpoints.py` does thousands."""
    report = fuzz(tmp_path, count=150, seed=1)
    assert report.problems == []
    assert report.cases == 150 and min(report.resumed, report.refused, report.found) > 10


def test_some_kills(tmp_path: Path) -> None:
    """`kill_and_resume.py` does more, at every write step."""
    scenarios = ("tiny", "tiny-seeds")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_and_resume.py")), *scenarios, "--every", "29"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(report) for report in reports] == [[name] for name in scenarios]
    assert min(report["at_write_steps"] for each in reports for report in each.values()) > 5
