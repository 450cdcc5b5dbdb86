"""Claims on FLOW and on averaging the weights before and after fine-tuning (WiSE-FT)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from easy_jax.theory import beyond, closed_form
from easy_jax.theory import claim_checks as checks
from easy_jax.theory.claim_checks import Claim
from easy_jax.theory.problem import Problem, total_error

MAX_STEPS = 1000
_BETAS = 100  # from 1e-3 to 1


def check(problem_P: Problem) -> Iterator[Claim]:
    """Checks the claims on the best average and on the best FLOW compared with it."""
    yield Claim(
        "(16), (17), Lemma F.4",
        "the best omega and its error",
        "Newton's step by autodiff",
        checks.worst(_lemma_f4, problem_P),
        1e-9,
    )
    yield Claim(
        "(13), (18)",
        "the best average minus the better of theta_pre and theta_ft is below 0",
        "errors by definition",
        checks.worst(_ends, problem_P),
        0.0,
    )
    ratio_P = jax.lax.map(_ratio, problem_P)
    advantage_P = jax.vmap(beyond.flow_advantage)(problem_P)
    better = ratio_P < 1 - 1e-9
    yield Claim(
        "section 7",
        "best FLOW / best average - 1: never worse, up to the grid",
        f"{_BETAS} betas, K up to {MAX_STEPS}",
        float(jnp.max(ratio_P) - 1),
        2e-3,
    )
    yield Claim(
        "docs/theory.md",
        f"strictly better ({float(better.mean()):.1%} of the problems) if and "
        "only if rho > 0 and rho a > c: share where this fails",
        "the same grid",
        float(jnp.mean(better != (advantage_P > 0))),
        0.0,
    )
    yield Claim(
        "section 7",
        "rho = 0: FLOW is model averaging, omega = (1 + beta)^-K",
        "(16)",
        checks.worst(_is_averaging, problem_P),
        1e-12,
    )


def _lemma_f4(problem: Problem) -> jax.Array:
    # The error is quadratic in omega, so one Newton step gives the minimum.
    def error(omega: jax.Array) -> jax.Array:
        return total_error(problem, closed_form.averaging(problem, omega))

    zero = jnp.zeros(())
    best = -jax.grad(error)(zero) / jax.grad(jax.grad(error))(zero)
    omega, value = closed_form.optimal_averaging(problem)
    return jnp.maximum(checks.error(omega, best), checks.error(value, error(best)))


def _ends(problem: Problem) -> jax.Array:
    # (18): the best average's error minus the smaller error of the two ends; claimed negative.
    _, value = closed_form.optimal_averaging(problem)
    better = jnp.minimum(
        total_error(problem, problem.theta_pre), total_error(problem, problem.theta_ft)
    )
    return value - better


def _ratio(problem: Problem) -> jax.Array:
    betas = jnp.geomspace(1e-3, 1.0, _BETAS)
    _, _, error = closed_form.optimal_flow(problem, betas, MAX_STEPS)
    return error / closed_form.optimal_averaging(problem)[1]


def _is_averaging(problem: Problem) -> jax.Array:
    uncorrelated = problem.replace(rho=0.0)  # type: ignore[attr-defined]
    ours = closed_form.flow_iterate(uncorrelated, 0.3, checks.STEPS)
    return checks.error(ours, closed_form.averaging(uncorrelated, 1.3**-checks.STEPS))
