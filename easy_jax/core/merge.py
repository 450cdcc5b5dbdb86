"""Averaging of weights: WiSE-FT and LiNeS after training, SFA and EMA during it.

To add an averaging, register a function of the starting weights, the tuned weights and a
coefficient, here or in a module that is imported here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from easy_jax.core.held_params import find
from easy_jax.io.registry import Registry

_AFTER_LAYERS = ("final_norm", "head")


def interpolate(start: chex.ArrayTree, end: chex.ArrayTree, alpha: float | np.ndarray) -> Any:
    """Returns `(1 - alpha) * start + alpha * end`, leaf by leaf.

    WiSE-FT (Wortsman et al. 2022) with `start` the pre-trained and `end` the fine-tuned
    weights; SFA averages during training with `end` the pre-trained weights.

    Args:
      start, end: trees of equal structure, shapes and dtypes. Floating leaves are
        interpolated in float32 and cast back; other leaves are taken from `end`.
      alpha: between 0 and 1; exactly `start` at 0 and `end` at 1.

    Returns:
      A tree like `end`.

    Raises:
      ValueError: alpha is outside [0, 1].
      AssertionError: the trees differ in structure, shape or dtype.

    Example:
      >>> interpolate({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, 0.25)["w"].tolist()
      [0.25]
    """
    if not np.all((np.asarray(alpha) >= 0.0) & (np.asarray(alpha) <= 1.0)):
        raise ValueError(f"alpha is {alpha}; it must be between 0 and 1")
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(b.dtype, jnp.floating):
            return b
        wide = jnp.promote_types(b.dtype, jnp.float32)
        mixed: Any = (1.0 - alpha) * a.astype(wide) + alpha * b.astype(wide)
        return mixed.astype(b.dtype)

    return jax.tree.map(one, start, end)


def wise_ft(pretrained: chex.ArrayTree, finetuned: chex.ArrayTree, alpha: float = 0.5) -> Any:
    """Averages weights by WiSE-FT: `alpha` is the share of the fine-tuned ones (arXiv:2502.02797).

    Example:
      >>> wise_ft({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, alpha=1.0)["w"].tolist()
      [1.0]

    Args:
      pretrained: the weights before fine-tuning.
      finetuned: the weights after it, with the same structure and shapes.
      alpha: in [0, 1]; 0 gives the pre-trained weights.
    """
    return interpolate(pretrained, finetuned, alpha)


def sfa(pretrained: chex.ArrayTree, current: chex.ArrayTree, beta: float = 0.5) -> Any:
    """Averages weights by SFA: `beta` is the share of the pre-trained ones (arXiv:2502.02797).

    Example:
      >>> sfa({"w": jnp.zeros(1)}, {"w": jnp.ones(1)}, beta=0.25)["w"].tolist()
      [0.75]
    """
    return interpolate(current, pretrained, beta)


def sfa_steps(total_steps: int, times: int = 4) -> tuple[int, ...]:
    """Returns the steps after which SFA averages: every quarter of the run (arXiv:2502.02797).

    Example:
      >>> sfa_steps(10)
      (2, 5, 8, 10)
    """
    return tuple(round(total_steps * part / times) for part in range(1, times + 1))


def lines(pretrained: Any, finetuned: Any, alpha: float = 0.5) -> Any:
    """LiNeS: `alpha` is the share of the fine-tuned weights in the first layer (arXiv:2410.17146).

    The change of layer l of L, counted from 0, is multiplied by alpha + (1 - alpha) l / (L - 1), so
    that shallow layers stay close to the pre-trained weights and the last layer keeps all of its
    change. What comes before the layers (an embedding, which may also be the head, or the first
    convolution) is scaled like the first layer, what comes after them (final norm, head) not at
    all.

    Args:
      pretrained, finetuned: states of a model whose layers are in `blocks`, like `Transformer` and
        `ResNet`, of the same structure and shapes.
      alpha: in [0, 1]; 1 gives the fine-tuned weights.

    Raises:
      ValueError: alpha outside [0, 1]; a model without `blocks`.

    Example:
      >>> import easy_jax as ej
      >>> config = ej.ResNetConfig(in_channels=1, width=4, depths=(1, 1))
      >>> start, end = (nnx.state(ej.ResNet(config, 2, rngs=nnx.Rngs(i))) for i in (0, 1))
      >>> merged = lines(start, end, alpha=0.0)
      >>> bool((merged["conv1"]["kernel"][...] == start["conv1"]["kernel"][...]).all())
      True
    """
    flat = dict(nnx.to_flat_state(finetuned))
    places = sorted({path[1] for path in flat if path[0] == "blocks"})
    if not places:
        raise ValueError("LiNeS scales by layer, and this model has no layers in `blocks`")
    groups = max((leaf.shape[0] for leaf in flat.values() if _is_stacked(leaf)), default=1)
    num_layers = len(places) * groups

    def share(path: tuple[Any, ...], leaf: Any) -> Any:
        if path[0] in _AFTER_LAYERS or num_layers == 1:
            return 1.0
        if path[0] != "blocks":
            return alpha
        first = places.index(path[1])  # of the layers at this position of all groups
        layer_G = first + len(places) * np.arange(groups if _is_stacked(leaf) else 1)
        share_G = alpha + (1.0 - alpha) * layer_G / (num_layers - 1)
        return share_G.reshape(-1, *[1] * (leaf.ndim - 1)) if _is_stacked(leaf) else share_G[0]

    before = dict(nnx.to_flat_state(pretrained))
    merged = [
        (path, leaf.replace(interpolate(before[path][...], leaf[...], share(path, leaf))))
        for path, leaf in flat.items()
    ]
    return nnx.from_flat_state(merged)


def _is_stacked(leaf: Any) -> bool:
    """Whether a variable holds the layers of all groups along its first axis."""
    return (leaf.get_metadata().get("logical_axes") or ("",))[0] == "layers"


class AverageState(NamedTuple):
    """The exponential moving average of the parameters."""

    average: Any


def ema(decay: float) -> optax.GradientTransformation:
    """Holds the exponential moving average of the parameters; last in an optimizer's chain.

    After every step the average is `decay * average + (1 - decay) * parameters`; it starts at the
    parameters of `init`, so that a share of `decay ** steps` of them remains. The average is
    sharded and saved with the optimizer's state, and `TrainState.model_state` returns it in place
    of the parameters. It has their dtype: in bfloat16, a decay near 1 is rounded away. Variables
    that are not trained, such as BatchNorm's statistics, are those of the last step.

    Args:
      decay: in [0, 1).

    Raises:
      ValueError: another decay; `update` called without parameters.

    Example:
      >>> optimizer = optax.chain(optax.sgd(1.0), ema(0.75))
      >>> params = {"w": jnp.ones(1)}
      >>> _, state = optimizer.update({"w": jnp.ones(1)}, optimizer.init(params), params)
      >>> average_of(state)["w"].tolist()
      [0.75]
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay is {decay}; it must be at least 0 and below 1")

    def init(params: Any) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        if params is None:
            raise ValueError("ema needs the parameters: optimizer.update(grads, state, params)")
        moved = optax.apply_updates(params, updates)
        return updates, AverageState(interpolate(moved, state.average, decay))

    return optax.GradientTransformation(init, update)


def average_of(opt_state: Any) -> Any | None:
    """Returns the average that an optimizer's state holds; None without `ema`.

    Example:
      >>> average_of(optax.sgd(1.0).init({"w": jnp.ones(1)})) is None
      True
    """
    found = find(opt_state, AverageState)
    return None if found is None else found.average


@dataclasses.dataclass(frozen=True)
class Averaging:
    """A rule for averaging the starting and the tuned weights.

    Attributes:
      when: whether to average once after training, several times during it, after every step of
        it, or never.
      merge: `(start, tuned, alpha) -> weights`.
    """

    when: Literal["never", "after", "during", "every_step"]
    merge: Callable[[Any, Any, float], Any]


AVERAGINGS: Registry[Averaging] = Registry("averaging")
AVERAGINGS.register("none")(Averaging("never", lambda start, tuned, alpha: tuned))
AVERAGINGS.register("wise_ft")(Averaging("after", wise_ft))
AVERAGINGS.register("lines")(Averaging("after", lines))
AVERAGINGS.register("sfa")(Averaging("during", sfa))
AVERAGINGS.register("ema")(Averaging("every_step", interpolate))
