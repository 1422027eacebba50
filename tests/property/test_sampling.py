"""Kills at any instant: the same decisions are picked for review, each once, within the budget."""

import random

from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.lanes import Drive, interleaved, settings
from worker.settings import ReviewPolicy, Settings, TenantPolicy

KILL_SHARE = 0.1


def chosen(per_hour: int) -> Settings:
    review = ReviewPolicy(over=0.8, near=0.6, rest=0.4, per_hour=per_hour)
    return settings(
        rewind_records=40, commit_interval_ms=100, tenants={"t": TenantPolicy(review=review)}
    )


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6))
def test_kills_change_no_pick(seed: int) -> None:
    """What is published for review is what an undisturbed run publishes, each item once."""
    log = interleaved(random.Random(seed), streams=8)
    undisturbed = Drive(log, chosen(10**9), seed, partitions=1)
    undisturbed.run()
    disturbed = Drive(log, chosen(10**9), seed, KILL_SHARE, partitions=1)
    disturbed.run()
    expected = sorted((it.decision_id, it.picked_with, it.text) for it in undisturbed.reviews)
    assert sorted((it.decision_id, it.picked_with, it.text) for it in disturbed.reviews) == expected


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10**6), per_hour=st.integers(0, 12))
def test_kills_do_not_open_the_budget_again(seed: int, per_hour: int) -> None:
    """Of an hour no more is published than its budget, however often the lane is restored."""
    log = interleaved(random.Random(seed), streams=12)
    drive = Drive(log, chosen(per_hour), seed, KILL_SHARE, partitions=1)
    drive.run()
    picked = [it.decision_id for it in drive.reviews]
    assert len(picked) <= per_hour
    assert len(set(picked)) == len(picked)
    assert set(picked) <= {it.decision_id for it in drive.published}


def test_the_budget_is_reached_and_kills_happen() -> None:
    """The property above is about something."""
    reached = kills = 0
    for seed in range(20):
        log = interleaved(random.Random(seed), streams=12)
        drive = Drive(log, chosen(5), seed, KILL_SHARE, partitions=1)
        drive.run()
        reached, kills = reached + (len(drive.reviews) == 5), kills + drive.kills
    assert reached > 10
    assert kills > 50
