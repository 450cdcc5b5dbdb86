"""Extreme inputs of temperatures, weights and loss tables, with their values in float64."""

import tempfile

import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import devices_mesh
from numerics_case import BFLOAT16, HUGE, INF, NAN, SUBNORMAL, TINY, Case

import easy_jax as ej


def _exp(loss, tau):
    return np.exp(-np.asarray(loss, np.float64) / tau)


# The functions of arrays.


def temperatures():
    def case(name, losses, want=None, words=(), **options):
        call = lambda: ej.temperature(losses)  # noqa: E731
        return Case(f"temperature of {name}", call, want, words, **options)

    yield case("an odd number", np.float32([0.5, 4, 1]), 1.0)
    yield case("an even number", np.float32([4, 1, 2, 3]), 2.5)
    yield case("one loss", np.float32([0.7]), np.float32(0.7))
    yield case("equal losses", np.full(7, np.float32(2.5)), 2.5)
    yield case(
        "subnormal losses", np.float32([1, 2, 3]) * np.float32(SUBNORMAL), 2.8e-45, ("median",)
    )
    yield case("losses below 1e-38", np.float32([1, 2, 3]) * np.float32(TINY), 2e-39, ("median",))
    yield case("two huge losses", np.float32([HUGE, 3.2e38]), 3.1e38)
    yield case("minus zero", np.float32([-0.0, 1, 2]), 1.0)
    yield case("zeros", np.float32([0, 0, 5]), None, ("zero",))
    yield case("NaN", np.float32([1, 2, NAN]), None, ("[2]",))
    yield case("inf", np.float32([1, INF, 2]), None, ("[1]",))
    yield case("a negative loss", np.float32([-1, 1, 2]), None, ("[0]",))
    yield case("no loss", np.zeros(0, np.float32))
    yield case("bfloat16", np.array([1.2, 2.3, 3.4], BFLOAT16), float(BFLOAT16(2.3)))
    yield case("float16", np.float16([1.2, 2.3, 3.4]), float(np.float16(2.3)))
    yield case("integers", np.array([1, 2, 3]), 2.0)
    yield case("float64 beyond float32", np.array([1.0, 1e300, 2.0]), None, ("[1]",))


def weights():
    def case(name, losses, tau=None, want=None, words=(), **options):
        call = lambda: ej.flow_weights(losses, tau)  # noqa: E731
        return Case(f"weights of {name}", call, want, words, **options)

    few = np.float32([0, 1, 2])
    for tau in (0.0, INF, NAN, -1.0):
        yield case(f"tau {tau}", few, tau, None, ("tau",))
    yield case("the smallest tau", np.float32([0, 1]), np.float32(SUBNORMAL), [1, 0], ("tau",))
    tiny = np.float32(TINY)
    yield case("tau 1e-39", np.float32([0, tiny]), tiny, [1, np.exp(-1)], ("tau",), rtol=1e-5)
    yield case("a huge loss", np.float32([0, HUGE]), 1.0, [1, 0])
    yield case("huge losses", np.float32([HUGE] * 3), None, _exp([1] * 3, 1))
    yield case("90 medians", np.float32([1, 1, 90]), None, _exp([1, 1, 90], 1), ("[2]",), rtol=1e-5)
    yield case("1000 medians", np.float32([1, 1, 1000]), None, _exp([1, 1, 1000], 1))
    yield case("minus zero", np.float32([-0.0, 1, 2]), None, _exp([0, 1, 2], 1))
    yield case("bfloat16", np.array([0, 1, 3], BFLOAT16), None, _exp([0, 1, 3], 1))
    yield case("inf", np.float32([1, INF, 2]), 1.0, None, ("[1]",))


def token_weights():
    def case(name, losses, mask, want=None, words=(), tau=None):
        losses, mask = np.float32(losses), np.array(mask, bool)
        call = lambda: ej.flow_weights_token(losses, mask, tau)  # noqa: E731
        return Case(f"token weights of {name}", call, want, words)

    yield case("two of three", [[1, 1, 9]], [[1, 1, 0]], [[np.exp(-1), np.exp(-1), 0]])
    yield case("a masked NaN", [[1, 1, NAN]], [[1, 1, 0]], [[np.exp(-1), np.exp(-1), 0]])
    yield case("a target's NaN", [[1, 1, NAN]], [[1, 1, 1]], None, ("[2]",))
    yield case("no target", [[1, 1]], [[0, 0]])
    yield case("another mask", [[1, 1]], [[1]], None, ("shape",))
    yield case("the smallest tau", [[0, 1]], [[1, 1]], [[1, 0]], ("tau",), np.float32(SUBNORMAL))


def others():
    losses = np.float32([0, HUGE])
    yield Case("KL-DRO that overflows", lambda: ej.kl_dro_weights(losses, 0.1), [0, 1])
    yield Case("KL-DRO with tau 0", lambda: ej.kl_dro_weights(losses, 0.0), None, ("tau",))
    zeros = np.zeros(3, np.float32)
    yield Case("mean one of zeros", lambda: ej.control_weights(zeros, "mean_one", 0))
    half = np.float32([0.5, 0.5, 0])
    yield Case("entropy", lambda: ej.entropic_objective(half, half, 1.0), 0.5 - np.log(2))
    beyond = np.float32([1.5, -0.5])
    yield Case("entropy of a negative", lambda: ej.entropic_objective(beyond, beyond, 1.0))
    trees = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    for alpha in (NAN, 1.5):
        yield Case(f"alpha {alpha}", lambda a=alpha: ej.wise_ft(*trees, a)["w"], None, ("alpha",))

    def entropy(*logits):
        return lambda: ej.softmax_cross_entropy(jnp.array([logits]), jnp.array([0]))[0]

    yield Case("logits of 1e38", entropy(-1e38, 1e38), [2e38])
    yield Case("logits of minus inf", entropy(3.0, -INF, -INF), [0.0])
    hundreds, third = jnp.full((1, 4), 100, jnp.bfloat16), jnp.array([3])
    rounded = lambda: ej.softmax_cross_entropy(hundreds, third)[0]  # noqa: E731
    yield Case("bfloat16 logits", rounded, [np.log(4)], rtol=1e-5)


# Loss tables.


def table(losses, counts=None, dtype=np.float32, **options):
    """A table of losses that are looked up, whatever the model."""
    sums_N = jnp.asarray(np.asarray(losses).astype(dtype))
    count_N = jnp.asarray(np.ones(len(losses)) if counts is None else counts, np.float32)
    source = ej.ArraySource({"i": np.arange(len(losses), dtype=np.int32)})

    def looked_up(model, batch):
        return sums_N[batch["i"]], count_N[batch["i"]]

    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with tempfile.TemporaryDirectory() as folder:
        scored = ej.score(
            model, source, folder, loss_fn=looked_up, batch_size=8, mesh=devices_mesh(1), **options
        )
        return scored.flow_weights()


def tables():
    def case(name, losses, want=None, words=(), rtol=2e-6, **options):
        call = lambda: table(losses, **options)  # noqa: E731
        return Case(f"table of {name}", call, want, words, rtol)

    nine = np.float32([0.3, 1.2, 2.5, 0.9, 4, 3, 0.1, 7, 1.9])
    yield case("nine, padded", nine, _exp(nine, np.median(nine)))
    yield case("one", [0.7], [np.exp(-1)])
    yield case("equal losses", [2.5] * 5, _exp([1] * 5, 1))
    yield case("some zeros", [0, -0.0, 1, 2, 3], _exp([0, 0, 1, 2, 3], 1))
    yield case("mostly zeros", [0, 0, 0, 1], None, ("zero",))
    yield case(
        "1e-40 and so on", [1e-40, 2e-40, 3e-40], _exp([0.5, 1, 1.5], 1), ("temperature",), 1e-4
    )
    yield case("3e38 and so on", [2e38, 3e38, 3.2e38, 3.4e38], _exp([2, 3, 3.2, 3.4], 3.1))
    yield case("inf", [1, 2, 3, INF, 5], None, ("id 3",))
    yield case("NaN", [1, 2, 3, NAN, 5, NAN], None, ("id 3", "id 5"))
    yield case("a negative loss", [1, 2, -3], None, ("id 2",))
    yield case("no target", [1, 2, 3], None, ("id 1",), counts=[1, 0, 1])
    dropped = [np.exp(-0.5), np.exp(-1), np.exp(-1.5), NAN]
    yield case("NaN, dropped", [1, 2, 3, NAN], dropped, on_bad_example="drop")
    rounded = np.array([1.1, 2.2, 3.3], BFLOAT16)
    yield case("bfloat16", rounded, _exp(rounded, float(rounded[1])), rtol=1e-5, dtype=BFLOAT16)
    yield case("sums of 3e38", [3e38, 1e38], _exp([1.5, 0.5], 1), counts=[2, 2])
    yield case("1000 medians", [1] * 8 + [1000], _exp([1] * 8 + [1000], 1))
