"""A study as text: what is valid is the same after YAML, and anything else is refused as a StudyError."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from rankscope.errors import StudyError
from rankscope.spec.candidates import FULL
from rankscope.spec.models import StudySpec
from rankscope.spec.option_table import OPTIONS
from rankscope.spec.options import assemble, read_study_file
from rankscope.spec.resolve import resolve_spec, write_yaml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.sampled_from(
    [
        "null",
        "true",
        "1e5",
        "0x10",
        "2020-01-01",
        "a: b",
        "- a",
        "#x",
        "'",
        '"',
        "\x85",
        "\u2028x",
        "\ufeff",
        "~",
        "1_0",
    ]
)
TEMPLATE_TEXT = TEXT.filter(lambda text: not {"{", "}", "\\"}.intersection(text))
NAME = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
SHARE = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
RANK = st.integers(1, 1 << 20)
COUNT = st.integers(1, 2**63 - 1)


def several(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, min_size=1, max_size=4, unique=True)


def group(**optional: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=optional)


TRAINING = group(
    epochs=POSITIVE, batch_size=COUNT, gradient_accumulation_steps=COUNT, warmup_ratio=st.floats(0, 1),
    lr_scheduler_type=st.sampled_from(["cosine", "linear", "constant"]), weight_decay=st.floats(0, 9),
    max_grad_norm=st.floats(0, 9), adam_beta1=SHARE, adam_beta2=SHARE, adam_epsilon=POSITIVE, evals=COUNT,
    base_dropout=st.sampled_from(["off", "keep"]), engine=st.sampled_from(["packed", "peft"]), isolated=st.booleans(),
    trials_per_pack=st.none() | COUNT, checkpoint_minutes=POSITIVE, checkpoint_steps=st.none() | COUNT,
)  # fmt: skip
VALID = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"id": TEXT},
            optional={"revision": st.none() | TEXT, "dtype": st.sampled_from(["auto", "bfloat16"]), "device": TEXT},
        ),
        "data": st.fixed_dictionaries(
            {"id": TEXT | several(TEXT)},
            optional={
                "config": st.none() | TEXT, "revision": st.none() | TEXT, "split": st.none() | TEXT,
                "format": st.sampled_from(["auto", "alpaca", "messages", "text"]), "max_length": COUNT,
                "loss_on": st.none() | st.sampled_from(["assistant", "last", "completion", "all"]),
                "columns": st.dictionaries(st.sampled_from(["prompt", "text"]), NAME, max_size=1),
                "template": TEMPLATE_TEXT.map("{{instruction}}{0}{{input}}{0}".format),
                "template_without_input": st.none() | TEMPLATE_TEXT.map("{}{{instruction}}".format),
                "chat_template": st.none() | st.just("chatml") | TEXT.map("{{{{ messages }}}}{}".format),
                "eval_dataset": st.none() | several(TEXT.map("eval{}".format)),
                "skip_bad_rows": st.booleans(), "force": st.booleans(),
                "max_rows": st.none() | COUNT, "eval_rows": st.none() | COUNT, "split_seed": st.integers(0, 2**63 - 1),
            },
        ),
    },
    optional={
        "name": NAME,
        "ranks": several(RANK) | RANK | several(RANK).map([FULL].__add__),
        "learning_rates": several(st.floats(1e-9, 1e3)) | st.floats(1e-9, 1e3),
        "seeds": several(st.integers(0, 2**63 - 1)) | st.integers(0, 2**63 - 1),
        "adapter": group(
            alpha=st.floats(1e-6, 1e6) | st.integers(1, 999) | st.floats(0.01, 99).map("{!r}r".format),
            target_modules=st.just("all-linear") | NAME | several(TEXT),
            lora_dropout=SHARE, use_rslora=st.booleans(), init_lora_weights=st.sampled_from(["kaiming", "gaussian"]),
        ),
        "training": TRAINING | st.fixed_dictionaries({"steps": COUNT}),
        "reference": group(full=st.just(True)) | st.fixed_dictionaries(
            {"full": st.just(True), "learning_rates": several(st.floats(1e-9, 1e3))}
        ),
        "measure": group(
            profiles=st.booleans(), repeats=COUNT, warmup_steps=st.integers(0, 9), steps=COUNT,
            forgetting=st.none() | TEXT, forgetting_rows=COUNT,
        ),
        "verdict": group(
            margin=st.floats(0.001, 0.99), confidence=st.floats(0.51, 0.99),
            max_gpu_memory=st.none() | st.integers(1, 2**50), max_runtime=st.none() | st.floats(0.01, 1e9),
        ),
    },
)  # fmt: skip

EXTREMES = st.sampled_from([10**400, -(10**400), 1e308, "1e308r", "full", "2r", "8,128", "24GB", "all-linear"])
SCALAR = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.dates()
    | EXTREMES
)  # fmt: skip
KEY = SCALAR.filter(lambda key: key == key)  # NaN is not
ANY = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3), max_leaves=5
)
GROUPS = {name: field.annotation for name, field in StudySpec.model_fields.items() if field.annotation is not None}


@st.composite
def nearly_valid(draw: st.DrawFn) -> dict[Any, Any]:
    """A valid study with some values of some fields exchanged for anything."""
    values: dict[Any, Any] = draw(VALID)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(GROUPS)))
        fields = sorted(getattr(GROUPS[name], "model_fields", {}))
        if fields and isinstance(values.get(name, {}), dict) and draw(st.booleans()):
            values[name] = values.get(name, {}) | {draw(st.sampled_from(fields)): draw(ANY)}
        else:
            values[draw(st.just(name) | KEY)] = draw(ANY)
    return values


def is_study(found: StudySpec) -> None:
    """Check that an accepted study is the same after YAML, and that its trials have short and unique names."""
    assert resolve_spec(yaml.safe_load(write_yaml(found))) == found
    names = [trial.name for trial in found.trials()] + [trial.name for trial in found.reference_trials()]
    assert len(set(names)) == len(names)
    assert all("/" not in name and len(name) < 100 for name in names)


def is_short(error: StudyError) -> None:
    lines = str(error).splitlines()
    assert error.todo
    assert len(lines) <= 8, lines
    assert max(map(len, lines)) < 600, lines


def resolve(values: Mapping[Any, Any]) -> StudySpec | None:
    try:
        return resolve_spec(values)
    except StudyError as error:
        is_short(error)
        return None


@example(values={"model": {"id": "a\x85b"}, "data": {"id": "d"}})
@given(values=VALID)
def test_a_valid_study_is_the_same_after_yaml(values: dict[str, Any], folder: Path) -> None:
    spec = resolve_spec(values)
    is_study(spec)
    path = folder / "study.yaml"
    path.write_bytes(write_yaml(spec).encode())
    assert assemble(read_study_file(path), {}, file=path) == spec


@given(values=nearly_valid() | st.dictionaries(KEY, ANY, max_size=4))
def test_any_mapping_is_a_study_or_refused(values: dict[Any, Any]) -> None:
    spec = resolve(values)
    if spec is not None:
        is_study(spec)


PIECES = st.sampled_from(
    ["model", "data", "ranks", "id", ": ", ":", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!int ",
     "!!set ", "!!binary ", "!!python/none ", "|", ">", "'", '"', "#", "%YAML 1.3\n", "---\n", "...", "? ", "1", "0x",
     "2020-13-01", "\t", "\x00", "\x85", "\ufeff", "[" * 2000, "0x" + "f" * 5000]
)  # fmt: skip


@given(text=st.lists(PIECES | st.text(max_size=3), max_size=15).map("".join) | st.binary(max_size=30))
def test_any_text_is_a_study_or_refused(text: str | bytes, folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    try:
        is_study(assemble(read_study_file(path), {}, file=path))
    except StudyError as error:
        is_short(error)


@given(values=VALID, where=st.floats(0, 1), put=st.lists(PIECES | st.text(max_size=3), max_size=3).map("".join))
def test_a_corrupt_file_is_a_study_or_refused(values: dict[str, Any], where: float, put: str, folder: Path) -> None:
    text = write_yaml(resolve_spec(values))
    cut = int(where * len(text))
    test_any_text_is_a_study_or_refused.hypothesis.inner_test(text[:cut] + put + text[cut + 1 :], folder)


FIELDS = [*(option.field for option in OPTIONS.values()), "", ".", "model", "ranks.0", "a.b.c", "training.steps.x"]
KEYS = st.sampled_from(FIELDS) | st.text(max_size=5)


@given(values=VALID | st.dictionaries(TEXT, ANY, max_size=2), sets=st.lists(st.tuples(KEYS, TEXT | PIECES), max_size=3))
def test_any_assignment_is_taken_or_refused(values: dict[str, Any], sets: list[tuple[str, str]]) -> None:
    try:
        is_study(assemble(values, {}, [f"{key}={value}" for key, value in sets]))
    except StudyError as error:
        is_short(error)


@given(values=VALID, options=st.dictionaries(st.sampled_from(sorted(OPTIONS)) | TEXT, ANY, max_size=3))
def test_any_option_is_taken_or_refused(values: dict[str, Any], options: dict[str, Any]) -> None:
    with contextlib.suppress(StudyError):
        is_study(assemble(values, options))


@pytest.mark.parametrize("field", ["name", "ranks", "training.steps", "adapter.alpha", "verdict.max_gpu_memory", "x"])
def test_a_number_with_more_digits_than_python_writes_is_refused(field: str) -> None:
    """Hexadecimal YAML can hold more than 4,300 digits, which Hypothesis does not make either."""
    with pytest.raises(StudyError) as caught:
        assemble({"model": {"id": "m"}, "data": {"id": "d"}}, {}, [f"{field}=0x{'f' * 5000}"])
    is_short(caught.value)
