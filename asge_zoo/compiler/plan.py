"""The plan of a spec: what would be built, what it computes and what it keeps in memory. Nothing is computed."""

import math
from typing import Any

import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import Spec

FLOAT_BYTES = 4


def plan(spec: Spec) -> dict[str, Any]:
    """The plan as JSON values; memory is counted as in the paper's Table 3, in bytes of float32 for a whole batch.

    A unit's `channels`, `height` and `width` are its activation map's, before pooling; `partition` (Table 1) and
    `goodness_dim` its goodness's; `macs` the multiply-accumulates of one image's forward pass; `activation_bytes` its
    output after pooling. `memory.backprop_bytes` is the sum of all units' outputs after pooling;
    `memory.local_bytes` the largest single unit's input, activation and goodness, plus what the prediction keeps.

    Raises:
        SpecError: the spec's parts do not fit together; names the field.
    """
    graph = compile_spec(spec, device="meta")
    data = parts(spec).data
    info, batch = data.info(), data.batch_size
    sizes = {name: tensor.numel() for name, tensor in graph.named_parameters()}
    bytes_per_number = FLOAT_BYTES * batch
    units = [
        {
            "name": unit.name,
            "channels": unit.channels,
            "height": unit.height,
            "width": unit.width,
            "partition": unit.partition,
            "goodness_dim": unit.goodness_dim,
            "parameters": sum(sizes[name] for name in unit.parameters),
            "macs": unit.macs,
            "activation_bytes": math.prod(unit.output_shape) * bytes_per_number,
        }
        for unit in graph.units
    ]
    kept = _kept_numbers(graph, (info.channels, info.height, info.width)) * bytes_per_number
    widest = max(
        unit.input_numel + unit.channels * unit.height * unit.width + unit.goodness_dim for unit in graph.units
    )
    return {
        "name": spec.name,
        "spec_sha256": spec.digest(),
        "input": [info.channels, info.height, info.width],
        "num_classes": len(info.classes),
        "batch_size": batch,
        "rule": spec.rule.kind,
        "units": units,
        "totals": {
            "units": len(units),
            "parameters": sum(sizes.values()),
            "macs": sum(unit.macs for unit in graph.units),
        },
        "prediction": {
            "kind": spec.prediction.kind,
            "parameters": sum(sizes[name] for name in graph.head_parameters),
            "activation_bytes": kept,
        },
        "memory": {
            "backprop_bytes": sum(unit["activation_bytes"] for unit in units),
            "local_bytes": widest * bytes_per_number + kept,
        },
        "compiled_graphs": graph.compiled_graphs,
    }


def _kept_numbers(graph: LocalGraph, image_shape: tuple[int, int, int]) -> int:
    """Numbers per image that the prediction keeps of all units together."""
    image = torch.empty(1, *image_shape, device="meta")
    return sum(kept.numel() for index, env in graph.walk(image) for kept in graph.keep(index, env))
