"""What every child process of a job needs: the base model, and its errors as ones that say what to do."""

import errno
import os
import threading
from typing import TYPE_CHECKING

from rankscope.errors import ModelError, OutOfMemoryError, RankscopeError, StudyDirectoryError, WorkerError
from rankscope.study.folder import StudyFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""Of the disk itself: another trial would meet the same."""

NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""In the texts of torch's RuntimeErrors, by which alone these are known."""


def load_base(study: StudyFolder) -> tuple["PreTrainedModel", str]:
    """The base model and its fingerprint.

    Raises:
        ModelError: it cannot be loaded, or is not the one that a trial was trained on.
    """
    from rankscope.model.load import fingerprint, load_model

    model = load_model(study.spec.model)
    weights = fingerprint(model)
    known = study.with_known_model()  # one tells for all: each of them was held against one before it
    if known is not None and study.trial_record(known).model_sha256 != weights:
        raise ModelError(
            f"{study.spec.model.id}: not the weights that {known.name} was trained on",
            "Give the model that the study began with (machine.json has its commit on the hub), or another --out.",
        )
    return model, weights


def known_error(error: Exception) -> RankscopeError:
    """The error as one that says what to do."""
    import torch

    if isinstance(error, RankscopeError):
        return error
    what = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return StudyDirectoryError(
            f"{error.filename or 'a file'}: cannot be read or written: {error.strerror}",
            "Mend that and run the study again: it goes on where it was.",
        )
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or no_memory or any(t in str(error) for t in NO_MEMORY):
        return OutOfMemoryError(what)
    return WorkerError(what)


def end_with_parent() -> None:
    """Ends this process when its standard input closes, which is when the process that started it ends."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a waiting thread would hold at this process's own end
            pass
        os._exit(1)

    threading.Thread(target=wait, name="rankscope-parent", daemon=True).start()
