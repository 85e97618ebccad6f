"""The test Hub does to the real client what the real Hub does."""

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.pool
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import olah
import pytest
from hub_server import Hub, Record, client_environment, running

TOKENS = {"hf_owner": "owner", "hf_other": "other"}
CARD = b"---\nlicense: apache-2.0\ntags: [asge]\n---\n# A network\n"
WEIGHTS = bytes(range(256)) * 2000


class Failure(NamedTuple):
    """An error of the client's."""

    kind: str
    status: int | None
    text: str
    cause: str


def set_up_client(environment: dict[str, str]) -> None:
    """Begin a process: before the client is imported, which reads the environment then."""
    os.environ.clear()
    os.environ.update(environment)
    from huggingface_hub import constants

    # Smaller pieces: what a broken download has is counted in whole ones
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16


def call_client(token: str | bool | None, method: str, arguments: dict[str, Any]) -> Any:
    """Call a method of the client; what it returns, or its failure."""
    from huggingface_hub import HfApi

    try:
        told = getattr(HfApi(token=token), method)(**arguments)
        return list(told) if isinstance(told, Iterator) else told
    except Exception as error:
        response = getattr(error, "response", None)
        cause = type(error.__cause__).__name__
        return Failure(type(error).__name__, response and response.status_code, str(error), cause)


Client = Callable[..., Any]


def client_of(pool: multiprocessing.pool.Pool) -> Client:
    """Calls methods of `HfApi` in another process."""

    def call(method: str, *, token: str | bool | None = "hf_owner", **arguments: Any) -> Any:
        return pool.apply_async(call_client, (token, method, arguments)).get(60)

    return call


@contextlib.contextmanager
def another_process(url: str, home: Path) -> Iterator[Client]:
    """A process in which the client knows the Hub at `url`."""
    environment = client_environment(url, home)
    pool = multiprocessing.get_context("spawn").Pool(1, set_up_client, (environment,))
    try:
        yield client_of(pool)
    finally:
        pool.terminate()
        pool.join()


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[Hub]:
    hub = Hub()
    for token, name in TOKENS.items():
        hub.add_account(token, name)
    hub.add_account("hf_reader", "owner", write=False)
    with running(hub):
        yield hub


@pytest.fixture(scope="module")
def client(shared_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Calls a method of the client, which owns all repositories of "owner" unless another `token` is given."""
    with another_process(shared_hub.url, tmp_path_factory.mktemp("home")) as call:
        yield call


@pytest.fixture
def hub(shared_hub: Hub) -> Iterator[Hub]:
    """The Hub, with nothing on it, all well and nothing asked yet."""
    shared_hub.repositories.clear()
    shared_hub.objects.clear()
    shared_hub.faults.clear()
    shared_hub.log.clear()
    yield shared_hub
    shared_hub.page = 1000


@pytest.fixture
def repo(hub: Hub, request: pytest.FixtureRequest) -> str:
    """A repository of the test's own (the client keeps what it downloads), with a card and weights."""
    repo_id = f"owner/{request.node.name.split('[')[0]}"
    hub.put(repo_id, {"README.md": CARD, "model.safetensors": WEIGHTS})
    return repo_id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What is to be pushed: text, weights, a picture, an empty file, a file in a folder."""
    folder = tmp_path / "folder"
    (folder / "plots").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "model.safetensors").write_bytes(os.urandom(500_000))
    (folder / "plots" / "curve.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" + os.urandom(1000))
    (folder / "plots" / "curve.csv").write_text("epoch,accuracy\n1,0.5\n")
    (folder / "empty.txt").touch()
    return folder


def contents(folder: Path | str) -> dict[str, bytes]:
    """All files' contents, but for `.gitattributes` and what git or the client keep for themselves."""
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    own = (".gitattributes", ".git/", ".cache/")
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(own)}


def pushed(hub: Hub, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """A revision's files but for `.gitattributes`."""
    return {path: content for path, content in hub.files(repo_id, revision).items() if path != ".gitattributes"}


def asked(hub: Hub, method: str, path: str) -> list[Record]:
    """The requests with `path` in their path."""
    return [record for record in hub.log if record.method == method and path in record.path]


def send(url: str, method: str, body: bytes = b"", token: str | None = None) -> tuple[int, bytes]:
    """A request without the client: status and body of the answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, body or None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


# What goes well.


def test_what_is_pushed_is_pulled(hub: Hub, client: Client, folder: Path) -> None:
    assert client("whoami")["name"] == "owner"
    for _ in range(2):
        assert client("create_repo", repo_id="owner/round", exist_ok=True) == f"{hub.url}/owner/round"
    first = client("upload_folder", repo_id="owner/round", folder_path=folder)
    assert hub.commits("owner/round")[0] == first.oid and len(hub.commits("owner/round")) == 2
    assert pushed(hub, "owner/round") == contents(folder)
    assert contents(client("snapshot_download", repo_id="owner/round")) == contents(folder)

    again = client("upload_folder", repo_id="owner/round", folder_path=folder)
    assert again.oid == first.oid and len(hub.commits("owner/round")) == 2
    assert len(asked(hub, "PUT", "/storage/")) == 2
    assert len(asked(hub, "GET", "/cdn/")) == 2
    for record in hub.log:
        assert record.had_token == (not record.path.startswith(("/cdn/", "/storage/"))), record

    checked = client("verify_repo_checksums", repo_id="owner/round")
    assert checked.checked_count == 6 and not (checked.mismatches or checked.missing_paths or checked.extra_paths)


def test_what_the_hub_says_of_a_repository(hub: Hub, client: Client, repo: str) -> None:
    commit = hub.put(repo, {"plots/a.txt": b"a", "plots/b.txt": b"b"}, title="two plots")
    info = client("model_info", repo_id=repo, files_metadata=True)
    assert (info.id, info.sha, info.private, info.gated) == (repo, commit, False, False)
    assert info.card_data.license == "apache-2.0" and info.tags == ["asge"]
    files = {file.rfilename: file for file in info.siblings}
    assert files["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert files["README.md"].size == len(CARD) and files["README.md"].lfs is None

    hub.page = 2
    listed = [entry.path for entry in client("list_repo_tree", repo_id=repo, recursive=True)]
    assert listed == [".gitattributes", "README.md", "model.safetensors", "plots", "plots/a.txt", "plots/b.txt"]
    assert len(asked(hub, "GET", f"/api/models/{repo}/tree/")) == 3
    assert [entry.path for entry in client("list_repo_tree", repo_id=repo, path_in_repo="plots")] == listed[4:]
    known = client("get_paths_info", repo_id=repo, paths=["README.md", "plots", "nothing"])
    assert [entry.path for entry in known] == ["README.md", "plots"]
    commits = client("list_repo_commits", repo_id=repo)
    assert [commit.commit_id for commit in commits] == hub.commits(repo)
    assert [commit.title for commit in commits] == ["two plots", "put", "initial commit"]


def test_branches_tags_and_pull_requests(hub: Hub, client: Client, repo: str, folder: Path) -> None:
    first = hub.commits(repo)[0]
    client("create_branch", repo_id=repo, branch="try/one")
    assert client("create_branch", repo_id=repo, branch="try/one").status == 409
    assert client("create_branch", repo_id=repo, branch="no good").kind == "BadRequestError"
    client("create_tag", repo_id=repo, tag="v1", tag_message="the first")
    assert client("create_tag", repo_id=repo, tag="v1").status == 409
    assert client("create_tag", repo_id=repo, tag="v1", exist_ok=True) is None

    branch = client("upload_folder", repo_id=repo, folder_path=folder, revision="try/one").oid
    assert hub.commits(repo)[0] == first and hub.commits(repo, "try/one") == [branch, *hub.commits(repo)]
    assert contents(client("snapshot_download", repo_id=repo, revision="try/one")) == contents(folder)
    # A pull request takes no right to write to the repository
    request = client("upload_folder", token="hf_other", repo_id=repo, folder_path=folder, create_pr=True)
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")
    assert pushed(hub, repo, "refs/pr/1") == contents(folder) and pushed(hub, repo) != contents(folder)

    client("create_branch", repo_id=repo, branch="two", revision="v1")
    refs = client("list_repo_refs", repo_id=repo, include_pull_requests=True)
    assert {ref.ref: ref.target_commit for ref in (*refs.branches, *refs.tags, *refs.pull_requests)} == {
        "refs/heads/main": first,
        "refs/heads/try/one": branch,
        "refs/heads/two": first,
        "refs/tags/v1": first,
        "refs/pr/1": request.oid,
    }
    assert client("model_info", repo_id=repo, revision=branch[:7]).sha == branch
    client("delete_branch", repo_id=repo, branch="try/one")
    client("delete_tag", repo_id=repo, tag="v1")
    assert client("model_info", repo_id=repo, revision="v1").kind == "RevisionNotFoundError"
    assert client("delete_tag", repo_id=repo, tag="v1").kind == "RevisionNotFoundError"
    assert client("delete_branch", repo_id=repo, branch="main").status == 403

    client("delete_repo", repo_id=repo)
    assert repo not in hub.repositories
    assert client("delete_repo", repo_id=repo).kind == "RepositoryNotFoundError"


# What the Hub declines.


def test_tokens(hub: Hub, client: Client, repo: str, folder: Path) -> None:
    bad = client("whoami", token="hf_unknown")
    assert (bad.kind, bad.status) == ("HfHubHTTPError", 401)
    assert client("whoami", token=None).kind == "LocalTokenNotFoundError"
    assert client("create_repo", repo_id="owner/new", token="hf_unknown").status == 401
    assert client("create_repo", repo_id="owner/new", token="hf_reader").status == 403
    assert client("create_repo", repo_id="owner/new", token="hf_other").status == 403

    push = {"method": "upload_folder", "repo_id": repo, "folder_path": folder}
    bad = client(**push, token="hf_unknown")
    assert (bad.kind, bad.status) == ("HfHubHTTPError", 401) and "Invalid credentials" in bad.text
    for token in ("hf_reader", "hf_other"):
        refused = client(**push, token=token)
        assert (refused.kind, refused.status) == ("HfHubHTTPError", 403)
    assert client(**push, token=False).kind == "RepositoryNotFoundError"
    assert len(hub.commits(repo)) == 2 and not asked(hub, "POST", "/commit/")
    assert "Invalid credentials" in client("snapshot_download", repo_id=repo, token="hf_unknown").text
    assert contents(client("snapshot_download", repo_id=repo, token=False)) == pushed(hub, repo)


def test_private_gated_and_disabled(hub: Hub, client: Client, repo: str) -> None:
    hub.repositories[repo].private = True
    for token, status in ((False, 401), ("hf_other", 404)):
        for method in ("model_info", "snapshot_download"):
            refused = client(method, repo_id=repo, token=token)
            assert (refused.kind, refused.status) == ("RepositoryNotFoundError", status)
    assert client("model_info", repo_id=repo).private is True
    hub.repositories[repo].readers.add("other")
    assert contents(client("snapshot_download", repo_id=repo, token="hf_other")) == pushed(hub, repo)

    hub.put("owner/gated", {"model.safetensors": WEIGHTS})
    hub.repositories["owner/gated"].gated = True
    assert client("model_info", repo_id="owner/gated", token="hf_other").gated == "manual"
    for token, status in ((False, 401), ("hf_other", 403)):
        refused = client("snapshot_download", repo_id="owner/gated", token=token)
        assert (refused.kind, refused.status) == ("GatedRepoError", status)

    hub.put("owner/disabled", {"model.safetensors": WEIGHTS})
    hub.repositories["owner/disabled"].disabled = True
    assert client("model_info", repo_id="owner/disabled").kind == "DisabledRepoError"
    client("create_repo", repo_id="owner/secret", private=True)
    assert hub.repositories["owner/secret"].private


def test_what_is_not_there(hub: Hub, client: Client, repo: str, folder: Path) -> None:
    for method in ("model_info", "snapshot_download"):
        assert client(method, repo_id="owner/nothing").kind == "RepositoryNotFoundError"
        assert client(method, repo_id=repo, revision="nothing").kind == "RevisionNotFoundError"
    assert client("hf_hub_download", repo_id=repo, filename="nothing").kind == "RemoteEntryNotFoundError"
    assert client("list_repo_tree", repo_id=repo, path_in_repo="nothing").kind == "RemoteEntryNotFoundError"
    missing = client("upload_folder", repo_id="owner/nothing", folder_path=folder)
    assert (missing.kind, missing.status) == ("RepositoryNotFoundError", 404)
    missing = client("upload_folder", repo_id=repo, folder_path=folder, revision="nothing")
    assert missing.kind == "RevisionNotFoundError"
    assert client("delete_file", repo_id=repo, path_in_repo="nothing").kind == "RemoteEntryNotFoundError"


def test_a_stale_parent(hub: Hub, client: Client, repo: str, folder: Path) -> None:
    stale = hub.commits(repo)[0]
    hub.put(repo, {"notes.txt": b"meanwhile"})
    refused = client("upload_folder", repo_id=repo, folder_path=folder, parent_commit=stale)
    assert (refused.kind, refused.status) == ("HfHubHTTPError", 412)
    assert len(hub.commits(repo)) == 3 and "empty.txt" not in pushed(hub, repo)
    done = client("upload_folder", repo_id=repo, folder_path=folder, parent_commit=hub.commits(repo)[0])
    assert hub.commits(repo)[0] == done.oid


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ("tags: [a", "YAML"),
        ("just words", "mapping"),
        ("license: my-own", '"license" must be one of'),
        ("tags: asge", '"tags"'),
        ("model-index: {}", '"model-index" must be an array'),
        ("model-index: [{name: a}]", r'"model-index[0].results" is required'),
        ("model-index: [{name: a, results: [{metrics: [{type: accuracy}]}]}]", '.metrics[0].value" is required'),
    ],
)
def test_cards_that_are_refused(hub: Hub, client: Client, repo: str, metadata: str, said: str) -> None:
    card = f"---\n{metadata}\n---\n# Text\n".encode()
    refused = client("upload_file", repo_id=repo, path_in_repo="README.md", path_or_fileobj=card)
    assert refused.kind == "ValueError" and "Invalid metadata" in refused.text and said in refused.text
    assert len(hub.commits(repo)) == 2


def test_cards_that_are_taken(hub: Hub, client: Client, repo: str) -> None:
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"type": "digits", "name": "Digits"},
        "metrics": [{"type": "accuracy", "value": 0.97}],
    }
    card = f"---\nmodel-index: {json.dumps([{'name': 'vgg8', 'results': [result]}])}\n---\n# Text\n".encode()
    for content in (card, b"no metadata, which is warned of"):
        client("upload_file", repo_id=repo, path_in_repo="README.md", path_or_fileobj=content)
        assert pushed(hub, repo)["README.md"] == content


def test_uploads_and_downloads_need_their_signed_address(hub: Hub, repo: str) -> None:
    content = b"weights"
    oid = hashlib.sha256(content).hexdigest()
    wanted = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}).encode()
    _, told = send(f"{hub.url}/{repo}.git/info/lfs/objects/batch", "POST", wanted, "hf_owner")
    address = json.loads(told)["objects"][0]["actions"]["upload"]["href"]
    assert send(address, "PUT", b"other")[0] == 422
    assert send(address.split("?")[0], "PUT", content)[0] == 403
    assert send(address, "PUT", content, "hf_owner")[0] == 400
    assert oid not in hub.objects
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": len(content)}}
    commit = "\n".join(map(json.dumps, ({"key": "header", "value": {"summary": "a"}}, line))).encode()
    assert send(f"{hub.url}/api/models/{repo}/commit/main", "POST", commit, "hf_owner")[0] == 400
    assert send(address, "PUT", content)[0] == 200
    assert send(f"{hub.url}/api/models/{repo}/commit/main", "POST", commit, "hf_owner")[0] == 200
    assert pushed(hub, repo)["a.bin"] == content

    download = f"{hub.url}/cdn/{oid}?signature={hub.signature(f'cdn/{oid}')}"
    assert send(download, "GET") == (200, content)
    assert send(download, "GET", token="hf_owner")[0] == 400
    assert send(download.split("?")[0], "GET")[0] == 403


# What goes wrong on the way.


def test_a_storage_that_is_busy_twice(hub: Hub, client: Client, repo: str, folder: Path) -> None:
    weights = f"/storage/{hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()}"
    hub.fault(method="PUT", path=weights, status=503, times=2)
    client("upload_folder", repo_id=repo, folder_path=folder)
    assert [record.status for record in asked(hub, "PUT", weights)] == [503, 503, 200]
    assert pushed(hub, repo) == contents(folder)


def test_too_many_requests(hub: Hub, client: Client, repo: str) -> None:
    hub.fault(path="/commit/", status=429, headers={"Retry-After": "7"}, message="slow down")
    refused = client("upload_file", repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a")
    assert (refused.kind, refused.status) == ("HfHubHTTPError", 429) and "slow down" in refused.text
    hub.fault(path="/preupload/", status=429, headers={"Retry-After": "0"})
    client("upload_file", repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a")
    assert pushed(hub, repo)["a.txt"] == b"a"


def test_a_download_that_is_cut(hub: Hub, client: Client, repo: str) -> None:
    hub.fault(method="GET", path="/cdn/", cut=300_000)
    assert contents(client("snapshot_download", repo_id=repo)) == pushed(hub, repo)
    first, second = asked(hub, "GET", "/cdn/")
    assert (first.status, first.sent) == (200, 300_000)
    assert (second.status, second.range, second.sent) == (206, "bytes=262144-", len(WEIGHTS) - 262144)


def test_a_download_that_is_reset(hub: Hub, client: Client, repo: str) -> None:
    hub.fault(method="GET", path="/cdn/", cut=300_000, how="rst")
    assert client("hf_hub_download", repo_id=repo, filename="model.safetensors").kind == "ReadError"
    assert Path(client("hf_hub_download", repo_id=repo, filename="model.safetensors")).read_bytes() == WEIGHTS


def test_a_flipped_bit_is_seen_by_the_checksums(hub: Hub, client: Client, repo: str) -> None:
    fault = hub.fault(method="GET", path="/cdn/", flip=True)
    hub.fault(method="GET", path="/resolve/.*README", flip=True)
    pulled = contents(client("snapshot_download", repo_id=repo))
    assert fault.struck == 1
    assert len(pulled["model.safetensors"]) == len(WEIGHTS) and pulled["model.safetensors"] != WEIGHTS
    found = client("verify_repo_checksums", repo_id=repo)
    assert [mismatch["path"] for mismatch in found.mismatches] == ["README.md", "model.safetensors"]


def test_a_commit_whose_answer_is_lost(hub: Hub, client: Client, repo: str) -> None:
    hub.fault(path="/commit/", cut=0)
    lost = client("upload_file", repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a")
    assert lost.kind == "RemoteProtocolError"
    assert pushed(hub, repo)["a.txt"] == b"a" and len(hub.commits(repo)) == 3
    client("upload_file", repo_id=repo, path_in_repo="a.txt", path_or_fileobj=b"a")
    assert len(hub.commits(repo)) == 3


def test_an_upload_that_is_hung_up_on(hub: Hub, client: Client, repo: str, folder: Path) -> None:
    def hang_up() -> None:
        raise ConnectionResetError

    fault = hub.fault(method="PUT", path="/storage/", call=hang_up)
    client("upload_folder", repo_id=repo, folder_path=folder)
    assert fault.struck == 1 and pushed(hub, repo) == contents(folder)


def test_a_client_killed_on_the_way(hub: Hub, client: Client, repo: str, folder: Path, tmp_path: Path) -> None:
    program = "import sys, huggingface_hub as h; h.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
    line = [sys.executable, "-c", program, repo, str(folder)]
    environment = client_environment(hub.url, tmp_path / "home", "hf_owner")
    fault = hub.fault(method="PUT", path="/storage/", call=lambda: process.kill(), status=503)
    with subprocess.Popen(line, env=environment) as process:
        assert process.wait(60) == -9
    assert fault.struck == 1 and len(hub.commits(repo)) == 2
    client("upload_folder", repo_id=repo, folder_path=folder)
    assert pushed(hub, repo) == contents(folder)


@pytest.mark.parametrize("at", ["arrival", "answer", "cut"])
def test_the_hub_stops_though_requests_hang(at: Any) -> None:
    hub = Hub()
    hub.put("owner/a", {"a.txt": b"text"})
    fault = hub.fault(path="/resolve/", at=at, sleep=3600, cut=2)
    threads = threading.active_count()
    failed: list[Exception] = []

    def ask() -> None:
        try:
            send(f"{hub.url}/owner/a/resolve/main/a.txt", "GET")
        except Exception as error:
            failed.append(error)

    with running(hub):
        asking = threading.Thread(target=ask)
        asking.start()
        while fault.struck == 0 or hub.log[0].sent < (2 if at == "cut" else 0):
            time.sleep(0.01)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    asking.join(10)
    assert len(failed) == 1 and threading.active_count() == threads


def test_an_error_of_the_servers_own_is_raised() -> None:
    hub = Hub()
    hub.fault(path="/api/whoami-v2", call=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), running(hub), contextlib.suppress(OSError):
        send(f"{hub.url}/api/whoami-v2", "GET")


# Another server, that someone else wrote.


def test_the_client_pulls_the_same_from_olah(folder: Path, tmp_path: Path) -> None:
    with olah.serving(folder, "owner/network") as url, another_process(url, tmp_path / "home") as client:
        assert client("model_info", token=False, repo_id="owner/network", revision="main").id == "owner/network"
        assert contents(client("snapshot_download", token=False, repo_id="owner/network")) == contents(folder)
