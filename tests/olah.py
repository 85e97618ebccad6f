"""olah, a mirror of the Hub that also serves local git repositories: to pull from a server that is not ours."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

OLAH = ("uv", "tool", "run", "--from", "olah==0.5.4", "olah-cli")
CONFIG = """
[basic]
host = "127.0.0.1"
port = {port}
repos-path = "{folder}/mirrored"
mirrors-path = ["{folder}/local"]

[accessibility]
offline = true
"""


@contextlib.contextmanager
def serving(folder: Path, repo_id: str) -> Iterator[str]:
    """The URL of an olah that serves the files of `folder` as the model `repo_id`; skips the test if there is no olah.

    It knows the branch `main`, no accounts, and `model_info` only with a revision.
    """
    for program in ("uv", "git"):
        if shutil.which(program) is None:
            pytest.skip(f"olah needs {program}")
    try:
        subprocess.run([*OLAH, "--help"], capture_output=True, text=True, check=True, timeout=120)
    except subprocess.SubprocessError as error:
        pytest.skip(f"olah cannot be installed: {error}")
    with tempfile.TemporaryDirectory() as place, socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listener.close()
        make_repository(folder, Path(place, "local", "models", repo_id))
        config = Path(place, "olah.toml")
        config.write_text(CONFIG.format(port=port, folder=place))
        line = [*OLAH, "--config", str(config), "--log-path", f"{place}/log"]
        url = f"http://127.0.0.1:{port}"
        with Path(place, "said").open("w+") as said:
            process = subprocess.Popen(line, cwd=place, stdout=said, stderr=said, start_new_session=True)
            try:
                await_answer(f"{url}/api/models/{repo_id}/revision/main", process, Path(said.name))
                yield url
            finally:
                # uv starts it as a process of its own, and that its workers
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def make_repository(folder: Path, place: Path) -> None:
    """Commit the files of `folder` to the branch `main` of a new repository, whatever the user's settings for git."""
    shutil.copytree(folder, place)
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    author = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "core.autocrlf=false")
    for command in (
        ("init", "--quiet", "--initial-branch=main"),
        ("add", "--all", "--force"),
        ("commit", "-qm", "files"),
    ):
        subprocess.run(["git", *author, *command], cwd=place, env=os.environ | settings, check=True)


def await_answer(url: str, process: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until `url` can be had."""
    for _ in range(300):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10):
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"olah does not answer: {said.read_text()[-2000:]}")
