"""What Last and Fusion share: linear heads on globally average-pooled feature maps (Table 3)."""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.unit import Unit
from asge_zoo.ops.projection import linear_to_logits


class LinearSum(nn.Module):
    """One linear layer, with its own bias, per kept vector; their logits are summed.

    That equals one linear layer on the concatenation but for the number of biases, which is what
    Table 3 counts. From vectors (B, C_l) to logits (B, N).
    """

    def __init__(self, dims: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(dim, num_classes) for dim in dims)

    def forward(self, *pooled: Tensor) -> Tensor:
        layers = [cast(nn.Linear, layer) for layer in self.linears]
        logits = [linear_to_logits(x, layer.weight.T, layer.bias) for layer, x in zip(layers, pooled, strict=True)]
        return torch.stack(logits).sum(0)


class PooledPrediction(Prediction):
    """Global average pooling of the units from `first_unit` on, then one linear classifier."""

    features: Literal["normalized", "activation"] = Field(
        default="normalized",
        description="What is pooled: the unit's output after pooling and norm, or its activation map (the paper: "
        "not known).",
    )
    lr: PositiveFloat | None = Field(default=None, description="The head's learning rate; null: the optimizer's.")

    @property
    def head_lr(self) -> float | None:
        return self.lr

    def first_unit(self, num_units: int) -> int:
        """Index of the first unit that is pooled."""
        raise NotImplementedError

    def build(self, units: Sequence[Unit], num_classes: int) -> nn.Module:
        pooled = units[self.first_unit(len(units)) :]
        dims = [unit.channels if self.features == "activation" else unit.output_shape[0] for unit in pooled]
        return LinearSum(dims, num_classes)

    def keep(self, index: int, num_units: int, activation: Tensor, output: Tensor) -> Tensor | None:
        if index < self.first_unit(num_units):
            return None
        x = activation if self.features == "activation" else output
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x.flatten(2).mean(2) if x.ndim > 2 else x  # a backbone may pool globally itself

    def logits(self, head: Callable[..., Tensor], kept: list[Tensor], unit_logits: Sequence[Tensor]) -> Tensor:
        return head(*kept)
