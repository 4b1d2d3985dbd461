"""The commands: parse, call, print. Slow imports (torch, pandas, pydantic) are inside them: `--help` is fast."""

import logging
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
from rankscope.errors import OutOfMemoryError, RankscopeError, StudyError, check_system, require
from rankscope.measure.cores import ENVIRONMENT
from rankscope.ui import options as ask
from rankscope.ui import start
from rankscope.ui.console import error_console, out_console, print_json, print_table, show_system_error, stoppable

app = typer.Typer(
    name="rankscope",
    help="Which LoRA rank should I use, and what does it cost me? Begin with `rankscope demo`, then `rankscope init`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FIRST, FURTHER, HERE = "Which rank?", "Further", "This installation"  # groups of commands in the help


def command(panel: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return app.command(cls=ask.Command, rich_help_panel=panel)


def _answer(json_: bool, describe: Callable[[], Mapping[str, Any]], show: Callable[[], None]) -> None:
    """Print a command's result: as one JSON object where `--json` asks for it, else in words."""
    if json_:
        print_json(describe())
    else:
        show()


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        typer.echo(f"rankscope {__version__}")
        raise typer.Exit
    check_system()


@command(FIRST)
def demo(out: ask.Out = Path("rankscope-demo"), json_: ask.Json = False, lang: ask.Language = "en") -> None:
    """Run the embedded study: a small model and Python functions, minutes, no download. `run` alone does so too."""
    run(**dict.fromkeys(ask.RUN), out=out, json_=json_, lang=lang)
    error_console.print("Next, with your own model and data:\n  rankscope init", soft_wrap=True)


@command(FIRST)
@ask.with_options(ask.INIT)
def init(
    options: dict[str, Any],
    file: Annotated[Path, typer.Argument(metavar="[STUDY.yaml]", help="File to write.")] = Path("study.yaml"),
) -> None:
    """Ask five questions (those without an option), check each answer, and write a study's file with comments."""
    if file.exists():
        raise StudyError(f"{file}: exists already", "Name another file: rankscope init other.yaml.")
    from rankscope.ui.init import answers_to, write_study

    answers = answers_to(options)
    write_study(file, answers)
    plan_it, run_it = (shlex.join(["rankscope", name, str(file)]) for name in ("plan", "run"))
    out_console.print(f"{file} is written. Next:\n  {plan_it}\n  {run_it} --hours {answers['hours']}", soft_wrap=True)


@command(FIRST)
@ask.with_options(ask.RUN)
def run(
    options: dict[str, Any],
    study: ask.StudyOrDirectory = None,
    out: ask.Out = None,
    set_: ask.Sets = None,
    quick: ask.Quick = False,
    report_to: Annotated[
        str | None, typer.Option(help="Trackers: wandb,tensorboard,mlflow,trackio.", show_default="none")
    ] = None,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure the costs of all ranks again.")] = False,
    until_settled: ask.UntilSettled = False,
    hours: Annotated[
        float | None,
        typer.Option(help="Conclude by then: start nothing that would end later.", show_default="no limit"),
    ] = None,
    allow_code: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Code of measure.task that may run: my.py.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Start without asking, however long it takes.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and end, like `plan`.")] = False,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Train every rank, measure what it costs, and conclude. On an existing study: add to it, do what is missing."""
    asked, path = ask.study_and_path(study, out, options, set_, quick)
    console = error_console if json_ else out_console
    from rankscope.jobs.queue import time_limit
    from rankscope.spec.task import check_code
    from rankscope.track import choose_trackers

    start.check_names(lang, launcher, ray_address)
    limit = time_limit(hours)
    trackers, begun, conclusion = choose_trackers(report_to or ()), start.begun_at(path, asked), None
    spec, again = begun.spec if begun else asked, None
    if dry_run:
        start.show_plan(spec, begun, json_, launcher=launcher, ray_address=ray_address, remeasure=remeasure)
        return
    console.print(f"Study {spec.name} in {path}/")
    if begun and not (remeasure or trackers):
        from rankscope.report.finish import finish_complete, for_next_look

        conclusion = finish_complete(begun, lang)
        again = until_settled and conclusion and for_next_look(conclusion)
    if conclusion is None or again:
        check_code(spec.measure.task, allow_code or ())
        spec = start.check_inputs(spec, data=begun is None)
        from rankscope.jobs.launchers import make_launcher
        from rankscope.pipeline import run_looks
        from rankscope.ui.plan import approve as approve_long
        from rankscope.ui.progress import TerminalProgress

        progress = TerminalProgress(console, path, lang)
        approve = None if yes or limit else partial(approve_long, progress)
        with stoppable(), progress, make_launcher(launcher, spec.model, ray_address, progress.say) as launching:
            looks = (again or spec, path, launching, progress, trackers, lang)
            conclusion = run_looks(*looks, remeasure, limit, until_settled, approve, allow_code or ())
    from rankscope.ui.outcome import describe_outcome, show_failures, show_outcome, show_untried

    _answer(json_, lambda: describe_outcome(conclusion), lambda: show_outcome(conclusion, console, lang))
    if hours is not None:
        show_untried(conclusion.study, error_console, lang)
    if quick:
        whole = shlex.join(["rankscope", *(word for word in sys.argv[1:] if word != "--quick")])
        console.print(f"This was a quick look. For a verdict, the whole study:\n  {whole}", soft_wrap=True)
    if show_failures(conclusion.study, error_console):
        raise typer.Exit(4)


@command(FURTHER)
@ask.with_options(ask.SEARCH)
def search(
    options: dict[str, Any],
    study: ask.StudyFile = None,
    out: ask.Out = None,
    set_: ask.Sets = None,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
) -> None:
    """Find the best rank, learning rate, alpha and target modules within a budget. Resumes where it stopped."""
    require("optuna", "search", "rankscope search")
    from rankscope.search.folder import Search
    from rankscope.search.space import resolve_search

    values = ask.study_values(study, options)
    if study is None and options["model"] is None:  # the embedded study's lists are no search space
        values |= {"ranks": None, "learning_rates": None}
    spec = resolve_search(values, options, set_ or (), study)
    path, console = out or Path(f"{spec.study.name}-search"), error_console if json_ else out_console
    start.check_names("en", launcher, ray_address)
    spec = spec.model_copy(update={"study": start.check_inputs(spec.study, data=not path.exists())})
    console.print(f"Search in {path}/")
    from rankscope.jobs.launchers import make_launcher
    from rankscope.search.run import at_commits, run
    from rankscope.ui.search import SearchProgress, describe_result, show_result

    spec = at_commits(spec, path)  # the launcher reads the model's configuration too
    progress, found = SearchProgress(console, path), Search(path, spec)
    with stoppable(), progress, make_launcher(launcher, spec.study.model, ray_address, progress.say) as launching:
        result = run(spec, path, launching, progress.say, progress.poll)
    _answer(json_, lambda: describe_result(found, result), lambda: show_result(found, result, console))


@command(FIRST)
@ask.with_options(ask.PLAN)
def plan(
    options: dict[str, Any],
    study: ask.StudyOrDirectory = None,
    out: ask.Out = None,
    set_: ask.Sets = None,
    quick: ask.Quick = False,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Plan for a GPU of this size, e.g. 24GB.", show_default="this machine's")
    ] = None,
    gpu_flops: Annotated[
        str | None, typer.Option(help="Its matmul speed, e.g. 400TFLOPS.", show_default="unknown; no times")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="Devices to plan for: makespan, device-hours.", show_default="those here")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Price of one device-hour, e.g. 2.5.", show_default="unknown")
    ] = None,
    show_rows: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show N rows: which text is read, which learned.")
    ] = 0,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
) -> None:
    """Show what `run` would do and take: packs, memory by part, time, what fits. Trains and writes nothing."""
    spec, path = ask.study_and_path(study, out, options, set_, quick)
    start.check_names("en", launcher, ray_address)
    from rankscope.study.study import Study

    found, begun = Study.open(path) if Study.is_at(path) else None, None
    with suppress(StudyError):  # another study, which `run` would refuse
        begun = found and found.grown(spec)
    spec = begun.spec if begun else spec
    asked = {"gpu_memory": gpu_memory, "gpu_flops": gpu_flops, "devices": devices, "price": price}
    start.show_plan(spec, begun, json_, show_rows, launcher=launcher, ray_address=ray_address, **asked)


@command(FIRST)
@ask.with_options(ask.CRITERIA)
def report(
    options: dict[str, Any],
    directory: ask.Directory,
    pdf: Annotated[bool, typer.Option("--pdf", help="Also print report.pdf, with Chromium or Chrome.")] = False,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Conclude again from a study's files, by other criteria where some are given, and rebuild its report."""
    study = start.open_study(directory, lang)
    from rankscope.report.finish import finish, judge_by
    from rankscope.ui.outcome import describe_outcome, show_verdict

    conclusion = judge_by(study, options, lang, pdf) if any(options.values()) else finish(study, lang, pdf)
    _answer(json_, lambda: describe_outcome(conclusion), lambda: show_verdict(conclusion, out_console, lang))
    if pdf and not json_:
        out_console.print(f"PDF: {conclusion.study.report.with_name('report.pdf')}", soft_wrap=True)


@command(FURTHER)
def compare(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="Directories of finished studies.")],
    json_: ask.Json = False,
) -> None:
    """Set several studies side by side: paired where they share rows and seeds, and what they have in common."""
    for directory in studies:
        start.open_study(directory)
    from rankscope.ui.compare import compare_studies, show_comparison

    found = compare_studies(studies)
    _answer(json_, lambda: found, lambda: show_comparison(found))


@command(FURTHER)
def judge(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Folders of Trainer's runs, W&B's CSV, PEFT's result files.")
    ],
    out: Annotated[Path | None, typer.Option(help="Write a study to settle it to this file.")] = None,
    json_: ask.Json = False,
) -> None:
    """Say what training runs of other tools can and cannot show about rank, and which study would settle it."""
    start.announce("Reading the runs")
    from rankscope.judge.command import describe, judge
    from rankscope.ui.judge import show_judged

    found = judge(paths, out)
    _answer(json_, lambda: describe(found), lambda: show_judged(found, out))


@command(FURTHER)
def curve(
    directory: ask.FinishedDirectory,
    ranks: Annotated[
        str | None, typer.Option(help="Lower ranks.", show_default="powers of two, and the study's")
    ] = None,
    recover: Annotated[int, typer.Option(metavar="STEPS", help="Measure also after so many steps of recovery.")] = 0,
    launcher: ask.LauncherName = "local",
    ray_address: ask.RayAddress = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Estimate the loss of every lower rank from the largest one, by truncated SVD. Measures only what is missing."""
    from rankscope.spec.candidates import ranks_of

    study, console = start.open_study(directory, lang, launcher, ray_address), error_console if json_ else out_console
    asked = None if ranks is None else ranks_of(ranks)
    start.check_inputs(study.spec, data=False)
    from rankscope.jobs.launchers import make_launcher
    from rankscope.pipeline import measure_curve
    from rankscope.ui.outcome import describe_curve, show_curve
    from rankscope.ui.progress import TerminalProgress

    progress = TerminalProgress(console, directory, lang)
    with stoppable(), progress, make_launcher(launcher, study.spec.model, ray_address, progress.say) as launching:
        conclusion = measure_curve(study, launching, progress, asked, recover, lang)
    _answer(json_, lambda: describe_curve(conclusion), lambda: show_curve(conclusion, lang))


@command(FURTHER)
def pattern(
    directory: ask.FinishedDirectory,
    rank: Annotated[int | None, typer.Option(help="Uniform rank to compare.", show_default="the verdict's")] = None,
    out: Annotated[Path, typer.Option(help="File of the new study.")] = Path("pattern.yaml"),
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Propose ranks by layer with as many parameters as a uniform rank, as a study that compares the two."""
    study = start.open_study(directory, lang)
    from rankscope.ui.adapters import propose_pattern

    propose_pattern(study, rank, out, json_, lang)


@command(FIRST)
@ask.with_options(ask.EXPORT)
def export(
    directory: ask.FinishedDirectory,
    *,
    options: dict[str, Any],
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="NAME-r008")] = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Write the recommended adapter, or a merged model, for use without the study; measure it as it is served."""
    study = start.open_study(directory, lang)
    from rankscope.ui.adapters import export_study

    export_study(study, options, out, json_, lang)


@command(FIRST)
def watch(
    directory: ask.Directory,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Local port; 0 for a free one.")] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show in the terminal.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    lang: ask.Language = "en",
) -> None:
    """Follow a running study on a live page or in the terminal. Ctrl-C stops watching; the study goes on."""
    study = start.open_study(directory, lang)
    from rankscope.ui.watch import Watch, watch_page, watch_terminal

    with suppress(KeyboardInterrupt):
        if terminal:
            watch_terminal(study, out_console, lang)
        else:
            watch_page(Watch(study, lang), port, out_console, browser)


@command(FURTHER)
def spectrum(
    adapter: ask.Adapter,
    chart: Annotated[Path | None, typer.Option(help="Chart of layers by module: an .html, .svg or .png file.")] = None,
    revision: ask.Revision = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Show how much of its rank any LoRA adapter uses, by layer and module."""
    from rankscope.text.catalogue import load

    text = load(lang)
    start.check_adapter(adapter)
    from rankscope.lora.saved import find_adapter, read_adapter
    from rankscope.lora.svd import spectrum as spectrum_of
    from rankscope.resize.show import module_table, save_chart, spectrum_chart

    saved = read_adapter(find_adapter(adapter, revision))
    frame = spectrum_of(saved.layers)
    console = error_console if json_ else out_console
    if chart is not None:
        save_chart(spectrum_chart(frame, text), chart, text)
        console.print(f"Chart: {chart}", soft_wrap=True)
    if saved.others:
        names = ", ".join(list(saved.others)[:3]) + ", ..." * (len(saved.others) > 3)
        console.print(text("spectrum.others", n=len(saved.others), names=names), soft_wrap=True)
    if saved.foreign:
        console.print(text("spectrum.foreign", name=saved.foreign), soft_wrap=True)
    found = {"adapter": adapter, "layers": frame.to_dict("records")}
    _answer(json_, lambda: found, lambda: print_table(module_table(frame, text)))


@command(FURTHER)
@ask.with_options(ask.RESIZE)
def resize(
    adapter: ask.Adapter,
    *,
    options: dict[str, Any],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --dataset, e.g. data.eval_rows=500.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="ADAPTER-r16")] = None,
    revision: ask.Revision = None,
    json_: ask.Json = False,
    lang: ask.Language = "en",
) -> None:
    """Truncate a trained adapter to one lower rank or to one per layer, and report what is lost."""
    from rankscope.resize.rules import choose_rule

    start.check_names(lang)
    rule, uniform = choose_rule({name: options.pop(name) for name in ask.RULES}), bool(options.pop("uniform"))
    start.check_adapter(adapter)
    from rankscope.resize import command
    from rankscope.ui.adapters import show_resized

    result = command.resize(adapter, rule, out, revision, uniform, options, set_ or (), error_console.print)
    _answer(json_, lambda: command.describe(result), lambda: show_resized(result, lang))


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

    _answer(json_, describe_system, lambda: show_system(out_console))


def main() -> None:
    """Run the command line. A rankscope error is printed in a few lines, without a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it warns whenever PEFT is imported
    # A plan times its layers as a job runs them; the variables are read when torch is imported.
    os.environ.update(ENVIRONMENT | os.environ)
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # accepted anywhere
    try:
        app()
    except RankscopeError as error:
        if debug:
            raise
        error_console.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if debug or not show_system_error(error):
            raise
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # of a device's memory torch raises a RuntimeError
        from rankscope.jobs.worker import known_error

        known = known_error(error)
        if debug or not isinstance(known, OutOfMemoryError):
            raise
        todo = "Use a machine with more memory, or --device cpu in place of a GPU."
        error_console.print(f"error: {known}\n  {todo}", style="red", soft_wrap=True)
        sys.exit(known.exit_code)


if __name__ == "__main__":
    main()
