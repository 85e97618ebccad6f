"""Whether a spec's parts fit together, as far as can be told without building anything."""

from typing import NamedTuple, cast

from asge_zoo.backbones.base import Backbone
from asge_zoo.data.base import Dataset
from asge_zoo.errors import SpecError
from asge_zoo.graph.prediction import Prediction
from asge_zoo.graph.rule import Rule
from asge_zoo.ops.norm import Norm
from asge_zoo.ops.pooling import Pooling
from asge_zoo.optim.optimizers import Optimizer
from asge_zoo.optim.schedules import Schedule
from asge_zoo.spec import Spec


class Parts(NamedTuple):
    """A spec's components under their contracts' types."""

    data: Dataset
    backbone: Backbone
    pooling: Pooling
    norm: Norm
    rule: Rule
    prediction: Prediction
    optimizer: Optimizer
    schedule: Schedule


def parts(spec: Spec) -> Parts:
    """The spec's components; their slots have checked that each is what its contract says."""
    return Parts(
        data=cast(Dataset, spec.data),
        backbone=cast(Backbone, spec.backbone),
        pooling=cast(Pooling, spec.pooling),
        norm=cast(Norm, spec.norm),
        rule=cast(Rule, spec.rule),
        prediction=cast(Prediction, spec.prediction),
        optimizer=cast(Optimizer, spec.optimizer),
        schedule=cast(Schedule, spec.schedule),
    )


def check_spec(spec: Spec) -> None:
    """Refuse a spec whose parts do not fit together.

    Raises:
        SpecError: names the field, and what to do.
    """
    data, backbone, pooling, norm, rule, prediction, _, _ = parts(spec)
    data.check()
    backbone.check(pooling, norm)
    info, smallest = data.info(), backbone.min_size()
    if min(info.height, info.width) < smallest:
        raise SpecError(
            f"backbone.kind: {backbone.kind} needs images of at least {smallest} pixels a side for its pools and "
            f"strides, and {data.kind} gives {info.height}×{info.width}; set data.size to {smallest} or more"
        )
    if (prediction.uses_unit_logits or prediction.exits_early) and not rule.layer_local:
        raise SpecError(
            f"prediction.kind: '{prediction.kind}' reads the units' own logits, which rule '{rule.kind}' has not; "
            f"choose last or fusion"
        )
    if rule.candidate_labels and not prediction.uses_unit_logits:
        raise SpecError(
            f"prediction.kind: '{prediction.kind}' does not read the units' own logits, and rule '{rule.kind}', whose "
            f"answers take a pass a candidate label, gives nothing else; choose best"
        )
    if prediction.exits_early and type(rule).infer is not Rule.infer:
        raise SpecError(
            f"prediction.kind: '{prediction.kind}' exits early, which rule '{rule.kind}' can't, for it runs the units "
            f"in its own way; choose best"
        )
