"""The figures of the report, in colours that the colour-blind can tell apart."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text

from easy_jax.experiments.results import condition_name

Row = Mapping[str, Any]

# One colour per family, one marker per member.
_STYLES = {
    "base": ("#888888", "s"),
    "standard": ("#000000", "o"),
    "probe_standard": ("#000000", "s"),
    "linear_probe": ("#888888", "v"),
    "bn_head": ("#888888", "^"),
    "l2": ("#CC79A7", "D"),
    "wise_ft": ("#009E73", "P"),
    "flow": ("#D55E00", "o"),
    "flow_token": ("#D55E00", "X"),
    "flow_weighted_head": ("#D55E00", "s"),
    "flow_no_head_stage": ("#D55E00", "*"),
    "flow_wise_ft": ("#E69F00", "P"),
    "control_uniform": ("#0072B2", "<"),
    "control_shuffled": ("#0072B2", ">"),
    "control_mean_one": ("#0072B2", "X"),
}
_OTHERS = (("#332288", "h"), ("#88CCEE", "p"), ("#117733", "8"), ("#882255", "d"))
_VARIANTS = ("p", "8", "d", "v", "^", "<", ">")
_RIGHT, _WRONG, _ACCENT = "#0072B2", "#D55E00", "#000000"


def style(method: str) -> tuple[str, str]:
    """Returns the colour and marker of a method, which are the same in every figure.

    A variant such as `wise_ft_0.3` has the colour of its family.
    """
    if method in _STYLES:
        return _STYLES[method]
    number = sum(map(ord, method))
    families = [name for name in _STYLES if method.startswith(f"{name}_")]
    if families:
        return _STYLES[max(families, key=len)][0], _VARIANTS[number % len(_VARIANTS)]
    return _OTHERS[number % len(_OTHERS)]


def to_svg(figure: Figure) -> str:
    """Returns a figure as SVG, without date or random ids, so equal figures give equal text."""
    import matplotlib

    ticks = {label for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    for text in {*figure.findobj(Text)} - ticks:
        text.set_parse_math(False)  # names may have a $; powers of ten on an axis are formulas
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "easy_jax"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()


def scatter(
    rows: Sequence[Row], names: tuple[str, str], alpha_curves: Sequence[Row] = ()
) -> Figure:
    """Draws retained pre-training accuracy against target accuracy, for each method and rate.

    A point is the mean over seeds; larger points are larger learning rates, joined by a line.

    Args:
      rows: of results.
      names: of the pre-training and the target task.
      alpha_curves: of `results.select`; dashed lines through the alphas of WiSE-FT.
    """
    noises = sorted({row["label_noise"] for row in rows}, reverse=True)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    rates = sorted({row["learning_rate"] for row in rows})
    # Room between the label of one panel and the title of the next.
    layout = ConstrainedLayoutEngine(h_pad=0.15)
    figure = Figure(figsize=(8.6, 4.8 * len(noises)), layout=layout)
    axes = figure.subplots(len(noises), 1, squeeze=False)[:, 0]
    for axis, noise in zip(axes, noises, strict=True):
        for method in methods:
            colour, marker = style(method)
            points = []
            for rate in rates:
                chosen = [
                    row
                    for row in rows
                    if (row["method"], row["learning_rate"], row["label_noise"])
                    == (method, rate, noise)
                ]
                if chosen:
                    target = np.mean([row["target"] for row in chosen])
                    retained = np.mean([row["pretrain_after"] for row in chosen])
                    points.append((target, retained, _area(rate, rates)))
            x, y, size = np.array(points).T
            axis.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
            axis.scatter(x, y, s=size, color=colour, marker=marker, alpha=0.8, linewidths=0)
        for curve in alpha_curves:
            if curve["label_noise"] == noise:
                x, y = (
                    [point[key] for point in curve["points"]]
                    for key in ("target", "pretrain_after")
                )
                axis.plot(x, y, "--.", color=style(curve["method"])[0], linewidth=1.2, markersize=4)
        axis.set_xlabel(f"target learnt: {names[1]}, test accuracy (%)")
        axis.set_ylabel(f"pre-training retained: {names[0]}, test accuracy (%)")
        axis.set_title(condition_name(noise))
        axis.grid(alpha=0.3)
    handles = _markers(methods)
    if len(rates) > 1:
        handles += [
            Line2D(
                [],
                [],
                color="#555555",
                marker="o",
                linestyle="",
                markersize=np.sqrt(_area(rate, rates)),
                label=f"learning rate {rate:g}",
            )
            for rate in rates
        ]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _markers(methods: Iterable[str]) -> list[Line2D]:
    """Returns the handles for a legend of the methods."""
    return [
        Line2D([], [], color=style(m)[0], marker=style(m)[1], linestyle="", markersize=8, label=m)
        for m in methods
    ]


def _area(rate: float, rates: Sequence[float]) -> float:
    """Returns a marker's area in points squared, larger for larger learning rates."""
    return 60.0 if len(rates) == 1 else 36.0 + 34.0 * rates.index(rate)


def trade_off(
    points: Mapping[str, tuple[float, float]], paths: Sequence[Sequence[str]] = ()
) -> Figure:
    """Draws what methods learnt against what they forgot, in nats; `paths` are joined by lines."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axis = figure.subplots()
    for path in paths:
        learnt, forgotten = zip(*(points[name] for name in path), strict=True)
        axis.plot(learnt, forgotten, color="#555555", linewidth=0.8, alpha=0.6, zorder=1)
    for name, (x, y) in points.items():
        colour, marker = style(name)
        axis.scatter([x], [y], s=60, color=colour, marker=marker, linewidths=0, zorder=2)
    axis.axhline(0.0, color="#aaaaaa", linewidth=0.8, zorder=0)
    axis.set_xlabel("learnt: cross-entropy taken off held-out problems (nats per token)")
    axis.set_ylabel("forgotten: added to general text (nats per token)")
    axis.grid(alpha=0.3)
    figure.legend(handles=_markers(points), loc="outside right upper", frameon=False)
    return figure


def loss_histogram(loss_N: np.ndarray, tau: float, wrong_N: np.ndarray | None) -> Figure:
    """Draws losses of the frozen model on a logarithmic axis, tau, and the weight as a curve."""
    loss_N = np.asarray(loss_N, np.float64)
    # A log axis has no zero: the first bin holds everything below tau / 1000.
    floor = max(0.8 * min(loss_N.min(), tau), tau * 1e-3)
    shown = np.maximum(loss_N, floor)
    bins = np.geomspace(floor, max(shown.max(), tau) * 1.1, 41).tolist()
    figure = Figure(figsize=(7.6, 4.0), layout="constrained")
    axis = figure.subplots()
    if wrong_N is not None and wrong_N.any():
        parts, labels = [shown[~wrong_N], shown[wrong_N]], ["label right", "label wrong"]
        axis.hist(parts, bins, stacked=True, color=[_RIGHT, _WRONG], alpha=0.75, label=labels)
    else:
        axis.hist(shown, bins, color=_RIGHT, alpha=0.75, label="examples")
    axis.axvline(tau, color=_ACCENT, linestyle="--", label=f"τ = median = {tau:.3g}")
    axis.set_xscale("log")
    axis.set_xlabel("loss of the frozen model (nats)")
    axis.set_ylabel("examples")
    right = axis.twinx()
    grid = np.geomspace(bins[0], bins[-1], 300)
    right.plot(grid, np.exp(-grid / tau), color=_ACCENT, linewidth=1.8, label="w = exp(−loss/τ)")
    right.set_ylabel("weight w")
    right.set_ylim(0.0, 1.05)
    handles = [*axis.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axis.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=4, frameon=False
    )
    return figure


def learning_curves(curves: Mapping[str, Sequence[Row]], names: tuple[str, str]) -> Figure:
    """Draws validation accuracy over each method's stages, for every task with validation data.

    Args:
      curves: method -> entries with `step`, `target` and, if it was measured, `pretrain`, in order.
      names: of the pre-training and the target task.
    """
    panels = {"target": f"target: {names[1]}", "pretrain": f"pre-training task: {names[0]}"}
    shown = [key for key in panels if all(key in e for each in curves.values() for e in each)]
    figure = Figure(figsize=(6.0 * len(shown) - 1.0, 4.0), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, key in zip(axes, shown, strict=True):
        for method, entries in curves.items():
            colour, marker = style(method)
            steps, values = ([entry[field] for entry in entries] for field in ("step", key))
            axis.plot(
                steps,
                values,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.2,
                label=method,
                alpha=0.85,
            )
        axis.set_title(panels[key])
        axis.set_xlabel("step")
        axis.set_ylabel("validation accuracy (%)")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def deciles(rows: Sequence[Row]) -> Figure:
    """Draws target accuracy by decile of the probed model's loss, as means over seeds."""
    figure = Figure(figsize=(8.6, 4.0), layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(row["method"] for row in rows):
        colour, marker = style(method)
        values = [row["target_by_decile"] for row in rows if row["method"] == method]
        x = np.arange(1, len(values[0]) + 1)
        axis.plot(
            x,
            np.mean(values, axis=0),
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.2,
            alpha=0.85,
            label=method,
        )
        axis.set_xticks(x)
    axis.set_xlabel("decile of the probed model's loss: easiest to hardest")
    axis.set_ylabel("target test accuracy (%)")
    axis.grid(alpha=0.3)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def example_pictures(
    image_NHWC: np.ndarray, titles: Sequence[str], wrong_N: np.ndarray | None = None
) -> Figure:
    """Draws a row-wise grid of small pictures with titles; wrong labels are in colour.

    Args:
      image_NHWC: uint8 colours, or one channel of float in [-1, 1].
      titles: N of them.
      wrong_N: boolean.
    """
    columns = 10
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(11.0, 1.5 * rows), layout="constrained")
    for index, axis in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axis.axis("off")
        if index < len(titles):
            axis.imshow(image_NHWC[index], cmap="gray", vmin=-1.0, vmax=1.0)
            is_wrong = wrong_N is not None and bool(wrong_N[index])
            color = _WRONG if is_wrong else "black"
            axis.set_title(titles[index], fontsize=8, color=color)
    return figure
