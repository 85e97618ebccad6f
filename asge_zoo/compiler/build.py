"""compile_spec: a spec becomes a LocalGraph."""

import torch
from torch import nn

from asge_zoo.compiler.check import check_spec, parts
from asge_zoo.compiler.cut import CutUnit, cut
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.graph.unit import Unit
from asge_zoo.ops.goodness import MapShape
from asge_zoo.seeding import keyed_generator, keyed_seed
from asge_zoo.spec import Spec


def compile_spec(spec: Spec, *, device: str | torch.device = "cpu") -> LocalGraph:
    """Build the spec's network for its first seed, cut into units, its step compiled on first use.

    Initial weights and projections are drawn on the CPU from `spec.train.seed`, so that every device
    starts from the same.

    Args:
        spec: what to build.
        device: where to put it; `"meta"` builds shapes alone.

    Raises:
        SpecError: the spec's parts do not fit together; names the field.
    """
    check_spec(spec)
    part = parts(spec)
    info, rule = part.data.info(), part.rule
    device = torch.device(device)
    seed = spec.train.seed
    built_on = device if device.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "weights"))
        with built_on:
            module = part.backbone.build(info.channels, pooling=part.pooling, norm=part.norm)
        pieces = cut(module, (info.channels, info.height, info.width))
        last_channels = pieces[-1].activation_shape[0]
        units, local = [], []
        for index, piece in enumerate(pieces):
            shape = MapShape(*piece.activation_shape, last_channels=last_channels)
            classifier = rule.build_unit(shape, len(info.classes), keyed_generator(seed, "local", index))
            if classifier is not None:
                local.append(classifier)
            units.append(_unit(index, piece, rule.goodness_layout(shape), classifier))
        torch.manual_seed(keyed_seed(seed, "head"))
        head = part.prediction.build(units, len(info.classes))
    graph = LocalGraph(
        backbone=module,
        units=units,
        local=local,
        head=head,
        rule=rule,
        prediction=part.prediction,
        num_classes=len(info.classes),
        precision=spec.train.precision,
        compile=spec.train.compile,
    )
    return graph.to(device)


def _unit(index: int, piece: CutUnit, layout: tuple[int, int], classifier: nn.Module | None) -> Unit:
    trained = [] if classifier is None else [f"local.{index}.{name}" for name, _ in classifier.named_parameters()]
    channels, height, width = piece.activation_shape
    return Unit(
        name=piece.name,
        channels=channels,
        height=height,
        width=width,
        partition=layout[0],
        goodness_dim=layout[1],
        parameters=(*piece.parameters, *trained),
        buffers=piece.buffers,
        macs=piece.macs,
        output_shape=piece.output_shape,
        input_numel=piece.input_numel,
        steps=piece.steps,
        activation=piece.activation,
        output=piece.output,
        keeps=piece.keeps,
    )
