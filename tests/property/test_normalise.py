"""Folding and keyword search over any text and any cutting of it."""

from itertools import combinations, pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from detectors.keywords import Entry, Keywords
from detectors.normalise import fold, is_leet, normalise, strip_invisible, unleet

# Characters that make trouble: what folds to nothing, to one space, to several characters, to
# another letter, to part of a syllable, and halves of surrogate pairs.
TROUBLE = (
    "abikls 015!$@-_\n\t'.\u200b\u200d\u0301\u034f\ufe0f\xad\x00ﷺ㎏ﬀÅé´１Ｋ"
    "кіΙ𝔨🅺🇮か\u3099ば한ᄒ\u1161\u11ab中词ก\u0e31कि\u094d\ud83d\ude00’–"
)
any_text = st.text(st.characters() | st.characters(categories=["Cs", "Cf", "Mn"]), max_size=40)
trouble = st.text(st.sampled_from(TROUBLE), max_size=30)
texts = any_text | trouble

TERMS = ("kill", "kil", "ill", "a", "as", "bikila", "kill a b", "a-b", "中", "词中", "か", "한",
         "है", "kg", "s", "15", "कि", "'", "l.l", "ass", "صلى الله")  # fmt: skip
KEYWORDS = Keywords(
    [Entry("violence", "block", fold(term).strip()) for term in TERMS if term != "'"], "digest"
)


@st.composite
def term_like(draw: st.DrawFn) -> str:
    """Terms of the list, spelt with noise and put together."""
    pieces = []
    for char in "".join(draw(st.lists(st.sampled_from([*TERMS, " ", " "]), max_size=6))):
        spelling = draw(st.sampled_from([char, char, char.upper(), SPELLINGS.get(char, char)]))
        pieces.append(spelling + draw(st.sampled_from(["", "", "", "\u200b", "\u0301", "!"])))
    return "".join(pieces)


SPELLINGS = {"k": "𝔨", "i": "1", "l": "Ⅼ", "a": "@", "s": "$", " ": " \n\u200b -  ", "b": "8"}


@given(texts)
@example("ﷺ" * 3)
@example("\u0301a")
def test_map_covers_the_text_in_order(text: str) -> None:
    """Every folded character maps to a span of the original; spans rise and leave no gap."""
    folded = normalise(text)
    spans = [folded.span(i, i) for i in range(len(folded.text))]
    assert all(0 <= start < end <= len(text) for start, end in spans)
    for (start, end), (next_start, next_end) in pairwise(spans):
        assert end == next_start or (start == next_start and end <= next_end)
    if spans:
        assert fold(text[: spans[0][0]]) == ""
        assert spans[-1][1] == len(text)


@given(texts)
def test_span_of_a_character_folds_to_it(text: str) -> None:
    """The original span of a folded character, folded alone, contains that character."""
    folded = normalise(text)
    for index, char in enumerate(folded.text):
        start, end = folded.span(index, index)
        assert char in fold(text[start:end])


@given(texts, texts)
def test_folding_goes_piece_by_piece(left: str, right: str) -> None:
    """Folding is idempotent, and a text folded in pieces is the text folded whole."""
    assert fold(fold(left)) == fold(left)
    assert fold(fold(left) + right) == fold(left + right)
    assert fold(left + right).endswith(fold(right))


@given(texts | st.text("ak!15 2.é", max_size=8))
def test_leet_readings_line_up(text: str) -> None:
    """Leetspeak readings have a character for each folded one; where there is none, none is due."""
    folded = fold(text)
    readings = unleet(folded)
    assert all(len(reading) == len(folded) for reading in readings)
    if not readings:
        pieces = (folded[a:b] for a, b in combinations(range(len(folded) + 1), 2))
        assert not any(is_leet(piece) and set(piece) & set("0134579@$!8") for piece in pieces)


@given(texts)
def test_strip_invisible_takes_nothing_else(text: str) -> None:
    """Stripping the invisible changes nothing that folding would keep, and is idempotent."""
    stripped = strip_invisible(text)
    assert fold(stripped) == fold(text)
    assert strip_invisible(stripped) == stripped


def _cut(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    return [text[a:b] for a, b in pairwise(edges)]


def _found(text: str, cuts: list[int]) -> list[tuple[str, int, int]]:
    """(harm, term, end in the whole text) of every hit, segment by segment, repeats kept."""
    found, tail, begin = [], "", 0
    for segment in _cut(text, cuts):
        following = text[begin + len(segment) :][:1]
        for hit in KEYWORDS.find(segment, tail, following):
            assert 0 <= hit.start < hit.end <= len(segment)
            found.append((hit.harm, hit.term, begin + hit.end))
        tail = KEYWORDS.next_tail(tail, segment)
        assert len(tail) <= KEYWORDS.tail_chars
        begin += len(segment)
    return sorted(found)


@given(term_like() | trouble, st.lists(st.integers(0, 60), max_size=8) | st.just(list(range(60))))
@example("kill\u200b\u200b x", [4, 5])
@example("kill" + " \n" * 100 + "a b", [4, 60, 150])
@example("ki" + "\u200b" * 100 + "ll", [2, 30, 60])
@example("か\u3099か", [1, 2])
@example("ﷺ\u0301", [1])
@example("sh$t k!ll! $5", [1, 2, 3, 6, 8, 9])
@example("kill a" + "\u0301" * 3, [6, 7, 8])
def test_any_cutting_finds_the_same(text: str, cuts: list[int]) -> None:
    """However a text is cut into segments, each hit of the whole is found exactly once."""
    assert _found(text, cuts) == _found(text, [])
