"""Selection of the results of an experiment with images, and their layout as text tables."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from easy_jax.core.merge import AVERAGINGS
from easy_jax.experiments import plan
from easy_jax.experiments.config import ExperimentConfig, MethodConfig
from easy_jax.train.metrics import METRICS

Row = dict[str, Any]
RULES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "results": (
        "learning rate chosen by target validation accuracy",
        lambda row: row["target_validation"],
    ),
    "results_by_mean": (
        "learning rate chosen by the mean of both validation accuracies",
        lambda row: (row["target_validation"] + row["pretrain_validation"]) / 2,
    ),
}


@dataclasses.dataclass(frozen=True)
class TableText:
    """A table as text.

    Attributes:
      title, header, lines: caption, column headings, and cells by line.
      best: indices of columns in which the largest leading number is the best.
      least: indices of columns in which the smallest leading number is the best.
    """

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    best: tuple[int, ...] = ()
    least: tuple[int, ...] = ()


def row_of(
    run: plan.Run,
    before: Row,
    after: Mapping[str, Row],
    validation: Mapping[str, Row],
    seconds: float,
    metrics: Sequence[str],
) -> Row:
    """Returns a run's row of results.

    Args:
      run: the run.
      before: result of `evaluate.classification` on the pre-training task before fine-tuning.
      after: results on the test data of `pretrain` and `target` after fine-tuning; that of
        `target` has groups.
      validation: results on validation data, without `pretrain` if it has no validation data.
      seconds: training time.
      metrics: names of metrics to include in addition to accuracy.
    """
    old, target = after["pretrain"], after["target"]
    row = {
        "method": run.method.name,
        "seed": run.seed,
        "label_noise": run.label_noise,
        "learning_rate": run.learning_rate,
        "pretrain_before": before["accuracy"],
        "pretrain_after": old["accuracy"],
        "target": target["accuracy"],
        "mean": (old["accuracy"] + target["accuracy"]) / 2,
        "seconds": seconds,
        "pretrain_validation": validation.get("pretrain", {}).get("accuracy"),
        "target_validation": validation["target"]["accuracy"],
        "target_by_decile": target["group_accuracy"],
    }
    if metrics:
        measured = {"pretrain_before": before, "pretrain_after": old, "target": target}
        row["metrics"] = {
            name: {key: values[name] for key, values in measured.items()} for name in metrics
        }
    return row


def select(config: ExperimentConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Chooses a learning rate per method and seed, on validation data only.

    Args:
      config: the experiment.
      rows: the results of all runs of the grid.

    Returns:
      The content of `results.json`:

      - `tasks`: the names of the two tasks.
      - `results`: one row for each label noise, method and seed, with the learning rate chosen by
        target validation accuracy (of equal ones, the smallest rate).
      - `results_by_mean`: the same, chosen by the mean of both validation accuracies; only if the
        pre-training task has validation data.
      - `grid`: the rows that are not in `results`.
      - `alpha_curves`: for each label noise and WiSE-FT method with more than one alpha, the means
        over the seeds, at the learning rate that was chosen for the first of these methods.
    """
    groups: dict[tuple[float, str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["learning_rate"]):
        groups.setdefault((row["label_noise"], row["method"], row["seed"]), []).append(row)
    results: dict[str, Any] = {"experiment": config.name, "tasks": list(config.data.names)}
    for name, (_, score) in RULES.items():
        if name == "results" or all(row["pretrain_validation"] is not None for row in rows):
            results[name] = [max(group, key=score) for group in groups.values()]
    chosen = {plan.row_key(row) for row in results["results"]}
    results["grid"] = [row for row in rows if plan.row_key(row) not in chosen]
    results["alpha_curves"] = _alpha_curves(config, rows, results["results"])
    return results


def all_rows(results: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of all runs, selected or not."""
    return [*results["results"], *results["grid"]]


def without_variants(results: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Returns the rows without those of a method that only differs from an earlier one in alpha."""
    variants = {
        point["method"]
        for curve in results["alpha_curves"]
        for point in curve["points"]
        if point["method"] != curve["method"]
    }
    return [row for row in rows if row["method"] not in variants]


def _alpha_curves(
    config: ExperimentConfig, rows: Sequence[Row], chosen: Sequence[Row]
) -> list[Row]:
    families: dict[str, list[MethodConfig]] = {}
    for method in config.selected_methods():
        if AVERAGINGS.find(method.averaging).when == "after":
            family = repr(dataclasses.replace(method, name="", alpha=0.0))
            families.setdefault(family, []).append(method)
    by_key = {plan.row_key(row): row for row in rows}
    curves = []
    for noise in dict.fromkeys(row["label_noise"] for row in rows):
        for methods in families.values():
            rates = [
                (row["seed"], row["learning_rate"])
                for row in chosen
                if (row["method"], row["label_noise"]) == (methods[0].name, noise)
            ]
            points = []
            for method in sorted(methods, key=lambda method: method.alpha):
                group = [by_key[seed, noise, rate, method.name] for seed, rate in rates]
                means = {k: mean(group, k) for k in ("pretrain_after", "target", "mean")}
                points.append({"alpha": method.alpha, "method": method.name, **means})
            if len(points) > 1:
                curves.append({"method": methods[0].name, "label_noise": noise, "points": points})
    return curves


def mean(rows: Sequence[Row], key: str) -> float:
    """Returns the mean of a field over rows."""
    return float(np.mean([row[key] for row in rows]))


def condition_name(label_noise: float) -> str:
    """Returns the name of a label noise in tables and figures."""
    return (
        f"{label_noise:.0%} of the training labels wrong" if label_noise else "labels as they are"
    )


# Tables.


def chosen_tables(results: Mapping[str, Any]) -> list[TableText]:
    """Returns a table for each selection rule and label noise, and one for each alpha curve.

    The layout is that of Tables 1 and 3 of arXiv:2502.02797. Each further metric of the
    experiment has two more columns, for the pre-training and the target task.
    """
    tables = []
    for caption, rows in _rules(results):
        rows = without_variants(results, rows)
        for noise, lines in summary(rows).items():
            header = ("method", "learning rate", "retained", "Δ", "target", "mean")
            titles, more, least = _metric_columns(rows, len(header))
            title, best = _title(noise, caption), (2, 4, 5, *more)
            tables.append(TableText(title, (*header, *titles), lines, best, least))
    return [*tables, *_alpha_tables(results)]


def all_tables(config: ExperimentConfig, results: Mapping[str, Any]) -> list[TableText]:
    """Returns `chosen_tables`, and tables of accuracy by decile and by learning rate.

    Deciles are those of the probed model's loss (arXiv:2502.02797, Table 5). There is no table by
    learning rate if there is only one rate.
    """
    rates = _rate_tables(config, results)
    return [*chosen_tables(results), *_decile_tables(results), *rates]


def _rate_tables(config: ExperimentConfig, results: Mapping[str, Any]) -> list[TableText]:
    rows = without_variants(results, all_rows(results))
    rates = sorted({row["learning_rate"] for row in rows})
    if len(rates) == 1 or not results["grid"]:
        return []
    # Selected rows come before the others: restore the order of the configuration.
    names = [method.name for method in config.selected_methods()]
    rows.sort(key=lambda row: names.index(row["method"]))
    header = ("method", *(f"{rate:g}" for rate in rates))
    return [
        TableText(_title(noise, "retained / target at each learning rate"), header, lines)
        for noise, lines in by_rate(rows).items()
    ]


def summary(rows: Sequence[Row]) -> dict[float, list[tuple[str, ...]]]:
    """Returns the lines of a table for each label noise: means and standard deviations of seeds."""
    lines: dict[float, list[tuple[str, ...]]] = {}
    for (noise, method), group in _groups(rows).items():
        rates = sorted({row["learning_rate"] for row in group})
        change = [row["pretrain_after"] - row["pretrain_before"] for row in group]
        retained, target, both = (
            mean_and_spread([row[key] for row in group])
            for key in ("pretrain_after", "target", "mean")
        )
        more = (
            mean_and_spread([row["metrics"][name][task] for row in group])
            for name in group[0].get("metrics", ())
            for task in ("pretrain_after", "target")
        )
        spread = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} – {rates[-1]:g}"
        line = (method, spread, retained, f"{np.mean(change):+.1f}", target, both, *more)
        lines.setdefault(noise, []).append(line)
    return lines


def by_rate(rows: Sequence[Row]) -> dict[float, list[tuple[str, ...]]]:
    """Returns lines with `retained / target` at each learning rate, for each label noise."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines: dict[float, list[tuple[str, ...]]] = {}
    for (noise, method), group in _groups(rows).items():
        texts = []
        for rate in rates:
            at_rate = [row for row in group if row["learning_rate"] == rate]
            both = (f"{mean(at_rate, k):.1f}" for k in ("pretrain_after", "target"))
            texts.append(" / ".join(both) if at_rate else "")
        lines.setdefault(noise, []).append((method, *texts))
    return lines


def _metric_columns(
    rows: Sequence[Row], start: int
) -> tuple[list[str], tuple[int, ...], tuple[int, ...]]:
    """Returns the titles of further metrics, and the columns with higher and lower best values."""
    titles: list[str] = []
    columns: dict[str, list[int]] = {"higher": [], "lower": []}
    for name in rows[0].get("metrics", ()):
        metric = METRICS.find(name)
        columns[metric.better] += [start + len(titles), start + len(titles) + 1]
        titles += [f"retained {metric.title}", f"target {metric.title}"]
    return titles, tuple(columns["higher"]), tuple(columns["lower"])


def _alpha_tables(results: Mapping[str, Any]) -> list[TableText]:
    tables = []
    for curve in results["alpha_curves"]:
        caption = f"{curve['method']} by alpha, the share of the fine-tuned weights"
        lines = [
            (
                f"{point['alpha']:g}",
                *(f"{point[key]:.1f}" for key in ("pretrain_after", "target", "mean")),
            )
            for point in curve["points"]
        ]
        header = ("alpha", "retained", "target", "mean")
        tables.append(TableText(_title(curve["label_noise"], caption), header, lines, (1, 2, 3)))
    return tables


def _decile_tables(results: Mapping[str, Any]) -> list[TableText]:
    rows = without_variants(results, results["results"])
    tables: dict[float, list[tuple[str, ...]]] = {}
    for (noise, method), group in _groups(rows).items():
        deciles = np.mean([row["target_by_decile"] for row in group], axis=0)
        tables.setdefault(noise, []).append((method, *(f"{value:.1f}" for value in deciles)))
    caption = (
        "target test accuracy by decile of the probed model's loss, the easiest tenth of the "
        "examples first"
    )
    return [
        TableText(_title(noise, caption), ("method", *map(str, columns)), lines, columns)
        for noise, lines in tables.items()
        for columns in [tuple(range(1, len(lines[0])))]
    ]


def legend(results: Mapping[str, Any]) -> str:
    """Returns an explanation of the columns, with the accuracy before fine-tuning."""
    pretrain, target = results["tasks"]
    by_seed = {row["seed"]: row["pretrain_before"] for row in results["results"]}
    return (
        f"retained: {pretrain}, test accuracy (%) after fine-tuning, with the original head and "
        f"BatchNorm put back; Δ: its change by fine-tuning. target: {target}, test accuracy (%). "
        f"mean: of the two. Before fine-tuning, {pretrain}: "
        f"{mean_and_spread(list(by_seed.values()))} %."
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """Formats the mean, and the standard deviation if there are several values."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _rules(results: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """Returns (caption, rows) of each selection rule; only one if there was nothing to select."""
    rules = [(text, results[name]) for name, (text, _) in RULES.items() if name in results]
    if results["grid"]:
        return rules
    return [("one learning rate for each method", rules[0][1])]


def _groups(rows: Sequence[Row]) -> dict[tuple[float, str], list[Row]]:
    groups: dict[tuple[float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["label_noise"], row["method"]), []).append(row)
    return groups


def _title(label_noise: float, caption: str) -> str:
    text = f"{condition_name(label_noise)}; {caption}"
    return text[0].upper() + text[1:]
