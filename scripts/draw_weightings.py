"""Draws the weight of every weighting against the target's probability: docs/weightings.svg.

    python scripts/draw_weightings.py [docs/weightings.svg]

Left: weightings that read the current model, against its probability p. The distribution over the
other 49,151 tokens, which `eaft` and `deft` read, is even (solid), or all on one token (dashed).
Right: weightings that read the frozen model, against its probability p0. `excess` and the controls
depend on the whole batch, and are not drawn.
"""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import easy_jax as ej

VOCAB = 49_152
P = np.linspace(1e-4, 1.0 - 1e-4, 1001)
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#888888")


def stats(even: bool) -> ej.TokenStats:
    """Returns the statistics of distributions with p on the target, and the rest even or on one."""
    count = VOCAB - 1 if even else 1
    rest = (1.0 - P) / count
    fields = {
        "nll": -np.log(P),
        "entropy": -P * np.log(P) - count * rest * np.log(rest),
        "collision": P**2 + count * rest**2,
        "frozen_nll": np.full_like(P, -np.log(0.3)),
        "old_nll": np.full_like(P, -np.log(0.3)),
    }
    return ej.TokenStats(**jax.tree.map(jnp.asarray, fields))


def current() -> Iterator[tuple[str, ej.weightings.Weighting]]:
    """Yields the weightings that read the current model, with their labels."""
    yield "dft: p", ej.weightings.get("dft")
    yield "power: p^½", ej.weightings.get("power", exponent=0.5)
    yield "talr, τ = 4", ej.weightings.get("talr", temperature=4.0)
    yield "deft: p^C", ej.weightings.get("deft")
    yield "eaft: H / ln 20", ej.weightings.get("eaft")
    yield "profit: [p ≥ 0.1]", ej.weightings.get("profit")
    yield "iw_token, iw: p0 = 0.3", ej.weightings.get("iw_token")
    yield "psft: p_old = 0.3", ej.weightings.get("psft")


def frozen() -> Iterator[tuple[str, ej.weightings.Weighting]]:
    """Yields the weightings that read the frozen model, with their labels."""
    yield "flow, τ = 1", ej.weightings.get("flow", temperature=1.0)
    yield "flow_token, τ = 2", ej.weightings.get("flow_token", temperature=2.0)
    yield "stm: [p0 ≥ 0.4]", ej.weightings.get("stm")
    threshold = float(-np.log(0.2))
    yield "easiest, from p0 = 0.2", ej.weightings.Easiest(threshold=threshold)
    yield "hardest, to p0 = 0.2", ej.weightings.Hardest(threshold=threshold)


def _lines(axes: Axes, rules: Iterator[tuple[str, ej.weightings.Weighting]], own: bool) -> None:
    for colour, (label, rule) in zip(COLOURS, rules, strict=False):
        loss = jnp.asarray(-np.log(P))
        found = stats(even=True) if own else ej.TokenStats(loss, frozen_nll=loss)
        axes.plot(P, np.asarray(rule(found)), color=colour, label=label)
        if rule.reads_distribution():
            axes.plot(P, np.asarray(rule(stats(even=False))), color=colour, linestyle="--")
    axes.set_ylim(-0.03, 1.9 if own else 1.05)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", default="docs/weightings.svg")
    matplotlib.rcParams["svg.hashsalt"] = "weightings"  # the same file every time
    figure = Figure(figsize=(9.5, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, current(), own=True)
    _lines(right, frozen(), own=False)
    left.set_xlabel("p, the current model's probability of the target")
    right.set_xlabel("p0, the frozen model's probability of the target")
    left.set_ylabel("weight w")
    figure.savefig(parser.parse_args().path, metadata={"Date": None})


if __name__ == "__main__":
    main()
