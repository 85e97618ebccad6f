"""A package made by `plugins new`, for each kind of component, from its installation to its removal.

    python tests/plugin_lifecycle.py

In an environment of its own, made with uv: the package is installed, listed with its distribution and version, named in
a spec that validates, trains two epochs on digits and is evaluated, its checkpoint is loaded in another process; then
it is uninstalled, and the same checkpoint must give one line with the remedy, exit code 2. At the end, `validate` of a
spec without plugins is timed with none and with twenty of them installed, in turns. Prints JSON; exit code 1 if a thing
was wrong.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tiny import TINY

from asge_zoo.plugins import GROUPS
from asge_zoo.scaffold import write_package

CHECKOUT = Path(__file__).parents[1]
FIELDS = {"dataset": "data", "goodness": "rule.goodness", "projection": "rule.projection"}  # elsewhere the group's name
PLUGINS, RUNS = 20, 11


class Environment:
    """A virtual environment with asge-zoo in it, and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        self._uv("venv", "--python", f"{sys.version_info[0]}.{sys.version_info[1]}", str(folder / "venv"))
        self.install(CHECKOUT, "torch==2.13.0", "torchvision==0.28.0")

    def _uv(self, *line: str) -> None:
        subprocess.run(["uv", *line, "--quiet"], check=True)

    def install(self, *packages: Path | str) -> None:
        """Install packages, or folders with one."""
        self._uv("pip", "install", "--python", str(self.bin / "python"), *map(str, packages))

    def uninstall(self, name: str) -> None:
        """Uninstall a package."""
        self._uv("pip", "uninstall", "--python", str(self.bin / "python"), name)

    def run(self, *line: str | Path, beside: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment's, with a folder of packages beside it."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(beside or "")}
        command = [str(self.bin / line[0]), *map(str, line[1:])]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)


def spec_with(group: str, kind: str) -> dict[str, Any]:
    """Two epochs of the tiny spec with that component."""
    spec = json.loads(json.dumps({**TINY, "train": {"epochs": 2, "compile": False}}))
    if group == "rule":
        spec["prediction"] = {"kind": "last"}
    *outer, field = FIELDS.get(group, group).split(".")
    node = spec
    for key in outer:
        node = node.setdefault(key, {})
    node[field] = {**({"validation": 1000, "batch_size": 64} if group == "dataset" else {}), "kind": kind}
    return spec


def lifecycle(environment: Environment, group: str) -> list[str]:
    """What is wrong in the life of a package for that kind of component."""
    wrong: list[str] = []
    name, kind = f"acme-{group}", f"acme.{group}"
    spec, run = environment.folder / f"{group}.json", environment.folder / f"run-{group}"
    spec.write_text(json.dumps(spec_with(group, kind)))

    def expect(what: str, ok: bool, done: subprocess.CompletedProcess[str]) -> None:
        if not ok:
            wrong.append(f"{group}: {what}: {done.returncode} {done.stdout[-300:]} {done.stderr[-500:]}")

    made = environment.run("asge-zoo", "plugins", "new", name, "--kind", group)
    expect("is written", made.returncode == 0, made)
    environment.install(environment.folder / name)
    listed = environment.run("asge-zoo", "ls", "plugins", "--json")
    row = {"kind": kind, "component": group, "distribution": name, "version": "0.1.0", "error": None}
    expect("is listed", row in json.loads(listed.stdout or "[]"), listed)
    load = "import sys, asge_zoo; print(len(asge_zoo.load(sys.argv[1]).units))"
    for what, line in (
        ("validates", ("asge-zoo", "validate", spec)),
        ("trains", ("asge-zoo", "train", spec, "--run-dir", run, "--device", "cpu")),
        ("evaluates", ("asge-zoo", "eval", run)),
        ("loads in another process", ("python", "-c", load, run)),
    ):
        done = environment.run(*line)
        expect(what, done.returncode == 0, done)
    environment.uninstall(name)
    for line in (("asge-zoo", "eval", run), ("asge-zoo", "validate", run / "spec.json")):
        done = environment.run(*line)
        remedy = rf"asge-zoo: .*'{re.escape(kind)}'; it comes with {name}: pip install '{name}==0\.1\.0'.*\n"
        expect("names its package", done.returncode == 2 and bool(re.fullmatch(remedy, done.stderr)), done)
    return wrong


def validate_seconds(environment: Environment, packages: Path) -> tuple[float, float]:
    """Median times of `asge-zoo validate` of a shipped spec, without and with a folder of packages beside."""
    seconds: dict[Path | None, list[float]] = {None: [], packages: []}
    for _ in range(RUNS):
        for beside, times in seconds.items():
            started = time.perf_counter()
            done = environment.run("asge-zoo", "validate", "vgg8_digits", beside=beside)
            times.append(time.perf_counter() - started)
            assert done.returncode == 0, done.stderr
    return statistics.median(seconds[None]), statistics.median(seconds[packages])


def main() -> int:
    with tempfile.TemporaryDirectory() as work:
        environment = Environment(Path(work))
        wrong = [problem for group in GROUPS for problem in lifecycle(environment, group)]
        beside, packages = Path(work) / "beside", [f"acme-p{number}" for number in range(PLUGINS)]
        for number, name in enumerate(packages):
            write_package(name, GROUPS[number % len(GROUPS)], environment.folder)
        environment.install("--no-deps", "--target", beside, *(environment.folder / name for name in packages))
        listed = json.loads(environment.run("asge-zoo", "ls", "plugins", "--json", beside=beside).stdout)
        wrong += [] if len(listed) == PLUGINS else [f"{len(listed)} plugins are listed, of {PLUGINS}"]
        none, twenty = validate_seconds(environment, beside)
    times = {"validate_seconds": none, f"validate_seconds_with_{PLUGINS}_plugins": twenty}
    print(json.dumps({"components": len(GROUPS), "problems": wrong, **times}, indent=2))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
