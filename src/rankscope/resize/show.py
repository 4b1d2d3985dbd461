"""A smaller adapter for people: ranks by module, what was kept and lost, and the cuts whose loss was measured."""

import pandas as pd

from rankscope.resize.command import LossChange, Resized
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, change, loss, percent, signed, signed_percent, size


def rank_table(layers: pd.DataFrame, text: Catalogue) -> Table:
    """The rank of each module before and after; `layers` is that of `rankscope.resize.command.Resized`."""
    grouped = layers.groupby("module", sort=False)
    table = pd.DataFrame(
        {
            "layers": grouped.size(),
            "before": grouped["old_rank"].mean(),
            "after": grouped["new_rank"].mean(),
            "lowest": grouped["new_rank"].min(),
            "highest": grouped["new_rank"].max(),
            "error": grouped["relative_error"].max(),
        }
    )
    headers = [text("spectrum.module"), text("spectrum.layers")]
    headers += [text(f"resize.{name}") for name in ("before", "after", "lowest", "highest", "error")]
    rows = [
        [
            str(module),
            f"{row['layers']:.0f}",
            f"{row['before']:.4g}",
            f"{row['after']:.4g}",
            f"{row['lowest']:.0f}",
            f"{row['highest']:.0f}",
            percent(row["error"]),
        ]
        for module, row in table.iterrows()
    ]
    return Table(text("resize.caption"), headers, [False, *[True] * 6], rows)


def tried_table(found: LossChange, text: Catalogue) -> Table:
    """The cuts whose held-out loss was measured, in their order."""
    names = ("rule", "parameters_column", "loss_column", "increase", "within")
    rows = [
        [
            text(f"resize.{one.rule}"),
            f"{one.parameters:,}",
            loss(one.losses.mean),
            signed_percent(one.increase),
            text("resize.yes" if one.increase <= found.limit else "resize.no"),
        ]
        for one in found.tried
    ]
    headers = [text(f"resize.{name}") for name in names]
    return Table(text("resize.tried"), headers, [False, True, True, True, False], rows)


def sentences(result: Resized, text: Catalogue) -> list[str]:
    """What became smaller, what was kept, and what the loss did."""
    worst = max(result.layers.to_dict("records"), key=lambda row: float(row["relative_error"]))
    (before, after), (old_bytes, new_bytes) = result.parameters, result.file_bytes
    lines = [
        text("resize.parameters", before=f"{before:,}", after=f"{after:,}", change=change(after, before)),
        text("resize.file", before=size(old_bytes), after=size(new_bytes), change=change(new_bytes, old_bytes)),
        text("resize.kept", kept=percent(result.kept_energy)),
        text("resize.worst", error=percent(worst["relative_error"]), layer=worst["layer"]),
    ]
    if result.loss is not None:
        found = result.loss
        error = found.difference.standard_error
        lines.append(
            text(
                "resize.loss",
                before=loss(found.before.mean),
                after=loss(found.after.mean),
                difference=signed(found.difference.mean),
                error="–" if error is None else f"{error:.4f}",
                n=f"{len(found.before.loss):,}",
                increase=signed_percent(found.increase),
                limit=percent(found.limit),
            )
        )
    lines.append(text("resize.written", folder=result.folder))
    return lines
