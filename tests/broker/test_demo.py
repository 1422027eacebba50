"""The demo as a user runs it: a process of its own, with real servers."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from detectors.load import load_detectors
from tests.fakes import decide_records
from worker.demo import read_samples
from worker.settings import HERE, load

CONSTANT = '["python:detectors.constant:Constant"]'  # only the keywords block then


class Demo:
    """A running `tidegate demo`; whatever it leaves has its scratch folder or its session."""

    def __init__(self, scratch: Path, *arguments: str, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("TIDEGATE_")}
        own = {"TIDEGATE_DETECTORS": CONSTANT, "PYTHONPATH": str(HERE), "TMPDIR": str(scratch)}
        if cache := os.environ.get("TIDEGATE_CACHE_DIR"):
            own["TIDEGATE_CACHE_DIR"] = cache
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "demo", *arguments], text=True,
            env=inherited | own | environment, cwd=scratch, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.output = ""

    def read_until(self, text: str) -> None:
        """Read its output until a line has this in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        pytest.fail(f"no {text!r} in:\n{self.output}")

    def wait(self, timeout_s: float = 120.0) -> int:
        """Its exit code, once all its output is read."""
        self.output += self.process.communicate(timeout=timeout_s)[0]
        return self.process.returncode

    def family(self) -> list[psutil.Process]:
        """Every process of its session: servers, guards and workers stay in it."""
        return [
            process
            for process in psutil.process_iter()
            if _session(process.pid) == self.process.pid and process.is_running()
        ]


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="tidegate-test-") as folder:
        yield Path(folder)


def gone(demo: Demo) -> None:
    """Fail unless the demo leaves neither a process nor a file, within a moment."""
    wait_for(lambda: not demo.family(), lambda: f"left running: {demo.family()}")
    wait_for(lambda: not list(demo.scratch.iterdir()), lambda: str(list(demo.scratch.iterdir())))


def wait_for(holds: Callable[[], bool], says: Callable[[], str]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, says()
        time.sleep(0.05)


def test_demo_tells_its_story_and_leaves_nothing(prepared_kafka: None, scratch: Path) -> None:
    """Through a pipe: a line an event, every sample to its verdict, exit 0, nothing left."""
    del prepared_kafka
    demo = Demo(scratch)
    assert demo.wait() == 0, demo.output
    gone(demo)
    assert "\x1b" not in demo.output
    ended = dict(re.findall(r" s  (\w+) +ended +(\w+);", demo.output))
    samples = read_samples()
    assert ended == {s.name: "block" if s.name == "ad" else "allow" for s in samples}
    for sample in samples:
        if sample.name != "ad":
            released = re.findall(rf" s  {sample.name} +released  (.*)", demo.output)
            assert " ".join(released).split() == sample.text.split()
    assert re.search(r"ad +blocked .*Selling stolen credit cards", demo.output)
    assert re.search(r"ad +because +illegal activity 1.000 > 0.850 · keyword", demo.output)
    assert re.search(r"13 of 13 answers .* 12 allowed .* 1 blocked .* ms \(p50\)", demo.output)
    assert "2 workers share 12 partitions" in demo.output
    assert "0 blocks labelled by a reviewer" in demo.output


def test_demo_learns_while_it_plays(prepared_kafka: None, scratch: Path) -> None:
    """A reviewer's labels of two blocks go through the learner, and move a threshold."""
    del prepared_kafka
    demo = Demo(scratch, TIDEGATE_DETECTORS='["python:tests.fakes:KnifeDetector"]')
    assert demo.wait() == 0, demo.output
    assert "learnt    violence 0.700 → 0.650 (version" in demo.output
    assert "2 blocks labelled by a reviewer  ·  violence 0.700 → 0.650" in demo.output


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
def test_demo_leaves_nothing_when_it_is_interrupted(
    prepared_kafka: None, scratch: Path, number: signal.Signals, code: int
) -> None:
    """Ctrl-C, SIGTERM and even SIGKILL in the middle take servers, workers and files along."""
    del prepared_kafka
    demo = Demo(scratch)
    demo.read_until("released")
    assert len(demo.family()) >= 5  # itself, Kafka, Valkey, two workers
    demo.process.send_signal(number)
    assert demo.wait(30) == code, demo.output
    assert "Traceback" not in demo.output
    gone(demo)


def test_demo_keeps_running_when_told_to(prepared_kafka: None, scratch: Path) -> None:
    """With --keep-running the system stays, its guide works as printed, and Ctrl-C is its end."""
    del prepared_kafka
    demo = Demo(scratch, "--keep-running")
    demo.read_until("tidegate moderate")
    guide = re.search(r"(  export TIDEGATE_BOOTSTRAP.*?\n  END\n)", demo.output, re.DOTALL)
    assert guide is not None
    script = "\n".join(line.removeprefix("  ") for line in guide[1].splitlines())
    fed = subprocess.run(
        ["bash", "-c", script], cwd=HERE, capture_output=True, text=True, check=False, timeout=60
    )
    assert fed.stdout.startswith("Hello there, how can I help you today?"), fed.stderr
    assert "\nallow Decision(" in fed.stdout
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(30) == 0, demo.output
    gone(demo)


def test_demo_on_servers_that_run_already(kafka: str, valkey: str, scratch: Path) -> None:
    """With addresses set, these servers are used, and only workers are started."""
    demo = Demo(scratch, TIDEGATE_BOOTSTRAP_SERVERS=kafka, TIDEGATE_REDIS_URL=valkey)
    demo.read_until("released")
    names = " ".join(word for process in demo.family() for word in process.cmdline())
    assert "kafka.Kafka" not in names
    assert "valkey-server" not in names
    assert demo.wait() == 0, demo.output
    gone(demo)


def test_samples_are_what_the_demo_needs() -> None:
    """Each has a name of its own, a user's question, an expected verdict, and fits its panel."""
    samples = read_samples()
    assert len({sample.name for sample in samples}) == len(samples)
    for sample in samples:
        assert re.fullmatch(r"\w{1,10}", sample.name)
        assert sample.context[-1].role == "user"
        assert sample.should in {"allow", "block"}
        assert len(sample.text) <= 380


async def test_the_shipped_model_tells_the_story() -> None:
    """No harmless sample is blocked, few harmful ones pass, and one turns harmful half-way."""
    settings, samples = load(), read_samples()
    records = [
        json.dumps({
            "stream_id": sample.name, "seq": 0, "delta": sample.text, "final": True,
            "context": [{"role": turn.role, "content": turn.content} for turn in sample.context],
        }).encode()
        for sample in samples
    ]  # fmt: skip
    detectors = load_detectors(settings.detectors, settings.models)
    decided = await decide_records(settings, records, detectors)
    last = {name: decisions[-1] for name, decisions in decided.items()}
    wrong = {sample.name for sample in samples if last[sample.name].verdict != sample.should}
    assert not {sample.name for sample in samples if sample.should == "allow"} & wrong
    assert len(wrong) <= 2
    assert last["neighbour"].verdict == "block"
    assert last["neighbour"].released_to == last["neighbour"].start > 0
    assert last["ad"].stage == "keyword"
