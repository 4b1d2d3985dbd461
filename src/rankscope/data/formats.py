"""Formats: what the columns of a source mean, by their names, by a guess that is said, or as the study says."""

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple, TypeAlias

from rankscope.data.readers import listed
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec

Format: TypeAlias = Literal["alpaca", "prompt_completion", "messages", "text"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
OPTIONAL: dict[Format, tuple[str, ...]] = {
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("tools", "system", "chat_template_kwargs", "documents"),
    "messages": ("tools", "system", "chat_template_kwargs", "documents"),
    "text": (),
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that a text model cannot read; a row where one holds something is refused."""

_CONVERSATION = ("conversations", "conversation", "dialogue")
_ASKED = ("instruction", "question", "query", "prompt", "problem")
_SAID = ("output", "response", "answer", "completion", "solution")
_GIVEN = ("input", "context")
_OWN = {column for format in REQUIRED for column in (*REQUIRED[format], *OPTIONAL[format])}
_ALSO = {"functions": "tools", "system_prompt": "system", "system_message": "system"}  # OpenAI's, OpenOrca's names
IS_WANTED = {"kto_tag": tuple(REQUIRED), "label": ("prompt_completion",)}
"""Columns of unpaired preferences, LLaMA-Factory's and TRL's, and the formats beside which they are that: False calls
an answer bad."""

COLUMNS = frozenset({*IS_WANTED, *_OWN, *_CONVERSATION, *_ASKED, *_SAID, *_GIVEN, *MEDIA, *_ALSO, "chosen", "rejected"})
"""Columns that any format reads; others are not loaded where that saves time."""


def has_conversations(format: str) -> bool:
    """Whether rows of a format, or of several joined, may be conversations, which a chat template writes."""
    return "messages" in format or "prompt_completion" in format


class Layout(NamedTuple):
    """Format of a source, and the column that holds each of its fields."""

    format: Format
    columns: dict[str, str]  # field -> the data's name; `rejected` where the prompt is what both answers begin with
    guessed: bool = False

    def describe(self, source: str) -> str:
        pairs = [f"`{theirs}` as {field}" for field, theirs in self.columns.items() if field != theirs]
        return f"{source} is read as {self.format}: {', '.join(pairs)}"


def resolve_layout(spec: DataSpec, columns: Sequence[str], source: str, sample: Mapping[str, object]) -> Layout:
    """Layout of a source with these columns. `spec.columns` comes first, then the formats' own names, then a guess, if
    only one is possible. `sample` is a row; whether an answer is a list of messages decides between two of them. Raises
    DataError: the columns fit no format, or several."""
    given = spec.columns
    several = len(spec.ids) > 1 or spec.eval_dataset is not None
    if several and not set(given.values()) & set(columns):
        given = {}  # names of another source's columns
    if absent := [theirs for theirs in given.values() if theirs not in columns]:
        what = f"{source}: no column {listed(absent)}, which data.columns names; found {listed(columns)}"
        raise DataError(what, "Correct data.columns (--columns OURS=THEIRS).")
    own = {name: name for name in columns if name in _OWN and name not in given.values()} | given
    for theirs, field in _ALSO.items():
        if theirs in columns and theirs not in given.values():
            own.setdefault(field, theirs)
    fitting = [format for format, needed in REQUIRED.items() if own.keys() >= set(needed)]
    if said := [format for format in fitting if given.keys() >= set(REQUIRED[format])]:
        fitting = said
    elif len(fitting) > 1 and spec.format != "text":
        fitting = [format for format in fitting if format != "text"]  # beside others it is the rendered row
    layouts = [Layout(format, _fields(format, own)) for format in fitting]
    if fitting in ([], ["text"]) and not said and spec.format != "text":
        layouts = _guesses(own, columns, given, sample) or layouts
    if spec.format != "auto":
        layouts = [layout for layout in layouts if layout.format == spec.format]
    if len(layouts) == 1:
        return layouts[0]
    what = f"{source}: found the columns {listed(columns)}"
    if len(layouts) > 1 and layouts[0].guessed:
        way = "Say which is which, e.g. --columns instruction=question,output=answer."
        raise DataError(f"{what}, which can be read in several ways", way)
    if len(layouts) > 1:
        names = " and ".join(layout.format for layout in layouts)
        raise DataError(f"{what}, which fit {names}", "Set data.format to the one you mean.")
    wanted = [format for format in REQUIRED if spec.format in ("auto", format)]
    optional = {"alpaca": " (input is optional)"}
    needs = [f"{format} needs {' and '.join(REQUIRED[format])}{optional.get(format, '')}" for format in wanted]
    way = "Say which is which: --columns OURS=THEIRS, e.g. --columns prompt=question,completion=answer."
    if "input_ids" in columns:
        raise DataError(f"{what}: its rows are token ids already", "Give the text, or the messages, that they are of.")
    why = ", which fit no format: " if spec.format == "auto" else "; the format "
    raise DataError(f"{what}{why}{'; '.join(needs)}", way)


def _fields(format: Format, own: Mapping[str, str]) -> dict[str, str]:
    """Column of each field. Optional ones may first appear in a later row."""
    return {field: own.get(field, field) for field in (*REQUIRED[format], *OPTIONAL[format])}


def _guesses(
    own: Mapping[str, str], columns: Collection[str], given: Mapping[str, str], sample: Mapping[str, object]
) -> list[Layout]:
    """Every way to read columns that have none of the formats' own names."""
    if given.keys() & {field for needed in REQUIRED.values() for field in needed}:
        return []
    more = {field: own.get(field, field) for field in OPTIONAL["messages"]}
    found = [Layout("messages", {"messages": name} | more, True) for name in _CONVERSATION if name in columns]
    asked = [name for name in _ASKED if name in columns]
    if not found and "chosen" in columns:
        if len(asked) == 1 and asked != ["prompt"] and isinstance(sample.get("chosen"), str):
            return [Layout("alpaca", _fields("alpaca", {**own, "instruction": asked[0], "output": "chosen"}), True)]
        prompt = {"prompt": asked[0]} if len(asked) == 1 else {}
        if not prompt and isinstance(sample.get("chosen"), list):
            return [Layout("messages", {"messages": "chosen"} | more, True)]
        if not prompt and "rejected" in columns:
            prompt = {"rejected": "rejected"}
        return [Layout("prompt_completion", prompt | {"completion": "chosen"} | more, True)]
    inputs = [name for name in _GIVEN if name in columns]
    if not asked and "input" in inputs:
        asked, inputs = ["input"], [name for name in inputs if name != "input"]
    said = [name for name in _SAID if name in columns]
    beside = {field: own.get(field, field) for field in ("system", "history")}
    for question, answer, given_with in product(asked, said, inputs or [""]):
        extra = {"input": given_with} if given_with else {}
        found.append(Layout("alpaca", {"instruction": question, "output": answer} | beside | extra, True))
    return found
