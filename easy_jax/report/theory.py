"""`easy-jax theory`: the table of claims, `theory.json`, figures and one page."""

import dataclasses
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich import box
from rich.progress import track
from rich.table import Table

from easy_jax.core import weightings
from easy_jax.io import files
from easy_jax.io.checks import ConfigError
from easy_jax.io.terminal import plain_console
from easy_jax.report import page
from easy_jax.theory import beyond, claims, figures, simulation

_HEADER = ("source", "claim", "compared with", "value", "at most", "holds")


def run(
    workdir: str | os.PathLike[str], seed: int = 0, num_problems: int = claims.NUM_PROBLEMS
) -> dict[str, Any]:
    """Checks section 7 of the paper and the results that go beyond it, and draws the figures.

    Args:
      workdir: for `theory.json`, the figures (PNG) and `theory.html`.
      seed: of the random problems and samples.
      num_problems: the number of random problems.

    Returns:
      The content of `theory.json`.

    Raises:
      ConfigError: the workdir cannot be written.
    """
    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "theory.json").touch()
    except OSError as error:
        raise ConfigError(
            f"cannot write to the workdir {workdir}: {error}; choose another with --workdir"
        ) from error
    start = time.perf_counter()
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed))
        convergence = _convergence(keys[1])
        checks = claims.check_claims(keys[0], weightings.flow_weights, convergence, num_problems)
        rows = list(track(checks, "checking", total=claims.NUM_CLAIMS, transient=True))
        pictures = []
        for name, figure, caption in track(list(_figures(convergence)), "drawing", transient=True):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=130)
            files.write(workdir / f"{name}.png", buffer.getvalue())
            pictures.append(page.figure(buffer.getvalue(), "image/png", caption))
    results = {
        "seed": seed,
        "claims": [{**dataclasses.asdict(row), "holds": row.holds} for row in rows],
        "all_hold": all(row.holds for row in rows),
        "seconds": time.perf_counter() - start,
    }
    files.write_json(workdir / "theory.json", results)
    _print(rows, workdir)
    lines = [_line(row) for row in rows]
    introduction = (
        "<p>FLOW in linear regression: section 7 of the paper, claim by claim, and five steps "
        "beyond it, compared with linear algebra, autodiff and sampling. docs/theory.md has the "
        "derivations.</p>"
    )
    sections = [introduction, page.table("Claims", _HEADER, lines, kind="text"), *pictures]
    files.write(workdir / "theory.html", page.page("FLOW in linear regression", sections))
    return results


def _line(row: claims.Claim) -> tuple[str, ...]:
    holds = "yes" if row.holds else "NO"
    return row.source, row.statement, row.compared, f"{row.value:.2g}", f"{row.bound:.2g}", holds


def _print(rows: list[claims.Claim], workdir: Path) -> None:
    console = plain_console()
    if not console.is_terminal:
        console.width = 150
    table = Table(*_HEADER, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*_line(row))
    console.print(table)
    failed = [row.source for row in rows if not row.holds]
    outcome = f"{len(failed)} claims FAIL: {failed}" if failed else f"all {len(rows)} claims hold"
    console.print(f"{outcome}. output: {workdir / 'theory.html'}")


def _convergence(key: jax.Array) -> simulation.Convergence:
    problem = figures.example_problem()
    return simulation.convergence(
        problem,
        key,
        (256, 2048, 16384),
        repeats=64,
        temperature=beyond.median_temperature(problem.e_norm),
        steps=20,
        learning_rate=0.4,
        weight_fn=weightings.flow_weights,
    )


def _figures(convergence: simulation.Convergence) -> Iterator[tuple[str, Figure, str]]:
    """Yields name, figure and caption of each figure."""
    problem = figures.example_problem()
    yield (
        "trajectories",
        figures.trajectories(problem),
        "The plane of ē and e⊥, θ_ft at the origin and θ_pre at (1, 0). FLOW leaves the straight "
        "line of model averaging towards −e⊥, where the total error (grey contours) is smaller; "
        "vanilla descent jumps across and loses θ_pre within a few steps.",
    )
    yield (
        "errors_by_step",
        figures.errors_by_step(problem),
        "The same problem. The smaller β (the lower the temperature), the longer FLOW stays at a "
        "total error below that of the best average.",
    )
    yield (
        "stalling",
        figures.stalling(),
        "Left: the eigenvalue λ₁ of the stalled direction falls in β all the way from FLOW by "
        "vanilla descent (dots, β = 1/ρ) to KL-DRO (up to β = 1/ρ²), one family. Where lines are "
        "thin, another direction diverges at η = 1/(2μ). Right: what is left of that direction "
        "after K steps: β sets how long learning is stalled.",
    )
    yield (
        "phase_diagram",
        figures.phases(),
        "Best total error of FLOW over that of the best average, each tuned. On one side of the "
        "red curve, which is exact, FLOW is strictly better; on the other its best is averaging. "
        "The ratio does not depend on ‖e‖. The stripes on the right are whole numbers of steps.",
    )
    yield (
        "learning_rate",
        figures.learning_rate_confound(problem),
        "τ = median. Left: at equal steps, part of what FLOW keeps is its smaller step (uniform "
        "weights of the same mean keep some of it), and more is the choice of examples (weights of "
        "mean one). Right: the same paths by what is left to learn. FLOW forgets less while much "
        "is left; vanilla descent, stopped in time, forgets less when little is.",
    )
    yield (
        "convergence",
        figures.convergence_rate(convergence),
        "FLOW as the library runs it (its weighting function, optax's SGD) on N sampled examples, "
        "64 samples each: the distance to the closed form (8) falls like N^(−1/2).",
    )
