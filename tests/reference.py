"""The method once more, in plain loops, straight from the paper's equations.

It shares no code with the package: it is what the package is measured against. Every function takes
whatever dtype it is given; the tests give float64. A *layer* is a convolution with its ReLU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

EPS = 1e-5

# Channels of each 3×3 convolution; P marks 2×2 pooling behind it.
NETWORKS = {
    "vgg8": "128, 256 P, 256, 512 P, 512 P, 512 P, 512",
    "vgg11": "128, 128, 128, 256 P, 256, 512 P, 512, 512 P, 512 P, 512",
}


@dataclass(frozen=True)
class Plan:
    """A layer's shape: its map (channels, side, side), whether it is pooled, and its patches per side."""

    channels: int
    side: int
    pooled: bool
    partition: int


@dataclass(frozen=True)
class Layer:
    """A layer's own tensors: the convolution's, which learn, and the projection's, which do not.

    Attributes:
        weight, bias: (C_l, C_l-1, 3, 3) and (C_l,).
        projection, offset: (C_l · P², N) and (N,).
        pooled, partition: as in `Plan`.
    """

    weight: Tensor
    bias: Tensor
    projection: Tensor
    offset: Tensor
    pooled: bool
    partition: int


@dataclass(frozen=True)
class LayerStep:
    """What one layer computes in one step; `output` is what the next layer reads."""

    input: Tensor
    activation: Tensor
    output: Tensor
    logits: Tensor
    loss: Tensor
    weight_grad: Tensor
    bias_grad: Tensor


def partition(alpha: float, last_channels: int, channels: int, height: int, width: int) -> int:
    """P, equation 3."""
    return min(max(1, floor(alpha * last_channels / channels)), height, width)


def plan(network: str, *, alpha: float, side: int, divisor: int = 1) -> list[Plan]:
    """Every layer's shape for images of side × side, all channels divided by `divisor`."""
    layers = NETWORKS[network].split(", ")
    widths = [int(layer.split()[0]) // divisor for layer in layers]
    plans = []
    for layer, channels in zip(layers, widths, strict=True):
        pooled = layer.endswith("P")
        plans.append(Plan(channels, side, pooled, partition(alpha, widths[-1], channels, side, side)))
        side = side // 2 if pooled else side
    return plans


def goodness(activation: Tensor, partition: int) -> Tensor:
    """g, equation 2: the mean square of every patch, (B, C, H, W) to (B, C · P²), patch after patch.

    Where P does not divide a side, patch i spans floor(i · side / P) to ceil((i + 1) · side / P).
    """
    height, width = activation.shape[2:]
    patches = []
    for row in range(partition):
        top, bottom = floor(row * height / partition), ceil((row + 1) * height / partition)
        for column in range(partition):
            left, right = floor(column * width / partition), ceil((column + 1) * width / partition)
            patch = activation[:, :, top:bottom, left:right]
            patches.append((patch * patch).sum((2, 3)) / ((bottom - top) * (right - left)))
    return torch.stack(patches, dim=2).flatten(1)


def pool(x: Tensor, kind: str) -> Tensor:
    """2×2 pooling, an odd last row or column left out (equation 8, Table 2)."""
    windows = x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    if kind == "max":
        return windows.max(dim=4).values
    if kind == "avg":
        return windows.sum(4) / 4
    assert kind == "rms"
    return torch.linalg.vector_norm(windows, dim=4) / 2  # its slope at an all-zero window is 0


def layer_norm(x: Tensor) -> Tensor:
    """Each sample less its mean over (C, H, W), divided by its (biased) standard deviation."""
    count = x[0].numel()
    centred = x - x.sum((1, 2, 3), keepdim=True) / count
    variance = (centred * centred).sum((1, 2, 3), keepdim=True) / count
    return centred / torch.sqrt(variance + EPS)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Equation 6: the mean of −log softmax(a)[t]."""
    log_probabilities = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    return -torch.stack([log_probabilities[i, label] for i, label in enumerate(labels.tolist())]).sum() / len(labels)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Y = ReLU(conv(X)), equation 1."""
    return F.relu(F.conv2d(x, weight, bias, padding=1))


def transfer(activation: Tensor, layer: Layer, pooling: str) -> Tensor:
    """What the next layer reads: pooled where the layer is, then normalised."""
    return layer_norm(pool(activation, pooling) if layer.pooled else activation)


def asge_step(layers: Sequence[Layer], images: Tensor, labels: Tensor, pooling: str) -> list[LayerStep]:
    """One ASGE step, layer by layer: equations 1 to 7, each layer's input a constant."""
    steps = []
    x = images
    for layer in layers:
        weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
        activation = convolve(x, weight, bias)
        logits = goodness(activation, layer.partition) @ layer.projection + layer.offset
        loss = cross_entropy(logits, labels)
        weight_grad, bias_grad = torch.autograd.grad(loss, (weight, bias))
        activation = activation.detach()
        output = transfer(activation, layer, pooling)
        steps.append(LayerStep(x, activation, output, logits.detach(), loss.detach(), weight_grad, bias_grad))
        x = output
    return steps


def closed_form(layer: Layer, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 7 written out, without automatic differentiation, for a P that divides the map.

    Args:
        layer: whose gradient to take.
        x: its input (B, C_l-1, H, W).
        labels: (B,).

    Returns:
        the gradients of its weight and bias.
    """
    activation = convolve(x, layer.weight, layer.bias)
    batch, channels, height, width = activation.shape
    p = layer.partition
    assert height % p == 0 and width % p == 0, "the closed form is written for a P that divides the map"
    patch_height, patch_width = height // p, width // p
    logits = goodness(activation, p) @ layer.projection + layer.offset
    onehot = torch.zeros_like(logits)
    for i, label in enumerate(labels.tolist()):
        onehot[i, label] = 1
    delta = (torch.softmax(logits, dim=1) - onehot) / batch
    by_patch = (delta @ layer.projection.T).reshape(batch, channels, p, p)
    by_pixel = by_patch.repeat_interleave(patch_height, 2).repeat_interleave(patch_width, 3)
    slope = 2 / (patch_height * patch_width) * activation * by_pixel
    weight_grad = conv2d_weight(x, list(layer.weight.shape), slope, padding=1)
    return weight_grad, slope.sum((0, 2, 3))


def classify(features: Sequence[Tensor], head: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits (B, N): each map's global average through its own linear layer (N, C) and (N,), summed."""
    logits = [x.mean((2, 3)) @ weight.T + bias for x, (weight, bias) in zip(features, head, strict=True)]
    return torch.stack(logits).sum(0)


def head_step(
    features: Sequence[Tensor], head: Sequence[tuple[Tensor, Tensor]], labels: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The classifier's logits, its loss and its own gradients (weight, bias, weight …); features are constants."""
    head = [(weight.detach().requires_grad_(), bias.detach().requires_grad_()) for weight, bias in head]
    logits = classify([x.detach() for x in features], head)
    loss = cross_entropy(logits, labels)
    grads = torch.autograd.grad(loss, [tensor for pair in head for tensor in pair])
    return logits.detach(), loss.detach(), list(grads)


def backprop(
    layers: Sequence[Layer], head: Sequence[tuple[Tensor, Tensor]], images: Tensor, labels: Tensor, pooling: str
) -> tuple[Tensor, list[Tensor]]:
    """Backpropagation through the same network: the loss, and gradients as weight, bias, weight …, the head's last.

    The head reads as many of the last layers' outputs as it has linear layers.
    """
    learned = [(layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()) for layer in layers]
    head = [(weight.detach().requires_grad_(), bias.detach().requires_grad_()) for weight, bias in head]
    x, outputs = images, []
    for layer, (weight, bias) in zip(layers, learned, strict=True):
        x = transfer(convolve(x, weight, bias), layer, pooling)
        outputs.append(x)
    loss = cross_entropy(classify(outputs[-len(head) :], head), labels)
    grads = torch.autograd.grad(loss, [tensor for pair in (*learned, *head) for tensor in pair])
    return loss.detach(), list(grads)
