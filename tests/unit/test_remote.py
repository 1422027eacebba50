"""Log-probs over HTTP, from a real server on loopback that can do what servers do."""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from detectors.logprob import HelperError, LogProb
from detectors.prompts import ClassPrompts
from detectors.remote import RemoteHelper

Reply = Callable[["Server", dict[str, Any]], Any]


def words(prompt: str) -> list[str]:
    """The server's tokens: a word with the space before it, or one other character."""
    return re.findall(r" ?\w+|\s|[^\w\s]", prompt)


def logprobs(prompt: str) -> list[float | None]:
    """Minus a hundredth of each token's place; a bomb is likelier behind "Harmful"."""
    found: list[float | None] = [-0.01 * i for i in range(len(words(prompt)))]
    for i, word in enumerate(words(prompt)):
        if word == " bomb":
            found[i] = -1.0 if prompt.startswith("Harmful") else -3.0
    return [None, *found[1:]]


def completion(found: list[float | None], tokens: int | None = None) -> dict[str, Any]:
    """An answer as vLLM gives it, as far as it matters."""
    return {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": "", "logprobs": {"token_logprobs": found, "tokens": []}}],
        "usage": {"prompt_tokens": len(found) if tokens is None else tokens, "total_tokens": 0},
    }


def good(server: "Server", request: dict[str, Any]) -> Any:
    """What a sound server answers."""
    found = logprobs(request["prompt"])
    return completion(found + [-9.0] * request["max_tokens"], len(found))


class Server(ThreadingHTTPServer):
    """Answers as `reply` says, an object, bytes or a status; keeps what it was asked."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.connections: set[Any] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.hangs_up = False
        self.missing = 0  # bytes that are announced and never sent

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is what some tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.times.append(time.monotonic())
            server.connections.add(self.client_address)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._send(server.reply(server, request))
        finally:
            with server.lock:
                server.at_once -= 1

    def _send(self, reply: Any) -> None:
        status, body, extra = 200, b"", {}
        if isinstance(reply, tuple):
            status, extra = reply
        elif isinstance(reply, int):
            status = reply
        else:
            body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in extra.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + self.server.missing))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.server.hangs_up

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as the base has it
        """Nothing on stderr."""


@contextmanager
def serving(reply: Reply) -> Iterator[Server]:
    server = Server(reply)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


def failing(*first: Any) -> Reply:
    """These replies first, sound ones from then on."""
    replies = list(first)
    lock = threading.Lock()

    def reply(server: Server, request: dict[str, Any]) -> Any:
        with lock:
            return replies.pop(0) if replies else good(server, request)

    return reply


def helper(server: Server, **changes: Any) -> RemoteHelper:
    return RemoteHelper(server.url, "small", **{"backoff_ms": 1, "timeout_ms": 20_000, **changes})


def test_rows_come_back_in_the_order_of_the_prompts() -> None:
    """Whichever request is answered first; the null of the first token is left out."""

    def reply(server: Server, request: dict[str, Any]) -> Any:
        time.sleep(0.05 if "slow" in request["prompt"] else 0)
        return good(server, request)

    prompts = ["slow one here", "two", *(f"prompt {'x ' * i}" for i in range(20))]
    with serving(reply) as server, helper(server) as ask:
        found = ask(prompts)
    assert found == [logprobs(prompt)[1:] for prompt in prompts]


def test_what_is_asked() -> None:
    """Echoed log-probs of the prompt, nothing generated, with the key, at the version's path."""
    with serving(good) as server, helper(server, key="secret") as ask:
        ask(["Grüße \u2028 😀"])
    (request,) = server.requests
    assert request["prompt"] == "Grüße \u2028 😀"
    assert request["echo"] is True
    assert request["max_tokens"] == 0
    assert request["model"] == "small"
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.paths == ["/v1/completions"]


@pytest.mark.parametrize("generated", [0, 1])
def test_a_generated_token_is_cut_off(generated: int) -> None:
    """Servers that refuse max_tokens 0 generate one; where it ends the text it may be missing."""

    def reply(server: Server, request: dict[str, Any]) -> Any:
        found = logprobs(request["prompt"])
        return completion(found + [-9.0] * generated, len(found))

    with serving(reply) as server, helper(server, max_tokens=1) as ask:
        assert ask(["a b c"]) == [[-0.01, -0.02]]


def test_a_first_token_with_a_log_prob_is_kept() -> None:
    """A server that prefixes a start token has one for each."""
    with serving(lambda *_: completion([-1.0, -2.0])) as server, helper(server) as ask:
        assert ask(["a b"]) == [[-1.0, -2.0]]


def test_the_classifier_over_http() -> None:
    """Both prompts, the cut at the text, and the probability, end to end."""
    with serving(good) as server, helper(server) as ask:
        classifier = LogProb(ask, ClassPrompts(("Harmful.",), ("Harmless.",)), aggregation="sum")
        bomb, stone = classifier.classify_batch(["a bomb", "a stone"])
    assert bomb == pytest.approx(0.880797, abs=1e-6)  # sigmoid(2)
    assert stone == 0.5


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    """Two failures and an answer: the answer."""
    with serving(failing(status, status)) as server, helper(server, retries=2) as ask:
        assert ask(["a b"]) == [[-0.01]]
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422])
def test_what_cannot_pass_is_not(status: int) -> None:
    """A wrong model, key or request is an error at once, and a redirect is not followed."""
    reply = failing((status, {"Location": "http://127.0.0.1:9/"}))
    with serving(reply) as server, helper(server, retries=5) as ask:
        with pytest.raises(HelperError, match=f"status {status}"):
            ask(["a b"])
        assert len(server.requests) == 1


def test_retries_end() -> None:
    """A server that is down for good is an error after the last attempt."""
    with serving(lambda *_: 503) as server, helper(server, retries=3) as ask:
        with pytest.raises(HelperError, match="status 503, 4 times"):
            ask(["a b"])
        assert len(server.requests) == 4


def test_backoff_grows_and_the_server_may_ask_for_more() -> None:
    """At least half of 300, then of 600 ms between attempts; Retry-After is waited out."""
    with serving(failing(503, 503)) as server, helper(server, backoff_ms=300) as ask:
        ask(["a b"])
    first, second, third = server.times
    assert second - first >= 0.15
    assert third - second >= 0.3
    with serving(failing((429, {"Retry-After": "0.5"}))) as server, helper(server) as ask:
        ask(["a b"])
    assert server.times[1] - server.times[0] >= 0.5


def test_a_failed_call_leaves_no_thread_waiting() -> None:
    """One prompt waits to be tried again when another fails for good: both threads are free."""
    waits = threading.Event()
    both = threading.Event()

    def reply(server: Server, request: dict[str, Any]) -> Any:
        if request["prompt"] == "later":
            waits.set()
            return 429, {"Retry-After": "25"}
        if request["prompt"] == "bad":
            waits.wait(10)
            time.sleep(0.1)  # until the other has its answer
            return 400
        if server.at_once == 2:
            both.set()
        both.wait(10)
        return good(server, request)

    with serving(reply) as server, helper(server, concurrency=2) as ask:
        with pytest.raises(HelperError, match="status 400"):
            ask(["bad", "later"])
        ask(["a b", "c d"])
    assert both.is_set()


def test_nobody_listens() -> None:
    """A refused connection is tried again, then an error."""
    with serving(good) as server:
        url = server.url
    with (
        RemoteHelper(url, "small", retries=1, backoff_ms=1) as ask,
        pytest.raises(HelperError, match=r"ConnectionRefusedError\), 2 times"),
    ):
        ask(["a b"])


def test_a_server_that_hangs_is_left_in_time() -> None:
    """timeout_ms bounds each attempt."""

    def hang(server: Server, request: dict[str, Any]) -> Any:
        server.released.wait(10)
        return good(server, request)

    with serving(hang) as server, helper(server, timeout_ms=100, retries=1) as ask:
        started = time.monotonic()
        with pytest.raises(HelperError, match="no answer"):
            ask(["a b"])
        assert 0.2 <= time.monotonic() - started < 4
    assert len(server.requests) == 2


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    """Half a body is no body, even where the half is whole JSON."""

    def reply(server: Server, request: dict[str, Any]) -> Any:
        whole = json.dumps(good(server, request)).encode()
        server.missing = 10 if len(server.requests) == 1 else 0
        return whole

    with serving(reply) as server, helper(server, retries=1) as ask:
        server.hangs_up = True
        assert ask(["a b"]) == [[-0.01]]
    assert len(server.requests) == 2


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips_is_left_in_time(part: str) -> None:
    """A byte now and then resets a socket's own timeout; the attempt's end does not move."""
    import socket

    listening = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        link, _ = listening.accept()
        link.recv(65536)
        link.sendall(b"HTTP/1.1 200 OK\r\n")
        if part == "body":
            link.sendall(b"Content-Length: 100000\r\n\r\n")
        try:
            for _ in range(100):
                link.sendall(b"x")
                time.sleep(0.05)
        except OSError:
            link.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    started = time.monotonic()
    with (
        RemoteHelper(url, "small", timeout_ms=200, retries=0) as ask,
        pytest.raises(HelperError, match="no answer"),
    ):
        ask(["a b"])
    assert 0.2 <= time.monotonic() - started < 4
    listening.close()
    thread.join(10)


def test_the_deadline_is_for_the_whole_call() -> None:
    """Retries and backoff do not outlast it."""
    started = time.monotonic()
    with (
        serving(lambda *_: 503) as server,
        helper(server, retries=1000, backoff_ms=20, deadline_ms=200) as ask,
        pytest.raises(HelperError, match="deadline is over"),
    ):
        ask(["a b"])
    assert time.monotonic() - started < 4


def test_the_deadline_counts_waiting_for_a_thread() -> None:
    """Of many prompts on one connection the late ones are not asked at all."""

    def slow(server: Server, request: dict[str, Any]) -> Any:
        server.released.wait(0.1)
        return good(server, request)

    with serving(slow) as server, helper(server, concurrency=1, deadline_ms=250) as ask:
        with pytest.raises(HelperError):
            ask(["a b"] * 30)
        assert len(server.requests) <= 4


def test_one_failure_ends_the_call() -> None:
    """What is still waiting is not asked: the call has failed already."""

    def reply(server: Server, request: dict[str, Any]) -> Any:
        return 400 if request["prompt"] == "bad" else good(server, request)

    with serving(reply) as server, helper(server, concurrency=2) as ask:
        with pytest.raises(HelperError, match="status 400"):
            ask(["bad", *["a b"] * 500])
        time.sleep(0.05)
        assert len(server.requests) < 400


def test_never_more_requests_at_once_than_allowed() -> None:
    """For several callers together, and the connections are used again."""

    three = threading.Event()

    def together(server: Server, request: dict[str, Any]) -> Any:
        if server.most_at_once >= 3:
            three.set()
        three.wait(10)  # until as many as may have come; a fourth would show below
        time.sleep(0.002)
        return good(server, request)

    with serving(together) as server, helper(server, concurrency=3) as ask:
        threads = [threading.Thread(target=ask, args=(["a b"] * 10,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(server.requests) == 40
    assert server.most_at_once == 3
    assert len(server.connections) == 3


def test_a_connection_closed_meanwhile_costs_one_attempt() -> None:
    """Servers end idle connections and do not say so; the next request opens another."""
    with serving(good) as server, helper(server, concurrency=1, retries=1) as ask:
        server.hangs_up = True
        for _ in range(3):
            assert ask(["a b"]) == [[-0.01]]
            time.sleep(0.02)  # until the server has hung up
    assert len(server.connections) == 3


@pytest.mark.parametrize(
    "answer",
    [
        completion([None, math.nan]),  # written as NaN, as Python's json does
        completion([None, -math.inf]),
        b"<html>busy</html>",
        b"",
        b"[]",
        {"choices": [{"text": "a b", "logprobs": None}], "usage": {"prompt_tokens": 2}},
        {"choices": [{"logprobs": {"token_logprobs": [None, -1.0]}}]},
        {"choices": [], "usage": {"prompt_tokens": 2}},
        completion([None, "x"]),  # type: ignore[list-item]
        completion([None, -1.0], tokens=3),
        completion([None, -1.0, -2.0], tokens=2),
        completion([-1.0, None]),
        completion([None, None]),
    ],
)
def test_an_answer_that_is_none_is_an_error(answer: Any) -> None:
    """NaN, fewer tokens than the prompt has, more, null elsewhere, no log-probs, no JSON."""
    with serving(lambda *_: answer) as server, helper(server) as ask:
        with pytest.raises(ValueError, match=r"log-prob|choices|null"):
            ask(["a b"])
        assert len(server.requests) == 1


def test_no_message_holds_text_or_key() -> None:
    """Logs never show what a user wrote, not even through a server that repeats it."""
    for reply in (b'{"error": "private words"}', 400, 503):
        with (
            serving(lambda *_, reply=reply: reply) as server,
            helper(server, key="secret") as ask,
            pytest.raises((ValueError, HelperError)) as caught,
        ):
            ask(["private words"])
        assert "private" not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["vllm:8000", "ftp://vllm/v1", "http:///v1", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    """Said at start, not at the first text."""
    with pytest.raises(ValueError, match="no http or https address"):
        RemoteHelper(url, "small")


def test_closed_in_the_middle_of_a_call() -> None:
    """A call under way ends; it does not hang."""

    def hang(server: Server, request: dict[str, Any]) -> Any:
        server.released.wait(10)
        return good(server, request)

    with serving(hang) as server:
        ask = helper(server, concurrency=1, timeout_ms=9_000, retries=3)
        threading.Timer(0.2, ask.close).start()
        started = time.monotonic()
        with pytest.raises(HelperError):
            ask(["a b", "c d"])
        with pytest.raises(HelperError, match="closed"):
            ask(["a b"])
        assert time.monotonic() - started < 5
