"""Which process of how many this is, and which CPUs it may use."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's, of cgroup v2

Items = TypeVar("Items", bound=Any)


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


def usable_cpus() -> int:
    """CPUs that this process may run on: by its affinity, and by its container's quota where there is one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max"
        return allowed
