"""A study with variants of LoRA, from the question to the report."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import rankscope
from rankscope.analysis.variants import judge_variants
from rankscope.cli import app
from rankscope.data.tokens import load
from rankscope.errors import StudyError
from rankscope.lora.saved import read_adapter
from rankscope.measure.profile import profile_candidate
from rankscope.resize.pattern import propose
from rankscope.study.study import Study
from recording import RecordingProgress

pytestmark = pytest.mark.slow  # whole studies

VARIANTS = ["pissa", "dora"]


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("variants")
    told = RecordingProgress()
    study = rankscope.run(
        model=str(root / "model"),
        dataset=str(root / "data.json"),
        ranks=[2],
        variants=VARIANTS,
        seeds=[0, 1],
        learning_rates=[1e-2],
        steps=6,
        sets=["measure.profiles=false", "measure.answers=1", "measure.steps=2"],
        out=folder / "out",
        progress=told,
    )
    (folder / "said.txt").write_text("\n".join(told.lines), encoding="utf-8")
    return study


def test_every_variant_is_trained_and_measured(study: Study) -> None:
    results = study.results()
    assert set(results["status"]) == {"done"}
    assert "cannot be packed" not in (study.path.parent / "said.txt").read_text(encoding="utf-8")
    assert list(results["variant"].unique()) == ["lora", *VARIANTS]
    engines = results.groupby("variant")["engine"].unique().map(list)
    assert engines["dora"] == ["peft"]
    assert all(engines[name] == ["packed"] for name in ("lora", "pissa"))
    packs = study.division().packs.values()
    assert all(len({trial.candidate.packable for trial in pack}) == 1 for pack in packs)


def test_the_verdict_on_ranks_is_of_plain_lora(study: Study) -> None:
    evidence = study.evidence()
    assert set(evidence.results["variant"]) == {"lora"}
    assert [row["candidate"] for row in study.verdict["comparison"]] == ["r002-lr1e-2"]
    assert evidence.variants is not None
    assert set(evidence.variants.results["variant"]) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_profiled(study: Study, variant: str) -> None:
    found = study.spec.profiled()
    assert list(found) == ["r002", "r002-pissa", "r002-dora", "control"]
    summary = profile_candidate(study.spec, found[f"r002-{variant}"], load(study.path / "data"))["summary"]
    done = study.results().set_index("variant").loc[variant].iloc[0]
    assert summary["trainable_params"] == done["trainable_params"]
    assert summary["adapter_bytes"] == pytest.approx(done["adapter_bytes"], abs=64)
    assert summary["rss_peak_bytes"] > summary["rss_base_bytes"] > 0


def test_each_variant_is_judged_beside_plain_lora(study: Study) -> None:
    rows = study.verdict["variants"]
    assert [(row["variant"], row["rank"]) for row in rows] == [(name, 2) for name in VARIANTS]
    results = study.results().groupby("candidate")["eval_loss"].mean()
    for row in rows:
        assert row["plain"] == "r002-lr1e-2"
        assert row["low"] < row["difference"] < row["high"]
        assert row["difference"] == pytest.approx(results[row["candidate"]] - results[row["plain"]], abs=1e-9)
        shown = row["low"] > 0, row["high"] < 0
        assert row["outcome"] == {(True, False): "worse", (False, True): "better"}.get(shown, "not_distinguishable")


def test_a_lower_loss_is_better_and_a_higher_one_worse(study: Study) -> None:
    evidence = study.evidence()
    assert evidence.variants is not None
    plain = evidence.examples
    shifts = {"pissa": -0.1, "dora": 0.1}
    made = pd.concat(
        plain.assign(candidate=f"r002-lr1e-2-{name}", variant=name, loss=plain["loss"] + shift)
        for name, shift in shifts.items()
    )
    rows = judge_variants(evidence._replace(variants=evidence.variants._replace(examples=made)))
    assert {row["variant"]: row["outcome"] for row in rows} == {
        "pissa": "better",
        "dora": "worse",
    }
    assert {row["variant"]: row["difference"] for row in rows} == pytest.approx(shifts)
    one = made[made["seed"] == 0]
    (row, *_) = judge_variants(evidence._replace(variants=evidence.variants._replace(examples=one)))
    assert row["outcome"] is None
    assert row["low"] is None


def test_the_report_shows_them(study: Study) -> None:
    page, text = study.report.read_text(encoding="utf-8"), (study.report.parent / "report.md").read_text("utf-8")
    for shown in (page, text):
        assert "Variants of LoRA" in shown
        assert "PiSSA at rank 2" in shown
    assert "variants:" in page, "study.yaml, to reproduce it"
    assert "r002-lr1e-2-dora-s1" in page
    table = pd.read_csv(study.report.parent / "results.csv")
    assert sorted(table["trial"]) == sorted(study.results()["trial"])


def test_pissa_is_saved_as_plain_lora(study: Study) -> None:
    adapter = read_adapter(study.path / "trials" / "r002-lr1e-2-pissa-s0" / "adapter")
    assert adapter.config.r == 4
    assert adapter.config.init_lora_weights is True
    assert all(layer.rank == 4 for layer in adapter.layers)
    card = (study.path / "trials" / "r002-lr1e-2-pissa-s0" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "PiSSA" in card


def test_answers_are_of_every_variant(study: Study) -> None:
    assert len(study.answers_record().answers) == 2 + len(VARIANTS)


def test_a_pattern_is_proposed_tried_and_judged(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["pattern", str(trained.path), "--rank", "2"], catch_exceptions=False)
    assert "rankscope run pattern.yaml" in done.output
    values = yaml.safe_load(Path("pattern.yaml").read_text(encoding="utf-8"))
    ranks = values["adapter"]["rank_pattern"]
    assert values["ranks"] == [2]
    assert len(set(ranks.values()) | {2}) > 1
    proposal = propose(trained, 2)
    assert proposal.ranks == {name: ranks.get(name, 2) for name in proposal.ranks}
    assert proposal.parameters <= proposal.uniform_parameters
    again = CliRunner().invoke(app, ["pattern", str(trained.path), "--rank", "2"])
    assert isinstance(again.exception, StudyError)
    assert "exists" in str(again.exception)

    tried = rankscope.run(study=values, out=tmp_path / "tried", progress=RecordingProgress())
    assert [row["variant"] for row in tried.verdict["variants"]] == ["pattern"]
    assert "Ranks by layer at rank 2" in tried.report.read_text(encoding="utf-8")
    adapter = read_adapter(tried.path / "trials" / "r002-lr3e-2-pattern-s0" / "adapter")
    assert {layer.layer: layer.rank for layer in adapter.layers} == proposal.ranks
    assert {layer.scaling for layer in adapter.layers} == {16.0}
    parameters = tried.results().set_index("variant")["trainable_params"]
    assert parameters["pattern"].iloc[0] == proposal.parameters
    assert parameters["lora"].iloc[0] == proposal.uniform_parameters


@pytest.mark.parametrize("rank", [0, 2, 9])
def test_a_pattern_is_below_the_rank_it_is_read_off(study: Study, rank: int) -> None:
    with pytest.raises(StudyError, match=f"--rank {rank}"):
        propose(study, rank)
