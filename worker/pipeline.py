"""The whole way on one page: records in, decisions out. Knows no Kafka and no Redis client.

    feed      a record -> decode -> assemble -> segments            (worker/streams.py)
    screen    keywords, length, known scores settle what they can   (prefilter.py, cache.py)
    encode    what is left -> token windows, in a thread            (detect.py)
    batch     by padded tokens; the next forms while one runs       (batch.py)
    detect    scores, in threads                                    (detect.py)
    ask       a language model, where these are uncertain           (second.py)
    settle    decisions, in each stream's order                     (streams.py, decide.py)

Whoever owns a lane publishes what `Lane.take` returns: worker/publish.py in one Kafka
transaction, worker/moderator.py by handing it to its caller.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Self

import structlog

from detectors.combine import follows
from detectors.keywords import KeywordFile
from detectors.load import load_combination, load_detectors, load_second, shipped_thresholds
from detectors.protocol import Detector, Encoded, Passage
from detectors.second import Second
from worker import detect, metrics
from worker.assemble import Segment
from worker.batch import Batcher
from worker.cache import ScoreCache, connect
from worker.decide import Judgement, is_probability, keyword_scores
from worker.errors import DetectorError
from worker.prefilter import Prefilter
from worker.second import Answer, Question, SecondLook, spec_of
from worker.settings import Settings
from worker.streams import Lane, Rules
from worker.thresholds import Thresholds

log = structlog.get_logger()

_SCREEN_AT_ONCE = 512  # segments; one Redis MGET a micro-batch
_RETRY_S = 0.05  # first pause before a failed segment is tried again; doubles
_RETRY_MOST_S = 1.0


class Work:
    """One segment on its way to a judgement."""

    __slots__ = (
        "alone", "asked", "attempts", "done", "encoded", "harms", "infer_ms", "key", "lane",
        "longest", "partial", "prefilter_ms", "queue_ms", "rows", "segment", "tokenise_ms",
        "whole",
    )  # fmt: skip

    def __init__(self, lane: Lane, segment: Segment) -> None:
        self.lane = lane
        self.segment = segment
        self.key = b""
        self.encoded: tuple[Encoded, ...] = ()
        self.rows = self.longest = 0
        self.harms: frozenset[str] = frozenset()  # of keywords that do not settle it
        self.partial: tuple[float, ...] | None = None  # scores of a failed try; NaN where missing
        self.alone = self.done = False
        self.whole = False  # its tenant's thresholds are not those the first look was chosen for
        self.asked = False  # its scores are there; a second look is on its way
        self.attempts = 0
        self.queue_ms = self.prefilter_ms = self.tokenise_ms = self.infer_ms = 0.0

    @property
    def born(self) -> float:
        """Monotonic seconds at which the segment was complete."""
        return self.segment.born

    def read_as(self, encoded: tuple[Encoded, ...], took_ms: float) -> None:
        """Keep what each detector reads of it."""
        self.encoded, self.tokenise_ms = encoded, took_ms
        # A detector that is no encoder has no tokens: what it reads must not fill the batches of
        # those that have, nor be free where it is alone.
        costly = [row for row in encoded if row.tokens] or encoded
        self.rows = max(len(row.windows) for row in costly)
        self.longest = max(len(window.ids) for row in costly for window in row.windows)

    @property
    def passage(self) -> Passage:
        """What the detectors judge."""
        it = self.segment
        return Passage(it.text, it.before, it.stream.conversation)


class Pipeline:
    """Judges segments of any number of lanes. Use as an async context manager."""

    def __init__(
        self, settings: Settings, detectors: Sequence[Detector] | None = None,
        clock: Callable[[], float] = time.monotonic, second: Second | None = None,
        patient: bool = False,
    ) -> None:  # fmt: skip
        """detectors, second: instead of those that the settings name; whoever gives them ends them.

        patient: nobody reads along, so a second look may take as long as the queue before it.
        """
        self.settings = settings
        self.clock = clock
        self._exit = AsyncExitStack()
        self.on_output: Callable[[Lane], None] = lambda _: None
        self.detectors = tuple(detectors or load_detectors(settings.detectors, settings.models))
        self._combination = load_combination(settings.models, self.detectors)
        spec = spec_of(settings)
        if second is None and spec is not None:
            second = load_second(spec, settings.models, self.detectors, self._combination)
            if second is not None:
                self._exit.callback(second.close)
        encoders = detect.model_id(self.detectors, self._combination)
        model = detect.model_id(self.detectors, self._combination, second.digest if second else "")
        shipped = shipped_thresholds(self.detectors, self._combination)
        self.thresholds = Thresholds(shipped, settings, model)
        self._keywords = KeywordFile(
            settings.keywords_file, settings.keywords_check_ms / 1e3,
            on_error=lambda reason: log.error("keywords.not_reloaded", reason=reason),
        )  # fmt: skip
        self.rules = Rules(settings, self.thresholds, model, self._next_tail)
        self.waiting = 0  # segments submitted and not judged
        self.tokens_in = self.tokens_of_text = 0  # through the models; of segments' own text
        self._incoming: deque[Work] = deque()
        self._arrived = asyncio.Event()
        self._batcher: Batcher[Work] = Batcher(
            settings.max_batch_tokens, settings.batch_deadline_ms / 1e3
        )
        self._batched = asyncio.Event()
        self._at_once: deque[Work] = deque()  # for threads that have nothing else to do
        self._free = 0  # of these threads
        self._outstanding: deque[Work] = deque()  # oldest first, for the hold deadline
        self._failing: list[Work] = []  # failed at least once
        self._progress = 0.0  # monotonic seconds of the last scores that came
        self._calls: list[tuple[float, Sequence[Work]]] = []  # under way: since when, with what
        self._cache = ScoreCache(
            connect(settings.redis_url.get_secret_value()) if settings.redis_url else None,
            key=settings.cache_key.get_secret_value().encode() if settings.cache_key else None,
            entries=settings.cache_entries, ttl_s=settings.cache_ttl_s,
            deadline_ms=settings.redis_deadline_ms, clock=clock,
        )  # fmt: skip
        # Cached are the encoders' scores, which no second look moves; its own have their own keys.
        self._prefilter = Prefilter(
            settings, self.thresholds, self._keywords, self._cache, encoders, clock
        )
        self._second = SecondLook(second, settings, self._cache, clock, patient) if second else None
        self.loaded = {
            "model": model,
            "combined": "as learnt" if self._combination else "the highest score counts",
            "second_look": "on" if second else "off",
        }  # what a log should say

    def _next_tail(self, tail: str, text: str) -> str:
        return self._keywords.current(self.clock()).next_tail(tail, text)

    # -- life ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self.settings.infer_threads, "tidegate-infer")
        self._encoder = ThreadPoolExecutor(1, "tidegate-encode")
        self._exit.push_async_callback(self._cache.close)
        self._exit.callback(self._threads.shutdown, wait=False, cancel_futures=True)
        self._exit.callback(self._encoder.shutdown, wait=False, cancel_futures=True)
        if self._second is not None:
            self._exit.callback(self._second.close)
        self._tasks = await self._exit.enter_async_context(asyncio.TaskGroup())
        self._running = [
            self._tasks.create_task(step)
            for step in (
                self._screen(),
                self._watch_deadlines(),
                *(self._detect() for _ in range(self.settings.infer_threads)),
                *(self._second.runs() if self._second else ()),
            )
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for task in self._running:
            task.cancel()
        await self._exit.__aexit__(kind, error, trace)

    def check(self) -> None:
        """Raise what ended a step, if one has ended: they all run as long as the pipeline."""
        for task in self._running:
            if task.done() and not task.cancelled():
                task.result()

    @property
    def delay_s(self) -> float:
        """How long the oldest segment has waited that the detectors have not judged yet."""
        while self._outstanding and self._outstanding[0].done:
            self._outstanding.popleft()
        return self.clock() - self._outstanding[0].born if self._outstanding else 0.0

    # -- records in ---------------------------------------------------------------------------

    def lane(self, topic: str, partition: int, epoch: int = 0) -> Lane:
        """A new, empty lane."""
        return Lane(topic, partition, self.rules, epoch)

    def review(self, partitions: int) -> None:
        """From now on lanes pick decisions for review; so many partitions share the budget."""
        self.rules = self.rules._replace(partitions=partitions)

    def submit(self, lane: Lane, segments: Sequence[Segment]) -> None:
        """Have the lane's segments judged; `on_output` is called when it has decisions."""
        for segment in segments:
            if segment.judgement is not None:
                self._advance(lane, segment)
                continue
            work = Work(lane, segment)
            work.whole = self.thresholds.lowered(segment.stream.tenant)
            self.waiting += 1
            self._incoming.append(work)
            self._outstanding.append(work)
        self._arrived.set()

    # -- the steps ----------------------------------------------------------------------------

    async def _screen(self) -> None:
        while True:
            await self._arrived.wait()
            if not self._incoming:
                self._arrived.clear()
                continue
            count = min(len(self._incoming), _SCREEN_AT_ONCE)
            works = [self._incoming.popleft() for _ in range(count)]
            left = self._settle_known([work for work in works if self._wanted(work)])
            left = await self._settle_shared(left)
            await self._encode(left)
            await asyncio.sleep(0)

    def _settle_known(self, works: Sequence[Work]) -> list[Work]:
        """Keywords, length and this process's own cache; what they leave."""
        left = []
        for work in works:
            start = self.clock()
            work.queue_ms = (start - work.born) * 1e3
            screened = self._prefilter.screen(work.segment)
            work.harms = screened.harms
            if screened.scores is None:
                work.key = self._prefilter.key(work.segment)
                known = self._cache.lookup((work.key,))[0]
            work.prefilter_ms = (self.clock() - start) * 1e3
            if screened.scores is not None:
                self._settle(work, screened.scores, screened.stage)
            elif known is not None:
                self._judged(work, known, "cache")
            else:
                left.append(work)
        return left

    async def _settle_shared(self, works: list[Work]) -> list[Work]:
        """One look into Redis for all of them, bounded in time; what it leaves."""
        if not works or not self._cache.shared:
            return works
        start = self.clock()
        found = await self._cache.fetch([work.key for work in works])
        took_ms = (self.clock() - start) * 1e3
        left = []
        for work, scores in zip(works, found, strict=True):
            work.prefilter_ms += took_ms
            if scores is None:
                left.append(work)
            else:
                self._judged(work, scores, "cache")
        return left

    async def _encode(self, works: Sequence[Work]) -> None:
        if not works:
            return
        if len(works) + len(self._at_once) <= self._free and not len(self._batcher):
            self._at_once.extend(works)  # nothing to batch: one hop to a thread, not two
            self._batched.set()
            return
        await self._encode_together([work for work in works if not work.alone])
        for work in works:
            if work.alone:  # one that was tried with it cannot be encoded: this one, or another
                await self._encode_together([work])

    async def _encode_together(self, works: Sequence[Work]) -> None:
        if not works:
            return
        passages = [work.passage for work in works]
        start = self.clock()
        loop = asyncio.get_running_loop()
        try:
            encoded = await loop.run_in_executor(
                self._encoder, detect.encode, self.detectors, passages
            )
        except DetectorError as error:
            self._failed(works, error)
            return
        took_ms = (self.clock() - start) * 1e3
        for work, rows in zip(works, encoded, strict=True):
            work.read_as(rows, took_ms)
        self._batcher.add(works)
        self._batched.set()

    async def _detect(self) -> None:
        """Score batch after batch; as many of these run as there are threads."""
        loop = asyncio.get_running_loop()
        while True:
            if self._at_once:
                await self._detect_one(self._at_once.popleft())
                continue
            batch = [work for work in self._batcher.cut(self.clock()) if self._wanted(work)]
            if not batch:
                await self._more()
                continue
            start = self.clock()
            try:
                with self._calling(start, batch):
                    rows = await loop.run_in_executor(
                        self._threads, detect.score, self.detectors,
                        [work.encoded for work in batch], self._combination,
                        follows([work.passage for work in batch]),
                        [work.whole for work in batch],
                    )  # fmt: skip
            except DetectorError as error:
                self._failed(batch, error)
                continue
            self._progress = self.clock()
            took_ms = (self._progress - start) * 1e3
            for work, scored in zip(batch, rows, strict=True):
                work.infer_ms = took_ms
                self._scored(work, scored)

    async def _detect_one(self, work: Work) -> None:
        """Encode and score a segment in one go."""
        if not self._wanted(work):
            return
        start = self.clock()
        loop = asyncio.get_running_loop()
        try:
            with self._calling(start, [work]):
                encoded, scored, encode_ms = await loop.run_in_executor(
                    self._threads, detect.judge, self.detectors, work.passage, self._combination,
                    work.whole,
                )  # fmt: skip
        except DetectorError as error:
            self._failed([work], error)
            return
        self._progress = self.clock()
        work.read_as(encoded, encode_ms)
        work.infer_ms = max(0.0, (self._progress - start) * 1e3 - encode_ms)
        self._scored(work, scored)

    @contextmanager
    def _calling(self, since: float, works: Sequence[Work]) -> Iterator[None]:
        """Have the call's own time watched: the other threads' scores say nothing about it."""
        call = (since, works)
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    async def _more(self) -> None:
        """Wait for entries, or for the batch that is forming to be due."""
        if len(self._batcher):
            await asyncio.sleep(self.settings.batch_deadline_ms / 4e3)
            return
        self._batched.clear()
        self._free += 1
        try:
            await self._batched.wait()
        finally:
            self._free -= 1

    def _scored(self, work: Work, scored: detect.Scored) -> None:
        scores, stage, tokens = scored
        if not is_probability(scores):
            work.partial = scores
            self._failed([work], DetectorError("a score is no probability"))
            return
        self.tokens_in += tokens
        self.tokens_of_text += max(row.text_tokens for row in work.encoded)
        self._cache.store([(work.key, scores)])
        self._judged(work, scores, stage)

    # -- the second look ----------------------------------------------------------------------

    def _judged(self, work: Work, scores: tuple[float, ...], stage: str) -> None:
        """The encoders have spoken: settle the segment, or ask where they are uncertain."""
        columns: tuple[int, ...] = ()
        if work.harms:
            scores = tuple(map(max, scores, keyword_scores(work.harms)))
        if self._second is not None and self._wanted(work):
            # Not those in force: what is learnt from scores must not change the scores.
            around = self.thresholds.unlearnt(work.segment.stream.tenant)
            columns = self._second.uncertain(scores, around)
        if self._second is None or not columns:
            self._settle(work, scores, stage)
            return
        work.asked = True
        ends = self._second.ends(self.clock(), work.born + self.settings.hold_timeout_ms / 1e3)
        answered = partial(self._answered, work, scores, stage, columns)
        wanted = partial(self._wanted, work)
        self._second.ask(Question(work.passage, columns, ends, answered, wanted), work.key)

    def _answered(
        self, work: Work, scores: tuple[float, ...], stage: str, columns: tuple[int, ...],
        answer: Answer,
    ) -> None:  # fmt: skip
        """Put what the second look says in place of the uncertain scores; or let them stand."""
        if answer.scores is None:
            self._settle(work, scores, stage, unasked=True)
            return
        work.infer_ms += answer.took_ms
        seen = dict(zip(columns, answer.scores, strict=True))
        scores = tuple(seen.get(column, score) for column, score in enumerate(scores))
        self._settle(work, scores, answer.stage)

    def _failed(self, works: Sequence[Work], error: DetectorError) -> None:
        """Try again, each alone, until its deadline: the text stays held meanwhile."""
        metrics.DETECTOR_FAILURES.inc(len(works))
        log.warning("detector.failed", reason=str(error), segments=len(works))
        loop = asyncio.get_running_loop()
        for work in works:
            if not work.attempts:
                self._failing.append(work)
            pause = min(_RETRY_S * 2**work.attempts, _RETRY_MOST_S)
            work.attempts += 1
            work.alone = True
            loop.call_later(pause, self._again, work)

    def _again(self, work: Work) -> None:
        if not self._wanted(work):
            return
        if work.encoded:
            self._batcher.add([work])
            self._batched.set()
        else:
            self._incoming.append(work)
            self._arrived.set()

    async def _watch_deadlines(self) -> None:
        """Give up on segments that failed and still do, on those whose call hangs, and on all when
        no scores come any more.

        A queue alone is no failure: behind detectors that work text is held, not blocked.
        """
        hold_s = self.settings.hold_timeout_ms / 1e3
        while True:
            await asyncio.sleep(min(0.02, hold_s / 4))
            now = self.clock()
            self._failing = [it for it in self._failing if self._wanted(it) and not it.asked]
            for work in self._failing:
                if now - work.born >= hold_s:
                    self._give_up(work)
            for work in self._hung(now - hold_s):
                self._give_up(work)
            while self._outstanding:
                work = self._outstanding[0]
                if self._wanted(work) and not work.asked:
                    if now - max(work.born, self._progress) < hold_s:
                        break
                    self._give_up(work)
                self._outstanding.popleft()
            if len(self._outstanding) > 2 * self.waiting:  # most are done, behind one that is not
                self._outstanding = deque(it for it in self._outstanding if not it.done)

    def _hung(self, before: float) -> Iterator[Work]:
        """What is in calls that began so long ago and have not come back."""
        for since, works in self._calls:
            if since <= before:
                yield from filter(self._wanted, works)

    def _give_up(self, work: Work) -> None:
        metrics.UNAVAILABLE.inc()
        self._settle(work, work.partial, "policy")

    # -- judgements out -----------------------------------------------------------------------

    def _wanted(self, work: Work) -> bool:
        """Whether somebody still waits for this judgement; forgets it where nobody does."""
        if work.done:
            return False
        if not work.lane.holds(work.segment):
            work.done = True
            self.waiting -= 1
            return False
        return True

    def _settle(
        self, work: Work, scores: tuple[float, ...] | None, stage: str, unasked: bool = False
    ) -> None:
        if not self._wanted(work):
            return
        work.done = True
        self.waiting -= 1
        if scores is not None and work.harms:
            scores = tuple(map(max, scores, keyword_scores(work.harms)))
        judgement = Judgement(
            scores, stage, "", work.queue_ms, work.prefilter_ms, work.tokenise_ms, work.infer_ms,
            unasked=unasked,
        )  # fmt: skip
        metrics.SEGMENTS.labels(stage).inc()
        work.segment.judgement = judgement
        self._advance(work.lane, work.segment)

    def _advance(self, lane: Lane, segment: Segment) -> None:
        lane.advance(segment.stream, self.clock(), time.time_ns() // 1_000_000)
        if lane.has_output:
            self.on_output(lane)
