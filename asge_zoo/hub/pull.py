"""pull: a published model from the Hub, checked against the Hub's sums and its own."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, errors, snapshot_download

from asge_zoo.engine.checkpoint import MANIFEST, MODEL
from asge_zoo.errors import CheckpointError, HubError
from asge_zoo.files import WriteError, json_bytes, make_folder, write_folder
from asge_zoo.hub.client import COMMIT, check_repo_id, hub
from asge_zoo.hub.published import (
    CONFIG,
    FILES,
    MAX_BYTES,
    check_loadable,
    check_published,
    foreign_files,
)

ORIGIN = "origin.json"  # in a folder of one's own: where it was pulled from


class Pulled(NamedTuple):
    """Where a pulled model lies, and the commit hash it is of."""

    path: Path
    revision: str


def _silence(message: str) -> None:
    """Nobody to tell."""


def pull(
    repo_id: str, *, revision: str | None = None, to: str | Path | None = None, warn: Callable[[str], None] = _silence
) -> Pulled:
    """Fetch a published model into the Hub's own cache, whose whole files are not fetched again, and check it.

    Where the Hub can't be reached, a whole copy in the cache has to do. Nothing in a model is ever run, and files that
    no model has are not fetched.

    Args:
        repo_id: `user/name`.
        revision: a branch, a tag or a commit hash; None for the main branch.
        to: a new or empty folder to copy it to, with `origin.json`, which says where from; it appears whole.
        warn: told what was mended, or that the copy in the cache had to do.

    Raises:
        HubError: the network or the Hub failed, or refuses.
        CheckpointError: it is no model of ours, damaged, foreign, or in need of a plugin that is not here; or `to` is
            taken or can't be written.
    """
    check_repo_id(repo_id)
    target = None if to is None else Path(to)
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already and is not empty; give another --to")
    folder = _fetched(repo_id, revision or constants.DEFAULT_REVISION, warn)
    commit = folder.name
    check_loadable(folder)
    if target is not None:
        _copy(folder, target, {"repo_id": repo_id, "revision": commit, "endpoint": constants.ENDPOINT})
        return Pulled(target, commit)
    return Pulled(folder, commit)


def _fetched(repo_id: str, revision: str, warn: Callable[[str], None]) -> Path:
    """The snapshot in the cache, as whole as the Hub's sums, or where it can't be reached our own, can tell."""
    try:
        with hub(repo_id, revision) as api:
            found = api.model_info(repo_id, revision=revision, files_metadata=True)
            commit = str(found.sha)
            _check_listing(repo_id, {each.rfilename: each.size or 0 for each in found.siblings or []})
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES)))
            if folder.name != commit:  # pushed to in the meantime
                folder = Path(snapshot_download(repo_id, revision=commit, allow_patterns=list(FILES)))
            if wrong := _wrong(api, repo_id, commit):
                damaged = folder / wrong[0]
                snapshot_download(repo_id, revision=commit, allow_patterns=wrong, force_download=True)
                if not (wrong := _wrong(api, repo_id, commit)):
                    warn(f"{damaged}: had not the Hub's checksum; it was fetched again")
    except HubError as error:
        if not error.unreachable:
            raise
        cached = _cached(repo_id, revision)
        if cached is None:
            raise HubError(f"{error} (and no whole copy is in the cache)") from None
        warn(f"{error}; the copy in the cache is taken, of commit {cached.name}")
        for problem in check_published(cached):
            warn(f"{problem}; fetch it again when the Hub can be reached")
        return cached
    if wrong:
        raise HubError(f"{repo_id}: {wrong[0]} comes with another checksum than the Hub gives for it; try again later")
    return folder


def _wrong(api: HfApi, repo_id: str, commit: str) -> list[str]:
    """The model's files in the cache that are missing or have not the Hub's checksum."""
    sums = api.verify_repo_checksums(repo_id, revision=commit)
    return sorted({each["path"] for each in sums.mismatches} | {path for path in sums.missing_paths if path in FILES})


def _cached(repo_id: str, revision: str) -> Path | None:
    """A whole snapshot in the cache; None if there is none. Asks nobody."""
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES), local_files_only=True))
    except (errors.LocalEntryNotFoundError, ValueError, OSError):
        return None
    # a cache with an empty reference answers with the folder around its snapshots
    return folder if COMMIT.match(folder.name) and all((folder / name).is_file() for name in (MODEL, CONFIG)) else None


def _check_listing(repo_id: str, sizes: dict[str, int]) -> None:
    """Refuse what can't be a model, by the names and sizes of its files, before any of them is fetched."""
    if foreign := foreign_files(list(sizes)):
        raise CheckpointError(
            f"{repo_id}: holds {foreign[0]}, which could be unpickled or run, so it is no model of asge-zoo's; name "
            f"another repository or revision"
        )
    if missing := [name for name in (CONFIG, MODEL, MANIFEST) if name not in sizes]:
        raise CheckpointError(f"{repo_id}: has no {missing[0]}, so it is no model of asge-zoo's; name another")
    if large := [name for name in FILES if name != MODEL and sizes.get(name, 0) > MAX_BYTES]:
        raise CheckpointError(f"{repo_id}: {large[0]} is larger than {MAX_BYTES:,} bytes, which no such file is")


def _copy(folder: Path, target: Path, origin: dict[str, str]) -> None:
    """The model's files, and where they are from, as a folder that appears at once."""
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    try:
        make_folder(target.parent)
        if target.is_dir():
            target.rmdir()
        write_folder(target, {**files, ORIGIN: json_bytes(origin)})
    except WriteError as error:
        raise CheckpointError(f"{error.filename}: can't be written ({error.strerror}); {error.remedy}") from error
