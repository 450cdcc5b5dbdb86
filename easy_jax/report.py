"""From a workdir to what a person reads: selection, tables, and a one-file HTML page."""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table

from easy_jax import figures, metrics, page, plan
from easy_jax.config import ExperimentConfig
from easy_jax.data import glyphs
from easy_jax.loss_table import LossTable

Row = dict[str, Any]
TableText = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, header, lines
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
_COLUMNS = ("method", "learning rate", "kept", "target", "mean")
_LEGEND = (
    "kept: letters, test accuracy (%) after fine-tuning, their own head and BatchNorm put back. "
    "target: digits, test accuracy (%). mean: of the two."
)


def select(config: ExperimentConfig, rows: Sequence[Row]) -> dict[str, Any]:
    """Chooses a learning rate per method and seed, on validation data only.

    Args:
      config: names the experiment.
      rows: every cell of the grid.

    Returns:
      The content of `results.json`. `results`: one row per setting, method and seed, the
      learning rate chosen by target validation accuracy (ties: the smaller rate);
      `results_by_mean`: the same, chosen by the mean of both validation accuracies;
      `grid`: every cell that `results` does not hold.
    """
    groups: dict[tuple[float, str, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["learning_rate"]):
        groups.setdefault((row["label_noise"], row["method"], row["seed"]), []).append(row)
    results: dict[str, Any] = {"experiment": config.name}
    for name, (_, score) in RULES.items():
        results[name] = [max(group, key=score) for group in groups.values()]
    chosen = {plan.row_key(row) for row in results["results"]}
    results["grid"] = [row for row in rows if plan.row_key(row) not in chosen]
    return results


def all_rows(results: Mapping[str, Any]) -> list[Row]:
    """Every cell, chosen or not."""
    return [*results["results"], *results["grid"]]


def summary(rows: Sequence[Row]) -> dict[float, list[tuple[str, ...]]]:
    """Lines of a table, by label noise: mean and, over several seeds, standard deviation."""
    lines: dict[float, list[tuple[str, ...]]] = {}
    for noise in dict.fromkeys(row["label_noise"] for row in rows):
        setting = [row for row in rows if row["label_noise"] == noise]
        for method in dict.fromkeys(row["method"] for row in setting):
            group = [row for row in setting if row["method"] == method]
            rates = sorted({row["learning_rate"] for row in group})
            numbers = [
                _mean_and_spread([row[key] for row in group])
                for key in ("pretrain_after", "target", "mean")
            ]
            spread = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} – {rates[-1]:g}"
            line = (method, spread, *numbers)
            lines.setdefault(noise, []).append(line)
    return lines


def by_rate(rows: Sequence[Row]) -> dict[float, list[tuple[str, ...]]]:
    """Lines of a table, by label noise: `kept / target` at each learning rate, mean of seeds."""
    rates = sorted({row["learning_rate"] for row in rows})
    groups: dict[tuple[float, str, float], list[Row]] = {}
    for row in rows:
        key = (row["label_noise"], row["method"], row["learning_rate"])
        groups.setdefault(key, []).append(row)
    lines: dict[float, list[tuple[str, ...]]] = {}
    for noise, method in dict.fromkeys((row["label_noise"], row["method"]) for row in rows):
        texts = []
        for rate in rates:
            group = groups[noise, method, rate]
            kept, target = (
                np.mean([row[key] for row in group]) for key in ("pretrain_after", "target")
            )
            texts.append(f"{kept:.1f} / {target:.1f}")
        lines.setdefault(noise, []).append((method, *texts))
    return lines


def _chosen_tables(results: Mapping[str, Any]) -> list[TableText]:
    """The tables of each selection rule and setting."""
    return [
        (_title(noise, caption), _COLUMNS, lines)
        for caption, rows in _rules(results)
        for noise, lines in summary(rows).items()
    ]


def _tables(config: ExperimentConfig, results: Mapping[str, Any]) -> list[TableText]:
    """Every table, for Markdown and HTML."""
    tables = _chosen_tables(results)
    if len(config.learning_rates) > 1:
        # In the order of the grid, which the chosen rows and the rest do not keep.
        names = [method.name for method in config.selected_methods()]
        rows = sorted(all_rows(results), key=lambda row: names.index(row["method"]))
        header = ("method", *(f"{rate:g}" for rate in sorted(config.learning_rates)))
        tables += [
            (_title(noise, "kept / target at each learning rate"), header, lines)
            for noise, lines in by_rate(rows).items()
        ]
    return tables


def _title(label_noise: float, caption: str) -> str:
    text = f"{figures.setting_name(label_noise)}; {caption}"
    return text[0].upper() + text[1:]


def _mean_and_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _before(results: Mapping[str, Any]) -> str:
    by_seed = {row["seed"]: row["pretrain_before"] for row in results["results"]}
    return f"Before fine-tuning, letters: {_mean_and_spread(list(by_seed.values()))} %."


def _rules(results: Mapping[str, Any]) -> list[tuple[str, list[Row]]]:
    """(caption, rows) of each selection rule; one if there was nothing to choose."""
    rules = [(text, results[name]) for name, (text, _) in RULES.items()]
    if results["grid"]:
        return rules
    return [("one learning rate for all methods", rules[0][1])]


def table(results: Mapping[str, Any]) -> Group:
    """The results for the terminal, in percent."""
    tables = []
    for title, header, lines in _chosen_tables(results):
        one = Table(*header, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in one.columns:
            column.no_wrap = True
        for column in one.columns[2:]:
            column.justify = "right"
        for line in lines:
            one.add_row(*line)
        tables.append(one)
    return Group(*tables, f"{_LEGEND} {_before(results)}")


def markdown(config: ExperimentConfig, results: Mapping[str, Any]) -> str:
    """The same tables in Markdown, and one by learning rate; `results.md` in the workdir."""
    parts = []
    for title, header, lines in _tables(config, results):
        parts.append(f"**{title}.**\n")
        parts.append(f"| {' | '.join(header)} |")
        parts.append("|---" + "|---:" * (len(header) - 1) + "|")
        parts += [f"| {' | '.join(line)} |" for line in lines]
        parts.append("")
    return "\n".join([*parts, f"{_LEGEND} {_before(results)}", ""])


def write(config: ExperimentConfig, workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.md` and `report.html`: one self-contained page, no network."""
    (workdir / "results.md").write_text(markdown(config, results))
    (workdir / "report.html").write_text(_page(config, workdir, results))


def _page(config: ExperimentConfig, workdir: Path, results: Mapping[str, Any]) -> str:
    sections = [
        "<p>A ResNet pre-trained on rendered capital letters was fine-tuned on handwritten "
        "digits by several methods. <b>Kept</b> is its test accuracy on letters afterwards, "
        "with the original head and BatchNorm put back; <b>target</b> its test accuracy on "
        f"digits. {_before(results)} Seeds: {', '.join(map(str, config.seeds))}.</p>"
    ]
    sections += [_html_table(*table) for table in _tables(config, results)]
    sections.append(
        _figure_html(
            figures.scatter(all_rows(results)),
            "Every method at every learning rate, mean over the seeds; up and to the right is "
            "better. Lines join the learning rates of a method.",
        )
    )
    seed = config.seeds[0]
    for noise in config.data.label_noise:
        sections.append(f"<h2>{html.escape(figures.setting_name(noise))}, seed {seed}</h2>")
        sections += _setting_html(config, workdir, results, seed, noise)
    return page.page(f"{config.name}: learnt and forgotten", sections)


def _setting_html(
    config: ExperimentConfig, workdir: Path, results: Mapping[str, Any], seed: int, noise: float
) -> list[str]:
    """Loss histogram, learning curves and example pictures of one setting."""
    sections = []
    table_path = plan.loss_table_path(workdir, seed, noise)
    if table_path.exists():
        table = LossTable.open(table_path)
        tasks = glyphs.load(config.data, seed, noise)
        loss_N, wrong_N = table.loss_N(), tasks.wrong_N
        weight_N = table.flow_weights()
        kept_N = np.isfinite(loss_N)
        split = ""
        if (kept_N & wrong_N).any():
            split = (
                f" The mean weight of a right label is {weight_N[kept_N & ~wrong_N].mean():.2f}, "
                f"of a wrong one {weight_N[kept_N & wrong_N].mean():.3f}."
            )
        sections.append(
            _figure_html(
                figures.loss_histogram(loss_N[kept_N], table.temperature, wrong_N[kept_N]),
                f"The losses of the {int(kept_N.sum())} training examples, and the weight that "
                f"FLOW gives them.{split}",
            )
        )
        order = np.argsort(loss_N)[: int(kept_N.sum())]
        for name, ids in (("easiest", order[:20]), ("hardest", order[::-1][:20])):
            label_N = tasks.target.train.fields["label"]
            titles = [f"“{label_N[i]}”  {loss_N[i]:.2g}" for i in ids]
            pictures = figures.example_pictures(
                tasks.target.train.fields["image"][ids, ..., 0], titles, wrong_N[ids]
            )
            caption = f"The {len(ids)} {name} examples: training label and loss in nats"
            caption += "; labels that were made wrong in colour." if noise else "."
            sections.append(_figure_html(pictures, caption))
    curves = _curves(config, workdir, results, seed, noise)
    if curves:
        sections.append(
            _figure_html(
                figures.learning_curves(curves),
                "Validation accuracy while fine-tuning, at the learning rate chosen by target "
                "validation accuracy. A last stage that trains the head alone follows on.",
            )
        )
    return sections


def _curves(
    config: ExperimentConfig, workdir: Path, results: Mapping[str, Any], seed: int, noise: float
) -> dict[str, list[Row]]:
    """Validation entries of every method's stages, steps counted through. Averaging happens
    after training, so methods that only average have the curve of what they average."""
    entries: dict[str, list[Row]] = {}
    for entry in metrics.read(workdir):
        if entry["kind"] == "validation":
            entries.setdefault(entry["stage"], []).append(entry)
    chosen = {
        row["method"]: row["learning_rate"]
        for row in results["results"]
        if (row["seed"], row["label_noise"]) == (seed, noise)
    }
    curves = {}
    for method in config.selected_methods():
        if method.averaging == "wise_ft":
            continue
        cell = plan.Cell(seed, noise, chosen[method.name], method)
        curve, offset = [], 0
        for stage in plan.cell_stages(config, cell):
            found = sorted(entries.get(stage.name, ()), key=lambda entry: entry["step"])
            curve += [{**entry, "step": entry["step"] + offset} for entry in found]
            offset = curve[-1]["step"] if curve else 0
        if curve:
            curves[method.name] = curve
    return curves


def _html_table(title: str, header: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    # The best of kept, target and mean; a cell of the other table has two numbers.
    columns = range(2, 5) if header == _COLUMNS else range(0)
    best = {column: max(_leading_number(line[column]) for line in lines) for column in columns}
    bold = [
        [
            column in best and _leading_number(text) == best[column]
            for column, text in enumerate(line)
        ]
        for line in lines
    ]
    return page.table(title, header, lines, bold)


def _leading_number(text: str) -> float:
    return float(text.split()[0])


def _figure_html(figure: Figure, caption: str) -> str:
    return page.figure(figures.to_svg(figure).encode(), "image/svg+xml", caption)
