"""The study as text: defaults written out, errors that name the field, the grid of candidates."""

from pathlib import Path

import pytest
import yaml

from rankscope.errors import StudyError
from rankscope.spec.options import assemble, read_study_file, set_value
from rankscope.spec.resolve import resolve_spec, write_yaml

BASE = {"model": {"id": "a/model"}, "data": {"id": "a/dataset"}}
STUDIES = [*Path("studies").glob("*.yaml"), Path("src/rankscope/demo/study.yaml")]


def test_yaml_round_trip() -> None:
    spec = resolve_spec(BASE | {"adapter": {"alpha": "2r", "target_modules": ["q_proj", "v_proj"]}, "seeds": [3]})
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec


@pytest.mark.parametrize("path", STUDIES, ids=str)
def test_shipped_studies_are_valid(path: Path) -> None:
    spec = resolve_spec(read_study_file(Path(__file__).parents[2] / path))
    assert spec.ranks == ((1, 8, 64) if spec.model.id == "embedded" else (8, 128, 256))
    assert spec.seeds[:3] == (0, 1, 2)


def test_candidates_are_the_grid() -> None:
    spec = resolve_spec(BASE | {"ranks": [16, 4], "learning_rates": [1.5e-4, 1e-3], "seeds": [7]})
    assert [trial.name for trial in spec.trials()] == [
        "r004-lr1.5e-4-s7", "r004-lr1e-3-s7", "r016-lr1.5e-4-s7", "r016-lr1e-3-s7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("alpha", "rslora", "scaling"), [(32, False, 32 / 16), ("2r", False, 2.0), (32, True, 8.0), ("1.5r", True, 6.0)]
)
def test_scaling(alpha: object, rslora: bool, scaling: float) -> None:
    spec = resolve_spec(BASE | {"ranks": [16], "adapter": {"alpha": alpha, "use_rslora": rslora}})
    assert spec.candidates()[0].scaling == pytest.approx(scaling)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": [8]}, "rank: unknown field; did you mean ranks?"),
        ({"training": {"stepz": 5}}, "training.stepz: unknown field; did you mean steps?"),
        ({"training": {"steps": 5, "epochs": 1}}, "give steps or epochs, not both"),
        ({"ranks": []}, "ranks"),
        ({"ranks": [8, -1]}, "ranks, 2nd value"),
        ({"seeds": [1, 1]}, "seeds: listed twice: 1"),
        ({"adapter": {"alpha": "2x"}}, "adapter.alpha"),
        ({"adapter": {"lora_dropout": 1.0}}, "adapter.lora_dropout"),
        ({"data": {"id": "x", "template": "{instruction}"}}, "a row's input is never dropped"),
        ({"name": "../up"}, "name"),
        ({"model": {}}, "model.id"),
        ({"learning_rates": [float("nan")]}, "learning_rates, 1st value"),
    ],
)
def test_errors_name_the_field(values: dict, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve_spec(BASE | values)
    assert message in str(caught.value)


@pytest.mark.parametrize("ranks", [[4, "full"], ["full", 4]])
def test_full_among_the_ranks_is_the_reference(ranks: list[object]) -> None:
    spec = assemble(BASE, {"ranks": ranks, "learning_rates": [3e-4, 1e-3], "seeds": [0, 7]})
    assert (spec.ranks, spec.reference.full) == ((4,), True)
    names = [trial.name for trial in spec.reference_trials()]
    assert names == ["full-lr3e-5-s0", "full-lr1e-4-s0", "full-lr3e-5-s7", "full-lr1e-4-s7"]
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec
    assert len(spec.trials()) == 4


def test_the_reference_s_own_learning_rates() -> None:
    values = BASE | {"ranks": [4, "full"], "reference": {"learning_rates": 1e-6}, "seeds": [0]}
    assert [trial.name for trial in resolve_spec(values).reference_trials()] == ["full-lr1e-6-s0"]
    assert resolve_spec(BASE).reference_trials() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranks": ["full"]}, "at least one number"),
        ({"ranks": "full"}, "at least one number"),
        ({"ranks": [4, "full", "full"]}, "listed twice: full"),
        ({"ranks": [4, "ful"]}, "ranks, 2nd value"),
        ({"ranks": [4, "full"], "reference": {"full": False}}, "reference.full is false"),
        ({"ranks": [4, "full"], "reference": {"rates": [1e-5]}}, "reference.rates: unknown field"),
        ({"ranks": [4, "full"], "reference": "yes"}, "reference"),
        ({"reference": {"learning_rates": [1e-5]}}, "full is false"),
        ({"reference": {"full": True, "learning_rates": []}}, "reference.learning_rates"),
        ({"reference": {"full": True, "learning_rates": [-1.0]}}, "reference.learning_rates, 1st value"),
        ({"reference": {"full": True, "learning_rates": [1e-5, 1e-5]}}, "listed twice: 1e-05"),
        ({"measure": {"forgetting": ""}}, "measure.forgetting"),
        ({"measure": {"forgetting": "a.txt", "forgetting_rows": 0}}, "measure.forgetting_rows"),
    ],
)
def test_nonsense_about_the_reference_and_forgetting(values: dict, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        resolve_spec(BASE | values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("verdict", "margin_of", "margin", "of_loss"),
    [
        ({}, "gain", 0.05, 0.01),
        ({"margin": "2%"}, "gain", 0.02, 0.01),
        ({"margin_of": "loss"}, "loss", 0.01, 0.01),
        ({"margin_of": "loss", "margin": 0.02}, "loss", 0.02, 0.02),
    ],
)
def test_the_margin_s_default_is_that_of_what_it_is_a_share_of(
    verdict: dict[str, object], margin_of: str, margin: float, of_loss: float
) -> None:
    """Searches and truncations, which know no loss before training, take a share of the loss."""
    spec = resolve_spec(BASE | {"verdict": verdict})
    assert (spec.verdict.margin_of, spec.verdict.margin, spec.verdict.loss_margin) == (margin_of, margin, of_loss)
    assert resolve_spec(yaml.safe_load(write_yaml(spec))) == spec


def test_a_confidence_may_be_a_percentage() -> None:
    assert resolve_spec(BASE | {"verdict": {"confidence": "90%"}}).verdict.confidence == 0.9


def test_yaml_s_plain_off_is_that_word() -> None:
    spec = assemble(BASE | {"training": {"base_dropout": "keep"}}, {}, ["training.base_dropout=off"])
    assert spec.training.base_dropout == "off"


@pytest.mark.parametrize("confidence", ["50%", 0.5, "100%", 1, "ninety"])
def test_a_confidence_is_above_a_half(confidence: object) -> None:
    with pytest.raises(StudyError, match=r"verdict\.confidence"):
        resolve_spec(BASE | {"verdict": {"confidence": confidence}})


def test_seeds_of_single_ranks_are_of_plain_lora_and_pair_with_those_of_others() -> None:
    values = {"ranks": [8, 64], "seeds": [0, 1], "variants": ["pissa"], "seeds_by_rank": {64: [5, 1]}}
    trials = resolve_spec(BASE | values).trials()
    assert [trial.name for trial in trials if trial.seed == 5] == ["r064-lr2e-4-s5"]
    assert len(trials) == 2 * 2 * 2 + 1, "one that is among the study's counts once"


@pytest.mark.parametrize(
    ("by_rank", "said"),
    [({16: [3]}, "seeds_by_rank: 16 is none of the ranks: 8, 64"), ({8: [3, 3]}, "listed twice: 3"), ({8: [-1]}, "8")],
)
def test_seeds_of_ranks_that_make_no_sense_are_refused(by_rank: object, said: str) -> None:
    with pytest.raises(StudyError, match=said):
        resolve_spec(BASE | {"ranks": [8, 64], "seeds_by_rank": by_rank})


@pytest.mark.parametrize("margin", [2, "200%", "100%", 0, "0%", "-1%", "two percent", None, True])
def test_a_margin_that_is_no_share_is_refused(margin: object) -> None:
    with pytest.raises(StudyError, match=r"verdict\.margin"):
        resolve_spec(BASE | {"verdict": {"margin": margin}})


def test_options_and_assignments_override_the_file() -> None:
    spec = assemble(
        BASE | {"training": {"epochs": 3}, "ranks": [8]},
        {"steps": 50, "ranks": [4], "seeds": None},
        ["adapter.alpha=2r"],
    )
    assert (spec.training.steps, spec.training.epochs, spec.ranks, spec.seeds) == (50, None, (4,), (0, 1, 2))
    assert spec.adapter.alpha == "2r"
    assert spec.name == "model-dataset"


@pytest.mark.parametrize("assignment", ["training.steps", "=5", "ranks.x=5", "ranks=[1"])
def test_wrong_assignments(assignment: str) -> None:
    with pytest.raises(StudyError, match=r"--set|ranks"):
        set_value({"ranks": [8]}, assignment)


@pytest.mark.parametrize("content", ["- a\n- b", "a: [1", "\xff"])
def test_wrong_study_files(content: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(StudyError, match=r"study\.yaml"):
        read_study_file(path)


BRACES = "{instruction} {input}"


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        (f"data.template=Answer {BRACES} ### Answer:", f"Answer {BRACES} ### Answer:"),
        (f"data.template={BRACES}", BRACES),
        (f"data.template=### Q: {BRACES}", f"### Q: {BRACES}"),
        (f"data.template= {BRACES}\n", f" {BRACES}\n"),
        (f"data.template={BRACES} \\t", f"{BRACES} \\t"),
        (f'data.template="{BRACES}\\n### A:"', f"{BRACES}\n### A:"),
        (f"data.template='{BRACES}\n it''s #1'", f"{BRACES}\n it's #1"),
        (f'data.template="{BRACES}\n  next"', f"{BRACES}\n  next"),
        (f'data.template="{BRACES}" and "more"', f'"{BRACES}" and "more"'),
        ("data.chat_template={{ messages[0] }} # {% x %}", "{{ messages[0] }} # {% x %}"),
        ("data.chat_template=null", None),
        ("data.split=~", None),
        ("data.split=NULL", None),
        ("data.split='null'", "null"),
        ("data.split=1e5", "1e5"),
        ("data.config=true", "true"),
        ("model.revision=2024-05-01", "2024-05-01"),
        ("measure.forgetting=#x", "#x"),
        ("data.id=[1]", "[1]"),
        ("data.id=a: b #c", "a: b #c"),
        ("data.id=[a.jsonl, 'b c.jsonl']", ("a.jsonl", "b c.jsonl")),
        ("data.id='[a, b]'", "[a, b]"),
        ("data.eval_dataset=null", None),
        ("data.eval_dataset=*.jsonl", "*.jsonl"),
        ("adapter.alpha=2r", "2r"),
        ("adapter.target_modules=[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("data.columns={prompt: q}", {"prompt": "q"}),
        ("data.columns=prompt=q", {"prompt": "q"}),
    ],
)
def test_text_is_assigned_literally(assignment: str, value: object) -> None:
    group, field = assignment.partition("=")[0].split(".")
    assert getattr(getattr(assemble(BASE, {}, [assignment]), group), field) == value


@pytest.mark.parametrize("assignment", ["data.template=", "data.template= ", "data.id=", "data.split=", "ranks=#8"])
def test_an_assignment_of_nothing_is_refused(assignment: str) -> None:
    with pytest.raises(StudyError, match="no value is given"):
        assemble(BASE, {}, [assignment])


def test_an_assigned_template_with_a_backslash_and_an_n_is_refused() -> None:
    with pytest.raises(StudyError, match="holds a backslash and an n"):
        assemble(BASE, {}, [r"data.template=### Question: {instruction}\n{input}\n### Answer:"])


def test_quotes_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(StudyError, match="not valid YAML"):
        assemble(BASE, {}, [r'data.template="{instruction}\q{input}"'])
