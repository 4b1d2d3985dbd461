"""A base model that is larger than its device: said before anything is loaded, with what would make it fit."""

import torch

from rankscope.errors import MissingExtraError, ModelError
from rankscope.lora.skeleton import skeleton
from rankscope.model.quantized import base_bytes
from rankscope.plan.memory import Prediction
from rankscope.spec.models import ModelSpec
from rankscope.text.formats import size


def check_base_fits(model: ModelSpec, prediction: Prediction, free: int) -> None:
    """Raises ModelError where the base alone is larger than the `free` bytes of its device."""
    found = too_large(model, prediction, free)
    if found is not None:
        raise ModelError(*found)


def too_large(model: ModelSpec, prediction: Prediction, free: int) -> tuple[str, str] | None:
    """What the base needs and what the device has, and what to do; None where it is not too large."""
    if prediction.base_bytes <= free:
        return None
    kind = model.quantization or str(prediction.dtype).removeprefix("torch.")
    what = f"model {model.id}: the base alone takes {size(prediction.base_bytes)} in {kind}, and {size(free)} are free"
    smaller = [f"{option} ({size(held)})" for option, held in _smaller(model, prediction) if held <= free]
    todo = f"Use {' or '.join(smaller)}, or a larger device" if smaller else "Use a larger device, or a smaller model"
    return what, f"{todo}: one device holds the whole base."


def _smaller(model: ModelSpec, prediction: Prediction) -> list[tuple[str, int]]:
    """Options under which the base takes fewer bytes, the most exact first, with those bytes."""
    options = [("--dtype bfloat16", {"dtype": "bfloat16"})]
    options += [(f"--quantization {kind}", {"quantization": kind}) for kind in ("int8", "nf4")]
    found = []
    for option, changes in options:
        other = model.model_copy(update=changes)
        dtype = torch.bfloat16 if other.dtype == "bfloat16" else prediction.dtype
        try:
            held = base_bytes(skeleton(other, dtype))
        except (MissingExtraError, ModelError):  # where there is no bitsandbytes, or nothing that it could quantize
            continue
        if held < prediction.base_bytes:
            found.append((option, held))
    return found
