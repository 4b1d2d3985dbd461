"""Options of the commands that ask for a study: declared from one table, and resolved to the study."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

from rankscope.errors import StudyError
from rankscope.spec.option_table import OPTIONS, Option

if TYPE_CHECKING:
    from rankscope.spec.models import StudySpec

EMBEDDED_STUDY = Path(__file__).parents[1] / "demo" / "study.yaml"
Options: TypeAlias = Mapping[str, Option]  # by name; those without a field are the command's own
NONE: Options = MappingProxyType({})

STUDY = {name: option for name, option in OPTIONS.items() if option.help}
CRITERIA = {
    name: option._replace(default="the study's")
    for name, option in OPTIONS.items()
    if option.field.startswith("verdict.")
}
RUN = STUDY | {
    "report_to": Option("", str, "Trackers: wandb,tensorboard,mlflow,trackio.", "none"),
    "remeasure": Option("", bool, "Measure the costs of all ranks again."),
    "until_settled": Option("", bool, "Add seeds, to 3, 5, 8 and 12, of the ranks that are undecided."),
    "hours": Option("", float, "Conclude by then: start nothing that would end later.", "no limit"),
    "allow_code": Option("", list[str], "Code of measure.task that may run: my.py.", "none", "PATH"),
    "yes": Option("", bool, "Start without asking, however long it takes."),
    "dry_run": Option("", bool, "Show the plan and end, like `plan`."),
}
PLAN = {name: option for name, option in STUDY.items() if name not in CRITERIA} | {
    "gpu_memory": Option("", str, "Plan for a GPU of this size, e.g. 24GB.", "this machine's"),
    "gpu_flops": Option("", str, "Its matmul speed, e.g. 400TFLOPS.", "unknown; no times"),
    "devices": Option("", int, "Devices to plan for: makespan, device-hours.", "those here"),
    "price": Option("", float, "Price of one device-hour, e.g. 2.5.", "unknown"),
    "show_rows": Option("", int, "Show N rows: which text is read, which learned.", "none", "N", 0),
}
_DATA = ("dataset", "eval_dataset", "columns", "chat_template", "skip_bad_rows", "force")
SEARCH = {name: OPTIONS[name] for name in ("model", *_DATA)} | {
    "ranks": Option("", str, "Ranks: a list, or a range in doublings.", "4..256"),
    "learning_rates": Option("", str, "A list, or a range, sampled log-uniformly.", "3e-5..3e-3"),
    "alpha": Option("", str, "One lora_alpha or several, e.g. 16,32,2r.", "32"),
    "target_modules": Option("", str, "Groups, e.g. all-linear;q_proj,v_proj.", "all-linear"),
    "trials": Option("", int, "Budget: candidates to begin.", "32 without another budget"),
    "hours": Option("", float, "Budget: hours of training and evaluation.", "no limit"),
    "tokens": Option("", int, "Budget: training tokens of all candidates together.", "no limit"),
    "sampler": Option("", str, "tpe or random.", "tpe"),
    "pruner": Option("", str, "halving stops hopeless candidates early; or none.", "halving"),
    "seed": Option("", int, "Seed of the sampler and of every candidate's training.", "0"),
}
_RECIPE = ("steps", "epochs", "batch_size", "max_length", "device", "dtype", "quantization", "dequantize", "engine")
SEARCH |= {name: OPTIONS[name] for name in _RECIPE}

RULES = {
    "rank": Option("", int, "Truncate every layer to this rank.", "none"),
    "energy": Option("", str, "Share of each layer's energy (squared singular values) to keep: 0.95.", "none"),
    "cumulative": Option("", str, "Share of each layer's singular values to keep: 0.95.", "none"),
    "budget_rank": Option("", int, "As many parameters as this rank has, divided to keep most energy.", "none"),
    "max_loss_increase": Option(
        "", str, "Smallest adapter whose held-out loss rises by at most this, e.g. 0.5%.", "none"
    ),
}
RESIZE = {
    **RULES,
    "uniform": Option("", bool, "With --max-loss-increase: one rank everywhere."),
    "model": Option("model.id", str, "Base model.", "the adapter's"),
    "dataset": OPTIONS["dataset"]._replace(help="Data to hold out rows of.", default="those of the adapter's study"),
} | {name: OPTIONS[name] for name in ("max_length", "device", "dtype", "dequantize")}

EXPORT = {
    "rank": Option("", int, "Rank to export.", default="the one that the verdict recommends"),
    "trial": Option("", str, "Trial to export, by its name, e.g. one of a LoRA variant.", "the rank's best seed"),
    "retrain": Option("", bool, "Train it again on all rows first, the held-out ones too."),
    "merge": Option("", str, "Write a merged model instead of an adapter: bf16, fp16 or float32.", "none", "TYPE"),
    "over": Option("", str, "Measure the loss in these forms too: bf16, fp16, float32, nf4, int8.", "none", "FORMS"),
    "push": Option("", str, "Push it to the hub; a new repository is private.", "nowhere", "OWNER/NAME"),
    "model": Option("", str, "Base model, if it has been moved since.", "the study's", "ID|FOLDER"),
    "device": OPTIONS["device"],
}


OFF = "off"  # default of every switch, in the help


def switch(name: str, help: str) -> Any:
    """A switch as typer declares it, which is off without it."""
    return typer.Option(name, help=help, show_default=OFF)


StudyFile = Annotated[
    Path | None,
    typer.Argument(metavar="[STUDY.yaml]", help="A study's file. Without one and --model: the embedded study."),
]
StudyOrDirectory = Annotated[
    Path | None,
    typer.Argument(
        metavar="[STUDY.yaml|DIR]",
        help="A study's file, or its directory, to add to it. Without one and --model: the embedded study.",
    ),
]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A study's directory.")]
FinishedDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of a finished study.")]
Adapter = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA adapter, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision (branch, tag, commit).", show_default="main")]
Out = Annotated[Path | None, typer.Option(help="The study's directory.", show_default="its name")]
_ANY = "Any field: training.steps=200."
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_ANY, show_default="none")]
LauncherName = Annotated[str, typer.Option("--launcher", help="Where jobs run: local (all GPUs here) or ray.")]
RayAddress = Annotated[str | None, typer.Option(help="HOST:PORT or auto.", show_default="RAY_ADDRESS, or Ray here")]
_QUICK = "A first look, in NAME-quick: at most 3 ranks, 2 seeds, 200 steps and 2,000 rows."
Quick = Annotated[bool, switch("--quick", _QUICK)]
Json = Annotated[bool, switch("--json", "Print one JSON object, for scripts; all else goes to stderr.")]
Language = Annotated[str, typer.Option("--lang", help="Language of what is printed, and of the report: en or ko.")]


def with_options(table: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: its parameter `options` becomes one option for each of the table, and receives their
    values by name; None for one that is not given."""
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, option))
        for name, option in table.items()
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**arguments: Any) -> None:
            command(options={name: arguments.pop(name) for name in table}, **arguments)

        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            parameters += added if name == "options" else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads both
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called if table else command

    return decorate


def own(options: dict[str, Any], table: Options) -> dict[str, Any]:
    """Take the command's own options, which set no field of a study, out of `options`."""
    return {name: options.pop(name) for name, option in table.items() if not option.field}


INIT = {
    "model": Option("", str, "Base model: hub id, folder or .gguf file.", "embedded"),
    "dataset": Option("", str, "Data: file, folder or hub id.", "embedded"),
    "task": Option("", str, "What a row is: auto, instructions, questions, chat or text.", "auto"),
    "hardware": Option("", str, "Hardware: auto, cpu, cuda, mps, or the memory of a GPU elsewhere: 24GB.", "auto"),
    "hours": Option("", str, "Hours it may take; below 1 it is a quick look.", "2"),
}
"""Options and default answers of `rankscope init`."""

_PANELS = dict.fromkeys(("model", "data"), "Model and data") | {"training": "Training", "verdict": "Verdict"}
_PANELS |= dict.fromkeys(("ranks", "variants", "adapter", "learning_rates", "seeds"), "Candidates")
"""Groups of options in the help, by the first part of their fields."""


def _annotation(name: str, option: Option) -> Any:
    """Return the option as typer declares it; a switch has no --no- form."""
    declarations = [f"--{name.replace('_', '-')}"] if option.type is bool else []
    default = OFF if option.type is bool else option.default
    shown: Any = {"metavar": option.metavar, "help": option.help, "show_default": default}
    panel = _PANELS.get(option.field.partition(".")[0])
    return Annotated[option.type | None, typer.Option(*declarations, min=option.least, rich_help_panel=panel, **shown)]


class Command(TyperCommand):
    """A command that reads its options by the names of other tools too: `--lr 1e-4`, `--lora_alpha=16`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name: one for one in self.get_params(ctx) for name in one.opts}
        words = list(own_names(args, own))
        for word, following in pairwise(words):  # which would be taken for the value
            if following in own and word in own and not getattr(own[word], "is_flag", True):
                ctx.fail(f"{word} needs a value before {following}.")
        return super().parse_args(ctx, words)


def own_names(words: Sequence[str], own: Collection[str]) -> Iterator[str]:
    """The words of a command line with the command's `own` options instead of other names for them; fields of a study
    without an option become `--set`. Raises StudyError: an option of another tool means no field."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        written, equals, value = word.partition("=")
        option = written.replace("_", "-")
        field = None if option in own or not option.startswith("--") or "--set" not in own else _field(written)
        names = (f"--{name.replace('_', '-')}" for name, known in OPTIONS.items() if field and known.field == field)
        option = next((name for name in names if name in own), option)
        if option in own:
            yield f"{option}{equals}{value}"
        elif field is None:
            yield word
        else:
            if not equals:
                value = "true" if not rest or rest[0].startswith("--") else rest.pop(0)
            yield from ("--set", f"{field}={value}")


def _field(option: str) -> str | None:
    """The field of a study that an option such as `--lora_alpha` means, if any."""
    from rankscope.spec.names import INSTEAD, field_of, type_of

    name = option.removeprefix("--").replace("-", "_")
    if name in INSTEAD:
        raise StudyError(f"{option} is no option of rankscope", f"{INSTEAD[name][0].upper()}{INSTEAD[name][1:]}.")
    field = field_of(name, "text")
    return field if type_of(field) else None


def study_and_path(
    study: Path | None, out: Path | None, options: Mapping[str, Any], sets: Sequence[str] | None, quick: bool
) -> tuple["StudySpec", Path]:
    """The study that is asked for by its file, or by its directory, in which it then runs; and its directory. A `quick`
    look at one has its own, beside it. Raises StudyError: what is given is wrong, or more than a quick look takes."""
    from rankscope.spec.names import field_of
    from rankscope.spec.options import assemble, quick_look

    if study is not None and (study / "study.yaml").is_file():
        study, out = study / "study.yaml", out or study
    spec = assemble(study_values(study, options), options, sets or (), study)
    path = out or Path(spec.name)
    if not quick:
        return spec, path
    look, path = quick_look(spec), path if path.name not in ("", "..") else path.resolve()
    given = {OPTIONS[name].field: f"--{name}" for name, value in options.items() if value is not None}
    given |= {field_of(one.partition("=")[0]): f"--set {one}" for one in sets or ()}
    for field in ("seeds", "training.steps", "training.epochs"):
        if field in given and attrgetter(field)(look) != attrgetter(field)(spec):
            what = f"{given[field]} asks for more than a quick look takes: 2 seeds, and 200 steps or 1 epoch"
            raise StudyError(what, f"Leave out {given[field]}, or --quick for the whole study.")
    return look, path.parent / f"{path.name}-quick"


def study_values(study: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a study's file; without a file, model and data, those of the embedded study. Raises StudyError: the
    file is wrong, or one of model and data is missing."""
    from rankscope.spec.options import read_study_file

    model, dataset = options["model"], options["dataset"]
    if study is not None:
        try:
            return read_study_file(study)
        except StudyError as error:
            if dataset is None:
                raise
            todo = f"{error.todo} If it is data: repeat --dataset for each file, or quote the pattern."
            raise StudyError(error.what, todo) from None
    if model is None and dataset is None:
        return read_study_file(EMBEDDED_STUDY)
    if model is None or dataset is None:
        missing = "--dataset" if dataset is None else "--model"
        raise StudyError(f"{missing} is missing", "Give both --model and --dataset, or a study file, or neither.")
    return {}
