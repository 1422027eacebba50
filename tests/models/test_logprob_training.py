"""Training of the log-prob model: needs the train extra, so CI leaves it out."""

import importlib
import json
import os
import pickle
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detectors.logprob import Affine
from detectors.protocol import Passage

pytestmark = pytest.mark.train


def small() -> Any:
    """A Llama of two layers, at random."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


def byte_pairs() -> Any:
    """A tokenizer of bytes and five merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d")]
    words = ["<|endoftext|>", *alphabet, *("".join(pair) for pair in merges)]
    found = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


@pytest.mark.parametrize("text", ["the the and then", "Ünï 中文 😀\n\t x", "and" * 40, ""])
def test_a_cut_vocabulary_loses_no_text(text: str) -> None:
    """Fewer merges, more tokens, the same bytes; no id is outside."""
    from training.causal_base import first

    whole = byte_pairs()
    for vocabulary in range(257, whole.get_vocab_size() + 1):
        cut = first(whole, vocabulary)
        ids = cut.encode(text, add_special_tokens=False).ids
        assert all(i < vocabulary for i in ids)
        assert cut.decode(ids) == text
        assert len(json.loads(cut.to_str())["model"]["merges"]) == vocabulary - 257


def test_scores_are_those_of_each_row_alone() -> None:
    """Batched, padded and with the text's positions alone through the head: the same log-probs."""
    import torch

    from training.logprob import read_by

    model = small()
    chance = random.Random(1)
    rows = [
        ([chance.randrange(97) for _ in range(n)], [chance.randrange(97) for _ in range(m)])
        for n, m in ((3, 9), (11, 2), (1, 1), (7, 20))
    ]
    with torch.no_grad():
        found = read_by(model, rows)
        for row, (before, text) in enumerate(rows):
            ids = torch.tensor([before + text])
            said = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            alone = said.gather(-1, ids[0, 1:, None])[-len(text) :, 0].sum()
            # bfloat16 on one side
            assert found.scores[row].item() == pytest.approx(alone.item(), rel=0.02)
            assert int((found.of == row).sum()) == len(text)


def test_learning_tells_two_kinds_of_text_apart() -> None:
    """Margins of a tiny model follow the label after a few dozen steps."""
    import torch

    from training.logprob import (
        Example,
        MarginClassifier,
        Settings,
        log_odds,
        loss,
        read_pairs,
    )

    torch.manual_seed(1)
    chance = random.Random(2)
    classifier = MarginClassifier(small())

    def batch() -> list[Example]:
        made = []
        for number in range(16):
            kind = number % 2
            text = [chance.randrange(10 + 40 * kind, 40 + 40 * kind) for _ in range(8)]
            made.append(Example([0, 1, 2], [0, 3, 2], text, float(kind)))
        return made

    optimiser = torch.optim.AdamW(classifier.parameters(), lr=5e-3)
    for _ in range(60):
        optimiser.zero_grad()
        torch.autograd.backward(loss(classifier, batch(), Settings()))
        optimiser.step()
    asked = batch()
    with torch.no_grad():
        odds = log_odds(classifier, read_pairs(classifier, asked))
    assert [odd > 0 for odd in odds.tolist()] == [it.label > 0.5 for it in asked]


def test_a_band_is_where_the_second_look_is_better() -> None:
    """Encoders that guess near the threshold, a second look that knows: a band, and its gain. One
    that guesses too: none."""
    from training.band import Look, choose

    draw = np.random.default_rng(3)
    looks = {}
    for name, sharp in (("knows", 6.0), ("guesses", 0.0)):
        both = []
        for _ in range(2):
            targets = (draw.random(400) < 0.5).astype(float)
            margins = sharp * (targets - 0.5) + draw.normal(size=400)
            groups = [str(i) for i in range(400)]
            both.append(Look(0.5 + 0.09 * draw.random(400), margins, targets, groups, 0.1))
        looks[name] = choose(both, 0.5)
    line, band, row = looks["knows"]
    assert isinstance(line, Affine)
    assert band is not None
    assert band.above >= 0.1
    told: Any = row[6]
    assert told.low > 0.3
    assert looks["guesses"][1] is None


def test_a_look_that_says_the_same_of_all_gets_no_band() -> None:
    """Nine in ten of what lies below the threshold are harmful: to block all of it gains much, and
    a lower threshold does that without asking."""
    from training.band import Look, choose

    draw = np.random.default_rng(4)
    targets = (np.arange(400) % 10 > 0).astype(float)
    groups = [str(i) for i in range(400)]
    scores = 0.6 - 0.09 * draw.random(400)
    flat = Look(scores, 0.4 * targets + draw.normal(size=400), targets, groups, 0.1)
    knows = Look(scores, 6 * (targets - 0.5) + draw.normal(size=400), targets, groups, 0.1)
    assert choose([flat, flat], 0.6)[1] is None
    assert choose([knows, knows], 0.6)[1] is not None


def test_held_passages_are_replies_with_sure_labels() -> None:
    from training.rows import Row
    from training.second import held

    def row(number: int, harm: float, sure: float, kind: str = "reply") -> Row:
        zero = (0.0,) * 6
        return Row(
            str(number), "s", kind, (), f"Text number {number}. " * 30, (*zero, harm),
            (*zero, sure), f"g{number}", dev=True,
        )  # fmt: skip

    rows = [row(n, float(n % 2), 1.0) for n in range(20)]
    rows += [row(100, 1.0, 0.3), row(101, 1.0, 1.0, "prompt")]
    found = held(rows, 12, random.Random(0))
    targets, known = found.labels(-1)
    assert (len(found.samples), float(targets.sum()), bool(known.all())) == (12, 6.0, True)
    assert set(found.groups).isdisjoint({"g100", "g101"})
    fewer = found.some(6)
    assert (len(fewer.samples), float(fewer.labels(-1)[0].sum())) == (6, 3.0)
    assert all(isinstance(it, Passage) and it.text for it in found.passages)


def test_a_run_that_is_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGTERM in the middle, then the rest: every step once, and the weights of a whole run."""
    import torch

    from training.loop import Loop, Pace

    def run(folder: Path, seen: list[int], cut: int) -> Any:
        torch.manual_seed(5)
        model = torch.nn.Linear(3, 1)

        def loss(batch: int) -> Any:
            seen.append(batch)
            if len(seen) == cut:
                os.kill(os.getpid(), signal.SIGTERM)
            return (model(torch.full((2, 3), batch / 10)) - 1).square().mean()

        groups = [{"params": list(model.parameters()), "lr": 0.01}]
        Loop(
            folder, model, groups, loss, lambda: 0.0, range(20), Pace(save_every=100, patience=99)
        ).go()
        return model.weight

    seen: list[int] = []
    cut_short, whole = tmp_path / "cut", tmp_path / "whole"
    cut_short.mkdir()
    whole.mkdir()
    with pytest.raises(SystemExit, match="stopped after step 7"):
        run(cut_short, seen, 7)
    weight = run(cut_short, seen, 0)
    assert seen == list(range(20))
    assert torch.equal(weight, run(whole, [], 0))
    assert torch.equal(weight, torch.load(whole / "last.pt", weights_only=True)["weight"])
    assert not (cut_short / "state.pt").exists()


def test_a_run_that_is_killed_before_it_first_saved_begins_anew(tmp_path: Path) -> None:
    """Weights of the first look are no sign of its end: those of the last step are."""
    import torch

    from training.loop import Loop, Pace, through

    def run(cut: int) -> None:
        model = torch.nn.Linear(3, 1)

        def loss(batch: int) -> Any:
            if batch == cut:
                raise MemoryError
            return model(torch.ones(2, 3)).square().mean()

        groups = [{"params": list(model.parameters()), "lr": 0.01}]
        Loop(tmp_path, model, groups, loss, lambda: 0.0, range(20), Pace()).go()

    with pytest.raises(MemoryError):
        run(7)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert not through(tmp_path)
    run(-1)
    assert through(tmp_path)
    (tmp_path / "state.pt").touch()  # killed as it wrote the last weights
    assert not through(tmp_path)


@pytest.mark.parametrize("name", ["classifier", "logprob"])
def test_training_goes_on_until_it_is_through(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with the weights of a first look is trained on, one with the last weights is not."""
    import torch

    module = importlib.import_module(f"training.{name}")

    class Trained(Exception):
        pass

    def train(*_: Any) -> None:
        raise Trained

    monkeypatch.setattr(module, "read", lambda _: [])
    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "prepare", lambda *_: None, raising=False)
    monkeypatch.setattr(module, "_start", lambda _: (torch.nn.Linear(1, 1), None), raising=False)
    arguments = ["--data", str(tmp_path), "--out", str(tmp_path)]
    (tmp_path / "model.pt").write_bytes(b"no weights")
    with pytest.raises(Trained):
        module.main(arguments)
    (tmp_path / "last.pt").touch()
    with suppress(pickle.UnpicklingError):  # of the log-prob model, whose weights it writes next
        module.main(arguments)
