"""The weighted training step against a plain one written by hand. See README.md.

python benchmarks/weighted_step.py
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from timing import exit_unless, interleave, median_ratio

import easy_jax as ej
from easy_jax.parallel import sharding

BATCH_SIZE = 64
STEPS_PER_ROUND = 5
ROUNDS = 100
BOUND = 1.02
NUM_CLASSES = 10


def make_plain_step(
    graphdef: nnx.GraphDef[Any], optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Callable[..., Any]:
    """What one would write without the library: mean cross-entropy, no weights, no mask."""

    def loss_fn(
        params: nnx.State, rest: nnx.State, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, nnx.State]:
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits_BK = model(batch["image"])
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, batch["label"])
        return loss_B.mean(), nnx.split(model, nnx.Param, ...)[2]

    def step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        params, rest, opt_state = state
        (loss, rest), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rest, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), loss

    # The only thing that it takes from the library.
    options = sharding.compiler_options(mesh)
    return jax.jit(step, donate_argnums=0, compiler_options=options)


def several_steps(step: Callable[..., Any], state: Any, batch: Any) -> Callable[[], None]:
    """A call that takes `STEPS_PER_ROUND` steps, each on the state the last one left."""

    def run() -> None:
        nonlocal state
        for _ in range(STEPS_PER_ROUND):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def main() -> None:
    model = ej.train_mode(ej.ResNet(ej.ResNetConfig(), NUM_CLASSES, rngs=nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(0.01, momentum=0.9)
    mesh = ej.make_mesh()
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.normal(size=(BATCH_SIZE, 16, 16, 1)).astype(np.float32),
        "label": rng.integers(NUM_CLASSES, size=BATCH_SIZE).astype(np.int32),
    }
    ones = np.ones(BATCH_SIZE, np.float32)
    random = (1.0 - rng.random(BATCH_SIZE)).astype(np.float32)  # in (0, 1]
    weighted_step = ej.make_train_step(
        graphdef, ej.classification_loss, optimizer, reduction="example_mean", mesh=mesh
    )

    def ours(weight_B: np.ndarray) -> Callable[[], None]:
        batch = ej.shard_batch({**arrays, "weight": weight_B, "mask": ones.astype(bool)}, mesh)
        return several_steps(weighted_step, ej.init_train_state(model, optimizer, mesh=mesh), batch)

    plain_state = jax.tree.map(lambda x: x.copy(), (params, rest, optimizer.init(params)))
    plain = several_steps(
        make_plain_step(graphdef, optimizer, mesh), plain_state, ej.shard_batch(arrays, mesh)
    )
    seconds = interleave({"plain": plain, "weighted": ours(random), "ones": ours(ones)}, ROUNDS)

    ms = {
        name: 1e3 * statistics.median(times.wall) / STEPS_PER_ROUND
        for name, times in seconds.items()
    }
    ratio = median_ratio(seconds["weighted"].wall, seconds["plain"].wall)
    ratio_cpu = median_ratio(seconds["weighted"].cpu, seconds["plain"].cpu)
    ratio_ones = median_ratio(seconds["ones"].wall, seconds["plain"].wall)
    print(
        f"weighted_step: weighted {ms['weighted']:.2f} ms, plain optax {ms['plain']:.2f} ms per "
        f"step, RATIO {ratio:.3f} (bound {BOUND}; of CPU time {ratio_cpu:.3f}); all weights 1: "
        f"{ms['ones']:.2f} ms, ratio {ratio_ones:.3f}"
    )
    exit_unless(ratio <= BOUND, f"weighted / plain <= {BOUND}")


if __name__ == "__main__":
    main()
