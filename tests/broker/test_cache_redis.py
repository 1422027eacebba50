"""worker/cache.py on a real Valkey: pauses, kills, restarts."""

import asyncio
import random

import pytest
from redis.asyncio import Redis

from worker.cache import RedisStore, ScoreCache, connect
from worker.local import Valkey

SECRET = b"a secret of some length"


def _scores(number: int) -> tuple[float, ...]:
    """Scores that tell which key they belong to."""
    return (number / 10_000, *(0.5,) * 6)


async def _filled(url: str, name: str, count: int) -> tuple[ScoreCache, list[bytes]]:
    """A cache, closed, that has written `count` scores under keys of this test's own."""
    cache = ScoreCache(connect(url), key=SECRET)
    keys = [cache.key(name, str(number)) for number in range(count)]
    cache.store((key, _scores(number)) for number, key in enumerate(keys))
    await cache.close()
    assert cache.counts.written == count
    return cache, keys


async def _value(admin: Redis, key: bytes) -> bytes:
    value = await admin.get(b"tidegate:scores:" + key)
    assert isinstance(value, bytes)
    return value


async def _pause(url: str, milliseconds: int) -> None:
    """The server takes commands and answers none for a while."""
    async with Redis.from_url(url) as admin:
        await admin.client_pause(milliseconds)


async def test_scores_travel_between_workers(valkey: str, unique: str) -> None:
    """What one worker stored another fetches, bit for bit, with a time to live."""
    _, keys = await _filled(valkey, unique, 1_200)
    other = ScoreCache(connect(valkey), key=SECRET, deadline_ms=2_000)
    assert await other.fetch(keys) == [_scores(number) for number in range(1_200)]
    assert await other.fetch([other.key(unique, "none")]) == [None]
    await other.close()
    async with Redis.from_url(valkey) as admin:
        assert 0 < await admin.ttl(b"tidegate:scores:" + keys[0]) <= 86_400


async def test_someone_elses_value_is_a_miss(valkey: str, unique: str) -> None:
    """A value copied from another key, or of another type, is never read as scores."""
    _, keys = await _filled(valkey, unique, 2)
    async with Redis.from_url(valkey) as admin:
        await admin.set(b"tidegate:scores:" + keys[1], await _value(admin, keys[0]))
        await admin.delete(b"tidegate:scores:" + keys[0])
        await admin.lpush(b"tidegate:scores:" + keys[0], "a list")
    other = ScoreCache(connect(valkey), key=SECRET, deadline_ms=2_000)
    assert await other.fetch(keys) == [None, None]
    assert other.counts.refused == 1
    await other.close()


async def test_cancelled_mget_never_answers_the_next(valkey: str, unique: str) -> None:
    """MGETs cancelled at any moment leave no reply behind: the next gets the values it asked for.

    On the bare store, without the seals that would turn a wrong value into a miss.
    """
    rng = random.Random(11)
    client = Redis.from_url(valkey, max_connections=2)
    store = RedisStore(client)
    values = {f"{unique}-{number}".encode(): str(number).encode() for number in range(200)}
    await store.set_many(values, ttl_s=60)
    names = list(values)
    cancelled = 0
    await _pause(valkey, 300)
    for attempt in range(150):
        asked = rng.sample(names, 3)
        try:
            async with asyncio.timeout(0.02 if attempt < 10 else rng.uniform(0.0, 0.002)):
                found = await store.mget(asked)
        except TimeoutError:
            cancelled += 1
        else:
            assert found == [values[name] for name in asked]
    assert cancelled >= 10
    for name in names:
        assert await store.mget([name]) == [values[name]]
    await store.aclose()


async def test_paused_server_costs_the_deadline(valkey: str, unique: str) -> None:
    """While the server answers nothing, a fetch takes its deadline, then nothing; then it is back.

    Replies that come after the deadline are for the keys that were asked for.
    """
    _, keys = await _filled(valkey, unique, 40)
    cache = ScoreCache(connect(valkey), key=SECRET, deadline_ms=30, patience_ms=3_000)
    loop = asyncio.get_running_loop()
    await _pause(valkey, 600)
    started = loop.time()
    waits = []
    for number in range(20):
        asked = loop.time()
        assert await cache.fetch([keys[number]]) == [None]
        waits.append(loop.time() - asked)
    assert loop.time() - started < 0.5
    assert cache.counts.skipped >= 15
    assert max(waits) < 0.3
    found: list[tuple[float, ...] | None] = [None]
    while found[0] is None and loop.time() - started < 10:
        await asyncio.sleep(0.02)
        found = await cache.fetch([keys[30]])
    assert found == [_scores(30)]
    late = cache.lookup(keys[:20])
    assert late[0] == _scores(0)
    assert all(scores in (None, _scores(number)) for number, scores in enumerate(late))
    assert cache.counts.refused == 0
    await cache.close()


async def test_killed_server_is_used_again_after_its_restart(killable_valkey: Valkey) -> None:
    """With the server gone, lookups and stores go on; after its restart it serves again."""
    cache = ScoreCache(connect(killable_valkey.url), key=SECRET, deadline_ms=500)
    a, b = cache.key("a"), cache.key("b")
    cache.store([(a, _scores(1))])
    assert cache._writing is not None
    await cache._writing
    assert await cache.fetch([a]) == [_scores(1)]

    killable_valkey.kill()
    assert await cache.fetch([a]) == [None]
    cache.store([(b, _scores(2))])
    assert cache.lookup([a, b]) == [_scores(1), _scores(2)]

    killable_valkey.restart()
    async with asyncio.timeout(15):
        while cache.counts.written < 2:
            cache.store([(b, _scores(2))])
            await asyncio.sleep(0.05)
    other = ScoreCache(connect(killable_valkey.url), key=SECRET, deadline_ms=2_000)
    assert await other.fetch([a, b]) == [None, _scores(2)]
    await cache.close()
    await other.close()


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0?db=0"])
async def test_no_server_at_all(url: str) -> None:
    """A worker that never reaches Redis starts, misses and closes without an error."""
    cache = ScoreCache(connect(url), deadline_ms=500)
    key = cache.key("a")
    assert await cache.fetch([key]) == [None]
    cache.store([(key, _scores(1))])
    assert cache.lookup([key]) == [_scores(1)]
    await cache.close()
