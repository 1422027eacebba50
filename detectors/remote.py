"""Log-probs of prompts from a server: any OpenAI-compatible completions endpoint that echoes them.

`POST {url}/completions` with `echo: true` (vLLM, llama.cpp's Python server and others; OpenAI's own
no longer echoes). One prompt a request: such servers batch what arrives together by themselves.

The standard library's client in threads, because a helper is a plain blocking call; so a worker
that never asks a server installs nothing for it. It follows no redirect and no proxy setting: the
texts and the key go where the settings say.
"""

import http.client
import random
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event, Lock, Timer, local
from typing import Final, Self
from urllib.parse import urlsplit

import msgspec

from detectors.logprob import HelperError

_AGAIN: Final = (408, 425, 429, 500, 502, 503, 504)
_LARGEST: Final = 32 * 2**20  # bytes of an answer: some 100 a token
_LONGEST_WAIT_S: Final = 30.0  # before another attempt, whatever the server asks for


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    logprobs: _LogProbs


class _Usage(msgspec.Struct):
    prompt_tokens: int


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage


class _Again(Exception):
    """This attempt failed; another may not. Its text holds nothing that the server sent."""

    def __init__(self, cause: str, after_s: float = 0.0) -> None:
        super().__init__(cause)
        self.after_s = after_s


class RemoteHelper:
    """logprob.Helper over HTTP. Thread-safe; the limit of concurrent requests is for all callers.

    The first token has no log-prob (null) where the server prefixes nothing: it is left out.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str | None = None,
        max_tokens: int = 0,
        concurrency: int = 8,
        timeout_ms: float = 5_000,
        retries: int = 2,
        backoff_ms: float = 100,
        deadline_ms: float | None = None,
    ) -> None:
        """url: up to and with the version, as "http://vllm:8000/v1". Raises ValueError otherwise.

        key: sent as a bearer token. max_tokens: 0, or 1 for servers that refuse 0.
        timeout_ms: of one attempt, from connecting to the answer's last byte.
        retries: attempts after the first; before the nth there are backoff_ms * 2**(n-1), times
        0.5 to 1, or longer where the server says so. Only for what may pass: no connection, no
        answer in time, 408, 425, 429 and 5xx.
        deadline_ms: of a whole call, whatever it asks; None: as long as its attempts take.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is no http or https address")
        if max_tokens not in (0, 1) or concurrency < 1 or timeout_ms <= 0 or retries < 0:
            raise ValueError("max_tokens is 0 or 1; concurrency 1, timeout and retries 0 or more")
        self._host, self._port = parts.hostname, parts.port
        self._path = parts.path.rstrip("/") + "/completions"
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._model, self._max_tokens = model, max_tokens
        self._timeout_s, self._backoff_s = timeout_ms / 1000, backoff_ms / 1000
        self._retries = retries
        self._deadline_s = None if deadline_ms is None else deadline_ms / 1000
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="logprob")
        self._closed = Event()
        self._own = local()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and connections; a call under way raises HelperError or finishes."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for connection in self._open:
                _abort(connection)
                connection.close()
            self._open.clear()

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        """Log-probs of each prompt's tokens, nats, in order; the first token's where there is one.

        Raises HelperError where one prompt has no answer in time, ValueError where an answer does
        not have one log-prob for each of the prompt's tokens.
        """
        ends = None if self._deadline_s is None else time.monotonic() + self._deadline_s
        stop = Event()
        if self._closed.is_set():
            raise HelperError("closed")
        asked = [self._pool.submit(self._row, prompt, ends, stop) for prompt in prompts]
        try:
            return [future.result() for future in asked]
        except CancelledError:
            raise HelperError("closed") from None
        finally:
            stop.set()  # after the first failure nobody wants the others
            for future in asked:
                future.cancel()

    def _row(self, prompt: str, ends: float | None, stop: Event) -> list[float]:
        request = msgspec.json.encode(
            {"model": self._model, "prompt": prompt, "max_tokens": self._max_tokens,
             "echo": True, "logprobs": 1, "temperature": 0}
        )  # fmt: skip
        for attempt in range(self._retries + 1):
            try:
                return self._log_probs(self._posted(request, _left(self._timeout_s, ends)))
            except _Again as failed:
                if attempt == self._retries or self._closed.is_set():
                    raise HelperError(f"{failed}, {attempt + 1} times") from None
                wait = self._backoff_s * 2**attempt * random.uniform(0.5, 1)  # noqa: S311 - spread
                wait = min(max(wait, failed.after_s), _LONGEST_WAIT_S)
                if stop.wait(_left(wait, ends, wait)):
                    raise HelperError("given up: another prompt has no answer") from None
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _log_probs(self, body: bytes) -> list[float]:
        """The prompt's own, checked to be one a token."""
        try:
            answer = msgspec.json.decode(body, type=_Answer)
        except msgspec.DecodeError:  # NaN and Infinity are no JSON
            raise ValueError("the answer is no completion with echoed log-probs") from None
        if len(answer.choices) != 1:
            raise ValueError(f"{len(answer.choices)} choices for one prompt")
        tokens = answer.usage.prompt_tokens
        found = answer.choices[0].logprobs.token_logprobs
        # With max_tokens 1 the generated token stands last, or nowhere where it ends the text.
        if not tokens <= len(found) <= tokens + self._max_tokens:
            raise ValueError(f"{len(found)} log-probs for a prompt of {tokens} tokens")
        found = found[1:tokens] if tokens and found[0] is None else found[:tokens]
        row = [value for value in found if value is not None]
        if len(row) != len(found):
            raise ValueError("null for a token that is not the first")
        return row

    def _posted(self, request: bytes, timeout_s: float) -> bytes:
        """The body of a 200. Raises _Again or HelperError."""
        over = Event()
        with self._connection(timeout_s, over) as connection:
            try:
                connection.request("POST", self._path, request, self._headers)
                response = connection.getresponse()
                body = response.read(_LARGEST + 1)
            except (OSError, http.client.HTTPException) as error:
                raise _Again(f"no answer ({type(error).__name__})") from None
            # A connection that is cut may look like an end: of headers, of a short body.
            if over.is_set():
                raise _Again("no answer in time")
            if response.status in _AGAIN:
                raise _Again(f"status {response.status}", _asked_to_wait(response.headers))
            if response.status != 200:
                raise HelperError(f"status {response.status}")
            if len(body) > _LARGEST:
                raise HelperError("the answer is too long")
            if response.length:
                raise _Again(f"no answer ({response.length} bytes missing)")
            return body

    @contextmanager
    def _connection(self, timeout_s: float, over: Event) -> Iterator[http.client.HTTPConnection]:
        """This thread's connection; cut after `timeout_s`, and not used again after an error.

        A socket's timeout is for each read, so a server that drips would never reach it: a timer
        cuts the line and sets `over`.
        """
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = self._connect()
        connection.timeout = timeout_s  # of connecting
        if connection.sock is not None:
            connection.sock.settimeout(timeout_s)
        timer = Timer(timeout_s, _cut, [connection, over])
        timer.daemon = True
        timer.start()
        try:
            yield connection
        except BaseException:
            connection.close()  # the next request opens it again
            raise
        finally:
            timer.cancel()

    def _connect(self) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPConnection(self._host, self._port)
            if self._tls is None
            else http.client.HTTPSConnection(self._host, self._port, context=self._tls)
        )
        with self._lock:
            self._open.add(connection)
        return connection


def _left(wanted_s: float, ends: float | None, needed_s: float = 0.0) -> float:
    """`wanted_s`, or what is left until `ends`. HelperError where that is not enough."""
    if ends is None:
        return wanted_s
    left = ends - time.monotonic()
    if left <= needed_s:
        raise HelperError("the deadline is over")
    return min(wanted_s, left)


def _cut(connection: http.client.HTTPConnection, over: Event) -> None:
    over.set()
    _abort(connection)


def _abort(connection: http.client.HTTPConnection) -> None:
    """Ends whatever the connection waits for, from another thread."""
    given = connection.sock
    if given is not None:
        with suppress(OSError):
            # Of the plain socket: an SSL socket's own would pull its state from under the reader.
            socket.socket.shutdown(given, socket.SHUT_RDWR)


def _asked_to_wait(headers: http.client.HTTPMessage) -> float:
    """Seconds; 0 where the server names none, or a date."""
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:
        return 0.0
