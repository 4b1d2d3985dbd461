"""Peak memory predicted by part: against measurement, against brute force, and where nothing can be known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from launchers import run_alone
from models import CONFIGS, tiny_model
from rankscope.data.tokens import Tokens, save
from rankscope.errors import StudyError
from rankscope.jobs.job import Job
from rankscope.plan.allocator import held_bytes
from rankscope.plan.fake_steps import Event
from rankscope.plan.memory import MemoryBreakdown, PeakMemory, largest_rank, peak_of, predict, predict_peak
from rankscope.plan.plan import make_fleet
from rankscope.plan.runtime import Forecast, forecast, largest_fitting_rank, study_seconds
from rankscope.spec.models import DataSpec, ModelSpec, StudySpec, TrainingSpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.train.prepare import prepare_data
from rankscope.ui.plan import parse_gpu

PLENTY = 10**12
TRAINING = TrainingSpec(steps=6, batch_size=4)


def rows_of(*lengths: int) -> Tokens:
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    labels = np.ones(offsets[-1], np.bool_)
    labels[offsets[:-1]] = False
    return Tokens(np.full(offsets[-1], 5, np.int32), labels, offsets)


def embedded(**training: object) -> StudySpec:
    return StudySpec(
        model=ModelSpec(id="embedded", device="cpu"),
        data=DataSpec(id="unused"),
        ranks=(8, 16, 64),
        seeds=(0,),
        training=TRAINING.model_copy(update=training),
    )


def peak(spec: StudySpec, tokens: Tokens, index: int = 0, free: int = PLENTY) -> PeakMemory:
    found = predict_peak(spec, predict(spec), [spec.trials()[index]], tokens, free)
    assert isinstance(found, PeakMemory), found
    return found


def test_parts_sum_to_the_total() -> None:
    assert MemoryBreakdown(1, 2, 3, 4, 5, 6, 7, 8).total == 36


@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_the_parts_are_what_can_be_counted(engine: str) -> None:
    spec, tokens = embedded(engine=engine), rows_of(*[60, 90, 40, 70] * 6)
    prediction = predict(spec)
    found = peak(spec, tokens)
    adapter = 4 * prediction.params[spec.candidates()[0].name]
    assert found.parts.base == prediction.base_bytes
    assert found.parts.adapter == adapter
    assert found.parts.optimizer == 2 * adapter
    assert 0 <= found.parts.gradients <= adapter
    assert found.parts.activations > prediction.costs[spec.candidates()[0].name].bytes_per_token * 100
    assert found.parts.logits > 0
    assert found.parts.total == sum(found.parts)


def test_what_depends_on_rank_is_proportional_to_it() -> None:
    """Predictions of two ranks then give the largest rank that fits."""
    spec, tokens = embedded(), rows_of(*[60, 90, 40, 70] * 6)
    totals = [peak(spec, tokens, index).parts._replace(retained=0).total for index in range(3)]
    assert totals[2] - totals[0] == pytest.approx((totals[1] - totals[0]) * 7, rel=0.02)  # ranks 8, 16, 64
    slopes = [peak(spec, tokens, index).parts.adapter / rank for index, rank in enumerate((8, 16, 64))]
    assert slopes == [slopes[0]] * 3


def test_a_forward_that_must_be_small_takes_less() -> None:
    spec, tokens = embedded(), rows_of(*[100] * 24)
    prediction = predict(spec)
    fixed = prediction.fixed_bytes(spec.trials()[:1])
    tight = peak(spec, tokens, free=fixed + 200 * prediction.bytes_per_token(spec.trials()))
    roomy = peak(spec, tokens)
    assert (tight.forward_tokens, roomy.forward_tokens) == (100, 400)
    assert tight.parts.activations < 0.5 * roomy.parts.activations


def test_a_sequence_that_is_recomputed_takes_less_than_one_that_is_kept() -> None:
    """512 tokens are kept on a CPU; 600 are more than that, so that only the layers' inputs are."""
    spec = embedded(batch_size=1)
    kept, recomputed = peak(spec, rows_of(*[500] * 8)), peak(spec, rows_of(*[600] * 8))
    assert recomputed.forward_tokens == 600
    assert recomputed.parts.activations < 0.8 * kept.parts.activations


def test_a_pack_takes_more_than_its_trials_and_less_than_their_sum() -> None:
    spec, tokens = embedded(), rows_of(*[60] * 24)
    together = predict_peak(spec, predict(spec), spec.trials(), tokens, PLENTY)
    assert isinstance(together, PeakMemory)
    alone = [peak(spec, tokens, index).parts for index in range(3)]
    assert together.parts.adapter == sum(parts.adapter for parts in alone)
    assert together.parts.optimizer == sum(parts.optimizer for parts in alone)
    assert max(p.total for p in alone) < together.parts.total < sum(p.total for p in alone)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mixtral"])
def test_every_architecture_is_predicted(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    spec = StudySpec(
        model=ModelSpec(id=str(tmp_path), device="cpu"), data=DataSpec(id="unused"), seeds=(0,), ranks=(4,)
    )
    found = predict_peak(spec, predict(spec), spec.trials(), rows_of(*[20, 30] * 8), PLENTY)
    assert isinstance(found, PeakMemory), found
    assert found.parts.activations > 0


def test_dropout_keeps_its_masks() -> None:
    without, tokens = embedded(), rows_of(*[60] * 24)
    with_dropout = without.model_copy(update={"adapter": without.adapter.model_copy(update={"lora_dropout": 0.1})})
    assert peak(with_dropout, tokens).parts.activations > peak(without, tokens).parts.activations


def test_a_gpu_that_is_not_here_is_planned_for_in_bfloat16() -> None:
    spec = embedded()
    prediction = predict(spec, torch.device("cuda"))
    assert prediction.base_bytes == 2 * prediction.base_params
    found = predict_peak(spec, prediction, spec.trials()[:1], rows_of(*[60] * 24), 24 * 10**9)
    assert isinstance(found, PeakMemory), found
    assert found.parts.process == found.parts.retained == 0
    assert found.parts.adapter == 4 * prediction.params[spec.candidates()[0].name], "adapters stay in float32"


def test_the_largest_rank_is_that_of_brute_force() -> None:
    def total(rank: int) -> int:
        return 5_000_000 + 12_345 * rank

    totals = {rank: total(rank) for rank in (8, 256)}
    for budget in (total(1) - 1, total(1), total(37), total(300) + 5, total(1023), total(5000)):
        expected = max((rank for rank in range(1, 1025) if total(rank) <= budget), default=0)
        assert largest_rank(totals, 1024, budget) == expected


def test_a_rank_that_was_predicted_to_fit_is_not_doubted() -> None:
    """Where memory is short the higher one has smaller forwards, and a line from the lower one leads too high."""
    assert largest_rank({8: 800, 64: 900}, 1024, 950, least_slope=10.0) == 69
    assert largest_rank({8: 800, 64: 1200}, 1024, 950, least_slope=10.0) == 23
    assert largest_rank({8: 800, 64: 900}, 1024, 750, least_slope=10.0) == 3


def test_the_largest_rank_that_fits_is_at_most_the_full_rank() -> None:
    spec = embedded().model_copy(update={"ranks": (8,)})  # one rank alone: a second one is looked at for the slope
    tokens = rows_of(*[60] * 24)
    prediction = predict(spec)
    found = peak(spec, tokens)
    forecasts = {"r008-lr2e-4": Forecast(1, None, found.parts.total, None, None, None)}
    assert prediction.full_rank == 256
    assert largest_fitting_rank(spec, prediction, forecasts, tokens, PLENTY) == 256
    assert largest_fitting_rank(spec, prediction, forecasts, tokens, 1000) == 0
    some = largest_fitting_rank(spec, prediction, forecasts, tokens, int((found.parts.total + 20e6) / 0.9))
    assert some is not None
    assert 8 < some < 256


def test_what_is_retained_is_held_above_what_is_alive_at_most() -> None:
    script = [
        Event(0, "adapter", 10),
        Event(1, "activations", 50),
        Event(1, "activations", -50),
        Event(2, "logits", 20),
    ]
    assert peak_of(script, None) == {
        "adapter": 10, "gradients": 0, "optimizer": 0, "activations": 50, "logits": 0, "retained": 0,
    }  # fmt: skip
    assert peak_of(script, [12, 64, 64, 90]) == {
        "adapter": 10, "gradients": 0, "optimizer": 0, "activations": 50, "logits": 0, "retained": 30,
    }  # fmt: skip


def test_the_allocator_holds_what_is_alive_and_keeps_holes() -> None:
    mega = 1 << 20
    first = [(number, 3 * mega) for number in range(40)]
    gone = [(number, -3 * mega) for number in range(0, 40, 2)]
    second = [(40 + number, 4 * mega) for number in range(20)]  # fit into none of the holes
    held = held_bytes([(60, 31 * mega), (60, -31 * mega), *first, *gone, *second])
    if held is None:
        pytest.skip("no glibc")
    alive = (40 - 20) * 3 * mega + 20 * 4 * mega
    assert max(held) > alive + 15 * 3 * mega
    assert max(held) < 40 * 3 * mega + 20 * 4 * mega + 40 * mega


@pytest.mark.parametrize(
    ("text", "expected"), [("24GB", 24 * 10**9), ("16 GiB", 16 * 2**30), ("512mb", 512 * 10**6), (None, None)]
)
def test_gpu_memory_is_read(text: str | None, expected: int | None) -> None:
    gpu = parse_gpu(text, None)
    assert (gpu.memory_bytes if gpu else None) == expected


@pytest.mark.parametrize("text", ["", "much", "-3GB", "24 G B", "0GB"])
def test_nonsense_for_gpu_memory_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(StudyError, match="For example --gpu-memory 24GB"):
        parse_gpu(text, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("400TFLOPS", 4e14), ("1.2 PFLOPS", 1.2e15), ("56gflops", 5.6e10), ("3e3", None), (None, None)],
)
def test_gpu_flops_are_read(text: str | None, expected: float | None) -> None:
    if text is not None and expected is None:
        with pytest.raises(StudyError, match="For example --gpu-flops 400TFLOPS"):
            parse_gpu("24GB", text)
    else:
        gpu = parse_gpu("24GB", text)
        assert gpu is not None
        assert gpu.flops_per_second == expected


def test_a_fleet_that_cannot_be_is_refused() -> None:
    assert make_fleet(None, None) == (1, None)
    assert make_fleet(None, None, slots=3) == (3, None)
    assert make_fleet(None, 2.5) == (1, 2.5)
    assert make_fleet(8, None) == (8, None)
    for devices in (0, -1):
        with pytest.raises(StudyError, match="expected 1 or more"):
            make_fleet(devices, None)
    for price in (0.0, -2.5, float("nan"), float("inf")):
        with pytest.raises(StudyError, match="expected a price above 0"):
            make_fleet(2, price)
    with pytest.raises(StudyError, match="--gpu-memory is not"):
        parse_gpu(None, "400TFLOPS")


@pytest.mark.own_processes
def test_the_prediction_is_near_what_is_measured(tmp_path: Path) -> None:
    """Predicted and measured peak of the embedded model, in a real child process."""
    values = {"data": {"max_length": 128, "max_rows": 200, "eval_rows": 32}, "measure": {"steps": 4, "warmup_steps": 1}}
    options = {"model": "embedded", "dataset": "embedded", "ranks": [256], "seeds": [0], "steps": 20}
    spec = assemble(values, {**options, "device": "cpu", "dtype": "float32"})
    data = prepare_data(spec)
    found = forecast(spec, predict(spec), data, PLENTY)
    (candidate,) = found.candidates.values()
    assert candidate.peak_bytes
    assert candidate.step_seconds
    assert candidate.runtime_seconds
    assert candidate.runtime_seconds > 20 * candidate.step_seconds
    seconds = study_seconds(spec, found.candidates)
    assert seconds is not None
    assert min(seconds) > 0
    study = Study.create(tmp_path / "study", spec)
    save(data, study.path / "data")
    job = Job("rankscope.jobs.profiles", {"profile": "r256", "repeat": 0}, "profiles/jobs/r256")
    assert run_alone(study.path, job) is None
    measured = study.profiles()["rss_peak_bytes"].max()
    assert candidate.peak_bytes == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_gradient_checkpointing_is_planned_where_a_sequence_would_not_fit(
    engine: str, device: str, tmp_path: Path
) -> None:
    """With recomputation, activations are a share of those that are kept otherwise; by both engines."""
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    spec, tokens = embedded(engine=engine, batch_size=1), rows_of(*[100] * 8)
    spec = spec.model_copy(update={"model": ModelSpec(id=str(tmp_path), device="cpu")})
    prediction = predict(spec, torch.device(device))
    trial = spec.trials()[0]
    fixed, per_token = prediction.fixed_bytes([trial]), prediction.bytes_per_token([trial])
    peaks = []
    for free in (PLENTY, fixed + 50 * per_token):
        found = predict_peak(spec, prediction, [trial], tokens, free)
        assert isinstance(found, PeakMemory), found
        peaks.append(found)
    kept, recomputed = peaks
    assert (kept.recomputed_tokens, recomputed.recomputed_tokens) == (0, 100)
    assert kept.forward_tokens == recomputed.forward_tokens == 100
    assert recomputed.parts.activations < 0.8 * kept.parts.activations
