"""From the cells of an experiment with images to its results: selection, and tables of text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from easy_jax.core.merge import AVERAGINGS
from easy_jax.experiments import plan
from easy_jax.experiments.config import ExperimentConfig, MethodConfig

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
    """A table as text; in each column of `best`, the largest leading number is the best."""

    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]
    best: tuple[int, ...] = ()


def select(config: ExperimentConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Chooses a learning rate per method and seed, on validation data only.

    Args:
      config: of the experiment.
      rows: every cell of the grid.

    Returns:
      The content of `results.json`. `tasks`: what the two are called; `results`: one row per
      setting, method and seed, the learning rate chosen by target validation accuracy (ties: the
      smaller rate); `results_by_mean`: the same, chosen by the mean of both validation accuracies,
      if the pre-training task has validation data; `grid`: every cell that `results` does not
      hold; `alpha_curves`: of every setting and WiSE-FT method with more than one alpha, the
      means over the seeds, at the rate that was chosen for the method first configured.
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
    """Every cell, chosen or not."""
    return [*results["results"], *results["grid"]]


def without_variants(results: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """The rows that are not of another alpha of a method that has a row."""
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
    cells = {plan.row_key(row): row for row in rows}
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
                group = [cells[seed, noise, rate, method.name] for seed, rate in rates]
                means = {k: mean(group, k) for k in ("pretrain_after", "target", "mean")}
                points.append({"alpha": method.alpha, "method": method.name, **means})
            if len(points) > 1:
                curves.append({"method": methods[0].name, "label_noise": noise, "points": points})
    return curves


def mean(rows: Sequence[Row], key: str) -> float:
    """Of a field, over rows."""
    return float(np.mean([row[key] for row in rows]))


def setting_name(label_noise: float) -> str:
    """How tables and figures call a setting."""
    return (
        f"{label_noise:.0%} of the training labels wrong" if label_noise else "labels as they are"
    )


# Tables.


def chosen_tables(results: Mapping[str, Any]) -> list[TableText]:
    """The layout of the paper's Tables 1 and 3, of each selection rule and setting; and what each
    alpha gives."""
    tables = []
    for caption, rows in _rules(results):
        rows = without_variants(results, rows)
        for noise, lines in summary(rows).items():
            header = ("method", "learning rate", "kept", "Δ", "target", "mean")
            tables.append(TableText(_title(noise, caption), header, lines, best=(2, 4, 5)))
    return [*tables, *_alpha_tables(results)]


def all_tables(config: ExperimentConfig, results: Mapping[str, Any]) -> list[TableText]:
    """These, the accuracy by decile of the probed model's loss (Table 5), and both accuracies at
    each learning rate, if there are several."""
    rates = _rate_tables(config, results)
    return [*chosen_tables(results), *_decile_tables(results), *rates]


def _rate_tables(config: ExperimentConfig, results: Mapping[str, Any]) -> list[TableText]:
    rows = without_variants(results, all_rows(results))
    rates = sorted({row["learning_rate"] for row in rows})
    if len(rates) == 1 or not results["grid"]:
        return []
    # In the order of the grid, which the chosen rows and the rest do not keep.
    names = [method.name for method in config.selected_methods()]
    rows.sort(key=lambda row: names.index(row["method"]))
    header = ("method", *(f"{rate:g}" for rate in rates))
    return [
        TableText(_title(noise, "kept / target at each learning rate"), header, lines)
        for noise, lines in by_rate(rows).items()
    ]


def summary(rows: Sequence[Row]) -> dict[float, list[tuple[str, ...]]]:
    """Lines of a table, by label noise: mean and, over several seeds, standard deviation."""
    lines: dict[float, list[tuple[str, ...]]] = {}
    for (noise, method), group in _groups(rows).items():
        rates = sorted({row["learning_rate"] for row in group})
        change = [row["pretrain_after"] - row["pretrain_before"] for row in group]
        kept, target, both = (
            mean_and_spread([row[key] for row in group])
            for key in ("pretrain_after", "target", "mean")
        )
        spread = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} – {rates[-1]:g}"
        line = (method, spread, kept, f"{np.mean(change):+.1f}", target, both)
        lines.setdefault(noise, []).append(line)
    return lines


def by_rate(rows: Sequence[Row]) -> dict[float, list[tuple[str, ...]]]:
    """Lines of a table, by label noise: `kept / target` at each learning rate, mean of seeds."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines: dict[float, list[tuple[str, ...]]] = {}
    for (noise, method), group in _groups(rows).items():
        texts = []
        for rate in rates:
            at_rate = [row for row in group if row["learning_rate"] == rate]
            kept_and_target = (f"{mean(at_rate, k):.1f}" for k in ("pretrain_after", "target"))
            texts.append(" / ".join(kept_and_target) if at_rate else "")
        lines.setdefault(noise, []).append((method, *texts))
    return lines


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
        header = ("alpha", "kept", "target", "mean")
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
    """What the columns are, and where fine-tuning began."""
    pretrain, target = results["tasks"]
    by_seed = {row["seed"]: row["pretrain_before"] for row in results["results"]}
    return (
        f"kept: {pretrain}, test accuracy (%) after fine-tuning, with the head and BatchNorm of "
        f"before put back; Δ: what that changed. target: {target}, test accuracy (%). mean: of the "
        f"two. Before fine-tuning, {pretrain}: {mean_and_spread(list(by_seed.values()))} %."
    )


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation of several."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _rules(results: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(caption, rows) of each selection rule; one if there was nothing to choose."""
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
    text = f"{setting_name(label_noise)}; {caption}"
    return text[0].upper() + text[1:]
