"""What a language experiment found: one table in the terminal, as Markdown and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from easy_jax import figures, page
from easy_jax.config import LanguageConfig
from easy_jax.loss_table import LossTable

_CAPTION = (
    "Cross-entropy in nats per target token on held-out problems and on general text; "
    "forgotten: what fine-tuning added to the cross-entropy on general text (lower is better)"
)


def lines(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table; the first row is the pre-trained model.

    Example:
      >>> lines([{"method": "base", "prose_nll": 2.0, "prose_perplexity": 7.389}])
      (['method', 'prose', 'perplexity', 'forgotten'], [['base', '2.0000', '7.39', '+0.0000']])
    """
    base = rows[0]
    names = [key.removesuffix("_nll") for key in base if key.endswith("_nll")]
    header = ["method"]
    for name in names:
        header += [name] if name.startswith("heldout") else [name, "perplexity", "forgotten"]
    table = []
    for row in rows:
        line = [row["method"]]
        for name in names:
            nll = row[f"{name}_nll"]
            line.append(f"{nll:.4f}")
            if not name.startswith("heldout"):
                forgotten = nll - base[f"{name}_nll"]
                line += [f"{row[f'{name}_perplexity']:.2f}", f"{forgotten:+.4f}"]
        table.append(line)
    return header, table


def table(results: Mapping[str, Any]) -> Table:
    """For the terminal."""
    header, body = lines(results["language"])
    view = Table(title=_CAPTION)
    for number, column in enumerate(header):
        view.add_column(column, justify="right" if number else "left")
    for line in body:
        view.add_row(*line)
    return view


def write(config: LanguageConfig, workdir: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.md` and `report.html` into the workdir."""
    header, body = lines(results["language"])
    rule = ["---", *["---:"] * (len(header) - 1)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *body])
    (workdir / "results.md").write_text(text + "\n")
    sections = [page.table(_CAPTION, header, body)]
    directory = workdir / "loss_table"
    if directory.exists():
        losses = LossTable.open(directory)
        figure = figures.loss_histogram(losses.loss_N(), losses.temperature, None)
        sections.append(
            page.figure(
                figures.to_svg(figure).encode(), "image/svg+xml",
                "Losses of the pre-trained model on the training data, their median and the "
                "weights they become",
            )
        )  # fmt: skip
    (workdir / "report.html").write_text(page.page(f"easy_jax: {config.name}", sections))
