"""A classifier that reads token probabilities: which class prompt makes the text likelier?

For each text a harmful and a harmless prompt is built (prompts.py); a helper says how likely a
language model finds each token of them; the log-probabilities of the text's own tokens become one
score a prompt, and two scores a probability. Log-probabilities (nats) are all that is used.

    score(text, class) = log mean over the class's prompts of exp(aggregate(text behind prompt))
    P_pos = sigmoid(slope * (score(text, harmful) - score(text, harmless)) + intercept)

The class-conditional form is noisy-channel prompting (Min et al. 2022, 2108.04106) and GeDi
(Krause et al. 2021, 2009.06367); both classes have the same prior.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np

from detectors.calibrate import sigmoid
from detectors.prompts import DEFAULT_LIMITS, ClassPrompts, Limits, body, prefix
from detectors.protocol import FloatArray, Passage

Aggregation = Literal["sum", "token", "byte"]

_ROUNDING: Final = 1e-3  # nats above 0 that a server's half precision may give
# The nearest to 0 and 1 that a probability counts as: 36 nats, what a double near 1 resolves.
_NEAREST: Final = float(np.finfo(np.float64).eps)


class HelperError(RuntimeError):
    """The helper gave no answer: unreachable, too slow, or refused."""


class Helper(Protocol):
    """A language model that says how likely it finds each token of a prompt."""

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        """log P(token | tokens before it), nats, in order: a list for each prompt, in order.

        A model that has nothing before a prompt's first token leaves that one out, of every
        prompt. Raises HelperError where there is no answer.
        """
        ...


@runtime_checkable
class Splitter(Protocol):
    """A helper that knows its tokens: then no prompt is scored only to count them."""

    def split(self, prefix: str, prompt: str) -> int:
        """How many log-probs of `prompt` belong to `prefix`, which it begins with.

        Raises ValueError where a token reaches over the seam.
        """
        ...


class Affine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What calibration does to a margin; logprob_calibration.py finds it."""

    slope: float = 1.0
    intercept: float = 0.0

    def apply(self, margins: FloatArray) -> FloatArray:
        """(N,) calibrated margins (log-odds, nats) of (N,) margins."""
        return self.slope * margins + self.intercept


IDENTITY: Final = Affine()


class LogProb:
    """Probability that a text is harmful. As thread-safe as its helper."""

    def __init__(
        self,
        helper: Helper,
        prompts: ClassPrompts,
        *,
        aggregation: Aggregation = "token",
        calibration: Affine = IDENTITY,
        limits: Limits = DEFAULT_LIMITS,
        tolerance: float = 0.1,
        chunk: int = 128,
        progress: bool = False,
    ) -> None:
        """Raises ValueError where a class has no prompt.

        tolerance: nats by which a prefix's token may score otherwise when text follows it; half
        precision and batching move a server's by some hundredths.
        chunk: texts that are held as prompts at a time, which bounds memory.
        progress: shows a bar on stderr.
        """
        if not prompts.harmful or not prompts.harmless or not all(prompts.ways):
            raise ValueError("each class needs a prompt, and none may be empty")
        if chunk < 1:
            raise ValueError("a chunk holds at least one text")
        self._helper = helper
        self._prompts = prompts
        self._aggregation = aggregation
        self._calibration = calibration
        self._limits = limits
        self._tolerance = tolerance
        self._chunk = chunk
        self._progress = progress

    def classify_batch(self, examples: list[str]) -> list[float]:
        """P_pos, 0..1, of each text without any conversation; of no texts, none.

        Raises ValueError for an empty text and for log-probs that are no such numbers, HelperError
        where the helper gives no answer.
        """
        return self.classify([Passage(example, "", ()) for example in examples])

    def classify(self, passages: Sequence[Passage]) -> list[float]:
        """P_pos, 0..1, of each passage in its conversation. Raises as `classify_batch`."""
        found = probabilities(self._calibration.apply(self.margins(passages)))
        return [float(one) for one in found]

    def margins(self, passages: Sequence[Passage]) -> FloatArray:
        """(N,) harmful score less harmless score, nats (a token, a byte), not calibrated."""
        if not all(passage.text for passage in passages):
            raise ValueError("an empty text has no probability")
        found = np.empty(len(passages))
        with _bar(len(passages), self._progress) as advance:
            for start in range(0, len(passages), self._chunk):
                part = passages[start : start + self._chunk]
                found[start : start + len(part)] = self._margins_of(part)
                advance(len(part))
        return found

    def _margins_of(self, passages: Sequence[Passage]) -> FloatArray:
        asked = [self._asked(passage, p) for passage in passages for p in self._prompts.ways]
        tails = self._tails(asked)
        scores = [
            aggregated(tail, self._aggregation, len(it.body.encode()))
            for it, tail in zip(asked, tails, strict=True)
        ]
        table = np.array(scores).reshape(len(passages), -1)  # (N, K), harmful prompts first
        harmful = len(self._prompts.harmful)
        return log_mean_exp(table[:, :harmful]) - log_mean_exp(table[:, harmful:])  # (N,)

    def _asked(self, passage: Passage, prompt: str) -> "_Asked":
        return _Asked(prefix(prompt, passage, self._limits), body(passage.text))

    def _tails(self, asked: "Sequence[_Asked]") -> list[list[float]]:
        """Log-probs of each text's own tokens.

        A helper without tokens is asked for the prefixes too: each once, however many texts follow.
        """
        wholes = [it.prefix + it.body for it in asked]
        if isinstance(self._helper, Splitter):
            cuts = [self._helper.split(it.prefix, it.prefix + it.body) for it in asked]
            return [row[cut:] for row, cut in zip(self._rows(wholes), cuts, strict=True)]
        prefixes = list(dict.fromkeys(it.prefix for it in asked))
        rows = self._rows(prefixes + wholes)
        alone = dict(zip(prefixes, rows, strict=False))
        return [
            text_part(alone[it.prefix], row, self._tolerance)
            for it, row in zip(asked, rows[len(prefixes) :], strict=True)
        ]

    def _rows(self, prompts: list[str]) -> list[list[float]]:
        rows = self._helper(prompts)
        if len(rows) != len(prompts):
            raise ValueError(f"the helper gave {len(rows)} lists for {len(prompts)} prompts")
        return rows


class _Asked(NamedTuple):
    """One text behind one prompt."""

    prefix: str
    body: str


def text_part(alone: Sequence[float], whole: Sequence[float], tolerance: float) -> list[float]:
    """Log-probs of the tokens behind a prefix: those of `whole` without those of the prefix.

    alone, whole: of the prefix by itself and of the prefix with its text, nats.
    It assumes that the prefix's tokens are the first tokens of the whole. A causal model then
    gives them the same log-probs, within `tolerance`; ValueError where they are not the same, and
    where nothing is left.
    """
    count = len(alone)
    if len(whole) <= count:
        raise ValueError(f"{len(whole)} log-probs, {count} of them the prompt's: none for the text")
    # `not (... <= ...)`: NaN must fail too.
    if not all(abs(a - w) <= tolerance for a, w in zip(alone, whole[:count], strict=True)):
        raise ValueError("the prompt's own tokens score otherwise with a text behind them")
    return list(whole[count:])


def aggregated(logprobs: Sequence[float], aggregation: Aggregation, text_bytes: int) -> float:
    """One score of a text's (T,) log-probs, nats: their sum, or their mean a token or a byte.

    text_bytes: of the text in UTF-8. Sums grow with length, and so do margins; a mean a token
    depends on the tokenizer, a mean a byte compares across models.
    Raises ValueError for no log-probs, and where one is NaN, infinite or positive.
    """
    if not logprobs or text_bytes < 1:
        raise ValueError("no log-probs: an empty text has no score")
    if not all(-math.inf < value <= _ROUNDING for value in logprobs):
        raise ValueError("the helper gave a log-prob that is NaN, infinite or positive")
    total = math.fsum(logprobs)
    divisors = {"sum": 1, "token": len(logprobs), "byte": text_bytes}
    return total / divisors[aggregation]


def log_mean_exp(scores: FloatArray) -> FloatArray:
    """(N,) log of the mean of exp over the last axis of (N, K) scores, nats; K at least 1.

    The maximum itself is subtracted, not the largest absolute value: one exponent is 0, the others
    are negative, so nothing overflows and the logarithm is of at least 1/K.
    Raises ValueError for no scores or one that is not finite.
    """
    if not scores.shape[-1] or not np.isfinite(scores).all():
        raise ValueError("no scores, or one that is not finite")
    highest = scores.max(axis=-1, keepdims=True)  # (N, 1)
    found: FloatArray = np.log(np.exp(scores - highest).mean(axis=-1)) + highest[..., 0]
    return found


def log_sum_exp(first: float, second: float) -> float:
    """log(exp(first) + exp(second)), nats. Raises ValueError where one is not finite."""
    if not (math.isfinite(first) and math.isfinite(second)):
        raise ValueError("a score is not finite")
    return max(first, second) + math.log1p(math.exp(-abs(first - second)))


def probability(harmful: float, harmless: float) -> float:
    """exp(harmful) / (exp(harmful) + exp(harmless)), 0..1, of two scores in nats.

    It is the sigmoid of their difference, so scores of -10,000 nats and equal ones are exact.
    Raises ValueError where one is not finite.
    """
    if not (math.isfinite(harmful) and math.isfinite(harmless)):
        raise ValueError("a score is not finite")
    found: float = probabilities(np.array([harmful - harmless]))[0]
    return float(found)


def probabilities(margins: FloatArray) -> FloatArray:
    """(N,) probabilities of (N,) margins, nats. Raises ValueError where one is not finite."""
    if not np.isfinite(margins).all():
        raise ValueError("a margin is not finite")
    return sigmoid(margins)


def accuracy(probabilities: Sequence[float], labels: Sequence[int]) -> float:
    """Share of right verdicts, 0..1; a probability of 0.5 or more says 1.

    Raises ValueError for nothing, different lengths, a label other than 0 and 1, and a probability
    that is NaN or outside 0..1.
    """
    given, truth = _checked(probabilities, labels)
    return float(((given >= 0.5) == (truth == 1)).mean())


def cross_entropy(probabilities: Sequence[float], labels: Sequence[int]) -> float:
    """Mean of -[y log p + (1 - y) log(1 - p)], nats, 0 or more. Raises as `accuracy`.

    Finite at p = 0 and 1: a probability counts as at least 2.2e-16 away from both (36 nats).
    """
    given, truth = _checked(probabilities, labels)
    near = np.clip(given, _NEAREST, 1.0 - _NEAREST)
    return float(-np.where(truth == 1, np.log(near), np.log1p(-near)).mean())


def log_sigmoid(margins: FloatArray) -> FloatArray:
    """log P_pos of margins, nats, same shape; exact where P_pos itself is 0 or 1."""
    return np.minimum(margins, 0.0) - np.log1p(np.exp(-np.abs(margins)))


def _checked(
    probabilities: Sequence[float], labels: Sequence[int]
) -> tuple[FloatArray, FloatArray]:
    given, truth = np.asarray(probabilities, dtype=float), np.asarray(labels, dtype=float)
    if given.ndim != 1 or given.shape != truth.shape or not len(given):
        raise ValueError(
            f"{given.shape} probabilities and {truth.shape} labels: need as many, >= 1"
        )
    if not ((given >= 0.0) & (given <= 1.0)).all():
        raise ValueError("a probability is NaN or outside 0..1")
    if not ((truth == 0.0) | (truth == 1.0)).all():
        raise ValueError("a label is neither 0 nor 1")
    return given, truth


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """Yields what is told of progress; the bar is on stderr, since results go to stdout."""
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("texts", total=total)
        yield lambda count: progress.advance(task, count)
