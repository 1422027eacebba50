"""One checkpoint, one or two detectors: toxicity reads a segment alone, context all before it too.

Both run the same graph. How their scores become one is learnt in export/combined.py.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
from tqdm import tqdm

from detectors.protocol import FloatArray, Passage
from detectors.session import View
from detectors.tokens import PairTokens
from export.parity import LogitsOf
from training.measure import Scored, stacked
from training.rows import Row
from training.windows import judged

VIEWS: Final[Mapping[str, View]] = {
    "toxicity": "segment",
    "context": "whole",
    "context_large": "whole",  # the same of a larger base, asked last
}
_SEEN: Final[Mapping[str, Callable[[Passage], Passage]]] = {
    "toxicity": lambda whole: Passage(whole.text, "", ()),
    "context": lambda whole: whole,
    "context_large": lambda whole: whole,
}


class Read(NamedTuple):
    """Rows and the logits of their segments, (S, V, 7) each; V: views, as they were asked for."""

    rows: list[Row]
    logits: list[FloatArray]

    def by(self, view: int) -> Scored:
        """The highest logits of one view over each row's segments."""
        return Scored(self.rows, stacked([one[:, view].max(axis=0) for one in self.logits]))


def read(
    rows: Sequence[Row], tokens: PairTokens, logits_of: LogitsOf, views: Sequence[str], threads: int
) -> Read:
    """Every segment of every row through the graph, in each view (of VIEWS)."""

    def of_passage(passage: Passage) -> FloatArray:
        windows = [logits_of(window) for window in tokens.encode(passage).windows]
        return np.stack(windows).max(axis=0)  # (7,)

    def of_row(row: Row) -> FloatArray:
        return np.stack([
            np.stack([of_passage(_SEEN[view](whole)) for view in views]) for whole in judged(row)
        ])  # (S, V, 7)  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        found = list(tqdm(pool.map(of_row, rows), total=len(rows), mininterval=10))
    return Read(list(rows), found)
