"""From labelled texts to the graph of the words detector. Needs the train extra."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors import grams
from detectors.harms import COLUMNS
from detectors.session import Graph
from training.rows import Row

pytestmark = pytest.mark.train

BITS = 12
HARM = ("kill them all", "burn their houses down", "i will hurt you", "you deserve to die")
PLAIN = ("boil the rice", "water the plants", "read the book again", "the train is late")


def rows(count: int, source: str = "gptfuzz") -> list[Row]:
    """Half of them harmful, which is known of `harmful` alone."""
    weights = (*(0.0,) * 6, 1.0)
    said = [(HARM if i % 2 else PLAIN)[i // 2 % 4] for i in range(count)]
    return [
        Row(
            f"{source}/{i}", source, "comment", (), f"{said[i]} {i}.",
            (float(i % 2),) * 7, weights, f"{source}{i}", dev=False,
        )
        for i in range(count)
    ]  # fmt: skip


def test_it_learns_what_the_words_tell_and_the_graph_says_the_same(tmp_path: Path) -> None:
    """Weights in half precision move no logit by more than 0.01; of no text speaks the bias."""
    from export.words import write
    from training import words

    settings = words.Settings(bits=BITS, iterations=30, own=False)
    model = words.train(words.texts(rows(80), [], settings), settings)
    write(model, tmp_path / "model.onnx")
    graph = Graph((tmp_path / "model.onnx").read_bytes(), 17)
    counts = words.counted([*HARM, *PLAIN], BITS)
    expected = words.weighed(counts, model.idf) @ model.weights + model.bias  # (8, 7)
    for text, logits in zip((*HARM, *PLAIN), expected, strict=True):
        ids, hits = grams.buckets(text, BITS)
        feeds: dict[str, Any] = {"buckets": ids, "counts": hits.astype(np.float32)}
        (found,) = graph.run(["logits"], feeds)
        assert found.shape == (1, len(COLUMNS))
        assert np.abs(found[0] - logits).max() < 0.01
    assert expected[:4, -1].min() > expected[4:, -1].max()
    none: dict[str, Any] = {"buckets": np.empty(0, np.int64), "counts": np.empty(0, np.float32)}
    assert graph.run(["logits"], none)[0][0] == pytest.approx(model.bias)


def test_the_same_seed_gives_the_same_weights() -> None:
    """Bit for bit."""
    from training import words

    settings = words.Settings(bits=BITS, iterations=10)
    one, other = (words.train(words.texts(rows(60), [], settings), settings) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_both_classes_weigh_alike_in_each_column() -> None:
    """Whatever the sources have more of; what is not labelled weighs nothing."""
    from training import words

    settings = words.Settings(bits=BITS)
    some = words.texts([*rows(90)[::2], *rows(10)[1::2]], [], settings)
    labels = words.balanced(some, evenness=0.5)
    positives = labels.weights[labels.targets[:, -1] > 0, -1].sum()
    assert positives == pytest.approx(labels.weights[:, -1].sum() / 2, rel=1e-5)
    assert labels.weights[:, :6].max() == 0.0
    assert words.balanced(some, evenness=0.0).weights[:, -1].sum() == pytest.approx(len(some))


def test_a_source_is_capped() -> None:
    """No source decides by its size."""
    from training import sources, words

    many = words.texts(rows(sources.CAP * 3, "harmfulqa"), [], words.Settings(caps=0.5))
    assert len(many) <= sources.CAP * 0.5


@pytest.mark.parametrize("name", ["words", "classifier"])
def test_of_a_users_rows_those_on_held_out_prompts_join_no_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the encoders and of the words detector: what is measured must not be known."""
    import importlib
    import random

    from training.rows import Parts

    module = importlib.import_module(f"training.{name}")
    (held,) = rows(1)
    parts = Parts([], [], [held], [], [])
    path = tmp_path / "more.jsonl"
    records = [
        {"text": "A text.", "harmful": 1, "labels": {}, "id": group, "group": group}
        for group in (held.group, "free")
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    if name == "classifier":
        settings = module.Settings(also=(str(path),), own=False)
        assert [row.id for row in module._rows(parts, settings, random.Random(0))] == ["free"]
        return

    class Joined(Exception):
        pass

    def texts(_: Any, more: list[Row], __: Any) -> None:
        raise Joined([row.id for row in more])

    monkeypatch.setattr(module, "read", lambda _: [])
    monkeypatch.setattr(module, "split", lambda _: parts)
    monkeypatch.setattr(module.also, "own", list)
    monkeypatch.setattr(module, "texts", texts)
    with pytest.raises(Joined, match=r"^\['free'\]$"):
        module.main(["--data", "x", "--out", str(tmp_path), "--also", str(path)])
