"""Report of an image experiment: tables, and one self-contained HTML page."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from easy_jax.core.merge import AVERAGINGS
from easy_jax.experiments import plan
from easy_jax.experiments import results as results_lib
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.results import Row, TableText
from easy_jax.experiments.tasks import load_tasks
from easy_jax.io import files, metrics_log
from easy_jax.report import figures, page
from easy_jax.train.loss_table import LossTable

_PICTURES = 20  # easiest and hardest examples, each
_NAME_WIDTH = 13  # characters that fit above a picture


def table(results: Mapping[str, Any]) -> Group:
    """Returns the results as tables for the terminal."""
    tables: list[Text | Table] = []
    for text in results_lib.chosen_tables(results):
        # One word per line, so that means with standard deviations fit into 80 columns.
        header = [name.replace(" ", "\n") for name in text.header]
        one = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for column in one.columns:
            column.no_wrap = True
            column.justify = "right"
        one.columns[0].justify = "left"
        for line in text.lines:
            one.add_row(*line)
        tables += [Text(text.title), one]
    return Group(*tables, results_lib.legend(results))


def markdown(config: ExperimentConfig, results: Mapping[str, Any]) -> str:
    """Returns the content of `results.md`: the same tables, and those by decile and rate."""
    parts = []
    for text in results_lib.all_tables(config, results):
        parts.append(f"**{text.title}.**\n")
        parts.append(f"| {' | '.join(text.header)} |")
        parts.append("|---" + "|---:" * (len(text.header) - 1) + "|")
        parts += [f"| {' | '.join(line)} |" for line in text.lines]
        parts.append("")
    return "\n".join([*parts, results_lib.legend(results), ""])


def write(config: ExperimentConfig, workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.md` and `report.html`, which needs no other file and no network."""
    files.write(workdir / "results.md", markdown(config, results))
    files.write(workdir / "report.html", _page(config, workdir, results))


def _page(config: ExperimentConfig, workdir: Path, results: Mapping[str, Any]) -> str:
    pretrain, target = config.data.names
    sections = [
        f"<p>A ResNet pre-trained on {html.escape(pretrain)} was fine-tuned on "
        f"{html.escape(target)} by several methods. {html.escape(results_lib.legend(results))} "
        f"Seeds: {', '.join(map(str, config.seeds))}.</p>"
    ]
    sections += [_html_table(text) for text in results_lib.all_tables(config, results)]
    rows = results_lib.without_variants(results, results_lib.all_rows(results))
    caption = (
        "Every method at every learning rate, mean over the seeds; up and to the right is better. "
        "Lines join the learning rates of a method"
    )
    caption += "; dashed ones the alphas of WiSE-FT." if results["alpha_curves"] else "."
    scatter = figures.scatter(rows, config.data.names, results["alpha_curves"])
    sections.append(_figure_html(scatter, caption))
    seed = config.seeds[0]
    for noise in config.data.label_noise:
        title = f"{results_lib.condition_name(noise)}, seed {seed}"
        sections.append(f"<h2>{html.escape(title)}</h2>")
        sections += _condition_html(config, workdir, results, seed, noise)
    return page.page(f"{config.name}: learnt and forgotten", sections)


def _condition_html(
    config: ExperimentConfig, workdir: Path, results: Mapping[str, Any], seed: int, noise: float
) -> list[str]:
    """Returns loss histogram, pictures, deciles and learning curves for one label noise."""
    sections = []
    table_path = plan.loss_table_path(workdir, seed, noise)
    if table_path.exists():
        table = LossTable.open(table_path)
        tasks = load_tasks(config, seed, noise)
        source = tasks.target.train
        assert source is not None
        loss_N, wrong_N = table.loss_N(), tasks.wrong_N
        weight_N = table.flow_weights()
        good_N = np.isfinite(loss_N)
        split = ""
        if (good_N & wrong_N).any():
            split = (
                f" The mean weight of a right label is {weight_N[good_N & ~wrong_N].mean():.2f}, "
                f"of a wrong one {weight_N[good_N & wrong_N].mean():.3f}."
            )
        sections.append(
            _figure_html(
                figures.loss_histogram(loss_N[good_N], table.temperature, wrong_N[good_N]),
                f"The losses of the {int(good_N.sum())} training examples, and the weight that "
                f"FLOW gives them.{split}",
            )
        )
        order = np.argsort(loss_N)[: int(good_N.sum())]
        for name, ids in (("easiest", order[:_PICTURES]), ("hardest", order[::-1][:_PICTURES])):
            records = [source[int(i)] for i in ids]
            titles = [
                _picture_title(tasks.target.classes[int(record["label"])], loss_N[i])
                for i, record in zip(ids, records, strict=True)
            ]
            pictures = figures.example_pictures(
                np.stack([record["image"] for record in records]), titles, wrong_N[ids]
            )
            caption = f"The {len(ids)} {name} examples: training label and loss in nats"
            caption += "; labels that were made wrong in colour." if noise else "."
            sections.append(_figure_html(pictures, caption))
    rows = [row for row in results["results"] if row["label_noise"] == noise]
    sections.append(
        _figure_html(
            figures.deciles(results_lib.without_variants(results, rows)),
            "Target test accuracy by decile of the probed model's loss, mean over the seeds: what "
            "FLOW gives up on the hardest examples.",
        )
    )
    curves = _curves(config, workdir, results, seed, noise)
    if curves:
        sections.append(
            _figure_html(
                figures.learning_curves(curves, config.data.names),
                "Validation accuracy while fine-tuning, at the learning rate chosen by target "
                "validation accuracy. A last stage that trains the head alone follows on.",
            )
        )
    return sections


def _curves(
    config: ExperimentConfig, workdir: Path, results: Mapping[str, Any], seed: int, noise: float
) -> dict[str, list[Row]]:
    """Returns the validation entries of every method, with steps counted over all its stages.

    Methods that average weights after training are left out, because their curve is that of the
    method whose weights they average.
    """
    entries: dict[str, list[Row]] = {}
    for entry in metrics_log.read(workdir):
        if entry["kind"] == "validation":
            entries.setdefault(entry["stage"], []).append(entry)
    chosen = {
        row["method"]: row["learning_rate"]
        for row in results["results"]
        if (row["seed"], row["label_noise"]) == (seed, noise)
    }
    curves = {}
    for method in config.selected_methods():
        if AVERAGINGS.find(method.averaging).when == "after":
            continue
        run = plan.Run(seed, noise, chosen[method.name], method)
        curve, offset = [], 0
        for stage in plan.run_stages(config, run):
            found = sorted(entries.get(stage.key.path, ()), key=lambda entry: entry["step"])
            curve += [{**entry, "step": entry["step"] + offset} for entry in found]
            offset = curve[-1]["step"] if curve else 0
        if curve:
            curves[method.name] = curve
    return curves


def _picture_title(name: str, loss: float) -> str:
    """Returns a class name and a loss, on two lines if the name is long, cut to the picture."""
    if len(name) > _NAME_WIDTH:
        name = f"{name[: _NAME_WIDTH - 1]}…"
    separator = "  " if len(name) <= 4 else "\n"
    return f"“{name}”{separator}{loss:.2g}"


def _html_table(text: TableText) -> str:
    best = {}
    for columns, choose in ((text.best, max), (text.least, min)):
        for column in columns:
            best[column] = choose(_leading_number(line[column]) for line in text.lines)
    bold = [
        [
            column in best and _leading_number(entry) == best[column]
            for column, entry in enumerate(line)
        ]
        for line in text.lines
    ]
    return page.table(text.title, text.header, text.lines, bold, left=1)


def _leading_number(text: str) -> float:
    return float(text.split()[0])


def _figure_html(figure: Figure, caption: str) -> str:
    return page.figure(figures.to_svg(figure).encode(), "image/svg+xml", caption)
