"""A push or a pull that ends under way leaves all of it or nothing, and goes well when repeated.

    OMP_NUM_THREADS=1 python tests/test_hub_interrupted.py

does so at every request of theirs, in every way, to an empty and to a filled repository; the tests choose a few. Prints
what was wrong; exit code 1 if anything was.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import torch_threads, without_pictures
from hub_cli import User, all_bytes, finish, model_files, new_hub, together
from hub_server import Hub, Record, running
from tiny import tiny_spec

from asge_zoo.engine.train import train
from asge_zoo.hub.prepare import prepare
from asge_zoo.hub.published import CARD

REPOSITORY = "owner/model"
WEIGHTS = "model.safetensors"


def hang_up() -> None:
    """What a fault calls to end the connection."""
    raise ConnectionResetError


# What befalls a request, by method and path; `kill` ends the process that sent it.
Kill = Callable[[], object]
WAYS: dict[str, Callable[[Hub, str, str, Kill], object]] = {
    "hung up on": lambda hub, method, path, _: hub.fault(method=method, path=path, times=None, call=hang_up),
    "answer lost": lambda hub, method, path, _: hub.fault(method=method, path=path, times=None, cut=0),
    "503": lambda hub, method, path, _: hub.fault(method=method, path=path, times=100, status=503),
    "killed": lambda hub, method, path, kill: hub.fault(method=method, path=path, call=kill),
    "killed after": lambda hub, method, path, kill: hub.fault(method=method, path=path, at="answer", call=kill),
    "killed within": lambda hub, method, path, kill: hub.fault(method=method, path=path, at="cut", cut=999, call=kill),
}


@dataclass(frozen=True)
class Model:
    """A run, what it is when published, and what is there before it."""

    run: Path
    new: Mapping[str, bytes]
    old: Mapping[str, bytes]


def make_model(folder: Path) -> Model:
    """A run without pictures, which takes the place of a model with some."""
    with torch_threads(1), without_pictures():
        train(tiny_spec(), run_dir=folder / "run", device="cpu")
    new = prepare(folder / "run", REPOSITORY, evaluated=False)
    old = {name: content[::-1] for name, content in new.items()}
    return Model(folder / "run", new, {**old, CARD: b"# Old\n", "curves.png": b"\x89PNG\0", "units.png": b"\x89PNG\0"})


def state(hub: Hub, model: Model) -> str:
    """Which revision the Hub has."""
    there = model_files(hub, REPOSITORY) if REPOSITORY in hub.repositories else {}
    known: dict[str, Mapping[str, bytes]] = {"nothing": {}, "old": model.old, "new": model.new}
    return next((name for name, files in known.items() if files == there), "a mix")


def start(user: User, hub: Hub, way: str, at: tuple[str, str], *line: str | Path) -> subprocess.Popen[str]:
    """A command line that is interrupted."""
    processes: list[subprocess.Popen[str]] = []
    WAYS[way](hub, *at, lambda: processes[0].kill())
    processes.append(user.start(*line))
    return processes[0]


def interrupt_push(model: Model, way: str, at: tuple[str, str], *, filled: bool) -> list[str]:
    """What was wrong with a push that was interrupted at a request."""
    problems = []
    with tempfile.TemporaryDirectory() as place, running(new_hub()) as hub:
        if filled:
            hub.put(REPOSITORY, model.old)
        line = ("push", model.run, REPOSITORY, "--no-eval")
        user, before = User(hub.url, Path(place)), "old" if filled else "nothing"
        finish(start(user, hub, way, at, *line))
        if (left := state(hub, model)) not in (before, "new"):
            problems.append(f"leaves {left}")
        if not any(fault.struck for fault in hub.faults):
            problems.append("nothing befell it")
        hub.faults.clear()
        again = user(*line)
        if again.code or state(hub, model) != "new":
            problems.append(f"again: leaves {state(hub, model)}, and says {again}")
        elif len(hub.commits(REPOSITORY)) != 2 + filled:
            problems.append(f"again: {len(hub.commits(REPOSITORY))} commits")
    return [f"push, {way} at {at}, {before} there: {problem}" for problem in problems]


def interrupt_pull(model: Model, way: str, at: tuple[str, str]) -> list[str]:
    """What was wrong with a pull that was interrupted at a request."""
    problems = []
    with tempfile.TemporaryDirectory() as place, running(new_hub()) as hub:
        hub.put(REPOSITORY, model.new)
        user = User(hub.url, Path(place), token=None)
        to = user.folder("here") / "mine"
        line = ("pull", REPOSITORY, "--to", to)
        finish(start(user, hub, way, at, *line))
        whole = to.exists() and {**all_bytes(to), **model.new} == all_bytes(to)
        if to.exists() and not whole:
            problems.append(f"leaves {sorted(all_bytes(to))}")
        if not any(fault.struck for fault in hub.faults):
            problems.append("nothing befell it")
        hub.faults.clear()
        if not whole:
            again = user(*line)
            if again.code or all_bytes(to) != {**all_bytes(to), **model.new}:
                problems.append(f"again: leaves {sorted(all_bytes(to))}, and says {again}")
        if [path for path in to.parent.iterdir() if path != to]:
            problems.append(f"leaves {sorted(to.parent.iterdir())}")
    return [f"pull, {way} at {at}: {problem}" for problem in problems]


def requests(log: Iterable[Record]) -> list[tuple[str, str]]:
    """The requests, as a fault names them; commits' hashes are other ones each time."""
    found = []
    for record in log:
        path = re.sub("[0-9a-f]{40}(?![0-9a-f])", "[0-9a-f]{40}", re.escape(record.path.split("?")[0]))
        found.append((record.method, rf"^{path}(\?|$)"))
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("model"))


def test_a_push_that_is_interrupted(model: Model) -> None:
    assert together(
        lambda: interrupt_push(model, "killed", ("POST", "/commit/"), filled=False),
        lambda: interrupt_push(model, "killed after", ("POST", "/commit/"), filled=True),
        lambda: interrupt_push(model, "answer lost", ("POST", "/commit/"), filled=True),
        lambda: interrupt_push(model, "killed after", ("PUT", "/storage/"), filled=True),
    ) == [[], [], [], []]


def test_a_pull_that_is_interrupted(model: Model) -> None:
    assert together(
        lambda: interrupt_pull(model, "killed within", ("GET", "/cdn/")),
        lambda: interrupt_pull(model, "killed", ("GET", "/tree/")),
    ) == [[], []]


def main() -> int:
    """Everywhere, in every way."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        calls: list[Callable[[], list[str]]] = []
        with running(new_hub()) as hub:
            for filled in (False, True):
                if filled:
                    hub.repositories.clear()
                    hub.objects.clear()
                    hub.put(REPOSITORY, model.old)
                hub.log.clear()
                assert User(hub.url, Path(folder, "user"))("push", model.run, REPOSITORY, "--no-eval").code == 0
                for at in requests(hub.log):
                    for way in WAYS:
                        if way != "killed within":
                            calls.append(lambda way=way, at=at, f=filled: interrupt_push(model, way, at, filled=f))
            hub.log.clear()
            assert User(hub.url, Path(folder, "user"))("pull", REPOSITORY).code == 0
            for at in requests(hub.log):
                for way in WAYS:
                    if way != "killed within" or at[1].startswith("^/cdn/"):
                        calls.append(lambda way=way, at=at: interrupt_pull(model, way, at))
        print(f"{len(calls)} interruptions", flush=True)
        problems = [problem for found in together(*calls) for problem in found]
    print("\n".join(problems) or "all went well")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
