"""Fusion: a linear classifier on the pooled features of every unit but the first."""

from typing import Literal

from asge_zoo.predict.pooled import PooledPrediction
from asge_zoo.registry import register


@register
class Fusion(PooledPrediction):
    """Global average pooling of every unit but the first, then one linear layer (Table 3, "Fusion")."""

    kind: Literal["fusion"] = "fusion"

    def first_unit(self, num_units: int) -> int:
        return min(1, num_units - 1)
