"""Text as a reader sees it, for keyword matching, with the way back to the original.

Each code point folds by itself: NFKD, casefold, look-alikes to the Latin letter they resemble;
format characters, variation selectors, control characters and diacritics fold to nothing. That
is NFKC without its composition: both spellings of "é" come out as "e", and no cut of a text can
change what its code points fold to. Then each run of whitespace and hyphens becomes one space,
the only step that looks at a neighbour.

Marks that are letters in their script (Indic vowel signs, Thai, the Japanese voicing marks) stay:
without them different words become one. Case folds before look-alikes, so that a Greek or
Cyrillic entry matches in either case; Greek capitals whose small letter looks like another Latin
letter (Ν, Η, Υ) therefore fold as the small one does. Latin l and capital I stay apart.

Leetspeak is a second reading (`unleet`), not part of the fold: "idiot!" and "sh!t" both have to
match, and whether a "!" is punctuation or a letter cannot be told before matching.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

# Part of every digest that depends on the fold: raise it with any change to what comes out.
VERSION: Final = f"1/unicode-{unicodedata.unidata_version}"

_MAX_REMEMBERED: Final = 1 << 16  # code points per table; 6 MB, then a miss costs a microsecond

_VARIATION_SELECTORS: Final = (range(0x180B, 0x180E), range(0x180F, 0x1810), range(0xFE00, 0xFE10),
                               range(0xE0100, 0xE01F0))  # fmt: skip
# Default_Ignorable_Code_Point outside Cf and the above: CGJ, Hangul fillers, Khmer inherent
# vowels, and the ranges reserved for later format characters.
_IGNORABLE: Final = (range(0x034F, 0x0350), range(0x115F, 0x1161), range(0x17B4, 0x17B6),
                     range(0x2065, 0x2066), range(0xFFF0, 0xFFF9),
                     range(0xE0000, 0xE1000))  # fmt: skip
_EXTRA_SEPARATORS: Final = frozenset("_\u2212\u2800")  # underscore, minus sign, Braille blank

# Scripts written without spaces: a word there may begin and end anywhere.
_UNSPACED: Final = (range(0x0E00, 0x10A0), range(0x1780, 0x1800), range(0x1950, 0x19E0),
                    range(0x1A20, 0x1AB0), range(0x2E80, 0x2FE0), range(0x3005, 0x3008),
                    range(0x3040, 0x3130), range(0x31A0, 0x3200), range(0x3400, 0x4DC0),
                    range(0x4E00, 0xA4D0), range(0xA9E0, 0xAA00), range(0xAA60, 0xAA80),
                    range(0x1AFF0, 0x1B170), range(0x20000, 0x40000))  # fmt: skip


def _pairs(sources: str, targets: str) -> dict[str, str]:
    return dict(zip(sources, targets, strict=True))


_LOOKALIKES: Final = {
    **_pairs("абвеікмнорстухјѕһԁԛԝѵӏҽүғҡ", "abbeikmhopctyxjshdqwvleyfk") ,
    **_pairs("αβγεζηικνορτυχωϲϳσ", "abyeznikvoptuxwcjo"),
    **_pairs("օոսհցզյ", "onuhgqj"),  # Armenian
    **_pairs("øłđħŧıȷðɑɡɩɪʀʙɢʜʟɴʏƒɓɗɛɔɵʋɐəǝɯ", "oldhtijdagiirbghlnyfbdecouaeem"),
    **_pairs("ᴀᴄᴅᴇꜰᴊᴋᴍᴏᴘꜱᴛᴜᴠᴡᴢ", "acdefjkmopstuvwz"),
    **_pairs("‘’ʼ′´`“”″«»", "''''''\"\"\"\"\""),
    "æ": "ae",
    "œ": "oe",
    **{chr(first + i): chr(ord("a") + i)  # letters in circles, squares and flags
       for first in (0x1F150, 0x1F170, 0x1F1E6) for i in range(26)},
}  # fmt: skip


class Normalised(NamedTuple):
    """Folded text, and for each of its characters where it came from.

    Character i came from code points `starts[i]:ends[i]` of the original. Code points that fold
    to nothing belong to the character before them, the rest of a whitespace run to its one space.
    Both maps rise or stay level; both are None where character i is code point i.
    """

    text: str
    starts: Sequence[int] | None
    ends: Sequence[int] | None

    def span(self, first: int, last: int) -> tuple[int, int]:
        """[start, end) in the original of the characters first..last, both included."""
        if self.starts is None or self.ends is None:
            return first, last + 1
        return self.starts[first], self.ends[last]


class _Table(dict[int, str]):
    """What each code point becomes, worked out when first met; for str.translate."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str:
        folded = self._rule(chr(code))
        if len(self) < _MAX_REMEMBERED:
            self[code] = folded
        return folded


def _within(code: int, ranges: Sequence[range]) -> bool:
    return any(code in span for span in ranges)


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) == "Cf" or _within(ord(char), _VARIATION_SELECTORS)


def _is_diacritic(char: str) -> bool:
    """Marks laid over, under or around a letter: not those that spell a vowel or voice a kana."""
    place = unicodedata.combining(char)  # canonical combining class
    around = unicodedata.category(char) == "Me"
    return around or place == 1 or 10 <= place <= 36 or place >= 200


def _is_separator(char: str) -> bool:
    kind = unicodedata.category(char)
    return char.isspace() or kind in {"Zs", "Zl", "Zp", "Pd"} or char in _EXTRA_SEPARATORS


def _fold_once(char: str) -> str:
    if char in _LOOKALIKES:
        return _LOOKALIKES[char]
    if _is_separator(char):
        return " "
    kind = unicodedata.category(char)
    if kind == "Cs":
        return "\ufffd"  # half a surrogate pair: the matcher takes UTF-8
    if kind == "Cc" or _is_invisible(char) or _within(ord(char), _IGNORABLE):
        return ""
    if _is_diacritic(char):
        return ""
    return unicodedata.normalize("NFKD", char).casefold()


def _fold(char: str) -> str:
    """What one code point becomes. Folding that again changes nothing."""
    folded = _fold_once(char)
    while (again := "".join(map(_fold_once, folded))) != folded:
        folded = again
    return folded


_FOLDS: Final = _Table(_fold)
_VISIBLE: Final = _Table(lambda char: "" if _is_invisible(char) else char)
_ASCII_FOLDS: Final = bytes(
    ord(_FOLDS[code] or "\0") if code < 128 else code for code in range(256)
)


def strip_invisible(text: str) -> str:
    """The text without format characters (category Cf) and variation selectors."""
    return text if text.isascii() else text.translate(_VISIBLE)


def fold(text: str) -> str:
    """The normalised text alone, without its map: several times faster than `normalise`.

    Folding again changes nothing, and fold(a + b) is fold(fold(a) + b): a text that arrives in
    pieces can be folded as it comes.
    """
    if not text.isascii():
        text = text.translate(_FOLDS)
    coded = text.encode().translate(_ASCII_FOLDS)  # leaves the bytes of longer code points alone
    if b"\0" in coded:
        coded = coded.replace(b"\0", b"")
    while b"  " in coded:  # each pass halves the longest run
        coded = coded.replace(b"  ", b" ")
    return coded.decode()


def normalise(text: str) -> Normalised:
    """The normalised text with its map to the original. Never raises."""
    folded = fold(text)
    if text.isascii() and len(folded) == len(text):
        return Normalised(folded, None, None)
    starts = _starts(text)
    # Within an expansion a character ends with its source, the last one where the next begins.
    ends = [
        start + 1 if start == after else after for start, after in pairwise([*starts, len(text)])
    ]
    return Normalised(folded, starts, ends)


def _starts(text: str) -> list[int]:
    starts: list[int] = []
    before = ""
    for index, char in enumerate(text):
        for folded in _FOLDS[ord(char)]:
            if folded != " " or before != " ":
                starts.append(index)
            before = folded
    return starts


# --- leetspeak -----------------------------------------------------------------------------------

_LEET: Final = "0134579@$!8"
_READINGS: Final = tuple(  # 1 and ! stand for i or for l
    bytes.maketrans(_LEET.encode(), letters) for letters in (b"oieastgasib", b"oleastgaslb")
)
_KINDS: Final = bytes(  # a: letter (or part of one, in UTF-8); 1: leet; !; space: the rest
    ord("!" if char == "!" else "1" if char in _LEET else "a" if char.isalpha() or code > 127
        else " ")
    for code in range(256) for char in (chr(code),)
)  # fmt: skip
_LEET_WORD: Final = re.compile(  # no leet character, or only those and letters
    rf"[^{_LEET}]*|(?=.*[^\W\d_])[a-z\x80-\U0010ffff{_LEET}]*(?<!!)"
)


def unleet(folded: str) -> list[str]:
    """Other readings of a normalised text, each of the same length; mostly none.

    Digits and signs are read as letters everywhere: "100" too. Which of what matches there
    counts is for `is_leet` to say.
    """
    coded = folded.encode()
    kinds = coded.translate(_KINDS)
    if b"1" not in kinds and b"!" not in kinds:
        return []
    if not (b"a1" in kinds or b"1a" in kinds or b"!a" in kinds or b"!1" in kinds):
        return []
    ambiguous = b"1" in coded or b"!" in coded
    return [coded.translate(table).decode() for table in _READINGS[: 1 + ambiguous]]


def is_leet(folded: str) -> bool:
    """Whether a stretch of normalised text may be read as leetspeak.

    A word with leet characters needs a letter of its own ("100", "$5" and "4" are numbers) and
    nothing else between; a "!" at its end is punctuation. A function of the stretch alone, so no
    cut can change it.
    """
    return all(map(_LEET_WORD.fullmatch, folded.split(" ")))


# --- words ---------------------------------------------------------------------------------------


def is_mark(char: str) -> bool:
    """Whether the (normalised) character belongs to the one before it."""
    return not char.isascii() and unicodedata.category(char)[0] == "M"


def is_spaced_letter(char: str) -> bool:
    """Whether the (normalised) character is part of a word in a script that spaces its words."""
    if char.isascii():
        return char.isalnum()
    return (char.isalnum() or is_mark(char)) and not _within(ord(char), _UNSPACED)
