"""The allocator that a job's process is given."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankscope.measure import allocator
from rankscope.measure.cores import job_environment


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    allocator.jemalloc.cache_clear()
    yield
    allocator.jemalloc.cache_clear()


def test_without_jemalloc_torch_asks_for_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(allocator, "find_library", lambda name: None)
    assert job_environment()["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "LD_PRELOAD" not in job_environment()
    assert allocator.allocator() == "system"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads by LD_PRELOAD")
def test_a_library_with_which_no_program_starts_is_not_preloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / allocator.LIBRARY).write_bytes(b"of another processor")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert allocator.jemalloc() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux preloads by LD_PRELOAD")
def test_a_job_has_it_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any library stands for it where the system has none."""
    library = allocator.find_library("jemalloc") or allocator.find_library("dl") or allocator.find_library("m")
    monkeypatch.setattr(allocator, "find_library", lambda name: library)
    assert library is not None
    maps = "print(open('/proc/self/maps').read())"
    done = subprocess.run(
        [sys.executable, "-c", maps], env=job_environment(), capture_output=True, text=True, check=True
    )
    assert library.partition(".so")[0] in done.stdout
    assert allocator.allocator() == library
    assert "THP_MEM_ALLOC_ENABLE" not in job_environment()


def test_what_the_user_preloads_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/opt/lib/libtcmalloc.so.4:libgomp.so.1")
    assert job_environment()["LD_PRELOAD"] == "/opt/lib/libtcmalloc.so.4:libgomp.so.1"
    assert allocator.allocator() == "libtcmalloc.so.4, libgomp.so.1"
    monkeypatch.setenv("LD_PRELOAD", "")
    assert allocator.allocator() == "system"


@pytest.mark.skipif(allocator.jemalloc() is None, reason="needs jemalloc")
def test_what_is_freed_goes_back_from_jemalloc() -> None:
    program = (
        "import psutil, torch\n"
        "from rankscope.model.device import give_back_freed\n"
        "held = [torch.ones(2_000) for _ in range(20_000)]\n"
        "full = psutil.Process().memory_info().rss\n"
        "del held\n"
        "give_back_freed(torch.device('cpu'))\n"
        "print(full - psutil.Process().memory_info().rss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=job_environment(), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 120e6  # of 160 MB; without being asked it gives back a tenth
