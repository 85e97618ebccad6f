"""Tracing a backbone, and its values' shapes from the meta device."""

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from asge_zoo.errors import SpecError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_convolution(module: nn.Module | None) -> bool:
    """Whether a module is what a unit is built around."""
    return isinstance(module, CONVOLUTIONS)


class UnitTracer(fx.Tracer):
    """Traces into whatever holds a convolution; everything else stays whole.

    So flags (training or not), asserts and buffer updates stay inside modules, and nothing is baked in.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_convolution(m) or not any(is_convolution(inner) for inner in m.modules())


class ShapeRecorder(fx.Interpreter):
    """Runs a traced graph on the meta device and notes every value's shape and every node's MACs."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
            if n.op == "call_module":
                self.macs[n.name] = multiply_accumulates(self.submodules[str(n.target)], result)
        return result


def multiply_accumulates(module: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates of a convolution or linear layer per image; 0 for other modules."""
    per_image = output[0].numel()
    if isinstance(module, CONVOLUTIONS):
        return per_image * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return per_image * module.in_features
    return 0


def trace(module: nn.Module) -> fx.Graph:
    """The module's forward pass as a graph whose leaves are modules.

    Raises:
        SpecError: the module branches on data, or is otherwise not traceable.
    """
    try:
        return UnitTracer().trace(module)
    except (TraceError, TypeError, ValueError) as error:
        raise SpecError(f"backbone: can't be traced into units ({' '.join(str(error).split())})") from error


def record_shapes(module: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]) -> ShapeRecorder:
    """Shapes and MACs of every value of the graph, for one image (C, H, W), without computing anything.

    Raises:
        SpecError: the backbone does not take images of that shape.
    """
    recorder = ShapeRecorder(copy.deepcopy(module).to("meta"), graph)
    try:
        recorder.run(torch.empty(1, *image_shape, device="meta"))
    except RuntimeError as error:
        size = "×".join(map(str, image_shape))
        raise SpecError(f"backbone: does not take images of {size} ({str(error).splitlines()[0]})") from error
    return recorder
