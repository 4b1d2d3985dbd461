"""Peak memory predicted by part: against measurement, against brute force, and where nothing can be known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launchers import run_alone
from models import CONFIGS, UNPACKABLE, tiny_model
from rankscope.data.tokens import Tokens, save
from rankscope.errors import StudyError
from rankscope.jobs.job import Job
from rankscope.lora.layout import Unpackable
from rankscope.measure.own_process import own_process_bytes
from rankscope.plan.costs import CostModel, predict, stand_in
from rankscope.plan.fake_steps import Event, Instant, Recording, add_empty_adapter
from rankscope.plan.layers import Repeats, find_repeats
from rankscope.plan.memory import TURNS, PeakMemory, StudyMemory
from rankscope.plan.plan import make_fleet
from rankscope.plan.runtime import forecast, largest_fitting_rank, study_seconds
from rankscope.spec.models import DataSpec, ModelSpec, StudySpec, TrainingSpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.train.loss import CHUNK_BYTES
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


_counted: dict[str, CostModel] = {}


def counted(spec: StudySpec) -> CostModel:
    """`predict`, once for all tests of a study."""
    key = spec.model_dump_json()
    if key not in _counted:
        _counted[key] = predict(spec)
    return _counted[key]


def peak(spec: StudySpec, tokens: Tokens, index: int = 0, free: int = PLENTY) -> PeakMemory:
    found = StudyMemory(spec, counted(spec), tokens, free).peak([spec.trials()[index]])
    assert isinstance(found, PeakMemory), found
    return found


def held(spec: StudySpec, prediction: CostModel) -> int:
    """Bytes of the first trial's study that are there whatever the forward, where nothing can be rehearsed."""
    memory = StudyMemory(spec, prediction._replace(costs={}, logit_bytes_per_token=0), rows_of(2), PLENTY)
    memory.reason = "not rehearsed"
    return memory.peak_bytes(spec.trials()[:1])


def test_without_a_rehearsal_saved_tensors_are_counted() -> None:
    spec, tokens = embedded(), rows_of(*[60] * 24)
    prediction, trials = counted(spec), spec.trials()
    adapter = prediction.params[trials[0].candidate.name]
    fixed = prediction.process_bytes + prediction.base_bytes + 16 * adapter + 2 * CHUNK_BYTES["cpu"]
    assert held(spec, prediction) == fixed
    memory = StudyMemory(spec, prediction, tokens, PLENTY)
    memory.reason = "not rehearsed"
    assert memory.peak_bytes(trials[:1]) == fixed + 240 * prediction.bytes_per_token(trials[:1]), "a step of four rows"
    both = memory.peak_bytes(trials[:2]) - 480 * prediction.bytes_per_token(trials[:2])
    assert both == fixed + 16 * prediction.params[trials[1].candidate.name]
    memory.free = fixed
    assert memory.peak_bytes(trials[:1]) == fixed + prediction.bytes_per_token(trials[:1]), "one token at a time"
    assert not memory.fits(trials[:1])


@pytest.mark.parametrize("engine", ["packed", pytest.param("peft", marks=pytest.mark.slow)])
def test_the_parts_are_what_can_be_counted(engine: str) -> None:
    spec, tokens = embedded(engine=engine), rows_of(*[60, 90, 40, 70] * 6)
    prediction = counted(spec)
    found = peak(spec, tokens)
    adapter = 4 * prediction.params[spec.candidates()[0].name]
    assert found.parts.base == prediction.base_bytes
    assert found.parts.adapter == adapter
    assert found.parts.optimizer == 2 * adapter
    assert 0 <= found.parts.gradients <= adapter
    assert found.parts.activations > prediction.costs[spec.candidates()[0].name].bytes_per_token * 100
    assert found.parts.logits > 0
    assert found.parts.process == prediction.process_bytes > 0
    tracked = found.parts.activations + found.parts.logits
    known = prediction.process_bytes + prediction.base_bytes + 3 * adapter
    assert known + tracked < found.parts.total <= known + adapter + 2 * tracked


@pytest.mark.slow
def test_what_depends_on_rank_is_proportional_to_it() -> None:
    """Predictions of two ranks then give the largest rank that fits."""
    spec, tokens = embedded(), rows_of(*[60, 90, 40, 70] * 6)
    prediction = predict(spec)
    totals = []
    for index in range(3):  # each rehearsed itself, where a study interpolates between the lowest and the highest
        alone = spec.model_copy(update={"ranks": (spec.ranks[index],)})
        totals.append(peak(alone, tokens).parts.total)
    assert totals[2] - totals[0] == pytest.approx((totals[1] - totals[0]) * 7, rel=0.02)  # ranks 8, 16, 64
    memory = StudyMemory(spec, prediction, tokens, PLENTY)
    assert [memory.peak_bytes([trial]) for trial in spec.trials()] == pytest.approx(totals, rel=0.001)
    assert [memory.peak_at(spec.candidates()[0], rank) for rank in spec.ranks] == pytest.approx(totals, rel=0.001)
    slopes = [peak(spec, tokens, index).parts.adapter / rank for index, rank in enumerate((8, 16, 64))]
    assert slopes == [slopes[0]] * 3


@pytest.mark.slow
def test_a_forward_that_must_be_small_takes_less() -> None:
    spec, tokens = embedded(), rows_of(*[100] * 24)
    prediction = predict(spec)
    tight = peak(spec, tokens, free=held(spec, prediction) + 200 * prediction.bytes_per_token(spec.trials()))
    roomy = peak(spec, tokens)
    assert (tight.forward_tokens, roomy.forward_tokens) == (100, 400)
    assert tight.parts.activations < 0.5 * roomy.parts.activations


def test_a_sequence_that_is_recomputed_takes_less_than_one_that_is_kept() -> None:
    """512 tokens are kept on a CPU; 600 are more than that, so that only the layers' inputs are."""
    spec = embedded(batch_size=1)
    kept, recomputed = peak(spec, rows_of(*[500] * 8)), peak(spec, rows_of(*[600] * 8))
    assert recomputed.forward_tokens == 600
    assert recomputed.parts.activations < 0.8 * kept.parts.activations


def test_less_is_kept_of_freed_tensors_with_jemalloc(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, tokens, retained = embedded(), rows_of(*[60] * 24), list[int]()
    for library in ("system", "libjemalloc.so.2"):
        monkeypatch.setattr("rankscope.plan.memory.allocator", lambda library=library: library)
        retained.append(peak(spec, tokens).parts.retained)
    assert retained[1] / retained[0] == pytest.approx(0.36 / 0.65, rel=1e-3)


@pytest.mark.slow
def test_a_pack_takes_more_than_its_trials_and_less_than_their_sum() -> None:
    spec, tokens = embedded(), rows_of(*[60] * 24)
    together = StudyMemory(spec, predict(spec), tokens, PLENTY).peak(spec.trials())
    assert isinstance(together, PeakMemory)
    alone = [peak(spec, tokens, index).parts for index in range(3)]
    assert together.parts.adapter == sum(parts.adapter for parts in alone)
    assert together.parts.optimizer == sum(parts.optimizer for parts in alone)
    assert max(p.total for p in alone) < together.parts.total < sum(p.total for p in alone)


QUICK = ("mixtral",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*CONFIGS, "lfm2")]
)
def test_every_architecture_is_predicted(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    spec = StudySpec(
        model=ModelSpec(id=str(tmp_path), device="cpu"), data=DataSpec(id="unused"), seeds=(0,), ranks=(4,)
    )
    found = StudyMemory(spec, predict(spec), rows_of(*[20, 30] * 8), PLENTY).peak(spec.trials())
    assert isinstance(found, PeakMemory), found
    assert found.parts.activations > 0


def test_the_forward_by_peft_is_predicted_where_a_model_cannot_be_packed(tmp_path: Path) -> None:
    tiny_model("bloom").save_pretrained(tmp_path)
    spec = StudySpec(
        model=ModelSpec(id=str(tmp_path), device="cpu"), data=DataSpec(id="unused"), seeds=(0,), ranks=(4,)
    )
    costs = predict(spec)
    assert (costs.engine, costs.engine_reason, costs.reason) == ("peft", Unpackable.OWN_ATTENTION, None)
    found = StudyMemory(spec, costs, rows_of(*[20, 30] * 8), PLENTY).peak(spec.trials())
    assert isinstance(found, PeakMemory), found
    by_peft = spec.model_copy(update={"training": spec.training.model_copy(update={"engine": "peft"})})
    families = {key: family._replace(engine_reason=None) for key, family in costs.families.items()}
    assert costs._replace(engine_reason=None, families=families) == predict(by_peft)


@pytest.mark.slow
def test_dropout_keeps_its_masks() -> None:
    without, tokens = embedded(), rows_of(*[60] * 24)
    with_dropout = without.model_copy(update={"adapter": without.adapter.model_copy(update={"lora_dropout": 0.1})})
    assert peak(with_dropout, tokens).parts.activations > peak(without, tokens).parts.activations


def test_a_gpu_that_is_not_here_is_planned_for_in_bfloat16() -> None:
    spec = embedded()
    prediction = predict(spec, torch.device("cuda"))
    assert prediction.base_bytes == pytest.approx(2 * prediction.base_params, rel=0.01), "norms stay in float32"
    found = StudyMemory(spec, prediction, rows_of(*[60] * 24), 24 * 10**9).peak(spec.trials()[:1])
    assert isinstance(found, PeakMemory), found
    assert found.parts.process == found.parts.retained == 0
    assert found.parts.adapter == 4 * prediction.params[spec.candidates()[0].name], "adapters stay in float32"


def test_the_largest_rank_is_that_of_brute_force() -> None:
    """Also where memory is short, so that forwards are smaller at higher ranks."""
    spec = embedded()
    memory = StudyMemory(spec, counted(spec), rows_of(*[60] * 24), PLENTY)
    plain, known = spec.candidates()[0], []
    for free in (480_000_000, 500_000_000, 900_000_000):
        memory.free = free
        expected = max((rank for rank in range(1, 257) if memory.peak_at(plain, rank) <= 0.9 * free), default=0)
        assert largest_fitting_rank(spec, memory) == expected
        known.append(expected)
    assert 0 < known[0] < known[1] < known[2] == 256


@pytest.mark.slow
def test_the_largest_rank_that_fits_is_at_most_the_full_rank() -> None:
    spec = embedded().model_copy(update={"ranks": (8,)})  # one rank alone: a second one is looked at for the slope
    tokens = rows_of(*[60] * 24)
    prediction = predict(spec)
    found = peak(spec, tokens)

    def largest(free: int) -> int | None:
        return largest_fitting_rank(spec, StudyMemory(spec, prediction, tokens, free))

    assert prediction.full_rank == 256
    assert largest(PLENTY) == 256
    assert largest(1000) == 0
    some = largest(int((found.parts.total + 20e6) / 0.9))
    assert some is not None
    assert 8 < some < 256


def test_the_fullest_instants_are_found_near_the_loss_and_near_the_end() -> None:
    events = [
        Event(0, "activations", 50),
        Event(1, "logits", 20),
        Event(1, "logits", -20),
        Event(2, "gradients", 30),
        Event(0, "activations", -45),
        Event(3, "gradients", 30),
        Event(4, "activations", 7),
        Event(4, "activations", -7),
    ]
    recording = Recording(events)
    assert recording.gradients == 60
    assert recording.instants(20) == [Instant(50, 20, 0), Instant(50, 0, 30), Instant(12, 0, 60), Instant(50, 20, 0)]
    assert recording.instants(30) == [Instant(50, 20, 0), Instant(0, 0, 0), Instant(50, 0, 30), Instant(50, 20, 0)]


DEEP: dict[str, dict[str, Any]] = {
    "llama-gqa": {},
    "opt-post-norm": {},
    "gpt2": {},
    "gemma2": {"num_hidden_layers": 12},  # windows in every other layer
    "bloom": {},  # by PEFT's forward
}
LONG = ("opt-post-norm", "gemma2", "bloom")
DEEP_PARAMS = [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in DEEP]


@pytest.fixture
def deep(request: pytest.FixtureRequest, tmp_path: Path) -> StudySpec:
    """A study of a model with more layers than the tiny ones have."""
    config = (CONFIGS | UNPACKABLE)[request.param]().to_dict()
    layers = {"num_hidden_layers": 7, "layer_types": None, **DEEP[request.param]}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config | layers)).save_pretrained(tmp_path)
    return StudySpec(
        model=ModelSpec(id=str(tmp_path), device="cpu"),
        data=DataSpec(id="unused"),
        ranks=(2, 4, 8),
        seeds=(0,),
        training=TRAINING,
    )


def exactly(costs: CostModel) -> CostModel:
    """The same, without smaller models: the whole model is rehearsed."""
    return costs._replace(families={key: f._replace(repeats=None) for key, f in costs.families.items()})


@pytest.mark.parametrize("deep", DEEP_PARAMS, indirect=True)
@pytest.mark.slow
def test_a_few_layers_stand_for_all(deep: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes by part and FLOPs are those of the whole model; also where sequences are recomputed."""
    tokens = rows_of(*[20, 30, 25, 17] * 6)
    costs = predict(deep)
    (family,) = costs.families.values()
    assert family.repeats is not None
    for free in (PLENTY, 0):
        memory, whole = (StudyMemory(deep, known, tokens, free) for known in (costs, exactly(costs)))
        for trial in deep.trials():
            found, expected = memory.peak([trial]), whole.peak([trial])
            assert found is not None
            assert expected is not None
            assert found.parts.adapter == expected.parts.adapter
            assert found.parts.optimizer == expected.parts.optimizer
            tracked = [part.activations + part.logits + part.gradients for part in (found.parts, expected.parts)]
            assert tracked[0] == pytest.approx(tracked[1], rel=0.01)
            assert found[1:] == expected[1:]
            assert (found.recomputed_tokens > 0) == (free == 0)
    monkeypatch.setattr("rankscope.plan.costs.find_repeats", lambda model: None)
    for name, cost in predict(deep).costs.items():
        assert costs.costs[name] == pytest.approx(cost, rel=1e-4, abs=2)


@pytest.mark.parametrize("deep", ["llama-gqa"], indirect=True)
def test_seconds_follow_from_a_few_layers(deep: StudySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are affine in rank and in layers: here exactly so, by a clock made up of both."""
    memory = StudyMemory(deep, predict(deep), rows_of(*[23] * 24), PLENTY)
    assert all((memory.seconds_per_token(candidate) or 0) > 0 for candidate in deep.candidates()), "by a real clock"

    timed = list[tuple[int, int]]()

    def clock(engine: Any, tokens: Tokens, slices: Any) -> float:
        rank = next(one.rank for one in deep.candidates() if one.name == slices[0].adapter)
        timed.append((len(engine.model.model.layers), rank))
        return timed[-1][0] * (100.0 + rank) + 7.0

    memory._seconds.clear()
    monkeypatch.setattr("rankscope.plan.memory.forward_seconds", clock)
    monkeypatch.setattr("rankscope.plan.memory.TIMED_PERIODS", 5)
    found = [memory.seconds_per_token(candidate) for candidate in deep.candidates()]
    assert found == pytest.approx([(7 * (100 + rank) + 7) / 92 for rank in (2, 4, 8)]), "a step of all four rows"
    turn = [(5, 2), (5, 8), (2, 2), (2, 8)]
    assert timed == turn * TURNS, "what disturbs the clock meets them all"
    timed.clear()
    memory._seconds.clear()
    monkeypatch.setattr(
        "rankscope.plan.memory.forward_seconds", lambda *given: clock(*given)
    )  # tests share the other's
    monkeypatch.setattr("rankscope.plan.memory.TIMING_SECONDS", 0.0)
    monkeypatch.setattr("rankscope.plan.memory.TIMED_BYTES", 0)
    assert [memory.seconds_per_token(candidate) for candidate in deep.candidates()] == pytest.approx(found)
    assert timed == [(3, 2), (3, 8), *turn[2:]], "one turn, and of large layers three, on a slow machine"


def test_layers_that_differ_are_rehearsed_one_and_all() -> None:
    def repeats(**values: Any) -> Any:
        config = CONFIGS["gemma3"]().to_dict() | {"num_hidden_layers": len(values["layer_types"])} | values
        return find_repeats(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)))

    window, full = "sliding_attention", "full_attention"
    assert repeats(layer_types=[window] * 8) == Repeats("model.layers", 0, 1, 8)
    assert repeats(layer_types=[window, full] * 6) == Repeats("model.layers", 0, 2, 6)
    assert repeats(layer_types=[window, window, full] * 6 + [window]) == Repeats("model.layers", 0, 3, 6)
    assert repeats(layer_types=[full, *[window] * 9]) == Repeats("model.layers", 1, 1, 9)
    assert repeats(layer_types=[window] * 9 + [full]) is None
    assert repeats(layer_types=[window, full, full, window, full, window, window, full]) is None
    assert repeats(layer_types=[window] * 5) is None, "two smaller models would have as many layers"


def test_an_adapter_in_one_layer_alone_makes_it_another() -> None:
    config = CONFIGS["llama-gqa"]().to_dict() | {"num_hidden_layers": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert find_repeats(model) == Repeats("model.layers", 0, 1, 8)
    candidate = embedded().candidates()[0].model_copy(update={"target_modules": ("2.mlp.up_proj",)})
    add_empty_adapter(model, candidate)
    assert find_repeats(model) is None, "the five layers after it are too few"


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
    with pytest.raises(StudyError, match="--gpu-flops without --gpu-memory"):
        parse_gpu(None, "400TFLOPS")


@pytest.mark.own_processes
@pytest.mark.slow
def test_the_prediction_is_near_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted and measured peak of the embedded model, in a real child process."""
    monkeypatch.setattr("rankscope.plan.costs.own_process_bytes", own_process_bytes)
    values = {"data": {"max_length": 128, "max_rows": 200, "eval_rows": 32}, "measure": {"steps": 4, "warmup_steps": 1}}
    options = {"model": "embedded", "dataset": "embedded", "ranks": [256], "seeds": [0], "steps": 20}
    spec = assemble(values, {**options, "device": "cpu", "dtype": "float32"})
    data = prepare_data(spec)
    found = forecast(spec, StudyMemory(spec, predict(spec), data.train, PLENTY), data)
    (candidate,) = found.candidates.values()
    assert candidate.peak_bytes
    assert candidate.step_seconds
    assert candidate.runtime_seconds
    assert candidate.runtime_seconds > 20 * candidate.step_seconds
    seconds = study_seconds(spec, found.candidates, data.facts)
    assert seconds is not None
    assert min(seconds) > 0
    study = Study.create(tmp_path / "study", spec)
    save(data, study.path / "data")
    job = Job("rankscope.jobs.profiles", {"profile": "r256", "members": [], "again": False}, "profiles/jobs/r256")
    assert run_alone(study.path, job) is None
    measured = study.profiles()["private_peak_bytes"].max()
    assert candidate.peak_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("engine", ["packed", "peft"])
@pytest.mark.slow
def test_gradient_checkpointing_is_planned_where_a_sequence_would_not_fit(
    engine: str, device: str, tmp_path: Path
) -> None:
    """With recomputation, activations are a share of those that are kept otherwise; by both engines."""
    tiny_model("llama-gqa").save_pretrained(tmp_path)
    spec, tokens = embedded(engine=engine, batch_size=1), rows_of(*[100] * 8)
    spec = spec.model_copy(update={"model": ModelSpec(id=str(tmp_path), device="cpu")})
    prediction = predict(spec, torch.device(device))
    trial = spec.trials()[0]
    fixed, per_token = held(spec, prediction), prediction.bytes_per_token([trial])
    peaks = []
    for free in (PLENTY, fixed + 50 * per_token):
        found = StudyMemory(spec, prediction, tokens, free).peak([trial])
        assert isinstance(found, PeakMemory), found
        peaks.append(found)
    kept, recomputed = peaks
    assert (kept.recomputed_tokens, recomputed.recomputed_tokens) == (0, 100)
    assert kept.forward_tokens == recomputed.forward_tokens == 100
    assert recomputed.parts.activations < 0.8 * kept.parts.activations


def test_a_gpu_that_is_not_here_is_planned_for_with_any_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU torch's CUDA build has no backward for a GPU's fake tensors either."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert stand_in(torch.device("cuda")).type == "cpu"
