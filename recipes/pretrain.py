"""Remake the embedded model: a byte-level BPE tokenizer and a small OPT, pretrained on Python source.

    python recipes/pretrain.py

writes `src/rankscope/demo/model/`, `recipes/results/pretrain.jsonl` (the curves), `pretrain.json` (the
summary) and `pretrain.svg`. The model has opt-350m's peculiarities in small: post-norm, and embeddings
narrower than the hidden size with a projection on each side, so that code that works on it covers them.
`recipes/README.md` has its cost.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from corpus import Corpus, SourceFile, read_corpus

ROOT = Path(__file__).resolve().parent.parent
MODEL_DIRECTORY = ROOT / "src" / "rankscope" / "demo" / "model"
RESULTS_DIRECTORY = Path(__file__).resolve().parent / "results"
SHIPPED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)

VOCAB_SIZE = 8192
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3, as in OPT
PAD_ID, END_ID = 1, 2
CONTEXT = 512  # tokens in a sequence, and the model's number of positions: none is left untrained


@dataclass(frozen=True)
class Settings:
    """Settings of the training run, besides the corpus.

    The defaults are the recipe; the command's options exist to try it in less time.
    """

    steps: int = 2196
    batch_sequences: int = 4
    learning_rate: float = 1.2e-3
    decay_fraction: float = 0.25
    final_learning_rate_fraction: float = 0.1
    warmup_steps: int = 150
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.1
    max_gradient_norm: float = 1.0
    seed: int = 0
    compiled: bool = True
    log_every: int = 20
    evaluate_every: int = 300


class HeldoutLoss(NamedTuple):
    """Loss on files that were not trained on: mean nats per token, and bits per UTF-8 byte of their text."""

    nats_per_token: float
    bits_per_byte: float


def train_tokenizer(files: tuple[SourceFile, ...]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that behaves as OPT's: `</s>` is bos and eos, and opens every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((file.text for file in files), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", END_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


def build_model() -> OPTForCausalLM:
    """Build the model with random weights. No dropout: most of the text is seen only once.

    OPT draws every weight with a deviation of 0.02, which suits a width of 1024 or more. At 256, a token
    behind the input projection is then a fifth of the size of its position, and post-norm makes that ratio
    permanent: training rests for hundreds of steps at the loss of token frequencies alone. So layers start at
    1/sqrt(inputs), and the input projection large enough for the token to outweigh its position.
    """
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=1024,
            word_embed_proj_dim=128,
            do_layer_norm_before=False,
            max_position_embeddings=CONTEXT,
            activation_function="relu",
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=PAD_ID,
            bos_token_id=END_ID,
            eos_token_id=END_ID,
        )
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue  # biases stay 0, layer norms 1
        if "embed_tokens" in name:
            deviation = 0.05
        elif "embed_positions" in name:
            deviation = 0.02
        elif "project_in" in name:
            deviation = 0.2
        else:
            deviation = parameter.shape[1] ** -0.5
            if name.endswith(("out_proj.weight", "fc2.weight")):
                deviation /= (2 * model.config.num_hidden_layers) ** 0.5  # as GPT-2 does with what it adds
        torch.nn.init.normal_(parameter, std=deviation)
    return model


def token_stream(tokenizer: PreTrainedTokenizerFast, files: tuple[SourceFile, ...]) -> torch.Tensor:
    """Lay the files' tokens end to end, each file closed by `</s>`. Returns int64 of shape (tokens,)."""
    encodings = tokenizer.backend_tokenizer.encode_batch([file.text for file in files], add_special_tokens=False)
    return torch.from_numpy(np.concatenate([np.array([*encoding.ids, END_ID]) for encoding in encodings]))


def cut_sequences(stream: torch.Tensor) -> list[torch.Tensor]:
    """Cut a stream into sequences of `CONTEXT` tokens, the last one shorter.

    Every sequence begins with an added `</s>`, as every text does that the tokenizer encodes; each token of
    the stream is so predicted exactly once.
    """
    end = torch.tensor([END_ID])
    return [torch.cat([end, piece]) for piece in stream.split(CONTEXT - 1)]


def shuffled_batches(sequences: torch.Tensor, batch_sequences: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of shape (batch_sequences, CONTEXT) forever, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=generator)
        for chosen in order.split(batch_sequences):
            if len(chosen) == batch_sequences:
                yield sequences[chosen]


def learning_rate_at(step: int, steps: int, settings: Settings) -> float:
    """Rise linearly over the warm-up, stay, and fall along a cosine over the last part of `steps`.

    `step` counts from 0. The rate stays in between, because the total is then needed only when the fall
    begins: `--minutes` sets it late, and the run is still the one that `--steps` with that total makes.
    """
    decay_start = int(steps * (1 - settings.decay_fraction))
    if step < decay_start:
        return settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
    progress = (step - decay_start) / (steps - decay_start)
    floor = settings.final_learning_rate_fraction
    return settings.learning_rate * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


@torch.no_grad()
def heldout_loss(model: OPTForCausalLM, sequences: list[torch.Tensor], text_bytes: int) -> HeldoutLoss:
    """Measure the loss in float32 on whole files: summed over all tokens, divided by tokens or by bytes."""
    model.eval()
    nats, tokens = 0.0, 0
    for sequence in sequences:
        predicted = len(sequence) - 1
        nats += float(model(input_ids=sequence[None], labels=sequence[None]).loss) * predicted
        tokens += predicted
    model.train()
    return HeldoutLoss(nats / tokens, nats / math.log(2) / text_bytes)


def save_model(model: OPTForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model in float16 beside `directory`, then swap it in: a stop leaves a whole model."""
    half = OPTForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    fresh, stale = directory.with_name("model.new"), directory.with_name("model.old")
    for left_over in (fresh, stale):
        shutil.rmtree(left_over, ignore_errors=True)
    half.half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        if path.name in SHIPPED_FILES:
            path.chmod(0o644)  # safetensors writes files that only their owner can read
        else:
            path.unlink()
    if directory.exists():
        directory.rename(stale)
    fresh.rename(directory)
    shutil.rmtree(stale, ignore_errors=True)


def draw_curves(records: list[dict[str, float]], path: Path) -> None:
    """Draw the training and held-out loss against the tokens seen."""
    points = [
        {"tokens": record["tokens"], "loss": record[key], "curve": label}
        for record in records
        for key, label in (("train_loss", "training batch"), ("heldout_nats_per_token", "held-out files"))
        if key in record
    ]
    chart = (
        alt.Chart(pd.DataFrame(points))
        .mark_line()
        .encode(
            x=alt.X("tokens:Q", title="tokens seen", axis=alt.Axis(format="~s")),
            y=alt.Y("loss:Q", title="loss (nats per token)", scale=alt.Scale(zero=False)),
            color=alt.Color("curve:N", title=None, scale=alt.Scale(range=["#d55e00", "#9ecae1"])),
            order="tokens:Q",
        )
        .properties(width=560, height=320, title="Pretraining the embedded model on Python's library")
    )
    chart.save(path)


def pretrain(
    settings: Settings,
    corpus: Corpus,
    model_directory: Path,
    results_directory: Path,
    minutes: float = math.inf,
) -> None:
    """Train the tokenizer and the model, writing the curves as it goes and the model at every evaluation.

    With `minutes`, the total number of steps is set on the way, so that the run takes about that long.
    """
    results_directory.mkdir(parents=True, exist_ok=True)
    model_directory.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    torch.manual_seed(settings.seed)

    tokenizer = train_tokenizer(corpus.part("pretrain"))
    train_stream = token_stream(tokenizer, corpus.part("pretrain"))
    train_sequences = torch.stack(cut_sequences(train_stream)[:-1])  # (sequences, CONTEXT)
    heldout_files = corpus.part("pretrain-heldout")
    heldout_sequences = cut_sequences(token_stream(tokenizer, heldout_files))
    heldout_bytes = sum(len(file.text.encode()) for file in heldout_files)

    model = build_model()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(settings.adam_beta1, settings.adam_beta2),
        fused=True,
    )
    train_model = torch.compile(model) if settings.compiled else model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {train_stream.numel():,} tokens in the corpus", flush=True)

    records: list[dict[str, float]] = []
    batches = shuffled_batches(train_sequences, settings.batch_sequences, settings.seed)
    step = tokens_seen = 0
    losses: list[float] = []
    with (results_directory / "pretrain.jsonl").open("w", encoding="utf-8") as log:
        while step < settings.steps:
            step += 1
            elapsed_minutes = (time.perf_counter() - started) / 60
            if elapsed_minutes > minutes * (1 - settings.decay_fraction):
                fitting_steps = math.ceil(step / (1 - settings.decay_fraction))
                settings = replace(settings, steps=min(settings.steps, fitting_steps))
                minutes = math.inf
            learning_rate = learning_rate_at(step - 1, settings.steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            batch = next(batches)  # (batch_sequences, CONTEXT)
            loss = train_model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
            optimizer.step()
            tokens_seen += batch.numel()
            losses.append(loss.item())

            evaluating = step % settings.evaluate_every == 0 or step == settings.steps
            if step % settings.log_every == 0 or evaluating:
                record = {
                    "step": step,
                    "tokens": tokens_seen,
                    "seconds": round(time.perf_counter() - started, 1),
                    "learning_rate": learning_rate,
                    "gradient_norm": round(gradient_norm.item(), 4),
                    "train_loss": round(sum(losses) / len(losses), 4),  # mean since the last record
                }
                losses.clear()
                if evaluating:
                    heldout = heldout_loss(model, heldout_sequences, heldout_bytes)
                    record["heldout_nats_per_token"] = round(heldout.nats_per_token, 4)
                    record["heldout_bits_per_byte"] = round(heldout.bits_per_byte, 4)
                    save_model(model, tokenizer, model_directory)
                    summary = {
                        "python_version": corpus.python_version,
                        "corpus_fingerprint": corpus.fingerprint,
                        "torch_version": torch.__version__,
                        "cpu_threads": torch.get_num_threads(),
                        "parameters": parameters,
                        "corpus_tokens": train_stream.numel(),
                        "heldout_bytes": heldout_bytes,
                        "steps_done": step,
                        "tokens_seen": tokens_seen,
                        "wall_seconds": round(time.perf_counter() - started, 1),
                        "heldout_nats_per_token": record["heldout_nats_per_token"],
                        "heldout_bits_per_byte": record["heldout_bits_per_byte"],
                        "settings": asdict(settings),
                    }
                    (results_directory / "pretrain.json").write_text(json.dumps(summary, indent=2) + "\n")
                records.append(record)
                log.write(json.dumps(record) + "\n")
                log.flush()
                print(json.dumps(record), flush=True)
    draw_curves(records, results_directory / "pretrain.svg")


def evaluate_shipped(corpus: Corpus, model_directory: Path) -> HeldoutLoss:
    """Measure a saved model as its user loads it: float16 weights, computed with in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_directory)
    model = OPTForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    heldout_files = corpus.part("pretrain-heldout")
    heldout_bytes = sum(len(file.text.encode()) for file in heldout_files)
    return heldout_loss(model, cut_sequences(token_stream(tokenizer, heldout_files)), heldout_bytes)


def main() -> None:
    """Run the recipe, or a shorter try of it with `--steps` and another output folder."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, default=math.inf, help="take fewer steps, to fit into this time")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--no-compile", action="store_true", help="where there is no C++ compiler: a third slower")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--try-in", type=Path, help="write model and results under this folder instead")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model that is there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model_directory = arguments.try_in / "model" if arguments.try_in else MODEL_DIRECTORY
    if arguments.evaluate:
        print(json.dumps(evaluate_shipped(read_corpus(), model_directory)._asdict()))
        return
    pretrain(
        Settings(steps=arguments.steps, learning_rate=arguments.learning_rate, compiled=not arguments.no_compile),
        read_corpus(),
        model_directory,
        arguments.try_in / "results" if arguments.try_in else RESULTS_DIRECTORY,
        arguments.minutes,
    )


if __name__ == "__main__":
    main()
