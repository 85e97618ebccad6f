"""Whether a backbone's units compute what the backbone computes."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from asge_zoo.compiler.cut import PREFIX
from asge_zoo.errors import SpecError
from asge_zoo.graph.unit import INPUT, Unit

TOLERANCE = 1e-6  # of the largest value
SEED = 0


@torch.no_grad()
def check_units(backbone: nn.Module, units: Sequence[Unit], image_shape: tuple[int, int, int]) -> None:
    """Refuse units that give another answer than the whole backbone, or other running statistics, in either mode.

    Tracing misses what a forward pass decides by a flag of its own, such as `F.dropout(x, training=self.training)`.
    Draws from torch's generator.

    Args:
        backbone: what was cut, on the CPU; left as it was.
        units: its units.
        image_shape: (C, H, W) of an image.

    Raises:
        SpecError: names the mode and what differs.
    """
    images = torch.randn(2, *image_shape)  # another number than while tracing
    for training in (False, True):
        whole, cut = (copy.deepcopy(backbone).train(training) for _ in range(2))
        torch.manual_seed(SEED)
        expected = {"answer": whole(images)} | dict(whole.named_buffers())
        values = {f"{PREFIX}{name}": x for name, x in (*cut.named_parameters(), *cut.named_buffers())}
        was_training = backbone.training
        backbone.train(training)
        try:
            torch.manual_seed(SEED)
            env = {INPUT: images}
            for unit in units:
                env = unit.run(env, values)
        finally:
            backbone.train(was_training)
        found = {"answer": env[units[-1].output]} | dict(cut.named_buffers())
        wrong = [name for name, value in expected.items() if not _same(found[name], value)]
        if wrong:
            mode = "training" if training else "evaluation"
            raise SpecError(
                f"backbone: cut into units it gives another {wrong[0]} in {mode} mode than whole; let its forward pass "
                f"depend on modules and shapes alone, with dropout as nn.Dropout"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
