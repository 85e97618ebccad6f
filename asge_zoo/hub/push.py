"""push: what a run learned, to the Hub, as one commit."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from asge_zoo.errors import CheckpointError, HubError
from asge_zoo.files import write_folder
from asge_zoo.hub.client import COMMIT, check_repo_id, hub
from asge_zoo.hub.prepare import prepare
from asge_zoo.hub.published import FILES, foreign_files


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        repo_id: where to.
        revision: the commit's hash; None for a dry run.
        url: of the commit, or of the pull request; None for a dry run.
        files: name and content.
    """

    repo_id: str
    revision: str | None
    url: str | None
    files: dict[str, bytes]


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    evaluated: bool = True,
    dry_run: bool = False,
    licence: str = "apache-2.0",
    device: str | None = None,
    data_root: str | Path | None = None,
) -> Pushed:
    """Publish a run's best checkpoint: check it, measure the very bytes on the test images, and push one commit.

    What is there already is not pushed again: the same push twice makes one commit.

    Args:
        run_dir: of a finished run, of one seed.
        repo_id: `user/name`; created if it is not there.
        revision: the branch, created if it is not there; None for main.
        private: whether a new repository is.
        create_pr: propose it as a pull request to the branch.
        evaluated, licence, device, data_root: see `prepare`.
        dry_run: ask nobody, and push nothing.

    Raises:
        CheckpointError, DataError: see `prepare`; or the repository holds what no model has.
        HubError: the network or the Hub failed, or refuses.
    """
    check_repo_id(repo_id)
    if revision is not None and COMMIT.match(revision):
        raise CheckpointError(f"--revision {revision}: is a commit, which nothing can be added to; name a branch")
    options = {"evaluated": evaluated, "licence": licence, "device": device, "data_root": data_root}
    if dry_run:
        return Pushed(repo_id, None, None, prepare(run_dir, repo_id, **options))
    with hub(repo_id) as api:
        # before minutes of work that this login could not use
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(f"{repo_id}: this token may only read; take one with the right to write")
    files = prepare(run_dir, repo_id, **options)
    with tempfile.TemporaryDirectory(prefix="asge-zoo-") as parent, hub(repo_id, revision) as api:
        folder = Path(parent) / "model"
        write_folder(folder, files)
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        names = [each.rfilename for each in there.siblings or []]
        _check_repository(repo_id, private and not there.private, names)
        commit = api.create_commit(  # and not `upload_folder`, which may make several
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in FILES if name in names and name not in files),
            ],
            commit_message=f"{Path(run_dir).resolve().name}, by asge-zoo",
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,
        )
        sums = api.verify_repo_checksums(repo_id, revision=commit.pr_revision or commit.oid, local_dir=folder)
        if sums.mismatches or sums.extra_paths:
            raise HubError(f"{repo_id}: holds other bytes than were pushed, as commit {commit.oid}; push again")
    return Pushed(repo_id, commit.oid, commit.pr_url or commit.commit_url, files)


def _check_repository(repo_id: str, public: bool, names: list[str]) -> None:
    if public:
        raise CheckpointError(f"{repo_id}: exists and is public; make it private on its page, or leave out --private")
    if foreign := foreign_files(names):
        raise CheckpointError(
            f"{repo_id}: holds {foreign[0]}, which could be unpickled or run, so nobody could pull a model from "
            f"there; remove it, or name another repository"
        )
