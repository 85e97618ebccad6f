"""Whether a backbone's units compute what the backbone computes."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from asge_zoo.compiler.cut import Pieces
from asge_zoo.compiler.nodes import PREFIX
from asge_zoo.errors import SpecError
from asge_zoo.graph.unit import INPUT

TOLERANCE = 1e-6  # of the largest value
SEED = 0
Mode = Literal["evaluation", "training"]
MODES: tuple[Mode, ...] = ("evaluation", "training")


@torch.no_grad()
def check_units(
    whole: nn.Module,
    backbone: nn.Module,
    pieces: Pieces,
    image_shape: tuple[int, int, int],
    modes: Sequence[Mode] = MODES,
) -> None:
    """Refuse units that give another answer than the whole backbone, or other running statistics, in any of the modes.

    Tracing misses what a forward pass decides by a flag of its own, such as `F.dropout(x, training=self.training)`, and
    what it changes in place.

    Args:
        whole: the backbone as it was before it was traced; its running statistics are changed.
        backbone: what was cut, on the CPU; left as it was.
        pieces: its units.
        image_shape: (C, H, W) of an image.
        modes: in which both run on two images.

    Raises:
        SpecError: names the mode and what differs.
    """
    was_training = backbone.training
    with torch.random.fork_rng(devices=[]):
        images = torch.randn(2, *image_shape)  # another number than while tracing
        for mode in modes:
            values = {name: x.clone() for name, x in (*backbone.named_parameters(), *backbone.named_buffers())}
            whole.train(mode == "training")
            backbone.train(mode == "training")
            try:
                torch.manual_seed(SEED)
                expected = {"answer": whole(images.clone()), **dict(whole.named_buffers())}
                torch.manual_seed(SEED)
                found = {"answer": _answer(pieces, images, values), **values}
            except Exception as error:  # whatever a forward pass raises
                reason = " ".join(str(error).split()) or type(error).__name__
                raise SpecError(f"backbone: does not run in {mode} mode on 2 images ({reason})") from error
            finally:
                backbone.train(was_training)
            wrong = [name for name, value in expected.items() if not _same(found[name], value)]
            if wrong:
                raise SpecError(
                    f"backbone: cut into units it gives another {wrong[0]} in {mode} mode than whole; let its forward "
                    f"pass depend on modules and shapes alone, with dropout as nn.Dropout and nothing changed in place"
                )


def _answer(pieces: Pieces, images: Tensor, values: dict[str, Tensor]) -> Tensor:
    """What the units give together, by `values`, among which running statistics are updated."""
    env, tensors = {INPUT: images}, {f"{PREFIX}{name}": value for name, value in values.items()}
    for unit in pieces.units:
        env = unit.run(env, tensors)
    return env[pieces.answer]


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not other.is_floating_point():
        return torch.equal(one, other)
    scale = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
