"""The commands: parse, call, print. Slow imports (torch, pandas, pydantic) are inside them: `--help` is fast."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from rankscope import __version__
from rankscope.errors import StudyError, check_system, require
from rankscope.measure.cores import ENVIRONMENT
from rankscope.ui import options as ask
from rankscope.ui import start
from rankscope.ui.console import error_console, out_console, print_json, show, stoppable

app = typer.Typer(
    name="rankscope",
    help="Which LoRA rank should I use, and what does it cost me? Begin with `rankscope demo`, then `rankscope init`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FIRST, FURTHER, HERE = "Which rank?", "Further", "This installation"  # groups of commands in the help


def command(panel: str, table: ask.Options = ask.NONE) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command, in a group of the help; for its `table` see `rankscope.ui.options.with_options`."""
    register = app.command(cls=ask.Command, rich_help_panel=panel)
    return lambda body: register(ask.with_options(table)(body))


def _answer(json_: bool, describe: Callable[[], Mapping[str, Any]], words: Callable[[], None]) -> None:
    """Print a command's result: as one JSON object where `--json` asks for it, else in words."""
    if json_:
        print_json(describe())
    else:
        words()


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, ask.switch("--debug", "Show the traceback of an error.")] = False,
) -> None:
    if version:
        typer.echo(f"rankscope {__version__}")
        raise typer.Exit
    check_system()


@command(FIRST)
def demo(out: ask.Out = Path("rankscope-demo"), json_: ask.Json = False, lang: ask.Language = "en") -> None:
    """Run the embedded study: a small model and Python functions, minutes, no download. `run` alone does so too."""
    run(**dict.fromkeys(ask.RUN), out=out, json_=json_, lang=lang)
    error_console.print(start.check_names(lang)("outcome.own"))


@command(FIRST, ask.INIT)
def init(
    options: dict[str, Any],
    file: Annotated[Path, typer.Argument(metavar="[STUDY.yaml]", help="File to write.")] = Path("study.yaml"),
    lang: ask.Language = "en",
) -> None:
    """Ask five questions (those without an option), check each answer, and write a study's file with comments."""
    if file.exists():
        raise StudyError(f"{file}: exists already", "Name another file: rankscope init other.yaml.")
    text = start.check_names(lang)
    from rankscope.ui.init import answers_to, write_study

    answers = answers_to(options, text)
    write_study(file, answers, text)
    plan_it, run_it = (shlex.join(["rankscope", name, str(file)]) for name in ("plan", "run"))
    out_console.print(text("init.written", file=file, plan=plan_it, run=f"{run_it} --hours {answers['hours']}"))


@command(FIRST, ask.RUN)
def run(
    options: dict[str, Any],
    study: ask.StudyOrDirectory = None,
    out: ask.Out = None,
    set_: ask.Sets = None,
    quick: ask.Quick = False,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Train every rank, measure what it costs, and conclude. On an existing study: add to it, do what is missing."""
    own, console = ask.own(options, ask.RUN), error_console if json_ else out_console
    asked, path = ask.study_and_path(study, out, options, set_, quick)
    text = start.check_names(lang, launcher, ray_address)
    from rankscope.jobs.job import Settings
    from rankscope.jobs.queue import time_limit
    from rankscope.track import choose_trackers

    trackers, limit = choose_trackers(own["report_to"] or ()), time_limit(own["hours"])
    begun = start.begun_at(path, asked, text)
    spec = begun.spec if begun else asked
    if own["dry_run"]:
        at = {"launcher": launcher, "ray_address": ray_address}
        start.show_plan(spec, begun, json_, text, **at, remeasure=own["remeasure"])
        return
    console.print(text("outcome.study", name=spec.name, path=path))
    from rankscope.begin import run_in
    from rankscope.ui.progress import TerminalProgress

    progress = TerminalProgress(console, path, text)
    approve = None if own["yes"] or limit else partial(start.approve, progress, text)
    again, settled, code = bool(own["remeasure"]), bool(own["until_settled"]), own["allow_code"] or ()
    how = Settings(trackers, lang, again, settled, limit, code, approve)
    with stoppable(text), progress:
        conclusion = run_in(path, asked, begun, progress, how, launcher, ray_address)
    from rankscope.ui.outcome import describe_outcome, show_failures, show_outcome, show_untried

    _answer(json_, lambda: describe_outcome(conclusion), lambda: show_outcome(conclusion, console, text))
    if limit is not None:
        show_untried(conclusion.study, error_console, text)
    if quick:
        whole = shlex.join(["rankscope", *(word for word in sys.argv[1:] if word != "--quick")])
        console.print(text("outcome.quick", command=whole))
    if show_failures(conclusion.study, error_console, text):
        raise typer.Exit(4)


@command(FURTHER, ask.SEARCH)
def search(
    options: dict[str, Any],
    study: ask.StudyFile = None,
    out: ask.Out = None,
    set_: ask.Sets = None,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Find the best rank, learning rate, alpha and target modules within a budget. Resumes where it stopped."""
    require("optuna", "search", "rankscope search")
    from rankscope.model.checks import check_inputs
    from rankscope.search.space import resolve_search

    values = ask.study_values(study, options)
    if study is None and options["model"] is None:  # the embedded study's lists are no search space
        values |= {"ranks": None, "learning_rates": None}
    spec = resolve_search(values, options, set_ or (), study)
    path, console = out or Path(f"{spec.study.name}-search"), error_console if json_ else out_console
    text = start.check_names(lang, launcher, ray_address)
    spec = spec.model_copy(update={"study": check_inputs(spec.study, data=not path.exists())})
    console.print(text("search.begin", path=path))
    from rankscope.ui.search import describe_result, run_search, show_result

    with stoppable(text):
        result = run_search(spec, path, console, launcher, ray_address, lang)
    _answer(json_, lambda: describe_result(path, result), lambda: show_result(path, result, console, text))


@command(FIRST, ask.PLAN)
def plan(
    options: dict[str, Any],
    study: ask.StudyOrDirectory = None,
    out: ask.Out = None,
    set_: ask.Sets = None,
    quick: ask.Quick = False,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Show what `run` would do and take: packs, memory by part, time, what fits. Trains and writes nothing."""
    own = ask.own(options, ask.PLAN)
    spec, path = ask.study_and_path(study, out, options, set_, quick)
    text = start.check_names(lang, launcher, ray_address)
    from rankscope.study.folder import StudyFolder

    found, begun = StudyFolder.open(path) if StudyFolder.is_at(path) else None, None
    with suppress(StudyError):  # another study, which `run` would refuse
        begun = found and found.grown(spec)
    spec = begun.spec if begun else spec
    start.show_plan(spec, begun, json_, text, launcher=launcher, ray_address=ray_address, **own)


@command(FIRST, ask.CRITERIA)
def report(
    options: dict[str, Any],
    directory: ask.Directory,
    pdf: Annotated[bool, ask.switch("--pdf", "Also print report.pdf, with Chromium or Chrome.")] = False,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Conclude again from a study's files, by other criteria where some are given, and rebuild its report."""
    text = start.check_names(lang)
    study = start.open_study(directory, text)
    from rankscope.report.finish import finish, judge_by
    from rankscope.ui.outcome import describe_outcome, show_verdict

    conclusion = judge_by(study, options, lang, pdf) if any(options.values()) else finish(study, lang, pdf)
    _answer(json_, lambda: describe_outcome(conclusion), lambda: show_verdict(conclusion, out_console, text))
    if pdf and not json_:
        out_console.print(f"PDF: {conclusion.study.report.with_name('report.pdf')}")


@command(FURTHER)
def compare(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Directories of finished studies.")],
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Set several studies side by side: paired where they share rows and seeds, and what they have in common."""
    text = start.check_names(lang)
    opened = [(str(directory), start.open_study(directory, text)) for directory in studies]
    from rankscope.ui.compare import compare_studies, show_comparison

    found = compare_studies(opened)
    _answer(json_, lambda: found, lambda: show_comparison(found, text))


@command(FURTHER)
def judge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Trainer's folders, W&B's CSV, PEFT's results.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Write a study to settle it to this file.", show_default="none")
    ] = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Say what training runs of other tools can and cannot show about rank, and which study would settle it."""
    text = start.check_names(lang)
    start.announce(text("judge.reading"))
    from rankscope.judge.command import describe, judge
    from rankscope.ui.judge import show_judged

    found = judge(paths, out, lang)
    _answer(json_, lambda: describe(found), lambda: show_judged(found, out, text))


@command(FURTHER)
def curve(
    directory: ask.FinishedDirectory,
    ranks: Annotated[str | None, typer.Option(help="Lower ranks.", show_default="powers of two, the study's")] = None,
    recover: Annotated[int, typer.Option(metavar="STEPS", help="Measure also after so many steps of recovery.")] = 0,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Estimate the loss of every lower rank from the largest one, by truncated SVD. Measures only what is missing."""
    from rankscope.model.checks import check_inputs
    from rankscope.spec.candidates import ranks_of

    text = start.check_names(lang, launcher, ray_address)
    study = start.open_study(directory, text)
    console = error_console if json_ else out_console
    asked = None if ranks is None else ranks_of(ranks)
    check_inputs(study.spec, data=False)
    from rankscope.jobs.launchers import make_launcher
    from rankscope.pipeline import measure_curve
    from rankscope.ui.outcome import curve_parts, describe_curve
    from rankscope.ui.progress import TerminalProgress

    progress = TerminalProgress(console, directory, text)
    make = partial(make_launcher, launcher, study.spec.model, ray_address, progress.say, lang)
    with stoppable(text), progress, make() as launching:
        conclusion = measure_curve(study, launching, progress, asked, recover, lang)
    _answer(json_, lambda: describe_curve(conclusion), lambda: show(*curve_parts(conclusion, text)))


@command(FURTHER)
def pattern(
    directory: ask.FinishedDirectory,
    rank: Annotated[int | None, typer.Option(help="Uniform rank to compare.", show_default="the verdict's")] = None,
    out: Annotated[Path, typer.Option(help="File of the new study.")] = Path("pattern.yaml"),
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Propose ranks by layer with as many parameters as a uniform rank, as a study that compares the two."""
    text = start.check_names(lang)
    study = start.open_study(directory, text)
    from rankscope.resize.pattern import propose, write_proposal
    from rankscope.resize.show import describe_pattern, pattern_parts

    found = propose(study, rank)
    write_proposal(found, out)
    _answer(json_, lambda: describe_pattern(found, out), lambda: show(*pattern_parts(found, out, text)))


@command(FIRST, ask.EXPORT)
def export(
    directory: ask.FinishedDirectory,
    options: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="NAME-r008")] = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Write the recommended adapter, or a merged model, for use without the study; measure it as it is served."""
    from rankscope.files import check_empty

    if out is not None:  # before anything heavy is imported
        check_empty(out)
    text = start.check_names(lang)
    study = start.open_study(directory, text)
    from rankscope.export.command import export
    from rankscope.export.show import describe, lost_table, sentences

    options["over"] = [form.strip() for form in (options["over"] or "").split(",") if form.strip()]
    result = export(study, out, say=error_console.print, language=lang, **options)
    _answer(json_, lambda: describe(result), lambda: show(lost_table(result, text), *sentences(result, text)))


@command(FIRST)
def watch(
    directory: ask.Directory,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Local port; 0 for a free one.")] = 0,
    terminal: Annotated[bool, ask.switch("--terminal", "Show in the terminal.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    lang: ask.Language = "en",
) -> None:
    """Follow a running study on a live page or in the terminal. Ctrl-C stops watching; the study goes on."""
    text = start.check_names(lang)
    start.open_study(directory, text)
    from rankscope.ui.watch import watch_page, watch_terminal

    with suppress(KeyboardInterrupt):
        if terminal:
            watch_terminal(directory, out_console, text)
        else:
            watch_page(directory, port, out_console, text, browser)


@command(FURTHER)
def spectrum(
    adapter: ask.Adapter,
    chart: Annotated[
        Path | None, typer.Option(help="Chart by module: an .html, .svg or .png file.", show_default="none")
    ] = None,
    revision: ask.Revision = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Show how much of its rank any LoRA adapter uses, by layer and module."""
    text, console = start.check_names(lang), error_console if json_ else out_console
    start.check_adapter(adapter, text)
    from rankscope.lora.saved import find_adapter, read_adapter
    from rankscope.lora.svd import spectrum as spectrum_of
    from rankscope.resize.show import module_table, save_chart, spectrum_chart, spectrum_notes

    saved = read_adapter(find_adapter(adapter, revision))
    frame = spectrum_of(saved.layers)
    if chart is not None:
        save_chart(spectrum_chart(frame, text), chart, text)
        console.print(text("spectrum.chart", file=chart))
    show(*spectrum_notes(saved, text), console=console)
    found = {"adapter": adapter, "layers": frame.to_dict("records")}
    _answer(json_, lambda: found, lambda: show(module_table(frame, text)))


@command(FURTHER, ask.RESIZE)
def resize(
    adapter: ask.Adapter,
    options: dict[str, Any],
    set_: ask.Sets = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="ADAPTER-r16")] = None,
    revision: ask.Revision = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Truncate a trained adapter to one lower rank or to one per layer, and report what is lost."""
    from rankscope.resize.rules import choose_rule

    text = start.check_names(lang)
    rule, uniform = choose_rule(ask.own(options, ask.RULES)), bool(options.pop("uniform"))
    start.check_adapter(adapter, text)
    from rankscope.resize import command
    from rankscope.resize.show import rank_table, sentences, tried_table

    said = error_console.print
    result = command.resize(adapter, rule, out, revision, uniform, options, set_ or (), said, lang)
    tables = [*([tried_table(result.loss, text)] if result.loss else []), rank_table(result.layers, text)]
    _answer(json_, lambda: command.describe(result), lambda: show(*tables, *sentences(result, text)))


@command(HERE)
def schema() -> None:
    """Print the JSON schema of a study's file, for completion and checks in an editor."""
    from rankscope.spec.schema import study_schema

    print_json(study_schema())


@command(HERE)
def doctor(json_: ask.Json = False) -> None:
    """Show versions, devices and optional packages."""
    start.announce("Looking at this system")
    from rankscope.ui.doctor import describe_system, show_system

    _answer(json_, describe_system, show_system)


def main() -> None:
    """Run the command line. An error that is known is printed in a few lines, without a traceback."""
    os.environ.update(ENVIRONMENT | os.environ)  # before torch reads them: a plan times its layers as a job runs them
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # accepted anywhere
    try:
        app()
    except Exception as error:
        known = None if debug else start.explained(error)
        if known is None:
            raise
        error_console.print(f"error: {known}", style="red")
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
