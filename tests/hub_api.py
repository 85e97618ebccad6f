"""The Hub's endpoints for models, as `huggingface_hub` 2.4 calls them."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatch
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from hub_store import Account, Commit, Refused, Repository, Store, check_card, entries, wants_lfs


@dataclass
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """An HTTP request, read to its end."""

    hub: Store
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes

    @property
    def account(self) -> Account | None:
        """Who asks; `None` is anyone."""
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        account = self.hub.accounts.get(authorization.removeprefix("Bearer "))
        if account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return account

    @property
    def proposal(self) -> bool:
        """Whether it is for a new pull request."""
        return "create_pr" in self.query

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    def readable(self, repo: str) -> Repository:
        """The repository, if it may be seen."""
        return self.hub.readable(repo, self.account)

    def changeable(self, repo: str) -> Repository:
        """The repository, if it may be written to."""
        return self.hub.changeable(repo, self.account, proposal=self.proposal)

    def page(self, items: list[Any]) -> Answer:
        """A page of a listing, with the address of the next."""
        start = int(self.query.get("cursor", ["0"])[0])
        answer = _json(items[start : start + self.hub.page])
        if start + self.hub.page < len(items):
            query = {**self.query, "cursor": [start + self.hub.page]}
            answer.headers["Link"] = f'<{self.hub.url}{self.path}?{urlencode(query, doseq=True)}>; rel="next"'
        return answer


Endpoint = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Endpoint]] = []


def _route(method: str, path: str) -> Callable[[Endpoint], Endpoint]:
    """Serve a path, in which `{name}` is an argument: a repository, the rest of a path, or a segment."""
    kinds = {"repo": "[^/]+/[^/]+?", "path": ".*", "oid": "[0-9a-f]{64}"}
    pattern = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{kinds.get(found[1], '[^/]+')})", path)

    def register(endpoint: Endpoint) -> Endpoint:
        _ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


def _json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(status: int, message: str, headers: Mapping[str, str]) -> Answer:
    answer = _json({"error": message}, status)
    line = message.replace("\n", " ").encode("ascii", "replace").decode()
    answer.headers |= {"X-Error-Message": line, **headers}
    return answer


def _content(content: bytes, wanted: str | None, headers: Mapping[str, str]) -> Answer:
    """A file's content, or the part of it that the request's Range header asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if found is None:
        return Answer(200, content, {**headers, "Accept-Ranges": "bytes"})
    start, end = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
    if start > end:
        return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


def answer(hub: Store, method: str, target: str, headers: Message, body: bytes) -> Answer:
    """Carry a request out, while no other one is."""
    parts = urlsplit(target)
    request = Request(hub, parts.path, parse_qs(parts.query, keep_blank_values=True), headers, body)
    for wanted, pattern, endpoint in _ROUTES:
        if wanted == method.replace("HEAD", "GET") and (found := pattern.fullmatch(parts.path)):
            arguments = {name: unquote(value or "") for name, value in found.groupdict().items()}
            try:
                with hub.lock:
                    return endpoint(request, **arguments)
            except Refused as refused:
                return refusal(refused.status, refused.message, refused.headers)
    return refusal(404, "Sorry, we can't find the page you are looking for.", {})


# Accounts and repositories.


@_route("GET", "/api/agent-harnesses")
def _harnesses(request: Request) -> Answer:
    return _json({"standardEnvVars": [], "harnesses": {}})


@_route("GET", "/api/whoami-v2")
def _whoami(request: Request) -> Answer:
    account = request.account
    if account is None:
        raise Refused(401, "Invalid username or password.")
    token = {"displayName": "token", "role": "write" if account.write else "read"}
    organizations = [{"type": "org", "name": name} for name in account.organizations]
    auth = {"type": "access_token", "accessToken": token}
    return _json({"type": "user", "name": account.name, "orgs": organizations, "auth": auth})


@_route("POST", "/api/repos/create")
def _create(request: Request) -> Answer:
    wanted = request.json()
    repo_id = request.hub.owned_name(request.account, wanted["name"], wanted.get("organization"))
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repositories:
        return _json({"error": "You already created this model repo", "url": url}, 409)
    request.hub.create(repo_id, private=wanted.get("visibility") == "private")
    return _json({"url": url, "name": repo_id})


@_route("DELETE", "/api/repos/delete")
def _delete(request: Request) -> Answer:
    wanted = request.json()
    repo_id = request.hub.owned_name(request.account, wanted["name"], wanted.get("organization"))
    if request.hub.repositories.pop(repo_id, None) is None:
        raise Refused(404, "Repository not found", "RepoNotFound")
    return _json({})


@_route("POST", "/api/validate-yaml")
def _validate(request: Request) -> Answer:
    _, errors, warnings = check_card(request.json()["content"])
    problems = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return _json(problems, 400 if errors else 200)


@_route("GET", "/api/models/{repo}(?:/revision/{revision})?")
def _info(request: Request, repo: str, revision: str) -> Answer:
    repository = request.readable(repo)
    commit = repository.resolve(revision or "main")
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(commit.tree.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if "blobs" in request.query:
            sibling |= {"size": file.size, "blobId": file.blob}
            if file.lfs:
                sibling["lfs"] = {"sha256": file.oid, "size": file.size, "pointerSize": len(file.pointer)}
        siblings.append(sibling)
    card = request.hub.card(commit.tree)
    info = {
        "id": repo,
        "author": repository.namespace,
        "sha": commit.id,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": repository.disabled,
        "tags": card.get("tags", []),
        "createdAt": repository.ancestry(commit)[-1].date,
        "lastModified": commit.date,
        "siblings": siblings,
        "cardData": card,
    }
    return _json(info | {key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card})


@_route("GET", "/api/models/{repo}/tree/{revision}(?:/{path})?")
def _tree(request: Request, repo: str, revision: str, path: str) -> Answer:
    commit = request.readable(repo).resolve(revision)
    found = entries(commit.tree, path, request.query.get("recursive") == ["true"])
    if path and not found:
        raise Refused(404, f"{path} does not exist", "EntryNotFound", X_Repo_Commit=commit.id)
    return request.page(found)


@_route("POST", "/api/models/{repo}/paths-info/{revision}")
def _paths_info(request: Request, repo: str, revision: str) -> Answer:
    tree = request.readable(repo).resolve(revision).tree
    paths = parse_qs(request.body.decode()).get("paths", [])
    return _json([entry for entry in entries(tree, "", recursive=True) if entry["path"] in paths])


# Refs and history.


@_route("GET", "/api/models/{repo}/refs")
def _refs(request: Request, repo: str) -> Answer:
    repository = request.readable(repo)
    refs = {"branches": repository.names("heads"), "tags": repository.names("tags"), "converts": []}
    return _json(refs | ({"pullRequests": repository.names("pr")} if "include_prs" in request.query else {}))


@_route("GET", "/api/models/{repo}/commits/{revision}")
def _commits(request: Request, repo: str, revision: str) -> Answer:
    repository = request.readable(repo)

    def told(commit: Commit) -> dict[str, Any]:
        written = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
        return {**written, "authors": [{"user": commit.author}]}

    return request.page([told(commit) for commit in repository.ancestry(repository.resolve(revision))])


@_route("POST", "/api/models/{repo}/branch/{name}")
def _branch(request: Request, repo: str, name: str) -> Answer:
    repository = request.changeable(repo)
    start = (request.json() if request.body else {}).get("startingPoint", "main")
    repository.add_ref("heads", name, repository.resolve(start).id)
    return Answer(201)


@_route("DELETE", "/api/models/{repo}/branch/{name}")
def _delete_branch(request: Request, repo: str, name: str) -> Answer:
    request.changeable(repo).remove_ref("heads", name)
    return Answer(200)


@_route("POST", "/api/models/{repo}/tag/{revision}")
def _tag(request: Request, repo: str, revision: str) -> Answer:
    repository = request.changeable(repo)
    repository.add_ref("tags", request.json()["tag"], repository.resolve(revision).id)
    return Answer(201)


@_route("DELETE", "/api/models/{repo}/tag/{name}")
def _delete_tag(request: Request, repo: str, name: str) -> Answer:
    request.changeable(repo).remove_ref("tags", name)
    return Answer(200)


# Uploads.


@_route("POST", "/api/models/{repo}/preupload/{revision}")
def _preupload(request: Request, repo: str, revision: str) -> Answer:
    hub, wanted = request.hub, request.json()
    tree = request.changeable(repo).resolve(revision).tree
    ignored = wanted.get("gitIgnore")
    if ignored is None and ".gitignore" in tree:
        ignored = hub.objects[tree[".gitignore"].oid].decode()
    patterns = [line for line in (ignored or "").splitlines() if line and not line.startswith("#")]
    told = []
    for file in wanted["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        names = (path, path.split("/")[-1])
        entry = {
            "path": path,
            "uploadMode": "lfs" if wants_lfs(path, file["size"], sample, hub.lfs_patterns(tree)) else "regular",
            "shouldIgnore": any(fnmatch(name, pattern) for name in names for pattern in patterns),
        }
        if path in tree:
            entry["oid"] = tree[path].oid
        told.append(entry)
    return _json({"files": told})


@_route("POST", "/{repo}\\.git/info/lfs/objects/batch")
def _batch(request: Request, repo: str) -> Answer:
    # A pull request's upload cannot be told from others here: the commit sorts out who may do what
    request.hub.changeable(repo, request.account, proposal=True)
    told = []
    for wanted in request.json()["objects"]:
        oid = wanted["oid"]
        entry: dict[str, Any] = {"oid": oid, "size": wanted["size"]}
        if oid not in request.hub.objects:
            upload = f"{request.hub.url}/storage/{oid}?signature={request.hub.signature(f'storage/{oid}')}"
            verify = f"{request.hub.url}/api/models/{repo}/lfs-verify"
            entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        told.append(entry)
    return _json({"transfer": "basic", "objects": told})


@_route("PUT", "/storage/{oid}")
def _store(request: Request, oid: str) -> Answer:
    _signed(request)
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(422, "The content does not have the announced hash")
    request.hub.store(request.body, lfs=True)
    return Answer(200)


@_route("POST", "/api/models/{repo}/lfs-verify")
def _verify(request: Request, repo: str) -> Answer:
    request.hub.changeable(repo, request.account, proposal=True)
    wanted = request.json()
    if len(request.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise Refused(404, "The object was not uploaded, or has another size")
    return Answer(200)


@_route("POST", "/api/models/{repo}/commit/{revision}")
def _commit(request: Request, repo: str, revision: str) -> Answer:
    hub, account, repository = request.hub, request.account, request.changeable(repo)
    assert account is not None
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    said = header["value"]
    expected = said.get("parentCommit")
    if request.proposal:
        parent = repository.resolve(expected or revision)
        number = sum(ref.startswith("refs/pr/") for ref in repository.refs) + 1
        ref = f"refs/pr/{number}"
    else:
        ref = repository.writable(revision)
        parent = repository.resolve(ref)
        number = 0
        if expected is not None and expected != parent.id:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
    tree = dict(parent.tree)
    for operation in operations:
        _apply(hub, tree, operation["key"], operation["value"])
    commit = repository.commit(ref, parent, tree, account.name, said["summary"], said.get("description", ""))
    told = {"success": True, "commitUrl": f"{hub.url}/{repo}/commit/{commit.id}", "commitOid": commit.id}
    return _json(told | ({"pullRequestUrl": f"{hub.url}/{repo}/discussions/{number}"} if number else {}))


def _apply(hub: Store, tree: dict[str, Any], key: str, value: dict[str, Any]) -> None:
    """Carry out an operation of a commit."""
    path = value["path"].rstrip("/")
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise Refused(400, f"Invalid path: {path}")
    if key == "file":
        tree[path] = hub.store(base64.b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        content = hub.objects.get(value["oid"])
        if content is None or len(content) != value.get("size", len(content)):
            raise Refused(400, f"The LFS object {value['oid']} was not uploaded")
        tree[path] = hub.store(content, lfs=True)
    else:
        gone = [name for name in tree if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))]
        if not gone:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del tree[name]


# Downloads.


@_route("GET", "/{repo}/resolve/{revision}/{path}")
def _resolve(request: Request, repo: str, revision: str, path: str) -> Answer:
    hub = request.hub
    commit = hub.readable(repo, request.account, contents=True).resolve(revision)
    file = commit.tree.get(path)
    if file is None:
        raise Refused(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.blob}"'}
    if not file.lfs:
        return _content(hub.content(file.oid), request.headers.get("Range"), headers)
    # The same server under another name: for the client an origin of its own, that the token must not be sent to
    cdn = hub.url.replace("127.0.0.1", "localhost")
    headers["Location"] = f"{cdn}/cdn/{file.oid}?signature={hub.signature(f'cdn/{file.oid}')}"
    return Answer(302, b"", headers | {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(file.size)})


@_route("GET", "/cdn/{oid}")
def _cdn(request: Request, oid: str) -> Answer:
    _signed(request)
    return _content(request.hub.content(oid), request.headers.get("Range"), {"ETag": f'"{oid}"'})


def _signed(request: Request) -> None:
    """Let in who brings a signed address, and no token besides."""
    if request.headers.get("Authorization") is not None:
        raise Refused(400, "Only one auth mechanism allowed")
    if request.query.get("signature") != [request.hub.signature(request.path.strip("/"))]:
        raise Refused(403, "The address is not signed")
