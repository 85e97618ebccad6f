"""What backbones promise."""

import copy

import torch

from asge_zoo.compiler.cut import cut
from asge_zoo.conformance.common import Check, Subject, close, expect, size
from asge_zoo.conformance.graphs import learning
from asge_zoo.conformance.modules import Example, lasting, tracing
from asge_zoo.graph.unit import INPUT
from asge_zoo.ops.norm import LayerNorm
from asge_zoo.ops.pooling import RMS
from asge_zoo.seeding import keyed_generator


def sizes(subject: Subject) -> list[tuple[int, int, int]]:
    """Images (C, H, W) that it must take: as small as it says, and larger."""
    least = subject.make().min_size()
    expect(type(least) is int and least >= 1, f"min_size() is {least!r}")
    return [(1, least, least), (3, least + 5, least + 2)]


def backbones(subject: Subject) -> list[Example]:
    return [
        Example(
            f"images {size(shape)}",
            lambda _, shape=shape: subject.make().build(shape[0], pooling=RMS(), norm=LayerNorm()),
            torch.randn(2, *shape, generator=keyed_generator(0)),
        )
        for shape in sizes(subject)
    ]


def cuts_into_units(subject: Subject) -> None:
    """Units, each with parameters, that compute what the whole computes."""
    for shape, example in zip(sizes(subject), backbones(subject), strict=True):
        whole = example.build(0).eval()
        units, answer, _ = cut(copy.deepcopy(whole), shape, subject.make().cutting(whole))
        values = {INPUT: example.x}
        with torch.no_grad():
            for unit in units:
                expect(bool(unit.parameters), f"{example.what}: unit '{unit.name}' has no parameters")
                values = unit.run(values)
            found, expected = values[answer], whole(example.x)
        is_features = found.ndim in (2, 4)
        expect(is_features, f"{example.what}: the answer is {size(found.shape)}, neither a map (B, C, H, W) nor (B, C)")
        expect(bool(found.isfinite().all()), f"{example.what}: the answer is not finite")
        expect(close(found, expected), f"{example.what}: the units give another answer than the whole")


CHECKS = (
    Check(
        "cuts into units from min_size() on",
        "build a module that torch.fx traces, with a convolution a unit, and let min_size() be what it really takes",
        cuts_into_units,
    ),
    tracing(backbones),
    *lasting(backbones),
    *learning("backbone"),
)
