"""Model cards, so that an adapter's folder can be shared as it is: its making, its losses, its use.

The form is the hub's (https://huggingface.co/docs/hub/model-cards); huggingface_hub writes the metadata.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from rankscope import __version__
from rankscope.data.doubts import data_warnings
from rankscope.files import write_atomic
from rankscope.hub import HUB_ID
from rankscope.report.markdown import escape, markdown_table
from rankscope.spec.candidates import PLAIN, Trial
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from rankscope.text.coverage import coverage_sentences
from rankscope.text.formats import Table, known, percent, rate, size
from rankscope.text.verdict import verdict_sentence

VARIANTS = {
    "rslora": "rsLoRA",
    "pissa": "PiSSA, saved as plain LoRA of twice the rank over the unchanged base model",
    "olora": "OLoRA, saved as plain LoRA of twice the rank over the unchanged base model",
    "loraplus": "LoRA+",
    "dora": "DoRA",
    "pattern": "ranks by layer (rank_pattern)",
}


def write_cards(evidence: Evidence, verdict: Mapping[str, Any], trials: Path) -> None:
    """Write README.md beside the weights of every finished trial in the folder `trials`."""
    for part in evidence.parts:
        results = {str(name): row for name, row in part.results.set_index("trial").T.to_dict().items()}
        for trial in part.spec.trials():
            if trial.name in results and results[trial.name]["status"] == "done":
                text = model_card(part, verdict, trial, results[trial.name])
                write_atomic(trials / trial.name / "adapter" / "README.md", text)


def model_card(evidence: Evidence, verdict: Mapping[str, Any], trial: Trial, results: Mapping[str, Any]) -> str:
    """Card of one trial's adapter; `results` is its row of `Study.results()`."""
    spec, candidate, machine, data = evidence.spec, trial.candidate, evidence.machine, evidence.data_facts
    text = load("en")
    metadata = ModelCardData(
        base_model=_on_the_hub(spec.model.id),
        datasets=list(filter(_on_the_hub, spec.data.ids)) or None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "rankscope"],
    )
    coverage = coverage_sentences(evidence.prediction.get("coverage"), [candidate.rank], text)
    modules, revision = candidate.target_modules, machine["model"].get("revision")
    facts = {
        "Base model": f"{spec.model.id}" + (f", revision {revision}" if revision else ""),
        "Data": f"{spec.data.name}: {data['rows_train']:,} rows, loss on {data['loss_on']}",
        "Rank": f"{candidate.rank}",
        **({} if candidate.variant == PLAIN else {"LoRA variant": VARIANTS[candidate.variant]}),
        "lora_alpha": f"{candidate.lora_alpha:g} (the update is scaled by {candidate.scaling:.4g})",
        "Target modules": modules if isinstance(modules, str) else ", ".join(modules),
        **({"Coverage": " ".join(coverage)} if coverage else {}),
        "LoRA dropout": f"{candidate.lora_dropout:g}",
        "Learning rate": f"{rate(candidate.learning_rate)}, {spec.training.lr_scheduler_type}",
        "Steps": f"{results['steps']:,.0f}, {spec.training.effective_batch_size} examples per step",
        "Seed": f"{trial.seed}",
        "Trainable parameters": f"{results['trainable_params']:,.0f}",
        "Size": size(results["adapter_bytes"]),
    }
    measured = {
        "Held-out loss": f"{results['eval_loss']:.4f} nats per label token, {data['rows_eval']:,} rows",
        "Perplexity": f"{results['eval_perplexity']:.4g}",
        "Token accuracy": percent(results["eval_accuracy"]) if known(results["eval_accuracy"]) else "unknown",
        "Training loss": f"{results['train_loss']:.4f}, mean over the last tenth of the steps",
    }
    fault = results.get("adapter_fault")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {escape(spec.name)}: {escape(trial.name)}",
        f"A LoRA adapter of rank {candidate.rank}, one of the {len(spec.trials())} trials of a rankscope study.",
        f"The study's verdict: {escape(verdict_sentence(verdict, 'en'))}",
        *(escape(text("caveat.warning", sentence=it)) for it in data_warnings(data, text)),
        *(
            [escape(text("caveat.warning", sentence=text("caveat.adapter_fault", fault=fault)))]
            if isinstance(fault, str)
            else []
        ),
        "## How it was made",
        _table(facts),
        "## What was measured",
        _table(measured),
        "## Use",
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER")\n```',
        "Prompts must have the format of the training data: see `template` in the study's study.yaml.",
        f"Made by rankscope {__version__} ({escape(versions)}).",
    ]
    return "\n\n".join(parts) + "\n"


def _on_the_hub(name: str) -> str | None:
    """The name if it is an id of the hub; None for a file, a folder, or embedded model and data."""
    return name if HUB_ID.fullmatch(name) and "/" in name and not Path(name).exists() else None


def _table(facts: Mapping[str, str]) -> str:
    return markdown_table(Table("", ["", ""], [False, False], [list(fact) for fact in facts.items()]))
