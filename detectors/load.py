"""Detector specs, as settings name them, to detectors; and the helper of the second look."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple, cast

import msgspec

from detectors import combine, second
from detectors.combine import Combination
from detectors.harms import DEFAULT_THRESHOLDS
from detectors.logprob import Helper
from detectors.protocol import Detector
from detectors.second import Plan, Second

PYTHON: Final = "python:"  # a user's own detector: python:package.module:attr
CUDA: Final = "@cuda"  # a folder's name and this: its fp16 graph on a GPU
_SERVERS: Final = ("http://", "https://")  # of completions, for the second look
_MEMBERS: Final = ("name", "digest", "thresholds", "encode", "score")


class _Kind(msgspec.Struct):
    """What every manifest may say."""

    kind: str = ""


class LoadError(Exception):
    """A detector cannot be had as configured: the worker must not start."""


class SecondSpec(NamedTuple):
    """What is asked for a second look, as settings name it."""

    name: str  # a folder under `models`, http(s)://..., or python:module:attr
    plan: Path | None = None  # its second.json, where no folder holds one
    model: str = ""  # as a server calls it
    key: str | None = None  # of a server
    deadline_ms: float = 1_000.0  # of one call to a server
    fitting: bool = False  # only where it was made for the detectors there are; else none is asked


def load_detectors(specs: Sequence[str], models: Path) -> tuple[Detector, ...]:
    """The detectors that `specs` name, in their order.

    A spec is the name of a folder under `models`, with `@cuda` behind it to run on a GPU, or
    `python:package.module:attr` where attr is called without arguments. Raises LoadError saying
    what to do.
    """
    if not specs:
        raise LoadError("no detector is configured; name at least one, such as 'toxicity'")
    return tuple(load_detector(spec, models) for spec in specs)


def load_combination(models: Path, detectors: Sequence[Detector]) -> Combination | None:
    """How these detectors' scores become one, as learnt; None: the highest counts. LoadError."""
    try:
        return combine.read(models, detectors)
    except combine.CombinationError as error:
        raise LoadError(str(error)) from error


def shipped_thresholds(
    detectors: Sequence[Detector], combination: Combination | None = None
) -> dict[str, float]:
    """The thresholds that the models bring, by THRESHOLD_KEYS; the defaults where they bring none.

    Of two detectors that bring one, the first counts. Those of a combination are for what comes
    out of it, so they count before all.
    """
    merged = dict(DEFAULT_THRESHOLDS)
    for detector in reversed(detectors):
        merged.update(detector.thresholds)
    if combination is not None:
        merged.update(combination.thresholds)
    return merged


def load_second(
    spec: SecondSpec, models: Path, detectors: Sequence[Detector], combination: Combination | None
) -> Second | None:
    """The language model that looks again where these detectors are uncertain. LoadError.

    None only where the spec says that it must fit, and it does not.
    """
    try:
        plan = _plan(spec, models, detectors, combination)
        if plan is None:
            return None
        digest = plan.digest(_helper_digest(spec, models))
        shipped = shipped_thresholds(detectors, combination)
        return Second(plan, _helper(spec, models, plan), digest, shipped)
    except (OSError, ValueError) as error:
        raise LoadError(f"logprob {spec.name!r}: {error}") from error


def second_digest(
    spec: SecondSpec, models: Path, detectors: Sequence[Detector], combination: Combination | None
) -> str:
    """load_second(...).digest without loading any weights; empty of None. LoadError."""
    try:
        plan = _plan(spec, models, detectors, combination)
        if plan is None:
            return ""
        return plan.digest(_helper_digest(spec, models))
    except (OSError, ValueError) as error:
        raise LoadError(f"logprob {spec.name!r}: {error}") from error


def _plan(
    spec: SecondSpec, models: Path, detectors: Sequence[Detector], combination: Combination | None
) -> Plan | None:
    expected = second.encoders(detectors, combination)
    if combination is not None:  # it holds the folders' digests, whichever graphs are run
        expected = (*combination.detectors.values(), combination.digest)
    if spec.fitting and not any((models / spec.name).glob(second.FILES)):
        return None
    elsewhere = spec.name.startswith((*_SERVERS, PYTHON))
    if elsewhere and spec.plan is None:
        raise ValueError(f"no folder holds its {second.FILE}: name the file in logprob_plan")
    if spec.name.startswith(_SERVERS) and not spec.model:
        raise ValueError("name the server's model in logprob_model")
    plan = None
    if spec.fitting:
        try:
            plan = second.read(models / spec.name, expected)
        except second.OtherDetectorsError:
            return None
    if not elsewhere and not (models / spec.name / "manifest.json").is_file():
        raise ValueError(
            f"no manifest.json in {models / spec.name}. "
            "Build one with `python -m export.causal`, or name a server, http://...:8000/v1"
        )
    return plan or second.read(spec.plan or models / spec.name, expected)


def _helper_digest(spec: SecondSpec, models: Path) -> str:
    """Hex digest, or whatever else tells one language model from another."""
    if spec.name.startswith(_SERVERS):
        return spec.model  # which weights a server has under a name is not to be had
    if spec.name.startswith(PYTHON):
        return f"{spec.name} {getattr(_factory(spec.name), 'digest', '')}"
    from detectors.causal import served_digest

    return served_digest(models / spec.name)


def _helper(spec: SecondSpec, models: Path, plan: Plan) -> Helper:
    if spec.name.startswith(_SERVERS):
        from detectors.remote import RemoteHelper

        return RemoteHelper(
            spec.name, spec.model, key=spec.key, timeout_ms=spec.deadline_ms,
            deadline_ms=spec.deadline_ms, retries=1,
        )  # fmt: skip
    if spec.name.startswith(PYTHON):
        return cast("Helper", _factory(spec.name)())
    from detectors.causal import LocalHelper

    return LocalHelper(models / spec.name, plan.heads())


def load_detector(spec: str, models: Path) -> Detector:
    """The detector that one spec names. Raises LoadError."""
    if spec.startswith(PYTHON):
        return _from_python(spec)
    return _from_folder(spec, models)


def _from_folder(spec: str, models: Path) -> Detector:
    name = spec.removesuffix(CUDA)
    folder = models / name
    if not (folder / "manifest.json").is_file():
        raise LoadError(
            f"detector {spec!r}: no manifest.json in {folder}; there are: {_known(models)}. "
            f"Build one with `python -m export --out {folder}`, "
            f"or write {PYTHON}package.module:attr for your own"
        )
    try:
        return _opened(folder, on_cuda=name != spec)
    except (OSError, ValueError) as error:
        raise LoadError(f"detector {spec!r} in {folder}: {error}") from error


def _opened(folder: Path, *, on_cuda: bool) -> Detector:
    """Raises OSError or ValueError."""
    # Imported here: a worker whose detectors are all its user's own needs no onnxruntime.
    from detectors.toxicity import Toxicity
    from detectors.words import KIND, Words

    if kind_of(folder) != KIND:
        return Toxicity(folder, "cuda" if on_cuda else "cpu")
    if on_cuda:
        raise ValueError(f"it runs on the CPU alone; name it without {CUDA}")
    return Words(folder)


def kind_of(folder: Path) -> str:
    """What its manifest calls itself: `words`, or nothing where it is an encoder's.

    Raises OSError, or ValueError where the manifest cannot be read.
    """
    try:
        return msgspec.json.decode((folder / "manifest.json").read_bytes(), type=_Kind).kind
    except msgspec.DecodeError as error:
        raise ValueError(f"manifest.json cannot be read: {error}") from error


def _known(models: Path) -> str:
    return ", ".join(sorted(path.parent.name for path in models.glob("*/manifest.json"))) or "none"


def _from_python(spec: str) -> Detector:
    detector = _factory(spec)()
    missing = [member for member in _MEMBERS if not hasattr(detector, member)]
    if missing:
        raise LoadError(
            f"detector {spec!r} made a {type(detector).__name__} without {', '.join(missing)}; "
            "a detector has the members of detectors.protocol.Detector"
        )
    return detector


def _factory(spec: str) -> Callable[[], Detector]:
    module, _, attr = spec.removeprefix(PYTHON).partition(":")
    if not module or not attr:
        raise LoadError(f"detector {spec!r}: write it as {PYTHON}package.module:attr")
    try:
        found = getattr(import_module(module), attr)
    except ImportError as error:
        raise LoadError(
            f"detector {spec!r}: {error}; install its package or put it on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise LoadError(f"detector {spec!r}: module {module} has no {attr!r}") from error
    if not callable(found):
        raise LoadError(f"detector {spec!r}: {attr} cannot be called; name a class or a function")
    return found  # type: ignore[no-any-return]  # its members are checked on what it makes
