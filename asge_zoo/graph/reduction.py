"""The ranks' reduction of gradients, inside the step: begun where a unit's are final, ended when the step is.

What lies between, the forward pass of all later units, hides the communication; backpropagation, whose first gradient
is final after the last forward, can't do that.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from asge_zoo.ranks import Shard


@dataclass(frozen=True)
class Reduction:
    """The mean over a batch's images from each rank's mean over its own.

    Attributes:
        group: name of the ranks' process group.
        size, batch_size: images of this rank, and of all ranks together.
    """

    group: str
    size: int
    batch_size: int

    def start(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Begin to reduce; what comes back holds its values once `finish` has waited for it.

        Integers, such as a norm's count of batches, are the same on every rank and stay as they are.
        """
        found = dict(tensors)
        for dtype in sorted({tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}, key=str):
            names = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
            parts = [tensors[name] * self.size / self.batch_size for name in names]
            reduced = torch.ops._c10d_functional.all_reduce_coalesced(parts, "sum", self.group)
            found |= dict(zip(names, reduced, strict=True))
        return found

    def finish(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Wait for what `start` began."""
        wait = torch.ops._c10d_functional.wait_tensor
        return {name: wait(x) if x.is_floating_point() else x for name, x in tensors.items()}


def reduction(shard: Shard, batch_size: int) -> Reduction | None:
    """The reduction of one batch's gradients over the default process group; None where there are no other ranks."""
    if shard.world_size == 1:
        return None
    import torch.distributed._functional_collectives  # noqa: F401 - defines the operators

    group = torch.distributed.group.WORLD
    assert group is not None
    return Reduction(group.group_name, shard.size(batch_size), batch_size)
