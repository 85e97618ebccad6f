"""Instants at which a process that writes a run directory may be killed; for tests alone.

A write step is what changes the directory: a file's content, an fsync, a rename, a link, a removal. Each has an
instant before and one after it; a content has one in its middle, too.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asge_zoo import files

CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "symlink", "truncate", "unlink")


class FaultPoints:
    """Counts the instants of this process's write steps in a directory, and kills it at one of them.

    Args:
        directory: where.
        number: of the instant, from 1; 0 for none.
    """

    def __init__(self, directory: Path, number: int) -> None:
        self.directory, self.number, self.count = os.path.realpath(directory), number, 0

    def install(self) -> None:
        """Put the instants into this process, for good."""
        for name in CALLS:
            setattr(os, name, self._around(getattr(os, name)))
        write = files._write

        def write_in_halves(file: Any, content: bytes) -> None:
            self._instant()
            file.write(content[: len(content) // 2])
            file.flush()
            self._instant()
            write(file, content[len(content) // 2 :])

        files._write = write_in_halves

    def _instant(self) -> None:
        self.count += 1
        if self.count == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def _around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            place = args[1] if call.__name__ == "symlink" else args[0]
            if not self._concerns(place, kwargs.get("dir_fd")):
                return call(*args, **kwargs)
            self._instant()
            result = call(*args, **kwargs)
            self._instant()
            return result

        return wrapped

    def _concerns(self, place: Any, dir_fd: int | None) -> bool:
        """Whether a path or descriptor lies in the directory."""
        if isinstance(place, int):
            return os.readlink(f"/proc/self/fd/{place}").startswith(self.directory)
        at = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        return os.path.abspath(os.path.join(at, os.fspath(place))).startswith(self.directory)
