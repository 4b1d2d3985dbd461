"""Commands on adapters, in the terminal: ranks by layer proposed, smaller adapters, and exported ones."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rankscope.export.command import export
from rankscope.export.show import describe, lost_table, sentences
from rankscope.report.variants import pattern_table
from rankscope.resize.command import Resized
from rankscope.resize.pattern import by_module, propose, write_proposal
from rankscope.resize.show import rank_table, tried_table
from rankscope.resize.show import sentences as resized_sentences
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui.console import error_console, out_console, print_json, print_table


def export_study(study: Study, options: Mapping[str, Any], out: Path | None, as_json: bool, language: str) -> None:
    """Export, and print what was lost, and the lines that serve it. `options` are those of `ui.options.EXPORT`."""
    disable_progress_bar()  # one for each loading of a model
    over = [form.strip() for form in (options["over"] or "").split(",") if form.strip()]
    result = export(study, out, say=error_console.print, **{**options, "over": over})
    if as_json:
        print_json(describe(result))
        return
    print_table(lost_table(result, load(language)))
    for line in sentences(result, load(language)):
        out_console.print(line, soft_wrap=True)


def show_resized(result: Resized, language: str) -> None:
    """Print ranks, sizes and losses of a smaller adapter."""
    text = load(language)
    if result.loss is not None:
        print_table(tried_table(result.loss, text))
    print_table(rank_table(result.layers, text))
    for line in resized_sentences(result, text):
        out_console.print(line, soft_wrap=True)


def propose_pattern(study: Study, rank: int | None, out: Path, as_json: bool, language: str) -> None:
    """Propose ranks by layer, write the study that compares them, and print both."""
    text, proposal = load(language), propose(study, rank)
    write_proposal(proposal, out)
    if as_json:
        print_json({"study": str(out)} | {name: getattr(proposal, name) for name in ("rank", "parameters", "ranks")})
        return
    print_table(pattern_table(by_module(proposal), proposal.rank, text))
    sizes = {"parameters": f"{proposal.parameters:,}", "uniform": f"{proposal.uniform_parameters:,}"}
    out_console.print(text("pattern.parameters", rank=proposal.rank, **sizes), soft_wrap=True)
    out_console.print(text("pattern.next", command=shlex.join(["rankscope", "run", str(out)])), soft_wrap=True)
