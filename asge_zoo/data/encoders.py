"""Worker processes that read images and encode them as FFCV stores them.

Each has a pipe of its own, which ends when it does, in the middle of a message too: one that dies is noticed at once,
and one that nobody waits for any more ends by itself.
"""

import contextlib
import multiprocessing
import signal
import warnings
from collections.abc import Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from asge_zoo.data.beton import import_ffcv
from asge_zoo.errors import DataError

CHUNK = 16  # images that a worker is given at a time
AHEAD = 4  # chunks for each worker that may be under way or done before the one that is next


class Wanted(NamedTuple):
    """An image to encode, as JPEG or raw."""

    path: Path
    jpeg: bool


class Encoded(NamedTuple):
    """The bytes to store, and FFCV's record of the image, (1,), without its place in the file."""

    stored: bytes
    record: NDArray[Any]


class Unreadable(NamedTuple):
    """Why an image can't be read."""

    reason: str


Result = Encoded | Unreadable


def encode_all(
    wanted: Sequence[Wanted], workers: int, max_resolution: int, quality: int
) -> Generator[Result, None, None]:
    """Encode images in at most `workers` processes, and give them in their order; close it to end the processes.

    Raises:
        DataError: a worker failed, or died.
    """
    chunks = [wanted[start : start + CHUNK] for start in range(0, len(wanted), CHUNK)]
    workers = min(workers, len(chunks))
    crew: dict[Connection, BaseProcess] = {}
    done: dict[int, list[Result]] = {}
    given = 0
    try:
        for _ in range(workers):
            crew.update([_start(max_resolution, quality)])
        idle = list(crew)
        for number in range(len(chunks)):
            while True:
                while idle and given < min(len(chunks), number + AHEAD * workers):
                    connection = idle.pop()
                    with _alive(crew[connection]):
                        connection.send((given, chunks[given]))
                    given += 1
                if number in done:
                    break
                for connection in wait([connection for connection in crew if connection not in idle]):
                    assert isinstance(connection, Connection)
                    with _alive(crew[connection]):
                        which, results = connection.recv()
                    if isinstance(results, str):
                        raise DataError(f"a worker failed ({results}) on an image from {chunks[which][0].path} on")
                    done[which] = results
                    idle.append(connection)
            yield from done.pop(number)
    finally:
        for connection, process in crew.items():  # they keep nothing that a kill could break
            process.kill()
            process.join()
            process.close()
            connection.close()


def work(connection: Connection, max_resolution: int, quality: int) -> None:
    """What a worker does: results for chunks, until the pipe ends."""
    import_ffcv("cv2").setNumThreads(1)
    warnings.simplefilter("ignore")  # Pillow's, of pictures that are odd and readable
    field = import_ffcv("ffcv.fields").RGBImageField
    fields = {
        jpeg: field("jpg" if jpeg else "raw", max_resolution=max_resolution, jpeg_quality=quality)
        for jpeg in (True, False)
    }
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody waits any more
        while True:
            which, chunk = connection.recv()
            connection.send((which, _encode_chunk(chunk, fields)))


def read_rgb(path: Path, max_resolution: int) -> NDArray[np.uint8] | Unreadable:
    """An image's pixels, (height, width, 3) uint8, as torchvision's ImageFolder reads them, or why there are none."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes Pillow raise
        return Unreadable(" ".join(str(error).replace(str(path), "it").split()) or type(error).__name__)
    shorter, longer = sorted(pixels.shape[:2])
    if shorter * max_resolution < longer:
        return Unreadable(f"nothing of its shorter side is left at a longer side of {max_resolution} pixels")
    return pixels


def _start(max_resolution: int, quality: int) -> tuple[Connection, BaseProcess]:
    """A worker, which no Ctrl-C reaches, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, max_resolution, quality), daemon=True)
    resource_tracker.ensure_running()  # `start` would do it, and unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends with the worker
    return ours, process


@contextlib.contextmanager
def _alive(process: BaseProcess) -> Iterator[None]:
    """A pipe that ends within is its worker's death."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join()
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise DataError(f"a worker died ({how}); see whether memory ran out: fewer --workers need less") from error


def _encode_chunk(chunk: Sequence[Wanted], fields: dict[bool, Any]) -> list[Result] | str:
    try:
        return [_encode(image, fields[image.jpeg]) for image in chunk]
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _encode(image: Wanted, field: Any) -> Result:
    pixels = read_rgb(image.path, field.max_resolution)
    if isinstance(pixels, Unreadable):
        return pixels
    buffers = []

    def malloc(size: int) -> tuple[int, NDArray[np.uint8]]:
        buffers.append(np.empty(size, np.uint8))
        return 0, buffers[-1]

    record = np.zeros(1, field.metadata_type)
    field.encode(record, pixels, malloc)
    return Encoded(buffers[0].tobytes(), record)
