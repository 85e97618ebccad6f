"""The model card: `hub/card.md`, filled in from `metrics.json` and `config.json` alone."""

import json
from collections.abc import Container
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from asge_zoo.compiler.check import parts
from asge_zoo.engine.run_dir import CURVES, UNITS
from asge_zoo.hub.published import Config, hub_folder
from asge_zoo.spec import Spec

TASK = "image-classification"


def render(
    repo_id: str, config: Config, spec: Spec, metrics: dict[str, Any], *, licence: str, pictures: Container[str]
) -> bytes:
    """`README.md`: metadata that the Hub's client has validated, and text.

    Args:
        repo_id: where it goes to.
        config: of the model.
        spec: the same as the config's.
        metrics: what `metrics.json` holds.
        licence: of the weights, as the Hub abbreviates it.
        pictures: the names of those that are beside it.

    Raises:
        ValueError: the metadata is not what the client allows.
    """
    part, test = parts(spec), metrics["test"]
    dataset = part.data.kind
    data = ModelCardData(
        library_name="asge-zoo",
        pipeline_tag=TASK,
        license=licence,
        tags=[TASK, "layer-local-learning" if part.rule.layer_local else "backpropagation", f"rule:{part.rule.kind}"],
        datasets=[part.data.hub_id or dataset],
        model_name=spec.name,
        eval_results=None
        if test is None
        else [
            EvalResult(
                task_type=TASK,
                dataset_type=part.data.hub_id or dataset,
                dataset_name=dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_name="test accuracy (%)",
                metric_value=test["accuracy"],
            )
        ],
    )
    preprocessing = config.preprocessing
    card = ModelCard.from_template(
        data,
        template_path=str(hub_folder() / "card.md"),
        title=spec.name,
        repo_id=repo_id,
        backbone=f"`{part.backbone.kind}`",
        dataset=f"`{dataset}`",
        rule=part.rule.kind,
        layer_local=part.rule.layer_local,
        prediction=part.prediction.kind,
        versions=config.versions,
        shape=("B", preprocessing.channels, preprocessing.height, preprocessing.width),
        plugins=sorted({f"`{each.distribution}` {each.version}" for each in spec.plugins if each.distribution}),
        test_by_unit=list(zip(metrics["units"], test["unit_accuracy"], strict=False)) if test else [],
        has_curves=CURVES in pictures,
        has_units=UNITS in pictures,
        spec=json.dumps(config.spec, indent=2),
        **metrics,
    )
    return str(card).encode()
