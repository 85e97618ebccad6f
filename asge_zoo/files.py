"""Files that are whole or not there: written under a temporary name, fsynced, renamed.

One process at a time may write in a folder. What a killed one leaves has a name that begins with `TEMPORARY`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"

REMEDIES = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the file-size limit (ulimit -f)",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "give yourself the right to write there",
    errno.EPERM: "give yourself the right to write there",
    errno.ENOENT: "put back what was removed or moved under way",
}


class WriteError(OSError):
    """A file can't be written; `filename` is the one that was to be there, not its temporary name."""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES.get(self.errno or 0, "see to it")


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a newline at its end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically."""
    temporary = _temporary(path)
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                _write(file, content)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create `folder` with `files`, atomically; the last one is written when the others are on disk."""
    temporary = _temporary(folder)
    with naming(folder):
        temporary.mkdir()
    try:
        for name, content in files.items():
            with naming(folder / name), open(temporary / name, "wb") as file:
                _write(file, content)
        with naming(folder):
            sync_folder(temporary)
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with naming(folder):
        sync_folder(folder.parent)


def make_folder(folder: Path) -> None:
    """Create `folder`, and those around it, where they are not there yet."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with naming(path):
            path.mkdir(exist_ok=True)
            sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or folder; a folder is never half there under its own name."""
    temporary = _temporary(path)
    with naming(path):
        os.rename(path, temporary)
        sync_folder(path.parent)
        _delete(temporary)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`."""
    for left in folder.glob(f"{TEMPORARY}*"):
        with naming(left):
            _delete(left)


def point(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, atomically."""
    temporary = _temporary(link)
    with naming(link):
        try:
            temporary.symlink_to(os.path.relpath(target, link.parent))
            os.replace(temporary, link)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(link.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a log and push it to disk."""
    with naming(path), open(path, "ab") as file:
        _write(file, line.encode() + b"\n")


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Push a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError within becomes a WriteError of `path`: a full disk's names no file, and others a temporary name."""
    try:
        yield
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), str(path)) from error


def _temporary(path: Path) -> Path:
    """The name that `path` has while it is written or removed; nothing is left there from before."""
    temporary = path.with_name(TEMPORARY + path.name)
    if os.path.lexists(temporary):
        with naming(path):
            _delete(temporary)
    return temporary


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
