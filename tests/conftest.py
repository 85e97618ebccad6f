"""What several test files share."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kill_and_resume import contents
from tiny import tiny_spec

from asge_zoo import registry
from asge_zoo.cli.main import run
from asge_zoo.engine import plots
from asge_zoo.engine import train as engine
from asge_zoo.engine.result import RunResult
from asge_zoo.engine.train import train
from asge_zoo.process import collect_garbage_rarely
from asge_zoo.registry import ROOMS, components
from asge_zoo.spec import Spec

collect_garbage_rarely()  # as the command line does


class Said(NamedTuple):
    """A command line's exit code and what it wrote."""

    code: int
    out: str
    err: str


class TrainedRun(NamedTuple):
    """A finished run."""

    spec: Spec
    folder: Path
    result: RunResult


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """`count` threads within, as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """No run within draws pictures, which take as long as a short training."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_curves", "plot_units"):
            patch.setattr(plots, name, lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small spend their time waiting for threads."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Three epochs on most of the digits, at an eighth of VGG8's width. Not to be changed: copy what you damage."""
    spec = tiny_spec("data.validation=180", "data.batch_size=32", "backbone.width=0.125", "train.epochs=3")
    folder = tmp_path_factory.mktemp("trained") / "run"
    with torch_threads(1):
        return TrainedRun(spec, folder, train(spec, run_dir=folder, device="cpu"))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs one command line in this process."""

    def run_line(*arguments: str | Path) -> Said:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        written = capsys.readouterr()
        return Said(code, written.out, written.err)

    return run_line


@pytest.fixture
def no_pictures() -> Iterator[None]:
    """Leaves out the pictures."""
    with without_pictures():
        yield


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two epochs of the tiny spec come to, without pictures."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with torch_threads(1), without_pictures():
        train(tiny_spec("train.epochs=2"), run_dir=folder, device="cpu")
    return contents(folder)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    """Sets what happens, once, at the end of the n-th training step from now on, counted from 1."""

    def happens(number: int, what: Callable[[], Any]) -> None:
        real = engine.train_step
        left = iter(range(number - 1, -1, -1))

        def step(*arguments: Any) -> None:
            real(*arguments)
            if next(left, None) == 0:
                what()

        monkeypatch.setattr(engine, "train_step", step)

    yield happens


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of a test's own: what the test registers or loads is gone after it."""
    monkeypatch.setattr(registry, "_components", {group: components(group) for group in ROOMS})
    monkeypatch.setattr(registry, "_plugins", {})


@pytest.fixture
def site(own_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages are found in, as in site-packages; their modules are named `plugin_…`."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("plugin_"):
            del sys.modules[name]
