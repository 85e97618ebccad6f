"""What goes wrong between a user and the Hub is said in one line, soon, and without the token."""

import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Said, TrainedRun
from hub_cli import PROCESSES, TOKEN, User, all_bytes, commands_of, finish, new_hub
from hub_server import Hub, running

from asge_zoo.hub.prepare import prepare
from asge_zoo.hub.published import CONFIG

MODEL = "owner/model"
SECRET = TOKEN.removeprefix("hf_")  # in all tokens
PULL = ("pull", MODEL)
PUSH = ("push", "{run}", "owner/new", "--no-eval")
PUSH_OVER = ("push", "{run}", MODEL, "--no-eval")
LIMIT = 60.0  # seconds; twice what is promised, for a machine that has more to do


def nothing(hub: Hub) -> None:
    """All is well."""


def fault(**options: Any) -> Callable[[Hub], object]:
    """What `Hub.fault` does, each time."""
    return lambda hub: hub.fault(**{"times": None, **options})


def plant(name: str, content: bytes = b"import os") -> Callable[[Hub], object]:
    """A file more, or in a file's place."""
    return lambda hub: hub.put(MODEL, {name: content})


def without(name: str) -> Callable[[Hub], object]:
    """A file less."""

    def remove(hub: Hub) -> None:
        repository = hub.repositories[MODEL]
        parent = repository.resolve("main")
        tree = {path: file for path, file in parent.tree.items() if path != name}
        repository.commit("refs/heads/main", parent, tree, "owner", "without")

    return remove


def bare(**options: Any) -> Callable[[Hub], object]:
    """As `fault`, of a Hub that has nothing yet, so that all has to be uploaded."""

    def arrange(hub: Hub) -> None:
        hub.repositories.clear()
        hub.objects.clear()
        fault(**options)(hub)

    return arrange


def closed(**flags: bool) -> Callable[[Hub], object]:
    """A repository that is private, gated or disabled."""

    def close(hub: Hub) -> None:
        for name, value in flags.items():
            setattr(hub.repositories[MODEL], name, value)

    return close


def damage_weights(hub: Hub) -> None:
    """The Hub's own disk turns over a bit."""
    oid = hub.repositories[MODEL].resolve("main").tree["model.safetensors"].oid
    content = hub.objects[oid]
    hub.objects[oid] = content[:-1] + bytes([content[-1] ^ 1])


def hang_up() -> None:
    """What a fault calls to end the connection."""
    raise ConnectionResetError


@dataclass(frozen=True)
class Case:
    """A command line that fails.

    Attributes:
        said: a regular expression that is in what it says.
        line: `{run}` is a finished run.
        code: its exit code.
        arrange: what is done to the Hub before, which has `MODEL` of "owner".
        token: in $HF_TOKEN.
        login: the stored one.
        url: another endpoint.
        environment: more of it.
        limit: the largest file that can be written, in bytes.
        cached: `MODEL` is in the cache.
        slow: takes long by waiting.
    """

    said: str
    line: tuple[str, ...] = PULL
    code: int = 3
    arrange: Callable[[Hub], object] = nothing
    token: str | None = TOKEN
    login: str | None = None
    url: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    cached: bool = False
    slow: bool = False


OTHERS = "hf_Other" + SECRET
READERS = "hf_Reader" + SECRET
BAD = "hf_Bad" + SECRET
DOWN = "http://127.0.0.1:1"
NOWHERE = "http://nowhere.invalid"
SCHEMELESS = "127.0.0.1:8000"
NOT_A_HUB = "{not a hub}"
UNSENDABLE = "the token can't be sent, .*; set HF_TOKEN anew"

CASES: dict[str, Case] = {
    # tokens
    "push, no token": Case("needs a token, and there is none; log in", PUSH, token=None),
    "push, an empty token": Case("needs a token, and there is none; log in", PUSH, token=""),
    "push, a bad token": Case("does not accept this token; log in", PUSH, token=BAD),
    "push, a token to read": Case("this token may only read; take one with the right to write", PUSH, token=READERS),
    "push, a token with a line break": Case("does not accept this token|" + UNSENDABLE, PUSH, token=f"{BAD}\n{SECRET}"),
    "push, a login with a zero": Case(UNSENDABLE, PUSH, token=None, login=f"{BAD}\0{SECRET}"),
    "push, a token with an umlaut": Case(UNSENDABLE, PUSH, token=f"{BAD}ä"),
    "push, to somebody else's": Case("this token may not do that here", PUSH_OVER, token=OTHERS),
    "pull, a bad token": Case("does not accept this token", token=BAD),
    # repositories
    "predict, no repository": Case("owner/nothing: is not there, or private", ("predict", "owner/nothing", "{digit}")),
    "no revision": Case("has no revision 'v9'; name another", (*PULL, "--revision", "v9")),
    "somebody else's private": Case("is not there, or private", arrange=closed(private=True), token=OTHERS),
    "gated": Case("is gated; accept its conditions", arrange=closed(gated=True), token=OTHERS),
    "disabled": Case("has been disabled; take another", arrange=closed(disabled=True)),
    # limits and errors of the Hub's
    "too often": Case(
        "try again in 1000 seconds", arrange=fault(path="/api/models", status=429, headers={"Retry-After": "1000"})
    ),
    "push, too often": Case(
        "try again in 1000 seconds", PUSH, arrange=fault(path="/commit/", status=429, headers={"Retry-After": "1000"})
    ),
    "the Hub is broken": Case("has an error of its own \\(503\\)", arrange=fault(status=503)),
    "push, the Hub is broken": Case(
        "has an error of its own \\(500\\)", PUSH, arrange=fault(path="commit/", status=500)
    ),
    "push, the storage is broken": Case("own \\(503\\)", PUSH, arrange=bare(method="PUT", status=503), slow=True),
    "push, the storage refuses": Case("may not do that|refuses \\(403", PUSH, arrange=bare(method="PUT", status=403)),
    "the storage is broken": Case(
        "has an error of its own \\(503\\)", arrange=fault(path="/cdn/", status=503), slow=True
    ),
    "push, a card that is refused": Case("license", (*PUSH, "--license", "nonsense")),
    # the network
    "down": Case("failed; see whether the network is up, .* no whole copy is in the cache", url=DOWN),
    "no such host": Case("the connection to http://nowhere.invalid failed", url=NOWHERE),
    "not a Hub": Case("does not answer as a Hub does; see whether HF_ENDPOINT is right", url=NOT_A_HUB),
    "push, not a Hub": Case("does not answer as a Hub does; see whether HF_ENDPOINT is right", PUSH, url=NOT_A_HUB),
    "no scheme": Case("HF_ENDPOINT is .*; it must begin with https://", url=SCHEMELESS),
    "offline": Case("HF_HUB_OFFLINE is set, .*no whole copy", environment={"HF_HUB_OFFLINE": "1"}),
    "push, offline": Case("HF_HUB_OFFLINE is set", PUSH, environment={"HF_HUB_OFFLINE": "1"}),
    "hung up on": Case("connection to .* failed", arrange=fault(path="/cdn/", cut=1000), slow=True),
    "reset": Case("connection to .* failed", arrange=fault(path="/cdn/", cut=1000, how="rst")),
    "push, hung up on": Case("connection failed", PUSH, arrange=fault(path="/preupload/", call=hang_up), slow=True),
    "hanging": Case("does not answer; try again later", arrange=fault(path="/api/", sleep=3600), slow=True),
    "hanging, downloads": Case(
        "does not answer", arrange=fault(path="/cdn/", cut=1000, at="cut", sleep=3600), slow=True
    ),
    "push, hanging": Case("does not answer; try again", PUSH, arrange=fault(path="whoami", sleep=3600), slow=True),
    "push, hanging, commit": Case("does not answer", PUSH, arrange=fault(path="/commit/", sleep=3600), slow=True),
    "push, hanging, storage": Case("does not answer", PUSH, arrange=bare(method="PUT", sleep=3600), slow=True),
    # disks
    "no room in the cache": Case("can't be written \\(File too large\\); make room", code=2, limit=20_000),
    "the cache is a file": Case("can't be written \\(.*\\); make room", code=2, environment={"HF_HOME": "{file}"}),
    "the folder is in a file": Case("can't be written", (*PULL, "--to", "{file}/model"), 2),
    "no room for the folder": Case(
        "can't be written \\(File too large\\)", (*PULL, "--to", "mine"), 2, limit=20_000, cached=True
    ),
    # what others publish
    "a pickle": Case(
        "holds pytorch_model.bin, which could be unpickled or run", code=2, arrange=plant("pytorch_model.bin")
    ),
    "a pickle outside": Case("holds ../../x.pkl, which could be", code=2, arrange=plant("../../x.pkl")),
    "a folder for a file": Case(
        "has no model.safetensors",
        code=2,
        arrange=lambda hub: (without("model.safetensors")(hub), plant("model.safetensors/x")(hub)),
    ),
    "no config": Case("has no config.json, so it is no model", code=2, arrange=without(CONFIG)),
    "a huge config": Case("config.json is larger than", code=2, arrange=lambda hub: plant(CONFIG, bytes(10**8))(hub)),
    "another config": Case("config.json: its sha256 is not", code=2, arrange=plant(CONFIG, b"{}")),
    "damaged on the Hub": Case("model.safetensors comes with another checksum", arrange=damage_weights),
    "damaged on the way": Case("comes with another checksum", arrange=fault(path="/cdn/", flip=True)),
    "push, beside a pickle": Case("holds a.pkl, which could be", PUSH_OVER, 2, arrange=plant("a.pkl")),
}


@dataclass(frozen=True)
class Outcome:
    """What came of a case: what was said, how long it took, what anybody could see."""

    said: Said
    seconds: float
    commands: set[str]
    files: dict[str, bytes]


class Page(http.server.BaseHTTPRequestHandler):
    """Some web server, that answers everything by a page."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b"<!DOCTYPE html><title>It works</title>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def web_server() -> Iterator[str]:
    """The address of a server that is no Hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def files(trained: TrainedRun) -> dict[str, bytes]:
    """A published model."""
    return prepare(trained.folder, MODEL, evaluated=False)


@pytest.fixture(scope="module")
def outcome(
    request: pytest.FixtureRequest,
    files: dict[str, bytes],
    trained: TrainedRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Outcome]]:
    """What came of a case; all that are asked for are under way at once, those first that mostly wait."""

    busy = threading.Semaphore(PROCESSES)

    def play(name: str) -> Outcome:
        case, place = CASES[name], tmp_path_factory.mktemp("user")
        (place / "file").touch()
        names = {"run": trained.folder, "digit": Path(__file__).with_name("digit.png"), "file": place / "file"}
        with running(new_hub()) as hub, web_server() as page:
            hub.add_account(OTHERS, "other")
            hub.add_account(READERS, "owner", write=False)
            hub.put(MODEL, files)
            case.arrange(hub)
            url = page if case.url == NOT_A_HUB else case.url or hub.url
            user = User(url, place, case.token)
            if case.login is not None:
                (user.folder("home") / "token").write_text(case.login)
            with ExitStack() as turn:
                turn.enter_context(busy)
                if case.cached:
                    user.json("pull", MODEL)
                begin, commands = time.monotonic(), set()
                process = user.start(
                    *(word.format(**names) for word in case.line),
                    environment={key: value.format(**names) for key, value in case.environment.items()},
                    limit=case.limit,
                )

                def watch() -> None:
                    commands.update(commands_of(process.pid))
                    if any(fault.struck for fault in hub.faults):  # it waits from now on
                        turn.close()

                said = finish(process, watch)
            return Outcome(said, time.monotonic() - begin, commands, all_bytes(place))

    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    asked = {str(item.callspec.params.get("name")) for item in items if hasattr(item, "callspec")}
    wanted = sorted(asked & CASES.keys(), key=lambda name: not CASES[name].slow)
    with ThreadPoolExecutor(PROCESSES + sum(case.slow for case in CASES.values())) as pool:
        under_way = {name: pool.submit(play, name) for name in wanted}
        yield lambda name: under_way[name].result()


@pytest.mark.parametrize("name", CASES)
def test_one_line_says_it(name: str, outcome: Callable[[str], Outcome]) -> None:
    case, (said, seconds, commands, left) = CASES[name], vars(outcome(name)).values()
    assert said.code == case.code, said
    assert said.out == ""
    assert said.err.startswith("asge-zoo: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    assert re.search(case.said, said.err), said.err
    assert seconds < LIMIT
    stored = {"home/token"} if case.login else set()
    shown = [said.out, said.err, *commands, *(str(content) for name, content in left.items() if name not in stored)]
    assert not any(SECRET in each for each in shown)
    assert commands
    print(f"{seconds:.1f} s: {said.err}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (("pull", "model"), "model: is no repository's name; write user/name"),
        (("push", "run", "../a"), "../a: is no repository's name; write user/name"),
        (
            ("push", "run", "owner/a", "--revision", "0" * 40),
            "is a commit, which nothing can be added to; name a branch",
        ),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else None,
)
def test_names_that_are_none(line: tuple[str, ...], said: str, cli: Callable[..., Said]) -> None:
    """Nobody is asked."""
    done = cli(*line)
    assert (done.code, done.out) == (2, "") and said in done.err and done.err.count("\n") == 1
