"""A process's own memory: measured once for each set of versions, in a process that does what a job's does."""

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from rankscope.measure import own_process
from rankscope.measure.sampler import resident


def test_it_is_measured_once_for_the_same_versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("RANKSCOPE_CACHE", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "")  # so that no process tries jemalloc
    ran: list[Any] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(stdout=f"a library's word\n{300_000_000 + len(ran)}\n")

    monkeypatch.setattr(subprocess, "run", run)
    measure = own_process.own_process_bytes.__wrapped__
    assert measure() == measure() == 300_000_001
    monkeypatch.setattr(own_process, "versions", lambda: {"torch": "another"})
    assert measure() == 300_000_002
    for file in (tmp_path / "process").iterdir():
        file.write_text("{")
    assert measure() == 300_000_003, "a corrupt file is measured again"


@pytest.mark.slow
def test_a_small_step_leaves_what_a_job_holds() -> None:
    own = own_process.own_process_bytes.__wrapped__()
    assert 150e6 < own < 900e6
    here = resident()
    assert here.private is None or own < here.private + 200e6
