"""From a finished run to the files of a published model, measured as they will be pulled."""

import hashlib
import json
import tempfile
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from asge_zoo.compiler.check import parts
from asge_zoo.compiler.plan import plan
from asge_zoo.data.base import data_root as find_root
from asge_zoo.engine.checkpoint import MANIFEST, MODEL, pack
from asge_zoo.engine.device import pick_device
from asge_zoo.engine.loading import find_checkpoint, load_checkpoint
from asge_zoo.engine.result import RunResult
from asge_zoo.engine.run_dir import CURVES, ENVIRONMENT, RESULT, UNITS
from asge_zoo.errors import CheckpointError, DataError
from asge_zoo.evaluate import Evaluation, evaluate
from asge_zoo.files import WriteError, json_bytes, make_folder, write_folder
from asge_zoo.hub.card import render
from asge_zoo.hub.published import CARD, CONFIG, METRICS, Config, load_published
from asge_zoo.spec import describe

TOLERANCE = 0.1  # percent points between the run's test accuracy and that of the bytes to publish


def prepare(
    run_dir: str | Path,
    repo_id: str,
    *,
    evaluated: bool = True,
    licence: str = "apache-2.0",
    device: str | None = None,
    data_root: str | Path | None = None,
) -> dict[str, bytes]:
    """The files of the model that a run's best checkpoint makes; equal runs give equal bytes.

    Units that the prediction never runs are left out.

    Args:
        run_dir: of a finished run, of one seed.
        repo_id: where it goes to, which the card says.
        evaluated: whether the bytes are measured on the test images; the card says if they are not.
        licence: of the weights, as the Hub abbreviates it.
        device, data_root: for the measurement, as in `train`.

    Raises:
        CheckpointError: the run is not finished or is damaged, or the bytes do not come to the run's accuracy.
        DataError: the test images are missing, or not as many as there should be.
    """
    run_dir = Path(run_dir)
    folder = find_checkpoint(run_dir)
    if folder == run_dir:
        raise CheckpointError(f"{run_dir}: is a checkpoint; name the run directory that it lies in")
    result = _read_result(run_dir)
    graph, spec = load_checkpoint(folder)
    trained_units, planned = len(graph.units), plan(spec)
    graph.truncate(graph.prediction.last_unit(graph.head, trained_units) + 1)
    data = parts(spec).data
    config = Config(
        spec=spec.resolved(),
        spec_sha256=spec.digest(),
        classes=list(data.info().classes),
        preprocessing=data.preprocessing(),
        units=len(graph.units),
        versions=_versions(run_dir),
    )
    files = {
        MODEL: pack(graph.state_dict(), {"format": "pt", "spec_sha256": config.spec_sha256}),
        CONFIG: json_bytes(config.model_dump(mode="json")),
    }
    test = None
    if evaluated:
        test = _measured(files, config, device, data_root)
        if abs(test.accuracy - result.test_accuracy) > TOLERANCE:
            raise CheckpointError(
                f"{run_dir}: its best checkpoint comes to {test.accuracy:.2f} % of {test.count} test images, and "
                f"{RESULT} says {result.test_accuracy:.2f} %; see whether the images are those it was trained on, or "
                f"train again"
            )
    metrics = {
        "test": test
        and {key: getattr(test, key) for key in ("count", "accuracy", "top5", "loss", "unit_accuracy", "mean_depth")},
        "units": [unit.name for unit in graph.units],
        "trained_units": trained_units,
        "parameters": sum(parameter.numel() for parameter in graph.parameters()),
        "run": {"test_accuracy": result.test_accuracy, "val_accuracy": result.val_accuracy, "epochs": result.epochs},
        "memory": {"batch_size": planned["batch_size"], **planned["memory"]},
    }
    pictures = {name: (run_dir / name).read_bytes() for name in (CURVES, UNITS) if (run_dir / name).is_file()}
    files |= {
        METRICS: json_bytes(metrics),
        CARD: render(repo_id, config, spec, metrics, licence=licence, pictures=pictures),
        **pictures,
    }
    return {**files, MANIFEST: _manifest(files, config)}


def export_model(run_dir: str | Path, folder: Path, *, device: str | None, data_root: str | Path | None) -> None:
    """Write what `push` would publish to a folder, atomically; its card goes by the folder's name.

    Args:
        run_dir: of a finished run, of one seed.
        folder: must not exist.
        device, data_root: for the measurement, as in `train`.

    Raises:
        CheckpointError, DataError: see `prepare`; or the folder is there, or can't be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; give another folder")
    files = prepare(run_dir, folder.resolve().name, device=device, data_root=data_root)
    try:
        make_folder(folder.parent)
        write_folder(folder, files)
    except WriteError as error:
        raise CheckpointError(f"{error.filename}: can't be written ({error.strerror}); {error.remedy}") from error


def _manifest(files: dict[str, bytes], config: Config) -> bytes:
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return json_bytes({"spec_sha256": config.spec_sha256, "sha256": sums})


def _measured(files: dict[str, bytes], config: Config, device: str | None, data_root: str | Path | None) -> Evaluation:
    """The test images, by a graph that was loaded from these bytes as whoever pulls them loads them."""
    chosen = pick_device(device)
    with tempfile.TemporaryDirectory(prefix="asge-zoo-") as folder:
        write_folder(Path(folder) / "model", {**files, MANIFEST: _manifest(files, config)})
        model = load_published(Path(folder) / "model", device=chosen)
    data = parts(model.spec).data
    loader = data.loader(find_root(data_root), seed=model.spec.train.seed, device=chosen)
    found = evaluate(model.graph, loader.split_batches("test"))
    expected = data.info().test_count
    if expected is not None and found.count != expected:
        raise DataError(f"{data.kind}: has {expected} test images, and {found.count} were read; fetch it again")
    return found


def _read_result(run_dir: Path) -> RunResult:
    file = run_dir / RESULT
    try:
        return TypeAdapter(RunResult).validate_json(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{run_dir}: is not finished, so it has no {RESULT}; go on with `asge-zoo train --resume`"
        ) from None
    except ValidationError as error:
        raise CheckpointError(
            f"{file}: {describe(error)}; remove it and go on with `asge-zoo train --resume`"
        ) from None


def _versions(run_dir: Path) -> dict[str, str | None]:
    """Of the packages that the run was begun with; empty where that is not known."""
    try:
        packages = json.loads((run_dir / ENVIRONMENT).read_bytes())["packages"]
        return {str(name): None if value is None else str(value) for name, value in packages.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
