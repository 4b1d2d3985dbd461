"""A study grows: what adds to it, what changes it freely, what makes it another study; and only what is new is done."""

import importlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from pydantic import BaseModel
from typer.testing import CliRunner

import rankscope
from folders import write_data
from launchers import HERE, FakeLauncher
from rankscope import cli, pipeline
from rankscope.analysis.next_step import next_step
from rankscope.analysis.verdict import conclude
from rankscope.errors import RankscopeError, StudyError
from rankscope.files import read_json, write_atomic, write_json
from rankscope.jobs.job import Job, Settings
from rankscope.jobs.profiles import WHOLE, replace_profiles
from rankscope.measure.machine import Site
from rankscope.report.finish import judge_by
from rankscope.spec.candidates import CONTROL, TIME
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble, read_study_file, set_field
from rankscope.spec.resolve import write_yaml
from rankscope.study.folder import AGAIN, StudyFolder
from rankscope.study.growth import RULES
from rankscope.study.missing import ProfileJob, missing_profiles, unfinished
from rankscope.study.question import write_question
from rankscope.study.records import Cut, ProfileRecord
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui.watch import Watch
from recording import RecordingProgress
from small_study import OPTIONS, SETS, run_small

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"

OTHERS: dict[str, Any] = {
    "name": "other",
    "model.id": "other",
    "model.revision": "v2",
    "model.commit": "0" * 40,
    "model.dtype": "bfloat16",
    "model.device": "cpu",
    "model.quantization": "nf4",
    "model.dequantize": True,
    "data.id": "other",
    "data.config": "other",
    "data.revision": "v2",
    "data.commits": {"d": "0" * 40},
    "data.split": "other",
    "data.format": "alpaca",
    "data.columns": {"output": "answer"},
    "data.template": "{instruction} {input}",
    "data.template_without_input": "{instruction}",
    "data.chat_template": "chatml",
    "data.loss_on": "all",
    "data.max_length": 77,
    "data.max_rows": 77,
    "data.eval_rows": 77,
    "data.split_seed": 77,
    "data.eval_dataset": "other",
    "data.eval_split": "other",
    "data.skip_bad_rows": True,
    "data.force": True,
    "ranks": [16],
    "learning_rates": [1e-3],
    "seeds": [7],
    "seeds_by_rank": {8: [7]},
    "variants": ["pissa"],
    "adapter.alpha": "2r",
    "adapter.target_modules": ["q_proj"],
    "adapter.lora_dropout": 0.1,
    "adapter.use_rslora": True,
    "adapter.init_lora_weights": "gaussian",
    "adapter.loraplus_lr_ratio": 4.0,
    "adapter.peft": {"layers_to_transform": [0]},
    "adapter.rank_pattern": {"layer": 4},
    "training.steps": 77,
    "training.epochs": 2.0,
    "training.batch_size": 77,
    "training.gradient_accumulation_steps": 2,
    "training.lr_scheduler_type": "linear",
    "training.warmup_ratio": 0.5,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 0.5,
    "training.adam_beta1": 0.8,
    "training.adam_beta2": 0.8,
    "training.adam_epsilon": 1e-6,
    "training.optim": "adamw_8bit",
    "training.base_dropout": "keep",
    "training.evals": 7,
    "training.engine": "peft",
    "training.isolated": True,
    "training.trials_per_pack": 2,
    "training.checkpoint_minutes": 1.0,
    "training.checkpoint_steps": 7,
    "reference.full": True,
    "reference.learning_rates": [1e-5],
    "measure.profiles": False,
    "measure.repeats": 7,
    "measure.warmup_steps": 7,
    "measure.steps": 7,
    "measure.rounds": 7,
    "measure.forgetting": "other",
    "measure.forgetting_rows": 7,
    "measure.answers": 7,
    "measure.answer_tokens": 7,
    "measure.task": "exact_match",
    "measure.task_items": 7,
    "measure.task_tokens": 7,
    "verdict.margin_of": "loss",
    "verdict.margin": 0.02,
    "verdict.by": "loss",
    "verdict.task_margin": 0.2,
    "verdict.confidence": 0.9,
    "verdict.max_gpu_memory": 1 << 30,
    "verdict.max_runtime": 60.0,
}
"""Another value of every field of a study."""

GROWS = {
    *("ranks", "learning_rates", "seeds", "seeds_by_rank", "variants", "adapter.alpha"),
    *("reference.full", "reference.learning_rates"),
}
FREE = {
    *("name", "model.device", "data.force", "measure.profiles", "measure.answers", "measure.answer_tokens"),
    *("measure.task", "measure.task_items", "measure.task_tokens"),
    *("training.trials_per_pack", "training.checkpoint_minutes", "training.checkpoint_steps"),
    *("adapter.loraplus_lr_ratio", "adapter.rank_pattern"),  # no variant of the study reads them
    *(field for field in OTHERS if field.startswith("verdict.")),
}
BASE = {"model": {"id": "m", "dtype": "float32"}, "data": {"id": "d"}, "ranks": [8], "seeds": [0]}


def ask(**fields: Any) -> StudySpec:
    """A question with these fields (`training__steps` for `training.steps`) beside model, data, one rank and seed."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in BASE.items()}
    for name, value in fields.items():
        set_field(values, name.replace("__", "."), value)
    return assemble(values, {})


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        inner = leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(f"{prefix}{name}", value)]
        yield from inner


@pytest.fixture
def begun(tmp_path: Path) -> Study:
    """A study that has nothing but its question."""
    return Study.create(tmp_path / "study", ask())


def test_every_field_is_here() -> None:
    """A new field of a study is fixed, unless it is said to grow or to be free."""
    assert set(OTHERS) == {name for name, _ in leaves(ask())}
    assert RULES.keys() - {"verdict"} <= OTHERS.keys()


@pytest.mark.parametrize("field", OTHERS)
def test_a_field_grows_is_free_or_makes_another_study(begun: Study, field: str) -> None:
    more: dict[str, Any] = {"variants": ["pattern"]} if field == "adapter.rank_pattern" else {}
    more |= {"reference.full": True} if field == "reference.learning_rates" else {}
    asked = ask(**{name.replace(".", "__"): value for name, value in {field: OTHERS[field], **more}.items()})
    before, wanted = dict(leaves(begun.spec))[field], dict(leaves(asked))[field]
    assert before != wanted
    if field not in GROWS | FREE:
        with pytest.raises(StudyError, match=rf"holds another study:\n  - {field}: "):
            begun.grown(asked)
        return
    grown = begun.grown(asked)
    after = dict(leaves(grown.spec))[field]
    if field in FREE:
        assert after == wanted
        assert field not in str(grown.log)
    else:
        kept = before if isinstance(before, tuple) else () if not before else (before,)
        new = wanted if isinstance(wanted, tuple) else (wanted,)
        assert after == (True if field == "reference.full" else (*kept, *new) if kept else wanted)
        assert grown.log[0].added[field] == ([{8: [7]}] if field == "seeds_by_rank" else list(new))


def test_what_nobody_wrote_adds_and_changes_nothing(tmp_path: Path) -> None:
    written = {"ranks": [4], "learning_rates": [1e-3], "seeds": [7], "name": "mine", "adapter": {"alpha": 16}}
    written |= {"verdict": {"margin": "2%"}, "measure": {"answers": 0}, "variants": ["dora"], "training": {"steps": 9}}
    study = Study.create(tmp_path / "study", assemble(BASE | written, {}))
    file = (tmp_path / "study" / "study.yaml").read_bytes()
    asked = assemble({"model": BASE["model"], "data": BASE["data"]}, {})
    grown = study.grown(asked)
    assert (grown.spec, grown.log) == (study.spec, [])
    grown.publish()
    assert (tmp_path / "study" / "study.yaml").read_bytes() == file


def test_dtype_and_device_that_nobody_chose_are_those_of_the_study(begun: Study) -> None:
    study = begun.grown(ask(model__device="cpu"))
    same = study.grown(ask(model__dtype="auto", model__device="auto")).spec
    assert (same.model.dtype, same.model.device) == ("float32", "cpu")


def test_another_study_is_named_with_its_reason_and_a_free_directory(begun: Study) -> None:
    (begun.path.parent / "study-2").mkdir()
    with pytest.raises(StudyError) as caught:
        Study.create(begun.path, ask(training__steps=9, data__eval_rows=50, ranks=[16]))
    message = str(caught.value)
    assert "  - data.eval_rows: None there, 50 asked for: held-out rows are not trained on" in message
    assert "  - training.steps: None there, 9 asked for: in a longer schedule every step has another" in message
    assert "- ranks" not in message
    assert f"--out {begun.path}-3, " in message
    assert f"`rankscope run {begun.path}`" in message
    assert begun.log == Study.open(begun.path).log == []


def test_a_margin_of_something_else_is_another_margin(begun: Study) -> None:
    assert begun.grown(ask(verdict__margin_of="loss")).spec.verdict.margin == 0.01
    of_loss = begun.grown(ask(verdict__margin_of="loss", verdict__margin=0.02))
    assert of_loss.spec.verdict.margin == 0.02
    assert of_loss.grown(ask(verdict__margin_of="gain")).spec.verdict.margin == 0.05
    assert of_loss.grown(ask()).spec.verdict.margin_of == "loss"


def test_a_variant_of_the_study_fixes_what_it_reads(begun: Study) -> None:
    study = begun.grown(ask(variants=["loraplus"], adapter__loraplus_lr_ratio=4.0))
    with pytest.raises(StudyError, match=r"adapter\.loraplus_lr_ratio"):
        study.grown(ask(adapter__loraplus_lr_ratio=5.0))


def test_a_contradiction_is_refused(begun: Study) -> None:
    study = begun.grown(ask(variants=["pattern"], adapter__rank_pattern={"layer": 4}))
    with pytest.raises(StudyError, match=r"would become is wrong(.|\n)*pattern is held against one rank"):
        study.grown(ask(variants=["pattern"], adapter__rank_pattern={"layer": 4}, ranks=[16]))


def test_rates_of_full_fine_tuning_are_added_to_the_default_ones(begun: Study) -> None:
    study = begun.grown(ask(ranks=[8, "full"]))
    assert [trial.learning_rate for trial in study.reference_trials] == [2e-5]
    assert study.log[0].added == {"reference.full": [True]}
    more = study.grown(ask(ranks=["full", 8], reference__learning_rates=[1e-5, 2e-5]))
    assert [trial.learning_rate for trial in more.reference_trials] == [1e-5, 2e-5]
    assert more.log[1].added == {"reference.learning_rates": [1e-5]}
    assert len(study.grown(ask(learning_rates=[1e-3])).reference_trials) == 2, "a tenth of each rate"


def test_the_log_says_what_was_added_and_when_and_is_no_part_of_the_question(begun: Study) -> None:
    Study.create(begun.path, ask(ranks=[4, 8], seeds=[1, 0])).publish()
    Study.create(begun.path, ask(seeds=[2])).publish({"versions": {"torch": ["2.11", "2.12"]}})
    study, file = Study.open(begun.path), begun.path / "study.yaml"
    assert [entry.added for entry in study.log] == [{"ranks": [4], "seeds": [1]}, {"seeds": [2]}, {}]
    assert study.log[2].changed == {"versions": {"torch": ["2.11", "2.12"]}}
    assert study.log[0].when.endswith("+00:00")
    assert (study.spec.ranks, study.spec.seeds) == ((8, 4), (0, 1, 2))
    text = file.read_text()
    assert yaml.safe_load(text)["log"][1]["added"] == {"seeds": [2]}
    assert text.splitlines()[-1].startswith("# sha256 of all lines above: ")
    asked = assemble(read_study_file(file), {})
    assert asked == study.spec, "`rankscope run study.yaml`"
    assert Study.create(begun.path, asked).log == study.log


def test_the_order_of_growth_does_not_change_the_trials(begun: Study) -> None:
    one = begun.grown(ask(ranks=[4, 16])).grown(ask(seeds=[3, 1])).grown(ask(variants=["dora", "pissa"]))
    other = begun.grown(ask(variants=["pissa"])).grown(ask(seeds=[1], ranks=[16])).grown(ask(variants=["dora"]))
    other = other.grown(ask(ranks=[4], seeds=[3]))
    assert [trial.name for trial in one.trials] == [trial.name for trial in other.trials]
    assert one.spec.seeds[0] == other.spec.seeds[0] == 0, "costs are measured with the study's first seed"


def test_trials_keep_their_names_when_alphas_are_added(begun: Study) -> None:
    before = [trial.name for trial in begun.trials]
    study = begun.grown(ask(adapter__alpha=[16, "2r", "4r"], ranks=[4, 8]))
    assert study.spec.adapter.alpha == (32.0, 16.0, "2r", "4r")
    assert study.log[0].added == {"ranks": [4], "adapter.alpha": [16.0, "2r", "4r"]}
    names = [candidate.name for candidate in study.spec.candidates()]
    assert names == ["r004-lr2e-4", "r004-lr2e-4-a16", "r004-lr2e-4-a8", "r008-lr2e-4", "r008-lr2e-4-a16"]
    assert before == ["r008-lr2e-4-s0"]
    alphas = [candidate.lora_alpha for candidate in study.spec.candidates()]
    assert alphas == [32, 16, 8, 32, 16], "2r of rank 8 is 16, and 4r of it 32: each alpha once"
    assert list(study.spec.profiled()) == ["r004", "r008", "control"], "cost does not depend on alpha"
    assert study.grown(ask(adapter__alpha="2.0r")).log == study.log


def test_an_old_study_opens_and_grows(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "study")
    file = tmp_path / "study" / "study.yaml"
    assert "log:" not in file.read_text()
    study = Study.open(tmp_path / "study")
    assert (study.log, study.spec.model.dtype) == ([], "auto"), "as it began"
    asked = assemble(read_study_file(file), {"seeds": [5]})
    Study.create(study.path, asked).publish()
    grown = Study.open(study.path)
    assert grown.spec.seeds == (*study.spec.seeds, 5)
    assert grown.spec.verdict == study.spec.verdict, "its margin is of the loss"
    assert list(grown.results()["status"]) == ["done"] * 8 + ["pending"] * 4
    again = study.grown(assemble({}, {"model": "model", "dataset": "data.json", "ranks": [2, 8], "steps": 4}))
    assert (again.spec, again.log) == (study.spec, []), "defaults that have changed since then are nobody's wish"


def test_a_criterion_that_leads_to_no_verdict_is_not_kept(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "study")
    before = (tmp_path / "study" / "study.yaml").read_bytes()
    with pytest.raises(StudyError, match="margin-of loss"):
        judge_by(Study.open(tmp_path / "study"), {"margin_of": "gain"})
    assert (tmp_path / "study" / "study.yaml").read_bytes() == before


@pytest.mark.parametrize("own", [{"data__eval_dataset": "e"}, {"data__eval_split": "test"}, {}])
def test_rows_of_an_evaluation_set_are_added(tmp_path: Path, own: dict[str, Any]) -> None:
    study = Study.create(tmp_path / "study", ask(**own, data__eval_rows=5))
    if not own:  # a split that was found beside `train`
        facts = {"id": "d", "max_length": 9, "mean_length": 9.0, "rows_train": 9, "rows_eval": 5}
        counts = ("truncated", "duplicates_dropped", "rows_without_label_dropped")
        write_json(study.file("data", "facts.json"), facts | dict.fromkeys(counts, 0) | {"eval_id": "d"})
    grown = study.grown(ask(**own, data__eval_rows=7))
    assert grown.spec.data.eval_rows == 7
    assert grown.log[0].added == {"data.eval_rows": [7]}
    assert study.grown(ask(**own)).spec.data.eval_rows == 5, "a default adds nothing"


# -- what is run


LOSS_OF_ONE_RUN = 1e-5
ALL: dict[str, Any] = {"ranks": [2, 8], "seeds": [0, 1], "learning_rates": [1e-2, 3e-2], "alphas": [32, 8]}
FIRST: dict[str, Any] = {"ranks": [8], "seeds": [0], "learning_rates": [3e-2], "alphas": [32]}
ORDERS = [
    [("ranks", "alphas"), ("seeds", "learning_rates")],
    [("ranks",), ("seeds",), ("learning_rates",), ("alphas",)],
    [("alphas",), ("learning_rates",), ("seeds",), ("ranks",)],
    [("seeds",), ("alphas",), ("ranks",), ("learning_rates",)],
    [("learning_rates",), ("ranks",), ("alphas",), ("seeds",)],
    [("alphas",), ("seeds",), ("ranks",), ("learning_rates",)],
]
"""Fields that are added one after the other."""


@pytest.fixture(scope="module")
def at_once(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())
        return run_small(root, tmp_path_factory.mktemp("once") / "study", margin_of="loss", **ALL)


@pytest.mark.usefixtures("no_report")
def test_a_grown_study_has_the_trials_and_losses_of_one_run(root: Path, tmp_path: Path, trained: Study) -> None:
    check_growth(root, tmp_path, trained, [("ranks",), ("seeds",)], {**OPTIONS, "alphas": [32]})


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("order", ORDERS, ids=range(len(ORDERS)))
def test_every_order_of_growth_gives_the_trials_and_losses_of_one_run(
    root: Path, tmp_path: Path, at_once: Study, order: list[tuple[str, ...]]
) -> None:
    check_growth(root, tmp_path, at_once, order, {**ALL, "margin_of": "loss"})


def check_growth(
    root: Path, tmp_path: Path, at_once: Study, order: list[tuple[str, ...]], whole: dict[str, Any]
) -> None:
    """A study of one trial to which fields are added in this order is the one that was run `at_once`."""
    asked = whole | FIRST
    run_small(root, tmp_path / "study", **asked)
    for fields in order:
        asked |= {field: whole[field] for field in fields}
        before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("study/trials/*/trial.json")}
        division = read_json(tmp_path / "study" / "packs" / "division.json")["packs"]
        study = run_small(root, tmp_path / "study", **asked)
        assert all(file.stat().st_mtime_ns == time for file, time in before.items()), "nothing is trained again"
        packs = read_json(tmp_path / "study" / "packs" / "division.json")["packs"]
        assert packs | division == packs, "packs that exist stay"
        assert len(packs) > len(division)
    found, expected = (one.results().set_index("trial") for one in (study, at_once))
    assert list(found.index) == list(expected.index)
    assert (found["status"] == "done").all()
    pd.testing.assert_series_equal(found["eval_loss"], expected["eval_loss"], atol=LOSS_OF_ONE_RUN, rtol=0)
    grown, once = (conclude(one.evidence()) for one in (study, at_once))
    assert [grown[key] for key in ("outcome", "rank", "guess")] == [once[key] for key in ("outcome", "rank", "guess")]
    assert [set(entry.added) for entry in study.log] == [
        {"adapter.alpha" if field == "alphas" else field for field in fields} for fields in order
    ]
    assert set(study.answers()["candidate"]) == {"base", *(one.name for one in study.spec.candidates())}
    assert set(study.prediction["candidates"]) == {candidate.name for candidate in study.spec.candidates()}
    assert study.spec.model.dtype == "float32", "which `auto` was when it began"


@pytest.fixture
def study(trained: Study, tmp_path: Path) -> Study:
    """A copy of the shared study: all trials done, no costs."""
    shutil.copytree(trained.path, tmp_path / "study")
    return Study.open(tmp_path / "study")


def measure(path: Path, job: Job) -> RankscopeError | None:
    """Do a profile's job without measuring anything: with the numbers of another study."""
    content = dict(job.content)
    study, again, name = StudyFolder.open(path), content["again"], content["profile"]
    (repeat,) = read_json(FIXTURE / "profiles" / "r002.json", schema=2)["repeats"]
    repeat["summary"] = {column: repeat["summary"][column] for column in repeat["summary"] if "second" not in column}
    repeat["summary"]["load_seconds"] = 1.0
    if content.get("members"):
        repeat = timed(content["members"], len(study.profile_repeats(name, again)))
    candidate = None if name == TIME else study.profiled(again)[name].model_dump(mode="json")
    repeats = [*study.profile_repeats(name, again), repeat]
    ProfileRecord(profile=name, candidate=candidate, repeats=repeats).write(study.profile_file(name, again))
    return None


def timed(members: list[str], slower: int) -> dict[str, Any]:
    """A rank takes 1 + rank/10 times as long as the control, on a machine that is each time slower than before."""
    ratios = {name: 1.0 if name == CONTROL else 1 + int(name[1:4]) / 10 for name in members}
    summaries = {
        name: {f"{of}_ratio": ratio for of in ("step", "runtime")}
        | {f"{of}_ratio_se": 0.01 for of in ("step", "runtime")}
        | {f"step_seconds_{of}": ratio * (1 + slower) for of in ("median", "mean")}
        | {"rounds": 9, "runtime_seconds": ratio * (1 + slower) * 100, "tokens_per_second": 50 / ratio / (1 + slower)}
        for name, ratio in ratios.items()
    }
    return {"engine": "packed", "control": "r002", "clock": "wall", "cpu_pressure": 0.5, "summaries": summaries}


def run(study: Study, site: Site = HERE, remeasure: bool = False, does: Any = measure, **fields: Any) -> list[str]:
    """Run the study with these fields set; trials that would be trained are marked as diverged. Return what it says."""
    values = study.spec.model_dump(mode="json")
    for name, value in fields.items():
        set_field(values, name.replace("__", "."), value)

    def ends(path: Path, job: Job) -> RankscopeError | None:
        if job.module.endswith("packs"):
            names = {name for trials in job.content["packs"].values() for name in trials}
            now = StudyFolder.open(path)
            for trial in now.trials:
                if trial.name in names:
                    now.mark_ended(trial, "diverged", "not trained")
            for pack, trials in job.content["packs"].items():
                write_json(
                    path / "packs" / pack / "pack.json", {"pack": pack, "trials": trials, "results": {"steps": 1}}
                )
            return None
        result: RankscopeError | None = does(path, job)
        return result

    progress = RecordingProgress()
    asked = assemble(values, {})
    pipeline.run_study(asked, study.path, FakeLauncher(ends, site), progress, Settings(remeasure=remeasure))
    return progress.lines


def without_conclusion(patch: pytest.MonkeyPatch) -> None:
    """Have runs end without verdict, cards and report."""
    patch.setattr("rankscope.report.finish.conclude", lambda _: {"outcome": "none"})
    patch.setattr("rankscope.report.finish.write_cards", lambda *_: None)
    patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())


@pytest.fixture(scope="module")
def measured(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study with costs of its two ranks, measured here."""
    path = Path(shutil.copytree(trained.path, tmp_path_factory.mktemp("measured") / "study"))
    with pytest.MonkeyPatch.context() as patch:
        without_conclusion(patch)
        run(Study.open(path), measure__profiles=True, measure__answers=0)
    return path


@pytest.fixture
def costed(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    without_conclusion(monkeypatch)
    return Study.open(shutil.copytree(measured, tmp_path / "study"))


def elsewhere(study: Study, **hardware: Any) -> Site:
    """Another machine than the study's, or the same one without arguments."""
    machine = study.machine
    return HERE._replace(hardware=machine["hardware"] | hardware, versions=machine["versions"])


def repeats(study: Study) -> dict[str, int]:
    return {name: len(study.profile_repeats(name)) for name in (*study.spec.profiled(), TIME)}


def test_costs_of_what_is_added_are_measured_beside_the_control_anew(costed: Study) -> None:
    assert repeats(costed) == {"r002": 2, "r008": 2, "control": 2, "time": 1}
    assert missing_profiles(costed.spec, costed) == []
    said = run(costed, ranks=[1, 4], seeds=[0, 1, 5])
    assert any(line.startswith("Other programs kept this machine busy") for line in said)
    study = Study.open(costed.path)
    assert repeats(study) == {"r001": 2, "r002": 2, "r004": 2, "r008": 2, "control": 2, "time": 2}
    assert list(study.profile_repeats(TIME)[1]["summaries"]) == ["control", "r001", "r004"]
    profiles = study.profiles()
    assert set(profiles.loc[profiles["control"], "rank"]) == {2}, "the control stays when a lower rank is added"
    own = profiles[~profiles["control"]].drop_duplicates("rank").set_index("rank")
    for rank in (1, 2, 4, 8):  # the control took twice as long when ranks 1 and 4 were added
        assert own.loc[rank, "runtime_seconds"] == pytest.approx(100 * (1 + rank / 10))
        assert own.loc[rank, "tokens_per_second"] == pytest.approx(50 / (1 + rank / 10))
    assert study.log[-1].added == {"ranks": [1, 4], "seeds": [5]}


def test_a_profile_that_failed_is_measured_again_without_the_control(costed: Study) -> None:
    def fails(path: Path, job: Job) -> RankscopeError | None:
        return RankscopeError("no") if job.content["profile"] == "r004" else measure(path, job)

    run(costed, does=fails, ranks=[4])
    study = Study.open(costed.path)
    assert missing_profiles(study.spec, study) == [ProfileJob("r004")] * 2
    assert repeats(study)["control"] == 2


@pytest.mark.slow
def test_all_costs_are_measured_again_and_replaced_when_they_are_whole(costed: Study) -> None:
    before = {name: costed.profile_file(name).read_bytes() for name in costed.spec.profiled()}

    def fails(path: Path, job: Job) -> RankscopeError | None:
        return RankscopeError("no") if job.content["profile"] == "r008" else measure(path, job)

    said = run(costed, remeasure=True, does=fails)
    assert "Not all costs could be measured again: those that the study had stay." in said
    assert {name: costed.profile_file(name).read_bytes() for name in before} == before
    measured: list[str] = []

    def counts(path: Path, job: Job) -> RankscopeError | None:
        measured.append(job.content["profile"])
        assert costed.profile_file("r008").read_bytes() == before["r008"]
        return measure(path, job)

    run(costed, remeasure=True, does=counts)
    assert measured == ["r008", "r008"], "what the first one measured here is kept"
    assert repeats(costed) == {"r002": 2, "r008": 2, "control": 2, "time": 1}
    assert not (costed.path / AGAIN).exists()
    run(costed, remeasure=True, does=lambda path, job: measured.append("again") or measure(path, job))
    assert measured.count("again") == 7


def test_a_killed_replacement_is_finished_by_the_next_run(costed: Study) -> None:
    site = elsewhere(costed, cpu="another")
    for name in costed.spec.profiled():
        for _ in range(2):
            measure(costed.path, Job("profiles", {"profile": name, "members": [], "again": True}, ""))
    marked = read_json(costed.profile_file("r002", again=True), schema=2)
    write_json(costed.profile_file("r002", again=True), marked | {"marked": True})
    machine = costed.machine | {"hardware": site.hardware}
    write_json(costed.path / AGAIN / "machine.json", machine)
    (costed.path / AGAIN).rename(costed.path / WHOLE)
    (costed.path / WHOLE / "control.json").replace(costed.profile_file("control"))
    run(costed, site)
    assert read_json(costed.profile_file("r002"), schema=2)["marked"]
    assert costed.machine["hardware"]["cpu"] == "another"
    assert not (costed.path / WHOLE).exists()


def test_what_a_killed_remeasure_leaves_is_removed_by_a_run_without_it(costed: Study) -> None:
    before = costed.profile_file("r002").read_bytes()
    measure(costed.path, Job("profiles", {"profile": "r002", "members": [], "again": True}, ""))
    assert not replace_profiles(costed)
    run(costed)
    assert not (costed.path / AGAIN).exists()
    assert costed.profile_file("r002").read_bytes() == before


@pytest.mark.slow
def test_costs_of_another_machine_are_not_mixed_and_the_change_is_logged(costed: Study) -> None:
    site = elsewhere(costed, cpu="another", memory_bytes=1, system="a newer kernel")
    said = run(costed, site, ranks=[4])
    study = Study.open(costed.path)
    before = costed.machine["hardware"]["cpu"]
    assert study.log[-1].changed == {"machine": {"cpu": [before, "another"]}}
    (told,) = [line for line in said if line.startswith("Costs of ")]
    assert told.startswith(
        f"Costs of control, r004 are not measured, since those of the study are from elsewhere (cpu: {before}"
    )
    assert f"`rankscope run {study.path} --remeasure`" in told
    assert repeats(study) == repeats(costed) | {"r004": 0}
    entries = len(study.log)
    run(study, site, ranks=[16])
    assert len(Study.open(study.path).log) == entries + 1, "that machine is known"
    run(study, site, remeasure=True)
    assert repeats(Study.open(study.path)) == {"r002": 2, "r004": 2, "r008": 2, "r016": 2, "control": 2, "time": 1}
    assert study.machine["hardware"]["cpu"] == "another", "machine.json is that of the costs"
    run(study, site, ranks=[32])
    assert repeats(Study.open(study.path))["r032"] == 2
    run(study, elsewhere(study, cpu=before), seeds=[9])
    assert Study.open(study.path).log[-1].changed == {"machine": {"cpu": ["another", before]}}


def test_versions_that_costs_do_not_depend_on_are_logged_alone(costed: Study) -> None:
    site = elsewhere(costed)._replace(versions=costed.machine["versions"] | {"pandas": "9"})
    run(costed, site, ranks=[4])
    study = Study.open(costed.path)
    assert list(study.log[-1].changed["versions"]) == ["pandas"]
    assert repeats(study)["r004"] == 2


def test_costs_that_nobody_has_measured_may_be_measured_elsewhere(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_conclusion(monkeypatch)
    run(study, elsewhere(study, cpu="another"), measure__profiles=True, measure__answers=0)
    assert study.machine["hardware"]["cpu"] == "another"
    assert repeats(study) == {"r002": 2, "r008": 2, "control": 2, "time": 1}


def test_what_cannot_be_trained_is_not_added(costed: Study) -> None:
    before = (costed.path / "study.yaml").read_bytes()
    with pytest.raises(StudyError, match="rank"):
        run(costed, ranks=[100_000])
    assert (costed.path / "study.yaml").read_bytes() == before


def test_fewer_answers_are_made_anew(study: Study) -> None:
    assert study.unanswered() == []
    fewer = study.grown(assemble(study.spec.model_dump(mode="json"), {}, ["measure.answers=1"]))
    assert fewer.unanswered() == study.answered()


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def call(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
        if isinstance(result.exception, RankscopeError):
            assert result.exception.exit_code == code
            return str(result.exception)
        assert result.exit_code == code, result.output
        return result.output

    return call


def test_a_directory_is_run_and_planned_as_its_file(study: Study, invoke: Callable[..., str]) -> None:
    for command in (["run", "--dry-run"], ["plan"]):
        told = invoke(command[0], study.path, *command[1:], "--seeds", "0..4", "--ranks", "2..8")
        assert "11 trials of 5 steps" in told.replace("\n", " ")
        assert f"{study.path} has 4 of the 15 trials" in told.replace("\n", "")
    assert Study.open(study.path).spec == study.spec, "nothing is written"
    assert "another study" in invoke("run", study.path, "--steps", "7", code=2)
    assert "path of a .yaml file" in invoke("run", study.path.parent, code=2)


@pytest.mark.usefixtures("no_report")
def test_a_study_is_judged_anew_and_keeps_the_criteria(study: Study, invoke: Callable[..., str]) -> None:
    invoke("report", study.path, "--margin", "2%", "--margin-of", "loss", "--confidence", "0.9", "--max-runtime", "2h")
    verdict = Study.open(study.path).spec.verdict
    assert (verdict.margin, verdict.margin_of, verdict.confidence, verdict.max_runtime) == (0.02, "loss", 0.9, 7200.0)
    assert Study.open(study.path).verdict["margin"] == 0.02
    invoke("report", study.path, "--lang", "ko")
    invoke("report", study.path, "--max-gpu-memory", "24GB", "--margin", "0.03")
    study = Study.open(study.path)
    assert study.spec.verdict == verdict.model_copy(update={"max_gpu_memory": 24 * 10**9, "margin": 0.03})
    assert (study.verdict["margin"], study.verdict["confidence"], study.log) == (0.03, 0.9, [])
    assert "verdict.margin" in invoke("report", study.path, "--margin", "200%", code=2)
    with study.lock():
        assert "another run" in invoke("report", study.path, "--margin", "1%", code=2)


def test_a_study_that_is_watched_may_grow(study: Study) -> None:
    watch = Watch(study.path, load("en"))
    assert len(watch.live.read().trials) == 4
    Study.create(study.path, assemble(study.spec.model_dump(mode="json"), {"seeds": [7]})).publish()
    assert len(watch.live.read().trials) == 6


# -- rows that are added


OWN: dict[str, Any] = {"ranks": [2], "seeds": [0, 1], "margin_of": "loss"}


def run_own(root: Path, folder: Path, out: Path, rows: int | None, **options: Any) -> Study:
    """Run a study with an evaluation set of its own, of 40 rows."""
    beside = folder / "eval.json"
    if not beside.exists():
        beside.write_text(json.dumps(json.loads(write_data(folder / "all.json", 160).read_text())[120:]))
    sets = [one for one in SETS if "eval_rows" not in one] + ([f"data.eval_rows={rows}"] if rows else [])
    asked = {"model": str(root / "model"), "dataset": str(root / "data.json"), "eval_dataset": [str(beside)]}
    return rankscope.run(out=out, sets=sets, **(OPTIONS | asked | OWN | options))


@pytest.fixture(scope="module")
def of_ten(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of ten rows of its evaluation set, with a curve and full fine-tuning."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())
        return run_own(root, folder, folder / "ten", 10)


@pytest.fixture
def ten(of_ten: Study, tmp_path: Path) -> Study:
    return Study.open(shutil.copytree(of_ten.path, tmp_path / "ten"))


@pytest.fixture(scope="module")
def of_thirty(root: Path, of_ten: Study) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())
        return run_own(root, of_ten.path.parent, of_ten.path.parent / "thirty", 30)


def files_of(study: Study, *names: str) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for name in names for file in study.path.glob(f"trials/*/{name}")}


def same_losses(one: Study, other: Study) -> None:
    found, expected = (study.results().set_index("trial") for study in (one, other))
    for column in ("eval_loss", "eval_perplexity", "eval_accuracy", "train_loss"):
        pd.testing.assert_series_equal(found[column], expected[column], atol=LOSS_OF_ONE_RUN, rtol=1e-5)
    for table in ("examples", "untrained_examples"):
        mine, theirs = getattr(one, table)(), getattr(other, table)()
        pd.testing.assert_frame_equal(mine, theirs, atol=LOSS_OF_ONE_RUN, rtol=1e-5)
    assert len(one.untrained_examples()) == one.data_facts["rows_eval"]


@pytest.mark.usefixtures("no_report")
def test_added_rows_are_evaluated_and_nothing_is_trained(
    root: Path, of_ten: Study, of_thirty: Study, ten: Study
) -> None:
    ten.add_cuts([Cut(trial=ten.trials[0].name, adapter_sha256=ten.adapter_sha256(ten.trials[0]), rank=1,
                      recover_steps=0, kept_energy=1.0, eval_loss=5.0, losses=[5.0], label_tokens=[1])])  # fmt: skip
    trained, progress = files_of(ten, "metrics.jsonl", "adapter/*.safetensors"), RecordingProgress()
    study = run_own(root, of_ten.path.parent, ten.path, 30, progress=progress)
    assert files_of(study, "metrics.jsonl", "adapter/*.safetensors") == trained
    assert not list(study.path.glob("packs/*/checkpoints"))
    assert list(study.log[0].added.items()) == [("data.eval_rows", [30])]
    tokens = [one.data_facts["tokens_sha256"] for one in (of_ten, of_thirty)]
    assert study.log[0].tokens_sha256 == tokens
    assert study.data_facts["tokens_sha256"] == tokens[1]
    same_losses(study, of_thirty)
    assert study.answers()["example"].isin(range(30)).all()
    assert list(study.answers()["prompt"]) == list(of_thirty.answers()["prompt"]), "of the rows of now"
    assert study.cuts().empty
    assert "curve/curve.json is removed, since evaluation rows were added; `rankscope curve` makes it again." in (
        progress.lines
    )
    assert study.data_facts["notes"][-1].startswith("evaluation rows were added: evaluations while earlier trials")
    assert "Evaluating 2 trials on the rows that were added; nothing is trained again" in progress.lines
    seen, again = files_of(study, "trial.json"), RecordingProgress()
    run_own(root, of_ten.path.parent, ten.path, None, seeds=[0, 1, 5], progress=again)
    study = Study.open(ten.path)
    assert seen.items() <= files_of(study, "trial.json").items()
    assert study.results()["eval_loss"].notna().all()
    assert set(study.examples().groupby("trial").size()) == {30}, "an added seed has all rows"
    assert not any("evaluated on the rows" in line for line in again.lines)


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def in_this_process(path: Path, job: Job) -> RankscopeError | None:
    importlib.import_module(job.module).work(path, json.loads(json.dumps(dict(job.content))))
    return None


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("rankscope.pipeline.save", 1),  # the log has the rows, the tokens are those of before
        pytest.param("rankscope.data.tokens.write_json", 1, marks=pytest.mark.slow),  # facts.json: of other tokens
        ("rankscope.train.results.file_hashes", 1),  # eval.json of the first trial is new, its trial.json is not
        pytest.param("rankscope.train.results.file_hashes", 2, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_is_finished_by_the_next(
    of_thirty: Study, ten: Study, where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, calls = files_of(ten, "metrics.jsonl", "adapter/*.safetensors"), list[int]()
    module, name = where.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def kills(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(where, kills)
        with pytest.raises(Killed):
            run(ten, does=in_this_process, data__eval_rows=30)
    study = Study.open(ten.path)
    assert study.spec.data.eval_rows == 30, "the log comes first"
    statuses = list(study.results()["status"])
    assert statuses == ["done"] * (call - 1) + ["interrupted"] * (3 - call)
    rows = 30 if call == 2 else 0
    assert len(study.examples()) == rows, "losses on other rows are not compared"
    assert {trial.name for trial in unfinished(study)} == {trial.name for trial in study.trials[call - 1 :]}
    run(study, does=in_this_process)
    same_losses(Study.open(ten.path), of_thirty)
    assert files_of(ten, "metrics.jsonl", "adapter/*.safetensors") == trained


@pytest.mark.usefixtures("no_report")
def test_what_is_unfinished_or_without_weights_is_trained_on_the_new_rows(ten: Study) -> None:
    ten = ten.grown(assemble(ten.spec.model_dump(mode="json"), {}, ["reference.full=true"]))
    ten.publish()
    first, full = ten.trials[0], ten.reference_trials[0]
    record = ten.trial_record(first)
    record.model_copy(update={"status": "running"}).write(ten.trial_folder(first) / "trial.json")
    (pack,) = ten.division().packs
    checkpoints = ten.file("packs", pack, "checkpoints")
    checkpoints.mkdir()
    shutil.copytree(ten.trial_folder(first), ten.trial_folder(full))
    record.model_copy(update=full.model_dump(mode="json")).write(ten.trial_folder(full) / "trial.json")
    started: list[str] = []

    def does(path: Path, job: Job) -> RankscopeError | None:
        started.append(job.folder)
        return in_this_process(path, job) if job.folder == "rows/0" else None

    said = run(ten, does=does, data__eval_rows=30, measure__answers=0)
    assert started == ["rows/0", *(f"reference/{one.name}" for one in ten.reference_trials)]
    assert not checkpoints.exists()
    assert not ten.trial_folder(full).exists()
    assert f"Pack {pack} is trained from the start: evaluation rows were added" in said
    assert f"{full.name} is trained again, since evaluation rows were added: the weights are not" in " ".join(said)
    assert list(Study.open(ten.path).results()["status"])[1] == "done", "the other one is not trained by `run`"


def test_a_plan_counts_the_models_that_a_new_task_scores(ten: Study, invoke: Callable[..., str]) -> None:
    told = " ".join(invoke("plan", ten.path, "--task", "exact_match").split())
    assert f"{len(ten.trials) + 1} finished models, the untrained one counted, would be scored on the task" in told


def test_rows_are_only_added_and_never_to_rows_that_are_held_out(
    ten: Study, study: Study, invoke: Callable[..., str], tmp_path: Path
) -> None:
    file = (ten.path / "study.yaml").read_bytes()
    for rows, found in ((5, 5), (10_000, 40)):
        told = invoke("run", ten.path, "--dry-run", "--set", f"data.eval_rows={rows}", code=0 if found > 10 else 2)
        assert ("2 trials would be evaluated on the rows" if found > 10 else "5 gives 5 rows, and") in told
    assert f"--out {ten.path}-2" in invoke("run", ten.path, "--set", "data.eval_rows=9", code=2)
    told = invoke("run", study.path, "--set", "data.eval_rows=24", code=2)
    assert "12 there, 24 asked for: held-out rows are not trained on, and trials were trained on all others" in told
    assert f"--out {study.path}-2" in told
    other = write_data(tmp_path / "other.json", 119)
    spec = ten.spec.model_copy(update={"data": ten.spec.data.model_copy(update={"id": str(other)})})
    write_question(ten.path / "study.yaml", write_yaml(spec))
    assert "not the rows that the study was trained on" in invoke("run", ten.path, "--set", "data.eval_rows=30", code=3)
    write_atomic(ten.path / "study.yaml", file)
    assert Study.open(ten.path).data_facts["rows_eval"] == 10


@pytest.mark.slow
def test_the_command_for_more_rows_works_as_printed(ten: Study, study: Study, invoke: Callable[..., str]) -> None:
    verdict = {"outcome": "not_enough_evidence", "comparison": [1], "margin": 0.01, "margins": [], "seeds": 2}
    for one, told in ((ten, "2 trials would be evaluated"), (study, "4 trials of 5 steps")):
        step = next_step(verdict, one.evidence(), str(one.path), load("en"))
        assert step is not None
        assert told in invoke(*shlex.split(step.command)[1:], "--dry-run")
