"""Packed examples with random weights, and the model that scores them, for the tests of packing."""

import functools

import jax
import numpy as np
from flax import nnx
from helpers import devices_mesh

from easy_jax.core.causal_lm import causal_lm_token_losses
from easy_jax.data import PackedSource, Ragged, TokenSource, training_loader
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.train.scoring import score

VOCAB, SIZE, ROW = 64, 30, 24
LONGEST = 20
SHAPE = {
    "vocab": VOCAB,
    "embed": 16,
    "mlp": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 8,
    "query_scale": 8**-0.5,
}
CONFIGS = {
    "llama": TransformerConfig("llama", **SHAPE),
    "gemma2": TransformerConfig(
        "gemma2", **SHAPE, windows=(4, None), attention_cap=2.0, final_cap=5.0
    ),
}
REDUCTIONS = ("token_mean", "example_mean", "weight_mean")


# Compiled in a third of the time.
FAST = {"xla_backend_optimization_level": 0}


@functools.cache
def model(family="llama"):
    """Random, with parameters so large that every token matters to those after it."""
    network = Transformer(CONFIGS[family], rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(network)):
        if path[-1] in ("kernel", "embedding"):
            leaf[...] = 15.0 * leaf[...]
    return network


@functools.cache
def logits(family):
    """A function of tokens, without segments or positions."""
    graphdef, state = nnx.split(model(family))
    function = jax.jit(
        lambda state, tokens: nnx.merge(graphdef, state)(tokens), compiler_options=FAST
    )
    return lambda tokens: np.float64(function(state, tokens))


@functools.cache
def examples():
    """Random tokens; each example has a prompt and a response."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, LONGEST + 1, SIZE)
    offsets = np.cumsum([0, *lengths])
    return TokenSource(rng.integers(0, VOCAB, offsets[-1]), offsets, rng.integers(1, lengths))


def of_lengths(lengths):
    """Examples of as many tokens, each with one token of prompt."""
    offsets = np.cumsum([0, *lengths])
    return TokenSource(np.arange(offsets[-1]), offsets, np.ones(len(lengths), int))


def source(tokens=None, max_segments=0):
    """The examples, or others, in rows of ROW tokens."""
    return PackedSource(examples() if tokens is None else tokens, ROW, max_segments)


def padded_source(tokens=None):
    """The same with one example a row."""
    return source(tokens, max_segments=1)


SOURCES = {"packed": source, "padded": padded_source}


def weights():
    """A weight for each example."""
    return (np.random.default_rng(1).random(SIZE) + 0.1).astype(np.float32)


def token_weights(examples):
    """A weight for each target token."""
    values = np.random.default_rng(2).random(examples.num_targets.sum()).astype(np.float32)
    return Ragged(values, np.cumsum([0, *examples.num_targets]))


def load(source, **options):
    """A training loader of one epoch, four rows a batch."""
    return training_loader(source, 4, epochs=1, seed=0, **options)


def ids(loader):
    """The ids of all examples that a loader gives, in order of size."""
    return sorted(np.concatenate([batch["example_id"][batch["mask"]] for batch in loader]).tolist())


def flat(tree):
    """All leaves in one vector, in float64."""
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def score_rows(source, directory, family="llama", devices=1, **options):
    """The loss table, with the losses of tokens, of a source of rows."""
    options = {
        "batch_size": 8,
        "rows_per_part": 7,
        "loss_fn": causal_lm_token_losses,
        "token_losses": True,
        **options,
    }
    return score(model(family), source, directory, mesh=devices_mesh(devices), **options)
