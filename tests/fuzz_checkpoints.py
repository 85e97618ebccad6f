"""Mutate checkpoints and run directories at random; `verify`, `eval` and `--resume` must each give a clear answer.

    OMP_NUM_THREADS=1 python tests/fuzz_checkpoints.py --count 2000

A case is a copy of a run that was broken off in its last epoch, with one to three mutations: bits, lengths, files that
are gone, swapped, replaced by folders, links or pipes, JSON of another shape, with its sums made to fit or not. No
answer may be a traceback, take over ten seconds, or take wrong weights as right: `eval` may only give what one of the
run's own checkpoints gives, and a run that `--resume` brings to its end must have the weights of the unbroken one.
Prints JSON; exit code 1 if anything was wrong.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tiny import tiny_spec

from asge_zoo.cli.main import run
from asge_zoo.engine import train as engine
from asge_zoo.engine.checkpoint import pack
from asge_zoo.files import json_bytes

SPEC = tiny_spec("train.epochs=3", "train.checkpoint.every_steps=5")
SLOW = 10.0  # seconds
ODD = (None, True, -1, 0, 1e308, 10**30, "", "../..", [], {}, [[[[]]]], {"kind": "x"}, "epoch-0001", "\x00")


class Power(BaseException):
    """What ends a process that nobody asked: no handler may catch it."""


class TookTooLong(BaseException):
    """A command hangs: no handler may catch it."""


def broken_run(work: Path) -> Path:
    """A run of two epochs of the tiny spec, broken off in the second, with a single checkpoint."""
    return _broken(tiny_spec("train.epochs=2"), work / "run", steps=8)


def _broken(spec: Any, folder: Path, *, steps: int) -> Path:
    real = engine.train_step

    def step(state: engine.TrainState, *batch: Any) -> None:
        real(state, *batch)
        if state.total_steps == steps:
            raise Power

    engine.train_step = step
    try:
        engine.train(spec, run_dir=folder, device="cpu")
    except Power:
        pass
    finally:
        engine.train_step = real
    return folder


def with_fitting_manifest(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Make a checkpoint's manifest fit its files, after putting other weights into it, if given."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if tensors is not None:
        metadata = {"format": "pt", "spec_sha256": manifest["spec_sha256"]}
        (folder / "model.safetensors").write_bytes(pack(tensors, metadata))
    for name in manifest["sha256"]:
        if (folder / name).is_file():
            manifest["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_bytes(json_bytes(manifest))


# Mutations: each takes a run directory and a source of randomness.


def _file(folder: Path, draw: random.Random) -> Path:
    """A file of the run, one of a checkpoint more often than not."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    kept = [path for path in files if path.parent.parent.name == "checkpoints"]
    return draw.choice(kept if kept and draw.random() < 0.8 else files)


def _checkpoint(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted((folder / "checkpoints").iterdir()))


def flip_bits(folder: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    content = bytearray(file.read_bytes() or b"\0")
    for _ in range(draw.choice((1, 1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(folder: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content) + 1)])


def insert(folder: Path, draw: random.Random) -> None:
    file = _file(folder, draw)
    content = file.read_bytes()
    place = draw.randrange(len(content) + 1)
    file.write_bytes(content[:place] + draw.randbytes(draw.randrange(1, 64)) + content[place:])


def replace_by_noise(folder: Path, draw: random.Random) -> None:
    _file(folder, draw).write_bytes(draw.randbytes(draw.randrange(2000)))


def nest_deeply(folder: Path, draw: random.Random) -> None:
    _file(folder, draw).write_text("[" * 100_000)


def huge_header(folder: Path, draw: random.Random) -> None:
    file = _checkpoint(folder, draw) / draw.choice(("model.safetensors", "optimizer.safetensors"))
    if file.is_file():
        file.write_bytes(draw.choice((2**63, 10**8, 2**32)).to_bytes(8, "little") + file.read_bytes()[8:])
        _fit(file.parent)


def delete(folder: Path, draw: random.Random) -> None:
    _file(folder, draw).unlink()


def delete_checkpoint(folder: Path, draw: random.Random) -> None:
    _remove(_checkpoint(folder, draw))


def swap(folder: Path, draw: random.Random) -> None:
    one, two = _file(folder, draw), _file(folder, draw)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def rename_checkpoint(folder: Path, draw: random.Random) -> None:
    path = _checkpoint(folder, draw)
    name = draw.choice(("epoch-0009", "epoch-0000", "epoch-0002-step-000003", "other", "epoch-99999999999999999999"))
    if not (path.parent / name).exists():
        path.rename(path.parent / name)


def copy_checkpoint(folder: Path, draw: random.Random) -> None:
    path = _checkpoint(folder, draw)
    target = path.parent / draw.choice(("epoch-0004", "epoch-0002-step-000004", "copy"))
    if _is_folder(path) and not target.exists():
        shutil.copytree(path, target, symlinks=True)


def take_for_another(folder: Path, draw: random.Random) -> None:
    """A checkpoint, whole in itself, stands under the name of another."""
    one, other = _checkpoint(folder, draw), _checkpoint(folder, draw)
    if one != other and _is_folder(other):
        _remove(one)
        shutil.copytree(other, one, symlinks=True)


def become_something_else(folder: Path, draw: random.Random) -> None:
    """A file or a checkpoint becomes a folder, a link that goes nowhere or round, or a pipe."""
    path = draw.choice((_file, _checkpoint))(folder, draw)
    _remove(path)
    draw.choice(
        (
            path.mkdir,
            path.touch,
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("nowhere"),
            lambda: path.symlink_to("/"),
            lambda: os.mkfifo(path),
        )
    )()


def relink(folder: Path, draw: random.Random) -> None:
    link = folder / draw.choice(("best", "last"))
    _remove(link)
    target = draw.choice(("best", "nowhere", "checkpoints", "/", str(_checkpoint(folder, draw)), "."))
    link.symlink_to(target)


def empty_the_run(folder: Path, draw: random.Random) -> None:
    _remove(folder / draw.choice(("checkpoints", "spec.json", "environment.json", "metrics.jsonl", ".lock")))


def change_json(folder: Path, draw: random.Random) -> None:
    """A value somewhere in a JSON file becomes an odd one; the sums are made to fit, or not."""
    file = _checkpoint(folder, draw) / draw.choice(
        ("state.json", "state.json", "spec.json", "metrics.jsonl", "manifest.json")
    )
    if draw.random() < 0.15:
        file = folder / draw.choice(("spec.json", "environment.json"))
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.suffix == ".jsonl" else None
        value = lines if lines is not None else json.loads(file.read_text())
    except (OSError, ValueError):
        return
    _change(value, draw)
    file.write_text("\n".join(map(json.dumps, value)) + "\n" if lines is not None else json.dumps(value))
    if file.parent != folder and draw.random() < 0.8:
        _fit(file.parent)


def _change(value: Any, draw: random.Random) -> None:
    places = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not places:
        return
    place = draw.choice(list(places))
    if isinstance(value[place], (dict, list)) and value[place] and draw.random() < 0.8:
        _change(value[place], draw)
    elif draw.random() < 0.2:
        del value[place]
    elif draw.random() < 0.2 and isinstance(value, dict):
        value["more"] = draw.choice(ODD)
    else:
        value[place] = draw.choice(ODD)


def other_tensors(folder: Path, draw: random.Random) -> None:
    """Tensors go, come, or change shape or type; the sums are made to fit."""
    file = _checkpoint(folder, draw) / draw.choice(("model.safetensors", "optimizer.safetensors"))
    try:
        with safetensors.safe_open(file, framework="pt") as archive:
            metadata = archive.metadata()
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError):
        return
    name = draw.choice(sorted(tensors))
    changed = draw.choice(
        (None, torch.zeros(3), tensors[name].double(), tensors[name][None], torch.zeros(0), tensors[name].bool())
    )
    del tensors[name]
    if changed is not None:
        tensors[draw.choice((name, "more", f"{name}|more"))] = changed
    file.write_bytes(pack(tensors, {"format": "pt", "spec_sha256": (metadata or {}).get("spec_sha256", "")}))
    _fit(file.parent)


def _fit(folder: Path) -> None:
    """Make the manifest fit, if there is one left that can be read."""
    if (folder / "manifest.json").is_file():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            with_fitting_manifest(folder)


def _is_folder(path: Path) -> bool:
    """Itself, that is, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# Those that make a wrong thing whole again come with sums that fit: what they say is then taken at its word.
FORGING = (change_json, other_tensors, huge_header)
MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip_bits, cut, insert, replace_by_noise, nest_deeply, delete, delete_checkpoint, swap, rename_checkpoint),
    *(copy_checkpoint, take_for_another, become_something_else, relink, empty_the_run, *FORGING),
)


@dataclass
class FuzzReport:
    """What came of it.

    Attributes:
        cases: runs mutated.
        found: cases in which `verify` said no, or could not.
        evaluated: that `eval` gave an accuracy for.
        resumed: brought to their end.
        best_lost: those of them whose best checkpoint was chosen anew, which `--resume` said.
        refused: that `--resume` refused.
        slowest: seconds of the slowest command.
        mutations: how often each was applied.
        problems: what was wrong.
    """

    cases: int = 0
    found: int = 0
    evaluated: int = 0
    resumed: int = 0
    best_lost: int = 0
    refused: int = 0
    slowest: float = 0.0
    mutations: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


class Fuzzer:
    """The run that is mutated, and what is right."""

    def __init__(self, work: Path) -> None:
        self.work, self.report = work, FuzzReport()
        self.spec_file = work / "spec.json"
        self.spec_file.write_bytes(json_bytes(SPEC.resolved()))
        self.base = _broken(SPEC, work / "base", steps=16)  # saved: after steps 12 (the epoch's end) and 15
        whole = work / "whole"
        engine.train(SPEC, run_dir=whole, device="cpu")
        self.right = {name: (whole / name / "model.safetensors").read_bytes() for name in ("best", "last")}
        folders = [path for run in (self.base, whole) for path in (run / "checkpoints").iterdir()]
        self.answers = {self._ask("eval", str(path), "--json")[1] for path in folders}

    def case(self, number: int, draw: random.Random) -> None:
        """One run, mutated and asked."""
        folder = self.work / "case"
        shutil.copytree(self.base, folder, symlinks=True)
        applied = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            mutation = draw.choice(MUTATIONS)
            with contextlib.suppress(OSError, IndexError):  # nothing is left to mutate
                mutation(folder, draw)
                applied.append(mutation)
        self.report.cases += 1
        self.report.mutations.update(mutation.__name__ for mutation in applied)
        forged = any(mutation in FORGING for mutation in applied)
        what = f"case {number} ({', '.join(mutation.__name__ for mutation in applied)})"
        code, _, _ = self._checked(what, "verify", str(folder))
        self.report.found += code != 0
        if code == 0 and not forged and (damaged := self._damaged(folder)):
            self.report.problems.append(f"{what}: verify does not find {damaged}")
        for path in (folder, folder / "best", folder / "last"):
            code, out, _ = self._checked(what, "eval", str(path), "--json")
            self.report.evaluated += code == 0
            if code == 0 and not forged and out not in self.answers:
                self.report.problems.append(f"{what}: eval takes wrong weights as right: {out}")
        line = ("train", str(self.spec_file), "--run-dir", str(folder), "--resume", "--device", "cpu")
        code, _, err = self._checked(what, *line)
        self.report.resumed += code == 0
        self.report.refused += code == 2
        if code == 0 and not forged:
            self.report.best_lost += "another best checkpoint" in err
            for name, content in self.right.items():
                said = name == "best" and "another best checkpoint" in err
                if (folder / name / "model.safetensors").read_bytes() != content and not said:
                    self.report.problems.append(f"{what}: the resumed run ends with other weights ({name})")
        shutil.rmtree(folder)

    def _damaged(self, folder: Path) -> list[str]:
        """Names of the checkpoints that are there and are not what they were."""
        pairs = [(kept, folder / "checkpoints" / kept.name) for kept in (self.base / "checkpoints").iterdir()]
        return [now.name for kept, now in pairs if _is_folder(now) and _contents(now) != _contents(kept)]

    def _checked(self, what: str, *line: str) -> tuple[int, str, str]:
        """A command's exit code, stdout and stderr; notes what is no clear answer."""
        started = time.perf_counter()
        with _alarm(SLOW):
            code, out, err = self._ask(*line)
        self.report.slowest = max(self.report.slowest, time.perf_counter() - started)
        wrong = []
        if code not in ((0, 1, 2) if line[0] == "verify" else (0, 2)):
            wrong.append(f"ended with {code}: {err}")
        if code == 2 and (len(err.strip().splitlines()) != 1 or out):
            wrong.append(f"said {out} {err}")
        self.report.problems += [f"{what}: {' '.join(line)}: {each}" for each in wrong]
        return code, out, err

    @staticmethod
    def _ask(*line: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run(list(line))
            except (Exception, TookTooLong):
                code = -1
                traceback.print_exc()
        return code, out.getvalue(), err.getvalue()


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """What runs within ends with TookTooLong after so long."""

    def ring(*_: Any) -> None:
        raise TookTooLong(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(work: Path, *, count: int, seed: int) -> FuzzReport:
    """Mutate and ask so many times; `work` is an empty folder."""
    fuzzer = Fuzzer(work)
    for number in range(count):
        fuzzer.case(number, random.Random(seed * 1_000_003 + number))
    return fuzzer.report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        report = fuzz(Path(work), count=options.count, seed=options.seed)
    print(json.dumps(vars(report), indent=2))
    return bool(report.problems)


if __name__ == "__main__":
    sys.exit(main())
