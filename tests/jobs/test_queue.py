"""One queue over a launcher's slots, without processes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rankscope.errors import KilledError, RankscopeError
from rankscope.jobs import queue
from rankscope.jobs.job import Job, Launcher
from rankscope.jobs.queue import run_jobs


class Clockwork:
    """Jobs that run for a number of looks, which is their name's second part."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.running: list[Looked] = []
        self.events: list[str] = []
        self.most = 0

    def slots(self) -> int:
        return self._slots

    def start(self, study: Path, job: Job) -> "Looked":
        one = Looked(self, job)
        self.running.append(one)
        self.most = max(self.most, len(self.running))
        self.events.append(f"start {job.folder}")
        return one


class Looked:
    def __init__(self, launcher: Clockwork, job: Job) -> None:
        self.launcher, self.job = launcher, job
        self.looks, self.stopped, self.killed = int(job.folder.partition("/")[2]), False, False

    def is_running(self) -> bool:
        self.looks -= 1
        if self.looks <= 0 and self in self.launcher.running:
            self.launcher.running.remove(self)
            self.launcher.events.append(f"end {self.job.folder}")
        return self.looks > 0

    def error(self) -> RankscopeError | None:
        return KilledError("stopped") if self.stopped else None

    def stop(self) -> None:
        self.stopped = True
        self.launcher.events.append(f"stop {self.job.folder}")

    def kill(self) -> None:
        self.killed = True
        self.looks = 0
        self.launcher.events.append(f"kill {self.job.folder}")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "POLL_SECONDS", 0.0)


def jobs(*names: str) -> list[Job]:
    return [Job("", {}, name) for name in names]


def run(
    launcher: Any, names: list[Job], ended: Any = lambda job, error, waiting: list(waiting), poll: Any = lambda: None
) -> None:
    as_launcher: Launcher = launcher
    run_jobs(as_launcher, Path(), names, poll, ended)


def test_nothing_starts_that_would_end_after_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job takes twice its forecast of 10 s, so that of 45 s no longer fits into the 80 s left; one of 35 s
    does, and so does one without a forecast."""
    now = iter([0.0, 0.0, 20.0, *[20.0] * 99])
    monkeypatch.setattr(queue.time, "monotonic", lambda: next(now))
    launcher = Clockwork(1)
    given = [
        job._replace(seconds=of) for job, of in zip(jobs("a/0", "b/0", "c/0", "d/0"), (10, 45, 35, 0), strict=True)
    ]
    as_launcher: Launcher = launcher  # type: ignore[assignment]
    run_jobs(as_launcher, Path(), given, lambda: None, lambda job, error, waiting: list(waiting), queue.TimeLimit(100))
    assert [event for event in launcher.events if event.startswith("start")] == ["start a/0", "start c/0", "start d/0"]


def test_after_the_limit_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue.time, "monotonic", lambda: 101.0)
    launcher: Any = Clockwork(1)
    run_jobs(launcher, Path(), jobs("a/0"), lambda: None, lambda *_: [], queue.TimeLimit(100))
    assert launcher.events == []


def test_a_free_slot_takes_the_next_job() -> None:
    launcher = Clockwork(2)
    run(launcher, jobs("a/9", "b/2", "c/2", "d/2"))
    assert launcher.events == [
        "start a/9", "start b/2", "end b/2", "start c/2", "end c/2", "start d/2", "end d/2", "end a/9",
    ]  # fmt: skip
    assert launcher.most == 2


def test_what_follows_from_an_end_comes_next() -> None:
    launcher = Clockwork(1)
    told: list[tuple[str, object]] = []

    def ended(job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
        told.append((job.folder, error))
        return [*(jobs("part/1", "rest/1") if job.folder == "a/1" else []), *waiting]

    run(launcher, jobs("a/1", "b/1"), ended)
    assert told == [("a/1", None), ("part/1", None), ("rest/1", None), ("b/1", None)]


def test_new_slots_are_used() -> None:
    """Slots come and go, as nodes of a cluster do."""
    launcher = Clockwork(1)

    def poll() -> None:
        launcher._slots = 3

    run(launcher, jobs("a/3", "b/9", "c/9", "d/9"), poll=poll)
    assert launcher.most == 3


@pytest.mark.parametrize("where", ["poll", "ended", "start"])
def test_what_runs_is_stopped_and_waited_for(where: str) -> None:
    def fail_at(place: str) -> None:
        if place == where:
            raise KilledError("enough")

    def ended(job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
        fail_at("ended")
        return list(waiting)

    class Failing(Clockwork):
        def start(self, study: Path, job: Job) -> Looked:
            if job.folder == "b/1":
                fail_at("start")
            return super().start(study, job)

    launcher = Failing(2)
    with pytest.raises(KilledError, match="enough"):
        run(launcher, jobs("a/30", "b/1"), ended, lambda: fail_at("poll"))
    assert "stop a/30" in launcher.events
    assert launcher.events[-1] == "end a/30"
    assert not launcher.running


def test_a_second_interruption_ends_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, asked = Clockwork(2), []

    def interrupt(*_: object) -> None:
        asked.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(launcher, jobs("a/1000", "b/1000"), poll=interrupt)
    assert launcher.events[2:] == ["stop a/1000", "stop b/1000", "kill a/1000", "kill b/1000"]
    assert len(asked) == 2


def test_jobs_that_an_end_leaves_out_do_not_run() -> None:
    launcher = Clockwork(1)

    def ended(job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
        return [other for other in waiting if not other.folder.startswith("b/")]

    run(launcher, jobs("a/1", "b/1", "c/1", "b/2"), ended)
    assert [event for event in launcher.events if event.startswith("start")] == ["start a/1", "start c/1"]
