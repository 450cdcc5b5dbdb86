"""Figures of the theory, in Okabe and Ito's palette for colour-blind readers.

Plane coordinates: a point theta_ft + |e| (x e_bar + y e_perp) is drawn at (x, y), so that
theta_ft is the origin and theta_pre is (1, 0).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from easy_jax.theory import beyond, closed_form
from easy_jax.theory.problem import Problem, fine_tuning_error, pretraining_error, total_error
from easy_jax.theory.simulation import Convergence

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_BETAS = ((0.1, RED, "o"), (0.3, ORANGE, "s"), (1.0, PINK, "^"))


def example_problem(
    rho: float = 0.6, angle: float = 2 * math.pi / 3, strength: float = 4.0
) -> Problem:
    """The two-dimensional problem of the figures: Sigma_pre = I + strength u u^T, u at `angle`.

    Args:
      rho: the correlation, in [0, 1).
      angle: the angle between u and e_bar, in radians.
      strength: the strength in Sigma_pre, at least 0.

    Returns:
      A `Problem` with |e| = 1.

    Example:
      >>> float(example_problem().e_norm)
      1.0
    """
    u = jnp.array([math.cos(angle), math.sin(angle)])
    return Problem(
        theta_pre=jnp.array([1.0, 0.0]),
        theta_ft=jnp.zeros(2),
        e_perp=jnp.array([0.0, 1.0]),
        rho=rho,
        sigma_pre=jnp.eye(2) + strength * jnp.outer(u, u),
    )


def trajectories(problem: Problem, max_steps: int = 40) -> Figure:
    """Plots iterates of vanilla and FLOW, model averaging, and contours of the total error."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axis = figure.subplots()
    x, y = np.meshgrid(np.linspace(-0.15, 1.1, 201), np.linspace(-0.72, 0.25, 201))
    points = jnp.stack([jnp.asarray(x.ravel()), jnp.asarray(y.ravel())], axis=1)
    errors = _map(lambda point: total_error(problem, _at(problem, point)))(points)
    contours = axis.contour(
        x, y, np.asarray(errors).reshape(x.shape), 14, colors="#bbbbbb", linewidths=0.7
    )
    axis.clabel(contours, fontsize=7, fmt="%.2g")
    steps = jnp.arange(max_steps + 1)
    vanilla = _plane(problem, _map(lambda k: closed_form.vanilla_iterate(problem, k))(steps))
    axis.plot(
        *vanilla, color=BLACK, marker="x", markersize=5, linewidth=1, label="vanilla, η = 1/2"
    )
    for beta, colour, marker in _BETAS:
        path = _map(lambda k, beta=beta: closed_form.flow_iterate(problem, beta, k))(steps)
        axis.plot(
            *_plane(problem, path),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1,
            label=f"FLOW, β = {beta:g}",
        )
    axis.plot([0, 1], [0, 0], color=BLUE, linestyle="--", label="model averaging")
    omega, error = closed_form.optimal_averaging(problem)
    axis.plot(
        float(omega),
        0,
        color=BLUE,
        marker="D",
        markersize=9,
        linestyle="",
        label=f"best average, error {float(error):.3f}",
    )
    beta, step, error = closed_form.optimal_flow(problem, jnp.geomspace(1e-2, 1, 200), 200)
    best = _plane(problem, closed_form.flow_iterate(problem, beta, step)[None, :])
    axis.plot(
        *best,
        color=GREEN,
        marker="*",
        markersize=15,
        linestyle="",
        label=f"best FLOW, error {float(error):.3f}",
    )
    for name, where, offset in (("θ_ft", (0, 0), (-26, 6)), ("θ_pre", (1, 0), (4, 8))):
        axis.annotate(name, where, xytext=offset, textcoords="offset points", fontsize=12)
    axis.set_xlabel("along ē, in units of ‖e‖")
    axis.set_ylabel("along e⊥, in units of ‖e‖")
    axis.set_title(f"Iterates and the total error, ρ = {float(problem.rho):g}")
    axis.legend(loc="lower right", fontsize=9)
    return figure


def errors_by_step(problem: Problem, max_steps: int = 60) -> Figure:
    """Plots pre-training, fine-tuning and total error against the step."""
    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    steps = jnp.arange(max_steps + 1)
    omega, _ = closed_form.optimal_averaging(problem)
    average = closed_form.averaging(problem, omega)
    panels = (
        ("pre-training error (forgotten)", pretraining_error),
        ("fine-tuning error (left to learn)", fine_tuning_error),
        ("total error", total_error),
    )
    axes = figure.subplots(1, 3)
    for axis, (title, error) in zip(axes, panels, strict=True):
        path = _map(lambda k: closed_form.vanilla_iterate(problem, k))(steps)
        values = _map(lambda theta, error=error: error(problem, theta))(path)
        axis.plot(steps, values, color=BLACK, label="vanilla, η = 1/2")
        for beta, colour, _ in _BETAS:
            path = _map(lambda k, beta=beta: closed_form.flow_iterate(problem, beta, k))(steps)
            values = _map(lambda theta, error=error: error(problem, theta))(path)
            axis.plot(steps, values, color=colour, label=f"FLOW, β = {beta:g}")
        axis.axhline(
            float(error(problem, average)), color=BLUE, linestyle="--", label="best average"
        )
        axis.set_title(title)
        axis.set_xlabel("step K")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def stalling(rhos: Sequence[float] = (0.3, 0.6, 0.9)) -> Figure:
    """Plots the stalled direction's remaining share by beta, for FLOW, vanilla and KL-DRO."""
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rho, colour, line in zip(rhos, (BLUE, GREEN, RED), ("-", "--", "-."), strict=True):
        stable = (1 + rho**2) / (2 * rho**2)  # beyond, lambda2 < -1
        for low, high, width in ((0.01, stable, 1.8), (stable, 1 / rho**2, 0.6)):
            betas = jnp.geomspace(low, high, 300)
            left.plot(
                betas,
                closed_form.spectrum(betas, rho)[0],
                color=colour,
                linestyle=line,
                linewidth=width,
                label=f"ρ = {rho:g}" if low == 0.01 else None,
            )
        left.plot(1 / rho, rho, color=colour, marker="o", linestyle="")
    left.axvspan(0.01, 1, color="#dddddd", alpha=0.5, linewidth=0)
    left.text(0.012, 0.06, "FLOW with τ ≤ 2‖e‖²\n(Lemma F.3)", fontsize=9)
    left.plot([], [], color="#555555", marker="o", linestyle="", label="vanilla, β = 1/ρ")
    left.set_xscale("log")
    left.set_ylim(0, 1.03)
    left.set_xlabel("β (right of each dot: KL-DRO)")
    left.set_ylabel("λ₁: share of the stalled direction\nleft after one step")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    left.grid(alpha=0.3)
    rho = 0.6
    betas = jnp.geomspace(1e-3, 1, 400)
    styles = ((1, BLUE, "-"), (10, GREEN, "--"), (100, ORANGE, "-."), (1000, RED, ":"))
    for steps, colour, line in styles:
        gamma = closed_form.spectrum(betas, rho)[0] ** steps / (1 + (betas * rho) ** 2)
        right.plot(betas, gamma, color=colour, linestyle=line, label=f"K = {steps}")
    right.set_xscale("log")
    right.set_ylim(0, 1.03)
    right.set_xlabel(f"β, at ρ = {rho:g}")
    right.set_ylabel("γ(K, β): share left after K steps")
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    right.grid(alpha=0.3)
    return figure


def phases(
    strengths: Sequence[float] = (1.0, 10.0, 100.0), size: int = 49, max_steps: int = 300
) -> Figure:
    """Plots the ratio of `phase_diagram` by rho and angle, with the exact boundary."""
    figure = Figure(figsize=(12.0, 4.4), layout="constrained")
    axes = figure.subplots(1, len(strengths), sharey=True)
    rhos = jnp.linspace(0.0, 0.98, size)
    angles = jnp.linspace(0.0, math.pi, size)
    betas = jnp.geomspace(1e-3, 1, 60)
    for axis, strength in zip(axes, strengths, strict=True):
        ratio, advantage = beyond.phase_diagram(rhos, angles, strength, 1.0, betas, max_steps)
        image = axis.pcolormesh(
            np.degrees(angles),
            rhos,
            np.minimum(ratio, 1.0),
            cmap="cividis",
            vmin=0.4,
            vmax=1.0,
            rasterized=True,
        )
        axis.contour(np.degrees(angles), rhos, advantage, levels=[0.0], colors=RED, linewidths=2)
        axis.set_title(f"Σ_pre = I + {strength:g} u uᵀ")
        axis.set_xlabel("angle of u to ē (degrees)")
        axis.set_xticks([0, 45, 90, 135, 180])
    axes[0].set_ylabel("ρ")
    axes[0].plot([], [], color=RED, linewidth=2, label="exact boundary")
    axes[0].legend(loc="upper left", fontsize=9)
    figure.colorbar(image, ax=axes, label="best FLOW / best average, total error", extend="min")
    return figure


def learning_rate_confound(
    problem: Problem, learning_rate: float = 0.25, max_steps: int = 40
) -> Figure:
    """Plots the pre-training error by step and by fine-tuning error, for rescaled weights as well.

    This separates the effect of FLOW's weights from that of its smaller effective learning rate.
    """
    tau = beyond.median_temperature(problem.e_norm)
    mean = closed_form.mu(tau, problem.e_norm)
    flow = lambda rate: lambda k: closed_form.flow_iterate_gd(problem, tau, k, rate)  # noqa: E731
    vanilla = lambda rate: lambda k: closed_form.vanilla_iterate(problem, k, rate)  # noqa: E731
    curves = (
        ("vanilla", vanilla(learning_rate), BLACK, "x"),
        ("uniform weights of FLOW's mean", vanilla(learning_rate * mean), SKY, "v"),
        ("FLOW, weights of mean one", flow(learning_rate / mean), ORANGE, "s"),
        ("FLOW, as in the paper", flow(learning_rate), RED, "o"),
    )
    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = jnp.arange(max_steps + 1)
    for label, iterate, colour, marker in curves:
        path = _map(iterate)(steps)
        forgotten = _map(lambda theta: pretraining_error(problem, theta))(path)
        left_to_learn = _map(lambda theta: fine_tuning_error(problem, theta))(path)
        left.plot(steps, forgotten, color=colour, marker=marker, markevery=5, label=label)
        right.plot(left_to_learn, forgotten, color=colour, marker=marker, markevery=2, label=label)
    left.set_xlabel(f"step K, all with η = {learning_rate:g}")
    right.set_xlabel("fine-tuning error (left to learn)")
    for axis in (left, right):
        axis.set_ylabel("pre-training error (forgotten)")
        axis.grid(alpha=0.3)
    right.legend()
    return figure


def convergence_rate(convergence: Convergence) -> Figure:
    """Plots the distance of simulated FLOW to its closed form against N, and the line N^(-1/2)."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    sizes, rms = np.array(convergence.sizes), np.array(convergence.rms)
    axis.loglog(
        sizes, rms, color=BLUE, marker="o", label=f"simulated, slope {convergence.slope:.3f}"
    )
    axis.loglog(
        sizes, rms[0] * np.sqrt(sizes[0] / sizes), color=BLACK, linestyle="--", label="slope −1/2"
    )
    axis.set_xlabel("examples N")
    axis.set_ylabel("root mean square of ‖θ_K − closed form‖")
    axis.legend()
    axis.grid(alpha=0.3, which="both")
    return figure


def _map(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Vectorises and jits a function; compiling its operations one by one takes longer."""
    return jax.jit(jax.vmap(function))


def _plane(problem: Problem, theta_KD: jax.Array) -> np.ndarray:
    """Returns the plane coordinates of iterates, [2, K]."""
    axes_2D = jnp.stack([problem.e_bar, problem.e_perp])
    return np.asarray(axes_2D @ (theta_KD - problem.theta_ft[None, :]).T / problem.e_norm)


def _at(problem: Problem, point: jax.Array) -> jax.Array:
    """Returns the parameters at plane coordinates, [d]."""
    offset = point[0] * problem.e_bar + point[1] * problem.e_perp
    return problem.theta_ft + problem.e_norm * offset
