"""What needs no model: blocking keywords, text too short to judge, scores known already."""

from collections.abc import Callable

from detectors.keywords import KeywordFile
from worker.assemble import Segment
from worker.cache import ScoreCache
from worker.decide import ZEROS, Judgement, keyword_scores, rule
from worker.settings import Settings
from worker.thresholds import Thresholds


class Screened:
    """What the prefilter found out about one segment."""

    __slots__ = ("harms", "scores", "stage")

    def __init__(self, scores: tuple[float, ...] | None, stage: str, harms: frozenset[str]) -> None:
        self.scores = scores  # (7,) where it is settled
        self.stage = stage
        self.harms = harms  # of blocking keywords that leave it to the models


_TO_MODELS = Screened(None, "", frozenset())


class Prefilter:
    """Keywords and length; and the key under which a segment's scores are cached."""

    def __init__(
        self, settings: Settings, thresholds: Thresholds, keywords: KeywordFile,
        cache: ScoreCache, models: str, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._thresholds = thresholds
        self._keywords = keywords
        self._cache = cache
        self._models = models
        self._clock = clock

    def screen(self, segment: Segment) -> Screened:
        """Settle the segment by keywords or length, where they can."""
        hits = self._keywords.current(self._clock()).find(
            segment.text, segment.tail, segment.following
        )
        blocking = {hit.harm for hit in hits if hit.action == "block"}
        if blocking:
            settling = {harm for harm in blocking if self._blocks(harm, segment.stream.tenant)}
            if settling:
                return Screened(keyword_scores(settling), "keyword", frozenset())
            return Screened(None, "", frozenset(blocking))  # the models may find worse
        visible = len(segment.before) + len(segment.text)
        if not segment.text or (visible < self._settings.short_chars and not hits):
            return Screened(ZEROS, "short", frozenset())
        return _TO_MODELS

    def _blocks(self, harm: str, tenant: str) -> bool:
        """Whether a keyword of the harm blocks by itself: beside a type that the tenant only flags
        or revises, `other` would not count."""
        judgement = Judgement(keyword_scores({harm}), "keyword")
        policy = self._settings.tenant(tenant)
        return rule(judgement, self._thresholds.of(tenant), policy).verdict == "block"

    def key(self, segment: Segment) -> bytes:
        """Cache key: everything that can move the scores, and whose they are.

        The text as it is, not normalised: a spelling that a model reads as harmless must never
        answer for one that it does not.
        """
        stream = segment.stream
        if stream.context_key is None:
            policy = self._settings.tenant(stream.tenant).digest()
            turns = [part for turn in stream.conversation for part in turn]
            stream.context_key = self._cache.key(stream.tenant, policy, self._models, *turns)
        return self._cache.key(stream.context_key, segment.before, segment.text)
