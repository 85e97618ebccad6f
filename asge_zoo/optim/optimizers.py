"""Optimizers of the paper: AdamW for the small sets, SGD with momentum for ImageNet."""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat

from asge_zoo.registry import Component, register

ParamGroups = list[dict[str, Any]]


class Optimizer(Component):
    """Contract of an optimizer: builds one of torch's."""

    group: ClassVar[str] = "optimizer"

    @abstractmethod
    def build(self, groups: ParamGroups) -> torch.optim.Optimizer:
        """The optimizer over parameter groups; a group's own `lr` goes before `self.lr`."""


@register
class AdamW(Optimizer):
    """torch.optim.AdamW, its fused kernel."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(default=2e-4, description="Learning rate, at the start of the schedule.")
    weight_decay: NonNegativeFloat = Field(default=1e-3, description="Decoupled weight decay.")

    def build(self, groups: ParamGroups) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, weight_decay=self.weight_decay, fused=True)


@register
class SGD(Optimizer):
    """torch.optim.SGD with momentum, its fused kernel."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(default=0.05, description="Learning rate, at the start of the schedule.")
    momentum: NonNegativeFloat = Field(default=0.9, lt=1, description="Of past gradients.")
    weight_decay: NonNegativeFloat = Field(default=1e-4, description="L2 penalty, as torch's SGD has it.")

    def build(self, groups: ParamGroups) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)
