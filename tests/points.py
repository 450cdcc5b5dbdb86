"""Points in the plane with labels, and a linear model for them."""

import numpy as np
from flax import nnx
from helpers import Records

from easy_jax.core.losses import softmax_cross_entropy, squared_error
from easy_jax.data import ArraySource


def linear(seed=0, outputs=3):
    return nnx.Linear(2, outputs, rngs=nnx.Rngs(seed))


def classify(model, batch):
    return softmax_cross_entropy(model(batch["x"]), batch["label"])


def regress(model, batch):
    return squared_error(model(batch["x"]), batch["y"])


def points(size=20, bad_label=None, value=3):
    rng = np.random.default_rng(0)
    label = rng.integers(3, size=size).astype(np.int32)
    x = rng.normal(size=(size, 2)).astype(np.float32)
    if bad_label is None:
        return ArraySource({"x": x, "label": label})
    # Labels in memory would be looked at before anything is computed.
    label[bad_label] = value
    return Records([{"x": x[i], "label": label[i]} for i in range(size)])
