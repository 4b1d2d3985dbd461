"""A study's tables, verdict, adapters and report."""

from functools import cached_property
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any

from rankscope.errors import StudyError
from rankscope.files import missing_error
from rankscope.spec.candidates import PLAIN, Trial
from rankscope.study import scores, tables
from rankscope.study.evidence import Evidence, without_variants
from rankscope.study.folder import StudyFolder
from rankscope.text.verdict import verdict_sentence

_SHOWN = ["trial", "status", "train_loss", "eval_loss", "trainable_params", "tokens_per_second"]


class Study(StudyFolder):
    """A study with its tables, which are read when their methods are called."""

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
    task_scores = scores.task_scores
    untrained_scores = scores.untrained_scores

    @property
    def report(self) -> Path:
        """Page of the report, which `rankscope report` builds."""
        return self.path / "report" / "index.html"

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """verdict.json (`rankscope.analysis.verdict.conclude`)."""
        verdict = self.find_verdict()
        if not verdict:
            raise missing_error(self.file("verdict.json"))
        return verdict

    def sentence(self, language: str = "en") -> str:
        """The verdict in words, in English (`en`) or Korean (`ko`); also before there is one."""
        return verdict_sentence(self.find_verdict(), language)

    @property
    def best(self) -> Trial:
        """The trial to use: `best_trial` of the rank that the verdict names. `study.best.candidate` has its rank and
        learning rate."""
        return self.best_trial()

    def best_trial(self, rank: int | None = None) -> Trial:
        """A finished trial of the rank that the verdict names, or of `rank`: of the candidate that the verdict compares
        at that rank, and of its seeds the one with the lowest held-out loss. Raises StudyError: the verdict names no
        rank, or no trial of the rank is done."""
        verdict = self.find_verdict()
        rank = verdict.get("rank") if rank is None else rank
        if rank is None:
            raise StudyError(f"{self.path}: {self.sentence()}", "Name a rank: study.adapter(8), or --rank 8.")
        results = self.results()
        of_rank = results[(results["rank"] == rank) & (results["variant"] == PLAIN)]
        compared = of_rank["candidate"].isin([row["candidate"] for row in verdict.get("comparison", ())])
        best = tables.lowest_loss(of_rank[compared] if compared.any() else of_rank)
        if best is None:
            states = ", ".join(sorted(set(of_rank["status"]))) or "it has no such rank"
            todo = f"Ranks of the study: {', '.join(map(str, self.spec.ranks))}."
            raise StudyError(f"{self.path}: no trial of rank {rank} is done: {states}", todo)
        return next(trial for trial in self.trials if trial.name == best)

    def adapter(self, rank: int | None = None) -> Path:
        """Folder of the adapter of `best`, or of `best_trial(rank)`, as PEFT saves it, with weights that are whole.
        Nothing is loaded: it is for `PeftModel.from_pretrained(base, study.adapter())`, and for every other tool that
        reads PEFT's format. Raises StudyError as `best_trial` does; StudyDirectoryError: it is missing or corrupt."""
        return self.adapter_file(self.best_trial(rank)).parent

    def evidence(self) -> Evidence:
        """Read everything that the analysis and the report start from."""
        tables = ("results", "curves", "profiles", "samples", "examples", "reference_results", "answers")
        read = {name: getattr(self, name)() for name in tables}
        division, results = self.division(), read["results"]
        status = dict(zip(results["trial"], results["status"], strict=True))
        divided = set(chain(*division.divided.values()))  # packs that were made of others
        packs = [[trial.name for trial in trials] for trials in division.packs.values()]
        everything = Evidence(
            spec=self.spec,
            untrained=self.untrained_examples(),
            machine=self.machine,
            data_facts=self.data_facts,
            prediction=self.prediction,
            reference=self.reference_examples(),
            divided=[trial.name for pack in division.packs if pack in divided for trial in division.packs[pack]],
            survivors=[t for pack in packs if "diverged" in map(status.get, pack) for t in pack if status[t] == "done"],
            failures=self.open_failures(),
            cuts=self.cut_examples(),
            task_scores=self.task_scores() if self.spec.measure.task else None,
            task_untrained=self.untrained_scores() if self.spec.measure.task else None,
            **read,
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
            f"<p>{escape(self.sentence())}</p>{table}<p>{escape(str(self.report))}</p>"
        )
