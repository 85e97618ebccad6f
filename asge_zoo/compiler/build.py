"""compile_spec: a spec becomes a LocalGraph."""

from dataclasses import replace

import torch

from asge_zoo.compiler.check import check_spec, parts
from asge_zoo.compiler.cut import cut
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import LocalGraph
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
        last = pieces[-1].channels
        shapes = [MapShape(piece.channels, piece.height, piece.width, last_channels=last) for piece in pieces]
        rule.check(shapes, len(info.classes))
        units, local = [], []
        for index, (piece, shape) in enumerate(zip(pieces, shapes, strict=True)):
            partition, goodness_dim = rule.goodness_layout(shape)
            classifier = rule.build_unit(shape, len(info.classes), keyed_generator(seed, "local", index))
            parameters = piece.parameters
            if classifier is not None:
                local.append(classifier)
                parameters += tuple(f"local.{index}.{name}" for name, _ in classifier.named_parameters())
            units.append(replace(piece, partition=partition, goodness_dim=goodness_dim, parameters=parameters))
        torch.manual_seed(keyed_seed(seed, "head"))
        head = part.prediction.build(units, len(info.classes))
    if rule.candidate_labels and any(True for _ in head.parameters()):
        raise SpecError(
            f"prediction.kind: '{part.prediction.kind}' has a head to train, and rule '{rule.kind}' has no class "
            f"logits while it trains; choose best"
        )
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
