"""Shared by all tests: one thread a process, so that tiny models are not slowed by waiting for each other; jobs are
forked; no test asks the hub, or reads or writes the user's cache."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # its client reads that as it is imported

import pytest
import torch
from hypothesis import settings

import forking
from rankscope.jobs import process

torch.set_num_threads(1)
settings.register_profile("short", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("long", settings.get_profile("short"), max_examples=1000)  # of `make test-slow`
settings.load_profile("short")


LONG = ("test_contract.py", "test_tour.py", "test_cli.py", "test_memory.py", "test_corruption.py", "test_failures.py")
"""Files that would keep one worker busy after all others have ended, if they came last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    forking.own_processes = item.get_closest_marker("own_processes") is not None


@pytest.fixture(scope="session", autouse=True)
def _forked_jobs() -> Iterator[None]:
    """Jobs cost a fork, and not the seconds of imports: see `forking`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", forking.instead_of_subprocess)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
