"""A passage scores the same whatever shares its batch and whoever else is scoring."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from detectors.protocol import Passage, Turn
from detectors.toxicity import Toxicity

MODELS = Path(__file__).parents[2] / "models"
TOLERANCE = 1e-4  # guarantee 4 of the contract
TURNS = (Turn("user", "How do I get rid of my neighbour's dog?"),)
PASSAGES = [
    Passage("Good morning.", "", ()),
    Passage("I will kill you and everyone you love.", "", ()),
    Passage("You could talk to your neighbour about it first.", "Sure. ", TURNS),
    Passage("a", "", TURNS * 50),
    Passage("Wash the rice until the water runs clear, then let it rest. " * 40, "", ()),
    Passage("", "", ()),
    Passage("日本語の文章です。😀 \ud800", "x" * 900, ()),
]


@pytest.fixture(scope="module")
def toxicity() -> Toxicity:
    return Toxicity(MODELS / "toxicity")


def test_alone_or_among_others_scores_are_the_same(toxicity: Toxicity) -> None:
    """Every order and every company, encoded and scored together, moves no score."""
    alone = np.concatenate([toxicity.score(toxicity.encode([p])) for p in PASSAGES])
    for seed in range(3):
        order = random.Random(seed).sample(range(len(PASSAGES)), len(PASSAGES))
        together = toxicity.score(toxicity.encode([PASSAGES[i] for i in order]))
        assert np.abs(together - alone[order]).max() <= TOLERANCE


def test_several_threads_get_the_same_scores(toxicity: Toxicity) -> None:
    """One session serves many callers at once."""
    encoded = toxicity.encode(PASSAGES)
    expected = toxicity.score(encoded)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(toxicity.score, [encoded] * 8):
            assert np.array_equal(found, expected)


def test_every_score_is_a_probability(toxicity: Toxicity) -> None:
    """0..1 for any text."""
    scores = toxicity.score(toxicity.encode(PASSAGES))
    assert scores.shape == (len(PASSAGES), 7)
    assert ((scores >= 0) & (scores <= 1)).all()
