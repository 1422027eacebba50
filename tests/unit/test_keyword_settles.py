"""prefilter.py: a keyword settles a segment only where that blocks it; else the models judge it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from detectors.constant import Constant
from detectors.protocol import Encoded, FloatArray
from tests.lanes import delta
from worker.decide import Judgement, combine, keyword_scores
from worker.events import Decision
from worker.pipeline import Pipeline
from worker.settings import Settings, TenantPolicy

LIST = """
[violence]
block = ["grumblefex"]
[hate_speech]
block = ["snarkwort"]
[other]
block = ["blathermoss"]
"""
VIOLENT, HATEFUL, OTHER = "grumblefex", "snarkwort", "blathermoss"


class Finding(Constant):
    """Finds every text sexual, and counts the texts."""

    def __init__(self) -> None:
        super().__init__()
        self.judged = 0

    def score(self, batch: Sequence[Encoded]) -> FloatArray:
        self.judged += len(batch)
        scores = np.full((len(batch), 7), 0.01)
        scores[:, [5, 6]] = 0.99
        return scores


async def decide(
    path: Path, policy: TenantPolicy, *terms: str, learnt: dict[str, float] | None = None
) -> tuple[Decision, int]:
    """The decision on a text with these terms in it, and how often a model was asked."""
    file = path / "keywords.toml"
    file.write_text(LIST)
    chosen = Settings(keywords_file=file, tenants={"t": policy}, logprob="")
    detector = Finding()
    async with Pipeline(chosen, [detector]) as pipeline:
        for harm, threshold in (learnt or {}).items():
            pipeline.thresholds.update("t", harm, threshold, 1)
        lane = pipeline.lane("in", 0)
        value = delta("s", 0, f"A text, and in it {', '.join(terms)}.", True, tenant="t")
        pipeline.submit(lane, lane.feed(0, 1, None, value, pipeline.clock(), 5))
        while lane.open_streams:
            await asyncio.sleep(0.005)
        output = lane.take(pipeline.clock(), drain=True)
    assert output is not None
    (decision,) = output.decisions
    return decision, detector.judged


@pytest.mark.parametrize("action", ["flag", "revise"])
async def test_other_blocks_beside_a_harm_that_does_not(tmp_path: Path, action: str) -> None:
    """A second keyword must not explain the first away: only harms that block score."""
    policy = TenantPolicy.model_validate({"actions": {"violence": action}})
    decision, judged = await decide(tmp_path, policy, OTHER, VIOLENT)
    assert (decision.verdict, decision.harm, decision.stage) == ("block", "other", "keyword")
    assert (decision.scores["violence"], decision.harmful, judged) == (0.0, 1.0, 0)


async def test_all_harms_that_block_score(tmp_path: Path) -> None:
    """And no harm that the tenant only flags."""
    policy = TenantPolicy(actions={"violence": "flag"})
    decision, judged = await decide(tmp_path, policy, VIOLENT, HATEFUL, OTHER)
    assert (decision.verdict, decision.harm, judged) == ("block", "hate_speech", 0)
    assert (decision.scores["violence"], decision.scores["hate_speech"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    "policy",
    [
        TenantPolicy(thresholds={"violence": 1.0, "other": 1.0}),
        TenantPolicy(thresholds={"violence": 1.0}, actions={"other": "flag"}),
        TenantPolicy(thresholds={"violence": 1.0}, actions={"other": "revise"}),
        TenantPolicy(thresholds={"other": 1.0}, actions={"violence": "revise"}),
    ],
)
async def test_a_harm_that_is_switched_off_leaves_it_to_the_models(
    tmp_path: Path, policy: TenantPolicy
) -> None:
    """What its keyword cannot block, the models may; the keyword's score is kept beside theirs."""
    decision, judged = await decide(tmp_path, policy, VIOLENT)
    assert (decision.verdict, decision.harm, judged) == ("block", "sexual_content", 1)
    assert decision.scores["violence"] == 1.0


async def test_so_does_one_that_a_record_switched_off(tmp_path: Path) -> None:
    """The thresholds in force count, not only those of the settings."""
    learnt = {"violence": 1.0, "other": 1.0}
    decision, judged = await decide(tmp_path, TenantPolicy(), VIOLENT, learnt=learnt)
    assert (decision.harm, judged) == ("sexual_content", 1)


async def test_a_type_that_is_switched_off_still_blocks_as_other(tmp_path: Path) -> None:
    """As with a model's score: where no type is above its threshold, `harmful` may be."""
    policy = TenantPolicy(thresholds={"violence": 1.0}, actions={"hate_speech": "flag"})
    for terms in ((VIOLENT,), (VIOLENT, HATEFUL)):
        decision, judged = await decide(tmp_path, policy, *terms)
        assert (decision.verdict, decision.harm, judged) == ("block", "other", 0)


@pytest.mark.parametrize(
    "later",
    [
        Judgement((0.99, *[0.01] * 5, 0.99), "toxicity"),  # a type would explain `other`
        Judgement(None, "policy"),  # doubt, which a tenant may let pass
    ],
)
def test_no_later_window_excuses_a_keyword(later: Judgement) -> None:
    """With a lookahead a segment is judged with the next; a keyword in itself is enough."""
    own = Judgement(keyword_scores({"other"}), "keyword")
    assert combine([own, later]) == own
