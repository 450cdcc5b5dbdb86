"""The linear-regression problem of the paper's section 7, its errors and its random instances.

Pre-training:  y = <theta_pre, x>,  E[x x^T] = sigma_pre, at least the identity.
Fine-tuning:   y = <theta_ft, x>,   x ~ N(0, Sigma),
               Sigma = I + rho (e_bar e_perp^T + e_perp e_bar^T),
with e = theta_pre - theta_ft, e_bar = e / |e|, and e_perp a unit vector orthogonal to e.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

_ATOL = {np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-8}


@chex.dataclass(frozen=True, init=False, mappable_dataclass=False)
class Problem:
    """A pair of a pre-training and a fine-tuning task (eqs. 3 to 5), checked at construction.

    Attributes:
      theta_pre: [d], the pre-trained parameters.
      theta_ft: [d], the parameters of the fine-tuning task.
      e_perp: [d], a unit vector orthogonal to `theta_pre - theta_ft`.
      rho: scalar in [0, 1), the correlation along e and e_perp.
      sigma_pre: [d, d], symmetric, at least the identity.

    Raises:
      ValueError: a field has a wrong shape or violates a condition above. Under `jit`, `vmap` and
        `grad`, where values are not known, only shapes are checked.

    Example:
      >>> problem = Problem(theta_pre=jnp.array([1.0, 0.0]), theta_ft=jnp.zeros(2),
      ...                   e_perp=jnp.array([0.0, 1.0]), rho=0.5, sigma_pre=jnp.eye(2))
      >>> float(total_error(problem, problem.theta_pre))
      1.0
    """

    theta_pre: jax.Array
    theta_ft: jax.Array
    e_perp: jax.Array
    rho: jax.Array
    sigma_pre: jax.Array

    # Not __post_init__, which chex also calls for gradients and batches of problems.
    def __init__(
        self,
        theta_pre: chex.Array,
        theta_ft: chex.Array,
        e_perp: chex.Array,
        rho: chex.Numeric,
        sigma_pre: chex.Array,
    ):
        fields = (theta_pre, theta_ft, e_perp, rho, sigma_pre)
        dtype = jnp.result_type(float, *fields)
        for field, value in zip(dataclasses.fields(self), fields, strict=True):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, jnp.asarray(value, dtype))
        _check(self)

    @property
    def e(self) -> jax.Array:
        """theta_pre - theta_ft, [d]."""
        return self.theta_pre - self.theta_ft

    @property
    def e_norm(self) -> jax.Array:
        """|e|, a scalar."""
        return jnp.linalg.norm(self.e)

    @property
    def e_bar(self) -> jax.Array:
        """e / |e|, [d]."""
        return self.e / self.e_norm

    @property
    def sigma(self) -> jax.Array:
        """Sigma = I + rho (e_bar e_perp^T + e_perp e_bar^T), [d, d]."""
        cross = jnp.outer(self.e_bar, self.e_perp)
        return jnp.eye(cross.shape[0], dtype=cross.dtype) + self.rho * (cross + cross.T)


def random_problem(
    key: jax.Array,
    dim: int,
    rho: chex.Numeric,
    *,
    e_norm: chex.Numeric = 1.0,
    sigma_scale: chex.Numeric = 4.0,
) -> Problem:
    """Draws a random problem, with uniform directions and `sigma_pre = I + sigma_scale A A^T`.

    Args:
      key: a JAX random key.
      dim: d, at least 2.
      rho: the correlation, in [0, 1).
      e_norm: length of `theta_pre - theta_ft`.
      sigma_scale: the mean eigenvalue of `sigma_pre - I`.

    Returns:
      A problem in JAX's default float type (float64 under `jax_enable_x64`).

    Raises:
      ValueError: `dim` is below 2, or a field of the problem is not valid.

    Example:
      >>> random_problem(jax.random.key(0), dim=3, rho=0.5).e_perp.shape
      (3,)
    """
    if dim < 2:
        raise ValueError(f"dim is {dim}; e and e_perp need at least 2 dimensions")
    keys = jax.random.split(key, 4)
    theta_ft = jax.random.normal(keys[0], (dim,))
    direction = jax.random.normal(keys[1], (dim,))
    theta_pre = theta_ft + e_norm * direction / jnp.linalg.norm(direction)
    # Computed from the rounded parameters: with a small e_norm, rounding turns their difference.
    e_bar = (theta_pre - theta_ft) / jnp.linalg.norm(theta_pre - theta_ft)
    e_perp = jax.random.normal(keys[2], (dim,))
    for _ in range(2):  # twice: one pass loses orthogonality where the draw is almost parallel
        e_perp = e_perp - jnp.dot(e_perp, e_bar) * e_bar
        e_perp = e_perp / jnp.linalg.norm(e_perp)
    a = jax.random.normal(keys[3], (dim, dim)) / jnp.sqrt(dim)
    sigma_pre = jnp.eye(dim) + sigma_scale * (a @ a.T)
    return Problem(
        theta_pre=theta_pre,
        theta_ft=theta_ft,
        e_perp=e_perp,
        rho=jnp.asarray(rho, sigma_pre.dtype),
        sigma_pre=(sigma_pre + sigma_pre.T) / 2,
    )


def fine_tuning_covariance(problem: Problem) -> jax.Array:
    """Sigma = I + rho (e_bar e_perp^T + e_perp e_bar^T), [d, d]; also `problem.sigma`."""
    return problem.sigma


def pretraining_error(problem: Problem, theta: chex.Array) -> jax.Array:
    """err1 = (theta - theta_pre)^T Sigma_pre (theta - theta_pre) (eq. 3), a scalar."""
    delta = theta - problem.theta_pre
    return delta @ problem.sigma_pre @ delta


def fine_tuning_error(problem: Problem, theta: chex.Array) -> jax.Array:
    """err2 = (theta - theta_ft)^T Sigma (theta - theta_ft) (eq. 4), a scalar."""
    delta = theta - problem.theta_ft
    return delta @ problem.sigma @ delta


def total_error(problem: Problem, theta: chex.Array) -> jax.Array:
    """err1 + err2 (eq. 5), a scalar; |e|^2 at theta_pre."""
    return pretraining_error(problem, theta) + fine_tuning_error(problem, theta)


def _check(problem: Problem) -> None:
    names = ("theta_pre", "theta_ft", "e_perp", "rho", "sigma_pre")
    values = [getattr(problem, name) for name in names]
    shapes = [jnp.shape(value) for value in values]
    dim = shapes[0][0] if len(shapes[0]) == 1 else -1
    for name, shape, expected in zip(
        names, shapes, [(dim,), (dim,), (dim,), (), (dim, dim)], strict=True
    ):
        if dim < 2 or shape != expected:
            raise ValueError(
                f"{name} has shape {shape}; with d at least 2, theta_pre, theta_ft and e_perp "
                "are [d], rho is a scalar and sigma_pre is [d, d]"
            )
    if any(isinstance(value, jax.core.Tracer) for value in values):
        return
    pre, ft, perp, rho, sigma = (np.asarray(value) for value in values)
    atol = _ATOL[np.result_type(pre, np.float32)]
    for name, value in zip(names, (pre, ft, perp, rho, sigma), strict=True):
        if not np.isfinite(value).all():
            raise ValueError(f"{name} has NaN or infinite entries")
    if not 0 <= rho < 1:
        raise ValueError(f"rho is {float(rho)}; it must be at least 0 and below 1")
    e = pre - ft
    norm = np.linalg.norm(e)
    if norm == 0:
        raise ValueError("theta_pre equals theta_ft: there is nothing to fine-tune")
    length = np.linalg.norm(perp)
    if abs(length - 1) > atol:
        raise ValueError(f"e_perp has length {length:.6g}; it must be a unit vector")
    product = float(perp @ e / norm)
    if abs(product) > atol:
        raise ValueError(
            f"e_perp is not orthogonal to theta_pre - theta_ft: their cosine is {product:.3g}"
        )
    asymmetry = np.abs(sigma - sigma.T).max()
    if asymmetry > atol * max(1.0, np.abs(sigma).max()):
        raise ValueError(f"sigma_pre is not symmetric: entries differ by up to {asymmetry:.3g}")
    smallest = np.linalg.eigvalsh(sigma)[0]
    if smallest < 1 - atol * max(1.0, np.abs(sigma).max()):
        raise ValueError(
            f"sigma_pre is not at least the identity: its smallest eigenvalue is {smallest:.6g}"
        )
