"""Scores and fits tiny models, to see what the contract of losses, models and records refuses."""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import easy_jax as ej

B = 8
X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
LABEL = (X[:, 0] > 0).astype(np.int32)
SOURCE = ej.ArraySource({"x": X, "y": LABEL})
STAGE = ej.StageConfig(batch_size=B)


class Model(nnx.Module):
    def __init__(self, seed=0, outputs=2):
        self.head = nnx.Linear(3, outputs, rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return self.head(x)


def tiny_model():
    config = ej.TransformerConfig(
        "llama", vocab=16, embed=8, mlp=12, layers=1, heads=2, kv_heads=1, head_dim=4
    )
    return ej.Transformer(config, rngs=nnx.Rngs(0))


def packed_source():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 7, 60)
    tokens = rng.integers(0, 16, lengths.sum())
    examples = ej.TokenSource(tokens, np.cumsum([0, *lengths]), np.ones(60, int))
    return ej.PackedSource(examples, row_length=12)


def losses(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


def pair(model, batch):
    return losses(model, batch), jnp.ones(len(batch["y"]))


def score(loss_fn, directory, source=SOURCE, model=None, **options):
    return ej.score(model or Model(), source, directory, loss_fn=loss_fn, batch_size=B, **options)


def fit(loss_fn, directory, source=SOURCE, model=None, **options):
    model = model or Model()
    return ej.fit(model, source, directory, stage=STAGE, loss_fn=loss_fn, **options)
