"""Greedy answers of several adapters side by side, in batches without padding: each is that of its prompt alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from rankscope.data.conversations import Tokenizer
from rankscope.lora.adapters import adapted_modules, adapter_key, remove_adapters
from rankscope.lora.saved import attach, read_adapter
from rankscope.model.device import free_bytes
from rankscope.spec.task import BASE

MOST_ROWS = {"cpu": 64, "cuda": 256, "mps": 64}  # of one batch; not measured on a GPU


@contextmanager
def adapters_on(model: PreTrainedModel, folders: Mapping[str, Path]) -> Iterator[None]:
    """Attach the adapters of these folders, by name, while the body runs. Raises ModelError: one does not fit."""
    try:
        for name, folder in folders.items():
            attach(model, name, read_adapter(folder))
        model.eval()  # what was attached has dropout of its own
        yield
    finally:
        remove_adapters(model)


def answers_of(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    positions: int | None,
    folders: Mapping[str, Path | None],
    prompts: Sequence[Sequence[int]],
    most: int,
) -> dict[str, list[str]]:
    """Greedy answers to the prompts, of `most` tokens at most, within the `positions` that the model has
    (`rankscope.model.load.most_positions`), by the name of each adapter; None is the model without one, which seldom
    ends an answer, and so has batches of its own. Each adapter has where PEFT does not send the rows of one batch
    through several."""
    adapters = {name: folder for name, folder in folders.items() if folder is not None}
    found: dict[str, list[str]] = {}
    if len(adapters) < len(folders):
        found[BASE] = _side_by_side(model, tokenizer, positions, [BASE], prompts, most)[BASE]
    with adapters_on(model, adapters):
        if len(adapters) == 1 or (adapters and _mixes(model, list(adapters))):
            return found | _side_by_side(model, tokenizer, positions, list(adapters), prompts, most)
    for name, folder in adapters.items():
        found |= answers_of(model, tokenizer, positions, {name: folder}, prompts, most)
    return found


@torch.no_grad()
def _mixes(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Whether rows of one batch get the logits of their own adapters, as where all go through one: of two rows."""
    ids = torch.arange(5, 17, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size

    def logits(rows: Sequence[str]) -> torch.Tensor:
        with _through(model, rows):
            return model(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]

    pair = [names[0], names[-1]]
    try:
        both, alone = logits(pair), torch.stack([logits([name] * 2)[row] for row, name in enumerate(pair)])
    except (
        ValueError,
        TypeError,
        IndexError,
    ):  # PEFT has no mixed batches for DoRA, experts in one tensor, modules trained whole
        return False
    return bool((both - alone).abs().max() <= 1e-3 * alone.abs().max())


@torch.no_grad()
def _side_by_side(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    positions: int | None,
    names: Sequence[str],
    prompts: Sequence[Sequence[int]],
    most: int,
) -> dict[str, list[str]]:
    """Answers of the attached adapters: a batch has prompts of one length, (B, S), once for each adapter."""
    found = {name: [""] * len(prompts) for name in names}
    ends = sorted(_ids(tokenizer.eos_token_id) | _ids(getattr(model.generation_config, "eos_token_id", None)))
    lengths = [len(prompt) for prompt in prompts]
    for length, group in groupby(sorted(range(len(prompts)), key=lengths.__getitem__), lengths.__getitem__):
        rows, new = list(group), max(1, min(most, positions - length if positions else most))
        # A configuration of our own: the model's may ask for sampling, and two runs are to give the same answers.
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=new, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
        )
        size = max(1, _most_rows(model, length + new) // len(names))
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            ids = torch.tensor([prompts[row] for row in part] * len(names), device=model.device)
            own = [name for name in names for _ in part]
            with _through(model, own) if len(names) > 1 else nullcontext():
                out: Any = model.generate(ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
            for number, answer in enumerate(out[:, length:].tolist()):
                text = text_of(tokenizer, takewhile(lambda id: id not in ends, answer))
                found[names[number // len(part)]][part[number % len(part)]] = text
    return found


def _most_rows(model: PreTrainedModel, tokens: int) -> int:
    """Rows of a batch whose keys and values, of all heads in float32, take half of the free memory at most."""
    config: Any = model.config.get_text_config()
    row_bytes = 8 * getattr(config, "num_hidden_layers", 1) * getattr(config, "hidden_size", 1) * tokens
    return min(MOST_ROWS[model.device.type], free_bytes(model.device) // 2 // row_bytes)


@contextmanager
def _through(model: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Send each row of a batch through the adapter of its name, by PEFT's mixed batches. Layers that see all tokens as
    one list of rows, as OPT's do, have a name for each token."""
    keys = [adapter_key(name) for name in names]

    def hook(_: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, given | {"adapter_names": [key for key in keys for _ in range(len(args[0]) // len(keys))]}

    with ExitStack() as hooks:
        for layer in adapted_modules(model):
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _ids(value: int | Sequence[int] | None) -> set[int]:
    """Return the ids of a field that holds one, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def text_of(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
