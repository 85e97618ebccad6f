"""Checkpoints: what goes in comes out bitwise, what is damaged is found, and nothing is ever half there."""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import TrainedRun, torch_threads
from fuzz_checkpoints import with_fitting_manifest
from tiny import tiny_spec
from torch import Tensor

from asge_zoo import files
from asge_zoo.compiler.build import compile_spec
from asge_zoo.engine.checkpoint import check_files, pack
from asge_zoo.engine.keeper import CheckpointKeeper
from asge_zoo.engine.loading import all_checkpoints, find_checkpoint, load_checkpoint
from asge_zoo.engine.state import TrainState, begin
from asge_zoo.engine.train import train_step
from asge_zoo.errors import CheckpointError
from asge_zoo.evaluate import Evaluation
from asge_zoo.hub.models import load
from asge_zoo.spec import Checkpointing, Spec

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl", "spec.json", "manifest.json"]
STEPS = 40  # in an epoch


def a_batch(spec: Spec, seed: int) -> tuple[Tensor, Tensor]:
    """Images as the spec's network takes them, and labels."""
    generator = torch.Generator().manual_seed(seed)
    side = spec.resolved()["data"]["size"]
    return torch.randn(8, 1, side, side, generator=generator), torch.randint(10, (8,), generator=generator)


def a_state(*overrides: str, steps: int = 2, steps_per_epoch: int = STEPS) -> TrainState:
    """A tiny network after a few steps."""
    spec = tiny_spec(*overrides)
    state = begin(spec, compile_spec(spec), steps_per_epoch, time.perf_counter())
    state.graph.train()
    with state.epoch_time.running():
        for seed in range(steps):
            train_step(state, *a_batch(spec, seed))
    if steps:
        state.check_finite()
    return state


def validated(accuracy: float) -> Evaluation:
    """What a validation may have found."""
    return Evaluation(180, accuracy, 90.0, 1.0, [50.0] * 7, [1.0] * 7)


def names_in(folder: Path) -> list[str]:
    """What a folder holds, hidden or not."""
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def state() -> TrainState:
    """A tiny network after an epoch of two steps, and a third step."""
    with torch_threads(1):
        state = a_state(steps=2, steps_per_epoch=2)
        state.end_epoch(validated(50.0))
        train_step(state, *a_batch(state.spec, 2))
        state.check_finite()
        return state


@pytest.fixture
def keeper(tmp_path: Path) -> CheckpointKeeper:
    """Keeps checkpoints in a new run directory."""
    (tmp_path / "checkpoints").mkdir()
    return CheckpointKeeper(tmp_path, Checkpointing())


@pytest.fixture(scope="module")
def whole(state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint. Not to be changed: take `copy`."""
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    state.save(folder)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# What goes in comes out.


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("rule.kind=bp", "prediction.kind=last"),
        ("prediction.kind=best", "backbone.extra_conv=true"),
        ("norm.affine=true", "backbone.bias=false"),
        ("rule.goodness.alpha=1.5", "data.size=20"),
        ("train.precision=bfloat16",),
    ],
    ids=" ".join,
)
def test_round_trip(overrides: tuple[str, ...], tmp_path: Path) -> None:
    state = a_state(*overrides)
    state.graph.prediction.select(state.graph.head, [10.0, 30.0, *[20.0] * (len(state.graph.units) - 2)])
    state.save(tmp_path / "checkpoint")
    assert check_files(tmp_path / "checkpoint") == []
    graph, spec = load_checkpoint(tmp_path / "checkpoint")
    assert spec == state.spec
    assert not graph.training
    saved, loaded = state.graph.eval().state_dict(), graph.state_dict()
    assert saved.keys() == loaded.keys()
    assert not [name for name in saved if not torch.equal(saved[name], loaded[name])]
    images, _ = a_batch(spec, seed=9)
    with torch.no_grad():
        assert torch.equal(graph(images), state.graph(images))
        for one, two in zip(graph.unit_logits(images), state.graph.unit_logits(images), strict=True):
            assert torch.equal(one, two)


def test_load_takes_the_best_of_a_run(trained: TrainedRun) -> None:
    loaded = load(trained.folder)
    weights = safetensors.torch.load_file(trained.folder / "best" / "model.safetensors")
    assert not loaded.training
    assert not [name for name, tensor in loaded.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert find_checkpoint(trained.folder) == (trained.folder / "best").resolve()
    assert find_checkpoint(trained.folder / "last") == trained.folder / "last"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer.kind=sgd",),
        ("schedule.kind=constant",),
        ("rule.kind=bp", "prediction.kind=last"),
        ("train.compile=true",),
    ],
    ids=" ".join,
)
@torch.compiler.set_stance("force_eager")  # a compiled network's weights lie otherwise in memory; its step may be eager
def test_a_restored_run_takes_the_very_steps(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Weights, moments, rates and sums go on as in the run that was never saved."""
    going_on, restored = a_state(*overrides), a_state(*overrides, steps=0)
    folder = tmp_path / going_on.name
    going_on.save(folder)
    restored.restore(folder)
    for seed in (7, 8):
        for state in (going_on, restored):
            state.graph.train()
            train_step(state, *a_batch(state.spec, seed))
    for state in (going_on, restored):
        state.check_finite()
        state.save(tmp_path / str(id(state)))
    one, two = (tmp_path / str(id(state)) for state in (going_on, restored))
    for name in ("model.safetensors", "optimizer.safetensors", "spec.json", "metrics.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    saved = [json.loads((folder / "state.json").read_text()) for folder in (one, two)]
    timed = ("seconds", "epoch_seconds")
    assert [{key: some[key] for key in some if key not in timed} for some in saved[:1]] == [
        {key: some[key] for key in some if key not in timed} for some in saved[1:]
    ]
    assert saved[0]["step"] == 4 and saved[0]["meter"]["batches"] == 4


def test_equal_states_give_equal_bytes(state: TrainState) -> None:
    """Although safetensors writes its metadata in random order."""
    metadata = {"format": "pt", **{f"key{number}": "value" for number in range(20)}}
    contents = {pack(state.graph.state_dict(), metadata) for _ in range(8)}
    assert len(contents) == 1
    back = safetensors.torch.load(contents.pop())
    assert not [name for name, tensor in state.graph.state_dict().items() if not torch.equal(tensor, back[name])]


def test_momentum_is_saved_too(tmp_path: Path) -> None:
    state = a_state("optimizer.kind=sgd")
    state.save(tmp_path / "checkpoint")
    moments = safetensors.torch.load_file(tmp_path / "checkpoint" / "optimizer.safetensors")
    assert set(moments) == {f"{name}|momentum_buffer" for name, _ in state.graph.named_parameters()}


# What is in the files.


def test_a_run_holds_safetensors_json_and_pictures_alone(trained: TrainedRun) -> None:
    """Every file is what its name says; there is nothing to unpickle."""
    found = [file for file in trained.folder.rglob("*") if file.is_file()]
    assert len(found) > 10
    for file in found:
        if file.name == ".lock":
            json.loads(file.read_text())
        elif file.suffix == ".safetensors":
            safetensors.torch.load_file(file)
        elif file.suffix in (".json", ".jsonl"):
            text = file.read_text()
            for part in text.splitlines() if file.suffix == ".jsonl" else [text]:
                json.loads(part)
        else:
            assert file.suffix == ".png" and file.read_bytes().startswith(b"\x89PNG"), file


def test_the_files_of_a_checkpoint(whole: Path) -> None:
    assert names_in(whole) == sorted(FILES)


def test_the_manifest_holds_the_sums_of_the_files(whole: Path, state: TrainState) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    sums = {name: hashlib.sha256((whole / name).read_bytes()).hexdigest() for name in FILES[:-1]}
    assert manifest["sha256"] == sums
    assert manifest["spec_sha256"] == state.spec.digest()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_each_tensor_has_its_sum_in_the_metadata(name: str, whole: Path, state: TrainState) -> None:
    with safetensors.safe_open(whole / name, framework="pt") as archive:
        metadata = archive.metadata()
        tensors = {key: archive.get_tensor(key) for key in archive.keys()}
    sums = {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in tensors.items()}
    assert json.loads(metadata["sha256"]) == sums
    assert metadata["spec_sha256"] == state.spec.digest()


def test_any_layout_of_a_tensor_can_be_saved() -> None:
    """safetensors itself refuses tensors that are not contiguous."""
    plain = torch.arange(48.0).reshape(2, 2, 3, 4)
    layouts = {
        "channels_last": plain.to(memory_format=torch.channels_last),
        "part": plain[:, :, ::2],
        "scalar": plain.sum(),
    }
    back = safetensors.torch.load(pack(layouts, {"format": "pt"}))
    assert all(torch.equal(back[name], tensor) for name, tensor in layouts.items())


# What is damaged is found.


def flipped(content: bytes, position: int, mask: int) -> bytes:
    """`content` with some bits of one byte flipped."""
    return content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def damages(content: bytes, count: int) -> Iterator[bytes]:
    """`content` with its first, its last, or one of `count` other bytes changed."""
    draw = random.Random(0)
    for position in [0, len(content) - 1, *(draw.randrange(len(content)) for _ in range(count))]:
        yield flipped(content, position, draw.randrange(1, 256))


def assert_refused(folder: Path, *words: str) -> None:
    """`load` refuses it in one line that holds these words."""
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(folder) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FILES[:-1])
def test_a_flipped_byte_is_found(name: str, copy: Path) -> None:
    assert check_files(copy) == []
    content = (copy / name).read_bytes()
    for damaged in damages(content, 40):
        (copy / name).write_bytes(damaged)
        assert check_files(copy) == [f"{copy / name}: its sha256 is not the manifest's"]
    assert_refused(copy, name, "sha256")
    (copy / name).write_bytes(content)
    assert check_files(copy) == []


def test_a_flipped_bit_of_the_manifest_is_found(copy: Path) -> None:
    content = (copy / "manifest.json").read_bytes()
    missed = []
    for position in range(len(content)):
        (copy / "manifest.json").write_bytes(flipped(content, position, 1 << position % 8))
        if not check_files(copy):
            missed.append(position)
    assert missed == [], "these flips go by: " + " ".join(repr(content[p : p + 1]) for p in missed)


def test_a_tensor_that_differs_from_its_sum_is_found(copy: Path) -> None:
    """Even where someone made the manifest fit the changed file."""
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    with safetensors.safe_open(copy / "model.safetensors", framework="pt") as archive:
        metadata = archive.metadata()
    weights["backbone.conv3.weight"][0, 0, 0, 0] += 1e-3
    safetensors.torch.save_file(weights, copy / "model.safetensors", metadata)
    with_fitting_manifest(copy)
    said = "tensor backbone.conv3.weight does not have the sha256 of its metadata"
    assert check_files(copy) == [f"{copy / 'model.safetensors'}: {said}"]
    assert_refused(copy, said)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", ["nothing", "one byte", "half", "all but one byte"])
def test_a_truncated_file_is_found(name: str, kept: str, copy: Path) -> None:
    content = (copy / name).read_bytes()
    length = {"nothing": 0, "one byte": 1, "half": len(content) // 2, "all but one byte": len(content) - 1}[kept]
    (copy / name).write_bytes(content[:length])
    assert len(check_files(copy)) == 1
    assert_refused(copy, name)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(name: str, copy: Path) -> None:
    (copy / name).unlink()
    problems = check_files(copy)
    assert len(problems) == 1 and name in problems[0]
    assert_refused(copy, name)


@pytest.mark.parametrize(
    "content",
    [b"{}", b"[]", b"null", b'{"sha256": {}}', b'{"sha256": []}', b'{"sha256": {"../secret": "00"}}', b"\xff\xff"],
)
def test_a_manifest_of_another_shape_is_found(content: bytes, copy: Path) -> None:
    (copy / "manifest.json").write_bytes(content)
    assert check_files(copy)
    assert_refused(copy, "manifest.json")


def test_a_file_put_in_another_ones_place_is_found(copy: Path) -> None:
    (copy / "state.json").write_bytes((copy / "spec.json").read_bytes())
    assert_refused(copy, "state.json", "sha256")


def test_weights_that_do_not_fit_their_spec_are_refused(copy: Path) -> None:
    """Whole files that do not belong together: the spec of a wider network."""
    (copy / "spec.json").write_text(json.dumps(tiny_spec("backbone.width=0.1").resolved()))
    with_fitting_manifest(copy)
    assert_refused(copy, "does not fit its own spec")


@pytest.mark.parametrize("what", ["file", "empty folder", "nothing", "folder of something else"])
def test_what_is_no_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "thing"
    if what == "file":
        path.write_text("{}")
    elif what != "nothing":
        path.mkdir()
    if what == "folder of something else":
        (path / "model.safetensors").write_bytes(b"")
    for find in (load, find_checkpoint, all_checkpoints):
        with pytest.raises(CheckpointError, match="thing: (no such|neither a checkpoint nor)"):
            find(path)


def test_several_runs_must_be_told_apart(trained: TrainedRun, tmp_path: Path) -> None:
    for seed in ("seed-0", "seed-1"):
        shutil.copytree(trained.folder, tmp_path / seed, symlinks=True)
    with pytest.raises(CheckpointError, match=r"holds several runs; name one of seed-0, seed-1, such as .*seed-0"):
        load(tmp_path)
    assert len(all_checkpoints(tmp_path)) == 2 * len(all_checkpoints(trained.folder))


# Nothing is ever half there.


def failing(name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `os.<name>` raise at its `at`-th call, counted from 1."""
    real: Callable[..., Any] = getattr(os, name)
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(("call", "at"), [("rename", 1), *(("fsync", at) for at in range(1, len(FILES) + 2))])
def test_an_interrupted_checkpoint_is_not_there(
    call: str, at: int, state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's fsync, the folder's own, then the rename."""
    failing(call, at, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "checkpoint")
    assert names_in(tmp_path) == []


def test_a_checkpoint_is_there_once_it_is_renamed(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing("fsync", len(FILES) + 2, monkeypatch)  # the parent's, behind the rename
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "checkpoint")
    assert names_in(tmp_path) == ["checkpoint"]
    assert check_files(tmp_path / "checkpoint") == []


def test_it_is_whole_when_it_appears(state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is written under the checkpoint's own name, and the manifest comes last."""
    folder = tmp_path / "checkpoint"
    written: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "_write", lambda file, _: written.append((Path(file.name).name, folder.exists())))
    state.save(folder)
    assert sorted(written) == [(name, False) for name in sorted(FILES)]
    assert written[-1][0] == "manifest.json"
    assert names_in(tmp_path) == ["checkpoint"]


def test_a_checkpoint_is_never_written_over(state: TrainState, copy: Path) -> None:
    with pytest.raises(OSError):
        state.save(copy)
    assert names_in(copy.parent) == ["copy"]
    assert check_files(copy) == []


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_an_interrupted_file_leaves_the_old_one(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    files.write_file(file, b"old")
    failing(call, 1, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        files.write_file(file, b"new")
    assert names_in(tmp_path) == ["result.json"]
    assert file.read_bytes() == b"old"


def test_an_interrupted_link_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    files.point(tmp_path / "best", tmp_path / "one")
    failing("replace", 1, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        files.point(tmp_path / "best", tmp_path / "two")
    assert names_in(tmp_path) == ["best", "one", "two"]
    assert (tmp_path / "best").resolve() == tmp_path / "one"


def end_epoch(state: TrainState, keeper: CheckpointKeeper, accuracy: float) -> None:
    """An epoch ends with that validation accuracy, and is saved."""
    with state.epoch_time.running():
        while state.step < 2:
            train_step(state, *a_batch(state.spec, state.step))
    state.check_losses()
    state.end_epoch(validated(accuracy))
    keeper.save(state)


def test_an_interrupted_epoch_leaves_the_last_ones_checkpoints(
    keeper: CheckpointKeeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = a_state()
    end_epoch(state, keeper, 10.0)
    failing("rename", 1, monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        end_epoch(state, keeper, 20.0)
    assert names_in(tmp_path) == ["best", "checkpoints", "last"]
    assert names_in(tmp_path / "checkpoints") == ["epoch-0001"]
    assert check_files(tmp_path / "best") == check_files(tmp_path / "last") == []


def test_the_newest_two_are_kept_and_the_best_of_each(keeper: CheckpointKeeper, tmp_path: Path) -> None:
    state = a_state()
    kept = []
    for accuracy in (10.0, 30.0, 20.0, 25.0, 40.0, 5.0):
        end_epoch(state, keeper, accuracy)
        kept.append([int(name.removeprefix("epoch-")) for name in names_in(tmp_path / "checkpoints")])
        assert (tmp_path / "best").resolve().name == state.best.name if state.best else False
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6]]
    assert not os.path.isabs(os.readlink(tmp_path / "best")), "the run directory may be moved"


def test_a_kept_checkpoint_that_is_gone_is_found(keeper: CheckpointKeeper, tmp_path: Path) -> None:
    """Where best is deleted and last is whole, checking the run must not say that all is well."""
    state = a_state()
    for accuracy in (20.0, 10.0):
        end_epoch(state, keeper, accuracy)
    assert [problem for folder in all_checkpoints(tmp_path) for problem in check_files(folder)] == []
    shutil.rmtree(tmp_path / "checkpoints" / "epoch-0001")
    problems = [problem for folder in all_checkpoints(tmp_path) for problem in check_files(folder)]
    assert len(problems) == 1 and "epoch-0001" in problems[0]


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Sets the process's umask for a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True, ids=oct)
def test_modes_follow_the_umask(umask: int, state: TrainState, tmp_path: Path) -> None:
    state.save(tmp_path / "checkpoint")
    files.write_file(tmp_path / "result.json", b"{}")
    files.append_line(tmp_path / "metrics.jsonl", "{}")
    written = [tmp_path / "result.json", tmp_path / "metrics.jsonl", *(tmp_path / "checkpoint").iterdir()]
    assert {file.stat().st_mode & 0o777 for file in written} == {0o666 & ~umask}
    assert (tmp_path / "checkpoint").stat().st_mode & 0o777 == 0o777 & ~umask
