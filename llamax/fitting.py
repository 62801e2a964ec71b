"""`llamax fit`: from a study directory or a table of runs to fits, a recommendation and a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamax.columns import find_columns, need_columns, read_runs, runs_to_fit
from llamax.console import AtHand, Json, print_json, show
from llamax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

POWER_LAWS = ("n_exponent", "n_coefficient", "d_exponent", "d_coefficient")
TABLE_LAWS = {"chinchilla": "approach3", "coupled": "coupled"}


@dataclass(frozen=True)
class FitOptions:
    """What `llamax fit` was asked for; a column of None is looked for under its usual names.

    law: a name of the registry, or None: Chinchilla and coupled law, compared. formula: a law written out, instead.
    approaches: empty means 2 and 3 where there are budgets, 3 alone where a law is named. extra: columns of other
    inputs of a law, by the law's name for them.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    group: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    approaches: tuple[int, ...] = ()
    law: str | None = None
    formula: str | None = None
    vertex: str = "parabola"
    method: str = "huber"
    delta: float = 1e-3
    log: bool = True
    bootstrap: int = 300
    seed_noise: float | Literal["replicates"] | None = None
    profile: tuple[str, ...] = ()
    seed: int = 0
    at: float | None = None
    inference_tokens: float | None = None
    unique_tokens: float | None = None
    count: str | None = None
    flop_count: str | None = None


def fit(
    data: Annotated[Path, AtHand(help="A study directory, or a CSV or Parquet table of runs.")],
    n: Annotated[str | None, typer.Option(help="Column of parameters; default n.")] = None,
    d: Annotated[str | None, typer.Option(help="Column of training tokens; default tokens, else FLOPs / 6 n.")] = None,
    loss: Annotated[str | None, typer.Option(help="Column of loss, nats per token; default eval_loss, loss.")] = None,
    flops: Annotated[str | None, typer.Option(help="Column of training FLOPs; default flops_6n, else 6 n d.")] = None,
    budget: Annotated[str | None, typer.Option(help="Column of the nominal budget, for approach 2.")] = None,
    group: Annotated[
        str | None, typer.Option(help="Column that names a run or cluster: the bootstrap draws whole ones.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Another input of a law, as name=COL; may be repeated.", metavar="NAME=COL")
    ] = None,
    count: Annotated[str | None, typer.Option(help="Count of n in a ledger: matmul, total or active.")] = None,
    flop_count: Annotated[str | None, typer.Option(help="FLOPs of a ledger: 6n, chinchilla, palm or causal.")] = None,
    law: Annotated[
        str | None, typer.Option(help="A law of the registry; default chinchilla, compared with coupled.")
    ] = None,
    formula: Annotated[str | None, typer.Option(help="A law written out: 'E + A/n**alpha + B/d**beta'.")] = None,
    approach: Annotated[
        list[int] | None, typer.Option(help="1 (envelope), 2 (valleys) or 3 (parametric); default 2 and 3.")
    ] = None,
    vertex: Annotated[str, typer.Option(help="Of a valley of approach 2: parabola or akima.")] = "parabola",
    method: Annotated[str, typer.Option(help="huber, lad, mse, or vp (variable projection).")] = "huber",
    delta: Annotated[float, typer.Option(help="Huber threshold.")] = 1e-3,
    linear: Annotated[bool, typer.Option("--linear", help="Residuals in nats per token, not of log loss.")] = False,
    bootstrap: Annotated[int, typer.Option(help="Resamples for the intervals; 0 for none.")] = 300,
    seed_noise: Annotated[
        str | None, typer.Option(help="Draw noise of this size in log loss, or of 'replicates', instead of runs.")
    ] = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="Profile likelihood of a parameter; with --at of n_opt, d_opt, ... loss.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    at: Annotated[float | None, typer.Option(help="Recommend and predict at this many training FLOPs.")] = None,
    inference_tokens: Annotated[
        float | None, typer.Option(help="With --at: tokens the model will serve; the cheapest of that quality.")
    ] = None,
    unique_tokens: Annotated[
        float | None, typer.Option(help="With --at: distinct tokens there are; the best N and epochs.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit scaling laws with intervals to a study or to any table of runs."""
    from llamax.fit_tables import fit_tables
    from llamax.mesh.start import start

    options = FitOptions(
        columns={"n": n, "d": d or None, "loss": loss, "flops": flops, "budget": budget},
        group=group,
        extra=dict(_pair(text) for text in column or ()),
        approaches=tuple(sorted(set(approach or ()))),
        law=law,
        formula=formula,
        vertex=vertex,
        method=method,
        delta=delta,
        log=not linear,
        bootstrap=bootstrap,
        seed_noise=_noise(seed_noise),
        profile=tuple(profile or ()),
        seed=seed,
        at=at,
        inference_tokens=inference_tokens,
        unique_tokens=unique_tokens,
        count=count,
        flop_count=flop_count,
    )
    start()
    result = fit_data(data, options)
    if as_json:
        print_json(result)
    else:
        show(*fit_tables(result))


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not (name and equals and column):
        raise UserError(f"column {text!r}: write it as name=COLUMN, such as unique_tokens=unique")
    return name, column


def _noise(text: str | None) -> float | Literal["replicates"] | None:
    if text is None or text == "replicates":
        return text  # type: ignore[return-value]
    try:
        return float(text)
    except ValueError:
        raise UserError(f"seed noise: {text!r}; give its size in log loss, such as 0.005, or replicates") from None


def fit_data(path: Path, options: FitOptions) -> dict[str, Any]:
    """Fits as a dict. Of approach 3: `params`, `objective`, `intervals`; of approach 2: `n_exponent`, `n_coefficient`,
    `d_exponent`, `d_coefficient`, `budgets`; always `n_points` and `warnings`; the full records under `approach2`,
    `approach3`, `coupled`; with a compute to answer at also `n_opt, d_opt, tokens_per_param, loss`.

    Raises:
        UserError: no such table, or a table that cannot be fitted.
    """
    from llamax.scaling.caveats import bootstrap_words, checkpoint_words, run_words
    from llamax.scaling.laws import check_flops

    frame, words = runs_to_fit(path, read_runs(path))
    asked = {**options.columns, "run": options.group}
    columns = find_columns(frame, asked, count=options.count, flop_count=options.flop_count)
    words += checkpoint_words(frame, columns)
    words += run_words(frame, options.extra.get("epochs"))
    words += bootstrap_words(options.bootstrap, options.seed)
    if options.at is not None:
        check_flops(options.at)
    elif options.inference_tokens is not None or options.unique_tokens is not None:
        raise UserError("inference_tokens, unique_tokens: give the training FLOPs to answer at, --at")
    if 1 in options.approaches:
        return _fit_envelope(frame, columns, options, words)
    if options.formula is not None or (options.law is not None and options.law not in TABLE_LAWS):
        return _fit_registered(frame, columns, options, words)
    return _fit_table(frame, columns, options, words)


def _fit_table(
    frame: pd.DataFrame, columns: dict[str, str | None], options: FitOptions, words: list[str]
) -> dict[str, Any]:
    """The Chinchilla and coupled laws, and approach 2."""
    from llamax.scaling import fit_frame

    need_columns(frame, columns, "--{role} COLUMN")
    approaches = options.approaches or ((3,) if options.law else (2, 3))
    if columns["budget"] is None and not options.approaches:
        approaches = (3,)
    if options.method == "vp" and options.law == "coupled":
        raise UserError("method vp: the coupled law is not linear in A and B; use huber, lad or mse")
    fit = fit_frame(
        frame,
        approaches,
        **columns,  # type: ignore[arg-type]
        laws=(TABLE_LAWS[options.law],) if options.law else tuple(TABLE_LAWS.values()),
        vertex=options.vertex,
        method=options.method,
        delta=options.delta,
        log=options.log,
        bootstrap=options.bootstrap,
        seed_noise=options.seed_noise,
        seed=options.seed,
    )
    record = fit.as_dict()
    names = {section: law for law, section in TABLE_LAWS.items()}
    result: dict[str, Any] = {"approaches": list(approaches), "columns": columns}
    intervals: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    if 3 in approaches:
        section = TABLE_LAWS[options.law] if options.law else "approach3"
        chosen, part = record[section], fit.laws[section]
        kept = (
            "params",
            "objective",
            "objective_rule",
            "method",
            "delta",
            "n_exponent",
            "d_exponent",
            "starts",
            "starts_at_best",
            "bounds_hit",
            "condition",
            "holdout_error_percent",
        )
        result |= {"law": names[section], "law_that_predicts": names[record["law"]]}
        result |= {name: chosen[name] for name in kept}
        intervals |= chosen["intervals"] or {}
        errors |= part.draws.standard_errors() if part.draws else {}
        if options.profile:
            result["profile"] = _profiles(fit, section, options.profile, options.at)
    if 2 in approaches and record["approach2"]:
        two = record["approach2"]
        result |= {
            name: two[name] for name in ("n_exponent", "n_coefficient", "d_exponent", "d_coefficient", "budgets")
        }
        intervals |= two["intervals"] or {}
    words = [*words, *fit.all_warnings()]
    result |= {"n_points": len(fit.runs), "intervals": intervals, "standard_errors": errors}
    if options.at is not None:
        result |= _at(fit, result, options.at, words)
        result |= _beyond(fit.laws[TABLE_LAWS[result["law"]]].fit.law if fit.laws else None, fit.cost, options)
    shared = {
        name: record[name] for name in ("cost", "level", "seed", "seed_noise", "approach2", "approach3", "coupled")
    }
    return result | shared | {"warnings": list(dict.fromkeys(words))}


def _profiles(fit: Any, section: str, names: tuple[str, ...], flops: float | None) -> dict[str, Any]:
    """Profile likelihoods of parameters, and of what the law says at `flops`."""
    from llamax.scaling.profile import profile_parametric
    from llamax.scaling.profile_target import TARGETS, profile_targets

    part, found = fit.laws[section], {}
    asked = tuple(name for name in names if name in TARGETS)
    if asked:
        if flops is None:
            raise UserError(f"profile {asked[0]}: give the training FLOPs to answer at, --at")
        found = profile_targets(part.fit, fit.runs, flops, fit.cost, asked)
    found |= {name: profile_parametric(part.fit, fit.runs, name) for name in names if name not in TARGETS}
    return {name: found[name].as_dict() for name in names}


def _at(fit: Any, result: dict[str, Any], flops: float, words: list[str]) -> dict[str, Any]:
    """The optimum at `flops`: its four numbers and, among the intervals, theirs; `at` has the whole answer."""
    from llamax.scaling import predict, recommend
    from llamax.scaling.caveats import distance_words
    from llamax.scaling.target import target_approach2, target_parametric

    if fit.laws:
        section = TABLE_LAWS[result["law"]]
        part = fit.laws[section]
        target = target_parametric(part.fit, part.draws, flops, fit.cost, fit.level)
    else:
        found = target_approach2(fit.approach2, fit.approach2_draws, flops, fit.level)
        if found is None:
            raise UserError(_no_power_laws(fit.approach2))
        target = found
        words += distance_words(fit.runs, flops)
        if target.loss is None:
            words.append("at: no loss: approach 2 has no loss-compute frontier here (see the warnings)")
    record: dict[str, Any] = {"target": (answer := target.as_dict())}
    if fit.laws:
        advice = recommend(fit, flops)
        record |= {"prediction": predict(fit, flops=flops, n=advice.n, d=advice.d).as_dict()}
        words += record["prediction"]["warnings"]
    bounds = {name: answer["intervals"].get(name) for name in ("n_opt", "d_opt", "tokens_per_param", "loss")}
    return {name: answer[name] for name in bounds} | {
        "regret": answer["regret"],
        "intervals": result["intervals"] | bounds,
        "at": record,
    }


def _no_power_laws(two: Any) -> str:
    """Why approach 2 cannot answer, and what would help."""
    causes = [b.warnings[0] for b in two.budgets if b.warnings and not (b.n.interior and b.d.interior)]
    return (
        f"at: approach 2 has no power laws to answer: {two.interior_minima} of {len(two.budgets)} budgets have their "
        f"minimum inside their grid, and two are needed ({'; '.join(causes[:2])}); add runs on that side of the grid, "
        "or take approach 3"
    )


def _beyond(law: Any, cost: Any, options: FitOptions) -> dict[str, Any]:
    """The answers for a model that is served and for scarce data, where they were asked for."""
    from llamax.scaling import beyond_training

    if options.inference_tokens is None and options.unique_tokens is None:
        return {}
    if law is None or options.at is None:
        raise UserError("inference_tokens, unique_tokens: they need a parametric law; leave --approach out")
    numbers = {"inference_tokens": options.inference_tokens, "unique_tokens": options.unique_tokens}
    return beyond_training(law, options.at, cost=cost, **numbers)


def _fit_envelope(
    frame: pd.DataFrame, columns: dict[str, str | None], options: FitOptions, words: list[str]
) -> dict[str, Any]:
    """Approach 1, of a table with one row a point of a training curve; the group column names the run."""
    from llamax.scaling import fit_approach1
    from llamax.scaling.caveats import distance_words
    from llamax.scaling.table import clean

    if options.approaches != (1,) or options.group is None:
        raise UserError("approach 1: give it alone, and the column that names a run as --group; each run is a curve")
    need_columns(frame, columns, "--{role} COLUMN")
    runs, more = clean(frame, **(columns | {"budget": None}))  # type: ignore[arg-type]
    found = fit_approach1(runs)
    record = found.as_dict()
    result = record | {"approaches": [1], "columns": columns, "intervals": {}}
    if options.at is not None:
        if found.n is None or found.d is None:
            raise UserError("at: the envelope has no power laws to answer (see the warnings without --at)")
        n, d = float(found.n.at(options.at)), float(found.d.at(options.at))
        more += distance_words(runs, options.at)
        result |= {"n_opt": n, "d_opt": d, "tokens_per_param": d / n, "loss": None}
    words = [*words, *more, *record["warnings"], "approach 1 has no intervals: the points of one curve are not runs"]
    return result | {"warnings": list(dict.fromkeys(words))}


def _fit_registered(
    frame: pd.DataFrame, columns: dict[str, str | None], options: FitOptions, words: list[str]
) -> dict[str, Any]:
    """Any other law of the registry, or a formula."""
    import numpy as np

    from llamax.scaling.bootstrap import as_list, interval
    from llamax.scaling.caveats import check_noise, distance_words, group_words, span_words
    from llamax.scaling.lawfit import bootstrap_law, fit_law, law_table
    from llamax.scaling.registry import law

    _beyond(None, None, options)  # refused: these answers are of the laws of n and d
    check_noise(options.seed_noise)
    spec = law(options.formula or options.law or "", columns=[*map(str, frame.columns), *options.extra])
    named = {**{role: name for role, name in columns.items() if name}, **options.extra}
    table, more = law_table(spec, frame, named)
    fit = fit_law(spec, table, method=options.method, delta=options.delta, log=options.log)
    record = fit.as_dict()
    result = record | {"approaches": [3], "intervals": {}, "standard_errors": {}, "seed": options.seed, "level": 0.95}
    measured = "flops" in table
    words = [*words, *more, *group_words(table), *(span_words(table) if measured else []), *fit.warnings]
    if options.bootstrap:
        rng = np.random.default_rng([options.seed, 3])
        noise = options.seed_noise
        if noise == "replicates":
            raise UserError("seed noise: replicates are found for the laws of n and d alone; give a number")
        draws = bootstrap_law(fit, table, options.bootstrap, rng, seed_noise=noise)
        result |= {"intervals": draws.intervals(), "standard_errors": draws.standard_errors()}
        if draws.failed:
            words.append(
                f"bootstrap: {draws.failed} resamples had no more distinct runs than parameters and are left out"
            )
    if options.profile:
        from llamax.scaling.profile import profile_law

        result["profile"] = {name: profile_law(fit, name).as_dict() for name in options.profile}
    if options.at is not None:
        from llamax.scaling import Cost, allocate
        from llamax.scaling.laws import fit_cost

        fixed = {name: float(np.median(table[name])) for name in spec.columns if name not in ("n", "d")}
        sized = {"n", "d", "flops"} <= set(table)
        cost = fit_cost(*(table[name].to_numpy(float) for name in ("n", "d", "flops")))[0] if sized else Cost()
        best = allocate(spec, fit.params, options.at, cost=cost, fixed=fixed)
        n, d = float(best.n), float(best.d)
        result |= {"n_opt": n, "d_opt": d, "tokens_per_param": d / n, "loss": float(best.loss), "fixed": fixed}
        shown = ", ".join(f"{name} {value:.4g}" for name, value in fixed.items())
        words += distance_words(table, options.at) if measured else []
        rule = f"at: the best of {cost.rule} = {options.at:.4g} FLOPs"
        words.append(f"{rule}, the other inputs at their medians ({shown})" if shown else rule)
        if options.bootstrap:
            many = allocate(spec, draws.params, options.at, cost=cost, fixed=fixed)
            values = {"n_opt": many.n, "d_opt": many.d, "tokens_per_param": many.d / many.n, "loss": many.loss}
            result["intervals"] |= {name: as_list(interval(value)) for name, value in values.items()}
    return result | {"warnings": list(dict.fromkeys(words))}
