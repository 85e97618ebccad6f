"""Models by whatever names them: a run, a checkpoint, a published folder, one of the package's own, the Hub."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asge_zoo.compiler.check import parts
from asge_zoo.engine.checkpoint import MODEL
from asge_zoo.engine.loading import find_checkpoint, load_checkpoint
from asge_zoo.errors import CheckpointError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.hub.published import CONFIG, METRICS, Model, hub_folder, is_published, load_published

INDEX = "index.json"


def load(path_or_repo_id: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu") -> LocalGraph:
    """A trained LocalGraph, in evaluation mode.

    Args:
        path_or_repo_id: a run directory (its best checkpoint), a checkpoint, a published folder, the name of a model
            that comes with the package, or `user/name` on the Hub.
        revision: on the Hub: a branch, a tag or a commit hash.
        device: where to put it.

    Raises:
        CheckpointError: there is no whole, undamaged checkpoint.
        HubError: it is to come from the Hub, and the network or the Hub failed.
    """
    return load_model(path_or_repo_id, revision=revision, device=device).graph


def load_model(
    path_or_repo_id: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    warn: Callable[[str], None] | None = None,
) -> Model:
    """As `load`, with all that it takes to use the graph; `warn` as for `pull`."""
    folder = _found(str(path_or_repo_id), revision, warn)
    if is_published(folder):
        return load_published(folder, device=device)
    graph, spec = load_checkpoint(find_checkpoint(folder), device=device)
    data = parts(spec).data
    return Model(graph, spec, list(data.info().classes), data.preprocessing())


def _found(name: str, revision: str | None, warn: Callable[[str], None] | None) -> Path:
    """The folder of what is named; pulled, if it is on the Hub."""
    path = Path(name)
    shipped = hub_folder() / name
    local = path.exists() or (path.name == name and is_published(shipped))
    if local and revision is not None:
        raise CheckpointError(f"--revision {revision}: {name} is a folder here, which has none; leave it out")
    if local:
        return path if path.exists() else shipped
    user, slash, _ = name.partition("/")
    if not slash or not user or name.count("/") > 1 or Path(user).is_dir():
        raise CheckpointError(
            f"{name}: no such file or folder, nor a model that comes with the package; name a run directory, a "
            f"checkpoint, a folder that was pulled, one of `asge-zoo ls models`, or user/name on the Hub"
        )
    from asge_zoo.hub.pull import pull  # the Hub's client takes its time to load

    return pull(name, revision=revision, warn=warn or (lambda message: None)).path


def known_models() -> list[dict[str, Any]]:
    """The models that come with the package, by its index, and those in the Hub's cache; see `described`."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        cached = frozenset()
    snapshots = [
        (repo.repo_id, revision.commit_hash, revision.snapshot_path)
        for repo in sorted(cached, key=lambda repo: repo.repo_id)
        for revision in sorted(repo.revisions, key=lambda revision: revision.last_modified)
    ]
    rows = (described(name, commit, folder) for name, commit, folder in snapshots)
    return [*json.loads((hub_folder() / INDEX).read_text(encoding="utf-8")), *(row for row in rows if row)]


def described(name: str, revision: str | None, folder: Path) -> dict[str, Any] | None:
    """A published model in short, by its files alone, so that no plugin is needed; None if it is none of ours.

    Returns:
        `model` and `revision`, as given; `spec` (its name), `spec_sha256` and `dataset`; `accuracy` in percent, on the
        test images, or None; `units`, and `bytes` of the weights.
    """
    if not all((folder / file).is_file() for file in (CONFIG, METRICS)):  # a pipe would keep its reader waiting
        return None
    try:
        config, metrics = (json.loads((folder / file).read_bytes()) for file in (CONFIG, METRICS))
        if config["library_name"] != "asge-zoo" or not str(config["spec"]["name"]).isprintable():
            return None
        return {
            "model": name,
            "revision": revision,
            "spec": str(config["spec"]["name"]),
            "spec_sha256": str(config["spec_sha256"]),
            "dataset": str(config["spec"]["data"]["kind"]),
            "accuracy": metrics["test"] and float(metrics["test"]["accuracy"]),
            "units": int(config["units"]),
            "bytes": (folder / MODEL).stat().st_size,
        }
    except (OSError, ValueError, OverflowError, KeyError, TypeError, RecursionError):
        return None
