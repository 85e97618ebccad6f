"""The floor: a network's convolutions alone, forward and weight gradient, as bare kernels."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Convolution(NamedTuple):
    """A convolution's shapes and options: input (B, C, H, W), output (B, C', H', W'), weight (C', C / groups, …)."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class _Recorder(TorchDispatchMode):
    """Notes every convolution that runs within, by a module or by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Convolution] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            x, weight, bias, stride, padding, dilation, _, _, groups = args
            shapes = tuple(x.shape), tuple(output.shape), tuple(weight.shape)
            self.found.append(Convolution(*shapes, bias is not None, stride, padding, dilation, groups))
        return output


def convolutions(network: nn.Module, image_shape: tuple[int, ...], batch_size: int) -> list[Convolution]:
    """The convolutions of a network on the meta device, as a batch of images (C, H, W) meets them."""
    with torch.no_grad(), _Recorder() as recorder:
        network(torch.empty(batch_size, *image_shape, device="meta"))
    return recorder.found


def bare_kernels(
    found: list[Convolution], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
) -> Callable[[], list[Tensor]]:
    """A function that runs each convolution's forward and weight gradient once, and its bias's where it has one.

    No input gradients, nothing between convolutions, no optimizer. Maps are views of two buffers as large as the
    largest, weights are their own. What the function returns keeps the compiler from leaving any of it out.
    """

    def buffer(shapes: list[tuple[int, ...]]) -> Tensor:
        return torch.randn(max(math.prod(shape) for shape in shapes), dtype=dtype, device=device)

    def as_map(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        batch, channels, height, width = shape
        flat = flat[: math.prod(shape)]
        if layout is torch.channels_last:
            return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return flat.view(shape)

    inputs, slopes = buffer([each.input for each in found]), buffer([each.output for each in found])
    maps = [(as_map(inputs, each.input), as_map(slopes, each.output)) for each in found]
    weights = [torch.randn(each.weight, dtype=dtype, device=device).to(memory_format=layout) for each in found]
    biases = [torch.randn(each.weight[0], dtype=dtype, device=device) if each.bias else None for each in found]

    def run() -> list[Tensor]:
        kept = []
        for each, (x, slope), weight, bias in zip(found, maps, weights, biases, strict=True):
            y = F.conv2d(x, weight, bias, each.stride, each.padding, each.dilation, each.groups)
            kept.append(y[:1, :1, :1, :1].clone())
            del y
            kept += _weight_gradient(each, slope, x, weight)
        return kept

    return run


def _weight_gradient(each: Convolution, slope: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    mask = [False, True, each.bias]
    options = each.stride, each.padding, each.dilation, False, [0, 0], each.groups
    found = aten.convolution_backward(slope, x, weight, [len(weight)], *options, mask)
    return [gradient for gradient, wanted in zip(found, mask, strict=True) if wanted]
