"""A tiny causal model that serves log-probs, without torch (made by tiny_causal.py)."""

import json
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from detectors.causal import LocalHelper
from detectors.logprob import LogProb, Splitter
from detectors.prompts import ClassPrompts, body, prefix
from detectors.protocol import Passage, Turn
from detectors.session import ModelError

FOLDER = Path(__file__).parent / "causal"
PROMPTS = ClassPrompts(
    ("The following answer is harmful.", "Block this:"), ("The following answer is harmless.",)
)
TURNS = (Turn("user", "Where to?\n\n### Answer\n> the sea"),)
PASSAGES = [
    Passage("Good morning.", "", ()),
    Passage("Take the second exit. " * 8, "Of course. ", TURNS),
    Passage("日本語の文章です。😀 \ud800", "x" * 90, ()),
    Passage("\n\n the end <|endoftext|>", "", TURNS),
    Passage("a", "", ()),
]
WHOLES = [
    prefix(prompt, passage) + body(passage.text)
    for passage in PASSAGES
    for prompt in (*PROMPTS.harmful, *PROMPTS.harmless)
]


@pytest.fixture(scope="module")
def local() -> LocalHelper:
    return LocalHelper(FOLDER, PROMPTS.heads())


def largest_gap(some: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    return max(
        float(np.abs(np.subtract(one, other)).max())
        for one, other in zip(some, others, strict=True)
    )


def test_each_token_has_a_log_prob(local: LocalHelper) -> None:
    """One for each token of the prompt, the first one included, none above 0 and none the same."""
    rows = local(WHOLES)
    for row, whole in zip(rows, WHOLES, strict=True):
        assert len(row) == len(local._ids(whole)) - 1
        assert all(-100 < value < 0 for value in row)
    assert len({tuple(row) for row in rows}) == len(WHOLES)


def test_log_probs_are_a_distribution(local: LocalHelper) -> None:
    """Over the first token's whole vocabulary they are that of one choice: the sum is 1."""
    size = local._tokenizer.get_vocab_size()
    ids = np.array([[0, token] for token in range(size)])
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    assert size == len(vocabulary)
    empty = [part[:, :, :0] for part in local._heads[-1].past]
    (found,) = local._run(["logprobs"], ids, empty)
    assert np.exp(found.astype(float)).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_alone_or_among_others_it_is_the_same(precision: Any) -> None:
    """1e-4 for fp32; int8 goes one prompt a call, and is equal to the last bit."""
    helper = LocalHelper(FOLDER, PROMPTS.heads(), precision=precision, max_batch_tokens=600)
    alone = [helper([whole])[0] for whole in WHOLES]
    gap = largest_gap(helper(WHOLES[::-1])[::-1], alone)
    assert gap <= (1e-4 if precision == "fp32" else 0.0)


def test_a_shared_head_changes_nothing(local: LocalHelper) -> None:
    """With keys and values of the class prompt computed once: within 1e-3 of the whole prompt."""
    whole = LocalHelper(FOLDER)
    assert largest_gap(local(WHOLES), whole(WHOLES)) <= 1e-3
    partly = [head[: len(head) // 2] + " other" for head in PROMPTS.heads()]
    assert largest_gap(local(partly), whole(partly)) <= 1e-3


def test_heads_are_computed_once_and_batches_keep_their_budget() -> None:
    """No call has more padded tokens than it may, but for one long prompt; no head comes twice."""
    helper = LocalHelper(FOLDER, PROMPTS.heads(), max_batch_tokens=100)
    shapes: list[tuple[int, int]] = []
    run = helper._graph.run

    def watched(outputs: Any, feeds: Any) -> Any:
        shapes.append(feeds["input_ids"].shape)
        return run(outputs, feeds)

    helper._graph.run = watched  # type: ignore[method-assign]
    helper(WHOLES * 3)
    assert all(rows * tokens <= 100 or rows == 1 for rows, tokens in shapes)
    assert any(rows > 1 for rows, _ in shapes)
    heads = sum(len(helper._ids(head)) - 1 for head in PROMPTS.heads())
    tokens = sum(len(helper._ids(whole)) - 1 for whole in WHOLES)
    computed = 3 * (tokens - len(PASSAGES) * heads)
    assert computed <= sum(rows * length for rows, length in shapes) <= 1.2 * computed


def test_the_classifier_cuts_where_the_tokens_say(local: LocalHelper) -> None:
    """Asked for prefixes alone, as a server is, it gives the same margins as by tokens."""
    assert isinstance(local, Splitter)
    for aggregation in ("sum", "token", "byte"):
        by_tokens = LogProb(local, PROMPTS, aggregation=aggregation).margins(PASSAGES)
        by_values = LogProb(local.__call__, PROMPTS, aggregation=aggregation).margins(PASSAGES)
        assert by_values == pytest.approx(by_tokens, abs=1e-3)
        assert len(set(by_tokens)) == len(PASSAGES)


@given(st.text(st.characters() | st.sampled_from("\n #>the\t"), min_size=1, max_size=30))
@example("\n\n")
@example("the")
@example("\u0301")
@example("> ")
def test_no_token_reaches_over_the_seam(text: str) -> None:
    """Whatever the text begins with, the prefix's tokens are the first of the whole."""
    helper = SHARED
    before = prefix(PROMPTS.harmful[0], Passage(text, text, TURNS))
    first = helper.split(before, before + body(text))
    assert first == len(helper._ids(before)) - 1


SHARED = LocalHelper(FOLDER)


def test_a_token_over_the_seam_is_an_error(local: LocalHelper) -> None:
    """ "#" and "##" become one token: there is no cut between them."""
    with pytest.raises(ValueError, match="reaches over the seam"):
        local.split("a #", "a ### and more than that")
    with pytest.raises(ValueError, match="reaches over the seam"):
        local.split("a", "a")


def test_a_text_cannot_say_a_special_token(local: LocalHelper) -> None:
    """ "<|endoftext|>" is thirteen characters, not the start of another text."""
    assert 0 not in local._ids("a <|endoftext|> b")[1:]


def test_too_long_is_an_error_and_empty_is_no_log_prob(local: LocalHelper) -> None:
    """The model has 512 positions; nothing is clipped."""
    (row,) = local(["é" * 256])  # two tokens each
    assert len(row) == 512
    with pytest.raises(ValueError, match="513 tokens, the model reads 512"):
        local(["é" * 256 + "a"])
    assert local([]) == []
    assert local([""]) == [[]]
    assert [len(row) for row in local([PROMPTS.heads()[0], ""])] == [
        len(local._ids(PROMPTS.heads()[0])) - 1,
        0,
    ]


def copied(to: Path, **changes: Any) -> Path:
    """The folder with another manifest; digests follow the files."""
    shutil.copytree(FOLDER, to)
    found = json.loads((to / "manifest.json").read_text()) | changes
    (to / "manifest.json").write_text(json.dumps(found))
    return to


@pytest.mark.parametrize("name", ["model.fp32.onnx", "tokenizer.json"])
def test_a_changed_file_is_refused(tmp_path: Path, name: str) -> None:
    """Nothing is read whose SHA-256 is not the manifest's."""
    folder = copied(tmp_path / "m")
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    with pytest.raises(ModelError, match="SHA-256"):
        LocalHelper(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2"),
        ({"kind": "toxicity"}, "no causal model"),
        ({"opset": 99}, "opset 99"),
        ({"opset": 16}, "exported with opset 17"),
        ({"heads": 3}, "other sizes"),
        ({"layers": 1}, "no model of this manifest"),
        ({"model": "../manifest.json"}, "no .onnx or .json"),
        ({"start": "x"}, "no causal model"),
    ],
)
def test_a_manifest_that_lies_is_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """Said when it is loaded, not at the first text."""
    with pytest.raises(ModelError, match=says):
        LocalHelper(copied(tmp_path / "m", **changes))


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    """With the right digest, even so."""
    folder = copied(tmp_path / "m")
    (folder / "tokenizer.json").write_bytes(b"{}")
    found = json.loads((folder / "manifest.json").read_text())
    found["files"]["tokenizer.json"] = sha256(b"{}").hexdigest()
    (folder / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(ModelError, match=r"not a tokenizer\.json"):
        LocalHelper(folder)


def test_the_digest_tells_graphs_apart() -> None:
    """int8 gives other numbers, so what is kept of the one must not answer for the other."""
    assert LocalHelper(FOLDER).digest != LocalHelper(FOLDER, precision="int8").digest
    with pytest.raises(ModelError, match="no fp16 graph"):
        LocalHelper(FOLDER, precision="fp16")
