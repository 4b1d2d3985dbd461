"""Figures of loss: above the best by rank, in training and against steps, and the map of learning rate and rank."""

import math

import altair as alt
import pandas as pd
from scipy import special

from rankscope.report import charts, frames
from rankscope.report.figures import Figure, Figures, curve_numbers, numbers, say, with_rates
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, column, loss, percent, rate, signed
from rankscope.text.verdict import Verdict, margin_unit

SMOOTHING_SHARE = 0.05  # share of a curve's points in the centred moving average
CONFIDENCE = 0.95  # of the interval of a difference in training loss


def loss_figures(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Held-out loss above the best, and training loss; by rate where there are several. Of several alphas each rank and
    rate has the verdict's, or else that of the lowest held-out loss."""
    table = frames.best_of(table, ["rank", "learning_rate"])
    found = [_above_best(evidence, verdict, table, text), _training_loss(evidence, table, text)]
    return [*found, _rate_map(evidence, verdict, table, text)] if len(evidence.spec.learning_rates) > 1 else found


def above_best(evidence: Evidence, table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of `table` with their held-out loss `above` that of the best candidate, in nats, with the verdict's interval
    `above_low above_high`, infinite for one that diverged; and `candidate rank learning_rate seed above` of each seed,
    beside the best candidate's loss with the same seed. Where the verdict compares none, the best is the one of the
    lowest mean."""
    known, compared = table.dropna(subset=["eval_loss"]), table.dropna(subset=["regret", "eval_loss"])
    best = (known if compared.empty else compared).sort_values("eval_loss").iloc[:1]
    above = table["regret"].fillna(table["eval_loss"] - best["eval_loss"].sum()).mask(table["diverged"] > 0, math.inf)
    found = table.assign(above=above).dropna(subset=["above"])
    found = found.rename(columns={"regret_low": "above_low", "regret_high": "above_high"})
    seeds = frames.heldout_by_seed(evidence)
    own = seeds[seeds["candidate"].isin(best["candidate"])].set_index("seed")["eval_loss"]
    seeds = seeds.assign(above=seeds["eval_loss"] - seeds["seed"].map(own)).dropna(subset=["above"])
    return found, seeds[seeds["candidate"].isin(found["candidate"])]


def _above_best(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figure | str:
    title, note, margin = text("chart.above_best.title"), text("chart.above_best.note"), _margin(verdict)
    found, seeds = above_best(evidence, table)
    finite = found[found["above"] < math.inf]
    if finite.empty:
        return text("chart.above_best.absent")
    if margin:
        shares = {"confidence": percent(verdict["confidence"]), "margin": percent(verdict["margin"])}
        note = f"{note} {text(f'chart.above_best.note_{margin_unit(verdict)}', **shares)}"
    of_seeds = seeds.groupby("candidate")["above"].agg(list)
    columns: Columns = {
        text("table.regret"): column("above", signed, text),
        text("chart.lowest"): column("above_low", signed, text),
        text("chart.highest"): column("above_high", signed, text),
        text("chart.seeds"): lambda row: ", ".join(map(signed, of_seeds.get(row["candidate"], []))),
    }
    chart = _above_chart(found, seeds, text, frames.ranks_of(evidence), margin)
    alternative, table_of = say(title, finite, "above", signed, text), numbers(title, finite, columns, text)
    return Figure("loss-above-best", title, with_rates(note, found, text), alternative, {"": chart}, table_of)


def _margin(verdict: Verdict) -> float:
    """How far above the best a loss may be, in nats; 0 where fine-tuning has gained nothing."""
    if not verdict.get("comparison"):
        return 0.0
    best = min(row["eval_loss"] for row in verdict["comparison"])
    of_gain = verdict.get("margin_of") == "gain"
    return max(0.0, float(verdict["margin"] * ((verdict["gain"] or 0.0) if of_gain else best)))


def _above_chart(
    found: pd.DataFrame, seeds: pd.DataFrame, text: Catalogue, ranks: list[int], margin: float
) -> alt.Chart:
    """`found` and `seeds` of `above_best`. The axis reaches as far as the compared candidates, others are arrows at its
    end. Losses up to `margin` nats above the best are shaded."""
    finite = found[found["above"] < math.inf]
    compared = finite.dropna(subset=["regret"])
    inside = finite if compared.empty else compared
    of_compared = seeds.loc[seeds["candidate"].isin(inside["candidate"]), "above"]
    y_range = charts.reach(0.0, margin, of_compared, *(inside[name] for name in ("above", "above_low", "above_high")))
    labels = [signed(value) if value < math.inf else text("status.diverged") for value in found["above"]]
    found, seeds = (part.assign(rate=part["learning_rate"].map(rate)) for part in (found.assign(label=labels), seeds))
    near = found.loc[found["above"] <= y_range[1], [*frames.KEYS, "rate", "above", "above_low", "above_high"]]
    far = found.loc[found["above"] > y_range[1], [*frames.KEYS, "rate", "label"]]
    y_range = y_range if far.empty else charts.room_for_arrows(y_range)
    x, y = charts.by_rank(found, text, ranks), charts.y_axis(text("table.regret"), y_range)
    of_rank = {**x, "color": charts.colour(ranks)}
    point = {**of_rank, "y": y("above"), "shape": charts.shape(ranks)}
    layers = []
    if margin:
        edge = alt.Chart(pd.DataFrame({"margin": [margin], "label": [text("chart.above_best.margin")]}))
        named = edge.mark_text(align="left", dy=10).encode(x=alt.value(8), y=y("margin"), text="label:N")
        layers = [charts.band((0.0, margin), y), named]
    layers.append(alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 4]).encode(y=y("zero")))
    layers += charts.intervals(near, y, of_rank, "above", strokeWidth=2.5)
    titles = {"above": "mean", "above_low": "lowest", "above_high": "highest"}
    tooltip = charts.candidate_tooltip(text, {f"{n}:Q": text(f"chart.{title}") for n, title in titles.items()}, "+.4f")
    means = alt.Chart(near).mark_point(filled=True, size=130, opacity=1)
    layers.append(means.encode(**point, tooltip=tooltip))
    of_seed = {"seed:O": text("chart.seed"), "above:Q": text("table.regret")}
    single = alt.Chart(seeds[seeds["above"].between(*y_range)])
    single = single.mark_point(size=30, opacity=0.7, xOffset=-12 if "xOffset" in x else -18)
    layers.append(single.encode(**point, tooltip=charts.candidate_tooltip(text, of_seed, "+.4f")))
    return charts.layered(*layers, *charts.beyond(far, x, ranks))


def training_loss(evidence: Evidence, candidates: "pd.Series[str]") -> frames.Binned:
    """`candidate rank learning_rate seed step train_loss` of these candidates, in nats. Only finished trials count, or
    all trials of a candidate without one; a candidate with a seed that diverged has no curve."""
    curves = _usable(evidence, "train_loss", candidates)
    curves = curves[curves["step"] > 0]
    if curves.empty:
        return frames.Binned(curves, 1)
    binned, width = frames.bin_steps(curves)
    means = binned.groupby([*frames.KEYS, "seed", "step"], observed=True)["train_loss"].mean().reset_index()
    return frames.Binned(means.astype({"candidate": "str"}), width)


def paired_difference(seeds: pd.DataFrame) -> pd.DataFrame:
    """`candidate rank learning_rate step mean low high`: a training loss minus the lowest rank's at the same step with
    the same seed, which had the same batch, smoothed; the mean over seeds, and its 95% interval by Student's t. With
    one seed there is no interval, and both ends are the mean."""
    lowest = seeds.loc[seeds["rank"] == seeds["rank"].min(), ["seed", "step", "train_loss"]]
    both = seeds.merge(lowest, on=["seed", "step"], suffixes=("", "_lowest"))
    window = max(3, round(both["step"].nunique() * SMOOTHING_SHARE))
    both["difference"] = both["train_loss"] - both["train_loss_lowest"]
    both["difference"] = both.groupby([*frames.KEYS, "seed"])["difference"].transform(
        lambda values: values.rolling(window, center=True, min_periods=1).mean()
    )
    found = both.groupby([*frames.KEYS, "step"])["difference"].agg(["mean", "sem", "count"]).reset_index()
    half = special.stdtrit(found.pop("count") - 1, (1 + CONFIDENCE) / 2) * found.pop("sem")
    return found.assign(low=found["mean"] - half.fillna(0.0), high=found["mean"] + half.fillna(0.0))


def _usable(evidence: Evidence, field: str, candidates: "pd.Series[str]") -> pd.DataFrame:
    """`candidate rank learning_rate seed step` and the field of `Evidence.curves`, where it has a value. A mean over a
    trial that stopped midway would jump where it stops."""
    trials = evidence.results[evidence.results["candidate"].isin(candidates)]
    trials = trials[~trials["candidate"].isin(trials.loc[trials["status"] == "diverged", "candidate"])]
    done = trials[trials["status"] == "done"]
    unfinished = trials[~trials["candidate"].isin(done["candidate"])]
    curves = evidence.curves
    kept = curves["trial"].isin([*done["trial"], *unfinished["trial"]]) & curves[field].notna()
    return curves.loc[kept, [*frames.KEYS, "seed", "step", field]]


def _training_loss(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure | str:
    """The difference to the lowest rank, and a thin line per trial with each rank's name at the end of its mean. With
    few seeds intervals are wide: the axis of the difference shows half of them whole."""
    title, best = text("chart.train_loss.title"), frames.best_of(table, ["rank"])
    seeds, steps_a_point = training_loss(evidence, best["candidate"])
    if seeds.empty:
        return text("chart.train_loss.absent")
    ranks, by, panels = frames.ranks_of(evidence), charts.along_steps(text), {}
    if seeds["rank"].nunique() > 1:
        found, y_title = paired_difference(seeds), text("chart.train_loss.y_difference")
        half = (found["high"] - found["mean"]).median()
        y_range = charts.reach(found["mean"] - half, found["mean"] + half)
        drawn = charts.layered(*charts.lines(found, text, ranks, y_title, y_range, "+.4f", by=by))
        panels[text("chart.train_loss.difference", rank=int(seeds["rank"].min()))] = drawn
    y_range = charts.reach(seeds["train_loss"])
    y = charts.y_axis(text("chart.train_loss.y"), y_range)
    thin = alt.Chart(seeds).mark_line(strokeWidth=0.8, opacity=0.5)
    thin = thin.encode(x=by.x, y=y("train_loss"), color=charts.colour(ranks), detail="seed:N")
    means = seeds.groupby([*frames.KEYS, "step"])["train_loss"].mean().rename("mean").reset_index()
    labels = charts.end_labels(means, text, ranks, by, y, y_range)
    panels[text("chart.train_loss.raw")] = charts.layered(thin, *labels)
    note = text("chart.train_loss.note", bins=text.count("steps", steps_a_point))
    table_of = curve_numbers(title, means, "mean", loss, text)
    return Figure("train-loss", title, note, say(title, best, "train_loss", loss, text), panels, table_of)


def heldout_by_step(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure | str:
    """Held-out loss against steps, of each rank's best candidate."""
    title, best = text("chart.eval_steps.title"), frames.best_of(table, ["rank"])
    frame = frames.mean_and_range(_usable(evidence, "eval_loss", best["candidate"]), "eval_loss")
    if frame.empty:
        return text("chart.eval_steps.absent")
    y_title, y_range = text("chart.eval_steps.y"), charts.reach(frame["low"], frame["high"])
    by, ranks = charts.along_steps(text), frames.ranks_of(evidence)
    chart = charts.layered(*charts.lines(frame, text, ranks, y_title, y_range, ".4f", by=by, points=True))
    last = frame[frame["step"] == frame.groupby("candidate")["step"].transform("max")]
    note = text("chart.eval_steps.note" if frames.compared_rows(evidence) is None else "chart.eval_steps.note_all")
    alternative, table_of = say(title, last, "mean", loss, text), curve_numbers(title, frame, "mean", loss, text)
    return Figure("heldout-loss-steps", title, note, alternative, {"": chart}, table_of)


def _rate_map(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figure | str:
    title = text("chart.rate_map.title")
    if table["eval_loss"].isna().all():
        return text("chart.above_best.absent")
    compared = [row["candidate"] for row in verdict.get("comparison", [])]  # may be chosen on other rows
    lowest = table.groupby("rank")["eval_loss"].transform("min") == table["eval_loss"]
    frame = table.assign(best=table["candidate"].isin(compared) if compared else lowest)
    cells = table.pivot(index="learning_rate", columns="rank", values="eval_loss")
    columns = {text("name.rank", rank=rank): column(rank, loss, text) for rank in cells}
    table_of = numbers(title, cells.reset_index(), columns, text)
    alternative, chart = say(title, table, "eval_loss", loss, text), _map_chart(frame, text, frames.ranks_of(evidence))
    return Figure("learning-rate-map", title, text("chart.rate_map.note"), alternative, {"": chart}, table_of)


def _map_chart(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> alt.Chart:
    """One cell per row of `by_candidate`, deeper for a lower loss. The `best` of each rank is bold."""
    values = frame[["candidate", "rank", "learning_rate", "eval_loss", "best"]]
    unknown = frame["diverged"].map(lambda seeds: text("status.diverged" if seeds else "none"))
    label = values["eval_loss"].map(loss).where(values["eval_loss"].notna(), unknown)
    values = values.assign(rate=values["learning_rate"].map(rate), label=label)
    losses = values["eval_loss"].dropna()
    # One rate that nearly diverged must not make all others look alike: above `highest`, cells are equally pale.
    lowest, highest = float(losses.min()), float(min(losses.max(), 2 * losses.median() - losses.min()))
    domain = [lowest, highest if highest > lowest else lowest + 1]
    depth = alt.Scale(domain=domain, range=[0.5, 0.04], clamp=True)
    rates = [rate(value) for value in sorted(values["learning_rate"].unique(), reverse=True)]
    y = alt.Y("rate:N", sort=rates, title=text("chart.learning_rate"), scale=alt.Scale(domain=rates))
    tooltip = charts.candidate_tooltip(text, {"eval_loss:Q": text("chart.eval_steps.y")}, ".4f")
    place = {"x": charts.rank_axis(text, ranks), "y": y, "tooltip": tooltip}
    cells = alt.Chart(values).mark_rect(style="cell-of-map")
    layers = [cells.encode(**place, opacity=alt.Opacity("eval_loss:Q", scale=depth, legend=None))]
    others = alt.Chart(values[~values["best"]]).mark_text(size=13)
    bold = alt.Chart(values[values["best"]]).mark_text(size=13, fontWeight="bold")
    layers += [words.encode(**place, text="label:N") for words in (others, bold)]
    return charts.layered(*layers).properties(height=max(120, 52 * len(rates)))
