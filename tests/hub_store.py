"""What a Hub keeps, in memory: accounts, and repositories of commits over files stored by their hash."""

import hashlib
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from typing import Any

import yaml

LFS_SUFFIXES = (
    "bin",
    "ckpt",
    "gz",
    "h5",
    "npy",
    "npz",
    "onnx",
    "pickle",
    "pkl",
    "pt",
    "pth",
    "safetensors",
    "tar",
    "zip",
)
ATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
LARGE = 10_000_000
LICENCES = (
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsl-1.0 cc cc-by-4.0 cc-by-nc-4.0 "
    "cc-by-nc-sa-4.0 cc-by-sa-4.0 cc0-1.0 creativeml-openrail-m eupl-1.1 gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 "
    "lgpl-3.0 mit mpl-2.0 ms-pl ncsa openrail osl-3.0 other postgresql unknown unlicense wtfpl zlib"
).split()
_UNFIT_REF = re.compile(r"^(-|/|refs/|HEAD$)|[\x00-\x20~^:?*\[\\\x7f]|\.\.|//|@\{|(/|\.|\.lock)$")


class Refused(Exception):
    """A request that the Hub declines; the client tells the reasons apart by status, code and message."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code is not None:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Account:
    """Whose token it is, whether the token may write, and where its owner may besides their own namespace."""

    name: str
    write: bool = True
    organizations: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """A file of a tree: `oid` is the sha256 of an LFS file's content, and git's hash of a regular one."""

    oid: str
    size: int
    lfs: bool

    @property
    def pointer(self) -> bytes:
        """What git stores in place of an LFS file's content."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {self.size}\n".encode()

    @property
    def blob(self) -> str:
        """Git's hash of what git stores."""
        return git_hash(self.pointer) if self.lfs else self.oid


Tree = Mapping[str, File]


@dataclass(frozen=True)
class Commit:
    """A state of all files, and how it came about."""

    id: str
    parent: str | None
    tree: Tree
    title: str
    message: str
    author: str
    date: str


@dataclass
class Repository:
    """A model repository; a test sets the flags, and names in `readers` whom a private or gated one is open to."""

    id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    readers: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    history: dict[str, Commit] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """The user or organization that it belongs to."""
        return self.id.split("/")[0]

    def names(self, kind: str) -> list[dict[str, str]]:
        """The refs below `refs/<kind>/`, as the client reads them."""
        prefix = f"refs/{kind}/"
        return [
            {"name": ref if kind == "pr" else ref.removeprefix(prefix), "ref": ref, "targetCommit": commit}
            for ref, commit in self.refs.items()
            if ref.startswith(prefix)
        ]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request, hash or beginning of a hash stands for."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.history[self.refs[ref]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for commit in self.history.values():
                if commit.id.startswith(revision):
                    return commit
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable(self, revision: str) -> str:
        """The full name of the branch or pull request `revision`, which commits can be added to."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add_ref(self, kind: str, name: str, commit: str) -> None:
        """Name a commit."""
        if _UNFIT_REF.search(name):
            raise Refused(400, f"Invalid reference name: {name}")
        if f"refs/{kind}/{name}" in self.refs:
            raise Refused(409, f"Reference already exists: {name}")
        self.refs[f"refs/{kind}/{name}"] = commit

    def remove_ref(self, kind: str, name: str) -> None:
        """Take a name away; its commits stay."""
        if kind == "heads" and name == "main":
            raise Refused(403, "The main branch cannot be deleted")
        if self.refs.pop(f"refs/{kind}/{name}", None) is None:
            raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def commit(self, ref: str, parent: Commit | None, tree: Tree, author: str, title: str, message: str = "") -> Commit:
        """Add a commit and let `ref` point at it."""
        date = timestamp()
        said = (self.id, len(self.history), parent and parent.id, sorted(tree.items(), key=str), author, title, date)
        name = hashlib.sha1(repr(said).encode()).hexdigest()
        commit = Commit(name, parent and parent.id, dict(tree), title, message, author, date)
        self.history[name] = commit
        self.refs[ref] = name
        return commit

    def ancestry(self, commit: Commit) -> list[Commit]:
        """The commit and those before it, newest first."""
        line = [commit]
        while (parent := line[-1].parent) is not None:
            line.append(self.history[parent])
        return line


class Store:
    """Accounts, repositories and stored objects.

    Attributes:
        accounts: by token.
        repositories: by `namespace/name`.
        objects: contents by hash, as in `File.oid`; a test may damage them.
        url: the endpoint.
        page: entries in a page of a listing.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.url = ""
        self.page = 1000
        self.lock = threading.RLock()
        self._secret = secrets.token_hex()

    def signature(self, place: str) -> str:
        """What proves that this Hub gave out the address of `place`."""
        return hashlib.sha256(f"{self._secret} {place}".encode()).hexdigest()

    def add_account(self, token: str, name: str, write: bool = True, organizations: Iterable[str] = ()) -> None:
        """Let `token` in; several tokens may belong to one name."""
        self.accounts[token] = Account(name, write, tuple(organizations))

    def create(self, repo_id: str, private: bool = False) -> Repository:
        """A new repository: one commit, that holds `.gitattributes`."""
        repository = self.repositories[repo_id] = Repository(repo_id, private)
        tree = {".gitattributes": self.store(ATTRIBUTES, lfs=False)}
        repository.commit("refs/heads/main", None, tree, repository.namespace, "initial commit")
        return repository

    def store(self, content: bytes, *, lfs: bool) -> File:
        """Keep a file's content."""
        oid = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
        self.objects[oid] = content
        return File(oid, len(content), lfs)

    def content(self, oid: str) -> bytes:
        """A stored content, to be sent."""
        if oid not in self.objects:
            raise Refused(404, "The object is gone")
        return self.objects[oid]

    def put(self, repo_id: str, contents: Mapping[str, bytes], revision: str = "main", title: str = "put") -> str:
        """Commit files, whatever their names, without a client; creates what is not there. Returns the commit."""
        with self.lock:
            repository = self.repositories.get(repo_id) or self.create(repo_id)
            if f"refs/heads/{revision}" not in repository.refs:
                repository.add_ref("heads", revision, repository.resolve("main").id)
            parent = repository.resolve(revision)
            patterns = self.lfs_patterns(parent.tree)
            tree = dict(parent.tree)
            for path, content in contents.items():
                tree[path] = self.store(content, lfs=wants_lfs(path, len(content), content[:512], patterns))
            return repository.commit(f"refs/heads/{revision}", parent, tree, repository.namespace, title).id

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """All files' contents."""
        with self.lock:
            tree = self.repositories[repo_id].resolve(revision).tree
            return {path: self.objects[file.oid] for path, file in tree.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """The hashes of a revision's commits, newest first."""
        with self.lock:
            repository = self.repositories[repo_id]
            return [commit.id for commit in repository.ancestry(repository.resolve(revision))]

    def readable(self, repo_id: str, account: Account | None, *, contents: bool = False) -> Repository:
        """The repository, if `account` may see it, or read its files' `contents`, which a gated one withholds."""
        repository = self.repositories.get(repo_id)
        invited = (
            repository is not None
            and account is not None
            and (_belongs(account, repository.namespace) or account.name in repository.readers)
        )
        if repository is None or (repository.private and not invited):
            # Over plain HTTP the client knows by the code alone what it takes any 401 for over HTTPS
            status, message = (404, "Repository not found") if account else (401, "Invalid username or password.")
            raise Refused(status, message, "RepoNotFound")
        if repository.disabled:
            raise Refused(403, "Access to this resource is disabled.")
        if contents and repository.gated and not invited:
            raise Refused(403 if account else 401, f"Access to model {repo_id} is restricted.", "GatedRepo")
        return repository

    def changeable(self, repo_id: str, account: Account | None, *, proposal: bool = False) -> Repository:
        """The repository, if `account` may write to it, or to a pull request on it, which is a `proposal`."""
        repository = self.readable(repo_id, account, contents=proposal)
        if account is None:
            raise Refused(401, "Invalid username or password.", "RepoNotFound")
        if not account.write:
            raise Refused(403, "This token has no write access")
        if not proposal and not _belongs(account, repository.namespace):
            raise Refused(403, "Pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def owned_name(self, account: Account | None, name: str, organization: str | None) -> str:
        """`namespace/name`, if `account` may create and delete repositories there."""
        if account is None:
            raise Refused(401, "Invalid username or password.")
        namespace = organization or account.name
        if not account.write or not _belongs(account, namespace):
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        return f"{namespace}/{name}"

    def lfs_patterns(self, tree: Tree) -> list[str]:
        """The patterns of `.gitattributes` for files that go to LFS."""
        file = tree.get(".gitattributes")
        lines = self.objects[file.oid].decode().splitlines() if file else []
        return [line.split()[0] for line in lines if "filter=lfs" in line.split()]

    def card(self, tree: Tree) -> dict[str, Any]:
        """The metadata of `README.md`, nothing if it is unfit."""
        file = tree.get("README.md")
        metadata, _, _ = check_card(self.objects[file.oid].decode(errors="replace") if file else "")
        return metadata


def _belongs(account: Account, namespace: str) -> bool:
    return namespace == account.name or namespace in account.organizations


def timestamp() -> str:
    """Now, as the client parses it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_hash(content: bytes) -> str:
    """Git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def wants_lfs(path: str, size: int, sample: bytes, patterns: Iterable[str]) -> bool:
    """Whether a file goes to LFS: by its name, its size, or because its beginning is no text."""
    if size == 0:
        return False
    return size > LARGE or b"\0" in sample or any(fnmatch(path.split("/")[-1], pattern) for pattern in patterns)


def entries(tree: Tree, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The files and folders below `folder` ("" for the root), as the client reads them."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, file in sorted(tree.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            parent = prefix + "/".join(parts[:depth])
            found[parent] = {"type": "directory", "path": parent, "oid": git_hash(parent.encode()), "size": 0}
        if recursive or len(parts) == 1:
            found[path] = {"type": "file", "path": path, "oid": file.blob, "size": file.size}
            if file.lfs:
                found[path]["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": len(file.pointer)}
    return list(found.values())


def check_card(content: str) -> tuple[dict[str, Any], list[str], list[str]]:
    """A card's metadata, what is wrong with it, and what the Hub merely warns of."""
    front = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", content, re.DOTALL | re.MULTILINE)
    if front is None or not front[1].strip():
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML Metadata Error: {error}"], []
    if not isinstance(metadata, dict):
        return {}, ["YAML Metadata Error: it is no mapping"], []
    errors = []
    licences = metadata.get("license", [])
    for licence in licences if isinstance(licences, list) else [licences]:
        if licence not in LICENCES:
            errors.append(f'"license" must be one of {LICENCES}')
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be an array of strings')
    if "model-index" in metadata:
        errors += _index_errors(metadata["model-index"])
    return (metadata if not errors else {}), errors, []


def _index_errors(index: Any) -> list[str]:
    """What is wrong with a card's results."""
    errors: list[str] = []

    def listed(value: Any, where: str) -> list[tuple[Any, str]]:
        if not isinstance(value, list):
            errors.append(f'"{where}" must be an array')
            return []
        return [(item, f"{where}[{number}]") for number, item in enumerate(value)]

    def need(value: Any, where: str, *keys: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            errors.append(f'"{where}" must be of type object')
            return {}
        errors.extend(f'"{where}.{key}" is required' for key in keys if value.get(key) is None)
        return value

    for model, at in listed(index, "model-index"):
        results = need(model, at, "name", "results").get("results", [])
        for result, place in listed(results, f"{at}.results"):
            parts = need(result, place, "task", "dataset", "metrics")
            need(parts.get("task", {"type": ""}), f"{place}.task", "type")
            need(parts.get("dataset", {"type": "", "name": ""}), f"{place}.dataset", "type", "name")
            for metric, spot in listed(parts.get("metrics", []), f"{place}.metrics"):
                need(metric, spot, "type", "value")
    return errors
