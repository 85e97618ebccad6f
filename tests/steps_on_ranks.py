"""Steps of specs' networks by SGD on each rank's part of the same batches; started by torchrun, or alone.

What each comes to, weights and running statistics, goes to a safetensors file.
"""

import argparse
import json
from pathlib import Path

import safetensors.torch
import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.graph.reduction import reduction
from asge_zoo.ranks import Shard, joined_ranks
from asge_zoo.spec import Spec, load_spec


def take_steps(
    spec: Spec, *, steps: int, batch_size: int, double: bool, shards: list[Shard]
) -> dict[str, torch.Tensor]:
    """The state after `steps` of SGD with momentum; with several shards, the mean of their steps.

    Args:
        spec: its network, built from seed 0 for 10 classes.
        batch_size: of the whole batch, which is drawn by the step's number.
        double: float64.
        shards: of this process: its own alone, or all those that other processes would have.
    """
    graph = compile_spec(spec)
    dtype = torch.float64 if double else torch.float32
    graph.to(dtype)
    graph.train()
    graph.reduction = reduction(shards[0], batch_size) if len(shards) == 1 else None
    info = parts(spec).data.info()
    params, buffers = dict(graph.named_parameters()), dict(graph.named_buffers())
    optimizer = torch.optim.SGD(params.values(), lr=0.001, momentum=0.9)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(batch_size, info.channels, info.height, info.width, generator=generator, dtype=dtype)
        labels = torch.randint(len(info.classes), (batch_size,), generator=generator)
        found = [graph.step(shard.of(images), shard.of(labels)) for shard in shards]
        for name, parameter in params.items():
            parameter.grad = torch.stack([each.grads[name] for each in found]).mean(0)
        optimizer.step()
        for name in found[0].buffers:
            values = torch.stack([each.buffers[name] for each in found])
            buffers[name].copy_(values.mean(0) if values.is_floating_point() else values[0])
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in (params | buffers).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("specs", type=json.loads, help="by name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--double", action="store_true")
    given = parser.parse_args()
    with joined_ranks() as ranks:
        options = {"steps": given.steps, "batch_size": given.batch_size, "double": given.double}
        for name, spec in given.specs.items():
            state = take_steps(load_spec(spec), shards=[ranks.shard], **options)
            safetensors.torch.save_file(state, given.folder / f"{name}.{ranks.shard.rank}")


if __name__ == "__main__":
    main()
