"""Text to hashed features."""

import numpy as np
import pytest

from detectors.grams import ORDERS, buckets, readable

BITS = 18


def features(text: str) -> set[int]:
    return set(buckets(text, BITS)[0].tolist())


def counted(text: str) -> int:
    return int(buckets(text, BITS)[1].sum())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        # " a", "a ", " a " and the word.
        ("a", 4),
        # 4 twos, 3 threes, 2 fours and 1 five of " abc " and the word.
        ("abc", 11),
        # Each word has its own stretches, none reaches over the space; two words and the pair.
        ("abc abc", 23),
        ("", 0),
        ("  \n\t", 0),
        ("\u200b\ufe0f", 0),  # nothing that a reader sees
        ("!", 3),  # no word, but stretches
        ("\U0001f600", 4),
    ],
)
def test_every_stretch_and_word_is_counted(text: str, count: int) -> None:
    """The stretches of 2 to 5 characters of each word with a space at either end, words, pairs."""
    assert counted(text) == count


def test_buckets_ascend_and_fit_their_bits() -> None:
    """Each bucket is named once, with how often it was hit."""
    ids, counts = buckets("never say never again", 10)
    assert (np.diff(ids) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < 2**10
    assert counts.max() > 1
    assert ids.dtype == counts.dtype == np.int64


def test_repeating_a_text_adds_hits_and_few_features() -> None:
    """The same words are the same features, wherever they stand."""
    once, twice = features("kill them all"), features("kill them all. kill them all.")
    assert len(once & twice) > 0.9 * len(once)
    assert features("all them") & features("them all")


def test_order_of_words_is_a_feature() -> None:
    """Pairs tell "dog bites" from "bites dog"."""
    assert features("dog bites man") != features("man bites dog")


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("You SHIT", "you shit"),
        ("you sh1t", "you shit"),
        ("k1ll him!", "kill him!"),
        ("100 b1tches", "100 bitches"),  # a number beside it stays one
        ("ｋｉｌｌ", "kill"),
        ("кill", "kill"),  # the first letter is Cyrillic
        ("ki\u200bll", "kill"),
        ("kíll", "kill"),
        (" two\n\n words ", "two words"),
        ("100 $5 4", "100 $5 4"),  # numbers stay
        ("idiot!", "idiot!"),  # and so does punctuation
    ],
)
def test_spellings_of_one_word_have_the_same_features(written: str, plain: str) -> None:
    """Case, look-alikes, leetspeak, accents and invisible characters hide nothing."""
    assert readable(written) == plain
    assert features(written) == features(plain)


def test_half_a_surrogate_pair_is_a_character() -> None:
    """Two deltas may cut a character in two: what is left is judged all the same."""
    assert features("\ud83d kill") >= features("kill") - features("")
    assert counted("\ud83d") == counted("\ufffd")


def test_a_stretch_is_another_feature_than_the_word_of_the_same_letters() -> None:
    """And the orders differ from one another, so that no hash stands for two things by design."""
    rng = np.random.default_rng(0)
    text = " ".join("".join(map(chr, rng.integers(97, 123, 6))) for _ in range(300))
    distinct = {text[i : i + n] for n in ORDERS for i in range(len(f" {text} ") - n)}
    assert len(buckets(text, 40)[0]) > 0.8 * len(distinct)


def test_long_texts_are_read_to_their_end() -> None:
    """Nothing is clipped."""
    long = "ordinary words " * 5_000
    assert features(long + "exterminate") - features(long)
    assert counted("x" * 100_000) > 300_000
