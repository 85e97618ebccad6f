"""How fast the two loaders of pictures are, side by side on the same pictures."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from asge_zoo.bench.machine import machine
from asge_zoo.data.beton_writer import COMPRESS_PROBABILITY, RESOLUTION_LIMIT, class_folders, write_beton
from asge_zoo.data.folder import ImageFolder
from asge_zoo.data.image_loader import ImageLoader
from asge_zoo.errors import DataError

LOADERS = ("ffcv", "torch")
BATCH = 32  # small, so that the last batches, for which not all workers are needed, count for little
FEWEST = 8  # batches that are timed, at least


def compare_loaders(
    folder: Path,
    *,
    sizes: tuple[int, ...],
    workers: int,
    rounds: int,
    device: torch.device,
    compress_probability: float = COMPRESS_PROBABILITY,
) -> dict[str, Any]:
    """Time epochs of training batches, as training gets them: cropped, mirrored, normalised, on the device.

    Both loaders read the same pictures at their own size, ffcv from a temporary .beton. Rounds take the loaders in
    turn, so that what else the machine does meets both.

    Args:
        folder: of class folders, of some hundred or thousand pictures: a copy is written.
        sizes: sides of the crops, in pixels.
        workers: threads (ffcv) or processes (torch).
        rounds: epochs of each loader at each size.
        device: where the batches go.
        compress_probability: share of the .beton's pictures that are JPEG, as for `write_beton`; the others are raw.

    Returns:
        `sizes`: by size, each loader's `images_per_second` (the rounds' median), `lowest` and `highest`, and `ratio`,
        the median of the rounds' ratios of ffcv to torch; `loaders`: those of the first size; and what it ran on.

    Raises:
        DataError: the pictures can't be read, or are too few; or ffcv is missing.
    """
    with tempfile.TemporaryDirectory() as root:
        pictures = Path(root) / "pictures"
        pictures.mkdir()
        (pictures / "train").symlink_to(folder.resolve())
        written = write_beton(
            folder,
            pictures / "train.beton",
            max_resolution=RESOLUTION_LIMIT,
            compress_probability=compress_probability,
            workers=workers,
        )
        needed = (workers + FEWEST) * BATCH + 2
        if written.manifest.count < needed:
            raise DataError(f"{folder}: has {written.manifest.count} pictures, and {needed} are needed to time them")
        classes = len(class_folders(folder))
        measured = {
            str(size): _measured(
                {
                    name: ImageFolder.model_validate(
                        {
                            "folder": pictures.name,
                            "classes": classes,
                            "size": size,
                            "validation": 1,
                            "test": 1,
                            "batch_size": BATCH,
                            "loader": name,
                            "workers": workers,
                        }
                    ).loader(Path(root), seed=0, device=device)
                    for name in LOADERS
                },
                workers,
                rounds,
            )
            for size in sizes
        }
    return {
        "loaders": {name: measured[str(sizes[0])][name] for name in LOADERS},
        "sizes": measured,
        "pictures": written.manifest.count,
        "batch_size": BATCH,
        "workers": workers,
        "rounds": rounds,
        "compress_probability": compress_probability,
        **machine(device),
    }


def _measured(loaders: dict[str, ImageLoader], workers: int, rounds: int) -> dict[str, Any]:
    paces = {name: [] for name in loaders}
    for epoch in range(rounds + 1):
        for name, loader in loaders.items():
            pace = _pace(loader, epoch, workers)
            if epoch:  # the first reads the disk
                paces[name].append(pace)
    found: dict[str, Any] = {
        name: {"images_per_second": statistics.median(each), "lowest": min(each), "highest": max(each)}
        for name, each in paces.items()
    }
    found["ratio"] = statistics.median(ffcv / torch_ for ffcv, torch_ in zip(*paces.values(), strict=True))
    return found


def _pace(loader: ImageLoader, epoch: int, workers: int) -> float:
    """Images per second of an epoch, from when each worker has had a batch: torch's are started for each epoch."""
    batches = loader.train_batches(epoch)
    for _ in range(workers):
        next(batches)
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
        images[-1, -1, -1, -1].item()  # waits for the device
    return count / (time.perf_counter() - start)
