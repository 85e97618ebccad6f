"""What every module that a component builds promises, whatever its group."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from asge_zoo.conformance.common import Check, Subject, close, equal, expect
from asge_zoo.engine.checkpoint import pack


def call(module: nn.Module, x: Tensor) -> Tensor:
    """The module's answer."""
    return module(x)


@dataclass(frozen=True)
class Example:
    """A module to check, and an input of it.

    Attributes:
        what: for messages.
        build: makes the module, by seed.
        x: (B, …), B at least 2.
        answer: what is compared, (B, …).
    """

    what: str
    build: Callable[[int], nn.Module]
    x: Tensor
    answer: Callable[[nn.Module, Tensor], Tensor] = call


Examples = Callable[[Subject], list[Example]]


def traces(examples: Examples, subject: Subject) -> None:
    """One graph under torch.compile, with the answer that the module gives without it."""
    for example in examples(subject):
        eager = example.answer(_built(example), example.x)
        torch.compiler.reset()  # so that no limit on recompilations is met
        compiled: Any = torch.compile(_built(example), fullgraph=True, backend="eager")
        expect(close(example.answer(compiled, example.x), eager), f"{example.what}: compiled, the answer is another")


def is_deterministic(examples: Examples, subject: Subject) -> None:
    """By torch's seed in training mode, without any in evaluation mode."""
    for example in examples(subject):
        one, other = _built(example), _built(example)
        expect(equal(one.state_dict(), other.state_dict()), f"{example.what}: built twice from a seed, tensors differ")
        runs = [_used(example, module) for module in (one, other)]
        expect(torch.equal(*runs), f"{example.what}: answers differ in training mode, with torch's generator seeded")
        again = [example.answer(one.eval(), example.x) for _ in range(2)]
        expect(torch.equal(*again), f"{example.what}: the second answer differs in evaluation mode")


def can_be_saved(examples: Examples, subject: Subject) -> None:
    """A used module and a fresh one that was given its state dict, through safetensors, answer alike."""
    for example in examples(subject):
        used, fresh = _built(example), _built(example, seed=1)
        _used(example, used)
        fresh.load_state_dict(safetensors.torch.load(pack(used.state_dict(), {})))
        answers = [example.answer(module.eval(), example.x) for module in (used, fresh)]
        expect(torch.equal(*answers), f"{example.what}: saved, and loaded into a fresh module, it answers otherwise")


def samples_stand_alone(examples: Examples, subject: Subject) -> None:
    """In evaluation mode an answer does not depend on what else is in the batch."""
    for example in examples(subject):
        module = _built(example)
        _used(example, module)
        together = example.answer(module.eval(), example.x)
        alone = torch.cat([example.answer(module, sample) for sample in example.x.split(1)])
        expect(close(together, alone), f"{example.what}: alone in its batch a sample gets another answer")


def _built(example: Example, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return example.build(seed)


def _used(example: Example, module: nn.Module) -> Tensor:
    """Its second answer in training mode."""
    torch.manual_seed(0)
    module.train()
    example.answer(module, example.x)
    return example.answer(module, example.x.flip(0))


def tracing(examples: Examples) -> Check:
    """The promise that modules trace."""
    remedy = "leave out of forward() what torch.compile(fullgraph=True) can't trace: .item(), prints, branches on data"
    return Check("traces as one graph", remedy, partial(traces, examples))


def lasting(examples: Examples) -> tuple[Check, ...]:
    """The promises about randomness, state and batches."""
    return (
        Check(
            "is deterministic under a seed",
            "draw by torch's generator, or the one given, in training mode only",
            partial(is_deterministic, examples),
        ),
        Check(
            "keeps its state in its state dict",
            "hold tensors that change or are drawn as parameters or register_buffer'ed",
            partial(can_be_saved, examples),
        ),
        Check(
            "answers each sample by itself",
            "compute nothing across dimension 0 in evaluation mode",
            partial(samples_stand_alone, examples),
        ),
    )
