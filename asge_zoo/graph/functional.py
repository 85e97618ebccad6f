"""Helpers of the pure step: modules as functions of their tensors, and the step as a function of its own."""

import itertools
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from asge_zoo.graph.unit import Values


def full_precision(like: Tensor) -> torch.autocast:
    """A context in which autocast is off: goodness, logits and losses stay float32."""
    return torch.autocast(like.device.type, enabled=False)


def bind(module: nn.Module, prefix: str, values: Values) -> Callable[..., Any]:
    """A module as a function of its arguments, with its tensors from `values`, where they are named `prefix` + name."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    tensors = {name: values[prefix + name] for name in names}
    return lambda *args: functional_call(module, tensors, args)


def laid_out_like(parameters: Values, gradients: Values) -> dict[str, Tensor]:
    """Gradients in their parameters' layouts: fused optimizers read memory as it lies, whatever the strides say."""
    return {name: in_layout_of(parameters[name], x) for name, x in gradients.items()}


def in_layout_of(parameter: Tensor, x: Tensor) -> Tensor:
    """A tensor of a parameter's shape, copied where it does not lie in memory as that does."""
    return x if _strides(x) == _strides(parameter) else torch.empty_like(parameter).copy_(x)


def _strides(x: Tensor) -> list[int]:
    """Of the dimensions that have any: the others' say nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


_copies = itertools.count()


def own_code(method: MethodType) -> Callable[..., Any]:
    """A copy of a bound method with a code object of its own.

    torch's compiler counts recompilations by code object, up to a limit: without this, the ninth graph of a
    process would not compile.
    """
    function = method.__func__
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    copy = FunctionType(code, function.__globals__, closure=function.__closure__)
    return MethodType(copy, method.__self__)


# How torch's compiler is to go about a step.
COMPILER = {
    # Operations run in the order in which they are written, a unit's gradient before the next unit's forward: what the
    # compiler would reorder and fuse across units (all that reads the labels) keeps several units' maps alive at once.
    "reorder_for_peak_memory": False,
    "reorder_for_locality": False,  # puts what only leaves the step last: biases' gradients, which keep all units' maps
    "score_fusion_memory_threshold": 2**16,  # bytes that two operations read in common, for them to be fused
    # A value that several operations read is stored if three reads or more make it, such as a normalised map; by
    # torch's default, five, it is computed and stored once for the convolution and once more for its gradient.
    "realize_reads_threshold": 2,
}


def compiled(method: MethodType) -> Callable[..., Any]:
    """A bound method compiled as one graph."""
    return torch.compile(own_code(method), fullgraph=True, options=COMPILER)
