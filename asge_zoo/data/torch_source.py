"""Images out of a folder of class folders, decoded by Pillow in torch's DataLoader: for where no .beton is."""

import os
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Generator, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from asge_zoo.data.image_loader import Cropping, ImageSource, Request
from asge_zoo.data.preprocessing import picture_pixels, unreadable
from asge_zoo.errors import DataError

# Forked workers start in milliseconds and share the list of files, where spawned ones import torch, are sent the list,
# and run a script without `if __name__ == "__main__":` again. A fork has one thread, and what workers do (Pillow, loops
# of numpy's) starts none and takes no lock that another thread may have held. Elsewhere than on Linux: torch's default.
CONTEXT = "fork" if sys.platform == "linux" else None
AHEAD = 2  # batches for each worker


class FolderSource(ImageSource):
    """The images of one folder of class folders, as torchvision's ImageFolder orders them.

    Args:
        folder: of the class folders.
        cropping: what to show of each image.
        workers: processes that decode; 0: none, the images are decoded as they are needed.
        pinned: whether batches lie in page-locked memory, for a GPU.

    Raises:
        DataError: there is no such folder, or a class of it has no images.
    """

    def __init__(self, folder: Path, cropping: Cropping, *, workers: int, pinned: bool) -> None:
        from torchvision.datasets import ImageFolder

        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; name the data root it is under with --data-root or ASGE_ZOO_DATA"
            )
        try:
            found = ImageFolder(str(folder))
        except OSError as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")
            raise DataError(f"{folder}: {reason}; it needs a folder of images for each class") from error
        self.classes = tuple(found.classes)
        self.labels = torch.tensor(found.targets, dtype=torch.int64)
        files = [path.removeprefix(os.path.join(folder, "")) for path, _ in found.samples]
        self._images = _Images(folder, files, cropping)
        self._workers, self._pinned = workers, pinned

    def batches(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        batches = self._started(requests)
        try:
            while True:
                try:
                    batch = next(batches, None)
                except (RuntimeError, OSError, EOFError) as error:  # of the last two, where it died in handing over
                    if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                        raise
                    batch = (
                        f"a process that decodes images of {self._images.folder} died, as they do where memory or "
                        f"/dev/shm is full; set data.workers to fewer than {self._workers}, or to 0 for none"
                    )
                if batch is None:
                    return
                if isinstance(batch, str):
                    raise DataError(batch)
                yield batch
        finally:
            del batches  # which ends the workers, as no traceback holds it

    def _started(self, requests: Iterator[Request]) -> Iterator[Tensor | str]:
        """What the workers make of them, which are started.

        torch has a dead worker interrupt the main thread, wherever that is; here the next batch's taking finds out,
        within seconds, where it can be told from other errors. So the signal's handler is put back.
        """
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGCHLD) if main else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # their number was asked for
            warnings.filterwarnings("ignore", "(?s).*use of fork", DeprecationWarning)  # see CONTEXT
            loader = DataLoader(
                self._images,
                sampler=requests,  # pyright: ignore[reportArgumentType]  # a batch is an index; any iterable will do
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=AHEAD if self._workers else None,
                pin_memory=self._pinned,
                generator=torch.Generator(),  # else it draws from torch's own, which is not ours to move
                worker_init_fn=partial(_heed_the_parent_alone, os.getpid()) if self._workers else None,
                multiprocessing_context=CONTEXT if self._workers else None,
            )
            batches = iter(loader)
        if main:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return batches


class _Images(Dataset[Tensor | str]):
    """What a worker has: indexed by a request, a batch (b, S, S, 3) of uint8, or what is wrong with an image."""

    def __init__(self, folder: Path, files: list[str], cropping: Cropping) -> None:
        self.folder, self.cropping = folder, cropping
        # one array and not a list: to count references to a million strings would copy them into every worker
        self.files = np.array([os.fsencode(file) for file in files])

    def __getitem__(self, request: Request) -> Tensor | str:
        size = self.cropping.size
        batch = np.empty((len(request.samples), size, size, 3), dtype=np.uint8)
        for sample, place in zip(request.samples, batch, strict=True):
            path = self.folder / os.fsdecode(bytes(self.files[sample]))
            try:
                place[:] = self._cropped(path, sample, request.epoch)
            except MemoryError:
                raise
            except Exception as error:  # whatever a broken file makes Pillow raise; by word, as it crosses processes
                return unreadable(path, error)
        return torch.from_numpy(batch)

    def _cropped(self, path: Path, sample: np.int64, epoch: int | None) -> np.ndarray:
        from PIL import Image

        with Image.open(path) as image:
            number, heights, widths = (np.array([each]) for each in (sample, image.height, image.width))
            ((top, left, height, width),) = self.cropping.boxes(number, epoch, heights, widths).tolist()
            side = (self.cropping.size, self.cropping.size)
            return picture_pixels(image, (left, top, left + width, top + height), side, "RGB")


def _heed_the_parent_alone(parent: int, worker: int) -> None:
    """Take no signal that a terminal sends to its process group, or a cluster to all processes of a job.

    What they stop is the training, in order; the workers end with it, by the SIGTERM that torch sends them, or when
    they find it gone.
    """
    if os.getppid() != parent:  # killed since: torch looks for a change from here on
        os._exit(1)
    warnings.simplefilter("ignore")  # Pillow's, of odd pictures, once a worker and epoch
    if hasattr(os, "setpgrp"):
        os.setpgrp()
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
