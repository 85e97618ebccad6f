"""What rules and predictions promise, seen in a tiny network; and that components of any group work in one."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asge_zoo.backbones.vgg import VGG
from asge_zoo.compiler.build import compile_spec
from asge_zoo.conformance.common import Check, Subject, close, equal, expect, size
from asge_zoo.conformance.modules import Example, lasting
from asge_zoo.graph.functional import own_code
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.rule import StepResult
from asge_zoo.ops.goodness import MapShape
from asge_zoo.registry import Component
from asge_zoo.seeding import keyed_generator
from asge_zoo.spec import load_spec

BATCH, CLASSES = 8, 10
WIDTH = CLASSES / 128  # channels that the classes divide, for rules that need that


class Short(VGG):
    """Three convolutions, for what takes long by unit."""

    layout = ((128, False), (256, True), (256, False))


def kit_graph(
    group: str, component: Component, *, seed: int = 0, precision: str = "float32", short: bool = False
) -> LocalGraph:
    """VGG8, or three units, of 10 to 40 channels on digits of 16×16 pixels, with the component in its place."""
    least: Any = getattr(component, "min_size", lambda: 1)
    served = "best" if getattr(component, "candidate_labels", False) else "last"
    places = {
        "rule": {"rule": component, "prediction": {"kind": served}},
        "goodness": {"rule": {"kind": "asge", "goodness": component}},
        "projection": {"rule": {"kind": "asge", "projection": component}},
    }
    values = {
        "name": "kit",
        "data": {"kind": "digits", "validation": 1000, "batch_size": BATCH, "size": max(16, least())},
        "backbone": Short(kind="short", width=WIDTH) if short else {"kind": "vgg8", "width": WIDTH},
        "train": {"compile": False, "precision": precision, "seed": seed},
        **places.get(group, {group: component}),
    }
    return compile_spec(load_spec(values))


def batch(graph: LocalGraph) -> tuple[Tensor, Tensor]:
    """Images (B, 1, H, W) for that network, always the same, and labels (B,)."""
    side = math.isqrt(graph.units[0].input_numel)
    return torch.randn(BATCH, 1, side, side, generator=keyed_generator(0)), torch.arange(BATCH) % CLASSES


def step(graph: LocalGraph, changed: dict[str, Tensor] | None = None, *, compiled: bool = False) -> StepResult:
    """A training step, with some of its parameters replaced."""
    parameters, state = graph.tensors()
    function: Any = graph.step_fn
    if compiled:
        torch.compiler.reset()  # so that no limit on recompilations is met
        function = torch.compile(own_code(function), fullgraph=True, backend="eager")
    torch.manual_seed(0)
    with torch.no_grad():
        return function({**parameters, **(changed or {})}, state, *batch(graph))


def learns(group: str, precision: str, subject: Subject) -> None:
    """Finite losses and logits in float32, and a gradient of every trainable parameter like it, in the network."""
    graph = kit_graph(group, subject.make(), precision=precision)
    result, units = step(graph), len(graph.units)
    expect((result.logits is None) == graph.rule.candidate_labels, "logits are for rules without candidate labels")
    answers = [] if result.logits is None else [("logits", result.logits)]
    for what, tensor in (("losses", result.losses), *answers, ("head_loss", result.head_loss)):
        expect(tensor.dtype == torch.float32, f"{what} are {tensor.dtype}")
        expect(bool(tensor.isfinite().all()), f"{what} are not finite")
    expect(result.losses.shape in ((units,), (1,)), f"losses have shape {tuple(result.losses.shape)}, units: {units}")
    expect(len(result.unit_logits) in (0, units), f"{len(result.unit_logits)} units have logits, of {units}")
    for what, logits in (*answers, *(("a unit's logits", each) for each in result.unit_logits)):
        expect(logits.shape == (BATCH, CLASSES), f"{what} are {size(logits.shape)} and not {BATCH}×{CLASSES}")
    parameters = graph.tensors()[0]
    for name in parameters.keys() ^ result.grads.keys():
        expect(name in result.grads, f"{name} is trainable and gets no gradient")
        expect(name in parameters, f"a gradient is given of {name}, which is not trainable")
    for name, parameter in parameters.items():
        grad = result.grads[name]
        expect(grad.shape == parameter.shape, f"the gradient of {name} is {size(grad.shape)}")
        expect(grad.dtype == parameter.dtype, f"the gradient of {name} is {grad.dtype}")
        expect(bool(grad.isfinite().all()), f"the gradient of {name} is not finite")


def learning(group: str) -> tuple[Check, ...]:
    """The promises that a tiny network with the component learns, in both precisions."""
    remedy = "see what it gives for a batch of 8 in `asge_zoo.conformance.graphs.kit_graph`"
    return tuple(
        Check(f"learns in a network, in {precision}", remedy, partial(learns, group, precision))
        for precision in ("float32", "bfloat16")
    )


def graph_traces(group: str, subject: Subject) -> None:
    graph = kit_graph(group, subject.make(), short=True)
    expect(_agree(step(graph), step(graph, compiled=True)), "compiled, the step gives other gradients")


def changes_nothing(group: str, subject: Subject) -> None:
    graph = kit_graph(group, subject.make())
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    first, second = step(graph), step(graph)
    after = graph.state_dict()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    expect(not changed, f"a step changed {', '.join(changed)}")
    expect(equal(first.grads, second.grads), "the second step on one batch gives other gradients than the first")


def stays_local(subject: Subject) -> None:
    """With later units' parameters changed, earlier units' gradients are bitwise the same."""
    graph = kit_graph("rule", subject.make())
    if not graph.rule.layer_local:
        return
    parameters, before = graph.tensors()[0], step(graph).grads
    later = [*graph.head_parameters]
    for unit in reversed(graph.units):
        after = step(graph, {name: 1.5 * parameters[name] + 0.1 for name in later}).grads
        for name in unit.parameters:
            expect(torch.equal(after[name], before[name]), f"the gradient of {name} changes with later parameters")
        later += unit.parameters


def draws_from_the_generator(subject: Subject) -> None:
    shape = MapShape(4, 8, 8, 8)

    def drawn(elsewhere: int) -> dict[str, Tensor]:
        torch.manual_seed(elsewhere)
        built: nn.Module | None = subject.make().build_unit(shape, CLASSES, keyed_generator(0))
        return built.state_dict() if built is not None else {}

    expect(equal(drawn(0), drawn(1)), "a unit's classifier depends on torch's own generator")


def lays_out_goodness(subject: Subject) -> None:
    layout = subject.make().goodness_layout(MapShape(4, 8, 8, 8), CLASSES)
    good = len(layout) == 2 and all(type(number) is int and number >= 0 for number in layout)
    expect(good, f"goodness_layout gives {layout!r}")


def forward_agrees(subject: Subject) -> None:
    """`forward`, which may stop early, gives what all units give, whatever is chosen."""
    graph = kit_graph("prediction", subject.make()).eval()
    images, units = batch(graph)[0], len(graph.units)
    for accuracy in _accuracies(graph):
        graph.prediction.select(graph.head, accuracy)
        last = graph.prediction.last_unit(graph.head, units)
        expect(0 <= last < units, f"last_unit is {last}, of {units} units")
        forward, whole = graph(images), graph.all_logits(images)[0]
        expect(forward.shape == (BATCH, CLASSES), f"logits are {size(forward.shape)} and not {BATCH}×{CLASSES}")
        expect(close(forward, whole), f"forward() and all_logits()[0] differ, with last_unit {last}")


def choice_settles(subject: Subject) -> None:
    graph = kit_graph("prediction", subject.make())
    for accuracy in _accuracies(graph):
        graph.prediction.select(graph.head, accuracy)
        expect(graph.prediction.select(graph.head, accuracy) is False, "select() says so again of the same accuracies")


def trains_the_head_alone(subject: Subject) -> None:
    """The head's gradients are those of its own loss, and no unit's gradient depends on the head."""
    graph = kit_graph("prediction", subject.make())
    images, labels = batch(graph)
    heads = {name: tensor for name, tensor in graph.tensors()[0].items() if name in graph.head_parameters}
    before = step(graph)
    after = step(graph, {name: 1.5 * tensor + 0.1 for name, tensor in heads.items()})
    for unit in graph.units:
        for name in unit.parameters:
            expect(torch.equal(before.grads[name], after.grads[name]), f"the gradient of {name} changes with the head")
    if not heads:
        return
    loss = F.cross_entropy(graph.all_logits(images)[0], labels)
    for name, grad in zip(heads, torch.autograd.grad(loss, list(heads.values())), strict=True):
        expect(close(before.grads[name], grad), f"the gradient of {name} is not that of the cross-entropy of logits()")


def gives_a_head_lr(subject: Subject) -> None:
    lr = subject.make().head_lr
    expect(lr is None or (isinstance(lr, float) and lr > 0), f"head_lr is {lr!r}")


def _accuracies(graph: LocalGraph) -> list[list[float]]:
    """By the prediction's alternatives, in percent: rising, falling, and best in the middle."""
    count = len(graph.prediction.alternatives(graph.head, graph.unit_logits(batch(graph)[0])))
    rising = [50.0 + index for index in range(count)]
    return [rising, rising[::-1], [90.0 if index == count // 2 else 50.0 for index in range(count)]]


def _agree(one: StepResult, other: StepResult) -> bool:
    pairs = [(grad, other.grads[name]) for name, grad in one.grads.items()]
    if one.logits is not None and other.logits is not None:
        pairs.append((one.logits, other.logits))
    return all(close(a, b) for a, b in [*pairs, (one.losses, other.losses)])


def _answer(graph: nn.Module, images: Tensor) -> Tensor:
    """Every logit that the graph gives an image, (B, …)."""
    assert isinstance(graph, LocalGraph)
    logits, unit_logits = graph.all_logits(images)
    return torch.cat([graph(images), logits, *unit_logits], dim=1)


def _chosen(group: str, component: Component, seed: int) -> LocalGraph:
    """A graph whose prediction has chosen an early unit, if it is the seed's first."""
    graph = kit_graph(group, component, seed=seed)
    if seed == 0:
        graph.prediction.select(graph.head, _accuracies(graph)[1])
    return graph


def _examples(group: str, subject: Subject) -> list[Example]:
    component = subject.make()
    images = batch(kit_graph(group, component))[0]
    return [Example("a tiny network", lambda seed: _chosen(group, component, seed), images, _answer)]


PURE = "write step() and what it calls as functions of their arguments, that leave modules and tensors as they are"
OWN = {
    "rule": (
        Check(
            "is as local as it declares",
            "let a unit's loss depend on its own parameters and constants, or declare layer_local = False",
            stays_local,
        ),
        Check(
            "draws from the generator alone",
            "give `generator=generator` to every draw of build_unit, and make no nn.Linear without skip_init",
            draws_from_the_generator,
        ),
        Check("lays out its goodness", "give (partition, goodness_dim), or (0, 0) without one", lays_out_goodness),
    ),
    "prediction": (
        Check(
            "answers as with all units run",
            "let logits() use no unit behind last_unit(), and give (B, N)",
            forward_agrees,
        ),
        Check("settles its choice", "let select() return True only where the choice changed", choice_settles),
        Check(
            "trains its head by its own loss alone",
            "let keep() give a function of its arguments, and logits() one of head, kept and unit_logits",
            trains_the_head_alone,
        ),
        Check("gives its head's learning rate", "let head_lr be a positive float or None", gives_a_head_lr),
    ),
}


def checks(group: str) -> tuple[Check, ...]:
    """What rules or predictions promise."""
    return (
        *learning(group),
        *OWN[group],
        Check("changes nothing in a step", PURE, partial(changes_nothing, group)),
        Check(
            "traces as one graph",
            "leave out what torch.compile(fullgraph=True) can't trace: .item(), prints, branches on data",
            partial(graph_traces, group),
        ),
        *lasting(partial(_examples, group)),
    )
