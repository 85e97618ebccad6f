"""What poolings, norms, goodnesses and projections promise."""

from functools import partial

import torch
from torch import Tensor

from asge_zoo.conformance.common import Check, Subject, equal, expect, size
from asge_zoo.conformance.graphs import learning
from asge_zoo.conformance.modules import Example, Examples, lasting, tracing
from asge_zoo.ops.goodness import MapShape
from asge_zoo.seeding import keyed_generator

POOLED = ((2, (2, 3, 8, 8)), (2, (3, 4, 7, 5)), (3, (2, 2, 10, 3)))  # kernel size; (B, C, H, W)
NORMED = ((2, 3, 8, 8), (3, 4, 7, 5), (2, 2, 1, 1))
READ = (MapShape(4, 8, 8, 8), MapShape(6, 7, 5, 12), MapShape(3, 6, 6, 24), MapShape(8, 1, 1, 8))
PROJECTED = ((12, 10), (5, 3), (1, 2))  # dim, N


def rectified(shape: tuple[int, ...]) -> Tensor:
    """A map as units have them: a rectifier's output, about half zeros, the first sample zeros alone."""
    x = torch.randn(shape, generator=keyed_generator(0, *shape)).relu()
    x[0] = 0
    return x


def poolings(subject: Subject) -> list[Example]:
    return [
        Example(f"kernel_size {k}, map {size(shape)}", lambda _, k=k: subject.make().build(k), rectified(shape))
        for k, shape in POOLED
    ]


def norms(subject: Subject) -> list[Example]:
    return [Example(f"map {size(shape)}", lambda _: subject.make().build(), rectified(shape)) for shape in NORMED]


def goodnesses(subject: Subject) -> list[Example]:
    return [
        Example(
            str(shape),
            lambda _, shape=shape: subject.make().build(shape),
            rectified((3, shape.channels, shape.height, shape.width)),
        )
        for shape in READ
    ]


def projections(subject: Subject) -> list[Example]:
    return [
        Example(
            f"dim {dim}, {classes} classes",
            lambda seed, dim=dim, classes=classes: subject.make().build(dim, classes, keyed_generator(seed)),
            rectified((3, dim)),
        )
        for dim, classes in PROJECTED
    ]


def pools_whole_windows(subject: Subject) -> None:
    for (k, (batch, channels, height, width)), example in zip(POOLED, poolings(subject), strict=True):
        _expect_shape(example, (batch, channels, height // k, width // k))


def keeps_shape(subject: Subject) -> None:
    for example in norms(subject):
        _expect_shape(example, tuple(example.x.shape))


def is_as_long_as_dim(subject: Subject) -> None:
    for shape, example in zip(READ, goodnesses(subject), strict=True):
        dim, partition = subject.make().dim(shape), subject.make().partition(shape)
        expect(isinstance(partition, int) and partition >= 1, f"{shape}: partition is {partition!r}")
        _expect_shape(example, (len(example.x), dim), f"; dim(shape) is {dim}")


def gives_logits(subject: Subject) -> None:
    for (_, classes), example in zip(PROJECTED, projections(subject), strict=True):
        _expect_shape(example, (len(example.x), classes))
        dtype = example.build(0)(example.x).dtype
        expect(dtype == torch.float32, f"{example.what}: float32 becomes {dtype}")


def keeps_dtype(examples: Examples, subject: Subject) -> None:
    for example, exact, half in _precisions(examples, subject):
        for given, found in ((torch.float32, exact), (torch.bfloat16, half)):
            expect(found.dtype == given, f"{example.what}: {given} becomes {found.dtype}")


def is_full_precision(examples: Examples, subject: Subject) -> None:
    for example, exact, half in _precisions(examples, subject):
        for given, found in ((torch.float32, exact), (torch.bfloat16, half)):
            wide = torch.promote_types(found.dtype, torch.float32) == found.dtype
            expect(wide, f"{example.what}: {given} becomes {found.dtype}")


def _precisions(examples: Examples, subject: Subject) -> list[tuple[Example, Tensor, Tensor]]:
    """Each example with its answers to float32 and to the same in bfloat16, which are about the same."""
    answers = []
    for example in examples(subject):
        module = example.build(0)
        with torch.no_grad():
            exact, half = module(example.x), module(example.x.bfloat16())
        near = torch.allclose(half.float(), exact.float(), rtol=0.1, atol=0.05 * float(exact.abs().max()))
        expect(near, f"{example.what}: the answer in bfloat16 is far from that in float32")
        answers.append((example, exact, half))
    return answers


def has_a_gradient(examples: Examples, subject: Subject) -> None:
    """For the input and every trainable parameter; finite, also where the map is zero."""
    for example in examples(subject):
        x = example.x.clone().requires_grad_()
        module = example.build(0)
        answer = module(x)
        answer.backward(torch.randn(answer.shape, generator=keyed_generator(0)))
        trained = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        for name, tensor in {"the input": x, **trained}.items():
            grad = tensor.grad
            expect(grad is not None, f"{example.what}: {name} gets no gradient")
            expect(grad is not None and bool(grad.isfinite().all()), f"{example.what}: {name} gets nan or inf")


def trains_nothing(examples: Examples, subject: Subject) -> None:
    for example in examples(subject):
        trained = [name for name, parameter in example.build(0).named_parameters() if parameter.requires_grad]
        expect(not trained, f"{example.what}: has trainable parameters ({', '.join(trained)})")


def draws_from_the_generator(subject: Subject) -> None:
    for dim, classes in PROJECTED:

        def drawn(seed: int, elsewhere: int, dim=dim, classes=classes) -> dict[str, Tensor]:
            torch.manual_seed(elsewhere)
            return subject.make().build(dim, classes, keyed_generator(seed)).state_dict()

        what, first = f"dim {dim}, {classes} classes", drawn(0, 0)
        expect(torch.equal(torch.get_rng_state(), _rng_state(0)), f"{what}: torch's own generator was drawn from")
        expect(equal(first, drawn(0, 1)), f"{what}: the same seed gives other tensors")
        expect(not equal(first, drawn(1, 0)), f"{what}: another seed gives the same tensors")


def _rng_state(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.get_rng_state()


def _expect_shape(example: Example, shape: tuple[int, ...], note: str = "") -> None:
    found = example.build(0)(example.x)
    expect(isinstance(found, Tensor), f"{example.what}: the answer is no tensor but {type(found).__name__}")
    expect(found.shape == shape, f"{example.what}: the answer is {size(found.shape)} and not {size(shape)}{note}")


DTYPE = "compute in torch.promote_types(x.dtype, torch.float32), and end forward(x) with .to(x.dtype)"
EXAMPLES = {"pooling": poolings, "norm": norms, "goodness": goodnesses, "projection": projections}
OWN = {
    "pooling": (
        Check(
            "pools whole windows",
            "build(k) must give a module from (B, C, H, W) to (B, C, H // k, W // k), what is left over cut off",
            pools_whole_windows,
        ),
        Check("keeps the dtype", DTYPE, partial(keeps_dtype, poolings)),
    ),
    "norm": (
        Check("keeps the shape", "build() must give a module from (B, C, H, W) to the same shape", keeps_shape),
        Check("keeps the dtype", DTYPE, partial(keeps_dtype, norms)),
        Check(
            "has nothing to train",
            "hold no nn.Parameter: no goodness behind a norm could train it (the option `affine` is the next unit's)",
            partial(trains_nothing, norms),
        ),
    ),
    "goodness": (
        Check(
            "is as long as dim(shape)",
            "build(shape) must give a module from (B, C, H, W) to (B, dim(shape))",
            is_as_long_as_dim,
        ),
        Check(
            "is at least float32",
            "widen the map first: x.to(torch.promote_types(x.dtype, torch.float32))",
            partial(is_full_precision, goodnesses),
        ),
    ),
    "projection": (
        Check("gives logits", "build(dim, N, generator) must give a module from (B, dim) to (B, N)", gives_logits),
        Check(
            "draws from the generator alone",
            "give `generator=generator` to every draw, and make no nn.Linear, which draws from torch's own",
            draws_from_the_generator,
        ),
        Check(
            "has nothing to train",
            "hold what is drawn by register_buffer, not as nn.Parameter",
            partial(trains_nothing, projections),
        ),
    ),
}
GRADIENT = "return no constants, and keep infinite slopes (a root's at 0) out of the backward pass by torch.where"


def checks(group: str) -> tuple[Check, ...]:
    """What components of one of these four groups promise."""
    examples = EXAMPLES[group]
    return (
        *OWN[group],
        Check("has a finite gradient", GRADIENT, partial(has_a_gradient, examples)),
        tracing(examples),
        *lasting(examples),
        *learning(group),
    )
