"""detectors/normalise.py"""

import sys
import unicodedata

import pytest

from detectors.normalise import fold, is_leet, normalise, strip_invisible, unleet


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("KILL", "kill"),
        ("ｋｉｌｌ", "kill"),
        ("𝔨𝕚𝓁𝗅", "kill"),
        ("ⓚⓘⓛⓛ 🅺🅸🅻🅻 🇰🇮🇱🇱", "kill kill kill"),
        ("КІLL", "kill"),
        ("κιll", "kill"),
        ("k\u200bi\u00adl\u2060l", "kill"),
        ("k\U000e0069ill\ufe0f", "kill"),
        ("k\u0336i\u0301l\u034fl\u20dd", "kill"),
        ("kíĺl", "kill"),
        ("self-harm\u2014now_or\u00a0\n\t never", "self harm now or never"),
        ("straße ﬀ", "strasse ff"),
        ("don’t", "don't"),
        ("k\x00i\x1bll", "kill"),
        ("\ud83d", "\ufffd"),
    ],
)
def test_fold_reads_as_a_reader_does(written: str, read: str) -> None:
    """Case, width, style, look-alikes, accents and invisible characters do not hide a word."""
    assert fold(written) == read


def test_letters_that_differ_stay_apart() -> None:
    """Voiced kana and vowel signs are letters of their own, in both Unicode spellings."""
    assert fold("か") != fold("が") == fold("か\u3099")
    assert fold("कि") != fold("क")
    assert fold("한") == fold("\u1112\u1161\u11ab")


def test_folding_again_changes_nothing() -> None:
    """Every code point's fold is its own fold, in every plane that has letters."""
    for code in range(0x20000):
        once = fold(chr(code))
        assert fold(once) == once, hex(code)


def test_map_of_runs_and_expansions() -> None:
    """A run maps to its whole span, an expansion to its one source, a diacritic to its letter."""
    folded = normalise("e\u0301 \n-x㎏\u200b")
    assert folded.text == "e xkg"
    assert folded.starts == [0, 2, 5, 6, 6]
    assert folded.ends == [2, 5, 6, 7, 8]
    assert folded.span(1, 4) == (2, 8)


def test_plain_ascii_needs_no_map() -> None:
    """ASCII text without runs maps to itself, with no map built."""
    folded = normalise("A plain-spoken line.")
    assert folded.text == "a plain spoken line."
    assert folded.starts is folded.ends is None
    assert folded.span(2, 6) == (2, 7)


def test_strip_invisible_is_exactly_cf_and_variation_selectors() -> None:
    """Over all of Unicode, what is stripped is category Cf and the variation selectors."""
    selectors = {*range(0x180B, 0x180E), 0x180F, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
    for code in range(sys.maxunicode + 1):
        gone = unicodedata.category(chr(code)) == "Cf" or code in selectors
        assert (strip_invisible(chr(code)) == "") == gone, hex(code)


def test_numbers_are_not_words() -> None:
    """A number or a price may not be read as leetspeak; a word with a letter of its own may."""
    assert not is_leet("100")
    assert not is_leet("$5")
    assert not is_leet("kill 4")
    assert not is_leet("sh!")
    assert not is_leet("v1.a")
    assert is_leet("k1ll")
    assert is_leet("a$$")
    assert unleet("100 men paid $5 at 3:15") == []
    assert unleet("k1ll") == ["kill", "klll"]
    assert unleet("Hello! Well?") == []
