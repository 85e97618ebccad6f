"""Whether a spec's parts fit together, as far as can be told without building anything."""

from typing import cast

from asge_zoo.backbones.base import Backbone
from asge_zoo.data.base import Dataset
from asge_zoo.errors import SpecError
from asge_zoo.graph.local_graph import Prediction, Rule
from asge_zoo.spec import Spec


def parts(spec: Spec) -> tuple[Dataset, Backbone, Rule, Prediction]:
    """The spec's larger components under their contracts' types, which their slots have checked."""
    return (
        cast(Dataset, spec.data),
        cast(Backbone, spec.backbone),
        cast(Rule, spec.rule),
        cast(Prediction, spec.prediction),
    )


def check_spec(spec: Spec) -> None:
    """Refuse a spec whose parts do not fit together.

    Raises:
        SpecError: names the field, and what to do.
    """
    dataset, backbone, rule, prediction = parts(spec)
    dataset.check()
    info, smallest = dataset.info(), backbone.min_size()
    if min(info.height, info.width) < smallest:
        raise SpecError(
            f"backbone.kind: {backbone.kind} needs images of at least {smallest} pixels a side for its pools, and "
            f"{dataset.kind} gives {info.height}×{info.width}; set data.size"
        )
    if prediction.uses_unit_logits and not rule.layer_local:
        raise SpecError(
            f"prediction.kind: '{prediction.kind}' reads the units' own logits, which rule '{rule.kind}' has not; "
            f"choose last or fusion"
        )
