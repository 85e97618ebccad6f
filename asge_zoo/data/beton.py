"""FFCV files (.beton) with a manifest beside: what lies where, and whether it is still what was written.

The manifest, `FILE.beton.json`, is written last: a file without one is unfinished. FFCV itself notices no damage: a
broken image decodes to black pixels, a broken table to anything. So a file's size and index (header, field
descriptors, metadata and allocation table) are held against the manifest before FFCV parses it, and each image's
bytes can be held against their CRC.
"""

import hashlib
import importlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from asge_zoo.errors import DataError
from asge_zoo.files import sha256_file

MANIFEST_SUFFIX = ".json"
FIELDS = ["image", "label"]  # FFCV's fields, in their order in the file
INSTALL = (
    "`pip install 'asge-zoo[ffcv]'`, which on Debian needs `apt-get install pkg-config libturbojpeg0-dev libopencv-dev`"
)
BLOCK = 1 << 23  # bytes read at a time

Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Crc32 = Annotated[int, Field(ge=0, lt=1 << 32)]


class Manifest(BaseModel):
    """What is known of a .beton beside it; samples are in the order of torchvision's ImageFolder.

    Attributes:
        count: samples.
        classes: names of the class folders, sorted; a sample's label is the index of its folder.
        files: of each sample, the path of its image in the source folder, with "/".
        crc32: of each sample, zlib.crc32 of its stored bytes.
        size: of the .beton, bytes.
        sha256: of the .beton.
        index_sha256: of its header, field descriptors, metadata and allocation table.
        max_resolution: larger images were shrunk to this longer side, pixels.
        compress_probability: the share of images that are stored as JPEG; the others are raw RGB.
        quality: of those JPEGs.
        digest: sha256 of all the above.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    version: Literal[1] = 1
    count: PositiveInt
    classes: tuple[str, ...]
    files: tuple[str, ...]
    crc32: tuple[Crc32, ...]
    size: PositiveInt
    sha256: Sha256
    index_sha256: Sha256
    max_resolution: PositiveInt
    compress_probability: Annotated[float, Field(ge=0, le=1)]
    quality: Annotated[int, Field(ge=1, le=100)]
    digest: str = ""  # of a manifest under way

    @model_validator(mode="after")
    def _consistent(self) -> "Manifest":
        for name in ("files", "crc32"):
            if len(getattr(self, name)) != self.count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.count} samples")
        if list(self.classes) != sorted(set(self.classes)):
            raise ValueError("classes are not sorted, or not distinct")
        folders = set(self.classes)
        for file in self.files:
            folder, *rest = file.split("/")
            if folder not in folders or not rest or ".." in rest or "" in rest:
                raise ValueError(f"files has {file!r}, which lies in no folder of a class")
        return self

    def digest_of_content(self) -> str:
        """What `digest` is to be."""
        return hashlib.sha256(self.model_dump_json(exclude={"digest"}).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Beton:
    """A checked file of n samples, in its order.

    Attributes:
        path: of the file.
        classes: names, in the order of the labels.
        files: of each sample, the path of its image in the folder it was written from.
        labels: (n,) int64.
        heights, widths: (n,) int64, pixels.
        jpeg: (n,) bool; stored as JPEG, else as raw RGB (height, width, 3) uint8.
        offsets, sizes: (n,) int64, bytes; where in the file the stored bytes lie.
        crc32: (n,) uint32, of the stored bytes.
    """

    path: Path
    classes: tuple[str, ...]
    files: tuple[str, ...]
    labels: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    jpeg: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crc32: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.labels)


def import_ffcv(module: str = "ffcv") -> Any:
    """A module of ffcv; its import leaves torch's number of threads as it was.

    Raises:
        DataError: ffcv is not installed, or does not work.
    """
    import torch

    threads = torch.get_num_threads()
    try:
        importlib.import_module("ffcv")
        return importlib.import_module(module)
    except Exception as error:  # a missing system library, a numba that refuses the numpy, …
        if isinstance(error, ModuleNotFoundError) and error.name == "ffcv":
            raise DataError(f"ffcv is not installed, which .beton files need; {INSTALL}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"ffcv can't be imported ({reason}); install it anew: {INSTALL}") from error
    finally:
        torch.set_num_threads(threads)


def manifest_path(path: Path) -> Path:
    """Where the manifest of a .beton lies."""
    return path.with_name(path.name + MANIFEST_SUFFIX)


def open_beton(path: Path) -> Beton:
    """Check a file's size and index against its manifest, and read the index; no image is read.

    Raises:
        DataError: the file or its manifest is missing or damaged, or ffcv is missing or broken.
    """
    remedy = f"`asge-zoo data verify {path}` tells more; put back a copy or write it anew"
    try:
        manifest = _read_manifest(path)
        if damage := _size_damage(path, manifest) or _index_damage(path, manifest):
            raise DataError(f"{path}: {damage}; {remedy}")
        return _read_index(path, manifest)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}); {remedy}") from error


def verify_beton(path: Path, on_progress: Progress | None = None) -> list[str]:
    """Read a whole file and check it against its manifest; no image is decoded.

    Args:
        path: of the .beton.
        on_progress: called with "checking", and the bytes read of all.

    Returns:
        What is wrong, a line each. Without ffcv, damage is found but not located.
    """
    try:
        manifest = _read_manifest(path)
        if damage := _size_damage(path, manifest):
            return [damage]
        try:
            damage = _index_damage(path, manifest)
        except DataError as error:  # no ffcv
            healthy = sha256_file(path) == manifest.sha256
            return [] if healthy else [f"damaged: its sha256 is another; to know where, see to this: {error}"]
        if damage:
            return [f"{damage}, so where its images lie is not known, and they were not checked"]
        beton = _read_index(path, manifest)
        sha256, crc32 = scan(path, beton.offsets, beton.sizes, on_progress)
    except DataError as error:
        return [str(error)]
    except OSError as error:
        return [f"can't be read ({error.strerror or error})"]
    wrong = np.flatnonzero(crc32 != beton.crc32)
    if len(wrong):
        return [f"image {index} ({beton.files[index]}) is damaged: its CRC is another" for index in wrong]
    if sha256 != manifest.sha256:
        return ["damaged between its images, where nothing is stored: its sha256 is another"]
    return []


def scan(
    path: Path, offsets: NDArray[np.int64], sizes: NDArray[np.int64], on_progress: Progress | None = None
) -> tuple[str, NDArray[np.uint32]]:
    """Read a file once, from beginning to end.

    Args:
        path: of the file.
        offsets, sizes: (n,), bytes: pieces of it that don't overlap.
        on_progress: called with "checking", and the bytes read of all.

    Returns:
        The file's sha256 (hex), and each piece's zlib.crc32, (n,) uint32.
    """
    digest = hashlib.sha256()
    crc32 = np.zeros(len(offsets), dtype=np.uint32)
    total = os.path.getsize(path)
    with open(path, "rb", buffering=BLOCK) as file:

        def skip_to(end: int) -> None:
            while (left := end - file.tell()) > 0 and (block := file.read(min(left, BLOCK))):
                digest.update(block)
                if on_progress:
                    on_progress("checking", file.tell(), total)

        for index in np.argsort(offsets):
            skip_to(int(offsets[index]))
            stored = file.read(int(sizes[index]))
            digest.update(stored)
            crc32[index] = zlib.crc32(stored)
        skip_to(total)
    return digest.hexdigest(), crc32


def index_sha256(path: Path, count: int) -> str:
    """sha256 (hex) of the bytes of a file of `count` samples that are neither images nor filling.

    Raises:
        DataError: ffcv, which knows how many those are, is missing or broken.
    """
    types, fields = import_ffcv("ffcv.types"), import_ffcv("ffcv.fields")
    sample = types.get_metadata_type([fields.RGBImageField(), fields.IntField()])
    with open(path, "rb") as file:
        start = types.HeaderType.itemsize + len(FIELDS) * types.FieldDescType.itemsize + count * sample.itemsize
        digest = hashlib.sha256(file.read(start))
        file.seek(-count * types.ALLOC_TABLE_TYPE.itemsize, os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


def _read_manifest(path: Path) -> Manifest:
    beside = manifest_path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; make it by `asge-zoo data write`")
    try:
        manifest = Manifest.model_validate_json(beside.read_bytes())
        if manifest.digest != manifest.digest_of_content():
            raise ValueError("its digest is another")
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: its manifest {beside.name} is missing, so it is unfinished or not by `asge-zoo data write`; "
            f"remove it and write it anew"
        ) from error
    except ValueError as error:  # pydantic's among them
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DataError(f"{beside}: damaged manifest ({reason}); put back a copy or write the file anew") from error
    return manifest


def _size_damage(path: Path, manifest: Manifest) -> str | None:
    size = path.stat().st_size
    if size < manifest.size:
        return f"truncated: it has {size} of its {manifest.size} bytes"
    return f"it has {size} bytes, {size - manifest.size} too many" if size > manifest.size else None


def _index_damage(path: Path, manifest: Manifest) -> str | None:
    if index_sha256(path, manifest.count) != manifest.index_sha256:
        return "its header, field descriptors, metadata or allocation table are damaged"
    return None


def _read_index(path: Path, manifest: Manifest) -> Beton:
    reader = import_ffcv("ffcv.reader").Reader(str(path))
    image = reader.metadata["f0"]
    return Beton(
        path=path,
        classes=manifest.classes,
        files=manifest.files,
        labels=reader.metadata["f1"].astype(np.int64),
        heights=image["height"].astype(np.int64),
        widths=image["width"].astype(np.int64),
        jpeg=image["mode"] == import_ffcv("ffcv.fields.rgb_image").IMAGE_MODES["jpg"],
        offsets=image["data_ptr"].astype(np.int64),
        sizes=reader.alloc_table["size"].astype(np.int64),
        crc32=np.array(manifest.crc32, dtype=np.uint32),
    )
