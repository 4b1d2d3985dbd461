"""Model cards, so that an adapter's folder can be shared as it is: its making, its losses, its use.

The form is the hub's (https://huggingface.co/docs/hub/model-cards); huggingface_hub writes the metadata.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCardData

from rankscope import __version__
from rankscope.data.doubts import data_warnings
from rankscope.data.formats import has_conversations
from rankscope.files import write_atomic
from rankscope.hub import HUB_ID
from rankscope.report.markdown import code_block, escape, markdown_table
from rankscope.spec.candidates import Trial
from rankscope.spec.models import DataSpec, is_jinja
from rankscope.spec.task import parse_task
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from rankscope.text.coverage import coverage_sentences
from rankscope.text.formats import Table, known, percent, rate, size
from rankscope.text.verdict import Verdict, verdict_sentence

VARIANTS = {
    "rslora": "rsLoRA",
    "pissa": "PiSSA, saved as plain LoRA of twice the rank over the unchanged base model",
    "olora": "OLoRA, saved as plain LoRA of twice the rank over the unchanged base model",
    "loraplus": "LoRA+",
    "dora": "DoRA",
    "pattern": "ranks by layer (rank_pattern)",
}


def write_cards(evidence: Evidence, verdict: Verdict, trials: Path) -> None:
    """Write README.md beside the weights of every finished trial in the folder `trials`."""
    for part, trial, results in done_trials(evidence):
        write_atomic(trials / trial.name / "adapter" / "README.md", model_card(part, verdict, trial, results))


def done_trials(evidence: Evidence) -> Iterator[tuple[Evidence, Trial, dict[str, Any]]]:
    """Trials that are done, with the part of the evidence that they are in, and their rows of `Study.results()`."""
    for part in evidence.parts:
        results = {str(name): row for name, row in part.results.set_index("trial").T.to_dict().items()}
        for trial in part.spec.trials():
            if trial.name in results and results[trial.name]["status"] == "done":
                yield part, trial, results[trial.name]


def model_card(
    evidence: Evidence,
    verdict: Verdict,
    trial: Trial,
    results: Mapping[str, Any],
    merged: str | None = None,
    as_exported: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Card of one trial's adapter, or of a model with weights of the type `merged`; `results` is its row of
    `Study.results()`, without an `eval_loss` where it was trained on all rows, and `as_exported` has what was measured
    of what `rankscope export` wrote."""
    spec, candidate, machine, data = evidence.spec, trial.candidate, evidence.machine, evidence.data_facts
    text, fault = load("en"), results.get("adapter_fault")
    package, kind = ("transformers", "AutoModelForCausalLM") if merged else ("peft", "AutoPeftModelForCausalLM")
    metadata = ModelCardData(
        base_model=spec.model.id if spec.model.commit else _on_the_hub(spec.model.id),
        datasets=[id for id in spec.data.ids if id in spec.data.commits or _on_the_hub(id)] or None,
        library_name=package,
        pipeline_tag="text-generation",
        tags=["lora", "rankscope"],
    )
    warnings = data_warnings(data, text)
    warnings += [text("caveat.adapter_fault", fault=fault)] if isinstance(fault, str) else []
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {escape(spec.name)}: {escape(trial.name)}",
        f"A LoRA adapter of rank {candidate.rank}, one of the {len(spec.trials())} trials of a rankscope study.",
        f"The study's verdict: {escape(verdict_sentence(verdict, 'en'))}",
        *(escape(text("caveat.warning", sentence=sentence)) for sentence in warnings),
        "## How it was made",
        _table(_making(evidence, trial, results, merged)),
        "## What was measured",
        _table(_measured(data, results) | _score(evidence, trial, results) | dict(as_exported)),
        "## Use",
        code_block(f'from {package} import {kind}\n\nmodel = {kind}.from_pretrained("PATH_OF_THIS_FOLDER")', "python"),
        *prompt_format(spec.data, data.get("format", "alpaca")),
        f"Made by rankscope {__version__} ({escape(versions)}).",
    ]
    return "\n\n".join(parts) + "\n"


def _making(evidence: Evidence, trial: Trial, results: Mapping[str, Any], merged: str | None) -> dict[str, str]:
    spec, candidate, data = evidence.spec, trial.candidate, evidence.data_facts
    modules, revision = candidate.target_modules, evidence.machine["model"].get("revision")
    held_out, names = known(results["eval_loss"]), " + ".join(map(_public_name, spec.data.ids))
    rows = data["rows_train"] + (0 if held_out else data["rows_eval"])
    coverage = coverage_sentences(evidence.prediction.get("coverage"), [candidate.rank], load("en"))
    facts = {
        "Base model": _public_name(spec.model.id) + (f", revision {revision}" if revision else ""),
        "Data": f"{names}: {rows:,} rows{'' if held_out else ', none held out'}, loss on {data['loss_on']}",
        "Rank": f"{candidate.rank}",
        "LoRA variant": VARIANTS.get(candidate.variant),
        "lora_alpha": f"{candidate.lora_alpha:g} (the update is scaled by {candidate.scaling:.4g})",
        "Target modules": modules if isinstance(modules, str) else ", ".join(modules),
        "Coverage": " ".join(coverage),
        "Merged": f"into the base model, as {merged}" if merged else None,
        "LoRA dropout": f"{candidate.lora_dropout:g}",
        "Learning rate": f"{rate(candidate.learning_rate)}, {spec.training.lr_scheduler_type}",
        "Steps": f"{results['steps']:,.0f}, {spec.training.effective_batch_size} examples per step",
        "Seed": f"{trial.seed}",
        "Trainable parameters": f"{results['trainable_params']:,.0f}",
        "Size": size(results["adapter_bytes"]),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _measured(data: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, str]:
    training = {"Training loss": f"{results['train_loss']:.4f}, mean over the last tenth of the steps"}
    if not known(results["eval_loss"]):
        return training
    return {
        "Held-out loss": f"{results['eval_loss']:.4f} nats per label token, {data['rows_eval']:,} rows",
        "Perplexity": f"{results['eval_perplexity']:.4g}",
        "Token accuracy": percent(results["eval_accuracy"]) if known(results["eval_accuracy"]) else "unknown",
    } | training


def _score(evidence: Evidence, trial: Trial, results: Mapping[str, Any]) -> dict[str, str]:
    """The adapter's score on the study's task, which one that was trained on all rows does not have."""
    scores, task = evidence.task_scores, evidence.spec.measure.task
    own: Any = [] if scores is None else scores.loc[scores["trial"] == trial.name, "score"]
    if task is None or not len(own) or not known(results["eval_loss"]):
        return {}
    name = PurePath(task).name if parse_task(task).code else task  # paths are of this machine alone
    return {f"Score on the task, {name}": f"{percent(sum(own) / len(own))}, {len(own):,} items"}


def prompt_format(spec: DataSpec, format: str) -> list[str]:
    """Paragraphs on how prompts of the training data were written, and so have to be: with the template itself."""
    if format == "text":
        return ["It was trained on plain text, without a template."]
    found = ["A prompt is given as it stands in the data."] if "prompt_completion" in format else []
    if has_conversations(format):
        own = spec.chat_template is not None and is_jinja(spec.chat_template)
        whose = "the study's own" if own else spec.chat_template or "that of the base model's tokenizer"
        found += [f"Messages are written by the chat template: {whose}."]
        return found + ([code_block(spec.chat_template or "")] if own else [])
    after = "its last white space" if spec.template[-1:].isspace() else "a space"
    found += [f"Prompts are written by this template; the answer follows after {after}:", code_block(spec.template)]
    if spec.template_without_input is None:
        return [*found, "Without an input, lines with `{input}` alone are left out."]
    return [*found, "Without an input, by this one:", code_block(spec.template_without_input)]


def _on_the_hub(name: str) -> str | None:
    """The name if it is an id of the hub; None for a file, a folder, or embedded model and data."""
    return name if HUB_ID.fullmatch(name) and "/" in name and not Path(name).exists() else None


def _public_name(source: str) -> str:
    """An id of the hub, or a file's or folder's name alone: a path says whose machine it was."""
    return _on_the_hub(source) or PurePath(source).name or source


def _table(facts: Mapping[str, str]) -> str:
    return markdown_table(Table("", ["", ""], [False, False], [list(fact) for fact in facts.items()]))
