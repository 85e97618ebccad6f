"""The command line in processes of its own, which ask a Hub of the test's."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from conftest import Said
from hub_server import Hub, client_environment

TOKEN = "hf_SecretOfTheOwner"
PROCESSES = 2  # at once
PATIENCE = 120.0  # seconds

Result = TypeVar("Result")


def new_hub() -> Hub:
    """A Hub that knows "owner", by `TOKEN`."""
    hub = Hub()
    hub.add_account(TOKEN, "owner")
    return hub


@dataclass(frozen=True)
class User:
    """Somebody at a machine of their own, which knows the Hub at `url`.

    Attributes:
        url: the endpoint.
        place: holds their `home` (login and cache), their `tmp`, and `here`, where they stand.
        token: what $HF_TOKEN is, if it is set.
    """

    url: str
    place: Path
    token: str | None = TOKEN

    def folder(self, name: str) -> Path:
        """`home`, `tmp` or `here`."""
        folder = self.place / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(
        self, *line: str | Path, environment: Mapping[str, str] | None = None, limit: int | None = None
    ) -> subprocess.Popen[str]:
        """A process of one command line that can write no file of more than `limit` bytes."""
        own = client_environment(self.url, self.place / "home", self.token)
        own |= {"TMPDIR": str(self.folder("tmp")), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "asge_zoo", *map(str, line)],
            cwd=self.folder("here"),
            env=own | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if limit is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        return process

    def __call__(self, *line: str | Path, environment: Mapping[str, str] | None = None) -> Said:
        """What a command line comes to."""
        return finish(self.start(*line, environment=environment))

    def json(self, *line: str | Path) -> Any:
        """What a command line that goes well, and has nothing to warn of, reports."""
        said = self(*line, "--json")
        assert (said.code, said.err) == (0, ""), said
        return json.loads(said.out)


def finish(process: subprocess.Popen[str], watch: Callable[[], object] = lambda: None) -> Said:
    """Wait for a process, and `watch` meanwhile; it is ended if it takes too long."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            out, err = process.communicate(timeout=0.5)
            return Said(process.returncode, out, err)
        except subprocess.TimeoutExpired:
            watch()
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)


def together(*calls: Callable[[], Result]) -> list[Result]:
    """The results of calls that are made side by side."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file's content under a folder, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_files(hub: Hub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """A revision's files, but for the one that the Hub adds."""
    return {name: content for name, content in hub.files(repo_id, revision).items() if name != ".gitattributes"}


def commands_of(session: int) -> Iterable[str]:
    """The command lines, as anybody may see them, of the processes of a session."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                yield (process / "cmdline").read_text(errors="replace")
        except OSError:  # it has gone
            continue
