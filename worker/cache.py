"""Scores of text that was judged before: an LRU in this process, then Redis.

Scores are kept, never verdicts, so a new threshold needs no flush. Whatever is wrong with Redis
(slow, gone, full, written to by someone else) makes a miss, never an error and never a score.
"""

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Protocol, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from detectors.harms import COLUMNS
from worker.errors import Stop

Scores = tuple[float, ...]  # one calibrated probability a column of harms.COLUMNS

KEY_BYTES: Final = 16
MAC_BYTES: Final = 8
MIN_SECRET_BYTES: Final = 16
_SCORES: Final = struct.Struct(f"<{len(COLUMNS)}d")
_MAX_WRITES_A_TRIP: Final = 512


class Store(Protocol):
    """The remote side. Its methods may raise anything and take any time."""

    async def mget(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Values in the keys' order, None where there is none."""
        ...

    async def set_many(self, values: Mapping[bytes, bytes], ttl_s: int) -> None:
        """Keeps the values for `ttl_s` seconds."""
        ...

    async def aclose(self) -> None:
        """Lets go of the connections."""
        ...


class RedisStore:
    """A Store on Redis or Valkey."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def mget(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """One MGET."""
        return cast("list[bytes | None]", await self._client.mget(keys))  # decode_responses is off

    async def set_many(self, values: Mapping[bytes, bytes], ttl_s: int) -> None:
        """One pipeline of SET with EX."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for key, value in values.items():
                pipeline.set(key, value, ex=ttl_s)
            await pipeline.execute()

    async def aclose(self) -> None:
        """Closes the client and its pool."""
        await self._client.aclose()


def connect(url: str) -> RedisStore:
    """A store at `redis://...` or `rediss://...`. Connects with the first command.

    Raises ValueError for a malformed URL. Nothing is tried twice: the cache has its own deadline,
    and a miss is cheaper than a retry.
    """
    return RedisStore(
        Redis.from_url(
            url,
            decode_responses=False,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    )


@dataclass(slots=True)
class Counts:
    """What happened so far, in keys; `late` and `failures` in commands."""

    lru_hits: int = 0
    lru_misses: int = 0
    redis_hits: int = 0
    redis_misses: int = 0
    skipped: int = 0  # not asked for: Redis had failed shortly before
    refused: int = 0  # malformed, forged or out of range, read or about to be stored
    written: int = 0
    dropped: int = 0  # not written: queue full, or Redis failing
    late: int = 0  # fetches that missed their deadline
    failures: int = 0  # fetches and writes that failed


class Breaker:
    """Open after a failure, for a time that doubles with each failed attempt to close it."""

    def __init__(self, first_s: float, longest_s: float) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._backoff_s = 0.0  # 0 while closed
        self._opened = self._until = float("-inf")

    def allows(self, now: float) -> bool:
        """Whether to try. While open, once per backoff: the others wait for that one's outcome."""
        if not self._backoff_s:
            return True
        if now < self._until:
            return False
        self._until = now + self._backoff_s
        return True

    def failed(self, started: float, now: float) -> None:
        """An attempt that began at `started` failed. Several that began together count once."""
        if started <= self._opened:
            return
        self._backoff_s = min(2 * self._backoff_s or self._first_s, self._longest_s)
        self._opened = now
        self._until = now + self._backoff_s

    def succeeded(self) -> None:
        """An attempt came back in time."""
        self._backoff_s = 0.0


class ScoreCache:
    """Scores by key. Belongs to one event loop.

    Tasks of its own (reads that outlast their deadline, one writer while there is something to
    write) cannot fail and end by themselves within the patience; `close` waits for them.
    """

    def __init__(
        self,
        store: Store | None = None,  # None: this process alone
        *,
        key: bytes | None = None,  # secret, the same for all workers that share scores
        entries: int = 50_000,  # of the LRU, about 20 MB
        deadline_ms: float = 10.0,  # what a micro-batch waits for Redis
        patience_ms: float = 1_000.0,  # after which a command is given up and its connection closed
        ttl_s: int = 86_400,
        max_queued: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises Stop for a key under 16 bytes.

        Without one a random key is used: what this process writes, no other can read.
        """
        if key is not None and len(key) < MIN_SECRET_BYTES:
            raise Stop(f"cache_key: too short: give at least {MIN_SECRET_BYTES} random bytes")
        # Any length of secret, and two keys of it with nothing in common.
        digest = hashlib.blake2b(key or secrets.token_bytes(32)).digest()
        self._key_hash = hashlib.blake2b(key=digest, digest_size=KEY_BYTES, person=b"tidegate-key")
        self._mac_hash = hashlib.blake2b(key=digest, digest_size=MAC_BYTES, person=b"tidegate-mac")
        self._store = store
        self._entries = entries
        self._deadline_s = deadline_ms / 1000
        self._patience_s = patience_ms / 1000
        self._ttl_s = ttl_s
        self._clock = clock
        self._recent: OrderedDict[bytes, Scores] = OrderedDict()
        self._max_queued = max_queued
        self._unwritten: dict[bytes, Scores] = {}
        self._writing: asyncio.Task[None] | None = None
        self._reads: set[asyncio.Task[list[Scores | None] | None]] = set()
        self._breaker = Breaker(first_s=0.1, longest_s=5.0)
        self.counts = Counts()

    @property
    def shared(self) -> bool:
        """Whether there is a remote side at all."""
        return self._store is not None

    def key(self, *parts: str | bytes) -> bytes:
        """16 bytes that only a holder of the secret can work out. No two part lists share one."""
        hasher = self._key_hash.copy()
        for part in parts:
            coded = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
            # The length keeps neighbours apart, its last bit str from bytes.
            hasher.update((2 * len(coded) + isinstance(part, str)).to_bytes(8, "little"))
            hasher.update(coded)
        return hasher.digest()

    def lookup(self, keys: Sequence[bytes]) -> list[Scores | None]:
        """What this process remembers, in the keys' order."""
        found = [self._recent.get(key) for key in keys]
        for key, scores in zip(keys, found, strict=True):
            if scores is not None:
                self._recent.move_to_end(key)
        self.counts.lru_misses += found.count(None)
        self.counts.lru_hits += len(found) - found.count(None)
        return found

    async def fetch(self, keys: Sequence[bytes]) -> list[Scores | None]:
        """What Redis knows within the deadline, in the keys' order; nothing, whatever fails.

        An answer that comes later is still remembered for the next lookup. Letting it come keeps
        the connection, where cancelling would close it, and lets a slow first connect succeed.
        """
        missing: list[Scores | None] = [None] * len(keys)
        started = self._clock()
        if self._store is None or not keys:
            return missing
        if not self._breaker.allows(started):
            self.counts.skipped += len(keys)
            return missing
        reading = asyncio.create_task(self._read(self._store, keys))
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)
        done, _ = await asyncio.wait({reading}, timeout=self._deadline_s)
        found = reading.result() if done and not reading.cancelled() else None
        if found is None:
            self.counts.late += not done
            self._breaker.failed(started, self._clock())
            return missing
        self._breaker.succeeded()
        return found

    def store(self, scored: Iterable[tuple[bytes, Sequence[float]]]) -> None:
        """Remembers scores here and queues them for Redis; drops (counted) what does not fit.

        Scores that are not 7 numbers in 0..1 are refused (counted).
        """
        for key, values in scored:
            scores = tuple(map(float, values))
            if not _are_scores(scores):
                self.counts.refused += 1
                continue
            self._remember(key, scores)
            if self._store is not None:
                self._queue(self._store, key, scores)

    async def close(self) -> None:
        """Lets queued writes finish, then closes the store. Never raises; bounded by patience."""
        tasks: set[asyncio.Task[Any]] = {*self._reads}
        if self._writing is not None:
            tasks.add(self._writing)
        if tasks:
            await asyncio.wait(tasks, timeout=self._patience_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self._patience_s):
                    await self._store.aclose()

    async def _read(self, store: Store, keys: Sequence[bytes]) -> list[Scores | None] | None:
        """Scores in the keys' order; None where Redis failed."""
        try:
            async with asyncio.timeout(self._patience_s):
                values = await store.mget([_name(key) for key in keys])
            found = [self._open(key, value) for key, value in zip(keys, values, strict=True)]
        except Exception:  # noqa: BLE001 - no failure of a cache is worth a decision
            self.counts.failures += 1
            return None
        for key, scores in zip(keys, found, strict=True):
            if scores is not None:
                self._remember(key, scores)
        self.counts.redis_misses += found.count(None)
        self.counts.redis_hits += len(found) - found.count(None)
        return found

    def _queue(self, store: Store, key: bytes, scores: Scores) -> None:
        if len(self._unwritten) >= self._max_queued:
            self.counts.dropped += 1
            return
        self._unwritten[key] = scores
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all(store))

    async def _write_all(self, store: Store) -> None:
        while self._unwritten:
            scored = dict(islice(self._unwritten.items(), _MAX_WRITES_A_TRIP))
            for key in scored:
                del self._unwritten[key]
            if await self._write(store, scored):
                self.counts.written += len(scored)
            else:
                self.counts.dropped += len(scored)

    async def _write(self, store: Store, scored: Mapping[bytes, Scores]) -> bool:
        """Whether the scores were written."""
        started = self._clock()
        if not self._breaker.allows(started):
            return False
        values = {_name(key): self._seal(key, scores) for key, scores in scored.items()}
        try:
            async with asyncio.timeout(self._patience_s):
                await store.set_many(values, self._ttl_s)
        except Exception:  # noqa: BLE001 - as in _read
            self.counts.failures += 1
            self._breaker.failed(started, self._clock())
            return False
        self._breaker.succeeded()
        return True

    def _remember(self, key: bytes, scores: Scores) -> None:
        self._recent[key] = scores
        self._recent.move_to_end(key)
        if len(self._recent) > self._entries:
            self._recent.popitem(last=False)

    def _mac(self, key: bytes, packed: bytes) -> bytes:
        hasher = self._mac_hash.copy()
        hasher.update(key)  # of one length, so that key and value cannot shift into each other
        hasher.update(packed)
        return hasher.digest()

    def _seal(self, key: bytes, scores: Scores) -> bytes:
        packed = _SCORES.pack(*scores)
        return packed + self._mac(key, packed)

    def _open(self, key: bytes, value: bytes | None) -> Scores | None:
        """Scores if the value was sealed for this key with our secret."""
        if value is None:
            return None
        packed, mac = value[: _SCORES.size], value[_SCORES.size :]
        if len(packed) == _SCORES.size and hmac.compare_digest(mac, self._mac(key, packed)):
            scores: Scores = _SCORES.unpack(packed)
            if _are_scores(scores):
                return scores
        self.counts.refused += 1
        return None


def _are_scores(values: Scores) -> bool:
    # NaN is in no range, so it is refused too.
    return len(values) == len(COLUMNS) and all(0.0 <= value <= 1.0 for value in values)


def _name(key: bytes) -> bytes:
    return b"tidegate:scores:" + key
