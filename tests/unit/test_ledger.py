"""ledger.py, merge.py: what the leading learner knows."""

from typing import Any

import msgspec
import pytest

from detectors.harms import DEFAULT_THRESHOLDS
from tests.learning import ALL, MODEL, judged, label, settings
from worker.certify import in_force
from worker.errors import Stop
from worker.events import ThresholdRecord
from worker.feedback import Judged
from worker.ledger import Entry, Heard, Ledger, Mark, Output, Published, Register
from worker.merge import Merge, Raw
from worker.operate import fix, hand_back
from worker.settings import LearnPolicy, Settings, TenantPolicy

ONE = {"max_reviewer_share": 1.0}


def raw(value: bytes, offset: int = 0, at_ms: int = 1_000, partition: int = 0) -> Raw:
    return Raw(at_ms, partition, offset, b"k", value)


def heard_all(ledger: Ledger, decisions: list[Judged], harmful: bool = True, **fields: Any) -> None:
    """One label of each, a millisecond apart."""
    begun = max(1_000, ledger.clock_ms)
    for number, it in enumerate(decisions):
        ledger.see_review(it)
        ledger.hear(raw(label(it, harmful, **fields), number, begun + number), is_last_try=True)
    ledger.settle(begun + 9_000)


def taken(ledger: Ledger) -> Output:
    output = ledger.take()
    assert output is not None
    return output


def again(chosen: Settings, entries: list[Entry], model: str = MODEL) -> Ledger:
    """A new ledger that has replayed them, through JSON."""
    ledger = Ledger(chosen, {}, model)
    for entry in entries:
        ledger.replay(msgspec.json.decode(msgspec.json.encode(entry), type=Entry))
    ledger.replayed()
    return ledger


# -- merge ----------------------------------------------------------------------------------------


def test_records_wait_for_those_of_other_partitions() -> None:
    """They come in the order of time, partition, offset, and not before an earlier one could."""
    merge = Merge(2)
    for offset, at_ms in enumerate((10, 30, 30)):
        merge.feed(0, offset, at_ms, None, b"", 100)
    assert list(merge.ready(merge.horizon({}), 9)) == []
    merge.feed(1, 0, 20, None, b"", 100)
    assert [(it.partition, it.at_ms) for it in merge.ready(merge.horizon({}), 9)] == [(0, 10)]
    found = merge.ready(merge.horizon({0: 50, 1: 50}), 9)
    assert [(it.partition, it.at_ms) for it in found] == [(1, 20), (0, 30), (0, 30)]


def test_the_latest_millisecond_waits_too() -> None:
    """A partition may have more of it, and the other one's of then come behind those."""
    merge = Merge(2)
    merge.feed(0, 0, 20, None, b"", 100)
    merge.feed(1, 0, 20, None, b"", 100)
    assert list(merge.ready(merge.horizon({}), 9)) == []


def test_clocks_ahead_and_clocks_set_back_count_as_ours() -> None:
    """A record is never before its predecessor, nor after now; also when reading begins anew."""
    merge = Merge(1, {0: 40})
    for offset, at_ms in enumerate((30, 10**9, 50)):
        merge.feed(0, offset, at_ms, None, b"", 100)
    assert [it.at_ms for it in merge.ready(10**9, 9)] == [40, 100, 100]


def test_no_more_than_asked_for() -> None:
    """The rest waits for the next transaction."""
    merge = Merge(1)
    for offset in range(5):
        merge.feed(0, offset, offset, None, b"", 100)
    assert [it.offset for it in merge.ready(100, 3)] == [0, 1, 2]
    assert merge.waiting(0) == 2


# -- labels ---------------------------------------------------------------------------------------


def test_a_label_of_an_unknown_decision_waits_once() -> None:
    """First the register is read on; after that it is a dead letter."""
    ledger, it = Ledger(settings(), {}, MODEL), judged(1, 0.9)
    assert not ledger.hear(raw(label(it, True)), is_last_try=False)
    assert ledger.take() is None
    assert ledger.hear(raw(label(it, True)), is_last_try=True)
    (letter,) = taken(ledger).dead_letters
    assert (letter.topic, letter.reason, letter.field) == (
        "moderation.feedback", "no decision has this id", "decision_id"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"score": 0.8}, "score"), ({"tenant": "u"}, "tenant"), ({"picked_with": 0.5}, "picked_with"),
     ({"harm": "spam"}, "harm"), ({"score": 1.5}, "score"), ({"picked_with": 0.0}, "picked_with"),
     ({"stream_id": "x"}, "stream_id")],
)  # fmt: skip
def test_what_is_not_the_decision_s_is_a_dead_letter(fields: dict[str, Any], field: str) -> None:
    """Whole, with where it lay; and nothing is counted."""
    ledger, it = Ledger(settings(), {}, MODEL), judged(1, 0.9)
    ledger.see_review(it)
    value = label(it, True, **fields)
    ledger.hear(raw(value, offset=7, partition=2), is_last_try=True)
    output = taken(ledger)
    (letter,) = output.dead_letters
    assert (letter.partition, letter.offset, letter.value, letter.field) == (2, 7, value, field)
    assert not [entry for entry in output.entries if isinstance(entry, Heard)]


def test_a_decision_that_was_not_picked_proves_nothing() -> None:
    """A label that claims a `picked_with` for it is refused; a complaint is taken."""
    ledger, it = Ledger(settings(), {}, MODEL), judged(1, 0.9, picked_with=None, least=None)
    ledger.see_decision(0, 0, it)
    ledger.hear(raw(label(it, True, picked_with=1.0)), is_last_try=True)
    ledger.hear(raw(label(it, False), 1), is_last_try=True)
    output = taken(ledger)
    assert [letter.field for letter in output.dead_letters] == ["picked_with"]
    (entry,) = (entry for entry in output.entries if isinstance(entry, Heard))
    assert entry.complaint
    assert entry.label.picked_with is None


def test_where_reviewers_are_named_others_prove_nothing() -> None:
    """However many names somebody makes up. Anybody may complain."""
    chosen = settings(reviewers=("ann", "bob"), settle_ms=0)
    ledger = Ledger(chosen, {}, MODEL)
    decisions = [judged(n, 0.99) for n in range(100)]
    for it in decisions:
        ledger.see_review(it)
    for n, it in enumerate(decisions[1:]):
        ledger.hear(raw(label(it, True, f"made up {n}"), n, 1_000 + n), is_last_try=True)
    ledger.hear(raw(label(decisions[0], True, "ann"), 100, 2_000), is_last_try=True)
    ledger.hear(raw(label(decisions[1], False, "user", picked_with=None), 101), is_last_try=True)
    ledger.settle(10_000)
    output = taken(ledger)
    assert {(it.reason, it.field) for it in output.dead_letters} == {
        ("is none of the tenant's reviewers", "reviewer")
    }
    assert len(output.dead_letters) == 99
    counted = [entry for entry in output.entries if isinstance(entry, Heard)]
    assert [(it.reviewer, it.complaint) for it in counted] == [("ann", False), ("user", True)]


def test_what_has_counted_counts_on_when_its_reviewer_has_left() -> None:
    """Else a list that changes would choose among labels that somebody has looked at."""

    def learnt(*later: str) -> list[ThresholdRecord]:
        ledger = Ledger(settings(**ONE, reviewers=("r", "s")), {}, MODEL)
        heard_all(ledger, [judged(n, 0.99) for n in range(10)])
        successor = again(settings(**ONE, reviewers=later), taken(ledger).entries)
        heard_all(successor, [judged(n, 0.99) for n in range(10, 30)], reviewer="s")
        return taken(successor).thresholds

    assert learnt("s") == learnt("r", "s")
    assert learnt("s")[-1].labels == 28


def test_too_many_refused_in_a_row_stop_the_learner() -> None:
    """A tool that sends nonsense is a broken deploy; a sound label between ends the row."""
    chosen = settings().model_copy(update={"max_dead_letters_in_row": 3})
    ledger, it = Ledger(chosen, {}, MODEL), judged(1, 0.9)
    ledger.see_review(it)
    for offset in range(3):
        ledger.hear(raw(b"{", offset), is_last_try=True)
    ledger.hear(raw(label(it, True), 3), is_last_try=True)
    for offset in range(4, 7):
        ledger.hear(raw(b"{", offset), is_last_try=True)
    with pytest.raises(Stop, match=r"moderation\.feedback-0: 4 labels in a row .* offset 7"):
        ledger.hear(raw(b"{", 7), is_last_try=True)


def test_the_register_forgets_the_oldest() -> None:
    """Its memory is bounded."""
    register = Register(2)
    for number in range(3):
        register.remember(judged(number, 0.9))
    assert len(register) == 2
    assert register.find("in-0-0-0") is None
    assert register.find("in-0-2-0") == judged(2, 0.9)


# -- thresholds -----------------------------------------------------------------------------------


def test_versions_rise_over_all_harms_of_a_tenant() -> None:
    """So that one number names the state of all its thresholds."""
    ledger = Ledger(settings(**ONE, method="step", labels_per_step=2), {}, MODEL)
    heard_all(ledger, [judged(n, 0.9) for n in range(4)])
    hate = [
        judged(n, 0.9, harm="hate_speech")._replace(scores={"violence": 0.9, "hate_speech": 0.9})
        for n in range(10, 14)
    ]
    heard_all(ledger, hate, harm="hate_speech")
    heard_all(ledger, [judged(n, 0.9, tenant="u") for n in range(20, 24)])
    found = [(it.tenant, it.harm, it.version) for it in taken(ledger).thresholds]
    assert len({(tenant, harm) for tenant, harm, _ in found}) == 3
    for tenant in ("t", "u"):
        versions = [version for name, _, version in found if name == tenant]
        assert versions == list(range(1, len(versions) + 1))


def test_another_model_s_labels_move_nothing_of_ours() -> None:
    """They are kept: its learner, or ours of yesterday, may need them."""
    ledger = Ledger(settings(**ONE, method="step", labels_per_step=2), {}, MODEL)
    heard_all(ledger, [judged(n, 0.9, model="fake@111111") for n in range(9)])
    output = taken(ledger)
    assert not output.thresholds
    assert sum(isinstance(entry, Heard) for entry in output.entries) == 9


def test_a_new_model_starts_from_its_own_thresholds() -> None:
    """What was learnt of the last one says nothing about its scores; versions go on."""
    chosen = settings(**ONE, method="step", labels_per_step=2)
    ledger = Ledger(chosen, {}, MODEL)
    heard_all(ledger, [judged(n, 0.9) for n in range(6)])
    output = taken(ledger)
    last = output.thresholds[-1]
    assert last.threshold < 0.7
    successor = Ledger(chosen, {"violence": 0.85}, "fake@222222")
    for entry in output.entries:
        successor.replay(entry)
    successor.replayed()
    heard_all(successor, [judged(n, 0.9, model="fake@222222") for n in range(50, 54)])
    first = taken(successor).thresholds[0]
    assert (first.previous, first.model, first.version) == (0.85, "fake@222222", last.version + 1)


def handed_on(
    chosen: Settings, entries: list[Entry], decisions: range, model: str, *, harmful: bool
) -> list[Entry]:
    """The next learner, whose detectors are `model`: what it adds to the ledger."""
    ledger = again(chosen, entries, model)
    heard_all(ledger, [judged(n, 0.99, model=model) for n in decisions], harmful)
    return taken(ledger).entries


def records(entries: list[Entry]) -> list[ThresholdRecord]:
    return [entry.record for entry in entries if isinstance(entry, Published)]


def test_no_certificate_outlives_its_model() -> None:
    """Not even behind an operator's word, which does: other scores, other labels."""
    chosen = settings(**ONE, target_precision=0.7)
    entries = handed_on(chosen, [], range(99), MODEL, harmful=True)
    assert records(entries)[-1].certified == 0.5
    clock_ms = Ledger(chosen, {}, MODEL).clock_ms
    fixed = msgspec.structs.replace(fix(0.9)(records(entries)[-1], clock_ms), version=90)
    entries.append(Published(fixed))
    entries += handed_on(chosen, entries, range(100, 300), "fake@222222", harmful=False)
    word = hand_back("fake@222222")(records(entries)[-1], clock_ms)
    entries.append(Published(msgspec.structs.replace(word, version=99)))
    after = handed_on(chosen, entries, range(300, 310), "fake@222222", harmful=False)
    found = records(after)
    assert found
    assert {it.certified for it in found} == {None}
    assert {in_force(it) for it in found} == {0.9}


def test_a_model_that_comes_back_goes_on_where_it_was() -> None:
    """It starts from what it ships; its certificates hold, and delta that was spent stays spent."""
    chosen = settings(**ONE, target_precision=0.7)
    entries = handed_on(chosen, [], range(99), MODEL, harmful=True)
    entries += handed_on(chosen, entries, range(100, 160), MODEL, harmful=False)
    ours = records(entries)[-1]
    assert ours.epoch == 1
    entries += handed_on(chosen, entries, range(200, 299), "fake@222222", harmful=True)
    theirs = records(entries)[-1]
    assert (theirs.epoch, theirs.certified, theirs.learnt_from) == (0, 0.5, "fake@222222")
    entries += handed_on(chosen, entries, range(300, 600), MODEL, harmful=True)
    back = [it for it in records(entries) if it.version > theirs.version]
    assert back[0].previous == DEFAULT_THRESHOLDS["violence"]
    assert {it.epoch for it in back} == {1}
    assert back[-1].certified == 0.5


def test_what_was_learnt_is_found_again_behind_an_operator_s_word() -> None:
    """Set while one model served, told an alarm by the next, handed back to the first."""
    chosen = settings(**ONE, target_precision=0.7)
    entries = handed_on(chosen, [], range(99), MODEL, harmful=True)
    entries += handed_on(chosen, entries, range(100, 160), MODEL, harmful=False)
    version = records(entries)[-1].version
    fixed = msgspec.structs.replace(fix(0.9)(records(entries)[-1], 0), version=version + 1)
    entries.append(Published(fixed))
    entries += handed_on(chosen, entries, range(200, 299), "fake@222222", harmful=False)
    told = records(entries)[-1]
    assert (told.alarm, told.method, told.learnt_from) == (True, "operator", "fake@222222")
    word = hand_back(MODEL)(told, 0)
    entries.append(Published(msgspec.structs.replace(word, version=told.version + 1)))
    found = records(handed_on(chosen, entries, range(300, 600), MODEL, harmful=True))
    assert {it.epoch for it in found} == {1}


def test_what_the_settings_fix_does_not_learn() -> None:
    """No record would count."""
    policy = TenantPolicy(
        thresholds={"violence": 0.7}, review=ALL,
        learn=LearnPolicy(method="step", labels_per_step=1, settle_ms=0, test_every=1,
                          max_reviewer_share=1.0),
    )  # fmt: skip
    ledger = Ledger(Settings(tenants={"default": policy}), {}, MODEL)
    heard_all(ledger, [judged(n, 0.9) for n in range(9)])
    assert not taken(ledger).thresholds


def test_an_operator_s_word_is_replayed_where_it_was_spoken() -> None:
    """What was set stays set, whatever the labels before and behind it say."""
    chosen = settings(**ONE, method="step", labels_per_step=2)
    ledger = Ledger(chosen, {}, MODEL)
    heard_all(ledger, [judged(n, 0.9) for n in range(6)])
    output = taken(ledger)
    word = msgspec.structs.replace(
        output.thresholds[-1], threshold=0.33, method="operator", model="",
        version=output.thresholds[-1].version + 1,
    )  # fmt: skip
    successor = again(chosen, [*output.entries, Published(word)])
    heard_all(successor, [judged(n, 0.9) for n in range(50, 60)])
    assert not [it for it in taken(successor).thresholds if it.threshold != 0.33]


def test_a_record_that_the_ledger_lacks_is_taken_from_the_topic() -> None:
    """An older one is known already."""
    ledger = Ledger(settings(), {}, MODEL)
    record = ThresholdRecord(
        tenant="t", harm="violence", threshold=0.6, previous=0.7, version=3, method="operator"
    )
    assert not ledger.is_known(record)
    assert ledger.is_known(record)


# -- marks ----------------------------------------------------------------------------------------


def test_a_mark_says_where_to_go_on() -> None:
    """Offsets, times and the clock; a ledger that has replayed it goes on there."""
    ledger = Ledger(settings(), {}, MODEL)
    heard_all(ledger, [judged(n, 0.9) for n in range(3)])
    entries = taken(ledger).entries
    assert isinstance(entries[-1], Mark)
    successor = again(settings(), entries)
    assert successor.feedback == {0: (3, 1_002)}
    assert successor.clock_ms == 10_000
    assert successor.take() is None


def test_a_label_behind_one_that_nobody_can_read_keeps_its_time() -> None:
    """A clock was set back between the two, and the learner killed: the order is the same."""
    it = judged(1, 0.9)
    log = [(1_000, b"{"), (900, label(it, True))]

    def taken_at(kill: bool) -> int:
        ledger = Ledger(settings(), {}, MODEL)
        merge, entries = Merge(1), []
        for offset, (at_ms, value) in enumerate(log):
            ledger.see_review(it)
            merge.feed(0, offset, at_ms, None, value, 10**6)
            for one in merge.ready(10**6, 1):
                ledger.hear(one, is_last_try=True)
            entries += taken(ledger).entries
            if kill:
                ledger = again(settings(), entries)
                merge = Merge(1, {it: place.at_ms for it, place in ledger.feedback.items()})
        (heard,) = (entry for entry in entries if isinstance(entry, Heard))
        return heard.at_ms

    assert taken_at(kill=True) == taken_at(kill=False) == 1_000


def test_blocks_are_counted_once_and_for_known_tenants() -> None:
    """What is read again after a restart is remembered, not counted; names that nobody has
    settings or labels for are not counted at all."""
    ledger = Ledger(settings(), {}, MODEL)
    ledger.see_decision(0, 5, judged(1, 0.9, tenant="default"))
    ledger.see_decision(0, 6, judged(2, 0.9, tenant="who"))
    ledger.see_decision(0, 7, judged(3, 0.9, tenant="default", stage="keyword"))
    ledger.see_decision(0, 8, None)
    ledger.settle(10**6)
    (mark,) = taken(ledger).entries
    assert isinstance(mark, Mark)
    assert mark.decisions == {0: 9}
    assert mark.blocked == [(("default", "violence", MODEL), 1)]
    successor = again(settings(), [mark])
    successor.see_decision(0, 5, judged(1, 0.9, tenant="default"))
    successor.settle(10**7)
    assert successor.take() is None
    assert len(successor.blocked) == 1


def test_without_labels_a_mark_a_minute_is_enough() -> None:
    """Decisions alone are read again after a kill; that costs little."""
    ledger = Ledger(settings(), {}, MODEL)
    ledger.settle(100_000)
    ledger.see_decision(0, 0, None)
    assert ledger.take() is not None
    ledger.see_decision(0, 1, None)
    ledger.settle(130_000)
    assert ledger.take() is None
    ledger.settle(161_000)
    assert ledger.take() is not None
