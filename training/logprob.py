"""Fine-tunes the log-prob model: `python -m training.logprob --data ../shared/data --out RUN`.

A class prompt must make the texts of its class likelier than its opposite does. So the model learns
from pairs: the same passage behind a harmful and a harmless prompt, and the difference of its
log-probs (the margin) is the log-odds of the label, as in discriminatively trained GeDi (Krause et
al. 2021, 2009.06367). A share of the plain language-model loss behind the right prompt stays in:
layers that were taken out are made up for, and log-probs stay log-probs. A margin needs the product
of two things that are hard to learn at once, what the prompt says and what the text is; so a probe
that does not outlast training asks a middle layer for each of them. The run folder holds the model
in Hugging Face's layout, for `python -m export.causal --hf RUN/model --start 0`.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from detectors.harms import COLUMNS, HARMFUL
from detectors.prompts import PROMPTS, SHORT_LIMITS, body, prefix
from training import also, causal_base
from training.batches import batches
from training.loop import Loop, Pace, through
from training.metrics import auroc
from training.rows import Parts, provenance, read, split
from training.windows import Sample, capped, samples

_HELD_OUT: Final = 240  # passages, half of them harmful
_ANY_SHARE: Final = 0.6  # of the examples ask for any harm, the others for one
_PROBED: Final = 67  # per cent of the layers lie before the probe
_LONGEST: Final = 640  # tokens of both rows; few passages have more
# Log-odds a nat of margin. Fixed: one that is learnt shrinks while margins are noise, and what they
# learn with it.
_SLOPE: Final = 0.15


@dataclass(frozen=True)
class Settings:
    """How to train. Saved in the run folder."""

    layers: tuple[int, ...] = (*range(8), *range(26, 30))  # of 30: of ten choices the least lost
    vocabulary: int = 16_384
    seed: int = 31
    examples: int = 16_000
    batch_tokens: int = 6_144  # padded, both prompts counted
    learning_rate: float = 3e-4
    language_share: float = 0.2  # of the plain loss, a token
    probe_share: float = 0.5  # of the probe's loss
    threads: int = 2
    start_from: str = ""  # a model.pt of an earlier run


class Example(NamedTuple):
    """A passage behind both prompts. ids: of harmful prefix, harmless prefix, text."""

    harmful: list[int]
    harmless: list[int]
    text: list[int]
    label: float

    @property
    def length(self) -> int:
        """Tokens of the two rows, both as long as the longer one."""
        return 2 * (max(len(self.harmful), len(self.harmless)) + len(self.text))


class MarginClassifier(nn.Module):
    """The language model, what turns its margins into log-odds, and the probe."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.intercept = nn.Parameter(torch.tensor(0.0))
        self.probe = nn.Linear(model.config.hidden_size, 2)  # is the text, is the prompt harmful?


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or goes on with a run that was cut short; then writes RUN/model."""
    parser = argparse.ArgumentParser(prog="python -m training.logprob", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds permissive/")
    parser.add_argument("--out", type=Path, required=True, help="run folder, made or resumed")
    parser.add_argument("--layers", type=int, nargs="+", default=Settings.layers)
    for name in ("vocabulary", "seed", "examples", "batch_tokens", "threads"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(Settings, name))
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--start-from", default=Settings.start_from, help="an earlier model.pt")
    given = vars(parser.parse_args(argv))
    known = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in given.items() if name in known}
    settings = Settings(**chosen | {"layers": tuple(given["layers"])})
    run: Path = given["out"]
    run.mkdir(parents=True, exist_ok=True)
    (run / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    classifier, tokenizer = _start(settings)
    if not through(run):
        train(run, split(read(given["data"] / "permissive")), classifier, tokenizer, settings)
    classifier.load_state_dict(torch.load(run / "model.pt", weights_only=True))
    classifier.model.save_pretrained(run / "model")
    tokenizer.save(str(run / "model" / "tokenizer.json"))
    said = {
        "base": causal_base.origin(),
        "settings": asdict(settings),
        **provenance(given["data"] / "permissive"),
    }
    (run / "model" / "provenance.json").write_text(json.dumps(said, indent=2))
    print(f"trained; next: python -m export.causal --hf {run / 'model'} --start 0 --out FOLDER")


def _start(settings: Settings) -> tuple[MarginClassifier, Tokenizer]:
    model, tokenizer = causal_base.smaller(settings.layers, settings.vocabulary)
    classifier = MarginClassifier(model)
    if settings.start_from:
        state = torch.load(settings.start_from, weights_only=True)
        classifier.load_state_dict(state)
    return classifier, tokenizer


def train(
    run: Path, parts: Parts, classifier: MarginClassifier, tokenizer: Tokenizer, settings: Settings
) -> None:
    """Leaves the weights that rank what is held out best in model.pt."""
    chance = random.Random(settings.seed)
    fit = capped(parts.fit, chance) + capped(also.own(), chance)
    chosen = examples(samples(fit, chance), tokenizer, chance, settings.examples)
    # Only from replies: the stream's text is a reply, and so are the passages of the band.
    dev = [row for row in parts.calibrate if row.kind == "reply"]
    dev = chance.sample(dev, min(4 * _HELD_OUT, len(dev)))
    held_out = examples(samples(dev, chance), tokenizer, chance, _HELD_OUT)
    steps = list(batches(chosen, settings.batch_tokens, str(settings.seed)))
    looks_at = list(batches(held_out, settings.batch_tokens, "held out"))
    print(f"{len(chosen)} examples, {len(held_out)} held out, {len(steps)} steps", flush=True)
    Loop(
        run, classifier, _groups(classifier, settings),
        loss=lambda batch: loss(classifier, batch, settings),
        held_out=lambda: _held_out(classifier, looks_at),
        steps=steps, pace=Pace(0.04, looks=16, patience=16),
    ).go()  # fmt: skip


def _groups(classifier: MarginClassifier, settings: Settings) -> list[dict[str, Any]]:
    return [
        {"params": list(classifier.model.parameters()), "lr": settings.learning_rate},
        {"params": [classifier.intercept, *classifier.probe.parameters()], "lr": 5e-3},
    ]


def examples(
    found: Sequence[Sample], tokenizer: Tokenizer, chance: random.Random, count: int
) -> list[Example]:
    """At most `count`, as many harmful as harmless, each about one harm or about any."""
    harmful, harmless = [], []
    for sample in chance.sample(list(found), len(found)):
        columns = [i for i, weight in enumerate(sample.weights) if weight > 0]
        if not columns:
            continue
        column = _column(sample, columns, chance)
        (harmful if sample.targets[column] >= 0.5 else harmless).append((sample, column))
    each = min(count // 2, len(harmful), len(harmless))
    pairs = [*harmful[:each], *harmless[:each]]
    made = [_example(sample, column, tokenizer, chance) for sample, column in pairs]
    return [it for it in made if it.length <= _LONGEST]


def _column(sample: Sample, columns: Sequence[int], chance: random.Random) -> int:
    """The harm that is asked about: any, or one, of harmful passages one that they have."""
    whole = COLUMNS.index(HARMFUL)
    single = [i for i in columns if i != whole]
    if whole in columns and (not single or chance.random() < _ANY_SHARE):
        return whole
    has = [i for i in single if sample.targets[i] >= 0.5]
    return chance.choice(has or single)


def _example(sample: Sample, column: int, tokenizer: Tokenizer, chance: random.Random) -> Example:
    prompts = PROMPTS[COLUMNS[column]]
    way = chance.randrange(len(prompts.harmful))
    ids = [
        tokenizer.encode(text, add_special_tokens=False).ids
        for text in (
            prefix(prompts.harmful[way], sample.passage, SHORT_LIMITS),
            prefix(prompts.harmless[way], sample.passage, SHORT_LIMITS),
            body(sample.passage.text),
        )
    ]
    start = [causal_base.START]
    label = float(sample.targets[column] >= 0.5)
    return Example(start + ids[0], start + ids[1], ids[2], label)


class Read(NamedTuple):
    """N prompts, T tokens of texts in all."""

    scores: Tensor  # (N,) log-prob of each text behind its prefix, nats
    middle: Tensor  # (T, D) of a middle layer, where the text's tokens are predicted
    of: Tensor  # (T,) which prompt a token belongs to


def read_by(model: LlamaForCausalLM, rows: Sequence[tuple[list[int], list[int]]]) -> Read:
    """What the model makes of rows, the ids of a prefix and of a text.

    The head sees the texts' tokens alone. Padding stands on the right, where a causal model's
    tokens never look.
    """
    longest = max(len(before) + len(text) for before, text in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.int64)
    own = torch.zeros((len(rows), longest), dtype=torch.bool)  # tokens of the text
    for row, (before, text) in enumerate(rows):
        ids[row, : len(before) + len(text)] = torch.tensor(before + text)
        own[row, len(before) : len(before) + len(text)] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        predicts = own[:, 1:]
        logits = model.lm_head(found.last_hidden_state[:, :-1][predicts])  # (T, V)
        layers = found.hidden_states
        middle = layers[len(layers) * _PROBED // 100][:, :-1][predicts]
    said = -nn.functional.cross_entropy(logits.float(), ids[:, 1:][predicts], reduction="none")
    of = torch.arange(len(rows))[:, None].expand_as(predicts)[predicts]
    return Read(torch.zeros(len(rows)).index_add(0, of, said), middle.float(), of)


def read_pairs(classifier: MarginClassifier, batch: Sequence[Example]) -> Read:
    """Each passage behind its harmful prompt, then each behind its harmless one."""
    rows = [(it.harmful, it.text) for it in batch] + [(it.harmless, it.text) for it in batch]
    return read_by(classifier.model, rows)


def log_odds(classifier: MarginClassifier, found: Read) -> Tensor:
    """(B,) of the label being harmful."""
    harmful, harmless = found.scores.chunk(2)
    return _SLOPE * (harmful - harmless) + classifier.intercept


def loss(classifier: MarginClassifier, batch: Sequence[Example], settings: Settings) -> Tensor:
    """Cross-entropy of the labels, and shares of the language model's (a token) and the probe's."""
    found = read_pairs(classifier, batch)
    labels = torch.tensor([it.label for it in batch])
    told = _cross_entropy(log_odds(classifier, found), labels)
    tokens = torch.tensor([float(len(it.text)) for it in batch])
    right = torch.where(labels > 0.5, *found.scores.chunk(2))
    language = -(right / tokens).mean()
    asked = torch.tensor([1.0, 0.0]).repeat_interleave(len(batch))
    truth = torch.stack([labels.repeat(2), asked], dim=1)[found.of]  # (T, 2)
    probed = _cross_entropy(classifier.probe(found.middle), truth)
    return told + settings.language_share * language + settings.probe_share * probed


def _cross_entropy(found: Tensor, truth: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(found, truth)


def _held_out(classifier: MarginClassifier, chosen: Sequence[Sequence[Example]]) -> float:
    """Share of pairs that are ranked wrong. Not the loss: a slope is found after training anyway,
    and margins that have grown too large cost more than they should."""
    read = [read_pairs(classifier, batch) for batch in chosen]
    found = torch.cat([log_odds(classifier, it) for it in read])
    labels = torch.tensor([it.label for batch in chosen for it in batch])
    probed = torch.cat([_of_text(classifier, it) for it in read])
    loss = round(float(_cross_entropy(found, labels)), 4)
    figures = {"AUROC": _ranked(found, labels), "loss": loss, "probe": _ranked(probed, labels)}
    print(f"held out: {figures}", flush=True)
    return 1 - figures["AUROC"]


def _of_text(classifier: MarginClassifier, found: Read) -> Tensor:
    """(B,) the probe's mean verdict on each text."""
    count = len(found.scores)
    said = classifier.probe(found.middle)[:, 0]
    sums = torch.zeros(count).index_add(0, found.of, said)
    return sum((sums / torch.bincount(found.of, minlength=count)).chunk(2), torch.zeros(count // 2))


def _ranked(found: Tensor, labels: Tensor) -> float:
    return round(float(auroc(labels.double().numpy(), found.double().numpy())), 4)


if __name__ == "__main__":
    main()
