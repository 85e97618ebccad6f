"""Kill training runs at random instants, resume them, and compare with the run that was left alone.

    OMP_NUM_THREADS=1 python tests/kill_and_resume.py --kills 30 eager compiled stepwise seeds
    OMP_NUM_THREADS=1 python tests/kill_and_resume.py --every 1 tiny

Half of the kills come at a random write step (`fault_points`), half from outside after a random time. After each kill
the run directory is given to `eval` and `verify`, which must answer; then the run is resumed. Once it ends, its
weights, moments, chosen checkpoint and metrics (times apart) must be bitwise those of the run that was never killed.
With `--every K` there is one kill a run instead, at each K-th instant of its write steps. Prints JSON; exit code 1 if
anything differed.

Every run is a process of its own, forked from this one, which has loaded torch: hence one thread.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from fault_points import FaultPoints
from tiny import TINY, tiny_spec

from asge_zoo.cli.main import run
from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts

DIGITS = ("vgg8_digits", "--set", "train.epochs=5")
EAGER = ("--set", "train.compile=false")
SCENARIOS: dict[str, tuple[str, ...]] = {
    "eager": (*DIGITS, *EAGER),
    "compiled": DIGITS,
    "stepwise": (*DIGITS, *EAGER, "--set", "train.checkpoint.every_steps=7"),
    "seeds": (*DIGITS, *EAGER, "--set", "train.runs=2"),
    "tiny": ("tiny.json", "--set", "train.epochs=4", "--set", "train.checkpoint.every_steps=4"),
    "tiny-seeds": ("tiny.json", "--set", "train.runs=2"),
}


@dataclass
class Report:
    """What came of a scenario.

    Attributes:
        at_write_steps, from_outside: kills of each sort.
        directories: runs brought to their end.
        too_early: kills after which there was no best checkpoint yet, and `eval` said so.
        problems: what differed or choked.
    """

    at_write_steps: int = 0
    from_outside: int = 0
    directories: int = 0
    too_early: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Of both sorts."""
        return self.at_write_steps + self.from_outside


def without_times(values: Any) -> Any:
    """JSON values without wall times and paths."""
    if isinstance(values, dict):
        dropped = ("seconds", "epoch_seconds", "images_per_second", "run_dir")
        return {key: without_times(value) for key, value in values.items() if key not in dropped}
    return [without_times(value) for value in values] if isinstance(values, list) else values


def contents(folder: Path) -> dict[str, Any]:
    """What a run comes to, by file: bytes, links' targets, and JSON without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.suffix == ".safetensors" or path.name == "spec.json":
            found[name] = path.read_bytes()
        elif path.name in ("state.json", "result.json"):
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        else:  # a manifest holds the sums of times, a picture shows what is compared above: they must be there
            found[name] = path.is_dir()
    return found


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of the files that differ."""
    return [name for name in sorted({*one, *two}) if one.get(name) != two.get(name)]


def ask(*line: str) -> tuple[int, str]:
    """A command's exit code and its stderr, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(line))
    return code, err.getvalue().strip()


class Scenario:
    """One way to train, and the run of it that is left alone."""

    def __init__(self, arguments: tuple[str, ...], work: Path) -> None:
        self._line, self._work = ["train", *arguments, "--device", "cpu", "--resume"], work
        self._counted, self._said = work / "counted", work / "said"
        started = time.perf_counter()
        if self._finish(self._start(work / "alone", at=0)):
            raise RuntimeError(f"the run that is left alone failed: {self._said.read_text()}")
        self.seconds = time.perf_counter() - started
        self.instants = int(self._counted.read_text())
        self.expected = contents(work / "alone")

    def _start(self, folder: Path, *, at: int) -> ForkProcess:
        process = multiprocessing.get_context("fork").Process(target=self._train, args=(folder, at))
        process.start()
        return process

    def _train(self, folder: Path, at: int) -> None:
        points = FaultPoints(folder, at)
        points.install()
        with open(self._said, "w") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run([*self._line, "--run-dir", str(folder)])
        self._counted.write_text(str(points.count))
        sys.exit(code)

    def _finish(self, process: ForkProcess, limit: float | None = None) -> int:
        """The exit code, minus the signal's number for a process that was killed: by us, if it ran past the limit."""
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return process.exitcode

    def kill_at_random(self, kills: int, draw: random.Random) -> Report:
        """Bring runs to their end, each killed on the way now and then, until there have been so many kills."""
        report = Report()
        while report.kills < kills:
            folder = self._work / f"killed-{report.directories}"
            while report.kills < kills:
                at_write_step = draw.random() < 0.5
                process = self._start(folder, at=draw.randint(1, self.instants) if at_write_step else 0)
                code = self._finish(process, None if at_write_step else draw.uniform(0, self.seconds))
                if code != -signal.SIGKILL:
                    break
                report.at_write_steps += at_write_step
                report.from_outside += not at_write_step
                self._look(folder, report)
            self._bring_to_end(folder, report)
        return report

    def kill_at_every(self, step: int) -> Report:
        """A run for each `step`-th instant, killed there and resumed."""
        report = Report()
        for at in range(1, self.instants + 1, step):
            folder = self._work / f"killed-at-{at}"
            if self._finish(self._start(folder, at=at)) != -signal.SIGKILL:
                report.problems.append(f"{folder.name}: was not killed; {self._said.read_text()}")
            report.at_write_steps += 1
            self._look(folder, report)
            self._bring_to_end(folder, report)
        return report

    def _bring_to_end(self, folder: Path, report: Report) -> None:
        code = self._finish(self._start(folder, at=0))
        if code:
            report.problems.append(f"{folder.name}: --resume ended with {code}: {self._said.read_text()}")
        report.problems += [f"{folder.name}: {name} differs" for name in differences(self.expected, contents(folder))]
        report.directories += 1

    def _look(self, folder: Path, report: Report) -> None:
        """A killed run's directory must give `eval` and `verify` an answer."""
        for path in sorted(folder.glob("seed-*")) or [folder]:
            for command in ("eval", "verify"):
                code, error = ask(command, str(path), "--json")
                nothing_yet = not list(path.glob("checkpoints/epoch-*"))
                no_epoch_yet = command == "eval" and "no epoch is done yet" in error
                if code == 2 and len(error.splitlines()) == 1 and (nothing_yet or no_epoch_yet):
                    report.too_early += command == "eval"
                elif code:
                    report.problems.append(f"{path}: {command} ended with {code}: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--kills", type=int, default=30, help="of each scenario")
    parser.add_argument("--every", type=int, help="kill at each K-th instant instead", metavar="K")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    options = parser.parse_args()
    if torch.get_num_threads() != 1:
        parser.error("set OMP_NUM_THREADS=1")
    for name in ("train", "plots"):  # every fork has them, with all that they import
        importlib.import_module(f"asge_zoo.engine.{name}")
    compile_spec(tiny_spec())  # what torch and scikit-learn import on first use, every fork has, too
    parts(tiny_spec()).data.loader(Path(), seed=0, device=torch.device("cpu"))
    failed = False
    for name in options.scenarios:
        with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
            Path("tiny.json").write_text(json.dumps(TINY))
            scenario = Scenario(SCENARIOS[name], Path(work))
            if options.every:
                report = scenario.kill_at_every(options.every)
            else:
                report = scenario.kill_at_random(options.kills, random.Random(options.seed))
        described = {"seconds": round(scenario.seconds, 1), "instants": scenario.instants, **vars(report)}
        print(json.dumps({name: described}), flush=True)
        failed = failed or bool(report.problems)
    return failed


if __name__ == "__main__":
    sys.exit(main())
