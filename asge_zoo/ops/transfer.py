"""What a unit does to its activation map before the next unit sees it."""

from torch import Tensor, nn


class Transfer(nn.Module):
    """Pooling, dropout and normalisation, in this order, behind a unit's goodness (section 6 of the method).

    The compiler reads goodness from what enters a `Transfer`: a backbone marks the spot by using one.
    (B, C, H, W) to (B, C, H', W'), dtype kept.
    """

    def __init__(self, *, pooling: nn.Module | None, dropout: float, norm: nn.Module) -> None:
        super().__init__()
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if self.pooling is not None:
            x = self.pooling(x)
        if self.dropout is not None:
            x = self.dropout(x)
        return self.norm(x)
