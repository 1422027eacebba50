"""commands -> settings -> clients -> pipeline; wiring only."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvloop
from pydantic import ValidationError
from rich.console import Console

from detectors.keywords import KeywordError
from detectors.load import LoadError
from worker import settings as settings_module
from worker.errors import Stop
from worker.settings import Settings

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Moderate what language models say while they say it.",
)  # fmt: skip
_err = Console(stderr=True, highlight=False)

Config = Annotated[
    Path | None, typer.Option("--config", help="Settings file. Default: tidegate.toml, if there.")
]


def main() -> None:
    """The `tidegate` command: known failures end with one line and what to do, exit 1."""
    try:
        app()
    except (Stop, LoadError, KeywordError, FileNotFoundError) as error:
        _fail(str(error))
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"setting {'.'.join(map(str, first['loc']))}: {first['msg']}")


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _fail(message: str) -> None:
    _err.print(f"[bold red]tidegate:[/] {message}", markup=True, soft_wrap=True)
    sys.exit(1)


def configure_logs(level: str) -> None:
    """JSON lines on stderr: a constant event, fields beside it, never user text."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", key="at"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it tells of every retry


def run_loop(main_coroutine: Coroutine[Any, Any, None]) -> None:
    """Run on uvloop; a Stop inside task groups comes out as itself."""
    try:
        uvloop.run(main_coroutine)
    except BaseExceptionGroup as group:
        stops, _ = group.split(Stop)
        raise (_first(stops) if stops else group) from None


@app.command()
def run(config: Config = None) -> None:
    """The worker: llm.outputs to decisions. Start more of them to scale."""
    settings = settings_module.load(config)
    configure_logs(settings.log_level)
    run_loop(_run(settings))


async def _run(settings: Settings) -> None:
    from prometheus_client import start_http_server

    from worker import watchdog
    from worker.consume import Worker
    from worker.pipeline import Pipeline

    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, addr="127.0.0.1")
    async with Pipeline(settings) as pipeline:
        worker = Worker(settings, pipeline)
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, worker.stop)
        watchdog.start(lambda: worker.beat, settings.watchdog_ms)
        await worker.run()


@app.command()
def learn(config: Config = None) -> None:
    """Reviewers' labels to thresholds. Start a second one to stand by: one at a time leads."""
    settings = settings_module.load(config)
    configure_logs(settings.log_level)
    run_loop(_learn(settings))


async def _learn(settings: Settings) -> None:
    from prometheus_client import start_http_server

    from detectors.load import load_combination, load_detectors
    from worker import watchdog
    from worker.detect import model_id
    from worker.learn import Learner
    from worker.thresholds import shipped_thresholds

    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, addr="127.0.0.1")
    detectors = load_detectors(settings.detectors, settings.models)
    combination = load_combination(settings.models, detectors)
    shipped = shipped_thresholds(detectors, combination)
    learner = Learner(settings, shipped, model_id(detectors, combination))
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, learner.stop)
    watchdog.start(lambda: learner.beat, settings.watchdog_ms)
    await learner.run()


@app.command()
def topics(config: Config = None) -> None:
    """Create the topics, or check that they have the right partitions and cleanup policies."""
    settings = settings_module.load(config)
    run_loop(_topics(settings))


async def _topics(settings: Settings) -> None:
    from worker.topics import create_topics

    report = await create_topics(settings)
    for name in report.created:
        _err.print(f"created {name}")
    for name in report.checked:
        _err.print(f"checked {name}")
    _err.print(f"{report.partitions} partitions; next: `tidegate run`")


@app.command()
def demo(
    config: Config = None,
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Leave the system up until Ctrl-C.")
    ] = False,
) -> None:
    """The whole system on this machine: Kafka, Valkey, workers, sample conversations, live."""
    from worker import demo, screen

    settings = settings_module.load(config)
    configure_logs("ERROR")
    console = Console(highlight=False)
    board = screen.Board(demo.read_samples())
    view = screen.view_for(console, board)
    guide = (lambda servers: console.print(demo.guide(servers))) if keep_running else None
    try:
        demo.prepare(settings, view)
        run_loop(demo.play(settings, config, board, view, guide))
    except ModuleNotFoundError as error:
        raise Stop(f"{error}: the demo's servers come with pip install 'tidegate[local]'") from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(0 if keep_running and board.over else 130)
    finally:
        view.close()


@app.command()
def moderate(
    source: Annotated[
        Path | None,
        typer.Option("--input", exists=True, dir_okay=False, help="Deltas. Default: stdin."),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", dir_okay=False, help="Default: stdout.")
    ] = None,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="One line a stream: its scores and verdict.")
    ] = False,
    config: Config = None,
) -> None:
    """Deltas in a JSON Lines file to decisions: the same pipeline, no broker, no Redis."""
    from worker.offline import moderate_files

    settings = settings_module.load(config)
    configure_logs(settings.log_level)
    errors: list[BaseException] = []
    try:
        run_loop(moderate_files(settings, source, target, scores_only))
    except* OSError as group:
        errors += group.exceptions
    if errors and isinstance(_first(errors[0]), BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has seen enough, as `head` does
    elif errors:
        raise Stop(str(_first(errors[0])))


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(help="Which. Default: all.")] = None,
) -> None:
    """The benchmarks, peers beside ours in one run. Each ends with one JSON line."""
    import runpy
    from pkgutil import iter_modules

    import bench as benches

    known = sorted(
        module.name for module in iter_modules(benches.__path__)
        if module.name not in {"report", "texts"}
    )  # fmt: skip
    for name in names or known:
        if name not in known:
            raise Stop(f"no benchmark {name!r}; there are: {', '.join(known)}")
    sys.argv = sys.argv[:1]
    for name in names or known:
        runpy.run_module(f"bench.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
