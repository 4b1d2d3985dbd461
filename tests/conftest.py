"""Shared by all tests: one thread a process, so that tiny models do not wait for each other; forked jobs; no access to
the hub or to the user's cache; predictions that are made once, and images that are drawn where they are tested; a
model, data and a trained study that no test changes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the hub's client reads it when it is imported

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

import drawing
import forking
from folders import write_data, write_model
from rankscope.jobs import process
from rankscope.plan import costs, memory, plan
from rankscope.report import write
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.study.study import Study
from report.browser import Browser, need_browser
from small_study import run_small

torch.set_num_threads(1)
settings.register_profile("short", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("long", settings.get_profile("short"), max_examples=1000)  # of `make test-slow`
settings.load_profile("short")


LONG = ("test_contract.py", "test_tour.py", "test_cli.py", "test_memory.py", "test_corruption.py", "test_failures.py")
"""Files that start first: one of them at the end would keep one worker busy while the others are idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    forking.own_processes = item.get_closest_marker("own_processes") is not None


@pytest.fixture(scope="session", autouse=True)
def _forked_jobs() -> Iterator[None]:
    """Start jobs by a fork, which saves their imports: see `forking`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "subprocess", forking.instead_of_subprocess)
        yield


_DIVISION = {"trials_per_pack": True, "isolated": True, "checkpoint_steps": True, "evals": True}
_NEVER: dict[str, Any] = {"name": True, "data": True, "reference": True, "verdict": True, "training": _DIVISION}
"""Fields of a question on which no prediction depends, but for the tokens."""


@pytest.fixture(scope="session", autouse=True)
def predicted_once() -> Iterator[Callable[[StudySpec, torch.device], costs.CostModel]]:
    """Runs and plans of one question over one model share its prediction, which takes longer than to train a step.

    The tests of predictions make their own: they take `predict` from `rankscope.plan.costs`.
    """
    known: dict[tuple[str, str, bytes], costs.CostModel] = {}
    elsewhere = {**_NEVER, "seeds": True, "measure": True}

    def predict(spec: StudySpec, device: torch.device) -> costs.CostModel:
        file = Path(spec.model.id, "config.json")
        key = spec.model_dump_json(exclude=elsewhere), str(device), file.read_bytes() if file.is_file() else b""
        return known[key] if key in known else known.setdefault(key, costs.predict(spec, device))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "predict", predict)
        yield predict


@pytest.fixture(scope="session", autouse=True)
def _rehearsed_once() -> Iterator[None]:
    """Plans of one question over the same tokens share the forwards that are rehearsed and timed for them."""
    known: dict[Any, Any] = {}

    def once(method: Callable[..., Any]) -> Callable[..., Any]:
        def found(self: Any, family: costs.Family, *rest: Any) -> Any:
            spec, tokens = self._spec, self._schedule.tokens
            file = Path(spec.model.id, "config.json")
            question = spec.model_dump_json(exclude=_NEVER), file.read_bytes() if file.is_file() else b""
            budget = self._budget([Trial(candidate=family.low, seed=0)]) if not rest else 0
            of = repr(family), self.costs.device, self.costs.dtype, tokens.ids.tobytes(), tokens.offsets.tobytes()
            key = method, memory.forward_seconds, *question, *of, *rest, budget
            return known[key] if key in known else known.setdefault(key, method(self, family, *rest))

        return found

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_rehearse", "_time"):
            patch.setattr(memory.StudyMemory, name, once(getattr(memory.StudyMemory, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _images_where_asked_for() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, instead in drawing.INSTEAD.items():
            patch.setattr(write, name, instead)
        yield


@pytest.fixture
def images() -> Iterator[None]:
    """Reports have images."""
    with drawing.images():
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANKSCOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _known_process() -> Iterator[None]:
    """A process's own memory is as measured once: measuring it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "own_process_bytes", lambda: 330_000_000)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_extra_rounds() -> Iterator[None]:
    """Costs are measured in `measure.rounds` rounds, however noisy; `forking` has it for jobs in other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.measure.timing.MAX_EXTRA_SECONDS", 0.0)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all workers of a run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def root(shared: Path) -> Path:
    """A folder with `model`, `data.json` and `general.txt`. Tests write elsewhere."""
    root = shared / "root"
    with FileLock(shared / "root.lock"):
        if not root.exists():
            write_model(root / "model")
            write_data(root / "data.json")
            line = "Sort the list and read the file. Then write a class whose test reads each number in a loop.\n"
            (root / "general.txt").write_text(line * 30)
    return root


@pytest.fixture(scope="session")
def trained(root: Path, shared: Path) -> Study:
    """The study of `small_study`, trained by the first worker that needs it. A test that writes to it takes a copy."""
    path = shared / "trained"
    with FileLock(shared / "trained.lock"):
        return Study.open(path) if path.exists() else run_small(root, path)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs build no report, whose figures take longer than training."""
    monkeypatch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests of pages; they are skipped where none is installed."""
    with Browser(need_browser(), tmp_path_factory.mktemp("browser")) as browser:
        yield browser
