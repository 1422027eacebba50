"""Log-probs of prompts from a causal language model in ONNX, on this machine.

A folder holds manifest.json, graphs and tokenizer.json, as `python -m export.causal` writes it. The
graph takes the keys and values of what came before (past) and gives the log-prob of each next
token, never the logits of a whole vocabulary:

    input_ids, targets (B, T) int64; past.I.key, past.I.value (1, H, P, D) float32, for all rows
    -> logprobs (B, T) of targets; present.I.key, present.I.value (B, H, P + T, D)

What prompts begin with (their heads) is computed once and shared.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec
import numpy as np
from tokenizers import Tokenizer

from detectors.session import OPSETS, Array, Graph, ModelError, Precision, digest_of, read_checked

FORMAT: Final = 1  # of the manifest
_SURROGATES: Final = dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)  # Rust strings hold none
_OWN: Final = ("input_ids", "targets")


class CausalManifest(msgspec.Struct, frozen=True):
    """manifest.json of a causal model, as far as serving needs it."""

    format: int
    kind: Literal["causal"]
    name: str
    model: str  # file name of the graph that serves
    precision: Precision  # of that graph
    tokenizer: str
    opset: int
    start: int  # id that stands before every prompt, so that its first token has a log-prob
    positions: int  # tokens that the model reads at most
    layers: int
    heads: int  # of keys and values
    width: int  # of one head
    files: dict[str, str]  # file name -> SHA-256, hex
    graphs: dict[Precision, str] = {}  # file names


class _Head(NamedTuple):
    """A beginning that prompts share."""

    ids: tuple[int, ...]  # the start among them
    logprobs: tuple[float, ...]  # of ids[1:]
    past: tuple[Array, ...]  # (1, H, P, D) each, P = len(ids) - 1; key and value by layer


class _Asked(NamedTuple):
    """What of one prompt is not known from its head."""

    position: int  # in the list of prompts
    head: int
    shared: int  # tokens that it has in common with the head, the start among them
    ids: list[int]  # the whole prompt, the start among them

    @property
    def length(self) -> int:
        """Tokens to compute."""
        return len(self.ids) - self.shared


class LocalHelper:
    """logprob.Helper and logprob.Splitter over a model folder. Thread-safe.

    Every token of a prompt has a log-prob: before the first stands the model's start token.
    """

    def __init__(
        self,
        folder: Path,
        heads: Sequence[str] = (),
        *,
        max_batch_tokens: int = 256,
        precision: Precision | None = None,
    ) -> None:
        """Raises OSError or ModelError (a ValueError) where the folder does not serve.

        heads: what prompts begin with, ClassPrompts.heads(); others are computed in full.
        max_batch_tokens: of one call, padding included; a longer prompt goes alone. The graph holds
        as many rows of vocabulary in fp32 at a time: 50 MB for 256 of 49,152 tokens.
        precision: None takes the graph that the manifest serves. int8 scales activations over the
        whole call, so there each prompt goes alone, and no score depends on the batch.
        """
        raw = (folder / "manifest.json").read_bytes()
        self._manifest = manifest = _checked(raw)
        self._alone = (precision or manifest.precision) == "int8"
        name = manifest.model if precision is None else manifest.graphs.get(precision)
        if name is None:
            raise ModelError(f"the manifest has no {precision} graph: export the model again")
        self._tokenizer = _tokenizer(read_checked(folder, manifest.tokenizer, manifest.files))
        self._graph = Graph(read_checked(folder, name, manifest.files), manifest.opset)
        self._past = _names("past", manifest)
        _check_graph(self._graph, self._past, manifest)
        self.digest: Final = _digest(raw, name, manifest)
        self._budget = max_batch_tokens
        # The last one fits every prompt: the start token and nothing else.
        self._heads = [self._head(self._ids(head)) for head in dict.fromkeys([*heads, ""])]

    def __call__(self, prompts: list[str]) -> list[list[float]]:
        """Log-probs of each prompt's tokens, nats, in order.

        Raises ValueError where a prompt has more tokens than the model reads.
        """
        asked = [self._asked(position, prompt) for position, prompt in enumerate(prompts)]
        rows = [list(self._heads[it.head].logprobs[: it.shared - 1]) for it in asked]
        for batch in self._batches(asked):
            for it, computed in zip(batch, self._computed(batch), strict=True):
                rows[it.position] += computed
        return rows

    def split(self, prefix: str, prompt: str) -> int:
        """How many log-probs of `prompt` belong to `prefix`.

        Raises ValueError where the prefix's tokens are not the first tokens of the prompt.
        """
        first, whole = self._ids(prefix), self._ids(prompt)
        if whole[: len(first)] != first or len(whole) == len(first):
            raise ValueError("a token reaches over the seam between prompt and text")
        return len(first) - 1

    def _ids(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(text.translate(_SURROGATES), add_special_tokens=False)
        return [self._manifest.start, *encoding.ids]

    def _asked(self, position: int, prompt: str) -> _Asked:
        ids = self._ids(prompt)
        if len(ids) - 1 > self._manifest.positions:
            raise ValueError(
                f"a prompt of {len(ids) - 1} tokens, the model reads {self._manifest.positions}"
            )
        shared = [_common(head.ids, ids) for head in self._heads]
        best = max(range(len(shared)), key=shared.__getitem__)
        return _Asked(position, best, shared[best], ids)

    def _batches(self, asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Prompts of one head and about one length together, within the token budget."""
        batch: list[_Asked] = []
        for it in sorted(asked, key=lambda it: (it.head, it.shared, it.length)):
            if not it.length:
                continue  # all of it is head
            alike = batch and (it.head, it.shared) == (batch[0].head, batch[0].shared)
            full = self._alone or (len(batch) + 1) * it.length > self._budget
            if batch and (full or not alike):
                yield batch
                batch = []
            batch.append(it)
        if batch:
            yield batch

    def _computed(self, batch: Sequence[_Asked]) -> list[list[float]]:
        """Log-probs behind the head, for each prompt of a batch.

        Padding stands on the right, where a causal model's real tokens never look.
        """
        shared = batch[0].shared
        longest = max(it.length for it in batch)
        ids = np.zeros((len(batch), longest + 1), dtype=np.int64)
        for row, it in enumerate(batch):
            ids[row, : it.length + 1] = it.ids[shared - 1 :]
        past = [part[:, :, : shared - 1] for part in self._heads[batch[0].head].past]
        (found,) = self._run(["logprobs"], ids, past)  # (B, T)
        return [found[row, : it.length].tolist() for row, it in enumerate(batch)]

    def _head(self, ids: list[int]) -> _Head:
        manifest = self._manifest
        empty = np.zeros((1, manifest.heads, 0, manifest.width), dtype=np.float32)
        past = [empty] * len(self._past)
        if len(ids) == 1:
            return _Head(tuple(ids), (), tuple(past))
        names = ["logprobs", *_names("present", manifest)]
        found, *present = self._run(names, np.array([ids], dtype=np.int64), past)
        return _Head(tuple(ids), tuple(found[0].tolist()), tuple(present))

    def _run(self, outputs: Sequence[str], ids: Array, past: Sequence[Array]) -> list[Array]:
        """ids: (B, T + 1); each but the first is a target of the one before."""
        feeds = {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        return self._graph.run(outputs, feeds | dict(zip(self._past, past, strict=True)))


def served_digest(folder: Path) -> str:
    """LocalHelper(folder).digest without loading any weights: their digests are in the manifest.

    Raises OSError or ModelError.
    """
    raw = (folder / "manifest.json").read_bytes()
    manifest = _checked(raw)
    return _digest(raw, manifest.model, manifest)


def _digest(raw: bytes, graph: str, manifest: CausalManifest) -> str:
    return digest_of(raw + graph.encode(), manifest.files)


def _common(head: Sequence[int], ids: Sequence[int]) -> int:
    """Tokens that both begin with, at least the start."""
    for position, (one, other) in enumerate(zip(head, ids, strict=False)):
        if one != other:
            return position
    return min(len(head), len(ids))


def _names(kind: Literal["past", "present"], manifest: CausalManifest) -> list[str]:
    return [f"{kind}.{i}.{part}" for i in range(manifest.layers) for part in ("key", "value")]


def _tokenizer(content: bytes) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"not a tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _checked(raw: bytes) -> CausalManifest:
    try:
        manifest = msgspec.json.decode(raw, type=CausalManifest)
    except msgspec.DecodeError as error:
        raise ModelError(f"manifest.json is no causal model's: {error}") from error
    if manifest.format != FORMAT:
        raise ModelError(f"manifest format {manifest.format}, this version reads {FORMAT}")
    if manifest.opset not in OPSETS:
        raise ModelError(f"opset {manifest.opset}; served are {OPSETS.start} to {OPSETS.stop - 1}")
    return manifest


def _check_graph(graph: Graph, past: Sequence[str], manifest: CausalManifest) -> None:
    """Names and sizes are those that `_run` fills and reads."""
    if set(graph.inputs) != {*_OWN, *past}:
        raise ModelError(f"the graph wants {sorted(graph.inputs)}: no model of this manifest")
    sizes = {tuple(graph.inputs[name][i] for i in (1, 3)) for name in past}
    if sizes != {(manifest.heads, manifest.width)}:
        raise ModelError("the graph's past has other sizes than the manifest says")
    if not {"logprobs", *_names("present", manifest)} <= set(graph.outputs):
        raise ModelError("the graph gives no log-probs, or nothing to share")
