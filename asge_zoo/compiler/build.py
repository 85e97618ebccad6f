"""compile_spec: a spec becomes a LocalGraph."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from asge_zoo.compiler.agree import MODES, Mode, check_units
from asge_zoo.compiler.check import check_spec, parts
from asge_zoo.compiler.cut import cut
from asge_zoo.compiler.structure import templates
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.rule import LayerLocalRule
from asge_zoo.graph.unit import Unit
from asge_zoo.ops.goodness import MapShape
from asge_zoo.seeding import keyed_generator, keyed_seed
from asge_zoo.spec import Spec

# Up to so many units a layer-local step compiles as one graph, which runs fastest; more of them unit by unit, each
# structure once, so that compile time does not grow with depth.
UNITS_IN_ONE_GRAPH = 12


def compile_spec(spec: Spec, *, device: str | torch.device = "cpu", modes: Sequence[Mode] = MODES) -> LocalGraph:
    """Build the spec's network for its first seed, cut into units, its step compiled on first use.

    Initial weights and projections are drawn on the CPU from `spec.train.seed`, so that every device
    starts from the same.

    Args:
        spec: what to build.
        device: where to put it; `"meta"` builds shapes alone, and does not compare the units with the whole.
        modes: in which the units are compared with the whole: what only predicts needs evaluation alone.

    Raises:
        SpecError: the spec's parts do not fit together; names the field.
    """
    check_spec(spec)
    part = parts(spec)
    info, rule = part.data.info(), part.rule
    device = torch.device(device)
    seed, num_classes, image_shape = spec.train.seed, len(info.classes), (info.channels, info.height, info.width)
    built_on = device if device.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "weights"))
        with built_on:
            module = part.backbone.build(info.channels, pooling=part.pooling, norm=part.norm)
        whole = copy.deepcopy(module)
        pieces = cut(module, image_shape, part.backbone.cutting(module))
        if device.type != "meta":
            check_units(whole, module, pieces, image_shape, modes)
        last = pieces.units[-1].channels
        shapes = [MapShape(piece.channels, piece.height, piece.width, last_channels=last) for piece in pieces.units]
        rule.check(shapes, num_classes)
        units, local = [], []
        for index, (piece, shape) in enumerate(zip(pieces.units, shapes, strict=True)):
            partition, goodness_dim = rule.goodness_layout(shape, num_classes)
            classifier = rule.build_unit(shape, num_classes, keyed_generator(seed, "local", index))
            if classifier is not None:
                local.append(classifier)
                piece = _with_classifier(piece, index, classifier)
            units.append(replace(piece, partition=partition, goodness_dim=goodness_dim))
        torch.manual_seed(keyed_seed(seed, "head"))
        head = part.prediction.build(units, num_classes)
    kept = [
        part.prediction.keep(index, len(units), pieces.values[unit.activation], pieces.values[unit.output])
        for index, unit in enumerate(units)
    ]
    if rule.candidate_labels and (any(True for _ in head.parameters()) or any(each is not None for each in kept)):
        raise SpecError(
            f"prediction.kind: '{part.prediction.kind}' reads feature maps or has a head to train, and rule "
            f"'{rule.kind}', which runs the units once a candidate label, serves neither; choose best"
        )
    shares = isinstance(rule, LayerLocalRule) and type(rule).unit_step is LayerLocalRule.unit_step
    deep = shares and len(units) > UNITS_IN_ONE_GRAPH
    graph = LocalGraph(
        backbone=module,
        units=units,
        local=local,
        head=head,
        rule=rule,
        prediction=part.prediction,
        num_classes=num_classes,
        precision=spec.train.precision,
        compile=spec.train.compile,
        templates=templates(units, local, kept, pieces.values) if deep else (),
    )
    return graph.to(device)


def _with_classifier(unit: Unit, index: int, classifier: nn.Module) -> Unit:
    """The unit with its local classifier's tensors among its own."""
    prefix = f"local.{index}."
    trained = [name for name, tensor in classifier.named_parameters() if tensor.requires_grad]
    tensors = [name for name, _ in (*classifier.named_parameters(), *classifier.named_buffers())]
    return replace(
        unit,
        parameters=(*unit.parameters, *(prefix + name for name in tensors if name in trained)),
        constants=(*unit.constants, *(prefix + name for name in tensors if name not in trained)),
    )
