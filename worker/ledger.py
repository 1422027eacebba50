"""What the leading learner knows: labels in; evidence, thresholds and dead letters out. Pure.

    replay      an entry of the ledger, as it was done      -> evidence
    see_...     a review item, a decision                   -> what labels are held against
    hear        a label, in the order of the log            -> evidence, perhaps a dead letter
    settle      up to an instant                            -> tests, perhaps thresholds
    take        what the next transaction publishes

Replaying does what was done, at the same instants, so that a learner which was killed goes on as if
it had not been: docs/learn.md. Whatever `take` returned and was not committed is lost with this
object.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from detectors.harms import DEFAULT_THRESHOLDS, OTHER
from worker.certify import propose, shipped, spoken_of
from worker.decode import decode_label
from worker.errors import Stop, Unreadable
from worker.events import DeadLetter, Label, ThresholdRecord
from worker.feedback import Accepted, Claim, Evidence, Judged, Rejected
from worker.merge import Raw
from worker.sampling import NOT_SCORED
from worker.settings import Settings

_QUIET_MARK_MS = 60_000  # how often counts of blocks are written while no label comes
_KEPT = {"complaint", "picked with less than min_picked"}  # no evidence, and still known of later


class Heard(msgspec.Struct, frozen=True, tag="heard", tag_field="kind"):
    """A label that was taken. It matches `judged`, whose scores are cut down to the label's."""

    at_ms: int  # the clock when it was taken
    reviewer: str
    harm: str
    harmful: bool
    complaint: bool
    judged: Judged

    @property
    def label(self) -> Label:
        """The label as it came."""
        judged = self.judged
        return Label(
            judged.decision_id, judged.stream_id, self.harm, judged.score_of(self.harm) or 0.0,
            self.harmful, self.reviewer, judged.tenant,
            None if self.complaint else judged.picked_with,
        )  # fmt: skip


class Published(msgspec.Struct, frozen=True, tag="published", tag_field="kind"):
    """A threshold that was published."""

    record: ThresholdRecord
    test: int = 0  # the number of the test that led to it; 0: an operator's word


class Place(NamedTuple):
    """How far a partition's labels are taken."""

    offset: int  # the next one
    at_ms: int  # the last one's time: its successor's is not before it


class Mark(msgspec.Struct, frozen=True, tag="mark", tag_field="kind"):
    """Where to go on, and what was counted since the last mark."""

    clock_ms: int = 0  # everything is settled up to here
    feedback: dict[int, Place] = {}  # by partition
    decisions: dict[int, int] = {}  # partition -> next offset
    blocked: list[tuple[Claim, int]] = []


Entry = Heard | Published | Mark


class Output(NamedTuple):
    """What one transaction publishes."""

    entries: list[Entry]  # the mark comes last
    thresholds: list[ThresholdRecord]
    dead_letters: list[DeadLetter]


class Register:
    """The latest decisions that a label may be about, of one kind."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[str, bytes] = OrderedDict()  # packed: objects take five times more

    def __len__(self) -> int:
        return len(self._known)

    def remember(self, judged: Judged) -> None:
        """Add it, at the cost of the oldest one."""
        self._known[judged.decision_id] = _packer.encode(judged)
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def find(self, decision_id: str) -> Judged | None:
        """The decision, if it is among them."""
        packed = self._known.get(decision_id)
        return None if packed is None else _unpacker.decode(packed)


class Ledger:
    """Evidence, records, register and what is not published yet."""

    def __init__(self, settings: Settings, shipped_with: Mapping[str, float], model: str) -> None:
        """shipped_with: the thresholds that `model` brings. model: as decisions name it."""
        self._settings = settings
        self._shipped = {**DEFAULT_THRESHOLDS, **shipped_with}
        self._model = model
        self._evidence = Evidence(lambda tenant: settings.tenant(tenant).learn)
        self._records: dict[tuple[str, str], ThresholdRecord] = {}  # by tenant and harm
        self._learnt: dict[Claim, ThresholdRecord] = {}  # the last that was learnt from its model
        self._versions: dict[str, int] = {}  # the latest, by tenant
        self._tests = 0  # since the ledger began
        self._replaying: _Settling | None = None
        self.picked = Register(settings.learn_register)
        self.blocked = Register(settings.learn_register)
        self.clock_ms = 0
        self.feedback: dict[int, Place] = {}  # by partition
        self.decisions: dict[int, int] = {}  # partition -> next offset
        self._entries: list[Entry] = []
        self._thresholds: list[ThresholdRecord] = []
        self._letters: list[DeadLetter] = []
        self._letters_in_row = 0
        self._blocks: dict[Claim, int] = {}  # since the last mark
        self._marked = (0, 0)  # tests and clock of the last mark
        self._moved = False  # offsets, since the last mark

    # -- what was done ------------------------------------------------------------------------

    def replay(self, entry: Entry) -> None:
        """Do what the entry says was done."""
        if isinstance(entry, Published):
            self._replay_test(entry)
            return
        self._finish_replay()
        if isinstance(entry, Heard):
            self.clock_ms = entry.at_ms
            self._settle_unseen(entry.at_ms)
            self._add(entry.label, entry.judged)
            self._settle_unseen(entry.at_ms)
            return
        self.clock_ms = max(self.clock_ms, entry.clock_ms)
        self._settle_unseen(self.clock_ms)
        self._count(entry.blocked)
        self.feedback.update(entry.feedback)
        self.decisions.update(entry.decisions)

    def replayed(self) -> None:
        """The ledger is read to its end."""
        self._finish_replay()
        self._marked = (self._tests, self.clock_ms)

    def is_known(self, record: ThresholdRecord) -> bool:
        """Whether the ledger has a record of the thresholds topic; if not, it does now."""
        latest = self._records.get((record.tenant, record.harm))
        if latest is not None and record.version <= latest.version:
            return True
        self._put_in_force(record)
        return False

    def _replay_test(self, entry: Published) -> None:
        """Settle as far as the test that led to it: what comes later was under its threshold."""
        at_ms = entry.record.ts_ms
        if entry.test:
            if self._replaying is None or self._replaying.at_ms != at_ms:
                self._finish_replay()
                self._replaying = _Settling(at_ms, self._evidence)
            while self._tests < entry.test and self._replaying.step():
                self._tests += 1
        self._put_in_force(entry.record)

    def _finish_replay(self) -> None:
        if self._replaying is not None:
            while self._replaying.step():
                self._tests += 1
            self._replaying = None

    def _settle_unseen(self, at_ms: int) -> None:
        for _ in self._evidence.settle(at_ms):
            self._tests += 1

    # -- decisions ----------------------------------------------------------------------------

    def see_review(self, judged: Judged) -> None:
        """A decision that was picked for review."""
        self.picked.remember(judged)

    def see_decision(self, partition: int, offset: int, judged: Judged | None) -> None:
        """The next decision of a partition. judged: None where nothing was above a threshold."""
        is_new = offset >= self.decisions.get(partition, 0)  # not read again for the register alone
        if judged is not None:
            self.blocked.remember(judged)
        if not is_new:
            return
        self.decisions[partition] = offset + 1
        self._moved = True
        if judged is not None and judged.harm is not None and judged.stage not in NOT_SCORED:
            self._block(Claim(judged.tenant, judged.harm, judged.model))

    def _block(self, claim: Claim) -> None:
        """Count a block of a tenant that is known: names come from outside, in any number."""
        named = claim.tenant in self._settings.tenants or claim.tenant == "default"
        if named or (claim.tenant, claim.harm) in self._records:
            self._blocks[claim] = self._blocks.get(claim, 0) + 1

    def _count(self, blocked: list[tuple[Claim, int]]) -> None:
        """Blocks of a while, at its end: whatever score each had, it was above the threshold."""
        for claim, times in blocked:
            self._ensure(claim.tenant, claim.harm)
            judged = Judged(
                "", "", claim.tenant, claim.model, "", claim.harm, {claim.harm: 1.0}, 1.0,
                self.clock_ms,
            )  # fmt: skip
            for _ in range(times):
                self._evidence.blocked(judged)

    # -- labels -------------------------------------------------------------------------------

    def hear(self, raw: Raw, *, is_last_try: bool) -> bool:
        """Take the log's next label; whether it is done with.

        It is not while its decision is unknown: have the register read on, and come again, the
        last time with `is_last_try`. Raises Stop where too many in a row are dead letters.
        """
        try:
            label = decode_label(raw.value)
        except Unreadable as error:
            self._bury(raw, error.reason, error.field)
            return True
        judged = self.picked.find(label.decision_id) or self.blocked.find(label.decision_id)
        if judged is None and not is_last_try:
            return False
        self._hear(raw, label, judged)
        return True

    def _hear(self, raw: Raw, label: Label, judged: Judged | None) -> None:
        self.clock_ms = max(self.clock_ms, raw.at_ms)
        self._settle(self.clock_ms)
        heard = self._stranger(label, judged) or self._add(label, judged)
        if isinstance(heard, Rejected) or judged is None:
            self._bury(raw, *heard)
            return
        self._pass(raw)
        self._letters_in_row = 0
        if heard.counts or heard.why in _KEPT:
            self._entries.append(_heard(self.clock_ms, label, judged))
            self._settle(self.clock_ms, complained=True)  # an alarm by complaints rings at once

    def _stranger(self, label: Label, judged: Judged | None) -> Rejected | None:
        """Asked only of labels that come, not of those in the ledger: what counted counts."""
        if judged is None or label.picked_with is None:  # anybody may complain
            return None
        reviewers = self._settings.tenant(judged.tenant).learn.reviewers
        if not reviewers or label.reviewer in reviewers:
            return None
        return Rejected("is none of the tenant's reviewers", "reviewer")

    def _add(self, label: Label, judged: Judged | None) -> Accepted | Rejected:
        if judged is not None:
            self._ensure(judged.tenant, label.harm)
        return self._evidence.add(label, judged, self.clock_ms)

    def _pass(self, raw: Raw) -> None:
        self.feedback[raw.partition] = Place(raw.offset + 1, raw.at_ms)
        self._moved = True

    def _bury(self, raw: Raw, reason: str, field: str) -> None:
        self._pass(raw)
        self._letters.append(
            DeadLetter(
                self._settings.feedback_topic, raw.partition, raw.offset, raw.key, raw.value,
                reason, field,
            )
        )  # fmt: skip
        self._letters_in_row += 1
        if self._letters_in_row > self._settings.max_dead_letters_in_row:
            where = f"{self._settings.feedback_topic}-{raw.partition}"
            msg = (
                f"{where}: {self._letters_in_row} labels in a row are refused up to offset "
                f"{raw.offset}, the last because: {field} {reason}. Mend the review tool, or raise "
                "max_dead_letters_in_row."
            )
            raise Stop(msg)

    # -- tests --------------------------------------------------------------------------------

    def settle(self, now_ms: int) -> None:
        """Test what is due, now that no label before `now_ms` will come."""
        if now_ms > self.clock_ms:
            self.clock_ms = now_ms
            self._settle(now_ms)

    def _settle(self, at_ms: int, complained: bool = False) -> None:
        for claim in self._evidence.settle(at_ms):
            self._tests += 1
            record = self._propose(claim, at_ms if complained else None)
            if record is not None:
                self._thresholds.append(record)
                self._entries.append(Published(record, self._tests))
                self._put_in_force(record)

    def _propose(self, claim: Claim, now_ms: int | None) -> ThresholdRecord | None:
        """now_ms: by default the instant at which the claim's last decision was settled, so that
        a record does not say when somebody happened to look."""
        policy = self._settings.tenant(claim.tenant)
        if claim.model != self._model or claim.harm in policy.thresholds:
            return None  # of a model that does not serve, or fixed in the settings
        self._ensure(claim.tenant, claim.harm)
        current = self._records[claim.tenant, claim.harm]
        current = spoken_of(current, claim.model, self._learnt.get(claim))
        tally = self._evidence.snapshot(claim)
        now_ms = tally.settled_ms if now_ms is None else now_ms
        record = propose(tally, policy.learn, current, now_ms)
        if record is None:
            return None
        version = self._versions.get(claim.tenant, 0) + 1
        return msgspec.structs.replace(record, version=version, ts_ms=now_ms)

    def _put_in_force(self, record: ThresholdRecord) -> None:
        self._records[record.tenant, record.harm] = record
        if record.learnt_from:
            self._learnt[Claim(record.tenant, record.harm, record.learnt_from)] = record
        latest = max(record.version, self._versions.get(record.tenant, 0))
        self._versions[record.tenant] = latest
        self._evidence.in_force(record)

    def _ensure(self, tenant: str, harm: str) -> None:
        """What nothing is published for, for this model, is as shipped.

        A model that comes back starts from what it ships too; but what labels have shown of it
        holds, and its epochs have spent their part of delta.
        """
        record = self._records.get((tenant, harm))
        if harm in self._shipped and (record is None or record.model not in {"", self._model}):
            version = record.version if record else 0
            start = self._settings.tenant(tenant).thresholds.get(harm, self._shipped[harm])
            begun = shipped(tenant, harm, self._model, start, version)
            known = self._learnt.get(Claim(tenant, harm, self._model))
            self._put_in_force(spoken_of(begun, self._model, known))

    # -- out ----------------------------------------------------------------------------------

    def take(self, drain: bool = False) -> Output | None:
        """What the next transaction publishes; None where nothing is due."""
        tests, clock_ms = self._marked
        late = self._moved and (drain or self.clock_ms - clock_ms >= _QUIET_MARK_MS)
        if not (self._entries or self._letters or self._tests != tests or late):
            return None
        blocked = list(self._blocks.items())
        self._count(blocked)
        mark = Mark(self.clock_ms, dict(self.feedback), dict(self.decisions), blocked)
        output = Output([*self._entries, mark], self._thresholds, self._letters)
        self._entries, self._thresholds, self._letters, self._blocks = [], [], [], {}
        self._marked, self._moved = (self._tests, self.clock_ms), False
        return output


class _Settling:
    """A settling that is interrupted where a record was put in force."""

    def __init__(self, at_ms: int, evidence: Evidence) -> None:
        self.at_ms = at_ms
        self._claims = evidence.settle(at_ms)

    def step(self) -> bool:
        """Go on to the next test; whether there was one."""
        return next(self._claims, None) is not None


def _heard(at_ms: int, label: Label, judged: Judged) -> Heard:
    score = judged.scores.get(label.harm)
    return Heard(
        at_ms, label.reviewer, label.harm, label.harmful, label.picked_with is None,
        judged._replace(
            scores={} if score is None else {label.harm: score},
            harmful=judged.harmful if label.harm == OTHER else None,
        ),
    )  # fmt: skip


_packer = msgspec.msgpack.Encoder()
_unpacker = msgspec.msgpack.Decoder(Judged)
