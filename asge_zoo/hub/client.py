"""The Hub's client: its errors in one line each, and an end to waiting for a Hub that does not answer."""

import contextlib
import functools
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, errors, set_client_factory
from huggingface_hub.utils import _http, disable_progress_bars, get_token, logging, validate_repo_id

from asge_zoo.engine.device import package_versions
from asge_zoo.errors import CheckpointError, HubError, ZooError

TIMEOUT = 15.0  # seconds without a sign of life; the client itself waits for ever, or tries again for minutes
TROUBLE = 10.0  # seconds from the first failure on after which no further one is tried again; the client does for 23
RETRIED = (408, 500, 502, 503, 504)  # answers after which the client tries again, when it is told to
COMMIT = re.compile(r"^[0-9a-f]{40}$")
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


def check_repo_id(repo_id: str) -> None:
    """Refuse what can't be a repository's name.

    Raises:
        CheckpointError: it is not of the form `user/name`.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except errors.HFValidationError:
        valid = False
    if not valid:
        raise CheckpointError(f"{repo_id}: is no repository's name; write user/name, of letters, digits, - _ and .")


@contextlib.contextmanager
def hub(repo_id: str, revision: str | None = None) -> Iterator[HfApi]:
    """The client, at $HF_ENDPOINT, with $HF_TOKEN or the stored login.

    What it raises within becomes one line in our own words: its own may hold secrets.

    Raises:
        HubError: the network or the Hub failed, or refuses.
        CheckpointError: the cache can't be written to.
    """
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # it logs every retry, with addresses that are signed
    if not sys.stderr.isatty():
        disable_progress_bars()
    before = _http._GLOBAL_CLIENT_FACTORY  # of whoever uses this process, too; there is no public way to ask
    set_client_factory(functools.partial(_session, before, _Patience()))
    try:
        yield HfApi(library_name="asge-zoo", library_version=package_versions()["asge-zoo"])
    except ZooError:
        raise
    except Exception as error:
        raise _translated(error, repo_id, revision) from None
    finally:
        set_client_factory(before)


def _translated(error: Exception, repo_id: str, revision: str | None) -> Exception:
    """In our words; what is none of the client's comes back as it is."""
    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):  # an upload's
        return _translated(cause, repo_id, revision)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(
        cause, (errors.OfflineModeIsEnabled, httpx2.HTTPError)
    ):  # what went wrong before it looked into the cache
        return _translated(cause, repo_id, revision)
    if isinstance(error, errors.HfHubHTTPError):
        said, unreachable = _refused(error, revision)
        return HubError(f"{repo_id}: {said}", unreachable=unreachable)
    for kinds, said, unreachable in FAILURES:
        if isinstance(error, kinds):
            return HubError(f"{repo_id}: {said.format(endpoint=constants.ENDPOINT)}", unreachable=unreachable)
    if isinstance(error, ValueError):
        return HubError(f"{repo_id}: the Hub does not take it ({_shown(error)}); see to that")
    if isinstance(error, OSError):
        where = error.filename or constants.HF_HUB_CACHE
        return CheckpointError(
            f"{where}: can't be written ({error.strerror or _shown(error)}); make room there, or name another "
            f"cache by HF_HOME"
        )
    return error


NOT_A_HUB = "{endpoint} does not answer as a Hub does; see whether HF_ENDPOINT is right"

# The first that fits; whether nothing was learnt of the repository.
FAILURES: tuple[tuple[tuple[type[Exception], ...], str, bool], ...] = (
    ((errors.LocalTokenNotFoundError,), f"needs a token, and there is none; {LOG_IN}", False),
    ((errors.OfflineModeIsEnabled,), "HF_HUB_OFFLINE is set, so that the Hub can't be asked; unset it", True),
    (
        (httpx2.LocalProtocolError, UnicodeEncodeError),  # they quote the header, and with it the token
        "the token can't be sent, for it is empty or holds a line break or a foreign character; set HF_TOKEN anew",
        False,
    ),
    (
        (httpx2.UnsupportedProtocol, httpx2.InvalidURL),
        "HF_ENDPOINT is {endpoint!r}; it must begin with https:// or http://",
        False,
    ),
    ((httpx2.TimeoutException,), "{endpoint} does not answer; try again later", True),
    (
        (httpx2.HTTPError, ConnectionError),
        "the connection to {endpoint} failed; see whether the network is up, and try again",
        True,
    ),
    (
        (json.JSONDecodeError, errors.LocalEntryNotFoundError, errors.FileMetadataError, KeyError, AssertionError),
        NOT_A_HUB,
        True,
    ),
)


def _refused(error: errors.HfHubHTTPError, revision: str | None) -> tuple[str, bool]:
    """What an answer with an error's status says, and whether that tells nothing of the repository."""
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return f"is gated; accept its conditions on its page, and {LOG_IN}", False
    if isinstance(error, errors.DisabledRepoError):
        return "has been disabled; take another", False
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is not there, or private and not for this login; check the name, or {LOG_IN}", False
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision or constants.DEFAULT_REVISION!r}; name another", False
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "lacks a file that a model of asge-zoo's has; name another repository", False
    if status == 401:
        known = "the Hub does not accept this token" if get_token() else "this needs a token, and there is none"
        return f"{known}; {LOG_IN}", False
    if status == 403:
        return "this token may not do that here; take one with the right to write", False
    if status == 429:
        return _limited(error.response), True
    if status in (409, 412):
        return "something else was pushed in the meantime; look at it, and push again", False
    if status >= 500:
        return f"{constants.ENDPOINT} {_broken(status)}", True
    said = (error.server_message or "").strip().splitlines()
    return f"the Hub refuses ({status}{', ' + said[0][:160] if said else ''}); see to that", False


def _limited(response: Any) -> str:
    wait = response.headers.get("Retry-After", "")
    return f"limits how often one may ask; try again {f'in {wait} seconds' if wait.isdigit() else 'later'}"


def _broken(status: int) -> str:
    return f"has an error of its own ({status}); try again later"


def _unreachable(said: str) -> HubError:
    return HubError(f"{constants.ENDPOINT}: {said}", unreachable=True)


def _shown(error: Exception) -> str:
    line = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
    token = get_token()
    return line.replace(token, "…") if token else line


def _session(factory: Callable[[], Any], patience: "_Patience") -> Any:
    """The client's own session, with an end to its patience; it takes a new one after some failures."""
    session = factory()
    session.send = functools.partial(_send, session.send, patience)
    return session


class _Patience:
    """Gives up on a Hub that is silent for `TIMEOUT` seconds, all told, or fails for `TROUBLE`, without progress."""

    def __init__(self) -> None:
        self._silent, self._counted_until = 0.0, 0.0
        self._trouble_since: float | None = None

    @property
    def left(self) -> float:
        """Seconds to wait yet."""
        return max(1.0, TIMEOUT - self._silent)

    def progress(self) -> None:
        """There was some that is not lost."""
        self._silent, self._trouble_since = 0.0, None

    def failed(self, said: str) -> None:
        """Something did, which the client would try again; raises HubError if that has been so for long."""
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > TROUBLE:
            raise _unreachable(said) from None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Raises HubError, which the client does not know and so does not try again."""
        begun = time.monotonic()
        try:
            yield
        except httpx2.TimeoutException:
            now = time.monotonic()  # several downloads may wait at once
            self._silent += now - max(begun, self._counted_until)
            self._counted_until = now
            if self._silent < TIMEOUT - 1:
                raise
            raise _unreachable("does not answer; try again later") from None
        except (httpx2.NetworkError, httpx2.RemoteProtocolError):
            self.failed("the connection failed; see whether the network is up, and try again")
            raise


def _send(send: Any, patience: _Patience, request: Any, **options: Any) -> Any:
    """As the session's `send`, under watch."""
    asked = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        part: min(asked.get(part) or patience.left, patience.left) for part in ("connect", "read", "write", "pool")
    }
    with patience.waiting():
        response = send(request, **options)
    if response.status_code == 429:  # the client would sleep for as long as it is told to
        raise _unreachable(_limited(response))
    if response.status_code in RETRIED:
        response.headers.pop("Retry-After", None)  # likewise
        patience.failed(_broken(response.status_code))
        return response
    if options.get("stream"):
        response.stream = _Body(response.stream, patience)
    else:
        patience.progress()
    return response


class _Body(httpx2.SyncByteStream):
    """A response's bytes as they come; what the client keeps of them when the connection breaks is progress."""

    def __init__(self, body: Any, patience: _Patience) -> None:
        self._body, self._patience = body, patience

    def __iter__(self) -> Iterator[bytes]:
        parts, count = iter(self._body), 0
        while True:
            with self._patience.waiting():
                part = next(parts, None)
            if part is None:
                self._patience.progress()
                return
            count += len(part)
            if count >= constants.DOWNLOAD_CHUNK_SIZE:
                self._patience.progress()
            yield part

    def close(self) -> None:
        self._body.close()
