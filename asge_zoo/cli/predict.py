"""`asge-zoo predict`."""

import json
import warnings

import click

from asge_zoo.cli import options


@click.command("predict")
@click.argument("model")
@click.argument("pictures", metavar="PICTURE...", nargs=-1, required=True)
@options.revision
@click.option("--top-k", type=click.IntRange(min=1), default=1, show_default=True, help="How many classes to name.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures at once.")
@options.device
@options.as_json
def predict(
    model: str,
    pictures: tuple[str, ...],
    revision: str | None,
    top_k: int,
    batch_size: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Say what MODEL takes each PICTURE for: files, folders of them, or - for the names on stdin.

    MODEL is a run directory, a checkpoint, a pulled folder, one of `asge-zoo ls models`, or user/name on the Hub.
    """
    from asge_zoo.engine.device import pick_device
    from asge_zoo.hub.models import load_model
    from asge_zoo.inference import classify_files, find_pictures

    files = find_pictures(pictures)
    found = load_model(model, revision=revision, device=pick_device(device), warn=options.warn)
    warnings.simplefilter("ignore")  # Pillow's, of odd pictures
    rows = []
    for answer in classify_files(found.graph, files, found.preprocessing, top_k=top_k, batch_size=batch_size):
        top = [
            {"label": label, "class": found.classes[label], "probability": probability}
            for label, probability in zip(answer.labels, answer.probabilities, strict=True)
        ]
        if as_json:
            rows.append({"file": str(answer.file), **top[0], "exit_unit": answer.exit_unit})
            rows[-1] |= {"top": top} if top_k > 1 else {}
        else:
            guesses = ", ".join(f"{each['class']} ({100 * each['probability']:.1f} %)" for each in top)
            file = str(answer.file).encode(errors="replace").decode()  # a name may be of any bytes
            print(f"{file}: {guesses}; unit {answer.exit_unit} of {len(found.graph.units)}")
    if as_json:
        print(json.dumps(rows))
