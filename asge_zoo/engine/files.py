"""Files that are whole or not there: written under a temporary name, fsynced, renamed.

An OSError names the file that was to be written. What a killed process leaves has a name that begins with `TEMPORARY`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
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


def remedy(error: OSError) -> str:
    """What to do about a file that can't be written."""
    return REMEDIES.get(error.errno or 0, "see to it")


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a newline at its end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, atomically."""
    with _naming(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{TEMPORARY}{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                _write(file, content)
            os.chmod(temporary, 0o666 & ~_umask())  # as any new file; mkstemp's are private
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create `folder` with `files`, atomically; the last one is written when the others are on disk."""
    with _naming(folder):
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{TEMPORARY}{folder.name}."))
    try:
        for name, content in files.items():
            with _naming(folder / name), open(temporary / name, "wb") as file:
                _write(file, content)
        with _naming(folder):
            sync_folder(temporary)
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file or folder; a folder is never half there under its own name."""
    with _naming(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY))
        os.rename(path, temporary / path.name)
    shutil.rmtree(temporary)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def point(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, atomically."""
    temporary = link.with_name(f"{TEMPORARY}{link.name}")
    with _naming(link):
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(os.path.relpath(target, link.parent))
            os.replace(temporary, link)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(link.parent)


def append_line(path: Path, line: str) -> None:
    """Append a line to a log and push it to disk."""
    with _naming(path), open(path, "ab") as file:
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
def _naming(path: Path) -> Iterator[None]:
    """An OSError raised within names `path`: a full disk's names none, and others a temporary name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _write(file: Any, content: bytes) -> None:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
