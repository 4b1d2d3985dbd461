"""Greedy answers of several adapters side by side, in batches without padding: each is that of its prompt alone."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from rankscope.data.conversations import Tokenizer
from rankscope.data.questions import Question
from rankscope.lora.adapters import activate, outer_layers, remove_adapters
from rankscope.lora.layout import Layout, NotPackable, Segment, Unpackable, use_layout
from rankscope.lora.packed import own_forwards, pack_layers, replace_forward
from rankscope.lora.saved import attach, read_adapter
from rankscope.model.device import free_bytes
from rankscope.spec.task import BASE
from rankscope.train.probe import FAILURES, NEARNESS, in_float32

MOST_ROWS = 256  # of one batch; on 2 cores a row takes half as long as in batches of 64; not measured on a GPU


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
    questions: Sequence[Question],
    most: int,
    answered: Callable[[int], None] = lambda answers: None,
) -> dict[str, list[str]]:
    """Greedy answers to the questions, of `most` tokens at most, within the `positions` that the model has
    (`rankscope.model.load.most_positions`), by the name of each adapter; None is the model without one, which seldom
    ends an answer, and so has batches of its own. Each adapter has where `side_by_side` does not hold. `answered` is
    called with the number of answers of each batch."""
    adapters = {name: folder for name, folder in folders.items() if folder is not None}
    found: dict[str, list[str]] = {}
    if len(adapters) < len(folders):
        found[BASE] = _answers(model, tokenizer, positions, [BASE], questions, most, answered)[BASE]
    with adapters_on(model, adapters):
        if len(adapters) == 1 or (adapters and side_by_side(model, list(adapters))):
            return found | _answers(model, tokenizer, positions, list(adapters), questions, most, answered)
    for name, folder in adapters.items():
        found |= answers_of(model, tokenizer, positions, {name: folder}, questions, most, answered)
    return found


@torch.no_grad()
def side_by_side(model: PreTrainedModel, names: Sequence[str]) -> bool:
    """Have adapted layers send the rows of a batch, as many for each adapter and in the order of `names`, each through
    its own. False, with the model as it was, where the packed layers do not cover one, or rows get other logits than
    alone, as where experts in a list are given some tokens each."""
    ids = torch.arange(5, 17, device=model.device).view(2, 6) % model.config.get_text_config().vocab_size
    pair, alone = (names[0], names[-1]), list[Tensor]()

    def logits(rows: Tensor) -> Tensor:
        return model(input_ids=rows, use_cache=False).logits.float()  # type: ignore[no-any-return]

    with in_float32(model):
        for row, name in enumerate(pair):
            activate(model, name)
            alone.append(logits(ids[row : row + 1]))
        try:
            _send_parts(model, pair)
            difference = (logits(ids) - torch.cat(alone)).abs().max()
        except (NotPackable, *FAILURES):
            return False
        finally:
            own_forwards(model)
    if not difference <= NEARNESS * torch.cat(alone).abs().max():
        return False
    _send_parts(model, names)
    return True


def _send_parts(model: PreTrainedModel, names: Sequence[str]) -> None:
    pack_layers(model)
    for _, layer in outer_layers(model):
        replace_forward(layer, _of_equal_parts, layer.__dict__["forward"], names)


def _of_equal_parts(packed: Callable[..., Tensor], names: Sequence[str], x: Tensor, *others: Tensor) -> Tensor:
    """Packed forward of a layer, from (..., D) to (..., O), of tokens that belong to the adapters in equal parts: all
    of the rows, or the last of each beside kept keys and values and behind the trunk."""
    each, rest = divmod(x.shape[:-1].numel(), len(names))
    if rest:
        raise NotPackable(Unpackable.RESHAPES, "a layer was given unequal parts of the rows' tokens")
    segments = (Segment(name, each * n, each * (n + 1), (each,), ()) for n, name in enumerate(names))
    with use_layout(Layout(tuple(segments), each * len(names))):
        return packed(x, *others)


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    positions: int | None,
    names: Sequence[str],
    questions: Sequence[Question],
    most: int,
    answered: Callable[[int], None],
) -> dict[str, list[str]]:
    """Answers of the attached adapters: a batch has prompts of one length, (B, S), once for each adapter."""
    found = {name: [""] * len(questions) for name in names}
    ends = _ids(tokenizer.eos_token_id) | _ids(getattr(model.generation_config, "eos_token_id", None))
    ends |= ends_of(tokenizer, questions)
    lengths = [len(one.prompt_ids) for one in questions]
    for length, group in groupby(sorted(range(len(questions)), key=lengths.__getitem__), lengths.__getitem__):
        rows, new = list(group), max(1, min(most, positions - length if positions else most))
        # A configuration of our own: the model's may ask for sampling, and two runs are to give the same answers.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=sorted(ends) or None,  # without one, all rows end together and none is padded
            pad_token_id=min(ends, default=None),
            use_cache=True,
        )
        size = max(1, _most_rows(model, length + new) // len(names))
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            ids = torch.tensor([questions[row].prompt_ids for row in part] * len(names), device=model.device)
            out: Any = model.generate(ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
            for number, answer in enumerate(out[:, length:].tolist()):
                text = text_of(tokenizer, until(ends, answer))
                found[names[number // len(part)]][part[number % len(part)]] = text
            answered(len(out))
    return found


def ends_of(tokenizer: Tokenizer, questions: Iterable[Question]) -> set[int]:
    """Tokens that end the rows' own answers, of each its last special one: a chat template's end of a turn, which is
    not the eos token of many base models, and after which an adapter has learnt nothing."""
    special = set(tokenizer.all_special_ids)
    last = (next((id for id in reversed(one.reference_ids) if id in special), None) for one in questions)
    return {id for id in last if id is not None}


def until(ends: Collection[int], answer: Iterable[int]) -> Iterator[int]:
    return takewhile(lambda id: id not in ends, answer)


def _most_rows(model: PreTrainedModel, tokens: int) -> int:
    """Rows of a batch whose keys and values, of all heads in float32, take half of the free memory at most."""
    config: Any = model.config.get_text_config()
    row_bytes = 8 * getattr(config, "num_hidden_layers", 1) * getattr(config, "hidden_size", 1) * tokens
    return min(MOST_ROWS, free_bytes(model.device) // 2 // row_bytes)


def _ids(value: int | Sequence[int] | None) -> set[int]:
    """Return the ids of a field that holds one, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def text_of(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
