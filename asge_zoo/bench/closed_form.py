"""Equation 7 written out: the step's gradients without automatic differentiation, as a yardstick for those with it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.unit import INPUT, Unit, Values
from asge_zoo.ops.goodness import PatchMeanSquare
from asge_zoo.ops.projection import FixedLinear
from asge_zoo.rules.asge import ASGE


def has_closed_form(graph: LocalGraph) -> bool:
    """Whether each unit is a convolution, its ReLU and what has no parameters, under ASGE on patches of equal size."""
    return isinstance(graph.rule, ASGE) and all(
        _convolves_and_rectifies(unit) and _is_even(local) for unit, local in zip(graph.units, graph.local, strict=True)
    )


def _convolves_and_rectifies(unit: Unit) -> bool:
    convolution, relu = (step.call for step in unit.steps[:2])
    plain = isinstance(convolution, nn.Conv2d) and isinstance(convolution.padding, tuple) and isinstance(relu, nn.ReLU)
    return plain and unit.steps[1].name == unit.activation and len(unit.parameters) == len(unit.steps[0].tensors)


def _is_even(local: nn.Module) -> bool:
    goodness, projection = local.get_submodule("goodness"), local.get_submodule("projection")
    whole = isinstance(goodness, PatchMeanSquare) and goodness.even
    return whole and isinstance(projection, FixedLinear)


class ClosedForm:
    """The units' gradients by equation 7; the head's, which are no part of it, are not computed.

    Args:
        graph: units that `has_closed_form` answers yes for.
    """

    def __init__(self, graph: LocalGraph) -> None:
        self.graph = graph

    def gradients(self, params: Values, state: Values, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """A gradient for every parameter of the units, by name; arguments as for `LocalGraph.step_fn`."""
        bf16 = self.graph.precision == "bfloat16"
        env = {INPUT: images.contiguous(memory_format=torch.channels_last)}
        found: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            for index, unit in enumerate(self.graph.units):
                x = env[unit.reads[0]]
                env = unit.run(env, {**params, **state})
                with torch.autocast(images.device.type, enabled=False):
                    found |= self._unit_gradients(index, x, env[unit.activation], params, state, labels)
                env = unit.leave(env)
        return found

    def _unit_gradients(
        self, index: int, x: Tensor, activation: Tensor, params: Values, state: Values, labels: Tensor
    ) -> dict[str, Tensor]:
        unit, projection = self.graph.units[index], state[f"local.{index}.projection.weight"]
        convolution = unit.steps[0].call
        assert isinstance(convolution, nn.Conv2d) and isinstance(convolution.padding, tuple)
        patches, height, width = unit.partition, unit.height // unit.partition, unit.width // unit.partition
        batch, channels = activation.shape[:2]

        squares = activation.float().square().reshape(batch, channels, patches, height, patches, width)
        logits = squares.mean((3, 5)).flatten(1) @ projection + state[f"local.{index}.projection.bias"]
        delta = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) / batch
        by_patch = (delta @ projection.T).view(batch, channels, patches, 1, patches, 1) * (2 / (height * width))
        by_pixel = by_patch.expand(-1, -1, -1, height, -1, width).reshape(activation.shape)
        slope = activation * by_pixel.to(activation.dtype)

        names = dict(unit.steps[0].tensors)
        weight = params[names["weight"]]
        has_bias = "bias" in names
        mask = [False, True, has_bias]
        options = convolution.stride, convolution.padding, convolution.dilation, False, [0, 0], convolution.groups
        gradients = torch.ops.aten.convolution_backward(
            slope, x.to(slope.dtype), weight.to(slope.dtype), [channels], *options, mask
        )
        found = {names["weight"]: gradients[1].to(weight.dtype)}
        if has_bias:
            found[names["bias"]] = gradients[2].to(weight.dtype)
        return found
