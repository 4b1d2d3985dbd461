"""Data: from a file or the hub to tokens with the positions to learn, and to batches.

sources -> records -> prompts -> tokens (with split, cached) -> batches
"""

from rankscope.data.batches import batch_indices, steps_per_epoch
from rankscope.data.cache import prepare_cached
from rankscope.data.general import with_general_text
from rankscope.data.records import Records, load_records
from rankscope.data.tokens import Example, TokenizedData, Tokens, load, prepare, save

__all__ = [
    "Example",
    "Records",
    "TokenizedData",
    "Tokens",
    "batch_indices",
    "load",
    "load_records",
    "prepare",
    "prepare_cached",
    "save",
    "steps_per_epoch",
    "with_general_text",
]
