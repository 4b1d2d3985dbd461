"""Training with PEFT alone, written without rankscope: the reference for packed training."""

from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Module, Parameter
from transformers import PreTrainedModel

from rankscope.data.tokens import Example, Tokens
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import TrainingSpec
from rankscope.train.step import stream_seed

VOCAB = 131


class Trained(NamedTuple):
    losses: list[float]
    weights: dict[str, Tensor]


def make_trial(
    rank: int, rate: float, seed: int = 0, dropout: float = 0.0, modules: str | tuple[str, ...] = "all-linear"
) -> Trial:
    return Trial(
        candidate=Candidate(
            rank=rank,
            learning_rate=rate,
            lora_alpha=16,
            target_modules=modules,
            lora_dropout=dropout,
            use_rslora=False,
            init_lora_weights="kaiming",
        ),
        seed=seed,
    )


def random_tokens(examples: int, seed: int = 0, shortest: int = 4, longest: int = 20) -> Tokens:
    """Sequences of random ids; the last two thirds of each are labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(examples):
        length = int(rng.integers(shortest, longest))
        is_label = np.arange(length) > length // 3
        rows.append(Example(rng.integers(3, VOCAB, length).astype(np.int32), is_label))
    return Tokens.from_examples(rows)


def train_with_peft(
    model: PreTrainedModel, trial: Trial, tokens: Tokens, training: TrainingSpec, steps: int
) -> Trained:
    """Train by PEFT's forward, transformers' loss, AdamW and clipping, on right-padded batches and a linear schedule.

    With LoRA dropout the batch must be one sequence, whose dropout stream is set before the forward.
    """
    torch.manual_seed(trial.seed)
    modules = trial.candidate.target_modules
    config = LoraConfig(
        r=trial.candidate.rank,
        lora_alpha=trial.candidate.lora_alpha,  # type: ignore[arg-type]
        target_modules=modules if isinstance(modules, str) else list(modules),
        lora_dropout=trial.candidate.lora_dropout,
        use_dora=trial.candidate.variant == "dora",
        task_type="CAUSAL_LM",
        **trial.candidate.peft,
    )
    peft_model = get_peft_model(model, config)
    peft_model.eval()
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout.train()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=trial.candidate.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.999), eps=1e-8
    )
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = trial.candidate.learning_rate * (steps - step) / steps
        batch = padded_batch(tokens, trial.seed, step, training.batch_size)
        if trial.candidate.lora_dropout:
            assert len(batch.ids) == 1
            torch.manual_seed(stream_seed(trial.seed, step, 0))
        losses.append(plain_step(peft_model, batch, parameters, optimizer, training.max_grad_norm))
    weights = {n.replace(".default.", "."): p.detach() for n, p in peft_model.named_parameters() if p.requires_grad}
    return Trained(losses, weights)


class Batch(NamedTuple):
    """Right-padded, each (examples, longest)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor  # -100 where there is nothing to learn


def padded_batch(tokens: Tokens, seed: int, step: int, batch_size: int) -> Batch:
    """Batch of a trial with `seed` at `step`."""
    per_epoch = -(-len(tokens) // batch_size)
    order = np.random.default_rng([seed, step // per_epoch]).permutation(len(tokens))
    start = step % per_epoch * batch_size
    examples = order[start : start + batch_size]
    longest = max(len(tokens[int(i)].ids) for i in examples)
    ids = torch.ones(len(examples), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, i in enumerate(examples):
        sequence, is_label = (torch.from_numpy(part) for part in tokens[int(i)])
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence.long(), 1
        labels[row, : len(sequence)] = torch.where(is_label, sequence.long(), -100)
    return Batch(ids, mask, labels)


def plain_step(
    model: Module, batch: Batch, parameters: list[Parameter], optimizer: torch.optim.Optimizer, max_norm: float
) -> float:
    """One step by the model's own forward; returns the loss before it."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits  # transformers' own loss rounds to float32
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch.labels[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return float(loss.detach())
