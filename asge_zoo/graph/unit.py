"""Units: the smallest parts of a backbone that learn alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

Values = Mapping[str, Tensor]
INPUT = "input"  # the images, among the values that units read


@dataclass(frozen=True)
class Ref:
    """Stands for a named value among a step's arguments."""

    name: str


def resolve(argument: Any, env: Values) -> Any:
    """An argument with every `Ref` in it replaced by its value."""
    if isinstance(argument, Ref):
        return env[argument.name]
    if isinstance(argument, (tuple, list)):
        return type(argument)([resolve(item, env) for item in argument])
    if isinstance(argument, dict):
        return {key: resolve(item, env) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(resolve(item, env) for item in (argument.start, argument.stop, argument.step)))
    return argument


@dataclass(frozen=True)
class Attribute:
    """A tensor that the backbone uses outside any module that is a step, such as a parameter of its own."""

    owner: nn.Module
    name: str


@dataclass(frozen=True)
class Step:
    """One operation of the traced backbone.

    Attributes:
        name: the value that the step defines.
        call: a module, a function of values, the name of a method of the first argument, or a tensor to fetch.
        args, kwargs: its arguments, values among them as `Ref`.
        tensors: of a module, its parameters and buffers: own name to the graph's name; of a tensor, its one name.
    """

    name: str
    call: nn.Module | Attribute | Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[tuple[str, str], ...] = ()

    def __call__(self, env: Values, values: Values | None) -> Any:
        if isinstance(self.call, Attribute):
            return getattr(self.call.owner, self.call.name) if values is None else values[self.tensors[0][1]]
        args, kwargs = resolve(self.args, env), resolve(self.kwargs, env)
        if isinstance(self.call, str):
            return getattr(args[0], self.call)(*args[1:], **kwargs)
        if values is None or not isinstance(self.call, nn.Module):
            return self.call(*args, **kwargs)
        return functional_call(self.call, {own: values[name] for own, name in self.tensors}, args, kwargs)


@dataclass(frozen=True)
class Unit:
    """A part of the backbone that learns alone: one convolution and everything up to the next, or a whole block.

    Attributes:
        name: its first convolution's name in the backbone, or its block's.
        channels, height, width: of its activation map, before pooling.
        partition: patches per side of its goodness; 0 for a rule without goodness.
        goodness_dim: length of its goodness vector; 0 for a rule without goodness.
        parameters: names of its trainable tensors, as in `LocalGraph.named_parameters()`.
        constants: names of all other tensors that its steps and its local classifier use.
        buffers: names of the backbone's buffers, among `constants`, that it may update (running statistics).
        macs: multiply-accumulates of one image's forward pass.
        output_shape: (C, H, W) of what leaves it, after pooling; (C,) where it pools globally.
        input_numel: numbers per image that enter it.
        steps: its operations, in order.
        activation, output: the values that goodness reads and that leave it last.
        reads: the earlier values that its steps read.
        makes: its own values that later units read.
        keeps: all values, its own and earlier ones, that later units still read.
    """

    name: str
    channels: int
    height: int
    width: int
    partition: int
    goodness_dim: int
    parameters: tuple[str, ...]
    constants: tuple[str, ...]
    buffers: tuple[str, ...]
    macs: int
    output_shape: tuple[int, ...]
    input_numel: int
    steps: tuple[Step, ...]
    activation: str
    output: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    keeps: tuple[str, ...]

    def run(self, env: Values, values: Values | None = None) -> dict[str, Tensor]:
        """All values after this unit.

        Args:
            env: the values that earlier units left, each (B, …).
            values: parameters and buffers by name to use in place of the modules' own.
        """
        env = dict(env)
        for step in self.steps:
            env[step.name] = step(env, values)
        return env

    def leave(self, env: Values) -> dict[str, Tensor]:
        """Of all values after this unit, those that later units read."""
        return {name: env[name] for name in self.keeps}
