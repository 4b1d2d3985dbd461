"""The report of a study: one offline page, the same in Markdown, tables and figures.

sentences, catalogue, formats   words and numbers; imports nothing heavy
tables, series                  evidence -> tidy frames
colours, encodings              what all charts share
charts, charts_by_rank          tidy frame -> altair chart; to change a chart, change it there
loss_, memory_, speed_figures   which charts there are, in words and numbers too, and what stands in for one
cuts                            the curve from one training, cut to every rank
answers                         what the model and each candidate answer
content                         all of it put together, in one language
html, markdown, write          content -> files
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankscope.study.evidence import Evidence

__all__ = ["build"]


def build(
    evidence: "Evidence",
    verdict: Mapping[str, Any] | None,
    folder: Path,
    language: str = "en",
    *,
    study_name: str | None = None,
    reproduce: str = "rankscope run study.yaml",
) -> Path:
    """Writes index.html, report.md, results.csv, results.parquet and figures/ into `folder`.

    `verdict` is the content of verdict.json, or None before there is one. `study_name` defaults to the
    study's own; `reproduce` is the command that is shown. Each file is whole or absent. Works on partial
    evidence.

    Returns: the path of index.html.

    Raises:
        StudyError: there is no catalogue in `language`.
    """
    # The command line imports rankscope.text.verdict, which runs this file: pandas and altair wait.
    from rankscope.report.write import write_report

    return write_report(
        evidence, verdict, folder, language, study_name=study_name or evidence.spec.name, reproduce=reproduce
    )
