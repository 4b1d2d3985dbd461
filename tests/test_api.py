"""The Python API: `rankscope.run` asks for what the command line does, and a study gives what a user takes from it."""

import inspect
import re
import shutil
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rankscope
from hub_server import serving
from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import read_json, write_json
from rankscope.spec.models import ModelSpec
from rankscope.spec.option_table import OPTIONS
from rankscope.study.folder import StudyFolder
from small_study import OPTIONS as SMALL
from small_study import SETS


class LaunchedError(Exception):
    """A run got as far as its launcher."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__()
        self.model = model


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(name: str, model: ModelSpec, *_: Any) -> None:
        raise LaunchedError(model)

    monkeypatch.setattr("rankscope.begin.make_launcher", launch)


@pytest.fixture
def study(trained: StudyFolder, tmp_path: Path) -> rankscope.Study:
    shutil.copytree(trained.path, tmp_path / "study")
    return rankscope.open(tmp_path / "study")


def test_every_option_of_the_command_line_is_a_parameter_with_a_type_and_a_word() -> None:
    parameters = inspect.signature(rankscope.run).parameters
    assert set(OPTIONS) <= set(parameters)
    types = get_type_hints(rankscope.run)
    assert [name for name in parameters if types[name] is Any] == ["others"]
    told = re.findall(r"^        (\w+): \S", (rankscope.run.__doc__ or "").partition("Raises:")[0], re.MULTILINE)
    assert told == list(parameters)
    criteria = [name for name, option in OPTIONS.items() if option.field.startswith("verdict.")]
    assert set(criteria) < set(inspect.signature(rankscope.Study.conclude).parameters)


@pytest.mark.usefixtures("launched")
def test_options_override_a_study_file_and_paths_may_be_paths(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.yaml"
    question = {"name": "asked", "model": {"id": "nowhere"}, "data": {"id": "nowhere"}, "ranks": [2]}
    file.write_text(yaml.safe_dump(question), encoding="utf-8")
    with pytest.raises(LaunchedError) as raised:
        rankscope.run(study=file, model=root / "model", dataset=[root / "data.json"], out=tmp_path / "out")
    assert raised.value.model.id == str(root / "model")
    with pytest.raises(StudyError, match=r"steps"):
        rankscope.run(study=file, model=root / "model", dataset=root / "data.json", steps=-1)
    with pytest.raises(StudyError, match=r"stepz: unknown option; did you mean steps\?"):
        rankscope.run(study=file, stepz=3)


def test_a_launcher_that_is_unknown_is_refused_by_a_finished_study_too(study: rankscope.Study) -> None:
    asked = study.path / "study.yaml"
    with pytest.raises(StudyError, match="--launcher slurm: unknown"):
        rankscope.run(study=asked, out=study.path, launcher="slurm")  # type: ignore[arg-type]
    with pytest.raises(StudyError, match="--ray-address is given"):
        rankscope.run(study=asked, out=study.path, ray_address="auto")


@pytest.mark.usefixtures("launched")
def test_hub_ids_are_pinned_before_anything_is_launched(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher reads the model's configuration, and must read it at the commit that the study will have."""
    for name in ("HF_HUB_CACHE", "HF_ASSETS_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(tmp_path / name))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with serving() as hub:
        files = {file.name: file.read_bytes() for file in (root / "model").iterdir()}
        commit = hub.repository("owner/model").push(files)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        with pytest.raises(LaunchedError) as raised:
            rankscope.run(model="owner/model", dataset=root / "data.json", out=tmp_path / "out")
    assert raised.value.model.commit == commit
    assert not (tmp_path / "out").exists()


def test_the_adapter_of_a_rank_is_that_of_its_best_seed_and_loads(study: rankscope.Study, root: Path) -> None:
    results = study.results()
    for rank in study.spec.ranks:
        of_rank = results[results["rank"] == rank]
        best = of_rank.sort_values("eval_loss")["trial"].iloc[0]
        assert study.adapter(rank) == study.path / "trials" / best / "adapter"
    verdict = study.verdict | {"rank": 8, "candidate": study.best_trial(8).candidate.name}
    write_json(study.path / "verdict.json", verdict)
    assert study.best == study.best_trial(8)
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    model: Any = PeftModel.from_pretrained(base, study.adapter())  # noqa: TID251  as a user does
    assert model.peft_config["default"].r == 8
    with pytest.raises(StudyError, match=r"no trial of rank 3 is done: .*\n.*2, 8"):
        study.adapter(3)


def test_no_adapter_is_given_for_a_verdict_that_names_none_or_weights_that_are_corrupt(study: rankscope.Study) -> None:
    write_json(study.path / "verdict.json", study.verdict | {"outcome": "not_enough_evidence", "rank": None})
    with pytest.raises(StudyError) as raised:
        _ = study.best
    assert study.sentence() in str(raised.value)
    weights = study.adapter(2) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(StudyDirectoryError, match="adapter_model"):
        study.adapter(2)


@pytest.mark.usefixtures("no_report")
def test_another_margin_is_concluded_by_and_kept(study: rankscope.Study) -> None:
    before = study.verdict
    verdict = study.conclude(margin="7%", margin_of="loss", confidence=0.8)
    assert (verdict["margin"], verdict["margin_of"], verdict["confidence"]) == (0.07, "loss", 0.8)
    assert verdict == study.verdict != before
    assert read_json(study.path / "verdict.json", schema=3)["margin"] == 0.07
    again = rankscope.open(study.path)
    assert again.spec == study.spec != study.spec.model_copy(update={"verdict": before})
    assert again.conclude() == verdict, "by its own criteria"
    with pytest.raises(StudyError, match=r"margin"):
        study.conclude(margin="much")


@pytest.mark.usefixtures("no_report")
def test_what_run_returns_is_what_open_opens(study: rankscope.Study, root: Path) -> None:
    ran = rankscope.run(model=root / "model", dataset=root / "data.json", out=study.path, sets=SETS, **SMALL)
    assert (type(ran), ran.spec, ran.path) == (rankscope.Study, study.spec, study.path)
