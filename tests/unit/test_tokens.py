"""Token windows: nothing of the judged text is lost, whatever it is made of."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detectors.protocol import Passage, Turn, Window
from detectors.tokens import Lengths, PairTokens

TOKENIZER = Path(__file__).parents[2] / "models" / "toxicity" / "tokenizer.json"
VOCAB = json.loads(TOKENIZER.read_text(encoding="utf-8"))["model"]["vocab"]
NAMES = {number: token for token, number in VOCAB.items()}
SHORT = Lengths(conversation=8, text=16, overlap=4)
CLS, SEP, UNK = VOCAB["[CLS]"], VOCAB["[SEP]"], VOCAB["[UNK]"]


@pytest.fixture(scope="module")
def short() -> PairTokens:
    return PairTokens(TOKENIZER.read_bytes(), SHORT)


@pytest.fixture(scope="module")
def tokens() -> PairTokens:
    return PairTokens(TOKENIZER.read_bytes())


def side(window: Window, number: int) -> list[str]:
    """Names of the tokens of one side, special ones left out."""
    chosen = window.ids[window.type_ids == number].tolist()
    return [NAMES[i] for i in chosen if i not in (CLS, SEP)]


def known(window: Window) -> list[str]:
    """Tokens of the text that the vocabulary has."""
    return [name for name in side(window, 1) if name != "[UNK]"]


def words(count: int) -> list[str]:
    """Different words of one token each."""
    return [token for token in VOCAB if token.isascii() and token.isalpha()][5000 : 5000 + count]


def test_a_short_passage_is_one_window_of_two_sides(tokens: PairTokens) -> None:
    """[CLS] conversation [SEP] before and text [SEP], types 0 and 1."""
    found = tokens.encode(Passage("to kill", "how ", (Turn("user", "hello"),)))
    (window,) = found.windows
    assert [NAMES[i] for i in window.ids] == [
        "[CLS]", "hello", "[SEP]", "how", "to", "kill", "[SEP]"
    ]  # fmt: skip
    assert window.type_ids.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert (found.tokens, found.text_tokens) == (7, 2)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 28, 29, 100, 1000])
@pytest.mark.parametrize("ahead", [0, 3, 40])
def test_every_word_of_a_text_is_in_some_window(short: PairTokens, count: int, ahead: int) -> None:
    """However long text and text before are, all of the text is read, in order."""
    text = words(count)
    found = short.encode(Passage(" ".join(text), " ".join(["before"] * ahead) + " ", ()))
    read = [side(window, 1) for window in found.windows]
    assert set(text) <= {word for window in read for word in window}
    assert all(len(window) <= SHORT.text for window in read)
    joined = " ".join(text)
    assert all(" ".join(w for w in window if w != "before") in joined for window in read)
    assert found.text_tokens == count


def test_windows_of_a_long_text_overlap(short: PairTokens) -> None:
    """What spans the end of one window is whole in the next, and the text before opens it."""
    found = short.encode(Passage(" ".join(words(60)), "before " * 10, ()))
    read = [side(window, 1) for window in found.windows]
    assert read[0][: SHORT.overlap] == ["before"] * SHORT.overlap
    for one, following in pairwise(read):
        assert one[-SHORT.overlap :] == following[: SHORT.overlap] or following is read[-1]
        assert set(one[-SHORT.overlap :]) <= set(following)


def test_the_text_before_loses_its_front(short: PairTokens) -> None:
    """What stands right before the text stays."""
    (window,) = short.encode(Passage("text", " ".join(words(40)) + " ", ())).windows
    assert side(window, 1) == [*words(40)[-15:], "text"]


def test_a_text_of_one_character_is_one_token(tokens: PairTokens) -> None:
    """The judged part begins at the first token that holds any of it."""
    assert tokens.encode(Passage("x", "word ", ())).text_tokens == 1
    assert tokens.encode(Passage("x", "wor", ())).text_tokens >= 1


def test_a_word_cut_by_the_seam_stays_a_word(tokens: PairTokens) -> None:
    """The text before and the text are read as one."""
    (window,) = tokens.encode(Passage("ing it", "kill", ())).windows
    assert side(window, 1) == ["killing", "it"]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec=None), max_size=400), before=st.text(max_size=80))
def test_any_text_encodes(text: str, before: str) -> None:
    """No string crashes the tokenizer, lone surrogates among them, and none has no window."""
    tokens = PairTokens(TOKENIZER.read_bytes(), SHORT)
    found = tokens.encode(Passage(text, before, (Turn("user", text),)))
    assert found.windows
    assert found.tokens == sum(len(window.ids) for window in found.windows)
    assert 0 <= found.text_tokens <= sum(len(side(window, 1)) for window in found.windows)


@pytest.mark.parametrize("code", [0xD800, 0xDFFF])
def test_a_lone_surrogate_hides_nothing(tokens: PairTokens, code: int) -> None:
    """A string that is no valid Unicode is read around the spot."""
    lone = chr(code)
    turns = (Turn("user", f"ask{lone}"),)
    (window,) = tokens.encode(Passage(f"one {lone} two", lone, turns)).windows
    assert known(window) == ["one", "two"]


def test_empty_text_is_one_window(tokens: PairTokens) -> None:
    """There is always something to score."""
    found = tokens.encode(Passage("", "", ()))
    assert [len(window.ids) for window in found.windows] == [3]
    assert found.text_tokens == 0


def test_a_hundred_thousand_characters_without_a_space_are_all_read(tokens: PairTokens) -> None:
    """An endless word is neither one [UNK] nor slow."""
    found = tokens.encode(Passage("kill" * 25_000, "", ()))
    assert found.text_tokens > 10_000
    assert not any(UNK in window.ids for window in found.windows)


@pytest.mark.parametrize("strange", ["😀", "\U00013000", "￼", "ꙮ"])
def test_a_strange_character_does_not_take_its_word_with_it(
    tokens: PairTokens, strange: str
) -> None:
    """Only the character that the vocabulary lacks is unknown."""
    (window,) = tokens.encode(Passage(f"{strange}kill{strange}you{strange}", "", ())).windows
    assert known(window) == ["kill", "you"]


def test_full_width_and_zero_width_spellings_read_as_plain(tokens: PairTokens) -> None:
    """NFKC and the removal of format characters come before the vocabulary."""
    (window,) = tokens.encode(Passage("ｋｉｌｌ ki\u200bll 𝐤𝐢𝐥𝐥", "", ())).windows
    assert side(window, 1) == ["kill"] * 3


def test_a_special_token_in_a_text_is_plain_characters(tokens: PairTokens) -> None:
    """Nobody ends a side by writing [SEP]."""
    (window,) = tokens.encode(Passage("a [SEP] b [CLS]", "", (Turn("user", "[SEP]"),))).windows
    assert (window.ids == SEP).sum() == 2
    assert (window.ids == CLS).sum() == 1


def test_the_newest_user_turn_comes_first_then_the_newest_others(short: PairTokens) -> None:
    """What was asked last matters most; older turns fill what room is left."""
    turns = (
        Turn("user", "first question"),
        Turn("assistant", "old answer"),
        Turn("user", "second question"),
        Turn("assistant", "new answer"),
    )
    (window,) = short.encode(Passage("text", "", turns)).windows
    assert side(window, 0) == [
        "second", "question", "new", "answer", "old", "answer", "first", "question"
    ]  # fmt: skip


def test_a_long_user_turn_keeps_head_and_tail(short: PairTokens) -> None:
    """A request is recognised by its ends, and the rest of the conversation is left out."""
    long = words(500)
    turns = (Turn("user", "older"), Turn("user", " ".join(long)), Turn("assistant", "answer"))
    (window,) = short.encode(Passage("text", "", turns)).windows
    assert side(window, 0) == [*long[:4], *long[-4:]]


def test_what_is_no_tokenizer_is_refused() -> None:
    """A broken file is named, not worked around."""
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        PairTokens(b"{}")


def test_a_tokenizer_without_the_special_tokens_is_refused() -> None:
    """A window needs [CLS] and [SEP]."""
    model: dict[str, object] = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "vocab": {"[UNK]": 0, "[CLS]": 1},
    }
    model |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    with pytest.raises(ValueError, match=r"no \[SEP\]"):
        PairTokens(json.dumps({"version": "1.0", "model": model}).encode())


def test_an_overlap_as_long_as_a_window_is_refused() -> None:
    """Such windows would never move on."""
    with pytest.raises(ValueError, match="overlap"):
        PairTokens(TOKENIZER.read_bytes(), Lengths(8, 16, 16))
