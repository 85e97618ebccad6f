"""Last: a linear classifier on the last unit's pooled features."""

from typing import Literal

from asge_zoo.predict.pooled import PooledPrediction
from asge_zoo.registry import register


@register
class Last(PooledPrediction):
    """Global average pooling of the last unit, then one linear layer (Table 3, "Last")."""

    kind: Literal["last"] = "last"

    def first_unit(self, num_units: int) -> int:
        return num_units - 1
