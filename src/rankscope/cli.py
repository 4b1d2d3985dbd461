"""The command line. Parses, calls, and prints: what is done stands elsewhere.

torch, transformers, pandas and rankscope's own models (pydantic) are imported inside the commands, so that
`rankscope --help` answers at once.
"""

import errno
import os
import shlex
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankscope import __version__
from rankscope.errors import RankscopeError, StudyError, shortened
from rankscope.ui.console import error_console, out_console, print_json, print_table, stoppable

if TYPE_CHECKING:
    from rankscope.spec.models import StudySpec

app = typer.Typer(
    name="rankscope",
    help="Which LoRA rank should I use, and what does it cost me?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
Variants = Annotated[
    str | None, typer.Option(help="Kinds of LoRA beside the plain one: rslora,pissa,olora,loraplus,dora.")
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
Quantization = Annotated[str | None, typer.Option(help="nf4 or int8: the base's linear layers in 4 or 8 bits.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32 or bfloat16, of the base model.")]
Engine = Annotated[str | None, typer.Option(help="packed, or peft: one trial at a time by PEFT's own forward.")]
Isolated = Annotated[bool | None, typer.Option("--isolated", help="Train every trial alone, in its own process.")]
MaxMemory = Annotated[str | None, typer.Option(help="Recommend no rank that needs more GPU memory: 24GB.")]
MaxRuntime = Annotated[str | None, typer.Option(help="Recommend no rank whose training takes longer: 2h.")]
GpuMemory = Annotated[str | None, typer.Option(help="Plan for a GPU of this size, which need not be here: 24GB.")]
GpuFlops = Annotated[
    str | None, typer.Option(help="What plain matrix products reach on that GPU: 400TFLOPS. Its time is told by it.")
]
Devices = Annotated[int | None, typer.Option(help="Plan for so many such devices: makespan and device hours.")]
Price = Annotated[float | None, typer.Option(help="Of one device for an hour, in any currency: 2.5.")]
Out = Annotated[Path | None, typer.Option(help="The study's directory. Default: its name.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field: training.steps=200.")]
ReportTo = Annotated[
    str | None, typer.Option(help="Trackers that follow the run: wandb, tensorboard, mlflow, trackio; commas between.")
]
Launching = Annotated[str, typer.Option("--launcher", help="Where jobs run: local, on all of its GPUs, or ray.")]
RayAddress = Annotated[
    str | None, typer.Option(help="A Ray cluster, HOST:PORT or auto. Default: RAY_ADDRESS, or Ray on this machine.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, like `plan`, and end.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts; all else goes to stderr.")]
Language = Annotated[str, typer.Option("--lang", help="Language of the report: en or ko.")]

_NOT_ASKED = (
    "study",
    "set_",
    "out",
    "lang",
    "gpu_memory",
    "gpu_flops",
    "devices",
    "price",
    "report_to",
    "launcher",
    "ray_address",
    "dry_run",
    "json_",
)
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
    variants: Variants = None,
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
    quantization: Quantization = None,
    engine: Engine = None,
    isolated: Isolated = None,
    max_gpu_memory: MaxMemory = None,
    max_runtime: MaxRuntime = None,
    out: Out = None,
    set_: Sets = None,
    report_to: ReportTo = None,
    launcher: Launching = "local",
    ray_address: RayAddress = None,
    dry_run: DryRun = False,
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Train every rank, measure what it costs, and conclude. On a study that exists: do only what is missing."""
    spec = _spec(study, set_, **{name: value for name, value in locals().items() if name not in _NOT_ASKED})
    path = out or Path(spec.name)
    from rankscope import pipeline
    from rankscope.study.missing import unfinished
    from rankscope.study.study import Study
    from rankscope.ui.outcome import describe_outcome, show_outcome
    from rankscope.ui.plan import show_progress_so_far
    from rankscope.ui.progress import TerminalProgress

    console = error_console if json_ else out_console
    if dry_run:
        _show_plan(spec, None, json_)
        if Study.is_at(path):
            show_progress_so_far(Study.create(path, spec), console)
        return
    console.print(f"Study {spec.name} in {path}{'/' if not str(path).endswith('/') else ''}", markup=False)
    with stoppable(), TerminalProgress(console, path) as progress:
        result = pipeline.run_study(spec, path, progress, lang, report_to or (), launcher, ray_address)
    if json_:
        print_json(describe_outcome(result))
    else:
        show_outcome(result, console, lang)
    left = {trial.name: result.trial_record(trial) for trial in unfinished(result)}
    left |= {_unmeasured_name(name): failure for name, failure in result.open_failures().items()}
    for name, record in left.items():
        error_console.print(f"{name}: {record['status']}: {record.get('reason')}", markup=False, style="yellow")
    if left:
        raise typer.Exit(4)


@app.command()
def search(
    study: StudyFile = None,
    model: Model = None,
    dataset: Dataset = None,
    ranks: Annotated[str | None, typer.Option(help="Such as 8,32,128, or 4..256: 4, 8, 16 up to 256.")] = None,
    learning_rates: Annotated[
        str | None, typer.Option("--learning-rates", help="Such as 1e-5..1e-3, log-uniform between them; or a list.")
    ] = None,
    alpha: Annotated[str | None, typer.Option(help="One lora_alpha or several: 16,32,2r.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="Groups, by semicolon: all-linear;q_proj,v_proj.")] = None,
    trials: Annotated[int | None, typer.Option(help="Budget: candidates that are begun. Default: 32.")] = None,
    hours: Annotated[float | None, typer.Option(help="Budget: hours of training and evaluation.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget: training tokens of all candidates together.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe or random.")] = None,
    pruner: Annotated[str | None, typer.Option(help="halving: hopeless ones stop early; or none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampler, and of every candidate's training.")] = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = None,
    quantization: Quantization = None,
    engine: Engine = None,
    out: Out = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Find the best rank, learning rate, alpha and target modules within a budget. What was stopped goes on."""
    options = {name: value for name, value in locals().items() if name not in _NOT_ASKED}
    from rankscope.search import require_optuna

    require_optuna()
    from rankscope.search.folder import Search
    from rankscope.search.run import run
    from rankscope.search.space import resolve_search
    from rankscope.ui.search import SearchProgress, describe_result, show_result

    values = _study_values(study, model, dataset)
    if study is None and model is None:  # the embedded study's lists are not what is searched
        values = {name: value for name, value in values.items() if name not in ("ranks", "learning_rates")}
    spec = resolve_search(values, options, set_ or (), study)
    path, console = out or Path(f"{spec.study.name}-search"), error_console if json_ else out_console
    console.print(f"Search in {path}{'/' if not str(path).endswith('/') else ''}", markup=False)
    with stoppable(), SearchProgress(console, path) as progress:
        result = run(spec, path, progress.say, progress.poll)
    if json_:
        print_json(describe_result(Search(path, spec), result))
    else:
        show_result(Search(path, spec), result, console)


@app.command()
def plan(
    study: StudyFile = None,
    model: Model = None,
    dataset: Dataset = None,
    ranks: Ranks = None,
    variants: Variants = None,
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
    quantization: Quantization = None,
    engine: Engine = None,
    isolated: Isolated = None,
    out: Out = None,
    set_: Sets = None,
    gpu_memory: GpuMemory = None,
    gpu_flops: GpuFlops = None,
    devices: Devices = None,
    price: Price = None,
    json_: Json = False,
) -> None:
    """Show what `run` would do and take: packs, memory by part, time, what fits. Nothing is trained or written."""
    spec = _spec(study, set_, **{name: value for name, value in locals().items() if name not in _NOT_ASKED})
    _show_plan(spec, gpu_memory, json_, gpu_flops, devices, price)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory.")],
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Conclude again from a study's files, and rebuild its report."""
    from rankscope.pipeline import finish
    from rankscope.study.study import Study
    from rankscope.text.verdict import verdict_sentence
    from rankscope.ui.outcome import describe_outcome

    study = Study.open(directory)
    page = finish(study, lang)
    if json_:
        print_json(describe_outcome(study))
        return
    out_console.print(verdict_sentence(study.verdict, lang), markup=False)
    out_console.print(f"Report: {page}", markup=False, soft_wrap=True)


@app.command()
def curve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory, run to its end.")],
    ranks: Annotated[
        str | None, typer.Option(help="Such as 1,2,4. Default: powers of two, and the study's own.")
    ] = None,
    recover: Annotated[int, typer.Option(metavar="STEPS", help="Also after so many training steps.")] = 0,
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Estimate the loss of every lower rank from the largest one, cut by SVD. Only what is missing is measured."""
    from rankscope.jobs.curve import take_curve
    from rankscope.report.curve import cut_curve
    from rankscope.spec.options import comma_list
    from rankscope.study.study import Study
    from rankscope.text.catalogue import load
    from rankscope.ui.outcome import describe_curve
    from rankscope.ui.progress import TerminalProgress

    study, console = Study.open(directory), error_console if json_ else out_console
    asked = None if ranks is None else comma_list("ranks", ranks)
    try:
        with TerminalProgress(console, directory) as progress:
            take_curve(study, progress, asked, recover, lang)
    except KeyboardInterrupt:
        error_console.print("Stopped. What was measured is kept; the same command goes on.", style="yellow")
        raise typer.Exit(130) from None
    if json_:
        print_json(describe_curve(study))
        return
    found = cut_curve(study.evidence(), load(lang))
    for table in found.tables:
        print_table(table)
    for sentence in found.sentences:
        out_console.print(sentence, markup=False, soft_wrap=True)
    out_console.print(f"Report: {study.report}", markup=False, soft_wrap=True)


@app.command()
def pattern(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory, run to its end.")],
    rank: Annotated[
        int | None, typer.Option(help="The uniform rank to be held against. Default: the verdict's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The new study's file.")] = Path("pattern.yaml"),
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Propose ranks by layer for the parameters of a uniform rank, as a study that trains and judges both."""
    from rankscope.report.variants import pattern_table
    from rankscope.resize.pattern import by_module, propose, write_proposal
    from rankscope.study.study import Study
    from rankscope.text.catalogue import load

    study, text = Study.open(directory), load(lang)
    proposal = propose(study, rank)
    write_proposal(proposal, out)
    if json_:
        print_json(
            {"study": str(out), "rank": proposal.rank, "parameters": proposal.parameters, "ranks": proposal.ranks}
        )
        return
    print_table(pattern_table(by_module(proposal), proposal.rank, text))
    sizes = {"parameters": f"{proposal.parameters:,}", "uniform": f"{proposal.uniform_parameters:,}"}
    out_console.print(text("pattern.parameters", rank=proposal.rank, **sizes), markup=False, soft_wrap=True)
    command = shlex.join(["rankscope", "run", str(out)])
    out_console.print(text("pattern.next", command=command), markup=False, soft_wrap=True)


@app.command()
def watch(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory.")],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the page, on this machine alone. Default: a free one.")
    ] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Here instead of in a browser.")] = False,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    lang: Language = "en",
) -> None:
    """Follow a study that runs, on a page that updates, or in the terminal. Ctrl-C ends the watching alone."""
    from rankscope.study.study import Study
    from rankscope.ui.watch import Watch, address, serve, watch_terminal

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
    from rankscope.lora.svd import spectrum as spectrum_of
    from rankscope.resize.show import module_table, save_chart, spectrum_chart
    from rankscope.text.catalogue import load

    text, saved = load(lang), read_adapter(find_adapter(adapter, revision))
    frame = spectrum_of(saved.layers)
    console = error_console if json_ else out_console
    if chart is not None:
        save_chart(spectrum_chart(frame, text), chart, text)
        console.print(f"Chart: {chart}", markup=False, soft_wrap=True)
    if saved.others:
        names = ", ".join(list(saved.others)[:3]) + ", ..." * (len(saved.others) > 3)
        console.print(text("spectrum.others", n=len(saved.others), names=names), markup=False, soft_wrap=True)
    if json_:
        print_json({"adapter": adapter, "layers": frame.to_dict("records")})
    else:
        print_table(module_table(frame, text))


@app.command()
def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or a hub id.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut every layer to this rank.")] = None,
    energy: Annotated[
        str | None, typer.Option(help="Share of each layer's energy to keep, the sum of squared singular values: 0.95.")
    ] = None,
    cumulative: Annotated[
        str | None, typer.Option(help="Share of the sum of each layer's singular values to keep: 0.95.")
    ] = None,
    budget_rank: Annotated[
        int | None, typer.Option(min=1, help="As many parameters as with this rank, divided so that most energy stays.")
    ] = None,
    max_loss_increase: Annotated[
        str | None, typer.Option(help="The smallest cut whose held-out loss rises by no more than this: 0.5%.")
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="With --max-loss-increase: one rank for all layers.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Base model. Default: the one that the adapter names.")] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Data whose held-out part the loss is taken on. Default: those of the adapter's study."),
    ] = None,
    max_length: MaxLength = None,
    device: Device = None,
    dtype: Dtype = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="With --dataset: data.eval_rows=500.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write. Default: beside the adapter, as ADAPTER-r16.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: branch, tag or commit.")] = None,
    json_: Json = False,
    lang: Language = "en",
) -> None:
    """Cut a trained adapter to lower ranks, the same for all layers or each its own, and say what was lost."""
    from rankscope.resize.command import choose_rule, describe
    from rankscope.resize.command import resize as resize_adapter
    from rankscope.resize.show import rank_table, sentences, tried_table
    from rankscope.text.catalogue import load

    text = load(lang)
    rule = choose_rule(
        {
            "rank": rank,
            "energy": energy,
            "cumulative": cumulative,
            "budget_rank": budget_rank,
            "max_loss_increase": max_loss_increase,
        }
    )
    data = {"model": model, "dataset": dataset, "max_length": max_length, "device": device, "dtype": dtype}
    result = resize_adapter(
        adapter, rule, out, revision, uniform, data, set_ or (), lambda line: error_console.print(line, markup=False)
    )
    if json_:
        print_json(describe(result))
        return
    if result.loss is not None:
        print_table(tried_table(result.loss, text))
    print_table(rank_table(result.layers, text))
    for line in sentences(result, text):
        out_console.print(line, markup=False, soft_wrap=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a study's file, by which an editor completes and checks it."""
    from rankscope.spec.schema import study_schema

    print_json(study_schema())


@app.command()
def doctor(json_: Json = False) -> None:
    """Show versions, devices and optional parts."""
    from rankscope.measure.machine import hardware, installed, versions
    from rankscope.text.formats import size
    from rankscope.track import TRACKERS

    optional = {name: installed(name) for name in TRACKERS}
    optional |= {"search": installed("optuna"), "ray": installed("ray"), "quantization": installed("bitsandbytes")}

    if json_:
        print_json({"versions": versions(), "hardware": hardware(), "optional": optional})
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


def _unmeasured_name(name: str) -> str:
    return name if name == "answers" else f"profile of {name}"


def _show_plan(
    spec: "StudySpec",
    gpu_memory: str | None,
    as_json: bool,
    gpu_flops: str | None = None,
    devices: int | None = None,
    price: float | None = None,
) -> None:
    from rankscope.plan.plan import describe_plan, make_fleet, make_plan, parse_gpu_flops, parse_gpu_memory
    from rankscope.ui.plan import show_plan

    plan = make_plan(spec, parse_gpu_memory(gpu_memory), parse_gpu_flops(gpu_flops), make_fleet(devices, price))
    if as_json:
        print_json(describe_plan(plan))
    else:
        show_plan(plan, out_console)


def _spec(study: Path | None, sets: list[str] | None, **options: Any) -> "StudySpec":
    """The study that the arguments ask for."""
    from rankscope.spec.options import assemble, comma_list, one_number

    for name in ("ranks", "variants", "learning_rates", "seeds", "target_modules"):
        if isinstance(options.get(name), str) and options[name] != "all-linear":
            options[name] = comma_list(name, options[name])
    if options.get("alpha") is not None:
        options["alpha"] = one_number(options["alpha"])
    values = _study_values(study, options.get("model"), options.get("dataset"))
    return assemble(values, options, sets or (), study)


def _study_values(study: Path | None, model: str | None, dataset: str | None) -> dict[str, Any]:
    """What a study's file says; the embedded study's without one, a model and data; nothing beside these two."""
    from rankscope.spec.options import read_study_file

    if study is not None:
        return read_study_file(study)
    if model is None and dataset is None:
        return read_study_file(EMBEDDED_STUDY)
    if model is None or dataset is None:
        missing = "--dataset" if dataset is None else "--model"
        raise StudyError(f"{missing} is missing", "Give both --model and --dataset, or a study file, or neither.")
    return {}


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
    except OSError as error:
        todo = _TODO.get(error.errno or 0)
        if debug or todo is None:
            raise
        if error.filename is None:  # of the output, of which Python would try to write the rest at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        name = "the output" if error.filename is None else shortened(str(error.filename))
        told = f"error: {name}: {error.strerror}\n  {todo}"
        error_console.print(told, markup=False, style="red", soft_wrap=True)
        sys.exit(2)


_TODO = {
    errno.ENAMETOOLONG: "Give a shorter name.",
    errno.ENOSPC: "Make room there, and run again: a study that has begun goes on where it was.",
    errno.EIO: "See what is wrong with that device, and run again.",
}
"""What to do about errors of the system that can come from any place, by their numbers."""


if __name__ == "__main__":
    main()
