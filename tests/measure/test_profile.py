"""A profile measures what is there: effects of known size, planted into the training of a tiny model.

Profiles with and without the effect take turns, so that a drift of the machine meets both, and medians are compared.
"""

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankscope.data.tokens import TokenizedData
from rankscope.measure import profile
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import resolve_spec
from rankscope.train.prepare import prepare_data

BLOCK = 200_000_000
STEPS = 8


@pytest.fixture(scope="module")
def spec(root: Path) -> StudySpec:
    return resolve_spec(
        {
            "model": {"id": str(root / "model"), "device": "cpu"},
            "data": {"id": str(root / "data.json"), "eval_rows": 12},
            "ranks": [4],
            "training": {"steps": 20, "batch_size": 4},
            "measure": {"warmup_steps": 2, "steps": STEPS},
        }
    )


@pytest.fixture(scope="module")
def data(spec: StudySpec) -> TokenizedData:
    return prepare_data(spec)


Effect = Callable[[], None]


def measure_both(
    spec: StudySpec, data: TokenizedData, make_effect: Callable[[], Effect], repeats: int = 3
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Profiles without and with an effect before each step, taking turns. Each has an effect of its own."""
    own, (candidate,) = profile.train_step, spec.candidates()

    def plant(effect: Effect) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            effect()
            return own(*arguments)

        return step

    plain, changed = [], []
    for _ in range(repeats):
        plain.append(profile.profile_candidate(spec, candidate, data))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(profile, "train_step", plant(make_effect()))
            changed.append(profile.profile_candidate(spec, candidate, data))
    return plain, changed


def difference(column: str, plain: list[dict[str, Any]], changed: list[dict[str, Any]]) -> float:
    before, after = (statistics.median(run["summary"][column] for run in runs) for runs in (plain, changed))
    return float(after - before)


def test_bytes_that_are_held_are_measured(spec: StudySpec, data: TokenizedData) -> None:
    def make_holder() -> Effect:
        held: list[np.ndarray] = []

        def hold() -> None:
            if not held:
                held.append(np.ones(BLOCK, dtype=np.uint8))  # touched, or it would not be resident

        return hold

    plain, changed = measure_both(spec, data, make_holder)
    for kind in ("rss", "private", "private_above_base"):
        for statistic in ("mean", "peak", "p99"):
            found = difference(f"{kind}_{statistic}_bytes", plain, changed)
            assert found == pytest.approx(BLOCK, rel=0.05), f"{kind}, {statistic}"
    assert difference("eval_rss_mean_bytes", plain, changed) == pytest.approx(BLOCK, rel=0.05)
    assert abs(difference("load_rss_mean_bytes", plain, changed)) < 0.05 * BLOCK, "loading held nothing"


def test_bytes_that_are_held_for_a_moment_are_in_the_peak(spec: StudySpec, data: TokenizedData) -> None:
    plain, changed = measure_both(spec, data, lambda: lambda: np.ones(BLOCK, dtype=np.uint8).fill(2), repeats=1)
    for kind in ("rss", "private"):
        assert difference(f"{kind}_peak_bytes", plain, changed) == pytest.approx(BLOCK, rel=0.1), kind


def test_bytes_that_are_mapped_from_a_file_are_not_private(
    spec: StudySpec, data: TokenizedData, tmp_path: Path
) -> None:
    np.ones(BLOCK, dtype=np.uint8).tofile(tmp_path / "mapped")

    def make_reader() -> Effect:
        mapped = np.memmap(tmp_path / "mapped", mode="r")
        return lambda: mapped[::4096].sum() and None

    plain, changed = measure_both(spec, data, make_reader, repeats=1)
    assert difference("mapped_mean_bytes", plain, changed) == pytest.approx(BLOCK, rel=0.1)
    assert abs(difference("private_peak_bytes", plain, changed)) < 0.1 * BLOCK


def test_a_profile_is_complete(spec: StudySpec, data: TokenizedData) -> None:
    (candidate,) = spec.candidates()
    result = profile.profile_candidate(spec, candidate, data)
    summary = result["summary"]
    assert summary["steps"] == STEPS
    assert set(result["samples"]["phase"]) == {"load", "warmup", "train", "eval"}
    parameters = 2 * 4 * (4 * 64 + 2 * 96) + 4 * 2 * 48  # rank 4: q, k, v, out; fc1, fc2; project_in and _out
    assert summary["trainable_params"] == parameters
    assert 4 * parameters < summary["adapter_bytes"] < 4 * parameters + 10_000
    assert summary["joules_per_token"] is None
    assert all(math.isfinite(value) for name, value in summary.items() if "gpu" not in name and "joules" not in name)
    assert all(value is None for name, value in summary.items() if "gpu" in name)
