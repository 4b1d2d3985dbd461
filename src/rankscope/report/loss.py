"""Figures of loss: against steps, against rank, and the map of learning rate and rank."""

from typing import Any

import altair as alt
import pandas as pd

from rankscope.report import charts, frames
from rankscope.report.figures import Figure, Figures, Missing, Panel, by_rate, curve_numbers, numbers, say, with_rates
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, loss, percent, rate, shown
from rankscope.text.verdict import Verdict, margin_unit

SMOOTHING_SHARE = 0.05  # share of a curve's points in the centred moving average


def loss_figures(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Training loss against steps, held-out loss against rank and steps, and by rate where there are several; of
    several alphas the verdict's, or else that of the lowest held-out loss at a rank and rate."""
    best_first = table.assign(other=table["regret"].isna()).sort_values(["other", "eval_loss"])
    table = table.loc[best_first.drop_duplicates(["rank", "learning_rate"]).index.sort_values()]
    found = [
        _training_loss(evidence, table, text),
        _heldout_by_rank(evidence, verdict, table, text),
        _heldout_by_step(evidence, table, text),
    ]
    return [*found, _rate_map(evidence, verdict, table, text)] if len(evidence.spec.learning_rates) > 1 else found


def training_loss(evidence: Evidence) -> frames.Binned:
    """`candidate rank learning_rate step mean low high smooth_mean smooth_low smooth_high` over seeds, in nats. A mean
    over a trial that stopped midway would jump where it stops, so only finished trials count, or all trials of a
    candidate without one; a candidate with a seed that diverged has no curve."""
    curves = _usable(evidence, "train_loss")
    curves = curves[curves["step"] > 0]
    if curves.empty:
        return frames.Binned(curves, 1)
    binned, width = frames.bin_steps(curves)
    seeds = binned.groupby([*frames.KEYS, "seed", "step"], observed=True)["train_loss"].mean().reset_index()
    window = max(3, round(seeds["step"].nunique() * SMOOTHING_SHARE))
    seeds["smooth"] = seeds.groupby([*frames.KEYS, "seed"], observed=True)["train_loss"].transform(
        lambda losses: losses.rolling(window, center=True, min_periods=1).mean()
    )
    names = {name: f"smooth_{name}" for name in ("mean", "low", "high")}
    smooth = frames.mean_and_range(seeds, "smooth").rename(columns=names)
    return frames.Binned(frames.mean_and_range(seeds, "train_loss").merge(smooth, on=[*frames.KEYS, "step"]), width)


def _usable(evidence: Evidence, column: str) -> pd.DataFrame:
    """`candidate rank learning_rate seed step` and the column of `Evidence.curves`, where it has a value."""
    status = evidence.results.set_index("trial")[["candidate", "status"]]
    status = status[~status["candidate"].isin(status.loc[status["status"] == "diverged", "candidate"])]
    done = status[status["status"] == "done"]
    unfinished = status[~status["candidate"].isin(done["candidate"])]
    curves = evidence.curves
    kept = curves["trial"].isin([*done.index, *unfinished.index]) & curves[column].notna()
    return curves.loc[kept, [*frames.KEYS, "seed", "step", column]]


def _training_loss(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure | Missing:
    name, title = "train-loss", text("chart.train_loss.title")
    frame, steps_a_point = training_loss(evidence)
    frame = frame[frame["candidate"].isin(table["candidate"])]
    if frame.empty:
        return Missing(name, text("chart.train_loss.absent"))
    ranks = frames.ranks_of(evidence)
    panels = by_rate(frame, text, lambda rows, y: _training_chart(rows, text, ranks, y))
    note = text("chart.train_loss.note", bins=text.count("steps", steps_a_point))
    alternative = say(title, table, "train_loss", loss, text)
    return Figure(name, title, note, alternative, panels, curve_numbers(title, frame, "smooth_mean", loss, text))


def _training_chart(frame: pd.DataFrame, text: Catalogue, ranks: list[int], y_range: tuple[float, float]) -> alt.Chart:
    """Curves of `training_loss`; a switch chooses the smoothed ones."""
    switch = alt.param(name="smooth", value=True, bind=alt.binding_checkbox(name=text("chart.smooth")))
    base = alt.Chart(frame).transform_calculate(
        shown="smooth ? datum.smooth_mean : datum.mean",
        shown_low="smooth ? datum.smooth_low : datum.low",
        shown_high="smooth ? datum.smooth_high : datum.high",
    )
    title, axis = text("chart.train_loss.y"), charts.steps_axis(text)
    layers = charts.lines(frame, text, ranks, title, y_range, ".4f", along=axis, base=base)
    return charts.layered(*layers).add_params(switch)


def _heldout_by_step(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure | Missing:
    name, title = "heldout-loss-steps", text("chart.eval_steps.title")
    frame = frames.mean_and_range(_usable(evidence, "eval_loss"), "eval_loss")
    frame = frame[frame["candidate"].isin(table["candidate"])]
    if frame.empty:
        return Missing(name, text("chart.eval_steps.absent"))
    ranks, axis = frames.ranks_of(evidence), charts.steps_axis(text)

    def draw(rows: pd.DataFrame, y_range: tuple[float, float]) -> alt.Chart:
        y_title = text("chart.eval_steps.y")
        return charts.layered(*charts.lines(rows, text, ranks, y_title, y_range, ".4f", along=axis, points=True))

    last = frame[frame["step"] == frame.groupby("candidate")["step"].transform("max")]
    alternative = say(title, last, "mean", loss, text)
    table_of = curve_numbers(title, frame, "mean", loss, text)
    note = text("chart.eval_steps.note" if frames.compared_rows(evidence) is None else "chart.eval_steps.note_all")
    return Figure(name, title, note, alternative, by_rate(frame, text, draw), table_of)


def _heldout_by_rank(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figure | Missing:
    name, title = "heldout-loss-rank", text("chart.eval_by_rank.title")
    seeds = frames.heldout_by_seed(evidence)
    seeds = seeds[seeds["candidate"].isin(table["candidate"])]
    if seeds.empty:
        return Missing(name, text("chart.eval_by_rank.absent"))
    finished = table.dropna(subset=["eval_loss"])
    margin, note = _margin(verdict), text("chart.eval_by_rank.note")
    if verdict is not None and margin is not None:
        shares = {"least": percent(1 - verdict["margin"]), "margin": percent(verdict["margin"])}
        key = f"chart.eval_by_rank.note_{margin_unit(verdict)}"
        note = text(key, confidence=percent(verdict["confidence"]), **shares)
        if finished["learning_rate"].nunique() > 1:
            note = f"{note} {text('chart.eval_by_rank.rates')}"
    chart = _heldout_chart(seeds, finished, text, frames.ranks_of(evidence), margin)
    by_candidate = seeds.groupby("candidate")["eval_loss"]
    columns: Columns = {
        text("table.rank"): lambda row: str(row["rank"]),
        text("table.learning_rate"): lambda row: rate(row["learning_rate"]),
        text("chart.mean"): lambda row: loss(row["eval_loss"]),
        text("chart.lowest"): lambda row: shown(row["eval_loss_low"], loss, text),
        text("chart.highest"): lambda row: shown(row["eval_loss_high"], loss, text),
        text("chart.seeds"): lambda row: ", ".join(map(loss, by_candidate.get_group(row["candidate"]))),
    }
    alternative = say(title, finished, "eval_loss", loss, text)
    table_of = numbers(title, columns, finished.to_dict("records"), text)
    return Figure(name, title, with_rates(note, finished, text), alternative, [Panel("", chart)], table_of)


def _margin(verdict: Verdict) -> tuple[float, float] | None:
    """Losses that are good enough beside the best one, in nats; None where fine-tuning has gained nothing."""
    if verdict is None or not verdict["comparison"]:
        return None
    best = min(row["eval_loss"] for row in verdict["comparison"])
    whole = (verdict["gain"] or 0.0) if verdict.get("margin_of") == "gain" else best
    return (best, best + verdict["margin"] * whole) if whole > 0 else None


def _heldout_chart(
    seeds: pd.DataFrame, candidates: pd.DataFrame, text: Catalogue, ranks: list[int], margin: tuple[float, float] | None
) -> alt.Chart:
    """`seeds` is `heldout_by_seed`, `candidates` are rows of `by_candidate`; `margin` is shaded, in nats."""
    columns = [*frames.KEYS, "eval_loss", "eval_loss_low", "eval_loss_high"]
    seeds = seeds.assign(rate=seeds["learning_rate"].map(rate))
    candidates = candidates[columns].assign(rate=candidates["learning_rate"].map(rate))
    x, of_rank, y = charts.by_rank(seeds, text, ranks), charts.colour(ranks, text), charts.loss_axis(text)
    points = {**x, "y": y, "color": of_rank, "shape": charts.shape(ranks, text)}
    layers = [charts.band(margin, charts.loss_scale())] if margin is not None else []
    layers += charts.loss_intervals(candidates, text, {**x, "color": of_rank}, strokeWidth=2.5)
    means = alt.Chart(candidates).mark_point(filled=True, size=130, opacity=1)
    layers.append(means.encode(**points, tooltip=charts.candidate_tooltip(text, charts.loss_titles(text), ".4f")))
    of_seed = {"seed:O": text("chart.seed"), "eval_loss:Q": text("chart.eval_by_rank.y")}
    single = alt.Chart(seeds).mark_point(size=40, opacity=0.85, xOffset=-12 if "xOffset" in x else -18)
    layers.append(single.encode(**points, tooltip=charts.candidate_tooltip(text, of_seed, ".4f")))
    return charts.layered(*layers)


def _rate_map(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figure | Missing:
    name, title, ranks = "learning-rate-map", text("chart.rate_map.title"), frames.ranks_of(evidence)
    if table["eval_loss"].isna().all():
        return Missing(name, text("chart.eval_by_rank.absent"))
    compared = [row["candidate"] for row in (verdict or {}).get("comparison", [])]  # may be chosen on other rows
    lowest = table.groupby("rank")["eval_loss"].transform("min") == table["eval_loss"]
    frame = table[["candidate", "rank", "learning_rate", "eval_loss"]].assign(
        best=table["candidate"].isin(compared) if compared else lowest,
        note=[text("status.diverged" if diverged else "none") for diverged in table["diverged"]],
    )
    cells = frame.set_index(["learning_rate", "rank"])["eval_loss"]
    columns: Columns = {text("table.learning_rate"): rate}
    for rank in ranks:
        header = text("name.rank", rank=rank)
        columns[header] = lambda value, rank=rank: shown(cells.get((value, rank)), loss, text)  # type: ignore[misc]
    alternative = say(title, table, "eval_loss", loss, text)
    table_of = numbers(title, columns, sorted(frame["learning_rate"].unique()), text)
    panels = [Panel("", _map_chart(frame, text, ranks))]
    return Figure(name, title, text("chart.rate_map.note"), alternative, panels, table_of)


def _map_chart(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> alt.Chart:
    """`rank learning_rate eval_loss best note`: one cell per candidate, deeper for a lower loss, with `note` in place
    of an unknown one. The `best` of each rank is bold."""
    values = frame.assign(rate=frame["learning_rate"].map(rate), label=frame["eval_loss"].map(loss))
    values["label"] = values["label"].where(values["eval_loss"].notna(), values["note"])
    losses = values["eval_loss"].dropna()
    # One rate that nearly diverged must not make all others look alike: above `highest`, cells are equally pale.
    lowest, highest = float(losses.min()), float(min(losses.max(), 2 * losses.median() - losses.min()))
    domain = [lowest, highest if highest > lowest else lowest + 1]
    depth = alt.Scale(domain=domain, range=[0.5, 0.04], clamp=True)
    rates = [rate(value) for value in sorted(values["learning_rate"].unique(), reverse=True)]
    x = charts.rank_axis(text, ranks)
    y = alt.Y("rate:N", sort=rates, title=text("chart.learning_rate"), scale=alt.Scale(domain=rates))
    tooltip = charts.candidate_tooltip(text, {"eval_loss:Q": text("chart.eval_by_rank.y")}, ".4f")
    opacity = alt.Opacity("eval_loss:Q", scale=depth, legend=None)
    cells = alt.Chart(values).mark_rect(style="cell-of-map").encode(x=x, y=y, opacity=opacity, tooltip=tooltip)
    label: dict[str, Any] = {"x": x, "y": y, "text": "label:N", "tooltip": tooltip}
    best = alt.Chart(values[values["best"]]).mark_text(size=13, fontWeight="bold").encode(**label)
    others = alt.Chart(values[~values["best"]]).mark_text(size=13).encode(**label)
    return charts.layered(cells, others, best).properties(height=max(120, 52 * len(rates)))
