"""Tables once, shown twice: on the terminal and in Markdown."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from training.metrics import Interval


class Table(NamedTuple):
    """Rows of raw values; a row of one cell is a heading of those below it."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""
    left: int = 1  # columns of text, from the left


def show(table: Table, console: Console) -> None:
    """Prints it, a heading as a line of its own."""
    filled = [tuple(map(cell, row)) for row in table.rows]
    whole = [table.header, *(row for row in filled if len(row) > 1)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    console.print(f"\n{table.title}", style="bold", highlight=False)
    console.print(_aligned(table, table.header, widths), style="dim", soft_wrap=True)
    for row in filled:
        if len(row) == 1:
            console.print(f"{row[0]}", style="bold cyan", highlight=False)
        else:
            console.print(_aligned(table, row, widths), soft_wrap=True)
    if table.note:
        console.print(table.note, style="dim", highlight=False)


def _aligned(table: Table, row: Sequence[str], widths: Sequence[int]) -> Text:
    """Numbers to the right, so that they stand below each other."""
    cells = [
        text.ljust(width) if i < table.left else text.rjust(width)
        for i, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return Text("  " + "  ".join(cells), no_wrap=True)


def markdown(table: Table, level: int = 2) -> str:
    """The same, as Markdown."""
    marks = ("---",) * table.left + ("---:",) * (len(table.header) - table.left)
    filled = (row if len(row) > 1 else _heading(row, len(table.header)) for row in table.rows)
    lines = [table.header, marks, *(tuple(map(cell, row)) for row in filled)]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    note = f"\n\n{table.note}" if table.note else ""
    return f"{'#' * level} {table.title}\n\n{drawn}{note}"


def plain(table: Table) -> list[dict[str, Any]]:
    """The rows as objects, for JSON: NaN is null, an interval its three numbers."""
    view, found = "", []
    for row in table.rows:
        if len(row) == 1:
            view = row[0]
        else:
            named = zip(table.header, row, strict=True)
            found.append({"view": view} | {name: _plain(value) for name, value in named})
    return found


def cell(value: Any) -> str:
    """As the tables write it."""
    match value:
        case Interval():
            return cell(value.value) if math.isnan(value.low) else _interval(value)
        case float():
            return "-" if math.isnan(value) else _short(value)
        case None:
            return "-"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _interval(value: Interval) -> str:
    return f"{_short(value.value)} [{_short(value.low)}, {_short(value.high)}]"


def _short(value: float) -> str:
    """Three digits after the point, none before it where it is 0: .917, 1.000, .004."""
    return f"{value:.3f}".removeprefix("0") if value >= 0 else f"{value:.3f}"


def _heading(row: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    return (f"**{row[0]}**", *("",) * (width - 1))


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return round(value, 5) if math.isfinite(value) else None
    return value
