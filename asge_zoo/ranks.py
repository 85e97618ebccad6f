"""The processes that train together, by torchrun's environment: which of how many this is, and what they say.

Gradients don't go this way: see `graph.reduction`.
"""

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's, of cgroup v2
PATIENCE = timedelta(minutes=30)  # for a rank that lives and does not answer; one that dies is noticed at once

Items = TypeVar("Items", bound=Any)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Shard:
    """One rank's part of what all ranks share: every `world_size`-th item from `rank` on, nothing twice.

    Attributes:
        rank: from 0.
        world_size: how many ranks there are.
    """

    rank: int = 0
    world_size: int = 1

    def of(self, items: Items) -> Items:
        """This rank's part of a sequence, an array or a tensor, along its first axis; in the same order."""
        return items[self.rank :: self.world_size]

    def size(self, count: int) -> int:
        """How many of `count` items are this rank's."""
        return len(range(self.rank, count, self.world_size))


ALONE = Shard()  # all there is


class Ranks:
    """What ranks tell each other on the host; on a single one each method gives back what it got.

    Every rank has to call the same methods in the same order: each waits for the others.
    """

    def __init__(self, shard: Shard = ALONE) -> None:
        self.shard = shard

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes."""
        return self.shard.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.shard.world_size > 1

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks of a float64 tensor of equal shape on each, added in their order; on its device."""
        if not self.several:
            return values
        mine = values.cpu()
        found = [torch.empty_like(mine) for _ in range(self.shard.world_size)]
        torch.distributed.all_gather(found, mine)
        return sum(found[1:], found[0]).to(values.device)

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        if not self.several:
            return value
        found = torch.tensor([value])
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def share(self, value: Value) -> Value:
        """The first rank's value, on every rank."""
        values = [value]
        if self.several:
            torch.distributed.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's value, on every rank, in their order."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.shard.world_size
        torch.distributed.all_gather_object(found, value)
        return found


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Meet the other ranks that torchrun started, if it did: gloo for what is on CPUs, NCCL for what is on GPUs."""
    if not launched():
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world_size = next(rendezvous("env://", timeout=PATIENCE))
    # a restart finds the store that it had before, with the addresses of ranks that are gone
    store = PrefixStore(f"start-{restarts()}", store)
    torch.distributed.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=world_size)
    yield Ranks(Shard(rank, world_size))
    torch.distributed.destroy_process_group()  # not on an error: it would wait for ranks that are gone


def launched() -> bool:
    """Whether torchrun, or something that sets the same environment, started this process as one of several."""
    return world_size() > 1 and "RANK" in os.environ


def lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank is gone: torch's own by type, gloo's, which has none, by its words."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error) or "by peer" in str(error))


def job() -> str | None:
    """What torchrun calls the job that this process is of; None for one that it did not start."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def restarts() -> int:
    """How often torchrun has restarted this job's ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first() -> bool:
    """Whether this process is the rank that writes and speaks, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0 or not launched()


def local_rank() -> int:
    """This process's place among the ranks of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """How many ranks this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world_size() -> int:
    """How many ranks there are, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def here() -> str:
    """This rank by number and host, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def usable_cpus() -> int:
    """CPUs that this process may run on: by its affinity, and by its container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max"
        return allowed
