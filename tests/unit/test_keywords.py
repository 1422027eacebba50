"""detectors/keywords.py: the list, words and their borders, the file."""

import os
import random
from pathlib import Path

import pytest

from detectors.harms import THRESHOLD_KEYS
from detectors.keywords import SHIPPED, Entry, Hit, KeywordError, KeywordFile, Keywords
from detectors.normalise import fold

LIST = """
[violence]
block = ["kill them", "c++ bomb", "杀"]
suspect = ["ass", "bomb", "kill", "ばか", "ราก", "1488"]
[other]
block = ["kill"]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "keywords.toml"
    file.write_text(LIST, encoding="utf-8")
    return file


@pytest.fixture
def keywords(path: Path) -> Keywords:
    return Keywords.load(path)


def _terms(keywords: Keywords, text: str, tail: str = "", following: str = "") -> set[str]:
    return {keywords.entries[hit.term].text for hit in keywords.find(text, tail, following)}


@pytest.mark.parametrize(
    "text",
    [
        "Use `kill -9` to kill the process; pkill works too.",
        "The bomb calorimeter was calibrated by the class after a careful analysis.",
        "Scunthorpe and Penistone are towns; Dick Van Dyke sang there.",
        "An assassin bug sat on the shuttlecock. Assess the passage.",
        "The Maine coon bit a chink in the armour, spic and span.",
        "She died of breast cancer; the rape seed oil industry sent flowers.",
        "I can't help with making a pipe bomb or with how to kill yourself.",
        "Kike Hernández hit a home run. On the A55, 100 people paid $5 at 3:15.",
        "In 1942 the Nazis murdered Jews in gas chambers.",
        "He wrote b1tch-free code: 4ss3t, c0ck.tail, sh1.",
    ],
)
def test_ordinary_text_is_not_blocked(text: str) -> None:
    """Places, names, medicine, news, history and refusals hold no blocking term."""
    assert [hit for hit in Keywords.load(SHIPPED).find(text) if hit.action == "block"] == []


def test_shipped_list_is_small_and_names_every_harm() -> None:
    """The shipped list loads, stays under 150 terms and covers each harm without repeating one."""
    shipped = Keywords.load(SHIPPED)
    assert len(shipped.entries) < 150
    assert {entry.harm for entry in shipped.entries} == set(THRESHOLD_KEYS)
    assert len(set(shipped.entries)) == len(shipped.entries)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("kill", {"kill"}),
        ("KILL!", {"kill"}),
        ("skill, killer, kill7", set()),
        ("k1ll, ki1l, K!LL!", {"kill"}),
        ("a$$ @ss @$$", {"ass"}),
        ("4$$ 455 $5", set()),
        ("k1ll 4$$ 455 $5", {"kill"}),
        ("k\u200bi\u0301lл", set()),  # л is no look-alike of l
        ("k\u200bi\u0301ll", {"kill"}),
        ("кіll", {"kill"}),
        ("kill - \n\n them", {"kill", "kill them"}),
        ("kill-them", {"kill", "kill them"}),
        ("kill, them", {"kill"}),
        ("a C++ Bomb", {"c++ bomb", "bomb"}),
        ("他杀人", {"杀"}),
        ("killばかkill", {"kill", "ばか"}),
        ("はか", set()),
        ("ราก", {"ราก"}),
        ("รากั", set()),  # one more mark makes another syllable
        ("1488 14881", {"1488"}),
        ("\ud83dkill\ude00", {"kill"}),
    ],
)
def test_words_and_their_borders(keywords: Keywords, text: str, found: set[str]) -> None:
    """A term matches as a whole word in any spelling, and never inside a longer word."""
    assert _terms(keywords, text) == set(map(fold, found))


def test_offsets_are_code_points_of_the_segment(keywords: Keywords) -> None:
    """Offsets count the original's code points, trailing invisible ones included."""
    text = "ﷺ k\u200bi\u0301ll\u200d  them"
    assert keywords.find(text) == [
        Hit("violence", "suspect", 2, 9, 5),
        Hit("other", "block", 2, 9, 9),
        Hit("violence", "block", 2, 15, 0),
    ]


def test_term_across_segments_counts_where_it_ends(keywords: Keywords) -> None:
    """A term that began in an earlier segment starts at 0 and is not reported twice."""
    tail = keywords.next_tail("", "They kill \n ")
    assert keywords.find("them. ", tail, "T") == [Hit("violence", "block", 0, 4, 0)]
    assert keywords.find(" tea", tail) == []


def test_next_segment_decides_whether_the_word_is_over(keywords: Keywords) -> None:
    """The next code point settles a word's end; an invisible one leaves it to the next segment."""
    assert _terms(keywords, "kill", following="e") == set()
    assert _terms(keywords, "kill", following=".") == {"kill"}
    assert _terms(keywords, "kill", following="") == {"kill"}
    assert _terms(keywords, "kill", following="\u200b") == set()
    assert _terms(keywords, "\u200b", "kill", following="\u200b") == set()
    assert _terms(keywords, "\u200bed", "kill") == set()
    late = keywords.find("\u200b\u0301 x", "kill")
    assert {(hit.start, hit.end) for hit in late} == {(0, 2)}


def test_tail_is_bounded_and_enough(keywords: Keywords) -> None:
    """However long whitespace and invisible runs are, the tail stays short and holds the words."""
    tail = ""
    for piece in ("to kill", "\u200b" * 10_000, " " * 10_000, "\n-\n" * 10_000):
        tail = keywords.next_tail(tail, piece)
        assert len(tail) <= keywords.tail_chars
    assert _terms(keywords, "them", tail) == {"kill them"}
    long = "word " * 10_000
    assert keywords.next_tail("", long) == long[-keywords.tail_chars :]


def test_ten_thousand_terms_find_what_a_naive_search_finds() -> None:
    """With a long list, hits are those of looking for each term between spaces."""
    rng = random.Random(7)
    words = list({"".join(rng.choices("abcdefgh", k=rng.randint(3, 7))) for _ in range(12_000)})
    keywords = Keywords([Entry("other", "suspect", word) for word in words[:10_000]], "digest")
    text = " ".join(rng.choices(words, k=3_000))
    found = {hit.term for hit in keywords.find(text)}
    assert found == {i for i, word in enumerate(words[:10_000]) if f" {word} " in f" {text} "}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no terms: add some"),
        (b"[violence]\nblock = []\n", "no terms: add some"),
        (b"[violence\n", "not readable as TOML"),
        (b"\xff\xfe", "not readable as TOML"),
        (b"[theft]\nblock = ['x']\n", "[theft]: no such harm; use violence"),
        (b"violence = 3\n", "[violence]: give `block` and `suspect` arrays"),
        (b"[violence]\nblok = ['x']\n", "[violence]: give `block` and `suspect` arrays"),
        (b"[violence]\nblock = 'x'\n", "violence.block: must be an array of strings"),
        (b"[violence]\nblock = ['x', 3]\n", "violence.block[1]: must be a string"),
        (b"[violence]\nsuspect = ['x', ' -']\n", "violence.suspect[1]: has no letter or digit"),
        (b"[other]\nblock = ['" + b"x" * 65 + b"']\n", "other.block[0]: 65 characters"),
    ],
)
def test_unusable_file_says_what_to_do(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that cannot be used is refused with its name, the field and the remedy."""
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(KeywordError) as refusal:
        Keywords.load(path)
    assert str(refusal.value).startswith("mine.toml: ")
    assert message in str(refusal.value)


def test_missing_file_says_so(tmp_path: Path) -> None:
    """A file that is not there is refused by name."""
    with pytest.raises(KeywordError, match=r"none\.toml: No such file"):
        Keywords.load(tmp_path / "none.toml")


def test_longest_term_fits_the_tail(tmp_path: Path) -> None:
    """A term of the greatest allowed length is found across a cut, its left neighbour respected."""
    path = tmp_path / "keywords.toml"
    path.write_text(f"[other]\nblock = ['{'x' * 64}']\n")
    keywords = Keywords.load(path)
    assert keywords.find("x", keywords.next_tail("", "a " * 99 + "x" * 63))
    assert not keywords.find("x", keywords.next_tail("", "x" * 64))
    assert not keywords.find("\u200b", keywords.next_tail("", "x" * 65))


def test_digest_follows_content(path: Path) -> None:
    """The digest is 64 hex digits and changes with the file."""
    before = Keywords.load(path).digest
    path.write_text(LIST + "# a comment\n", encoding="utf-8")
    after = Keywords.load(path).digest
    assert len(before) == len(after) == 64
    assert before != after


def _rewrite(path: Path, content: str, mtime_ns: int) -> None:
    path.write_text(content, encoding="utf-8")
    os.utime(path, ns=(mtime_ns, mtime_ns))


def test_changed_file_is_followed_once_an_interval(path: Path) -> None:
    """A changed file takes effect at the next look, and looks are an interval apart."""
    file = KeywordFile(path, interval_s=5.0)
    assert file.current(100.0).find("new word") == []
    _rewrite(path, "[other]\nblock = ['new word']\n", 1)
    assert file.current(104.9).find("new word") == []
    assert [hit.harm for hit in file.current(105.0).find("new word")] == ["other"]


@pytest.mark.parametrize("broken", ["[violence\n", "", None])
def test_broken_file_changes_nothing(path: Path, broken: str | None) -> None:
    """A broken, emptied or deleted file leaves the old list in force and is reported once."""
    errors: list[str] = []
    file = KeywordFile(path, interval_s=1.0, on_error=errors.append)
    if broken is None:
        path.unlink()
    else:
        _rewrite(path, broken, 1)
    for now in (0.0, 1.0, 2.0):
        assert file.current(now).find("kill")
    assert len(errors) == 1
    assert errors[0].startswith("keywords.toml: ")
    _rewrite(path, "[other]\nblock = ['new word']\n", 2)
    assert file.current(3.0).find("new word")
    assert len(errors) == 1
