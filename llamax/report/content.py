"""The report's content in a reader's order: what each section says and shows, and what it says when data is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamax.report import plots, plots_fit
from llamax.report.blocks import Block, Bullets, Figures, Grid, Section, Tile, Tiles, Words
from llamax.report.branching import saving
from llamax.report.findings import answer, question, remarks, verdict, warnings, within
from llamax.report.read import flatten, number
from llamax.report.words import FORMULAS, LAWS, MISSING, SHORT_LAWS, count, decimals, duration, interval, plural, power
from llamax.train.goodput import shares

if TYPE_CHECKING:
    from llamax.report.study import Study


def sections(study: Study) -> tuple[Section, ...]:
    """The whole report. Every section is always there; one without data says what is missing and how to get it."""
    return (
        _summary(study),
        _warnings(study),
        _valleys(study),
        _allocation(study),
        _curves(study),
        _fit(study),
        _prediction(study),
        _runs(study),
        _plan(study),
        _method(study),
    )


# ---------------------------------------------------------------- findings
def _summary(study: Study) -> Section:
    tiles = _tiles(study)
    return Section(
        "summary",
        "In short",
        (Words(question(study)), *([Tiles(tiles)] if tiles else []), Bullets(tuple(answer(study)))),
    )


def _tiles(study: Study) -> tuple[Tile, ...]:
    claim = study.prediction
    advice = claim.get("recommendation") if isinstance(claim.get("recommendation"), Mapping) else {}
    tiles = []
    if advice:
        at = f"at {power(claim.get('flops'))} FLOPs"
        tiles.append(Tile("recommended size N", count(advice.get("n")), f"parameters {at}"))
        tiles.append(Tile("recommended data D", count(advice.get("d")), f"tokens {at}"))
    if number(claim.get("loss")) > 0:
        tiles.append(Tile("predicted loss", decimals(claim["loss"], 4), f"interval {interval(claim.get('interval'))}"))
    if number(claim.get("measured")) > 0:
        inside, signed = within(claim), 100 * (number(claim["measured"]) / number(claim["loss"]) - 1)
        note = (
            "no interval was given" if inside is None else "inside the interval" if inside else "outside the interval"
        )
        tiles.append(Tile("measured loss", decimals(claim["measured"], 4), "nats per token"))
        tiles.append(Tile("miss", f"{signed:+.2f} %", note, "" if inside is None else "good" if inside else "bad"))
    return tuple(tiles)


def _warnings(study: Study) -> Section:
    grave, said = warnings(study), remarks(study)
    blocks: list[Block] = [Bullets(tuple(grave), alarm=True)] if grave else []
    if said:
        blocks += [Words("Said by the plan, the fits and the prediction:"), Bullets(tuple(said))]
    nothing = Words("None: nothing in the plan, the runs, the fits or the prediction needs one.")
    return Section("warnings", "Warnings", tuple(blocks) or (nothing,))


def _valleys(study: Study) -> Section:
    picture = plots.valleys(study)
    title = "Valleys: loss against model size at equal compute"
    if picture is None:
        return _missing(
            "valleys", title, "no finished run carries a compute budget; a valley needs some of each budget."
        )
    blocks: list[Block] = [Figures((picture,))]
    if study.valleys:
        rows = [
            (
                power(v["budget"]), count(v.get("vertex")), count(v.get("vertex_d")), count(_ratio(v)),
                decimals(v.get("loss"), 4), decimals(v.get("curvature"), 3), decimals(v.get("residual"), 4),
                decimals(v.get("n_points"), 0), "inside" if v.get("interior") else "not inside",
            )
            for v in study.valleys
        ]  # fmt: skip
        head = (
            "budget C",
            "N at minimum",
            "D at minimum",
            "D / N",
            "loss there",
            "curvature",
            "residual",
            "runs",
            "minimum in the grid",
        )
        blocks.append(Grid(head, tuple(rows)))
        blocks.append(
            Words(
                "Curvature: nats per (natural log of N)². Residual: root mean square of loss minus parabola, nats.",
                small=True,
            )
        )
    else:
        blocks.append(
            Words("Missing: no stored fit of approach 2, so no parabolas; `llamax fit` on this folder makes one.")
        )
    return Section("valleys", title, tuple(blocks))


def _allocation(study: Study) -> Section:
    pictures = tuple(p for p in (plots.optimum(study, "n"), plots.optimum(study, "d")) if p)
    title = "Allocation: the best N and D against compute"
    if not pictures:
        return _missing(
            "allocation",
            title,
            "no budget has a fitted minimum inside its grid, so there is nothing to draw a power law through.",
        )
    fit, bounds = study.approach2, study.approach2.get("intervals") or {}
    rows = []
    for name, key in (("N", "n"), ("D", "d")):
        keys = (f"{key}_exponent", f"{key}_coefficient")
        rows.append(
            (
                f"best {name}, approach 2",
                decimals(fit.get(keys[0]), 4),
                interval(bounds.get(keys[0]), 4),
                decimals(fit.get(keys[1]), significant=4),
                interval(bounds.get(keys[1]), significant=4),
            )
        )
        for law in ("approach3", *(["coupled"] if study.coupled else [])):
            other = study.fits.get(law) or {}
            span = interval((other.get("intervals") or {}).get(keys[0]), 4)
            rows.append((f"best {name}, {SHORT_LAWS[law]}", decimals(other.get(keys[0]), 4), span, MISSING, MISSING))
    head = ("power law", "exponent of C", "interval", "coefficient", "interval")
    return Section("allocation", title, (Figures(pictures), Grid(head, tuple(rows))))


def _curves(study: Study) -> Section:
    pictures = tuple(p for p in (plots.loss_curves(study, "flops_6n"), plots.loss_curves(study, "tokens")) if p)
    block: Block = Figures(pictures) if pictures else Words("Missing: no run has logged a loss yet.")
    return Section("curves", "Loss curves", (block,))


def _fit(study: Study) -> Section:
    pictures = tuple(p for p in (plots_fit.measured_against_fitted(study), plots_fit.residuals(study)) if p)
    if study.law is None:
        return _missing(
            "fit", "The parametric fit", "no stored fit of a parametric law; `llamax fit` on this folder makes one."
        )
    names = [study.law_name, *(name for name in study.laws if name != study.law_name)]
    fits = [study.fits[name] for name in names]
    symbols = {"E": "E, nats per token", "A": "A", "B": "B", "alpha": "α", "beta": "β", "gamma": "γ"}
    head, rows = ["parameter"], [[symbol] for key, symbol in symbols.items() if any(key in f["params"] for f in fits)]
    for name, fit in zip(names, fits, strict=True):
        head += [SHORT_LAWS[name], "bootstrap interval"]
        bounds = fit.get("intervals") or {}
        for row, key in zip(rows, symbols, strict=False):
            fixed = "1" if key == "gamma" and key not in fit["params"] else MISSING
            row += [decimals(fit["params"].get(key), significant=5) if key in fit["params"] else fixed]
            row += [interval(bounds.get(key), significant=4)]
    notes = [_fit_note(LAWS[name], fit) for name, fit in zip(names, fits, strict=True)]
    if len(names) > 1:
        notes.append("The law of the smaller Akaike criterion makes the prediction; intervals mix both by its weights.")
    figures = (Figures(pictures),) if pictures else ()
    return Section(
        "fit",
        f"The parametric fit: {FORMULAS[study.law_name]}",
        (*figures, Grid(tuple(head), tuple(tuple(row) for row in rows)), *(Words(n, small=True) for n in notes)),
    )


def _fit_note(name: str, fit: Mapping[str, Any]) -> str:
    notes = [
        f"{name}: fitted to {plural(int(number(fit['n_points'])), 'run')}"
        if number(fit.get("n_points")) > 0
        else f"{name}: fitted"
    ]
    if number(fit.get("residual_percent")) > 0:
        notes.append(
            f"residuals of {decimals(fit['residual_percent'], significant=2)} % of the loss (root mean square)"
        )
    if number(fit.get("holdout_error_percent")) > 0:
        notes.append(
            f"{decimals(fit['holdout_error_percent'], significant=2)} % on the largest budget, fitted without it"
        )
    if fit.get("starts"):
        notes.append(f"{fit.get('starts_at_best')} of {fit['starts']} starts reached the best objective")
    return "; ".join(notes) + "."


def _prediction(study: Study) -> Section:
    title, claim = "The prediction, and what was measured", study.prediction
    pictures = tuple(p for p in (plots_fit.extrapolation(study), plots_fit.claim_interval(study)) if p)
    if not number(claim.get("loss")) > 0:
        return _missing("prediction", title, "no prediction has been stored for this study.")
    rows = [
        ("compute C", f"{power(claim.get('flops'), 3)} FLOPs"),
        ("the run: N, D", f"{count(claim.get('n'), 4)} parameters, {count(claim.get('d'), 4)} tokens"),
        ("predicted loss", f"{decimals(claim['loss'], 4)} nats per token"),
        (f"interval for one run, {100 * number(claim.get('level', 0.95)):.0f} %", interval(claim.get("interval"))),
        ("interval of the law alone", interval(claim.get("interval_mean"))),
        *((f"by {name}", decimals(loss, 4)) for name, loss in _other_laws(claim)),
        ("by approach 2's frontier", decimals(claim.get("loss_frontier"), 4)),
        ("measured loss", decimals(claim.get("measured"), 4)),
        ("rule", str(claim.get("rule") or MISSING)),
    ]
    figures = (Figures(pictures),) if pictures else ()
    shown = tuple(row for row in rows if row[1] != MISSING)
    return Section("prediction", title, (Words(verdict(study)), *figures, Grid(("", ""), shown, text=2)))


def _other_laws(claim: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What the laws that did not make the prediction say of the same run."""
    losses = claim.get("loss_by_law")
    losses = losses if isinstance(losses, Mapping) else {}
    return [(SHORT_LAWS.get(key, str(key)), loss) for key, loss in losses.items() if key != claim.get("law")]


# ---------------------------------------------------------------- records
def _runs(study: Study) -> Section:
    title = "The runs"
    if study.runs.empty:
        return _missing("runs", title, "there is no run directory in this folder yet.")
    head = (
        "run",
        "status",
        "budget",
        "N",
        "D",
        "D / N",
        "batch",
        "steps",
        "lr",
        "train loss",
        "held-out",
        "bits / byte",
        "fit residual",
        "epochs",
        "tokens / s",
        "time",
    )
    order = study.runs.assign(_b=study.runs["budget"].map(number)).sort_values(["_b", "n"], na_position="last")
    names = "name" if study.runs["name"].is_unique else "run"  # the hash is in the ledger; it only widens the table
    rows = tuple((row[names], *_run_row(study, row)) for row in order.to_dict("records"))
    note = (
        "N: parameters in matrix products. D: tokens. Losses in nats per token; the held-out loss is measured at "
        "the end of a run. Fit residual: held-out loss over the law's, in percent."
    )
    if study.runs["stage"].eq("branch").any():
        note += f" Branches of shared trunks: {saving(study.runs)}."
    return Section(
        "runs",
        title,
        (
            Words(f"{plural(len(rows), 'run directory').replace('directorys', 'directories')}. {note}", small=True),
            Grid(head, rows, text=2),
        ),
    )


def _run_row(study: Study, row: Mapping[Any, Any]) -> tuple[str, ...]:
    residual = (
        100 * (row["eval_loss"] / study.law_loss(row["n"], row["tokens"]) - 1)
        if study.law and row["n"] > 0 and row["tokens"] > 0
        else None
    )
    return (
        row["status"], _budget(row["budget"]),
        count(row["n"]), count(row["tokens"]), count(row["tokens"] / row["n"] if row["n"] > 0 else None),
        decimals(row["train.batch_size"], 0), decimals(row["steps"], 0), decimals(row["optimizer.lr"], significant=3),
        decimals(row["train_loss"], 4), decimals(row["eval_loss"], 4), decimals(row["eval_bits_per_byte"], 4),
        f"{residual:+.2f} %" if residual is not None and residual == residual else MISSING,
        decimals(row["epochs"], 2), count(row["tokens_per_second"]), duration(row["seconds"]),
    )  # fmt: skip


def _plan(study: Study) -> Section:
    title, rules = "The plan's rules", study.plan.get("rules")
    cells = [c for c in study.plan.get("cells") or () if isinstance(c, Mapping) and isinstance(c.get("rules"), Mapping)]
    blocks: list[Block] = []
    if isinstance(rules, Mapping) and rules:
        blocks.append(Grid(("what", "rule"), tuple((str(k), str(v)) for k, v in flatten(rules).items()), text=2))
    if cells:
        largest = max(
            cells, key=lambda c: number(c.get("n")) * number(c.get("tokens")) if number(c.get("tokens")) > 0 else 0.0
        )
        blocks.append(Words(f"Rules with the numbers of one cell, {largest.get('name')}:"))
        blocks.append(Grid(("what", "rule"), tuple((str(k), str(v)) for k, v in largest["rules"].items()), text=2))
    missing = Words("Missing: this folder has no plan.json with rules; the runs were not planned as a sweep.")
    return Section("plan", title, tuple(blocks) or (missing,))


def _method(study: Study) -> Section:
    level = f"{100 * number(study.fits.get('level', 0.95)):.0f} %"
    draws = [
        f"{a}: {(p.get('bootstrap') or {}).get('draws')}"
        for a, p in (
            ("approach 2", study.approach2),
            ("approach 3", study.approach3),
            ("the coupled law", study.coupled),
        )
        if (p.get("bootstrap") or {}).get("draws")
    ]
    facts = [
        "N counts the parameters that take part in matrix products (a lookup-only embedding is not among them). D "
        "counts training tokens. C = 6 N D training FLOPs on every axis; metrics.jsonl and the ledger hold the "
        "other conventions beside it.",
        "Losses are nats per token; the held-out loss is over files no run trained on.",
        "Approach 2: a parabola of loss in log N (and one in log D) per budget; power laws through the minima "
        "inside the grid (arXiv:2203.15556, section 3.2).",
        "Approach 3: one parametric law through all runs, Huber loss on log residuals, many starts (arXiv:"
        "2203.15556, section 3.3; arXiv:2404.10102).",
        "The coupled law, L = E + (A / N^α + B / D^β)^γ, fitted in the same way: there the slope in D depends on N "
        "(arXiv:2502.08606); γ = 1 is approach 3. Of the two, the law of the smaller Akaike criterion over all "
        "runs makes the prediction.",
        f"Intervals are {level} percentile intervals of a bootstrap over runs"
        + (f" (resamples, {'; '.join(draws)})." if draws else "."),
    ]
    blocks: list[Block] = [Bullets(tuple(facts))]
    spent = study.runs["seconds"].dropna()
    stages = [(str(k), duration(v)) for k, v in study.timings.items() if number(v) == number(v)]
    rows = [*stages, ("training, sum over runs", duration(spent.sum()) if len(spent) else MISSING)]
    rows += [(f"{kind}, sum over runs", duration(value)) for kind, value in study.spent.items()]
    blocks.append(Grid(("stage", "time"), tuple(rows)))
    if study.spent:
        blocks.append(Words(f"Of the time since the runs were first started: {shares(study.spent)}.", small=True))
    prints = [str(p) for p in study.runs["fingerprint"].dropna().unique()]
    environment = [("data fingerprint", p[:16]) for p in prints]
    for env in study.env:
        environment += [
            (key, _short(key, value)) for key, value in flatten(env).items() if value not in (None, "", "[]")
        ]
    if len(study.env) > 1:
        blocks.append(Words(f"The runs were made in {len(study.env)} different environments; all are listed."))
    blocks.append(
        Grid(("environment", ""), tuple(environment), text=2)
        if environment
        else Words("Missing: no run has an env.json, so versions and devices are not known.")
    )
    return Section("method", "How the numbers were made", tuple(blocks))


def _budget(label: Any) -> str:
    return power(label) if number(label) > 0 else label if isinstance(label, str) else MISSING


def _missing(key: str, title: str, what: str) -> Section:
    return Section(key, title, (Words(f"Missing: {what}"),))


def _ratio(valley: Mapping[str, Any]) -> float:
    n = number(valley.get("vertex"))
    return number(valley.get("vertex_d")) / n if n > 0 else float("nan")


def _short(key: str, value: Any) -> str:
    text = str(value)
    if key == "git.diff":
        return f"{len(text)} characters of uncommitted changes, kept in env.json"
    return text if len(text) <= 160 else f"{text[:150]}… ({len(text)} characters)"
