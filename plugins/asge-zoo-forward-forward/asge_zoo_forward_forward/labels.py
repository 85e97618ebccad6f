"""Labels as maps over the whole image, so that every position of a convolution sees them, and wrong labels."""

import math

import torch
from torch import Tensor

SHORTEST, OCTAVES = 3.0, 2.0  # wavelengths in pixels: from 3 to 12
# Powers of 1/g, g the real root of x⁴ = x + 1: their multiples' fractions fill the cube evenly, however many classes.
STEPS = tuple(1.2207440846057596**-power for power in (1, 2, 3))


def class_waves(num_classes: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """A plane wave per class, (N, H, W), float32, amplitude 1, of its own direction, wavelength and phase.

    After the label maps of Scodellaro et al., "Training Convolutional Neural Networks with the Forward-Forward
    algorithm" (2023).
    """
    classes, y, x = (torch.arange(count, device=device) for count in (num_classes, height, width))
    spread = classes[:, None] * torch.tensor(STEPS, device=device) % 1.0  # (N, 3)
    angle, shortness, phase = spread.unbind(1)
    wavenumber = 2 * math.pi / (SHORTEST * 2 ** (OCTAVES * shortness))
    along_x, along_y = wavenumber * (math.pi * angle).cos(), wavenumber * (math.pi * angle).sin()
    along_x, along_y, phase = (each[:, None, None] for each in (along_x, along_y, 2 * math.pi * phase))
    return torch.cos(along_x * x + along_y * y[:, None] + phase)


def other_labels(labels: Tensor, num_classes: int) -> Tensor:
    """For each of `labels` (B,) another one, all of them equally likely, drawn from torch's generator."""
    return (labels + torch.randint_like(labels, 1, num_classes)) % num_classes
