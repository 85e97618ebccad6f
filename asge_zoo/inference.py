"""What a trained graph sees in pictures on disk."""

import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from asge_zoo.data.preprocessing import Preprocessing
from asge_zoo.errors import DataError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.ranks import usable_cpus

STDIN = "-"
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
AHEAD = 2  # batches that are decoded while one is computed


@dataclass(frozen=True)
class Answer:
    """What one picture is taken for.

    Attributes:
        file: the picture's.
        labels: the likeliest classes' numbers, best first.
        probabilities: theirs, by the softmax of the logits.
        exit_unit: how many units ran.
    """

    file: Path
    labels: list[int]
    probabilities: list[float]
    exit_unit: int


def find_pictures(names: Iterable[str]) -> list[Path]:
    """The files that names mean: themselves, a folder's pictures at any depth, sorted; `-` stands for stdin's lines.

    Raises:
        DataError: something is not there, or a folder holds no picture.
    """
    found: list[Path] = []
    for name in names:
        if name == STDIN:
            lines = map(os.fsdecode, sys.stdin.buffer.read().splitlines())  # a name may be of any bytes
            found += find_pictures(line for line in lines if line not in ("", STDIN))
        elif (path := Path(name)).is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise DataError(f"{path}: holds no picture ({', '.join(SUFFIXES)}); name another folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; name a picture, a folder of them, or - for stdin's lines")
    return found


@torch.inference_mode()
def classify_files(
    graph: LocalGraph, files: Sequence[Path], preprocessing: Preprocessing, *, top_k: int = 1, batch_size: int = 64
) -> Iterator[Answer]:
    """Classify pictures, in order; the next batches are decoded in threads meanwhile.

    Args:
        graph: in evaluation mode.
        files: of pictures, of any size, grey or colour.
        preprocessing: of the graph's images.
        top_k: how many classes to name.
        batch_size: pictures that are computed at once.

    Raises:
        DataError: a file can't be read as a picture.
    """
    device = next(graph.parameters()).device
    for paths, pixels in _decoded(files, preprocessing, batch_size):
        images = preprocessing.normalize(torch.from_numpy(pixels).to(device))
        logits, depth = graph.classify(images)
        best = logits.float().softmax(1).topk(min(top_k, logits.shape[1]))
        rows = (best.indices.tolist(), best.values.tolist(), depth.tolist())
        yield from (Answer(*row) for row in zip(paths, *rows, strict=True))


def _decoded(
    files: Sequence[Path], preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[Sequence[Path], NDArray[np.uint8]]]:
    """The files, some at a time, and their pictures (b, height, width, channels), uint8."""
    waiting: deque[tuple[Sequence[Path], list[Future[NDArray[np.uint8]]]]] = deque()
    with ThreadPoolExecutor(usable_cpus()) as pool:
        try:
            for start in range(0, len(files), batch_size):
                paths = files[start : start + batch_size]
                waiting.append((paths, [pool.submit(preprocessing.read, path) for path in paths]))
                if len(waiting) > AHEAD:
                    yield _taken(*waiting.popleft())
            while waiting:
                yield _taken(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _taken(
    paths: Sequence[Path], pictures: list[Future[NDArray[np.uint8]]]
) -> tuple[Sequence[Path], NDArray[np.uint8]]:
    return paths, np.stack([picture.result() for picture in pictures])
