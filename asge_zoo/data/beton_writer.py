"""Writes FFCV files (.beton) that are whole or not there, from a folder of class folders.

The format is FFCV's own code. Its driver is not used, for it waits for ever for a worker that fails or dies.
"""

import contextlib
import fcntl
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asge_zoo.data.beton import FIELDS, Manifest, Progress, import_ffcv, index_sha256, manifest_path, scan
from asge_zoo.data.encoders import Encoded, Wanted, encode_all
from asge_zoo.errors import DataError
from asge_zoo.files import TEMPORARY, WriteError, make_folder, naming, sync_folder, write_file
from asge_zoo.ranks import usable_cpus
from asge_zoo.seeding import keyed_seed

# what ffcv-imagenet's write_imagenet.sh is called with
MAX_RESOLUTION = 500
COMPRESS_PROBABILITY = 0.5
QUALITY = 90

RESOLUTION_LIMIT = 4096  # a page holds any raw image, and is kept in memory
PAGE_SIZE = 1 << 23  # bytes, FFCV's default
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


@dataclass(frozen=True)
class Written:
    """A finished file: its manifest, and the images left out, by their paths in the source folder."""

    manifest: Manifest
    skipped: tuple[str, ...]


def write_beton(
    source: Path,
    file: Path,
    *,
    max_resolution: int = MAX_RESOLUTION,
    compress_probability: float = COMPRESS_PROBABILITY,
    quality: int = QUALITY,
    skip_unreadable: bool = False,
    workers: int | None = None,
    on_progress: Progress | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Written:
    """Write the images of `source` to `file`, and a manifest beside it; the same bytes for any number of workers.

    Workers are spawned processes, so a script that calls this needs its `if __name__ == "__main__":`.

    Args:
        source: a folder of class folders, read as torchvision's ImageFolder reads it.
        file: the .beton to be; neither it nor its manifest may exist.
        max_resolution: larger images are shrunk to this longer side, pixels.
        compress_probability: the share of images stored as JPEG, the others raw; their names decide which.
        quality: of those JPEGs, 1 to 100.
        skip_unreadable: leave unreadable images out and `warn` of each, in place of stopping at the first.
        workers: processes that read and encode; default one for each usable CPU.
        on_progress: called with "writing" and images done, then "checking" and bytes read; and of how many.
        warn: called with a line.

    Raises:
        DataError: of one line. Whatever is raised, a KeyboardInterrupt among it, nothing is left behind.
    """
    _check_options(max_resolution, compress_probability, quality, workers)
    import_ffcv()
    classes = class_folders(source)
    images = [(name, label) for label, folder in enumerate(classes) for name in _images_in(source, folder)]
    wanted = [
        Wanted(source / name, jpeg=keyed_seed(0, "jpeg", name) < compress_probability * 2**63) for name, _ in images
    ]
    files: list[str] = []
    skipped: list[str] = []
    try:
        make_folder(file.parent)
        with _becoming(file) as temporary:
            page_size = max(PAGE_SIZE, 1 << (3 * max_resolution**2 - 1).bit_length())
            with (
                contextlib.closing(_Pages(temporary, len(images), page_size)) as pages,
                contextlib.closing(encode_all(wanted, workers or usable_cpus(), max_resolution, quality)) as results,
            ):
                for done, ((name, label), result) in enumerate(zip(images, results, strict=True), 1):
                    if isinstance(result, Encoded):
                        pages.add(result, label)
                        files.append(name)
                    elif skip_unreadable:
                        warn(f"{source / name}: left out, can't be read ({result.reason})")
                        skipped.append(name)
                    else:
                        raise DataError(
                            f"{source / name}: can't be read ({result.reason}); repair or remove it, or leave such "
                            f"images out with --skip-unreadable"
                        )
                    if on_progress:
                        on_progress("writing", done, len(images))
                if empty := sorted(set(classes) - {name.split("/")[0] for name in files}):
                    raise DataError(f"{source / empty[0]}: has no readable image; remove the folder, or put some there")
                pages.finish()
            sha256, crc32 = scan(temporary, pages.offsets, pages.sizes, on_progress)
            if (crc32 != pages.crc32).any():
                raise DataError(f"{file}: what was read back is not what was written; check the disk and the memory")
            manifest = Manifest(
                count=len(files),
                classes=classes,
                files=tuple(files),
                crc32=tuple(crc32.tolist()),
                size=temporary.stat().st_size,
                sha256=sha256,
                index_sha256=index_sha256(temporary, len(files)),
                max_resolution=max_resolution,
                compress_probability=compress_probability,
                quality=quality,
            )
            manifest = manifest.model_copy(update={"digest": manifest.digest_of_content()})
            os.replace(temporary, file)
            sync_folder(file.parent)
            write_file(manifest_path(file), manifest.model_dump_json().encode() + b"\n")
    except WriteError as error:
        raise DataError(f"{error.filename}: can't be written ({error.strerror}); {error.remedy}") from error
    return Written(manifest, tuple(skipped))


def class_folders(source: Path) -> tuple[str, ...]:
    """Names of the folders in `source`, sorted.

    Raises:
        DataError: it is no folder, or there is none in it.
    """
    if not source.is_dir():
        raise DataError(f"{source}: no such folder; name a folder of class folders with --from")
    folders = tuple(sorted(entry.name for entry in os.scandir(source) if entry.is_dir()))
    if not folders:
        raise DataError(f"{source}: has no class folders; put each class's images in a folder of its own")
    return folders


def _images_in(source: Path, folder: str) -> list[str]:
    """A class's images by their paths in `source`, in the order of torchvision's ImageFolder."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: can't be read ({error.strerror}); give yourself the right to") from error

    names = [
        (Path(root) / name).relative_to(source).as_posix()
        for root, _, found in sorted(os.walk(source / folder, onerror=refuse, followlinks=True))
        for name in sorted(found)
        if name.lower().endswith(SUFFIXES)
    ]
    if not names:
        raise DataError(f"{source / folder}: has no images ({', '.join(SUFFIXES)}); remove the folder, or fill it")
    for name in names:
        if not name.isascii() and name != name.encode(errors="replace").decode():
            raise DataError(f"{source}: {name!a} is no name in UTF-8; rename it")
    return names


def _check_options(max_resolution: int, compress_probability: float, quality: int, workers: int | None) -> None:
    for name, value, low, high in (
        ("max-resolution", max_resolution, 1, RESOLUTION_LIMIT),
        ("compress-probability", compress_probability, 0, 1),
        ("quality", quality, 1, 100),
    ):
        if not low <= value <= high:
            raise DataError(f"{name} is {value}; give {low} to {high}")
    if workers is not None and workers < 1:
        raise DataError(f"workers is {workers}; give 1 or more")


@contextlib.contextmanager
def _becoming(file: Path) -> Iterator[Path]:
    """The name that `file` is written under within, for this process alone; an exception removes what there is."""
    temporary = file.with_name(TEMPORARY + file.name)
    with naming(file), open(temporary, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{file}: is being written by another process; wait for it, or end it") from None
        try:
            for path in (file, manifest_path(file)):
                if os.path.lexists(path):
                    raise DataError(f"{path}: exists already; remove it, or name another file with --to")
        except DataError:
            temporary.unlink(missing_ok=True)
            raise
        try:
            yield temporary
        except BaseException:
            for path in (temporary, file, manifest_path(file)):
                path.unlink(missing_ok=True)
            raise


class _Pages:
    """A file of up to `count` samples under way, by FFCV's code; samples lie in the order in which they are added."""

    def __init__(self, path: Path, count: int, page_size: int) -> None:
        fields = import_ffcv("ffcv.fields")
        handlers = dict(zip(FIELDS, (fields.RGBImageField(), fields.IntField()), strict=True))
        self._path = path
        self._label = handlers["label"]
        self._writer = import_ffcv("ffcv.writer").DatasetWriter(str(path), handlers, page_size, num_workers=1)
        self._writer.num_samples = count
        self._writer.prepare()
        # for FFCV's workers, that are not used; it would be left in /dev/shm
        self._writer.metadata_sm.close()
        self._writer.metadata_sm.unlink()
        self._metadata: Any = np.zeros(count, self._writer.metadata_type)
        self._table: Any = np.zeros(count, import_ffcv("ffcv.types").ALLOC_TABLE_TYPE)
        self._count = 0
        self.crc32 = np.zeros(count, np.uint32)
        allocator = import_ffcv("ffcv.memory_allocator").MemoryAllocator
        self._allocator = allocator(str(path), self._writer.data_region_start, page_size)
        self._allocator.fp = open(path, "ab")  # its own would write a part of a page on a full disk, and not say so

    def add(self, sample: Encoded, label: int) -> None:
        index = self._count
        self._allocator.set_current_sample(index)
        place, storage = self._allocator.malloc(len(sample.stored))
        storage[:] = np.frombuffer(sample.stored, np.uint8)
        self._table[index] = self._allocator.allocations.pop()
        self._metadata["f0"][index] = sample.record[0]
        self._metadata["f0"]["data_ptr"][index] = place
        self._label.encode(self._metadata["f1"][index : index + 1], label, None)
        self.crc32[index] = zlib.crc32(sample.stored)
        self._count += 1

    def finish(self) -> None:
        """Write the rest, and push all to disk."""
        self._allocator.flush_page()
        self._allocator.fp.close()
        self._metadata, self._table = self._metadata[: self._count], self._table[: self._count]
        self.crc32 = self.crc32[: self._count]
        self._writer.header["num_samples"] = self._count
        self._writer.metadata_sm = SimpleNamespace(buf=self._metadata.tobytes())
        self._writer.finalize([self._table])
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        # `finalize` takes any exception, even a KeyboardInterrupt, for an empty table
        if import_ffcv("ffcv.reader").Reader(str(self._path)).alloc_table.tobytes() != self._table.tobytes():
            raise DataError(f"{self._path}: stopped while its allocation table was written; write it anew")

    def close(self) -> None:
        """Let go of the file; what is not written yet is lost."""
        with contextlib.suppress(OSError):
            self._allocator.fp.close()

    @property
    def offsets(self) -> NDArray[np.int64]:
        """(n,), bytes: where images lie in the file."""
        return self._table["ptr"].astype(np.int64)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(n,), bytes: how long they are there."""
        return self._table["size"].astype(np.int64)
