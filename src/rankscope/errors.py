"""Every error that rankscope raises on purpose: it says what happened, where, and what to do next.

The command line prints the message without a traceback and exits with `exit_code`. Each class also inherits the
standard exception that a caller would expect to catch.
"""

import difflib
import errno
import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import find_spec


class RankscopeError(Exception):
    """Base of all errors raised on purpose.

    `what` is one sentence (with the file, line or field it is about); `todo` is the way out, in one sentence.
    """

    exit_code = 1

    def __init__(self, what: str, todo: str = "") -> None:
        super().__init__(what)
        self.what, self.todo = what, todo

    def __str__(self) -> str:
        return f"{self.what}\n  {self.todo}" if self.todo else self.what

    @classmethod
    def all_kinds(cls) -> Iterator[type["RankscopeError"]]:
        """This class and its subclasses."""
        yield cls
        for kind in cls.__subclasses__():
            yield from kind.all_kinds()

    def __reduce__(self) -> tuple[type["RankscopeError"], tuple[str, str]]:
        return type(self), (self.what, self.todo)


class StudyError(RankscopeError, ValueError):
    """The study asks for something wrong or contradictory (exit code 2)."""

    exit_code = 2


class DataError(RankscopeError, ValueError):
    """The data cannot be used (exit code 3)."""

    exit_code = 3


class ModelError(RankscopeError, ValueError):
    """The model or tokenizer cannot be used (exit code 3)."""

    exit_code = 3


class StudyDirectoryError(RankscopeError, OSError):
    """The study's directory cannot be read or written as it should (exit code 2)."""

    exit_code = 2


class DamagedError(StudyDirectoryError):
    """A file of a study is missing or corrupt; a run makes it again (exit code 2).

    A file that exists and cannot be read is a plain StudyDirectoryError: it may be whole.
    """


class MissingExtraError(RankscopeError, ImportError):
    """An optional part is not installed (exit code 2)."""

    exit_code = 2


def require(package: str, extra: str, asked: str) -> None:
    """Raise MissingExtraError where the package that `asked` needs is not installed."""
    found = find_spec(package)
    if found is None or found.origin is None:  # or merely a folder of that name, as W&B makes one where it runs
        raise MissingExtraError(f"{asked}: {package} is not installed", f"Install it: `{install_command(extra)}`")


REPOSITORY = "https://github.com/rankscope/rankscope"


def install_command(extra: str) -> str:
    """The command that installs an optional part from where this rankscope came (PEP 610): a folder or file, else git,
    as no package index has it."""
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    origin = {}
    with suppress(PackageNotFoundError):
        origin = json.loads(distribution("rankscope").read_text("direct_url.json") or "{}")
    part, editable = f"rankscope[{extra}] @ git+{REPOSITORY}", origin.get("dir_info", {}).get("editable")
    if (url := urlsplit(origin.get("url", ""))).scheme == "file":
        part = f"{unquote(url.path)}[{extra}]"
    return f"pip install {'-e ' * bool(editable)}{shlex.quote(part)}"


def check_system() -> None:
    """Raise RankscopeError on Windows, which lacks the signals, and the accounting of memory, that a study needs."""
    if sys.platform == "win32":
        what = "rankscope runs on Linux and macOS; on Windows run it in WSL, the Windows Subsystem for Linux"
        raise RankscopeError(what, "`wsl --install` sets it up; then install rankscope in it as on Linux.")


class WorkerError(RankscopeError, RuntimeError):
    """A child process ended without finishing its work (exit code 1)."""

    status = "failed"  # of the trials that the process was training


class OutOfMemoryError(WorkerError, MemoryError):
    """Memory ran out, on the GPU or for the process."""

    status = "oom"


NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts by which a RuntimeError of torch is known to be a lack of memory."""


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that memory has run out, on the machine or on a GPU. Torch is not imported for it: before
    it is, no error is torch's."""
    torch = sys.modules.get("torch")
    of_torch = torch is not None and isinstance(error, torch.OutOfMemoryError)
    of_system = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return of_torch or of_system or any(text in str(error) for text in NO_MEMORY)


class KilledError(WorkerError):
    """Somebody ended the process."""

    status = "interrupted"


def did_you_mean(name: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """`; did you mean x?` for an error about an unknown name, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), most, cutoff)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """First line of an error's text, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(text: str, most: int = 60) -> str:
    """Text of at most `most` characters, for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason_of(error: BaseException, most: int = 200) -> str:
    """All that an error says, without its way out, on one line; its kind where it says nothing."""
    said = error.what if isinstance(error, RankscopeError) else str(error)
    return shortened(" ".join(said.split()) or type(error).__name__, most)
