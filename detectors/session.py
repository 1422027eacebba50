"""A model folder to a session that gives logits; the one module that knows onnxruntime.

A folder holds manifest.json, the .onnx it names and tokenizer.json. Nothing is read before its
SHA-256 is the manifest's, and nothing but .onnx and .json is read at all.
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import onnxruntime as ort

from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.protocol import FloatArray, Window

Provider = Literal["cpu", "cuda"]

FORMAT: Final = 1  # of the manifest
OPSETS: Final = range(13, 22)  # what the installed onnxruntime was tried with
OPSET_KEY: Final = "tidegate.opset"  # the graph's own word for its opset, in its metadata
_SUFFIXES: Final = (".onnx", ".json")  # never a pickle
_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class ModelError(ValueError):
    """The folder is not the model that its manifest describes, or cannot be served here."""


class Lengths(msgspec.Struct, frozen=True):
    """Token budgets of a window, as in tokens.Lengths."""

    conversation: int
    text: int
    overlap: int


class Manifest(msgspec.Struct, frozen=True):
    """manifest.json, as far as serving needs it."""

    format: int
    name: str
    columns: tuple[str, ...]
    model: str  # file name of the graph
    tokenizer: str
    opset: int
    lengths: Lengths
    files: dict[str, str]  # file name -> SHA-256, hex
    calibration: dict[str, tuple[float, float]]  # column -> slope, intercept
    thresholds: dict[str, float]  # by THRESHOLD_KEYS


class Folder:
    """A model folder whose files are what its manifest says. Raises ModelError otherwise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        raw = (folder / "manifest.json").read_bytes()
        self.manifest = _checked(raw)
        for name in (self.manifest.model, self.manifest.tokenizer):
            self.read(name)
        self.digest = _digest(raw, self.manifest.files)

    def read(self, name: str) -> bytes:
        """The bytes of a file, the same ones whose digest was compared."""
        expected = self.manifest.files.get(name)
        if expected is None or Path(name).name != name or not name.endswith(_SUFFIXES):
            raise ModelError(f"{name!r} is no .onnx or .json file with a digest in the manifest")
        content = (self._folder / name).read_bytes()
        found = sha256(content).hexdigest()
        if found != expected:
            raise ModelError(
                f"{name} has SHA-256 {found[:12]}..., the manifest says {expected[:12]}...: "
                "the file was changed or half copied; restore it or export the model again"
            )
        return content


class Session:
    """Logits of windows. Thread-safe: onnxruntime's run is, and nothing else is kept."""

    def __init__(self, folder: Folder, provider: Provider = "cpu") -> None:
        """Raises ModelError where onnxruntime cannot run the graph on `provider`."""
        manifest = folder.manifest
        self._session = _open(folder.read(manifest.model), provider)
        marked = self._session.get_modelmeta().custom_metadata_map.get(OPSET_KEY)
        if marked != str(manifest.opset):
            raise ModelError(
                f"{manifest.model} was exported with opset {marked}, "
                f"the manifest says {manifest.opset}"
            )

    def logits(self, window: Window) -> FloatArray:
        """(7,) logits of one window.

        One a call: dynamic int8 scales activations over the whole tensor, so batch mates and
        padding would move the scores; alone, costs 12 % of speed on CPU.
        """
        feeds = {
            "input_ids": window.ids[None],  # (1, T)
            "token_type_ids": window.type_ids[None],
            "attention_mask": np.ones((1, len(window.ids)), dtype=np.int64),
        }
        (logits,) = self._session.run(["logits"], feeds)  # (1, 7)
        row: FloatArray = logits[0].astype(np.float64)
        return row


def _open(graph: bytes, provider: Provider) -> ort.InferenceSession:
    wanted = _PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise ModelError(
            f"onnxruntime here has no {wanted}; install onnxruntime-gpu or set the provider to cpu"
        )
    try:
        return ort.InferenceSession(graph, _options(), providers=[wanted])
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"onnxruntime refuses the graph: {error}") from error


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # One thread a call, several callers: 1.83x on 2 cores; two threads a call: 1.38x.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Every window has its own length: patterns would be planned and kept for each.
    options.enable_mem_pattern = False
    return options


def _checked(raw: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelError(f"manifest.json cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise ModelError(f"manifest format {manifest.format}, this version reads {FORMAT}")
    if manifest.columns != COLUMNS:
        raise ModelError(f"the model scores {manifest.columns}, expected {COLUMNS}")
    if manifest.opset not in OPSETS:
        raise ModelError(
            f"opset {manifest.opset}; served are {OPSETS.start} to {OPSETS.stop - 1}: export again"
        )
    if set(manifest.calibration) != set(COLUMNS):
        raise ModelError("the calibration does not name each column once")
    _check_thresholds(manifest.thresholds)
    return manifest


def _check_thresholds(thresholds: Mapping[str, float]) -> None:
    unknown = set(thresholds) - set(THRESHOLD_KEYS)
    if unknown:
        raise ModelError(f"thresholds for unknown harms: {sorted(unknown)}")
    outside = {harm: t for harm, t in thresholds.items() if not 0.0 <= t <= 1.0}
    if outside:
        raise ModelError(f"thresholds outside 0..1: {outside}")


def _digest(manifest: bytes, files: Mapping[str, str]) -> str:
    """Over everything that can move a score; the manifest holds calibration and lengths."""
    whole: Any = sha256(manifest)
    for name, digest in sorted(files.items()):
        whole.update(f"{name} {digest}\n".encode())
    hexed: str = whole.hexdigest()
    return hexed
