"""Every tracker, by one contract, with its real client: what its own reader shows is what the study has."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rankscope.files import read_json, write_json
from rankscope.spec.candidates import Trial
from rankscope.spec.resolve import write_yaml
from rankscope.study.metrics import read_rows
from rankscope.study.question import write_question
from rankscope.study.study import Study
from rankscope.track import TRACKERS
from rankscope.track.follow import metric_name
from rankscope.track.tracker_process import run_trackers
from recording import RecordingProgress
from track.readers import READERS, SECRETS, Seen, clear_environment

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"
TRIAL, REFERENCE = "r008-lr5e-3-s1", "full-lr5e-4-s1"


def copy_study(path: Path) -> Study:
    """The fixture with one rate and one seed: two candidates, full fine-tuning and a verdict are four runs."""
    shutil.copytree(FIXTURE, path)
    whole = Study.open(path)
    few = Study(path, whole.spec.model_copy(update={"learning_rates": (5e-3,), "seeds": (1,)}))
    for trial in set(whole.all_trials()) - set(few.all_trials()):
        shutil.rmtree(whole.trial_folder(trial))
    write_question(path / "study.yaml", write_yaml(few.spec))
    return Study.open(path)


def restore(study: Study) -> None:
    """Let a study that was cut back be finished."""
    shutil.copytree(FIXTURE, study.path, ignore=shutil.ignore_patterns("study.yaml"), dirs_exist_ok=True)


class Replayed(NamedTuple):
    study: Study
    name: str
    home: Path
    said: list[str]

    def read(self, trial: str = TRIAL) -> Seen:
        return READERS[self.name](self.study.path / "tracking", trial)


@pytest.fixture(scope="module", params=list(TRACKERS))
def replayed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replayed]:
    """The finished study, as if it had been interrupted, gone back to a checkpoint, and gone on."""
    root, told = tmp_path_factory.mktemp(request.param), RecordingProgress()
    (root / "home").mkdir()
    study = copy_study(root / "study")
    (study.path / "report").mkdir()
    (study.path / "report" / "index.html").write_text("the page", encoding="utf-8")
    (study.path / "report" / "report.md").write_text("the page", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        clear_environment(patch, root / "home")
        whole = cut_back(study, 5)
        with run_trackers(study, [request.param], told.say):
            pass
        for file in whole:  # to a checkpoint before what has been sent
            file.write_bytes(b"".join(whole[file].splitlines(keepends=True)[:2]))
        with run_trackers(study, [request.param], told.say):
            for file, content in whole.items():
                file.write_bytes(b"".join(content.splitlines(keepends=True)[:6]))
            wait_for(study, request.param, 6)
            restore(study)
        yield Replayed(study, request.param, root / "home", told.lines)


def cut_back(study: Study, lines: int) -> dict[Path, bytes]:
    """Leaves of a finished study what it has while it trains; returns the whole curves."""
    (study.path / "verdict.json").unlink()
    whole = {}
    for trial in study.all_trials():
        folder = study.trial_folder(trial)
        record = read_json(folder / "trial.json") | {"status": "running", "results": None, "files": None}
        write_json(folder / "trial.json", record)
        file = folder / "metrics.jsonl"
        whole[file] = file.read_bytes()
        file.write_bytes(b"".join(whole[file].splitlines(keepends=True)[:lines]))
    shutil.rmtree(study.path / "profiles")
    return whole


def wait_for(study: Study, name: str, lines: int) -> None:
    """Until so many lines of the trial have been sent."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if read_json(study.path / "tracking" / f"{name}.json")["trials"][TRIAL]["lines"] >= lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} sent no {lines} lines")


def test_curves_are_those_of_the_study(replayed: Replayed) -> None:
    for name, folder in ((TRIAL, "trials"), (REFERENCE, "reference")):
        expected: dict[str, list[tuple[int, float]]] = {}
        for row in read_rows(FIXTURE / folder / name / "metrics.jsonl"):
            for field in row.keys() - {"step"}:
                expected.setdefault(metric_name(field), []).append((row["step"], row[field]))
        assert expected.keys() >= {"train/loss", "eval/loss", "train/grad_norm", "train/learning_rate", "train/epoch"}
        seen = replayed.read(name)
        for metric, points in expected.items():
            assert [step for step, _ in seen.curves[metric]] == [step for step, _ in points], metric
            values = [value for _, value in seen.curves[metric]]
            assert values == pytest.approx([value for _, value in points], rel=1e-6), metric


def test_a_run_has_the_config_and_its_group(replayed: Replayed) -> None:
    seen = replayed.read()
    assert seen.group == replayed.study.spec.name
    for name, value in {"rank": 8, "learning_rate": 0.005, "lora_alpha": 32, "seed": 1}.items():
        assert float(seen.config[name]) == value
    assert seen.config["target_modules"] == "all-linear"
    nested = seen.config.get("training", {}).get("steps")
    assert float(nested or seen.config["training.steps"]) == 4


def test_costs_are_in_the_summary(replayed: Replayed) -> None:
    profiles = replayed.study.profiles()
    summary = profiles[(profiles["rank"] == 8) & ~profiles["control"]].iloc[0]
    seen = replayed.read()
    for name, value in {
        "average_cpu_memory_gb": summary["rss_mean_bytes"] / 1e9,
        "peak_cpu_memory_gb": summary["rss_peak_bytes"] / 1e9,
        "train_runtime": summary["runtime_seconds"],
        "train_tokens_per_second": summary["tokens_per_second"],
    }.items():
        assert seen.summary[f"cost/{name}"] == pytest.approx(value, rel=1e-6)
    assert "cost/average_gpu_memory_gb" not in seen.summary, "no GPU was used"
    assert "cost/train_runtime" not in replayed.read(REFERENCE).summary, "its cost is not profiled"


def test_a_study_has_its_graphs_by_rank_its_verdict_and_its_report(replayed: Replayed) -> None:
    """The original study's four graphs: training loss, average CPU memory, average GPU memory, runtime."""
    study, seen = replayed.study, replayed.read("by-rank")
    compared = {row["rank"]: row for row in study.verdict["comparison"]}
    results, profiles = study.results(), study.profiles()
    expected: dict[str, list[Any]] = {}
    for rank, row in sorted(compared.items()):
        trials, measured = results[results["candidate"] == row["candidate"]], profiles[profiles["rank"] == rank]
        for name, value in {
            "train_loss": trials["train_loss"].mean(),
            "eval_loss": row["eval_loss"],
            "average_cpu_memory_gb": measured[~measured["control"]]["rss_mean_bytes"].mean() / 1e9,
            "train_runtime": measured[~measured["control"]]["runtime_seconds"].mean(),
        }.items():
            expected.setdefault(f"by_rank/{name}", []).append((rank, pytest.approx(value, rel=1e-6)))
    assert len(expected["by_rank/train_loss"]) == len(compared) > 1
    assert {name: seen.curves[name] for name in expected} == expected
    assert "by_rank/average_gpu_memory_gb" not in seen.curves, "no GPU was used"
    assert seen.verdict == study.sentence()
    assert seen.report == "the page"
    assert (seen.group, seen.status) == (study.spec.name, "done")


def test_memory_stands_over_the_profiles_steps(replayed: Replayed) -> None:
    samples = replayed.study.samples()
    of_rank = samples[(samples["rank"] == 8) & samples["phase"].isin(["warmup", "train"])]
    means = of_rank.groupby("step")["rss_bytes"].mean() / 1e9
    seen = replayed.read().curves["system/cpu_memory_gb"]
    assert [step for step, _ in seen] == list(means.index)
    assert [value for _, value in seen] == pytest.approx(list(means), rel=1e-6)


def test_summary_and_status(replayed: Replayed) -> None:
    results = read_json(FIXTURE / "trials" / TRIAL / "trial.json")["results"]
    seen = replayed.read()
    for name in ("train_loss", "eval_loss", "eval_accuracy", "trainable_params"):
        assert seen.summary[f"final/{name}"] == pytest.approx(results[name], rel=1e-6)
    assert seen.status == "done"
    assert seen.state in ("0", "FINISHED", "STATUS_SUCCESS", "")


def test_every_trial_has_one_run(replayed: Replayed) -> None:
    for trial in replayed.study.all_trials():
        rank = trial.candidate.rank if isinstance(trial, Trial) else 0
        assert float(replayed.read(trial.name).config["rank"]) == rank


def test_a_user_is_told_where_to_look_and_nothing_else(replayed: Replayed) -> None:
    assert len(replayed.said) == 2
    assert len(set(replayed.said)) == 1
    assert str(replayed.study.path) in replayed.said[0]


def test_no_file_has_a_secret_and_none_lies_outside_the_study(replayed: Replayed) -> None:
    files = [file for file in replayed.study.path.parent.rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], file
    assert list(replayed.home.rglob("*")) == []
    Study.open(replayed.study.path)  # there is no link that leads out of it


def test_a_moved_study_goes_on_with_the_same_runs(replayed: Replayed, tmp_path: Path) -> None:
    shutil.copytree(replayed.study.path, tmp_path / "moved", symlinks=True)
    moved, before = (
        Study.open(tmp_path / "moved"),
        read_json(replayed.study.path / "tracking" / f"{replayed.name}.json"),
    )
    with run_trackers(moved, [replayed.name], RecordingProgress().say):
        pass
    assert read_json(moved.path / "tracking" / f"{replayed.name}.json") == before
