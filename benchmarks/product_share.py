"""Share of the machine's rate of plain matrix products that a pack's steps reach.

    python benchmarks/product_share.py --ranks 8,128 --steps 20 [--model MODEL --dataset DATASET]

Useful FLOPs are those of real tokens, LoRA's included (`rankscope.train.flops`). Plain products have the shapes of one
step, with operands still in the cache; they are timed before and after the steps. 1 would be a step that is nothing but
products of real tokens. Run it on an idle machine: both rates are only as good as the moment.
"""

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankscope.lora.adapters import remove_adapters
from rankscope.model.load import fingerprint, load_model
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble, comma_list
from rankscope.train import loop
from rankscope.train.flops import Products, product_rate
from rankscope.train.prepare import prepare_data
from rankscope.train.probe import use_own_forward
from rankscope.train.stopping import StopRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--ranks", default="8", help="one pack of these ranks")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int)
    options = vars(parser.parse_args())
    options["ranks"] = comma_list("ranks", options["ranks"])
    spec = assemble({}, options | {"seeds": [0]}, ["training.evals=1"])
    model, data = load_model(spec.model), prepare_data(spec)
    attention, weights, products, step = (
        model.config._attn_implementation,
        fingerprint(model),
        Products(),
        loop.train_step,
    )

    def train(spec: StudySpec) -> loop.PackRun:
        with TemporaryDirectory() as folder, StopRequest() as stop:
            trials, root = spec.trials(), Path(folder)
            folders = {trial.name: root / trial.name for trial in trials}
            run = loop.train_pack(model, spec, trials, folders, root / "checkpoints", data, "p000", weights, stop)
        use_own_forward(model, attention)
        remove_adapters(model)
        return run

    def counted(*arguments: Any) -> Any:
        with products:
            return step(*arguments)

    loop.train_step = counted
    train(spec.model_copy(update={"training": spec.training.model_copy(update={"steps": 1})}))
    loop.train_step = step
    rates = [product_rate(products.shapes, model.device, model.dtype)]
    run = train(spec)
    rates.append(product_rate(products.shapes, model.device, model.dtype))
    useful, plain = run.useful_flops / run.step_seconds, statistics.fmean(rates)
    print(
        f"{run.step_seconds / run.steps:.3g} s a step; {useful / 1e9:,.0f} useful GFLOP/s; plain products "
        f"{plain / 1e9:,.0f} GFLOP/s; share {useful / plain:.0%}"
    )


if __name__ == "__main__":
    main()
