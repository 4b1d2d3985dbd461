"""Model cards: true, loadable by the hub's own reader, and with nothing of others that acts."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from rankscope.files import read_json
from rankscope.report.card import model_card
from rankscope.report.finish import finish
from rankscope.report.markdown import escape
from rankscope.study.study import Study

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"

PINNED = {"model": {"id": "gpt2", "commit": "0" * 40}, "data": {"id": "squad", "commits": {"squad": "0" * 40}}}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("card") / "study"
    shutil.copytree(FIXTURE, folder)
    study = Study.open(folder)
    finish(study)
    return study


def test_every_adapter_has_a_card_with_its_own_facts(study: Study) -> None:
    for trial in study.spec.trials():
        folder = study.trial_folder(trial)
        results = read_json(folder / "trial.json")["results"]
        card = ModelCard.load(folder / "adapter" / "README.md")
        assert card.data.library_name == "peft"
        assert f"| Rank | {trial.candidate.rank} |" in card.text
        assert f"{results['eval_loss']:.4f} nats per label token" in card.text
        assert f"| Trainable parameters | {results['trainable_params']:,} |" in card.text
    assert study.results()["status"].eq("done").all(), "a card is no damage"


def test_a_card_says_what_is_doubtful_about_the_data(study: Study) -> None:
    evidence, trial = study.evidence(), study.spec.trials()[0]
    results = evidence.results.iloc[0].to_dict()
    card = model_card(evidence, study.verdict, trial, results)
    assert "\n\nWarning: With only 8 rows held out, small differences in loss may not show" in card
    sound = evidence._replace(data_facts=evidence.data_facts | {"rows_eval": 200})
    assert "Warning" not in model_card(sound, study.verdict, trial, results)


def test_a_card_says_nothing_of_the_machine_that_it_was_written_on(study: Study) -> None:
    evidence, trial = study.evidence(), study.spec.trials()[0]
    model = study.spec.model.model_copy(update={"id": "/home/me/models/base"})
    data = study.spec.data.model_copy(update={"id": ("/home/me/a + b/rows.jsonl", "owner/data")})
    there = evidence._replace(spec=study.spec.model_copy(update={"model": model, "data": data}))
    card = model_card(there, study.verdict, trial, evidence.results.iloc[0].to_dict())
    assert "/home" not in card
    assert "| Base model | base |" in card
    assert "| Data | rows.jsonl + owner/data: " in card


@pytest.mark.parametrize(("task", "name"), [("exact_match", "exact_match"), ("/home/me/my.py:score", "my.py:score")])
def test_a_card_has_the_score_on_the_task(study: Study, task: str, name: str) -> None:
    evidence, trial = study.evidence(), study.spec.trials()[0]
    spec = study.spec.model_copy(update={"measure": study.spec.measure.model_copy(update={"task": task})})
    there = evidence._replace(spec=spec, task_scores=pd.DataFrame({"trial": trial.name, "score": [1.0, 0.0, 1.0, 1.0]}))
    results = evidence.results.iloc[0].to_dict()
    said = f"Score on the task, {escape(name)} | 75%, 4 items"
    assert said in model_card(there, study.verdict, trial, results)
    assert "Score on the task" not in model_card(there, study.verdict, trial, results | {"eval_loss": None})


def test_only_what_the_hub_has_is_named_in_the_metadata(study: Study) -> None:
    evidence, trial = study.evidence(), study.spec.trials()[0]
    results = evidence.results.iloc[0].to_dict()
    there = study.spec.model_copy(
        update={
            "model": study.spec.model.model_copy(update={"id": "owner/model"}),
            "data": study.spec.data.model_copy(update={"id": "owner/data"}),
        }
    )
    card = ModelCard(model_card(evidence._replace(spec=there), study.verdict, trial, results))
    assert card.data.base_model == "owner/model"
    assert card.data.datasets == ["owner/data"]
    bare = {name: getattr(there, name).model_copy(update=update) for name, update in PINNED.items()}
    card = ModelCard(model_card(evidence._replace(spec=there.model_copy(update=bare)), study.verdict, trial, results))
    assert (card.data.base_model, card.data.datasets) == ("gpt2", ["squad"])
    hostile = there.model_copy(update={"data": there.data.model_copy(update={"id": "<script>\n| x |\n---\n"})})
    text = model_card(evidence._replace(spec=hostile), study.verdict, trial, results)
    assert "<script>" not in text
    assert ModelCard(text).data.datasets is None
