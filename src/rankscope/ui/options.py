"""Options of the commands that ask for a study: declared from one table, and resolved to the study."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankscope.errors import StudyError
from rankscope.spec.option_table import OPTIONS, Option

if TYPE_CHECKING:
    from rankscope.spec.models import StudySpec

EMBEDDED_STUDY = Path(__file__).parents[1] / "demo" / "study.yaml"
RUN = [name for name, option in OPTIONS.items() if option.help]
CRITERIA = [name for name, option in OPTIONS.items() if option.field.startswith("verdict.")]
PLAN = [name for name in RUN if name not in CRITERIA]
_DATA = ("dataset", "eval_dataset", "columns", "chat_template", "skip_bad_rows", "force")
SEARCH = {name: OPTIONS[name] for name in ("model", *_DATA)} | {
    "ranks": Option("", str, "Ranks, e.g. 8,32,128, or 4..256 for 4, 8, 16 up to 256."),
    "learning_rates": Option("", str, "A range such as 1e-5..1e-3, sampled log-uniformly, or a list."),
    "alpha": Option("", str, "One lora_alpha or several, e.g. 16,32,2r."),
    "target_modules": Option("", str, "Groups, separated by semicolons, e.g. all-linear;q_proj,v_proj."),
    "trials": Option("", int, "Budget: candidates to begin. Default: 32."),
    "hours": Option("", float, "Budget: hours of training and evaluation."),
    "tokens": Option("", int, "Budget: training tokens of all candidates together."),
    "sampler": Option("", str, "tpe or random."),
    "pruner": Option("", str, "halving stops hopeless candidates early; or none."),
    "seed": Option("", int, "Seed of the sampler and of every candidate's training."),
}
_RECIPE = ("steps", "epochs", "batch_size", "max_length", "device", "dtype", "quantization", "dequantize", "engine")
SEARCH |= {name: OPTIONS[name] for name in _RECIPE}
"""Options of `rankscope search`. Those without a field are the search's own."""

RULES = {
    "rank": Option("", int, "Truncate every layer to this rank."),
    "energy": Option("", str, "Share of each layer's energy (squared singular values) to keep: 0.95."),
    "cumulative": Option("", str, "Share of each layer's singular values to keep: 0.95."),
    "budget_rank": Option("", int, "As many parameters as this rank has, divided to keep most energy."),
    "max_loss_increase": Option("", str, "Smallest adapter whose held-out loss rises by at most this, e.g. 0.5%."),
}
RESIZE = {
    **RULES,
    "uniform": Option("", bool, "With --max-loss-increase: one rank everywhere."),
    "model": Option("model.id", str, "Base model. Default: the adapter's."),
    "dataset": OPTIONS["dataset"]._replace(help="Data to hold out rows of. Default: those of the adapter's study."),
} | {name: OPTIONS[name] for name in ("max_length", "device", "dtype", "dequantize")}


def with_options(options: Mapping[str, Option] | Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator of a command: its parameter `options` becomes one option each, and receives their values by name. An
    option that is not given is None. `options` are a table of their own, or names in `OPTIONS`."""
    table = options if isinstance(options, Mapping) else {name: OPTIONS[name] for name in options}
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
        return called

    return decorate


def _annotation(name: str, option: Option) -> Any:
    """Return the option as typer declares it; a switch has no --no- form."""
    declarations = [f"--{name.replace('_', '-')}"] if option.type is bool else []
    return Annotated[option.type | None, typer.Option(*declarations, metavar=option.metavar, help=option.help)]


def resolve_study(study: Path | None, options: Mapping[str, Any], sets: Sequence[str] | None) -> "StudySpec":
    """The study of a file, with options as the command line has them and `--set` assignments over it. Raises
    StudyError: a file, an option or a field is wrong."""
    from rankscope.spec.options import assemble, comma_list, one_number

    values = dict(options)
    for name in ("ranks", "variants", "learning_rates", "alphas", "seeds", "target_modules"):
        if values.get(name) is not None:
            values[name] = comma_list(name, values[name])
    if values.get("alpha") is not None:
        values["alpha"] = one_number(values["alpha"])
    return assemble(study_values(study, options), values, sets or (), study)


def study_at(study: Path | None, out: Path | None) -> tuple[Path | None, Path | None]:
    """File and directory of a study that is given as its file, or as a directory, in which it then runs."""
    if study is not None and (study / "study.yaml").is_file():
        return study / "study.yaml", out or study
    return study, out


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
