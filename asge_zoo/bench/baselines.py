"""What a user would pick in ASGE's place, as plain PyTorch: backpropagation, and a loop over layers.

The network is the spec's own modules; nothing of the rules' steps or of the training engine is used. Both end with the
optimizer's step and with no gradient kept.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from asge_zoo.compiler.check import Parts
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.rule import LayerLocalRule
from asge_zoo.graph.unit import INPUT
from asge_zoo.optim.optimizers import Optimizer


class Classifier(nn.Module):
    """A backbone, global average pooling where it does not pool itself, and a linear layer: images to logits (B, N)."""

    def __init__(self, backbone: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        return self.head(features.flatten(2).mean(2) if features.ndim > 2 else features)


def classifier(part: Parts, device: torch.device, layout: torch.memory_format) -> Classifier:
    """The spec's network with a head as in Table 3's control ("Last"), in training mode, its kernels in that layout."""
    info = part.data.info()
    backbone = part.backbone.build(info.channels, pooling=part.pooling, norm=part.norm)
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(2, info.channels, info.height, info.width))
    network = Classifier(backbone, features.shape[1], len(info.classes)).train()
    return convert_conv2d_weight_memory_format(network.to(device), layout)


def backprop_step(
    network: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, *, bf16: bool
) -> None:
    """Forward, backward and the optimizer's step of a network, compiled or not."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def loops_over(graph: LocalGraph) -> bool:
    """Whether a plain loop can train the graph's units: each by one loss of its own."""
    rule = graph.rule
    return isinstance(rule, LayerLocalRule) and not rule.candidate_labels and _has_default_steps(type(rule))


def _has_default_steps(rule: type[LayerLocalRule]) -> bool:
    return (rule.step, rule.unit_step) == (LayerLocalRule.step, LayerLocalRule.unit_step)


class LayerLoop:
    """What public layer-local code does: for each layer forward, local loss, `backward`, its own optimizer's `step`.

    Args:
        graph: whose units' modules, local classifiers and head are trained.
        optimizer: builds each unit's optimizer, and the head's.
    """

    def __init__(self, graph: LocalGraph, optimizer: Optimizer) -> None:
        assert isinstance(graph.rule, LayerLocalRule)
        self.graph, self.rule = graph, graph.rule
        named = dict(graph.named_parameters())
        owned = [[named[name] for name in unit.parameters] for unit in graph.units]
        self.optimizers = [optimizer.build([{"params": parameters}]) for parameters in owned]
        head = list(graph.head.parameters())
        self.head_optimizer = optimizer.build([{"params": head}]) if head else None

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train every layer on a batch, in order; each reads the one before it detached."""
        graph = self.graph
        env = {INPUT: images}
        kept, unit_logits = [], []
        for index, (unit, optimizer) in enumerate(zip(graph.units, self.optimizers, strict=True)):
            for step in unit.steps:
                env[step.name] = step(env, None)
                if step.name == unit.activation:
                    unit_logits.append(self._learn(index, env[step.name], labels, optimizer))
                    env[step.name] = env[step.name].detach()
            kept += [x.detach() for x in graph.keep(index, env)]
            env = {name: value.detach() for name, value in unit.leave(env).items()}
        if self.head_optimizer is not None:
            logits = graph.prediction.logits(graph.head, [x.float() for x in kept], unit_logits)
            _descend(F.cross_entropy(logits, labels), self.head_optimizer)

    def _learn(self, index: int, activation: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        with torch.autocast(activation.device.type, enabled=False):
            loss, logits = self.rule.unit_loss(self.graph.local[index], activation, labels)
        assert logits is not None
        _descend(loss, optimizer)
        return logits.detach()


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
