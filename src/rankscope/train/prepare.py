"""Tokens of a study's data, prepared once for all trials."""

from collections.abc import Mapping
from dataclasses import replace
from textwrap import indent
from typing import Any

from rankscope import demo
from rankscope.data.cache import prepare_cached
from rankscope.data.doubts import data_warnings
from rankscope.data.general import with_general_text
from rankscope.data.tokens import TokenizedData, load, sha256_of
from rankscope.errors import DataError, StudyError
from rankscope.model.load import load_config, load_tokenizer, most_positions
from rankscope.spec.candidates import name_or_names
from rankscope.spec.models import EMBEDDED, DataSpec, StudySpec
from rankscope.study.folder import StudyFolder
from rankscope.study.growth import free_name
from rankscope.text.catalogue import Catalogue

LEFT_OUT = (
    "duplicates_dropped",
    "blank_rows_dropped",
    "bad_rows_dropped",
    "unwanted_rows_dropped",
    "rows_without_label_dropped",
    "eval_rows_in_train_dropped",
)
"""Counts of data/facts.json, of rows that are not trained on."""


def prepare_data(spec: StudySpec) -> TokenizedData:
    """Read and tokenise the data."""
    config, measured, tokenizer = load_config(spec.model).get_text_config(), spec.measure, load_tokenizer(spec.model)
    data = prepare_cached(read_spec(spec), tokenizer, config.vocab_size)
    data = TokenizedData(data.train, data.eval, data.facts | {"id": spec.data.name})
    if measured.forgetting is None:
        return data
    asked = measured.forgetting, measured.forgetting_rows
    return with_general_text(data, *asked, tokenizer, config.vocab_size, spec.data.commits)


def read_spec(spec: StudySpec) -> DataSpec:
    """Data as they are read: rows are truncated to `data.max_length`, or to the model's positions if fewer."""
    positions = most_positions(spec.model)
    changes: dict[str, Any] = {"max_length": min(spec.data.max_length, positions or spec.data.max_length)}
    if EMBEDDED in spec.data.ids:
        changes["id"] = name_or_names([str(demo.data_path()) if id == EMBEDDED else id for id in spec.data.ids])
    return spec.data.model_copy(update=changes)


def study_data(spec: StudySpec, study: StudyFolder | None) -> TokenizedData:
    """Return the tokens that a study has saved, or prepare those of a study that has none yet.

    Where `spec`, the question of `study`, adds evaluation rows, the newest entry of its log has the hashes of the
    tokens before and now. Raises DataError: the data cannot be used, or trials were trained on other tokens;
    StudyError: the study has as many evaluation rows already.
    """
    if study is None:
        return prepare_data(spec)
    begun = StudyFolder.open(study.path)  # as it is on the disk
    saved, known = study.file("data"), [sha256 for entry in begun.log for sha256 in entry.tokens_sha256]
    data = load(saved) if (saved / "facts.json").exists() else prepare_data(begun.spec)
    if sha256_of(data) in known[:-1]:  # stopped before those with more evaluation rows were saved
        data = prepare_data(begun.spec)
    sha256, rows = sha256_of(data), len(data.eval)
    trained_on = {trial.name: study.saved_record(trial).tokens_sha256 for trial in study.all_trials()}
    wrong = [name for name, one in trained_on.items() if one not in {None, sha256, *known}]
    wrong += [] if sha256 in (known or [sha256])[-1:] else ["the study"]
    more = data
    if not wrong and spec.data.eval_rows != begun.spec.data.eval_rows:
        more = prepare_data(spec)
        one, other = (sha256_of(replace(each, eval=data.eval, sha256="")) for each in (data, more))
        wrong += [] if one == other else ["the study"]
    if wrong:
        what = f"{spec.data.name}: not the rows that {wrong[0]} was trained on"
        raise DataError(what, "Give the rows that the study began with, or choose another --out.")
    if more is data:
        return data
    if len(more.eval) <= rows:
        raise StudyError(
            f"data.eval_rows: {spec.data.eval_rows} gives {len(more.eval):,} rows, and {study.path} is evaluated on "
            f"{rows:,} already",
            f"Rows are only added: give more, or another directory, --out {free_name(study.path)}.",
        )
    study.log[-1].tokens_sha256 = [sha256, sha256_of(more)]
    return more


def describe_data(facts: Mapping[str, Any], text: Catalogue) -> str:
    """Rows read and left out, on one line; then a line for each note, which the facts have in English, and one for each
    warning."""
    evaluated = text("plan.own_set" if "eval_id" in facts else "plan.held_out", rows=f"{facts['rows_eval']:,}")
    numbers = {"train": f"{facts['rows_train']:,}", "length": f"{facts['mean_length']:.0f}"}
    parts = [text("plan.data", id=facts["id"], evaluation=evaluated, **numbers)]
    if facts["truncated"]:
        parts.append(text("plan.cut", rows=f"{facts['truncated']:,}", length=f"{facts['max_length']:,}"))
    if left_out := [text(f"plan.{key}", rows=f"{facts[key]:,}") for key in LEFT_OUT if facts.get(key)]:
        parts.append(text("plan.left_out", parts=", ".join(left_out)))
    warnings = [text("caveat.warning", sentence=sentence) for sentence in data_warnings(facts, text)]
    return "\n".join(["; ".join(parts), *(indent(note, "  ") for note in facts.get("notes", [])), *warnings])
