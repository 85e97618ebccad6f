"""Learning-rate schedules, stepped after every training step."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat

from asge_zoo.registry import Component, register


class Schedule(Component):
    """Contract of a schedule: builds one of torch's."""

    group: ClassVar[str] = "schedule"
    extendable: ClassVar[bool] = False  # whether a step's rate is the same for any `total_steps`: a run may then go on

    @abstractmethod
    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """The scheduler over `total_steps` training steps."""


@register
class Cosine(Schedule):
    """torch's cosine annealing from the optimizer's learning rate to `final_lr`."""

    kind: Literal["cosine"] = "cosine"
    final_lr: NonNegativeFloat = Field(default=1e-5, description="Learning rate at the last step.")

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=self.final_lr)


@register
class Constant(Schedule):
    """The optimizer's learning rate throughout; the only one whose runs may be resumed for more epochs."""

    kind: Literal["constant"] = "constant"
    extendable: ClassVar[bool] = True

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
