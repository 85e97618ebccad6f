"""Checkpoints: a folder of safetensors and JSON, with a manifest of sha256 sums written last.

    model.safetensors       weights, heads, projections; each tensor's sha256 in the metadata
    optimizer.safetensors   the optimizer's tensors, as `<parameter>|<name>`
    state.json              how far the run is, optimizer and schedule settings
    spec.json               the resolved spec of this single run
    manifest.json           sha256 of each file above

Order and augmentation are functions of (seed, epoch, step), so no random state needs saving.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from asge_zoo.compiler.build import compile_spec
from asge_zoo.engine.files import json_bytes, sha256_file, write_folder
from asge_zoo.errors import CheckpointError, SpecError
from asge_zoo.graph.local_graph import LocalGraph
from asge_zoo.spec import Spec, load_spec

MODEL, OPTIMIZER, STATE, SPEC, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "spec.json",
    "manifest.json",
)
CHECKPOINTS, BEST, LAST = "checkpoints", "best", "last"  # where a run directory keeps them; links to two of them


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def pack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Tensors as safetensors bytes, with each one's sha256 in the metadata."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: tensor_sha256(tensor) for name, tensor in packed.items()}
    return safetensors.torch.save(packed, {**metadata, "sha256": json.dumps(sums, sort_keys=True)})


def save_checkpoint(
    folder: Path,
    *,
    spec: Spec,
    graph: LocalGraph,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint folder, atomically.

    Args:
        folder: where; must not exist.
        spec: the resolved spec of this single run.
        graph, optimizer, scheduler: what to save the state of.
        progress: JSON values that say how far the run is.
    """
    described = optimizer.state_dict()
    names = [name for group in described["param_groups"] for name in group["param_names"]]
    moments = {
        f"{names[index]}|{key}": value for index, entry in described["state"].items() for key, value in entry.items()
    }
    metadata = {"format": "pt", "spec_sha256": spec.digest()}
    files = {
        MODEL: pack(graph.state_dict(), metadata),
        OPTIMIZER: pack(moments, metadata),
        STATE: json_bytes(
            {"progress": progress, "optimizer": described["param_groups"], "schedule": scheduler.state_dict()}
        ),
        SPEC: json_bytes(spec.resolved()),
    }
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    write_folder(folder, {**files, MANIFEST: json_bytes({"spec_sha256": spec.digest(), "sha256": sums})})


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or a run directory's best.

    Raises:
        CheckpointError: it is neither.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if (path / BEST / MANIFEST).is_file():
        return path / BEST
    seeds = sorted(child.name for child in path.glob("seed-*"))
    if seeds:
        raise CheckpointError(f"{path}: holds several runs; name one of {', '.join(seeds)}, such as {path / seeds[0]}")
    what = "no such file or folder" if not path.exists() else "neither a checkpoint nor a run directory"
    raise CheckpointError(f"{path}: {what}; give a run directory, or a checkpoint folder with a {MANIFEST}")


def all_checkpoints(path: str | Path) -> list[Path]:
    """Every checkpoint folder that a path holds: itself, or all of a run directory's, of every seed.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return [path]
    found = {
        folder.resolve()
        for kept in (path / CHECKPOINTS, *path.glob(f"seed-*/{CHECKPOINTS}"))
        if kept.is_dir()
        for folder in (*kept.iterdir(), kept.parent / BEST, kept.parent / LAST)
        if not folder.name.startswith(".") and (folder.is_symlink() or folder.exists())
    }
    return sorted(found) or [find_checkpoint(path)]


def check_files(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files against its manifest, one line each."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wanted = {str(name): str(value) for name, value in manifest["sha256"].items()}
        spec_sha256 = manifest["spec_sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST}: can't be read ({type(error).__name__})"]
    problems = [f"{folder / MANIFEST}: does not list {name}" for name in (MODEL, SPEC) if name not in wanted]
    for name, wanted_sum in wanted.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            problems.append(f"{file}: is missing")
            continue
        try:
            if sha256_file(file) != wanted_sum:
                problems.append(f"{file}: its sha256 is not the manifest's")
        except OSError as error:
            problems.append(f"{file}: can't be read ({error.strerror})")
    return problems or _check_tensors(folder / MODEL, spec_sha256)


def _check_tensors(file: Path, spec_sha256: str) -> list[str]:
    try:
        with safetensors.safe_open(file, framework="pt") as archive:
            if archive.metadata()["spec_sha256"] != spec_sha256:
                return [f"{file}: belongs to another spec than its manifest's"]
            sums = json.loads(archive.metadata()["sha256"])
            names = list(archive.keys())
            wrong = [name for name in names if tensor_sha256(archive.get_tensor(name)) != sums.get(name)]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        return [f"{file}: can't be read as safetensors ({type(error).__name__})"]
    return [f"{file}: tensor {name} does not have the sha256 of its metadata" for name in wrong]


def load(path: str | Path, *, device: str | torch.device = "cpu") -> LocalGraph:
    """A trained LocalGraph, in evaluation mode, from a checkpoint or a run directory's best one.

    Raises:
        CheckpointError: there is no whole, undamaged checkpoint.
    """
    return load_checkpoint(find_checkpoint(path), device=device)[0]


def load_checkpoint(folder: Path, *, device: str | torch.device = "cpu") -> tuple[LocalGraph, Spec]:
    """A checkpoint's graph, in evaluation mode, and the spec it was trained by; its sums are checked first.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit its spec.
    """
    problems = check_files(folder)
    if problems:
        raise CheckpointError(f"{problems[0]}; take another checkpoint, or train again")
    try:
        spec = load_spec(folder / SPEC)
        graph = compile_spec(spec, device=device)
        graph.load_state_dict(safetensors.torch.load_file(folder / MODEL))
    except (SpecError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: does not fit its own spec ({' '.join(str(error).split())})") from error
    return graph.eval(), spec
