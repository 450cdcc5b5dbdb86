"""Report of a language experiment: one table, in the terminal, as Markdown and as a page."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from easy_jax.core.merge import AVERAGINGS
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.io import files
from easy_jax.report import figures, page
from easy_jax.train.loss_table import LossTable

_CAPTION = "What was learnt and what was forgotten"
_EXPLANATION = (
    "NLL: cross-entropy in nats per target token; perplexity (PPL): its exponential. Learnt: what "
    "fine-tuning took off the cross-entropy on held-out problems of the kind trained on (higher "
    "is better). Forgotten: what it added to the cross-entropy on general text (lower is better). "
    "The first row is the pre-trained model."
)


def lines(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Returns header and lines of the table; the first row is the pre-trained model.

    Example:
      >>> lines([{"method": "base", "prose_nll": 2.0, "prose_perplexity": 7.389}])
      (['method', 'prose perplexity', 'prose forgotten'], [['base', '7.39', '+0.0000']])
    """
    base = rows[0]
    heldout, general = _measured(base)
    header = ["method"]
    for name in heldout:
        header += [f"{name} NLL", f"{name} learnt"]
    for name in general:
        header += [f"{name} perplexity", f"{name} forgotten"]
    table = []
    for row in rows:
        line = [row["method"]]
        for name in heldout:
            nll = row[f"{name}_nll"]
            line += [f"{nll:.4f}", f"{base[f'{name}_nll'] - nll:+.4f}"]
        for name in general:
            forgotten = row[f"{name}_nll"] - base[f"{name}_nll"]
            line += [f"{row[f'{name}_perplexity']:.2f}", f"{forgotten:+.4f}"]
        table.append(line)
    return header, table


def _measured(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the names of the held-out sets, and of the general texts."""
    names = [key.removesuffix("_nll") for key in row if key.endswith("_nll")]
    heldout = [name for name in names if name.startswith("heldout")]
    return heldout, [name for name in names if name not in heldout]


def _trade_off(config: LanguageConfig, rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns a figure of learnt against forgotten, means over the sets; None without both."""
    heldout, general = _measured(rows[0])
    if not heldout or not general:
        return None

    def change(row: Mapping[str, Any], names: Sequence[str]) -> float:
        return float(np.mean([row[f"{name}_nll"] - rows[0][f"{name}_nll"] for name in names]))

    points = {row["method"]: (-change(row, heldout), change(row, general)) for row in rows}
    # WiSE-FT's averages of one fine-tuned model lie on a curve that starts at the base.
    curves: dict[Any, list[tuple[float, str]]] = {}
    for method in config.selected_methods():
        if method.averaging in ("none", "wise_ft"):
            after = AVERAGINGS.find(method.averaging).when == "after"
            alpha = method.alpha if after else 1.0
            plain = dataclasses.replace(method, name="", averaging="none", alpha=1.0)
            key = str(plain)
            curves.setdefault(key, [(0.0, rows[0]["method"])]).append((alpha, method.name))
    paths = [[name for _, name in sorted(curve)] for curve in curves.values() if len(curve) > 2]
    caption = (
        "To the right is better learnt, down is less forgotten: means over the held-out sets and "
        "over the general texts."
    )
    if paths:
        caption += " A line joins the averages of the pre-trained and a fine-tuned model (WiSE-FT)."
    figure = figures.trade_off(points, paths)
    return page.figure(figures.to_svg(figure).encode(), "image/svg+xml", caption)


def table(results: Mapping[str, Any]) -> Table:
    """Returns the table for the terminal."""
    header, body = lines(results["language"])
    view = Table(
        title=_CAPTION,
        title_justify="left",
        caption=_EXPLANATION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for number, column in enumerate(header):
        words = column.replace("perplexity", "PPL").replace(" ", "\n")  # 80 columns are enough
        view.add_column(words, justify="right" if number else "left", overflow="fold")
    for line in body:
        view.add_row(*line)
    return view


def write(config: LanguageConfig, workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.md` and `report.html` into the workdir."""
    header, body = lines(results["language"])
    rule = ["---", *["---:"] * (len(header) - 1)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body])
    files.write(workdir / "results.md", text + "\n")
    sections = [page.paragraph(_EXPLANATION), page.table(_CAPTION, header, body, left=1)]
    trade_off = _trade_off(config, results["language"])
    if trade_off is not None:
        sections.append(trade_off)
    directory = workdir / "loss_table"
    if directory.exists():
        losses = LossTable.open(directory)
        figure = figures.loss_histogram(losses.loss_N(), losses.temperature, None)
        sections.append(
            page.figure(
                figures.to_svg(figure).encode(),
                "image/svg+xml",
                "Losses of the pre-trained model on the training data, their median and the "
                "weights they become",
            )
        )
    files.write(workdir / "report.html", page.page(f"easy_jax: {config.name}", sections))
