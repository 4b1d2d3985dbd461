"""Logits of what was exported, and of the adapter within rankscope."""

from typing import Any

import numpy as np
import torch

from rankscope.data.tokens import load
from rankscope.lora.saved import attached, read_adapter
from rankscope.model.load import load_model
from rankscope.study.study import Study


@torch.no_grad()
def logits(model: Any, study: Study) -> torch.Tensor:
    """Of the study's first held-out row, (T, V)."""
    ids = torch.from_numpy(load(study.path / "data").eval[0].ids.astype(np.int64))[None]
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0]
    return found


def own_logits(study: Study, trial: str) -> torch.Tensor:
    model = load_model(study.spec.model)
    with attached(model, "adapter", read_adapter(study.path / "trials" / trial / "adapter")):
        return logits(model, study)
