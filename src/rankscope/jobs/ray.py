"""Jobs as Ray tasks, on a laptop, a server with several GPUs, or a cluster (https://docs.ray.io).

A task runs one job's child process in a folder of its own on its node. What the job writes there is streamed to this
process, which alone writes the study's directory: no shared file system is needed. A job whose node or worker is lost
starts again on another, from the files received so far: at most one checkpoint interval is lost.

rankscope must be installed on every node, in the same version, and the model must be reachable from each.
"""

import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeAlias

from rankscope import __version__
from rankscope.errors import KilledError, OutOfMemoryError, RankscopeError, StudyError, WorkerError, first_line, require
from rankscope.jobs.job import Job, Say
from rankscope.jobs.mirror import PIECE_BYTES, Change, Mirror, Replica, collect, pieces
from rankscope.jobs.process import JobProcess
from rankscope.jobs.queue import POLL_SECONDS
from rankscope.measure.machine import Site
from rankscope.spec.models import ModelSpec
from rankscope.text.catalogue import Catalogue

MAX_STARTS = 4  # most starts of one job whose nodes are lost
SURVEY_SECONDS = 120.0  # time for all nodes to describe their hardware; the run goes on without later answers
MAX_UNREAD_MESSAGES = 4  # most messages of a job that wait to be written here; the job waits while there are more


class Node(NamedTuple):
    id: str
    name: str
    cpus: int
    gpus: int
    memory_bytes: int


class Share(NamedTuple):
    """What each job takes of a node."""

    cpus: int
    gpus: int

    def times(self, node: Node) -> int:
        return min(node.cpus // self.cpus if self.cpus else node.gpus, node.gpus if self.gpus else node.cpus)


class RayLauncher:
    """Ray tasks on the cluster at `address`. Without an address they run on the cluster of `RAY_ADDRESS` or of this
    machine, else on a Ray that is started on this machine and ends with the run. Raises MissingExtraError: Ray is not
    installed; StudyError: there is no cluster at `address`, or no node of it has what `model.device` asks for."""

    def __init__(self, model: ModelSpec, address: str | None, say: Say, text: Catalogue) -> None:
        self._model, self.say, self.text = model, say, text
        self._ray = require_ray()
        self._began = not self._ray.is_initialized()
        if self._began:
            _connect(address)
        try:
            nodes = self._nodes()
            self._share = share(nodes, _device_kind(model.device, nodes))
            self._profiled_on: str | None = None
            here = self._ray.get_runtime_context().get_node_id()  # it is lost with this process only
            mailbox = self._ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=_on(here))
            self._mailbox: Any = mailbox.remote()
            self._task: Any = self._ray.remote(_work)
            self._shared: dict[str, list[Any]] = {}
        except BaseException:
            self.__exit__()
            raise

    def _nodes(self) -> list[Node]:
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        sizes = [[int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU", "memory")] for node in alive]
        return [Node(one["NodeID"], one["NodeManagerHostname"], *size) for one, size in zip(alive, sizes, strict=True)]

    def _able(self) -> list[Node]:
        return [node for node in self._nodes() if self._share.times(node)]

    def slots(self) -> int:
        return max(1, sum(map(self._share.times, self._able())))

    def site(self) -> Site:
        nodes = {node.id: node for node in self._able()}
        look: Any = self._ray.remote(_look)
        asked = {
            look.options(num_cpus=0, num_gpus=self._share.gpus, scheduling_strategy=_on(node)).remote(self._model): node
            for node in nodes
        }
        answered, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=SURVEY_SECONDS)
        if not answered:
            self.say(self.text("notice.no_device"))
            answered, late = self._ray.wait(list(asked))
        for task in late:
            self._ray.cancel(task)
        try:
            sites: dict[str, Site] = {asked[task]: self._ray.get(task) for task in answered}
        except self._ray.exceptions.RayError as error:
            raise _cannot_work(error) from error
        self._profiled_on, first = next(iter(sites.items()))
        hardware = dict(first.hardware)
        if len(sites) > 1:
            shown = ("cpu", "cores", "memory_bytes", "gpus")
            hardware["nodes"] = [
                {"name": nodes[node].name} | {name: site.hardware[name] for name in shown}
                for node, site in sites.items()
            ]
        for name, version in first.versions.items():
            if any(site.versions[name] != version for site in sites.values()):
                self.say(self.text("notice.versions", name=name))
        free = min(site.free_bytes for site in sites.values())
        return first._replace(here=False, free_bytes=free, hardware=hardware)

    def start(self, study: Path, job: Job) -> "RayJob":
        return RayJob(self, study, job)

    def submit(self, study: Path, job: Job, number: int) -> Any:
        """Start the job's task, and return the stream of its messages."""
        if not self._shared:
            self._shared = self._put(study, collect(study, job.shared))
        files = self._shared | self._put(study, collect(study, (job.folder, *job.reads)))
        options: dict[str, Any] = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus}
        able = self._able()
        if job.alone:
            node = self._one_of(able)
            able = [node]
            options |= {"scheduling_strategy": _on(node.id)} | ({} if self._share.gpus else {"num_cpus": node.cpus})
        # More than any node has would be waited for without end.
        options["memory"] = min(job.memory_bytes, max((node.memory_bytes for node in able), default=0))
        task = self._task.options(
            num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=MAX_UNREAD_MESSAGES, **options
        )
        return task.remote(files, job, str(study), self._mailbox, number)

    def _one_of(self, able: Sequence[Node]) -> Node:
        """Return the node of all jobs that measure alone, so that costs can be compared."""
        if not able:
            raise StudyError("no node of the Ray cluster can run a job any more", "Start one, and run the study again.")
        node = next((node for node in able if node.id == self._profiled_on), able[0])
        if self._profiled_on not in (None, node.id):
            self.say(self.text("notice.node", name=node.name))
        self._profiled_on = node.id
        return node

    def _put(self, study: Path, names: Iterable[str]) -> dict[str, list[Any]]:
        return {name: [self._ray.put(change) for change in pieces(study, name)] for name in names}

    def stop(self, number: int) -> None:
        self._mailbox.stop.remote(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._began:
            self._ray.shutdown()


_numbers = itertools.count()


class RayJob:
    def __init__(self, launcher: RayLauncher, study: Path, job: Job) -> None:
        self.job, self._launcher, self._study = job, launcher, study
        self._ray = require_ray()
        self._starts, self._stopped, self._ended = 0, False, False
        self._error: RankscopeError | None = None
        self._start()

    def _start(self) -> None:
        self._starts += 1
        self._number, self._replica = next(_numbers), Replica(self._study)
        self._stream = self._launcher.submit(self._study, self.job, self._number)

    def is_running(self) -> bool:
        exceptions = self._ray.exceptions
        while not self._ended and self._ray.wait([self._stream], timeout=0)[0]:
            try:
                message: Message = self._ray.get(next(self._stream))
                if isinstance(message, Ended):
                    self._end(message.error)
                else:
                    self._replica.apply(message)
            except exceptions.OutOfMemoryError as error:
                self._end(OutOfMemoryError(f"{self.job.folder}: Ray ended it for lack of memory", first_line(error)))
            except exceptions.RayTaskError as error:
                self._end(error.cause if isinstance(error.cause, RankscopeError) else _cannot_work(error))
            except (exceptions.RayError, StopIteration) as error:
                self._lost(error)
        return not self._ended

    def _end(self, error: RankscopeError | None) -> None:
        self._ended, self._error = True, error

    def _lost(self, error: Exception) -> None:
        what = f"{self.job.folder}: its worker or node is lost ({type(error).__name__})"
        if self._stopped or self._starts >= MAX_STARTS:
            self._end(KilledError(what, "Run the study again: it goes on where it was."))
        else:
            self._launcher.say(self._launcher.text("notice.elsewhere", error=what))
            self._start()

    def error(self) -> RankscopeError | None:
        return self._error

    def stop(self) -> None:
        self._stopped = True
        self._launcher.stop(self._number)

    def kill(self) -> None:
        self._ray.cancel(self._stream, force=True)
        self._end(KilledError(f"{self.job.folder} was killed"))


class Ended(NamedTuple):
    """The last message of a task; each before it is a list of changes to the files that its job has written."""

    error: RankscopeError | None


Message: TypeAlias = list[Change] | Ended


class _Mailbox:
    """An actor that holds the numbers of jobs that should stop. It ends with the process that started it."""

    def __init__(self) -> None:
        self._stopped: set[int] = set()

    def stop(self, number: int) -> None:
        self._stopped.add(number)

    def is_stopped(self, number: int) -> bool:
        return number in self._stopped


def _look(model: ModelSpec) -> Site:
    from rankscope.jobs.local import LocalLauncher

    return LocalLauncher(model).site()


def _work(files: dict[str, list[Any]], job: Job, study: str, mailbox: Any, number: int) -> Iterator[Message]:
    """Run the job in a folder that starts with `files`, and yield what it writes. The body of a task."""
    ray = require_ray()
    with tempfile.TemporaryDirectory(prefix="rankscope-") as scratch:
        root = Path(scratch)
        for name in files:
            Replica(root).apply(ray.get(piece) for piece in files[name])
        files.clear()
        mirror, process = Mirror(root), JobProcess(root, job)
        try:
            going, stopped = True, False
            while going:
                going = process.is_running(POLL_SECONDS)
                yield from _messages(mirror.changes())
                if not stopped and ray.get(mailbox.is_stopped.remote(number)):
                    stopped = True
                    process.stop()
            error = process.error()
            yield Ended(error and type(error)(*(text.replace(scratch, study) for text in (error.what, error.todo))))
        finally:
            if process.is_running():  # this task is cancelled, or what asked for it is gone
                process.kill()


def _messages(changes: Iterable[Change]) -> Iterator[list[Change]]:
    """Group changes into messages of about `PIECE_BYTES`."""
    group: list[Change] = []
    for change in changes:
        group.append(change)
        if sum(len(one.data or b"") for one in group) >= PIECE_BYTES:
            yield group
            group = []
    if group:
        yield group


def require_ray() -> Any:
    """Import and return Ray. Raises MissingExtraError: Ray is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 would slow workers beside other processes
    require("ray", "ray", "--launcher ray")
    import ray

    return ray


def _connect(address: str | None) -> None:
    if address and address.startswith("ray://"):
        todo = "Run rankscope on a node of the cluster, by `ray job submit` for one, and give HOST:PORT or auto."
        raise StudyError(f"--ray-address {address}: Ray's client cannot stream what a job writes", todo)
    try:
        dashboard = False if address is None else None
        require_ray().init(address, log_to_driver=False, logging_level=logging.WARNING, include_dashboard=dashboard)
    except (ConnectionError, ValueError, RuntimeError) as error:
        todo = "Give the address of a running cluster (`ray start --head` prints it), or none to start Ray here."
        raise StudyError(f"Ray at {address or 'this machine'}: {first_line(error)}", todo) from None


def _device_kind(device: str, nodes: list[Node]) -> str:
    has_gpu = any(node.gpus for node in nodes)
    if device not in ("auto", "cpu", "cuda"):
        raise StudyError(f"model.device: {device}: Ray chooses the device of each job", "Use auto, cpu or cuda.")
    if device == "cuda" and not has_gpu:
        raise StudyError("model.device: cuda asked for, but no node of the Ray cluster has a GPU", "Use --device cpu.")
    return "cuda" if has_gpu and device != "cpu" else "cpu"


def share(nodes: list[Node], kind: str) -> Share:
    """Return what each job takes: one GPU with its share of the cores; without GPUs all cores of the smallest node.
    Raises StudyError: no node can run anything."""
    if kind == "cuda":
        return Share(min(node.cpus // node.gpus for node in nodes if node.gpus), 1)
    cpus = [node.cpus for node in nodes if node.cpus]
    if not cpus:
        raise StudyError("no node of the Ray cluster has a CPU to give", "Start one: ray start --address HOST:PORT.")
    return Share(min(cpus), 0)


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def _cannot_work(error: Exception) -> RankscopeError:
    """Return the error of a task that could not even start its job."""
    if "No module named 'rankscope" in str(error):
        todo = f"Install version {__version__} on every node, with what the study needs, as docs/guides/ray.md says."
        return StudyError("rankscope is not installed on a node of the Ray cluster", todo)
    last_line = str(error).strip().rpartition("\n")[2]
    return WorkerError(f"a task on the Ray cluster failed: {last_line}")
