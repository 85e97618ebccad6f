"""The variants that one process runs: this one, or one of its own whose memory is set as `train` sets it."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._inductor.utils import clear_caches

from asge_zoo.bench.measure import Run, peak_bytes, process_peak_bytes, seconds, step_seconds
from asge_zoo.bench.variants import random_batch, variants
from asge_zoo.errors import ZooError
from asge_zoo.process import collect_garbage_rarely, hush_torch, keep_freed_memory
from asge_zoo.spec import Spec

Key = tuple[str, str]  # a variant and the way that it is run
PATIENCE = 5.0  # seconds for a process to end
WARM_UP = 2  # calls of each variant that are not timed, the first of which compiles


class Share:
    """Steps that this process runs, all on one random batch of the spec's shapes.

    Attributes:
        batch_size: images in a step.
        variants: all there are, see `bench.variants.variants`; none has been built.
    """

    def __init__(self, spec: Spec, device: torch.device) -> None:
        batch = random_batch(spec, device)
        self.device, self.batch_size = device, len(batch.labels)
        self.variants = variants(spec, batch)
        self._runs: dict[Key, Run] = {}

    def warm_up(self, keys: Iterable[Key]) -> dict[Key, dict[str, float] | None]:
        """Build these; of each the seconds of its first call, `cold` and then from the caches on disk, `warm`.

        None for what does not compile. The caches on disk have to be empty.
        """
        ways = {(name, key): self.variants[name][key] for name, key in keys}
        cold = {key: seconds(way.make(), self.device) for key, way in ways.items() if way.compiles}
        torch._dynamo.reset()
        clear_caches()
        warm = {key: self._build(key) for key in ways}
        return {key: {"cold": cold[key], "warm": warm[key]} if key in cold else None for key in ways}

    def step_seconds(self, key: Key) -> float:
        """Of one that is warm."""
        return step_seconds(self._runs[key], self.device)

    def memory(self, key: Key) -> dict[str, int | None]:
        """Bytes of a step beyond the resting state: `peak_bytes`, and its check, `process_peak_bytes`, on the CPU."""
        if key not in self._runs:
            self._build(key)
        run = self._runs[key]
        checked = process_peak_bytes(run) if self.device.type == "cpu" else None
        return {"peak_bytes": peak_bytes(run, self.device), "process_peak_bytes": checked}

    def _build(self, key: Key) -> float:
        name, way = key
        run = self._runs[key] = self.variants[name][way].make()
        first = seconds(run, self.device)
        for _ in range(WARM_UP - 1):
            step_seconds(run, self.device)
        return first


class OwnProcess:
    """A `Share` in a process of its own, as the command `train` would run it; asked through a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def warm_up(self, keys: Iterable[Key]) -> dict[Key, dict[str, float] | None]:
        return self._ask(Share.warm_up, list(keys))

    def step_seconds(self, key: Key) -> float:
        return self._ask(Share.step_seconds, key)

    def _ask(self, method: Callable[..., Any], argument: Any) -> Any:
        try:
            self._connection.send((method.__name__, argument))
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise ZooError(
                "the process that ran asge-zoo's own steps has ended; where memory ran out, give a lower --batch-size"
            ) from error


@contextlib.contextmanager
def own_process(spec: Spec, device: torch.device) -> Iterator[OwnProcess]:
    """Start one, and end it.

    Raises:
        ZooError: it ended by itself.
    """
    context = get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, spec, device, torch.get_num_threads()), daemon=True)
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the new process's own; this one ends it
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, interrupted)
    theirs.close()
    try:
        yield OwnProcess(connection)
    finally:
        process.terminate()
        process.join(PATIENCE)
        process.kill()
        process.join()
        connection.close()


def _serve(connection: Connection, spec: Spec, device: torch.device, threads: int) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # in order: what holds semaphores gives them back
    collect_garbage_rarely()
    keep_freed_memory()
    hush_torch()
    torch.set_num_threads(threads)
    share = Share(spec, device)
    with contextlib.suppress(EOFError, BrokenPipeError):  # whoever asked is gone
        while True:
            method, argument = connection.recv()
            connection.send(getattr(share, method)(argument))
