"""The plan of a spec: what would be built, what it computes and what it keeps in memory. Nothing is computed."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from asge_zoo.compiler.build import compile_spec
from asge_zoo.compiler.check import parts
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import Spec

FLOAT_BYTES = 4


@dataclass(frozen=True)
class UnitPlan:
    """A unit as `explain` reports it.

    Attributes:
        name: its convolution's name in the backbone.
        channels, height, width: of its activation map, before pooling.
        partition: patches per side of its goodness (Table 1).
        goodness_dim: length of its goodness vector.
        parameters: trainable numbers.
        macs: multiply-accumulates of one image's forward pass.
        activation_bytes: its output after pooling, for a whole batch, in float32.
    """

    name: str
    channels: int
    height: int
    width: int
    partition: int
    goodness_dim: int
    parameters: int
    macs: int
    activation_bytes: int


def plan(spec: Spec) -> dict[str, Any]:
    """The plan as JSON values; memory is counted as in the paper's Table 3, in bytes of float32.

    `memory.backprop_bytes` is the sum of all units' outputs after pooling; `memory.local_bytes` the
    largest single unit's input, activation and goodness, plus what the prediction keeps.

    Raises:
        SpecError: the spec's parts do not fit together; names the field.
    """
    graph = compile_spec(spec, device="meta")
    data = parts(spec).data
    info, batch = data.info(), data.batch_size
    sizes = {name: tensor.numel() for name, tensor in graph.named_parameters()}
    bytes_per_number = FLOAT_BYTES * batch
    units = [
        UnitPlan(
            name=unit.name,
            channels=unit.channels,
            height=unit.height,
            width=unit.width,
            partition=unit.partition,
            goodness_dim=unit.goodness_dim,
            parameters=sum(sizes[name] for name in unit.parameters),
            macs=unit.macs,
            activation_bytes=torch.Size(unit.output_shape).numel() * bytes_per_number,
        )
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
        "units": [asdict(unit) for unit in units],
        "totals": {
            "units": len(units),
            "parameters": sum(sizes.values()),
            "macs": sum(unit.macs for unit in units),
        },
        "prediction": {
            "kind": spec.prediction.kind,
            "parameters": sum(sizes[name] for name in graph.head_parameters),
            "activation_bytes": kept,
        },
        "memory": {
            "backprop_bytes": sum(unit.activation_bytes for unit in units),
            "local_bytes": widest * bytes_per_number + kept,
        },
        "compiled_graphs": 1 if spec.train.compile else 0,
    }


def _kept_numbers(graph: LocalGraph, image_shape: tuple[int, int, int]) -> int:
    """Numbers per image that the prediction keeps of all units together."""
    image = torch.empty(1, *image_shape, device="meta")
    return sum(kept.numel() for index, env in graph.walk(image) for kept in graph.keep(index, env))
