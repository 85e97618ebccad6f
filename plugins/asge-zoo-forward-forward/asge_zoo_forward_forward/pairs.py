"""Rules that tell an image with its label from the same image with a wrong one: Forward-Forward and SymBa."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from asge_zoo.graph.functional import full_precision
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.rule import LayerLocalRule, StepResult
from asge_zoo.graph.unit import Values
from asge_zoo.ops.goodness import MapShape
from asge_zoo_forward_forward.labels import class_waves, other_labels


class MeanSquare(nn.Module):
    """Goodness G: the mean of the squared activations of each sample, (B, C, H, W) to (B,), at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean((1, 2, 3))


class LabelPairs(LayerLocalRule):
    """What both share: the label is a wave added to the image; a step sees each image with its own and a wrong one.

    A class's logit is the goodness of the image with that class's wave, so that an answer takes N passes. That a unit
    can't read the goodness before it off its input is the norm's part.
    """

    api_version: ClassVar[int] = 1
    candidate_labels: ClassVar[bool] = True

    label_strength: PositiveFloat = Field(
        default=1.0, description="Amplitude of the label's wave, in standard deviations of the images."
    )

    @abstractmethod
    def pair_loss(self, right: Tensor, wrong: Tensor) -> Tensor:
        """The loss () of goodness with the right labels and with wrong ones, both (B,), row by row of one image."""

    def goodness_layout(self, shape: MapShape, num_classes: int) -> tuple[int, int]:
        return 1, 1

    def build_unit(self, shape: MapShape, num_classes: int, generator: torch.Generator) -> nn.Module:
        return MeanSquare()

    def unit_loss(
        self, classify: Callable[[Tensor], Tensor], activation: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of an activation (2B, C, H, W): images with their labels, then with wrong ones."""
        right, wrong = classify(activation).chunk(2)
        return self.pair_loss(right, wrong), None

    def step(self, graph: LocalGraph, params: Values, state: Values, images: Tensor, labels: Tensor) -> StepResult:
        waves = self._waves(graph.num_classes, images)
        pairs = [images + waves[labels], images + waves[other_labels(labels, graph.num_classes)]]
        return super().step(graph, params, state, torch.cat(pairs), labels)

    def infer(self, graph: LocalGraph, images: Tensor, stop: int, *, local: bool) -> tuple[list[Tensor], list[Tensor]]:
        passes = [self._goodness(graph, images + wave, stop) for wave in self._waves(graph.num_classes, images)]
        return [], [torch.stack(unit, dim=1) for unit in zip(*passes, strict=True)]

    def _goodness(self, graph: LocalGraph, labelled: Tensor, stop: int) -> list[Tensor]:
        """Each unit's, (B,), up to index `stop`."""
        found = []
        for index, env in graph.walk(labelled, stop=stop):
            with full_precision(activation := env[graph.units[index].activation]):
                found.append(graph.local[index](activation))
        return found

    def _waves(self, num_classes: int, images: Tensor) -> Tensor:
        """What is added to images (B, C, H, W) for each class, (N, 1, H, W)."""
        waves = class_waves(num_classes, *images.shape[2:], device=images.device)
        return self.label_strength * waves[:, None].to(images)


class FF(LabelPairs):
    """Forward-Forward (Hinton, 2022): goodness above a threshold with the right label, below it with a wrong one.

    The loss is the binary cross-entropy of σ(k(G − θ)), over both halves of the batch. Hinton's goodness is a sum of
    squares and θ its length: with a mean, θ is the same for every width, and k stands for that length.
    """

    kind: Literal["ff.ff"] = "ff.ff"
    threshold: PositiveFloat = Field(default=0.5, description="θ, on the scale of a mean square.")
    steepness: PositiveFloat = Field(default=16.0, description="k, by which a mean square's distance from θ counts.")

    def pair_loss(self, right: Tensor, wrong: Tensor) -> Tensor:
        above, below = (self.steepness * (goodness - self.threshold) for goodness in (right, wrong))
        return (F.softplus(-above) + F.softplus(below)).mean() / 2


class SymBa(LabelPairs):
    """SymBa (Lee and Song, 2023): goodness higher with an image's right label than with a wrong one, by a softplus.

    The loss is the mean of log(1 + exp(−α(G⁺ − G⁻))); no threshold. The paper's class pattern is here the label's wave.
    """

    kind: Literal["ff.symba"] = "ff.symba"
    alpha: PositiveFloat = Field(default=4.0, description="α, the steepness.")

    def pair_loss(self, right: Tensor, wrong: Tensor) -> Tensor:
        return F.softplus(-self.alpha * (right - wrong)).mean()
