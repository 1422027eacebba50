"""Uncertain segments -> a language model, off the event loop -> better scores, or none in time.

Nobody waits for it longer than the deadline, and nothing else waits for it at all: questions stand
in a bounded queue, threads of its own ask them, and whoever asked is told exactly once. Without an
answer the detectors' scores stand: late (also behind other questions), down (the helper failed), or
refused (the queue was full, all threads hang, or the helper is left alone after failures in a row).
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any, Final, Literal, NamedTuple

import structlog

from detectors.harms import COLUMNS
from detectors.load import SecondSpec
from detectors.logprob import HelperError
from detectors.protocol import Passage
from detectors.second import Second
from worker import metrics
from worker.cache import Breaker, ScoreCache
from worker.settings import FITTING, Settings

log = structlog.get_logger()

Cause = Literal["late", "down", "refused"]

_IN_A_ROW: Final = 5  # failures, after which the helper is left alone
_ALONE_S: Final = 1.0  # for so long at first; doubles
_ALONE_MOST_S: Final = 30.0
_SHIPPED: Final = "logprob"  # the folder of the one that ships
_BEHIND: Final = 1.25  # of the deadline: a server's call ends too, when nobody waits any more
_LEARN: Final = 0.2  # weight of the newest look in the typical one


def spec_of(settings: Settings) -> SecondSpec | None:
    """What the settings ask for a second look; None: nothing."""
    if not settings.logprob:
        return None
    key = settings.logprob_key
    if settings.logprob == FITTING:
        return SecondSpec(_SHIPPED, fitting=True)
    return SecondSpec(
        settings.logprob, settings.logprob_plan, settings.logprob_model,
        key.get_secret_value() if key else None, settings.logprob_deadline_ms * _BEHIND,
    )  # fmt: skip


class Answer(NamedTuple):
    """What became of a question."""

    scores: tuple[float, ...] | None  # one a column that was asked about; None: there are none
    stage: str = ""  # logprob, or cache
    took_ms: float = 0.0


class Question:
    """One segment's uncertain columns, until whoever asked is told."""

    __slots__ = ("columns", "ends", "key", "open", "passage", "tell", "timer", "wanted")

    def __init__(
        self, passage: Passage, columns: tuple[int, ...], ends: float,
        tell: Callable[[Answer], None], wanted: Callable[[], bool],
    ) -> None:  # fmt: skip
        """ends: monotonic seconds of the deadline. wanted: whether an answer still matters."""
        self.passage = passage
        self.columns = columns  # of harms.COLUMNS
        self.ends = ends
        self.tell = tell
        self.wanted = wanted
        self.key = b""
        self.open = True
        self.timer: asyncio.TimerHandle | None = None

    def close(self, answer: Answer) -> None:
        """Tell whoever asked, once."""
        if self.open:
            self.drop()
            self.tell(answer)

    def drop(self) -> None:
        """Nobody wants to be told any more."""
        self.open = False
        if self.timer is not None:
            self.timer.cancel()


class SecondLook:
    """Asks a Second. Belongs to one event loop."""

    def __init__(
        self, second: Second, settings: Settings, cache: ScoreCache, clock: Callable[[], float],
        patient: bool = False,
    ) -> None:  # fmt: skip
        """patient: the deadline is that of one look, and whoever asks waits for a turn."""
        self._second = second
        self._cache = cache
        self._clock = clock
        self._deadline_s = settings.logprob_deadline_ms / 1e3
        self._threads = settings.logprob_threads
        self._pool = ThreadPoolExecutor(self._threads, "tidegate-logprob")
        self._queue: asyncio.Queue[Question] = asyncio.Queue(
            0 if patient else settings.logprob_queue
        )
        self._patient = patient
        self._open: set[Question] = set()
        self._breaker = Breaker(_ALONE_S, _ALONE_MOST_S)
        self._failures = 0  # in a row
        self._hanging = 0  # threads that have been at one question for longer than the deadline
        self._typical_s = 0.0  # one look

    def uncertain(self, scores: Sequence[float], thresholds: Sequence[float]) -> tuple[int, ...]:
        """As Second.uncertain."""
        return self._second.uncertain(scores, thresholds)

    def ends(self, now: float, latest: float) -> float:
        """Monotonic seconds until which an answer to what is asked now is waited for."""
        return inf if self._patient else min(now + self._deadline_s, latest)

    def ask(self, question: Question, key: bytes) -> None:
        """Have the question answered; it may be at once. key: of the segment's detector scores."""
        names = (COLUMNS[column] for column in question.columns)
        question.key = self._cache.key(key, self._second.digest, *names)
        if self._remembered(question, self._cache.lookup((question.key,))):
            return
        now = self._clock()
        if question.ends <= now:
            self._give_up(question, "late")
        elif self._queue.full() or self._hanging >= self._threads or not self._breaker.allows(now):
            self._give_up(question, "refused")
        else:
            if not self._patient:
                question.timer = asyncio.get_running_loop().call_later(
                    question.ends - now, self._give_up, question, "late"
                )
            self._open.add(question)
            self._queue.put_nowait(question)

    def runs(self) -> list[Coroutine[Any, Any, None]]:
        """What answers questions for ever, as long as it is run: one a thread."""
        return [self._run() for _ in range(self._threads)]

    async def _run(self) -> None:
        while True:
            question = await self._queue.get()
            if question.open and not question.wanted():
                self._forget(question)
            if question.open and self._cache.shared:
                self._remembered(question, await self._cache.fetch([question.key]))
            if question.open:
                await self._look(question)

    def close(self) -> None:
        """Tell nobody any more, and let the threads end."""
        for question in list(self._open):
            self._forget(question)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _look(self, question: Question) -> None:
        started = self._clock()
        # What would come too late is not begun: behind it others still have their time.
        if question.ends - started < min(self._typical_s, self._deadline_s / 2):
            self._give_up(question, "late")
            return
        loop = asyncio.get_running_loop()
        looking = loop.run_in_executor(self._pool, self._scored, question)
        done, _ = await asyncio.wait({looking}, timeout=self._deadline_s)
        if not done:
            self._hanging += 1
            self._failed(started, "no answer in time")
            if self._hanging >= self._threads:
                self._refuse_all()
            self._give_up(question, "late")
        found = await looking
        if not done:
            self._hanging -= 1
        self._found(question, found, started, bool(done))

    def _scored(self, question: Question) -> tuple[float, ...] | Exception | None:
        """In a thread: a score a column, or what went wrong; None where it was given up."""
        scores = []
        for column in question.columns:
            if not question.open:
                return None
            try:
                scores.append(self._second.score(question.passage, column))
            except Exception as error:  # noqa: BLE001 - whatever a helper does, scores are there
                return error
        return tuple(scores)

    def _found(
        self, question: Question, found: tuple[float, ...] | Exception | None,
        started: float, in_time: bool,
    ) -> None:  # fmt: skip
        if isinstance(found, Exception):
            # Of other errors the type alone: their text may hold what was judged.
            reason = str(found) if isinstance(found, HelperError) else type(found).__name__
            log.warning("logprob.failed", reason=reason)
            # A ValueError is about one text: no sender of texts can have the helper left alone.
            if in_time and not isinstance(found, ValueError):
                self._failed(started, reason)
            self._give_up(question, "down")
            return
        if found is None:
            return
        took_s = self._clock() - started
        metrics.LOGPROB_SECONDS.observe(took_s)
        self._typical_s += (took_s - self._typical_s) * (_LEARN if self._typical_s else 1.0)
        if in_time:
            self._failures = 0
            self._breaker.succeeded()
        self._cache.store([(question.key, self._row(question, found))])  # late ones are true too
        self._open.discard(question)
        question.close(Answer(found, "logprob", took_s * 1e3))

    def _row(self, question: Question, scores: Sequence[float]) -> tuple[float, ...]:
        """(7,) as the cache keeps it: 0 in columns that were not asked about."""
        by_column = dict(zip(question.columns, scores, strict=True))
        return tuple(by_column.get(column, 0.0) for column in range(len(COLUMNS)))

    def _remembered(self, question: Question, known: Sequence[tuple[float, ...] | None]) -> bool:
        """Whether the cache knew the answer; then it is told."""
        row = known[0]
        if row is None:
            return False
        self._open.discard(question)
        question.close(Answer(tuple(row[column] for column in question.columns), "cache"))
        return True

    def _failed(self, started: float, reason: str) -> None:
        self._failures += 1
        if self._failures < _IN_A_ROW:
            return
        if self._failures == _IN_A_ROW:
            log.error("logprob.left_alone", reason=reason)
        self._breaker.failed(started, self._clock())
        self._refuse_all()

    def _refuse_all(self) -> None:
        """What waits would wait for nothing."""
        while not self._queue.empty():
            self._give_up(self._queue.get_nowait(), "refused")

    def _give_up(self, question: Question, cause: Cause) -> None:
        """The detectors' scores stand."""
        if not question.open:
            return
        self._open.discard(question)
        if question.wanted():
            metrics.LOGPROB_UNAVAILABLE.labels(cause).inc()
        question.close(Answer(None))

    def _forget(self, question: Question) -> None:
        self._open.discard(question)
        question.drop()
