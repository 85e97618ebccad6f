"""One process at a time in a run directory."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from asge_zoo.errors import CheckpointError
from asge_zoo.files import WriteError, make_folder, naming

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory, made if need be; if nothing was put there, what was made is gone afterwards.

    The system drops the lock with the process that holds it, however that ends: no lock outlives its process.

    Raises:
        CheckpointError: another process holds it, or it can't be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    try:
        descriptor = _acquire(folder)
    except WriteError as error:
        _undo(folder, made)
        raise CheckpointError(
            f"{folder}: can't be written to ({error.strerror}); {error.remedy}, or give another --run-dir"
        ) from error
    try:
        yield
    finally:
        _undo(folder, made)
        os.close(descriptor)


def _undo(folder: Path, made: list[Path]) -> None:
    """Remove the lock, and the folders that were made for it, if nothing else was put there."""
    with contextlib.suppress(OSError):  # removed under way, or not empty
        if folder.exists() and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
        for path in made:
            if path.exists():
                path.rmdir()


def _acquire(folder: Path) -> int:
    while True:
        make_folder(folder)
        with naming(folder):
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{folder}: in use by {_holder(descriptor)}; wait until it ends, or give another --run-dir"
                ) from None
            except OSError as error:
                raise CheckpointError(
                    f"{folder}: can't be locked ({error.strerror}); give a --run-dir on a file system that has locks"
                ) from error
            if _is_at(descriptor, folder / LOCK):  # else its last holder has just removed it
                with naming(folder):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
                undo.pop_all()
                return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        said = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {said['pid']} on {said['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
