"""ASGE: adaptive spatial goodness encoding (equations 1 to 7)."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asge_zoo.graph.rule import LayerLocalRule
from asge_zoo.ops.goodness import Goodness, MapShape
from asge_zoo.ops.projection import Projection
from asge_zoo.registry import Slot, default_component, register


@register
class ASGE(LayerLocalRule):
    """Goodness, a fixed random projection to logits, and a local cross-entropy (equation 6)."""

    kind: Literal["asge"] = "asge"
    goodness: Annotated[Goodness, Slot("goodness", "spatial")] = default_component("goodness", "spatial")
    projection: Annotated[Projection, Slot("projection", "gaussian")] = default_component("projection", "gaussian")

    def goodness_layout(self, shape: MapShape, num_classes: int) -> tuple[int, int]:
        return self.goodness.partition(shape), self.goodness.dim(shape)

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> nn.Module:
        goodness = self.goodness.build(shape)
        projection = self.projection.build(self.goodness.dim(shape), num_classes, generator)
        return nn.Sequential(OrderedDict(goodness=goodness, projection=projection))

    def unit_loss(
        self, classify: Callable[[Tensor], Tensor], activation: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = classify(activation)
        return F.cross_entropy(logits, labels), logits
