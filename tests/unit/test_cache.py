"""worker/cache.py without Redis: keys, seals, limits, deadlines."""

import asyncio
import math
import struct
from collections.abc import Mapping, Sequence

import pytest

from worker.cache import Breaker, ScoreCache
from worker.errors import Stop

SCORES = (0.0, 1.0, 0.25, 0.1, 0.2, 0.3, 0.9)
OTHER = (0.5,) * 7
SECRET = b"0123456789abcdef"


class FakeStore:
    """A dict. `fate` says what the next commands meet: an exception, or seconds to take."""

    def __init__(self, fate: Exception | float = 0.0) -> None:
        self.values: dict[bytes, bytes] = {}
        self.fate = fate
        self.commands: list[str] = []
        self.ttls: set[int] = set()
        self.closed = False

    async def _meet(self, command: str) -> None:
        self.commands.append(command)
        if isinstance(self.fate, Exception):
            raise self.fate
        await asyncio.sleep(self.fate)

    async def mget(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        await self._meet("mget")
        return [self.values.get(key) for key in keys]

    async def set_many(self, values: Mapping[bytes, bytes], ttl_s: int) -> None:
        await self._meet("set")
        self.values.update(values)
        self.ttls.add(ttl_s)

    async def aclose(self) -> None:
        await self._meet("close")
        self.closed = True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def _stored(cache: ScoreCache, *keys: bytes) -> None:
    """Store SCORES under the keys and wait until they are written."""
    cache.store([(key, SCORES) for key in keys])
    assert cache._writing is not None
    await cache._writing


def test_no_two_part_lists_share_a_key() -> None:
    """Moving a border, splitting, joining or changing str to bytes changes the key."""
    cache = ScoreCache(key=SECRET)
    lists: list[tuple[str | bytes, ...]] = [
        (), ("",), ("", ""), ("ab", "c"), ("a", "bc"), ("abc",), (b"abc",), ("abc", ""),
        ("\ud83d",),
    ]  # fmt: skip
    keys = [cache.key(*parts) for parts in lists]
    assert len(set(keys)) == len(lists)
    assert all(len(key) == 16 for key in keys)
    assert cache.key("ab", "c") == keys[3]


def test_keys_need_the_secret() -> None:
    """Workers with one secret agree on keys; without one no two caches do."""
    assert ScoreCache(key=SECRET).key("x") == ScoreCache(key=SECRET).key("x")
    assert ScoreCache(key=SECRET).key("x") != ScoreCache(key=SECRET + b"!").key("x")
    assert ScoreCache().key("x") != ScoreCache().key("x")
    with pytest.raises(Stop, match="at least 16"):
        ScoreCache(key=b"short")


def test_least_recently_used_goes_first() -> None:
    """The LRU keeps the entries that were looked up or stored last, and no more than its limit."""
    cache = ScoreCache(entries=2)
    a, b, c = (cache.key(name) for name in "abc")
    cache.store([(a, SCORES), (b, OTHER)])
    assert cache.lookup([a]) == [SCORES]
    cache.store([(c, OTHER)])
    assert cache.lookup([a, b, c]) == [SCORES, None, OTHER]
    assert (cache.counts.lru_hits, cache.counts.lru_misses) == (3, 1)


def test_no_entries_means_no_memory() -> None:
    """An LRU of size 0 remembers nothing."""
    cache = ScoreCache(entries=0)
    cache.store([(cache.key("a"), SCORES)])
    assert cache.lookup([cache.key("a")]) == [None]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.001, 1.001])
def test_what_is_no_probability_is_never_stored(wrong: float) -> None:
    """NaN and numbers outside 0..1 are refused, and so are too few or too many."""
    cache = ScoreCache()
    key = cache.key("a")
    cache.store([(key, (*SCORES[:6], wrong)), (key, SCORES[:6]), (key, (*SCORES, 0.5))])
    assert cache.lookup([key]) == [None]
    assert cache.counts.refused == 3


async def test_another_worker_reads_what_one_wrote() -> None:
    """Scores written by one cache come back exactly from another with the same secret."""
    store = FakeStore()
    writer, reader = (ScoreCache(store, key=SECRET, ttl_s=60) for _ in range(2))
    a, b = writer.key("a"), writer.key("b")
    await _stored(writer, a)
    assert await reader.fetch([b, a, a]) == [None, SCORES, SCORES]
    assert reader.lookup([a]) == [SCORES]
    assert store.ttls == {60}
    assert await ScoreCache(store, key=SECRET[::-1]).fetch([a]) == [None]


async def test_forged_values_are_misses() -> None:
    """A value of another key, of another length, altered or sealed with NaN is a counted miss."""
    store = FakeStore()
    cache = ScoreCache(store, key=SECRET)
    keys = [cache.key(str(number)) for number in range(6)]
    await _stored(cache, *keys)
    names = list(store.values)
    good = store.values[names[0]]
    packed = struct.pack("<7d", *SCORES[:6], math.nan)
    forged = [
        store.values[names[1]],  # moved here from another key
        good[:-1],
        b"",
        struct.pack("<7d", *OTHER) + good[56:],
        packed + cache._mac(keys[4], packed),  # rightly sealed, and no score
        good + b"!",
    ]
    store.values = dict(zip(names, forged, strict=True))
    assert await ScoreCache(store, key=SECRET).fetch(keys) == [None] * 6
    assert await cache.fetch(keys) == [None] * 6
    assert cache.counts.refused == 6


async def test_wrong_number_of_values_is_a_failure() -> None:
    """A reply with too few values gives misses for all, never scores for the wrong key."""

    class Short(FakeStore):
        async def mget(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
            return (await super().mget(keys))[1:]

    cache = ScoreCache(Short(), key=SECRET)
    a, b = cache.key("a"), cache.key("b")
    await _stored(cache, a, b)
    assert await cache.fetch([a, b]) == [None, None]
    assert cache.counts.failures == 1


@pytest.mark.parametrize("fate", [OSError("gone"), RuntimeError("odd"), TimeoutError()])
async def test_no_failure_escapes(fate: Exception) -> None:
    """Whatever the store raises, fetch gives misses, store and close return."""
    store = FakeStore(fate)
    cache = ScoreCache(store)
    key = cache.key("a")
    assert await cache.fetch([key]) == [None]
    cache.store([(key, SCORES)])
    assert cache.lookup([key]) == [SCORES]
    await cache.close()
    assert (cache.counts.failures, cache.counts.dropped) == (1, 1)


async def test_slow_store_costs_the_deadline_and_is_remembered() -> None:
    """A fetch returns at its deadline; the answer that comes later serves the next lookup."""
    store = FakeStore()
    cache = ScoreCache(store, deadline_ms=10)
    key = cache.key("a")
    await _stored(cache, key)
    cache._recent.clear()
    store.fate = 0.1
    started = asyncio.get_running_loop().time()
    assert await cache.fetch([key]) == [None]
    assert asyncio.get_running_loop().time() - started < 0.08
    assert cache.counts.late == 1
    await asyncio.sleep(0.15)
    assert cache.lookup([key]) == [SCORES]
    await cache.close()


async def test_stuck_store_is_given_up() -> None:
    """A command that never ends is cancelled after the patience, and close is bounded by it."""
    cache = ScoreCache(FakeStore(3600.0), deadline_ms=1, patience_ms=30)
    key = cache.key("a")
    assert await cache.fetch([key]) == [None]
    await asyncio.sleep(0.1)
    assert not cache._reads
    assert cache.counts.failures == 1
    async with asyncio.timeout(1):
        await cache.close()


async def test_store_is_left_alone_after_a_failure() -> None:
    """After a failure the store is skipped for a while; once it answers, it is used again."""
    clock = Clock()
    store = FakeStore(OSError("gone"))
    cache = ScoreCache(store, clock=clock)
    key = cache.key("a")
    await cache.fetch([key])
    await cache.fetch([key])
    assert store.commands == ["mget"]
    assert cache.counts.skipped == 1
    clock.now = 0.1
    store.fate = 0.0
    await cache.fetch([key])
    await cache.fetch([key])
    assert store.commands == ["mget"] * 3


def test_backoff_doubles_to_its_limit() -> None:
    """Each failed attempt doubles the wait, up to the longest; one success ends it."""
    breaker = Breaker(first_s=1.0, longest_s=5.0)
    now, waits = 0.0, []
    breaker.failed(now, now)
    for _ in range(4):
        start = now
        while not breaker.allows(now):
            now += 0.5
        waits.append(now - start)
        breaker.failed(now, now)
    assert waits == [1.0, 2.0, 4.0, 5.0]
    assert not breaker.allows(now)
    breaker.succeeded()
    assert breaker.allows(now)


def test_failures_of_one_moment_count_once() -> None:
    """Attempts that began before the breaker opened do not double its wait; one attempt probes."""
    breaker = Breaker(first_s=1.0, longest_s=5.0)
    breaker.failed(0.0, 0.5)
    breaker.failed(0.1, 0.6)
    assert not breaker.allows(1.4)
    assert breaker.allows(1.5)
    assert not breaker.allows(1.6)


async def test_queue_is_bounded() -> None:
    """While the store hangs, queued writes stay within the limit; the rest is dropped, counted."""
    cache = ScoreCache(FakeStore(3600.0), max_queued=5, patience_ms=20)
    cache.store([(cache.key(str(number)), SCORES) for number in range(9)])
    assert cache.counts.dropped == 4
    await cache.close()


async def test_close_writes_what_is_queued() -> None:
    """Closing lets the queue reach the store first, and closes it."""
    store = FakeStore()
    cache = ScoreCache(store)
    cache.store([(cache.key(str(number)), SCORES) for number in range(1_500)])
    await cache.close()
    assert len(store.values) == cache.counts.written == 1_500
    assert store.commands == ["set"] * 3 + ["close"]
    assert store.closed
