"""Images out of FFCV's files, decoded by FFCV's own library, in threads.

FFCV's Loader is not used. It waits for ever where its thread has failed, shows a damaged image as a black one, draws
its crops by no seed, gives views of buffers that it overwrites, compiles for seconds whenever one is made, and sets
torch's number of threads. What is fast about it is its file and the two functions called here, which hold no lock of
Python's. A future carries whatever a thread raises to who waits for it, so that nothing can wait for ever.
"""

import os
import weakref
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asge_zoo.data.beton import import_ffcv, open_beton
from asge_zoo.data.crops import Integers
from asge_zoo.data.image_loader import Cropping, ImageSource, Request
from asge_zoo.errors import DataError

CHUNK = 16  # images that a thread takes at a time: enough that Python's part is small, few enough that all are busy
AHEAD = 2  # batches that are decoded while one is used; more where they are so small that threads would wait

Bytes = NDArray[np.uint8]


class BetonSource(ImageSource):
    """The images of one file.

    Args:
        path: of the .beton.
        cropping: what to show of each image.
        workers: threads that decode, one at least.
        pinned: whether batches lie in page-locked memory, for a GPU.

    Raises:
        DataError: the file is missing or damaged, or ffcv is missing or broken.
    """

    def __init__(self, path: Path, cropping: Cropping, *, workers: int, pinned: bool) -> None:
        self.beton = open_beton(path)
        self.labels = torch.from_numpy(self.beton.labels)
        self.classes = self.beton.classes
        self._cropping, self._workers, self._pinned = cropping, max(1, workers), pinned
        self._library: Any = import_ffcv("ffcv.libffcv")
        # one pool for good: FFCV keeps a decoder for each thread, and frees none
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        self._most_stored = int(self.beton.sizes.max())
        self._most_pixels = int((self.beton.heights * self.beton.widths).max()) * 3
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def batches(self, requests: Iterator[Request]) -> Generator[Tensor, None, None]:
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
        try:
            for request in requests:
                waiting.append(self._started(request))
                if len(waiting) > max(AHEAD, 2 * self._workers * CHUNK // max(1, len(request.samples))):
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _started(self, request: Request) -> tuple[Tensor, list[Future[None]]]:
        samples, size = request.samples, self._cropping.size
        batch = torch.empty((len(samples), size, size, 3), dtype=torch.uint8, pin_memory=self._pinned)
        boxes = self._cropping.boxes(samples, request.epoch, self.beton.heights[samples], self.beton.widths[samples])
        pixels: Bytes = batch.numpy()
        chunks = [slice(start, start + CHUNK) for start in range(0, len(samples), CHUNK)]
        return batch, [self._pool.submit(self._decode, samples[c], boxes[c], pixels[c]) for c in chunks]

    def _decode(self, samples: Integers, boxes: Integers, pixels: Bytes) -> None:
        """Write each sample's box (n, 4), resized, to its place in `pixels` (n, S, S, 3)."""
        stored, image = (np.empty(size, dtype=np.uint8) for size in (self._most_stored, self._most_pixels))
        for sample, (top, left, height, width), place in zip(samples.tolist(), boxes.tolist(), pixels, strict=True):
            whole = self._image(sample, stored, image)
            self._library.resize_crop(whole, top, top + height, left, left + width, place)

    def _image(self, sample: int, stored: Bytes, image: Bytes) -> Bytes:
        """The whole image (H, W, 3), in one of the two buffers."""
        beton = self.beton
        height, width = int(beton.heights[sample]), int(beton.widths[sample])
        stored, image = stored[: beton.sizes[sample]], image[: height * width * 3].reshape(height, width, 3)
        # read and not mapped: where a file is cut short under a map, the process dies
        count = os.preadv(self._file, [stored.data], int(beton.offsets[sample]))
        if count < len(stored) or zlib.crc32(stored.data) != beton.crc32[sample]:
            raise self._damaged(sample, "its bytes are not those that were written")
        if not beton.jpeg[sample]:
            return stored.reshape(height, width, 3)
        if self._library.imdecode(stored, image, height, width, height, width, 0, 0, 1, 1, False, False):
            raise self._damaged(sample, "it is no sound JPEG")
        return image

    def _damaged(self, sample: int, reason: str) -> DataError:
        beton = self.beton
        return DataError(
            f"{beton.path}: image {sample} ({beton.files[sample]}) is damaged: {reason}; "
            f"`asge-zoo data verify {beton.path}` lists all such, write the file anew"
        )


def _finished(started: tuple[Tensor, list[Future[None]]]) -> Tensor:
    batch, futures = started
    for future in futures:
        future.result()
    return batch
