"""commands -> settings -> clients -> pipeline; wiring only."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
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
thresholds_app = typer.Typer(
    no_args_is_help=True, help="See learnt thresholds, and have the last word on them."
)
app.add_typer(thresholds_app, name="thresholds")
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

    from worker import watchdog
    from worker.learn import Learner

    if settings.metrics_port is not None:
        start_http_server(settings.metrics_port, addr="127.0.0.1")
    learner = Learner(settings, *_shipped(settings))
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, learner.stop)
    watchdog.start(lambda: learner.beat, settings.watchdog_ms)
    await learner.run()


def _shipped(settings: Settings) -> tuple[dict[str, float], str]:
    """The detectors' own thresholds, and how decisions name them."""
    from detectors.load import (
        load_combination,
        load_detectors,
        second_digest,
        shipped_thresholds,
    )
    from worker.detect import model_id
    from worker.second import spec_of

    detectors = load_detectors(settings.detectors, settings.models)
    combination = load_combination(settings.models, detectors)
    spec = spec_of(settings)
    second = second_digest(spec, settings.models, detectors, combination) if spec else ""
    return shipped_thresholds(detectors, combination), model_id(detectors, combination, second)


Tenant = Annotated[str, typer.Argument(help="The tenant, as in its deltas.")]
Harm = Annotated[str, typer.Argument(help="A harm type, or `other`.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON Lines, every field.")]
OfTenant = Annotated[str | None, typer.Option("--tenant", help="This one's alone.")]


@thresholds_app.command("list")
def list_thresholds(
    tenant: OfTenant = None, as_json: AsJson = False, config: Config = None
) -> None:
    """What is in force, and what is proposed. What is not here is as the model ships it."""
    from worker.follow import reaching
    from worker.operate import read_latest

    settings = _quiet(config)

    async def show() -> None:
        with reaching(settings):
            latest = await read_latest(settings)
        _show([latest[key] for key in sorted(latest)], tenant, as_json, "Thresholds")

    run_loop(show())


@thresholds_app.command()
def history(tenant: OfTenant = None, as_json: AsJson = False, config: Config = None) -> None:
    """Every threshold that was published, oldest first."""
    from worker.follow import reaching
    from worker.operate import read_history

    settings = _quiet(config)

    async def show() -> None:
        with reaching(settings):
            records = await read_history(settings)
        _show(records, tenant, as_json, "History")

    run_loop(show())


@thresholds_app.command()
def approve(tenant: Tenant, harm: Harm, config: Config = None) -> None:
    """Put the proposed threshold in force."""
    from worker.operate import approve as word

    _say(_quiet(config), tenant, harm, word)


@thresholds_app.command()
def reject(tenant: Tenant, harm: Harm, config: Config = None) -> None:
    """Keep what is in force; the same threshold is not proposed again."""
    from worker.operate import reject as word

    _say(_quiet(config), tenant, harm, word)


@thresholds_app.command("set")
def set_threshold(
    tenant: Tenant,
    harm: Harm,
    value: Annotated[str, typer.Argument(help="0..1; or `learn`: leave it to the labels again.")],
    config: Config = None,
) -> None:
    """Fix a threshold, whatever labels say, or hand it back to them."""
    from worker.operate import fix, hand_back

    settings = _quiet(config)
    if value == "learn":
        _say(settings, tenant, harm, hand_back(_shipped(settings)[1]))
        return
    try:
        word = fix(float(value))
    except ValueError:
        raise Stop(f"threshold {value!r}: a number in 0..1, or `learn`") from None
    _say(settings, tenant, harm, word)


def _quiet(config: Path | None) -> Settings:
    settings = settings_module.load(config)
    configure_logs("WARNING")
    return settings


def _say(settings: Settings, tenant: str, harm: str, word: Any) -> None:
    from worker.certify import in_force
    from worker.follow import reaching
    from worker.operate import say

    async def run() -> None:
        with reaching(settings):
            said = await say(settings, tenant, harm, word, lambda: _shipped(settings)[0])
        _err.print(f"{tenant}/{harm}: {in_force(said):g} is in force, version {said.version}")

    run_loop(run())


def _show(records: Sequence[Any], tenant: str | None, as_json: bool, title: str) -> None:
    import msgspec

    from worker.operate import reasons, table

    chosen = [record for record in records if tenant in {None, record.tenant}]
    if as_json:
        for record in chosen:
            sys.stdout.write(msgspec.json.encode(record).decode() + "\n")
        return
    Console().print(table(chosen, title), reasons(chosen))


@app.command()
def backtest(
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="HARM=0.6; again for more. Default: what is proposed."),
    ] = None,
    tenant: OfTenant = None,
    decisions: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON Lines. Default: Kafka.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="JSON Lines. Default: Kafka.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.0, help="How far back, in Kafka.")] = 24.0,
    model: Annotated[str | None, typer.Option(help="Its decisions alone. Default: ours.")] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Precision against threshold, a PNG.")
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """What other thresholds would have decided: blocks gained and lost, precision, recall."""
    from worker import backtest as backtests
    from worker.follow import reaching

    settings = _quiet(config)
    since_ms = time.time_ns() // 1_000_000 - round(hours * 3_600_000)
    sources = backtests.Sources(decisions, labels, since_ms)

    async def run() -> None:
        with reaching(settings):
            found, other = await backtests.run(
                settings, *_shipped(settings), threshold or (), sources, tenant, model
            )
        for line in backtests.as_json(found) if as_json else ():
            sys.stdout.write(line.decode() + "\n")
        if not as_json:
            Console().print(backtests.table(found))
        if plot is not None:
            backtests.plot(found, other, plot)

    run_loop(run())


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
