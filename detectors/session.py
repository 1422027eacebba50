"""A model folder to a session that gives logits; the one module that knows onnxruntime.

A folder holds manifest.json, the .onnx it names and tokenizer.json. Nothing is read before its
SHA-256 is the manifest's, and nothing but .onnx and .json is read at all.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from detectors.buckets import Shape, batches, shapes
from detectors.combine import with_graph
from detectors.harms import COLUMNS, THRESHOLD_KEYS
from detectors.labels import LabelMap
from detectors.protocol import FloatArray, IntArray, Window
from detectors.tokens import Inputs, Layout

Array = npt.NDArray[Any]  # of whatever type the graph wants
Provider = Literal["cpu", "cuda"]
Precision = Literal["fp32", "fp16", "int8"]

FORMAT: Final = 2  # of the manifest as it is written
FORMATS: Final = (1, 2)  # 1 has no layout, labels or further graphs
OPSETS: Final = range(13, 22)  # what the installed onnxruntime was tried with
OPSET_KEY: Final = "tidegate.opset"  # the graph's own word for its opset, in its metadata
INPUTS: Final = ("input_ids", "token_type_ids", "attention_mask")  # a graph may lack the second
_SUFFIXES: Final = (".onnx", ".json")  # never a pickle
_PROVIDERS: Final = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CUDA_OPTIONS: Final = {"use_tf32": "0"}  # its ten bits of mantissa are too few for fp32


class ModelError(ValueError):
    """The folder is not the model that its manifest describes, or cannot be served here."""


class Lengths(msgspec.Struct, frozen=True):
    """Token budgets of a window, as in tokens.Lengths."""

    conversation: int
    text: int
    overlap: int


View = Literal["whole", "segment"]  # segment: without the text before and the conversation


class Said(Protocol):
    """What the manifest of every kind of classifier says."""

    @property
    def columns(self) -> tuple[str, ...]:
        """In the order of the scores."""
        ...

    @property
    def opset(self) -> int:
        """Of the graph's own operators."""
        ...

    @property
    def calibration(self) -> dict[str, tuple[float, float]]:
        """Column to slope and intercept."""
        ...

    @property
    def thresholds(self) -> dict[str, float]:
        """By THRESHOLD_KEYS."""
        ...


class Manifest(msgspec.Struct, frozen=True):
    """manifest.json, as far as serving needs it."""

    format: int
    name: str
    columns: tuple[str, ...]
    model: str  # file name of the graph that the CPU serves
    tokenizer: str
    opset: int
    lengths: Lengths
    files: dict[str, str]  # file name -> SHA-256, hex
    calibration: dict[str, tuple[float, float]]  # column -> slope, intercept
    thresholds: dict[str, float]  # by THRESHOLD_KEYS
    inputs: Inputs = "pair"
    view: View = "whole"
    layout: Layout | None = None  # None: [CLS] A [SEP] B [SEP], by name
    max_tokens: int | None = None  # positions that the model has; None: not stated
    labels: LabelMap | None = None  # None: the graph's outputs are the columns
    graphs: dict[Precision, str] = {}  # file names; a folder need not hold all of them

    def graph(self, provider: Provider, precision: Precision | None) -> str:
        """File name of the graph to run. Raises ModelError where there is none that may."""
        if provider == "cuda" and precision == "int8":
            raise ModelError("dynamic int8 scales over a whole batch: on cuda run fp16 or fp32")
        if provider == "cpu" and precision is None:
            return self.model
        wanted = precision or "fp16"
        if wanted not in self.graphs:
            has = ", ".join(self.graphs) or "none named"
            raise ModelError(f"the manifest has no {wanted} graph ({has}): export the model again")
        return self.graphs[wanted]

    def longest(self) -> int:
        """Tokens of the longest window, special ones included."""
        around = self.layout.around(self.inputs) if self.layout else 3
        asked = self.lengths.conversation if self.inputs == "pair" else 0
        return asked + self.lengths.text + around

    def outputs(self) -> int:
        """Logits of one window."""
        return len(self.labels.names) if self.labels else len(self.columns)


class Folder:
    """A model folder whose files are what its manifest says. Raises ModelError otherwise."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        raw = (folder / "manifest.json").read_bytes()
        self.manifest = _checked(raw)
        for name in (self.manifest.model, self.manifest.tokenizer):
            self.read(name)
        self.digest = digest_of(raw, self.manifest.files)

    def digest_with(self, graph: str) -> str:
        """The digest where `graph` is run: another one gives other scores, so other cache keys."""
        if graph == self.manifest.model:
            return self.digest
        return with_graph(self.digest, graph)

    def read(self, name: str) -> bytes:
        """The bytes of a file, the same ones whose digest was compared."""
        return read_checked(self._folder, name, self.manifest.files)


def read_checked(folder: Path, name: str, files: Mapping[str, str]) -> bytes:
    """The bytes of a file, whose SHA-256 is the one in `files`. Raises ModelError otherwise."""
    expected = files.get(name)
    if expected is None or Path(name).name != name or not name.endswith(_SUFFIXES):
        raise ModelError(f"{name!r} is no .onnx or .json file with a digest in the manifest")
    content = (folder / name).read_bytes()
    found = sha256(content).hexdigest()
    if found != expected:
        raise ModelError(
            f"{name} has SHA-256 {found[:12]}..., the manifest says {expected[:12]}...: "
            "the file was changed or half copied; restore it or export the model again"
        )
    return content


class Graph:
    """Any graph on the CPU: arrays in, arrays out, by name. Thread-safe."""

    def __init__(self, content: bytes, opset: int) -> None:
        """opset: what the manifest says. Raises ModelError where onnxruntime cannot run it."""
        self._session = _open(content, "cpu", cuda_graphs=False)
        _check_opset(self._session, "the graph", opset)
        self.inputs: Final = {given.name: given.shape for given in self._session.get_inputs()}
        self.outputs: Final = {given.name: given.shape for given in self._session.get_outputs()}

    def run(self, outputs: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        """The outputs asked for, in that order."""
        found: list[Array] = self._session.run(list(outputs), dict(feeds))
        return found


class Session:
    """Logits of windows. Thread-safe: onnxruntime's run is, and the buckets have a lock."""

    def __init__(
        self,
        folder: Folder,
        provider: Provider = "cpu",
        precision: Precision | None = None,
        *,
        bucketed: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """Raises ModelError where onnxruntime cannot run the graph on `provider`.

        precision: None takes what serves there: `manifest.model` on cpu, fp16 on cuda.
        bucketed: batches of fixed shapes; None does so on cuda alone.
        cuda_graphs: records each shape once and replays it.
        """
        _check_provider(provider)
        manifest = folder.manifest
        name = manifest.graph(provider, precision)
        self._session = _open(folder.read(name), provider, cuda_graphs)
        _check_graph(self._session, name, manifest)
        self._inputs = tuple(given.name for given in self._session.get_inputs())
        self._buckets: _Buckets | None = None
        if provider == "cuda" if bucketed is None else bucketed:
            self._buckets = _Buckets(self._session, manifest, provider, cuda_graphs)
        self.digest = folder.digest_with(name)

    def logits(self, window: Window) -> FloatArray:
        """(L,) logits of one window."""
        row: FloatArray = self.all_logits([window])[0]
        return row

    def all_logits(self, windows: Sequence[Window]) -> FloatArray:
        """(N, L) logits of windows, in their order.

        On CPU one a call: dynamic int8 scales activations over the whole tensor, so batch mates
        and padding would move the scores; alone costs 12 % of speed.
        """
        if self._buckets is not None:
            return self._buckets.logits(windows)
        return np.stack([self._alone(window) for window in windows])

    def _alone(self, window: Window) -> FloatArray:
        feeds = {
            "input_ids": window.ids[None],  # (1, T)
            "token_type_ids": window.type_ids[None],
            "attention_mask": np.ones((1, len(window.ids)), dtype=np.int64),
        }
        (logits,) = self._session.run(["logits"], {name: feeds[name] for name in self._inputs})
        row: FloatArray = logits[0].astype(np.float64)  # (L,)
        return row


class _Buckets:
    """Batches of fixed shapes, each with buffers of its own on the device."""

    def __init__(
        self, session: ort.InferenceSession, manifest: Manifest, device: Provider, record: bool
    ) -> None:
        if manifest.layout is None or manifest.layout.pad is None:
            raise ModelError("the manifest names no padding token: export the model again")
        self._session = session
        self._pad = manifest.layout.pad
        self._shapes = shapes(manifest.longest(), manifest.max_tokens)
        self._outputs = manifest.outputs()
        self._device = device
        self._record = record
        self._bound: dict[Shape, _Bound] = {}
        self._lock = Lock()  # the buffers are shared, and a recorded graph runs one at a time

    def logits(self, windows: Sequence[Window]) -> FloatArray:
        """(N, L) logits of windows, in their order."""
        found = np.empty((len(windows), self._outputs))
        for batch in batches(windows, self._shapes, self._pad):
            with self._lock:
                rows = self._of(batch.shape).run(batch.feeds)  # (rows, L)
            found[batch.positions] = rows[: len(batch.positions)]
        return found

    def _of(self, shape: Shape) -> "_Bound":
        if shape not in self._bound:
            number = self._shapes.index(shape) + 1 if self._record else None
            self._bound[shape] = _Bound(self._session, shape, self._outputs, self._device, number)
        return self._bound[shape]


class _Bound:
    """One shape: inputs and output stay where they are on the device, only values are copied."""

    def __init__(
        self,
        session: ort.InferenceSession,
        shape: Shape,
        outputs: int,
        device: Provider,
        graph: int | None,
    ) -> None:
        """graph: number under which a CUDA graph of this shape is recorded; None: not at all."""
        self._session = session
        self._options = ort.RunOptions()
        if graph is not None:
            self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._inputs = {
            given.name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.int64), device, 0)
            for given in session.get_inputs()
        }
        self._output = ort.OrtValue.ortvalue_from_shape_and_type(
            [shape.rows, outputs], np.float32, device, 0
        )
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("logits", self._output)

    def run(self, feeds: Mapping[str, IntArray]) -> FloatArray:
        """(rows, L) logits, padding rows included."""
        for name, value in self._inputs.items():
            value.update_inplace(feeds[name])
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        logits: FloatArray = self._output.numpy().astype(np.float64)
        return logits


def _check_provider(provider: Provider) -> None:
    wanted = _PROVIDERS[provider]
    if wanted not in ort.get_available_providers():
        raise ModelError(
            f"onnxruntime here has no {wanted}; install onnxruntime-gpu or set the provider to cpu"
        )


def _open(graph: bytes, provider: Provider, cuda_graphs: bool) -> ort.InferenceSession:
    settings: dict[str, str] = {}
    if provider == "cuda":
        settings = {**_CUDA_OPTIONS, "enable_cuda_graph": str(int(cuda_graphs))}
    try:
        chosen = [(_PROVIDERS[provider], settings)]
        with _in_memory(graph) as source:
            session = ort.InferenceSession(source, _options(), providers=chosen)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise ModelError(f"onnxruntime refuses the graph: {error}") from error
    _give_back()
    return session


@contextmanager
def _in_memory(graph: bytes) -> Iterator[str | bytes]:
    """A path to just these bytes, whose digest was compared; the bytes where there is none.

    Of a graph handed over as bytes onnxruntime keeps more than twice the size of its weights, of
    one that it opens as a file little more than once.
    """
    if not hasattr(os, "memfd_create") or not Path("/proc/self/fd").is_dir():
        yield graph
        return
    handle = os.memfd_create("graph.onnx", os.MFD_CLOEXEC)
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(graph)
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _give_back() -> None:
    """What opening a graph took and freed goes back to the system; glibc would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # One thread a call, several callers: 1.83x on 2 cores; two threads a call: 1.38x.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Every window has its own length: patterns would be planned and kept for each.
    options.enable_mem_pattern = False
    return options


def _check_opset(session: ort.InferenceSession, name: str, expected: int) -> None:
    marked = session.get_modelmeta().custom_metadata_map.get(OPSET_KEY)
    if marked != str(expected):
        raise ModelError(f"{name} was exported with opset {marked}, the manifest says {expected}")


def _check_graph(session: ort.InferenceSession, name: str, manifest: Manifest) -> None:
    _check_opset(session, name, manifest.opset)
    strange = {given.name for given in session.get_inputs()} - set(INPUTS)
    if strange:
        raise ModelError(f"{name} wants inputs {sorted(strange)}, which nobody fills")
    outputs = {given.name: given.shape for given in session.get_outputs()}
    width = outputs["logits"][-1] if "logits" in outputs else None
    if width != manifest.outputs():
        raise ModelError(f"{name} gives {width} logits, the manifest says {manifest.outputs()}")


def _checked(raw: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.DecodeError as error:
        raise ModelError(f"manifest.json cannot be read: {error}") from error
    if manifest.format not in FORMATS:
        raise ModelError(f"manifest format {manifest.format}, this version reads {FORMATS}")
    check_said(manifest)
    if manifest.max_tokens is not None and manifest.longest() > manifest.max_tokens:
        raise ModelError(
            f"windows of {manifest.longest()} tokens, the model has {manifest.max_tokens} positions"
        )
    _check_labels(manifest)
    return manifest


def check_said(manifest: Said) -> None:
    """Raises ModelError where columns, opset, calibration or thresholds cannot serve."""
    if manifest.columns != COLUMNS:
        raise ModelError(f"the model scores {manifest.columns}, expected {COLUMNS}")
    if manifest.opset not in OPSETS:
        raise ModelError(
            f"opset {manifest.opset}; served are {OPSETS.start} to {OPSETS.stop - 1}: export again"
        )
    if set(manifest.calibration) != set(COLUMNS):
        raise ModelError("the calibration does not name each column once")
    _check_thresholds(manifest.thresholds)


def _check_labels(manifest: Manifest) -> None:
    if manifest.labels is None:
        return
    try:
        manifest.labels.check()
    except ValueError as error:
        raise ModelError(f"label map: {error}") from error
    for column in manifest.labels.silent():
        if manifest.calibration[column] != (1.0, 0.0):
            raise ModelError(f"{column} is calibrated, but no label speaks of it")


def _check_thresholds(thresholds: Mapping[str, float]) -> None:
    unknown = set(thresholds) - set(THRESHOLD_KEYS)
    if unknown:
        raise ModelError(f"thresholds for unknown harms: {sorted(unknown)}")
    outside = {harm: t for harm, t in thresholds.items() if not 0.0 <= t <= 1.0}
    if outside:
        raise ModelError(f"thresholds outside 0..1: {outside}")


def digest_of(manifest: bytes, files: Mapping[str, str]) -> str:
    """Over everything that can move a score; the manifest holds calibration and lengths."""
    whole: Any = sha256(manifest)
    for name, digest in sorted(files.items()):
        whole.update(f"{name} {digest}\n".encode())
    hexed: str = whole.hexdigest()
    return hexed
