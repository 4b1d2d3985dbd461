"""The command line. Parses, calls, and prints: what is done stands elsewhere.

torch, transformers, pandas and rankscope's own models (pydantic) are imported inside the commands, so that
`rankscope --help` answers at once.
"""

import json
import os
import shlex
import shutil
import signal
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankscope import __version__
from rankscope.console import PlainConsole
from rankscope.errors import RankscopeError, StudyError

if TYPE_CHECKING:
    from rankscope.report.formats import Table as Cells
    from rankscope.spec import StudySpec

app = typer.Typer(
    name="rankscope",
    help="Which LoRA rank should I use, and what does it cost me?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out_console = PlainConsole(highlight=False)
if not out_console.is_terminal:
    out_console.width = max(out_console.width, 120)  # a table in a log file is not to be squeezed
error_console = PlainConsole(stderr=True, highlight=False)

EMBEDDED_STUDY = Path(__file__).parent / "demo" / "study.yaml"

StudyFile = Annotated[
    Path | None,
    typer.Argument(metavar="[STUDY.yaml]", help="A study's file. Without it and --model: the embedded study."),
]
Model = Annotated[str | None, typer.Option(help="Base model: hub id or folder.")]
Dataset = Annotated[str | None, typer.Option(help="Instruction data: hub id, or a JSON, JSONL, CSV or Parquet file.")]
Ranks = Annotated[
    str | None, typer.Option(help="LoRA ranks, such as 8,128,256; full adds full fine-tuning, as a reference.")
]
Alpha = Annotated[str | None, typer.Option(help="lora_alpha: a number, or a multiple of the rank such as 2r.")]
Rates = Annotated[str | None, typer.Option("--learning-rates", help="Such as 1e-4,3e-4.")]
Seeds = Annotated[str | None, typer.Option(help="Such as 0,1,2: each candidate is trained with each seed.")]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps of each trial.")]
Epochs = Annotated[float | None, typer.Option(help="Instead of --steps.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples in a step of one trial.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest sequence in tokens; longer rows are cut and counted.")]
Modules = Annotated[str | None, typer.Option(help="all-linear, or names such as q_proj,v_proj.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16, of the base model.")]
Engine = Annotated[str | None, typer.Option(help="packed, or peft: one trial at a time by PEFT's own forward.")]
Isolated = Annotated[bool | None, typer.Option("--isolated", help="Train every trial alone, in its own process.")]
MaxMemory = Annotated[str | None, typer.Option(help="Recommend no rank that needs more GPU memory: 24GB.")]
MaxRuntime = Annotated[str | None, typer.Option(help="Recommend no rank whose training takes longer: 2h.")]
GpuMemory = Annotated[str | None, typer.Option(help="Plan for a GPU of this size, which need not be here: 24GB.")]
Out = Annotated[Path | None, typer.Option(help="The study's directory. Default: its name.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field: training.steps=200.")]
ReportTo = Annotated[
    str | None, typer.Option(help="Trackers that follow the run: wandb, tensorboard, mlflow, trackio; commas between.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, like `plan`, and end.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts; all else goes to stderr.")]
Language = Annotated[str, typer.Option("--lang", help="Language of the report: en or ko.")]


_NOT_ASKED = ("study", "set_", "out", "lang", "gpu_memory", "report_to", "dry_run", "json_")
"""Arguments that say nothing of the question."""


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if version:
        typer.echo(f"rankscope {__version__}")
        raise typer.Exit


@app.command()
def run(
    study: StudyFile = None,
    model: Model = None,
    dataset: Dataset = None,
    ranks: Ranks = None,
    alpha: Alpha = None,
    learning_rates: Rates = None,
    seeds: Seeds = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    target_modules: Modules = None,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = None,
    isolated: Isolated = None,
    max_gpu_memory: MaxMemory = None,
    max_runtime: MaxRuntime = None,
    out: Out = None,
    set_: Sets = None,
    report_to: ReportTo = None,
    dry_run: DryRun = False,
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Train every rank, measure what it costs, and conclude. On a study that exists: do only what is missing."""
    spec = _spec(study, set_, **{name: value for name, value in locals().items() if name not in _NOT_ASKED})
    path = out or Path(spec.name)
    from rankscope import runner
    from rankscope.outcome import describe_outcome, show_outcome
    from rankscope.progress import TerminalProgress

    console = error_console if json_ else out_console
    if dry_run:
        _show_plan(spec, None, json_)
        if (path / "study.yaml").exists():
            _show_progress_so_far(path, spec, console)
        return
    console.print(f"Study {spec.name} in {path}{'/' if not str(path).endswith('/') else ''}", markup=False)
    for number in (signal.SIGINT, signal.SIGTERM):  # a polite kill is treated like Ctrl-C
        signal.signal(number, _stop_politely)
    try:
        with TerminalProgress(console) as progress:
            result = runner.run_study(spec, path, progress, lang, report_to or ())
    except KeyboardInterrupt:
        runner.mark_interrupted(path)
        again = shlex.join(["rankscope", *sys.argv[1:]])
        error_console.print(f"Stopped. The same command goes on where it was:\n  {again}", markup=False, style="yellow")
        raise typer.Exit(130) from None
    if json_:
        _print_json(describe_outcome(result))
    else:
        show_outcome(result, console, lang)
    left = runner.unfinished(result)
    if left:
        for trial in left:
            record = result.trial_record(trial)
            error_console.print(
                f"{trial.name}: {record['status']}: {record.get('reason')}", markup=False, style="yellow"
            )
        raise typer.Exit(4)


@app.command()
def plan(
    study: StudyFile = None,
    model: Model = None,
    dataset: Dataset = None,
    ranks: Ranks = None,
    alpha: Alpha = None,
    learning_rates: Rates = None,
    seeds: Seeds = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    target_modules: Modules = None,
    device: Device = None,
    dtype: Dtype = None,
    engine: Engine = None,
    isolated: Isolated = None,
    out: Out = None,
    set_: Sets = None,
    gpu_memory: GpuMemory = None,
    json_: Json = False,
) -> None:
    """Show what `run` would do and take: packs, memory by part, time, what fits. Nothing is trained or written."""
    spec = _spec(study, set_, **{name: value for name, value in locals().items() if name not in _NOT_ASKED})
    _show_plan(spec, gpu_memory, json_)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory.")],
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Conclude again from a study's files, and rebuild its report."""
    from rankscope.outcome import describe_outcome
    from rankscope.report.sentences import verdict_sentence
    from rankscope.runner import finish
    from rankscope.study import Study

    study = Study.open(directory)
    page = finish(study, lang)
    if json_:
        _print_json(describe_outcome(study))
        return
    out_console.print(verdict_sentence(study.verdict, lang), markup=False)
    out_console.print(f"Report: {page}", markup=False, soft_wrap=True)


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory.")],
    port: Annotated[int, typer.Option(help="Of the page, on this machine alone. Default: a free one.")] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Here instead of in a browser.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    lang: Language = "en",
) -> None:
    """Follow a study that runs, on a page that updates, or in the terminal. Ctrl-C ends the watching alone."""
    from rankscope.study import Study
    from rankscope.watch import Watch, address, serve, watch_terminal

    watched = Watch(Study.open(directory), lang)
    try:
        if terminal:
            watch_terminal(watched, out_console)
            return
        try:
            server = serve(watched, port)
        except OSError as error:
            raise StudyError(f"--port {port}: {error.strerror}", "Choose another, or leave it out.") from None
        out_console.print(
            f"Watching {directory} at {address(server)} (Ctrl-C ends it; the study goes on)", markup=False
        )
        if browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(address(server))
        server.serve_forever()
    except KeyboardInterrupt:
        return


@app.command()
def spectrum(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or a hub id.")],
    chart: Annotated[Path | None, typer.Option(help="Draw layers by module: a .html, .svg or .png file.")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: branch, tag or commit.")] = None,
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Show how much of its rank an adapter really uses, by layer and module; also of one that was made elsewhere."""
    from rankscope.lora.saved import find_adapter, read_adapter
    from rankscope.lora.spectrum import spectrum as spectrum_of
    from rankscope.report.catalogue import load
    from rankscope.report.spectrum import module_table, save_chart, spectrum_chart

    text, saved = load(lang), read_adapter(find_adapter(adapter, revision))
    frame = spectrum_of(saved.layers)
    console = error_console if json_ else out_console
    if chart is not None:
        save_chart(spectrum_chart(frame, text), chart)
        console.print(f"Chart: {chart}", markup=False, soft_wrap=True)
    if saved.others:
        names = ", ".join(list(saved.others)[:3]) + ", ..." * (len(saved.others) > 3)
        console.print(text("spectrum.others", n=len(saved.others), names=names), markup=False, soft_wrap=True)
    if json_:
        _print_json({"adapter": adapter, "layers": frame.to_dict("records")})
    else:
        _print_table(module_table(frame, text))


@app.command()
def schema() -> None:
    """Print the JSON schema of a study's file, by which an editor completes and checks it."""
    from rankscope.schema import study_schema

    _print_json(study_schema())


@app.command()
def doctor(json_: Json = False) -> None:
    """Show versions, devices and optional parts."""
    from rankscope.measure.machine import hardware, installed, versions
    from rankscope.report.formats import size
    from rankscope.track import TRACKERS

    optional = {name: installed(name) for name in TRACKERS}

    if json_:
        _print_json({"versions": versions(), "hardware": hardware(), "optional": optional})
        return
    for name, found in versions().items():
        out_console.print(f"{name:<14} {found or 'not installed'}", markup=False)
    facts = hardware()
    out_console.print(
        f"{'cpu':<14} {facts['cpu']}, {facts['cores']} cores, {size(facts['memory_bytes'])}", markup=False
    )
    for gpu in facts["gpus"]:
        out_console.print(f"{'gpu':<14} {gpu['name']}, {size(gpu['memory_bytes'])}", markup=False)
    if not facts["gpus"]:
        out_console.print(f"{'gpu':<14} none that torch can use: studies run on the CPU", markup=False)
    for name, found in optional.items():
        missing = f"not installed (optional: pip install 'rankscope[{name}]')"
        out_console.print(f"{name:<14} {found or missing}", markup=False)
    out_console.print(f"{'disk':<14} {size(shutil.disk_usage('.').free)} free here", markup=False)


def _show_plan(spec: "StudySpec", gpu_memory: str | None, as_json: bool) -> None:
    from rankscope.preview import describe_plan, make_plan, parse_gpu_memory, show_plan

    plan = make_plan(spec, parse_gpu_memory(gpu_memory))
    if as_json:
        _print_json(describe_plan(plan))
    else:
        show_plan(plan, out_console)


def _show_progress_so_far(path: Path, spec: "StudySpec", console: PlainConsole) -> None:
    from rankscope.preview import show_progress_so_far
    from rankscope.study import Study

    show_progress_so_far(Study.create(path, spec), console)


def _print_table(table: "Cells") -> None:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold", title=table.caption, title_justify="left")
    for name, numeric in zip(table.headers, table.numeric, strict=True):
        shown.add_column(name, justify="right" if numeric else "left")
    for row in table.rows:
        shown.add_row(*row)
    out_console.print(shown)


def _print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _stop_politely(number: int, frame: FrameType | None) -> None:
    """The first Ctrl-C ends the run, after the step that trains; the second at once."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.default_int_handler)
    error_console.print("Stopping after this step, with a checkpoint. Ctrl-C again stops at once.", style="yellow")
    raise KeyboardInterrupt


def _spec(study: Path | None, sets: list[str] | None, **options: Any) -> "StudySpec":
    """The study that the arguments ask for."""
    from rankscope.options import assemble, read_study_file

    for name in ("ranks", "learning_rates", "seeds", "target_modules"):
        if isinstance(options.get(name), str) and options[name] != "all-linear":
            options[name] = _list(name, options[name])
    if options.get("alpha") is not None:
        options["alpha"] = _number(options["alpha"])
    if study is not None:
        values = read_study_file(study)
    elif options.get("model") is None and options.get("dataset") is None:
        values = read_study_file(EMBEDDED_STUDY)
    elif options.get("model") is None or options.get("dataset") is None:
        missing = "--dataset" if options.get("dataset") is None else "--model"
        raise StudyError(f"{missing} is missing", "Give both --model and --dataset, or a study file, or neither.")
    else:
        values = {}
    return assemble(values, options, sets or (), study)


def _list(name: str, text: str) -> list[Any]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return parts if name == "target_modules" else [_number(part) for part in parts]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main() -> None:
    """Runs the command line; an error on purpose is printed in a few lines, without a traceback."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]  # accepted anywhere
    try:
        app()
    except RankscopeError as error:
        if debug:
            raise
        error_console.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
