"""`rankscope.Study`: a study's tables, verdict and report."""

from functools import cached_property
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

from rankscope.files import missing_error
from rankscope.study import tables
from rankscope.study.evidence import Evidence, without_variants
from rankscope.study.folder import StudyFolder
from rankscope.text.verdict import verdict_sentence

_SHOWN = ["trial", "status", "train_loss", "eval_loss", "trainable_params", "tokens_per_second"]


class Study(StudyFolder):
    """A study: its directory, tables, verdict and report. Opening reads nothing but study.yaml; a table is read when
    its method is called. Tables are tidy pandas DataFrames, with trials in the order of the question."""

    results = tables.results
    reference_results = tables.reference_results
    curves = tables.curves
    examples = tables.examples
    untrained_examples = tables.untrained_examples
    reference_examples = tables.reference_examples
    profiles = tables.profiles
    samples = tables.samples
    answers = tables.answers
    cuts = tables.cuts
    cut_examples = tables.cut_examples

    @property
    def report(self) -> Path:
        """Page of the report, which `rankscope report` builds."""
        return self.path / "report" / "index.html"

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """verdict.json (`rankscope.analysis.verdict.conclude`)."""
        verdict = self.find_verdict()
        if verdict is None:
            raise missing_error(self.file("verdict.json"))
        return verdict

    def evidence(self) -> Evidence:
        """Read everything that the analysis and the report start from."""
        results, division = self.results(), self.division()
        status = dict(zip(results["trial"], results["status"], strict=True))
        divided = set(chain(*division.divided.values()))  # packs that were made of others
        packs = [[trial.name for trial in trials] for trials in division.packs.values()]
        everything = Evidence(
            spec=self.spec,
            results=results,
            curves=self.curves(),
            profiles=self.profiles(),
            samples=self.samples(),
            examples=self.examples(),
            untrained=self.untrained_examples(),
            machine=self.machine,
            data_facts=self.data_facts,
            prediction=self.prediction,
            reference=self.reference_examples(),
            reference_results=self.reference_results(),
            divided=[trial.name for pack in division.packs if pack in divided for trial in division.packs[pack]],
            survivors=[t for pack in packs if "diverged" in map(status.get, pack) for t in pack if status[t] == "done"],
            failures=self.open_failures(),
            answers=self.answers(),
            cuts=self.cut_examples(),
        )
        return without_variants(everything) if self.spec.variants else everything

    def _repr_html_(self) -> str:
        """The verdict and the results by trial, as a notebook shows them."""
        results = self.results()
        done = int((results["status"] == "done").sum())
        shown = results[_SHOWN].astype({"trainable_params": "Int64"})
        table = shown.to_html(index=False, na_rep="–", float_format=lambda value: f"{value:,.4g}", border=0)
        return (
            f"<p><strong>{escape(self.spec.name)}</strong>: {done} of {len(results)} trials are done.</p>"
            f"<p>{escape(verdict_sentence(self.find_verdict()))}</p>{table}<p>{escape(str(self.report))}</p>"
        )
