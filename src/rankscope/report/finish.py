"""The end of a study: the verdict from its files, its report, and whether both are still those of its files."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rankscope import __version__
from rankscope.analysis.verdict import conclude
from rankscope.errors import DamagedError
from rankscope.files import file_hashes, find_json, write_json
from rankscope.jobs.repair import find_corrupt, remove_leftovers
from rankscope.report.card import write_cards
from rankscope.report.pdf import find_browser
from rankscope.report.write import build
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.evidence import Evidence
from rankscope.study.growth import with_seeds
from rankscope.study.missing import nothing_missing, unfinished
from rankscope.study.study import Study
from rankscope.text.catalogue import load as load_catalogue


class Conclusion(NamedTuple):
    """A study, and the evidence that its verdict is drawn from."""

    study: Study
    evidence: Evidence
    verdict: dict[str, Any]  # see verdict.json


def judge_by(study: Study, criteria: Mapping[str, Any], language: str = "en", pdf: bool = False) -> Conclusion:
    """Conclude by other criteria (`margin`, `margin_of`, `confidence`, `max_gpu_memory`, `max_runtime`; None for those
    that stay), which study.yaml keeps once they have led to a verdict. Raises StudyError: a criterion is wrong, or the
    study lacks what it needs; StudyDirectoryError: a run holds the study."""
    with study.lock():
        changed = Study.open(study.path)
        changed = changed.grown(assemble(changed.spec.model_dump(mode="json"), criteria))
        conclusion = finish(changed, language, pdf)
        changed.publish()
        return conclusion


def finish(study: Study, language: str = "en", pdf: bool = False) -> Conclusion:
    """Read the evidence, draw the conclusion, and write the adapters' model cards and the report, also as PDF where
    `pdf` asks for it. Raises MissingExtraError: nothing here prints a PDF."""
    load_catalogue(language)
    if pdf:
        find_browser()
    evidence = study.evidence()
    verdict = conclude(evidence)
    write_json(study.path / "verdict.json", verdict)
    write_cards(evidence, verdict, study.path / "trials")
    build(evidence, verdict, study.path / "report", language, str(study.path), pdf)
    write_json(study.file(MADE_OF), _made_of(study, language))
    return Conclusion(study, evidence, verdict)


def finish_again(study: Study, language: str = "en") -> Conclusion:
    """`finish`, unless the report that it last wrote is of these files. Raises DamagedError: one of them is corrupt."""
    if find_json(study.file(MADE_OF)) != _made_of(study, language):
        return finish(study, language)
    return Conclusion(study, study.evidence(), study.verdict)


def finish_complete(study: Study, language: str = "en") -> Conclusion | None:
    """Conclude a study that a run would only conclude, without what training imports; None where more is to be done.
    Raises StudyDirectoryError: a run holds the study."""
    try:
        if not nothing_missing(study):
            return None
        with study.lock():
            if any(find_corrupt(study)):
                return None
            remove_leftovers(study)
            study.publish()
            return finish_again(study, language)
    except DamagedError:  # which a run mends
        return None


def for_next_look(conclusion: Conclusion) -> StudySpec | None:
    """The question of the next planned look; None where nothing is open, no look is left, or a trial is unfinished."""
    look, study = conclusion.verdict["next_look"], conclusion.study
    if look is None or unfinished(study):
        return None
    asked = with_seeds(study.spec, look["ranks"], look["seeds"])
    return asked if asked != study.spec else None


MADE_OF = "report/made-of.json"
_RESULTS = ("*.yaml", "*.json", "data/*.json", "trials/*/*.json*", "reference/*/*.json*", "trials/*/adapter/README.md")
_REPORT = (
    "packs/division.json", "profiles/*.json", "answers/*.json", "task/*.json", "curve/*.json", "report/*.*",
    "report/figures/*",
)  # fmt: skip


def _made_of(study: Study, language: str) -> dict[str, Any]:
    """What a report is made of, and what was written: the hashes of all files but weights, tokens and logs."""
    hashes = file_hashes(study.path, (*_RESULTS, *_REPORT))
    hashes.pop(MADE_OF, None)
    return {"version": __version__, "language": language, "directory": str(study.path), "files": hashes}
