"""What `rankscope export` says: what is lost, the lines that serve it, what a server cannot read, what may be deleted.

vLLM pads an adapter to `--max-lora-rank`, one of `MaxLoRARanks` in vllm/config/lora.py (newer versions take 1 too), and
reads one alpha and one rank for all layers (vllm/lora/peft_helper.py). llama.cpp's convert_lora_to_gguf.py reads one
alpha, which is divided by each layer's rank.
"""

import math
import shlex
from pathlib import Path
from typing import Any

from rankscope.export.command import Result
from rankscope.export.write import Exported
from rankscope.files import folder_bytes
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, interval, loss, percent, signed, size, tabulate

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int | None:
    """The smallest `--max-lora-rank` that holds a rank; None where vLLM refuses it."""
    return next((size for size in VLLM_RANKS if size >= rank), None)


def refusals(made: Exported) -> dict[str, str]:
    """Why a server would refuse the adapter, or misread it: by server, a key of the catalogue, `export.refusal.…`."""
    layers, alpha = made.adapter.layers, float(made.config.lora_alpha)
    if made.merged:
        return {}
    if str(made.config.base_model_name_or_path).endswith(".gguf"):
        return dict.fromkeys(("transformers", "vLLM", "llama.cpp"), "gguf")
    if made.adapter.others:
        return dict.fromkeys(("vLLM", "llama.cpp"), "beside_factors")
    found = {"vLLM": "rank"} if vllm_rank(max(layer.rank for layer in layers)) is None else {}
    if not all(math.isclose(layer.scaling, alpha / made.config.r, rel_tol=1e-6) for layer in layers):
        found["vLLM"] = "scaling"
    if not all(math.isclose(layer.scaling, alpha / layer.rank, rel_tol=1e-6) for layer in layers):
        found["llama.cpp"] = "scaling"
    return found


def serving_lines(made: Exported) -> dict[str, str]:
    """Lines by server, without those that refuse the adapter."""
    folder, name, base = str(made.folder.absolute()), made.folder.name, str(made.config.base_model_name_or_path)
    package, kind = ("transformers", "AutoModelForCausalLM") if made.merged else ("peft", "AutoPeftModelForCausalLM")
    serve = ["vllm", "serve", folder]
    convert = ["python", "llama.cpp/convert_hf_to_gguf.py", folder, "--outfile", f"{name}.gguf"]
    if not made.merged:
        rank = vllm_rank(max(layer.rank for layer in made.adapter.layers))
        serve = ["vllm", "serve", base, *(["--revision", made.config.revision] if made.config.revision else [])]
        serve += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={folder}"]
        serve += ["--chat-template", f"{folder}/chat_template.jinja"] if made.own_template else []
        convert[1] = "llama.cpp/convert_lora_to_gguf.py"
        convert += ["--base", base] if Path(base).is_dir() else []
    python = f"from {package} import {kind}; model = {kind}.from_pretrained({folder!r})"
    found = {"transformers": python, "vLLM": shlex.join(serve), "llama.cpp": shlex.join(convert)}
    return {server: line for server, line in found.items() if server not in refusals(made)}


def deletable(result: Result) -> dict[str, int]:
    """Bytes of what the exported folder neither needs nor lies in: by key of the catalogue, `export.delete.…`."""
    study, own = result.study.path, result.study.trial_folder(result.trial) / "adapter"
    parts = {
        "checkpoints": [*study.glob("packs/*/checkpoints"), *study.glob("retrained/*/checkpoints")],
        "adapters": [folder for folder in study.glob("trials/*/adapter") if folder != own],
        "retrained": [study / "retrained"],
        "study": [study],
    }
    around = result.made.folder.resolve().parents
    sizes = {name: sum(folder_bytes(f) for f in of if f.resolve() not in around) for name, of in parts.items()}
    return {name: size for name, size in sizes.items() if size}


def describe(result: Result) -> dict[str, Any]:
    """Content of `--json`: bytes, nats per label token."""
    made, confidence = result.made, result.study.spec.verdict.confidence
    deployed = {}
    for form, (losses, lost) in result.deployed.items():
        low, high = lost.interval(confidence)
        about = {"lost": lost.mean, "rows": lost.examples, "lost_low": low, "lost_high": high}
        deployed[form] = {"loss": losses.mean, **about}
    return {
        "folder": str(made.folder),
        "bytes": folder_bytes(made.folder),
        "trial": result.trial.name,
        "seeds": result.seeds,
        "retrained": result.retrained,
        "merged": made.merged,
        "held_out_loss": result.before.mean,
        "deployed": deployed,
        "serve": serving_lines(made),
        "refused": refusals(made),
        "max_lora_rank": {rank: vllm_rank(rank) for rank in sorted(result.study.spec.ranks)},
        "deletable": deletable(result),
        "pushed": result.pushed,
    }


def lost_table(result: Result, text: Catalogue) -> Table:
    """Held-out loss in each form, and what is lost with its interval."""
    confidence, gain = result.study.spec.verdict.confidence, result.study.find_verdict().get("gain")
    columns: Columns = {
        text("export.form"): lambda row: row[0],
        text("export.loss"): lambda row: loss(row[1]),
        text("export.lost"): lambda row: _signed(row[2]) + interval(row[3], row[4], _signed),
    }
    columns |= {text("export.of_gain"): lambda row: f"{_signed(100 * row[2] / gain, 1)}%"} if gain else {}
    deployed = result.deployed.items()
    rows = [(form, losses.mean, lost.mean, *lost.interval(confidence)) for form, (losses, lost) in deployed]
    return tabulate("", columns, rows, [text("export.form")])


def _signed(value: float, digits: int = 4) -> str:
    return signed(round(value, digits) + 0.0, digits)  # no sign of a zero that is below


def sentences(result: Result, text: Catalogue) -> list[str]:
    """What was exported, the lines that serve it, which ranks a server takes, and what may be deleted."""
    made, seeds, losses = result.made, list(result.seeds.values()), result.before
    confidence = percent(result.study.spec.verdict.confidence)
    lines = [text("export.caption", confidence=confidence, before=loss(losses.mean), n=f"{len(losses.loss):,}")]
    chosen = {"trial": result.trial.name, "n": len(seeds), "mean": loss(sum(seeds) / len(seeds))}
    lines.append(text("export.one_seed" if len(seeds) == 1 else "export.seeds", **chosen))
    candidates = [one for one in result.study.trials if one.candidate == result.trial.candidate]
    if diverged := sum(result.study.trial_record(one).status == "diverged" for one in candidates):
        lines.append(text("export.diverged", n=diverged, all=len(candidates)))
    if result.retrained:
        lines.append(text("export.retrained"))
    lines.append(text("export.written", folder=made.folder, size=size(folder_bytes(made.folder))))
    for server, line in serving_lines(made).items():
        lines += [f"{server}:", f"  {line}"]
    lines += [text(f"export.refusal.{why}", server=server) for server, why in refusals(made).items()]
    if not made.merged:
        found = {rank: vllm_rank(rank) for rank in sorted(result.study.spec.ranks)}
        lines.append(text("export.ranks", known=", ".join(map(str, VLLM_RANKS))))
        if padded := [f"{rank} → {taken}" for rank, taken in found.items() if taken not in (rank, None)]:
            lines.append(text("export.padded", ranks=", ".join(padded)))
        if refused := [str(rank) for rank, taken in found.items() if taken is None]:
            lines.append(text("export.refused", ranks=", ".join(refused)))
    if left := deletable(result):
        lines.append(text("export.deletable"))
        lines += [f"  {text(f'export.delete.{key}', size=size(n))}" for key, n in left.items()]
    return [*lines, *([text("export.pushed", address=result.pushed)] if result.pushed else [])]
