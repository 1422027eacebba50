"""How the demo looks: live panels in a terminal, a line an event where there is none.

Both are told the same: a stream opens, text is released, a segment is decided, a stream ends.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
from rich.box import ROUNDED, SIMPLE_HEAD
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.status import Status
from rich.table import Table
from rich.text import Text

from worker.events import Decision, ThresholdRecord, TurnRecord
from worker.guarded import Guarded

TEXT_LINES = 5  # of a panel
_PANEL_LINES = TEXT_LINES + 2
_AROUND = 10  # lines of header, latest results and footer
_MOST_PANELS = 3  # what somebody can follow at once

HELD, WITHHELD = "bright_black italic", "red strike"


class Sample(msgspec.Struct, frozen=True):
    """A conversation and the answer that a model gives; `should` is the author's opinion."""

    name: str
    should: str  # allow, block
    context: tuple[TurnRecord, ...]
    text: str


class Show:
    """One sample on its way through the gate."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.guarded: Guarded | None = None
        self.shown = ""
        self.decisions: list[Decision] = []
        self.held_ms: list[float] = []  # a segment: from its completion to its decision
        self.error = ""
        self.done = False
        self._generated: list[tuple[int, float]] = []  # length, monotonic seconds

    def generated(self, length: int) -> None:
        """The model has produced so many characters by now."""
        self._generated.append((length, time.monotonic()))

    @property
    def length(self) -> int:
        """Characters that the model has produced."""
        return self._generated[-1][0] if self._generated else 0

    def decided(self, decision: Decision) -> None:
        """Note a decision and how long it held complete text back."""
        now = time.monotonic()
        self.decisions.append(decision)
        # Complete is a segment when a character behind it is there, or the text has ended.
        complete = (at for length, at in self._generated if length > decision.end)
        self.held_ms.append((now - next(complete, self._generated[-1][1])) * 1e3)

    @property
    def question(self) -> str:
        """What the user said last."""
        return self.sample.context[-1].content if self.sample.context else ""

    @property
    def verdict(self) -> str:
        """The stream's, or the reason why there is none."""
        return (self.guarded.verdict if self.guarded else None) or self.error or "open"

    @property
    def stopped(self) -> bool:
        """Whether a decision ended it before its end."""
        return self.verdict in {"block", "revise"}

    @property
    def as_it_should(self) -> bool:
        """Whether the verdict is the one that the sample's author expects."""
        return self.verdict == self.sample.should

    @property
    def withheld(self) -> str:
        """The segment that was judged harmful."""
        if not (self.stopped and self.guarded and self.decisions):
            return ""
        last = self.decisions[-1]
        return self.guarded.held[: last.end - last.start]

    @property
    def partition(self) -> int | None:
        """Where its deltas went: a decision's id names it."""
        if not self.decisions:
            return None
        return int(self.decisions[-1].decision_id.rsplit("-", 3)[1])


class Board:
    """Everything there is to show."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.shows = [Show(sample) for sample in samples]
        self.workers: list[list[int]] = []  # partitions of each
        self.labels: Callable[[], int] = lambda: 0  # how many a reviewer has given
        self.learnt: list[ThresholdRecord] = []

    @property
    def finished(self) -> list[Show]:
        """Those that have their verdict."""
        return [show for show in self.shows if show.done]

    @property
    def over(self) -> bool:
        """Whether every sample was played."""
        return all(show.done for show in self.shows)

    def counts(self) -> str:
        """One line of figures."""
        verdicts = Counter(show.verdict for show in self.finished)
        decisions = [decision for show in self.shows for decision in show.decisions]
        held = sorted(ms for show in self.shows for ms in show.held_ms)
        parts = [f"{len(self.finished)} of {len(self.shows)} answers"]
        parts += [f"{verdicts[name]} {said}" for name, said in _SAID.items() if verdicts[name]]
        parts.append(f"{len(decisions)} segments")
        if held:
            parts.append(f"held {_at(held, 0.5):.0f} ms (p50), {_at(held, 0.95):.0f} ms (p95)")
        return "  ·  ".join(parts)

    def spread(self) -> str:
        """One line about who does the work."""
        streams = Counter(show.partition for show in self.shows if show.partition is not None)
        pins = ", ".join(f"{number}: {streams[number]}" for number in sorted(streams))
        workers = " + ".join(str(len(numbers)) for numbers in self.workers)
        count = sum(map(len, self.workers))
        return (
            f"{len(self.workers)} workers share {count} partitions ({workers})"
            f"  ·  answers by partition  {pins}"
        )

    def taught(self) -> str:
        """One line about labels, and what was learnt of them."""
        moves = [_moved(record) for record in self.learnt]
        return "  ·  ".join([f"{self.labels()} blocks labelled by a reviewer", *moves])


def _moved(record: ThresholdRecord) -> str:
    harm = record.harm.replace("_", " ")
    return f"{harm} {record.previous:.3f} → {record.threshold:.3f} (version {record.version})"


_SAID = {"allow": "allowed", "block": "blocked", "revise": "revised"}


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class View(Protocol):
    """What the demo tells."""

    panels: int  # streams that can be shown at once
    linger_s: float  # how long a finished one stays

    def progress(self, what: str) -> None:
        """Something of the start-up is under way."""
        ...

    def begin(self) -> None:
        """The system is up; streams follow."""
        ...

    def opened(self, show: Show) -> None:
        """The model starts to answer."""
        ...

    def released(self, show: Show, piece: str) -> None:
        """The piece may be shown."""
        ...

    def decided(self, show: Show) -> None:
        """Its last decision is new."""
        ...

    def ended(self, show: Show) -> None:
        """It has its verdict, and was on the screen long enough."""
        ...

    def learnt(self, record: ThresholdRecord) -> None:
        """Labels have moved a threshold."""
        ...

    def tick(self) -> None:
        """Time for another look."""
        ...

    def finish(self) -> None:
        """All is over: leave what is worth keeping."""
        ...

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        ...


def view_for(console: Console, board: Board) -> View:
    """Panels where there is room for one, else lines."""
    if (
        console.is_terminal
        and not console.is_dumb_terminal
        and console.height >= _PANEL_LINES + _AROUND
    ):
        return _Panels(console, board)
    return _Lines(console, board)


class _Panels:
    """Panels for the streams under way, the latest results, the figures."""

    linger_s = 0.9

    def __init__(self, console: Console, board: Board) -> None:
        self._console = console
        self._board = board
        self.panels = min(_MOST_PANELS, (console.height - _AROUND) // _PANEL_LINES)
        self._slots: list[Show | None] = [None] * self.panels
        self._results: list[Show] = []
        self._status: Status | None = None
        self._live: Live | None = None

    def progress(self, what: str) -> None:
        if self._status is None:
            self._status = self._console.status("", spinner="dots")
            self._status.start()
        self._status.update(f"[bold]tidegate demo[/]  {escape(what)}")

    def begin(self) -> None:
        self._stop_status()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()
        self.tick()

    def opened(self, show: Show) -> None:
        self._slots[self._slots.index(None)] = show

    def released(self, show: Show, piece: str) -> None:
        """Nothing: the next tick shows it."""

    def decided(self, show: Show) -> None:
        """Nothing: the next tick shows it."""

    def ended(self, show: Show) -> None:
        self._slots[self._slots.index(show)] = None
        self._results.append(show)

    def learnt(self, record: ThresholdRecord) -> None:
        """Nothing: the next tick shows it."""

    def tick(self) -> None:
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)

    def finish(self) -> None:
        self._stop_live()
        self._console.print(_summary(self._board))

    def close(self) -> None:
        self._stop_status()
        self._stop_live()

    def _stop_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _screen(self) -> RenderableType:
        latest = self._results[-4:]
        rows: list[RenderableType] = [_LEGEND]
        rows += [_panel(show, self._console.width) for show in self._slots]
        rows += [_result_line(show, self._console.width) for show in latest]
        rows += [Text("")] * (5 - len(latest))
        figures = (self._board.counts(), self._board.spread(), self._board.taught())
        rows += [_cropped(line) for line in figures]
        return Group(*rows)


_LEGEND = Text.assemble(
    ("Tidegate", "bold"), "  text is ", "released", " once it is judged, ", ("held", HELD),
    " until then, ", ("withheld", WITHHELD), " where it is harmful",
)  # fmt: skip


def _panel(show: Show | None, width: int) -> RenderableType:
    if show is None:
        return Panel("", box=ROUNDED, height=_PANEL_LINES, border_style="bright_black")
    colour = {"allow": "green", "block": "red", "revise": "yellow", "open": "cyan"}
    border = colour.get(show.verdict, "yellow")
    return Panel(
        _body(show), box=ROUNDED, height=_PANEL_LINES, border_style=border, title_align="left",
        title=Text(_fitted(f"User: {show.question}", width - 8), style="bold"),
        subtitle=Text.from_markup(_state(show)), subtitle_align="right",
    )  # fmt: skip


def _body(show: Show) -> Text:
    text = Text(show.shown)
    if show.stopped:
        return text.append(show.withheld, WITHHELD)
    return text.append(show.guarded.held if show.guarded else "", HELD)


def _state(show: Show) -> str:
    """Markup for the lower border: how far it is, or how it ended."""
    if show.verdict == "open":
        if not show.decisions:
            return "[bright_black]held: its first segment is not complete[/]"
        last = show.decisions[-1]
        return f"[cyan]segment {last.segment + 1} released[/] [bright_black]· {_figures(show)}[/]"
    if show.verdict == "allow":
        return f"[green]✔ allowed[/] [bright_black]· {_figures(show)}[/]{_opinion(show)}"
    if show.stopped:
        return (
            f"[red]✖ {_SAID[show.verdict]}: {escape(_why(show.decisions[-1]))}[/]{_opinion(show)}"
        )
    return f"[yellow]{escape(show.verdict)}[/]"


def _brief(show: Show) -> str:
    """Markup for the table: narrower."""
    if show.verdict == "allow":
        harmful = max((d.harmful or 0.0 for d in show.decisions), default=0.0)
        return f"[green]✔[/] harmful {harmful:.2f}{_opinion(show)}"
    if show.stopped:
        return f"[red]✖ {escape(_why(show.decisions[-1]))}[/]{_opinion(show)}"
    return _state(show)


def _opinion(show: Show) -> str:
    if show.as_it_should:
        return ""
    said = "missed" if show.sample.should == "block" else "false alarm"
    return f" [bold yellow]← {said}[/]"


def _why(decision: Decision) -> str:
    """The harm with its score and threshold, what settled it."""
    name = f"{decision.harm}: " if decision.harm == "other" else ""
    said = f"{name}{decision.reason} · {decision.stage}"
    return said.replace(" above ", " > ").replace("_", " ")


def _figures(show: Show) -> str:
    """Highest scores of the stream's segments."""
    highest: dict[str, float] = {}
    for decision in show.decisions:
        for harm, score in decision.scores.items():
            highest[harm] = max(highest.get(harm, 0.0), score)
    harmful = max((d.harmful or 0.0 for d in show.decisions), default=0.0)
    parts = [f"harmful {harmful:.2f}"]
    if highest:
        harm = max(highest, key=lambda name: highest[name])
        parts.append(f"{harm.replace('_', ' ')} {highest[harm]:.2f}")
    return ", ".join(parts)


def _result_line(show: Show, width: int) -> Text:
    line = Text.from_markup(f" {_state(show)}  ", overflow="ellipsis")
    room = width - cell_len(line.plain) - 1
    if room > 8:
        line.append(_fitted(show.question, room), "bright_black")
    line.no_wrap = True
    return line


def _fitted(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def _cropped(text: str) -> Text:
    return Text(text, no_wrap=True, overflow="ellipsis")


def _summary(board: Board) -> RenderableType:
    """A line for each answer, and the figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("user asked", no_wrap=True, overflow="ellipsis", max_width=32)
    table.add_column("shown", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True, overflow="ellipsis")
    table.add_column("held", justify="right", no_wrap=True)
    for show in board.shows:
        shown = f"{len(show.shown)}/{len(show.sample.text)}"
        held = f"{max(show.held_ms):.0f} ms" if show.held_ms else ""
        table.add_row(Text(show.question), shown, Text.from_markup(_brief(show)), held)
    return Group(table, Text(board.counts()), Text(board.spread()), Text(board.taught()))


class _Lines:
    """One line an event, for pipes and logs."""

    panels = 3
    linger_s = 0.0

    def __init__(self, console: Console, board: Board) -> None:
        self._console = console
        self._board = board
        self._begun = time.monotonic()
        self._segments: dict[str, int] = {}

    def progress(self, what: str) -> None:
        self._line("", what)

    def begin(self) -> None:
        self._line("", "the system is up")

    def opened(self, show: Show) -> None:
        self._line(show.sample.name, f"user      {show.question}")

    def released(self, show: Show, piece: str) -> None:
        self._line(show.sample.name, f"released  {piece.strip()}")

    def decided(self, show: Show) -> None:
        """A block is worth a line; an allow shows in what it releases."""
        last = show.decisions[-1]
        if last.verdict != "allow":
            text = show.guarded.held[: last.end - last.start] if show.guarded else ""
            self._line(show.sample.name, f"{_SAID[last.verdict]:<9} {text.strip()}")
            self._line(show.sample.name, f"because   {_why(last)}")

    def ended(self, show: Show) -> None:
        told = Text.from_markup(_opinion(show)).plain
        shown = f"{len(show.shown)} of {len(show.sample.text)} characters shown"
        held = f", held {max(show.held_ms):.0f} ms at most" if show.held_ms else ""
        self._line(show.sample.name, f"ended     {show.verdict}; {shown}{held}{told}")

    def learnt(self, record: ThresholdRecord) -> None:
        self._line("", f"learnt    {_moved(record)}: {record.reason}")

    def tick(self) -> None:
        """Nothing: everything was told."""

    def finish(self) -> None:
        self._line("", self._board.counts())
        self._line("", self._board.spread())
        self._line("", self._board.taught())

    def close(self) -> None:
        """Nothing to give back."""

    def _line(self, name: str, what: str) -> None:
        passed = time.monotonic() - self._begun
        # As a Text: what a model says is no markup.
        self._console.print(Text(f"{passed:5.1f} s  {name:<10} {what}"), soft_wrap=True)
