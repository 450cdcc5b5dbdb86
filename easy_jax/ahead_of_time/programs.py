"""The product's own training and scoring steps, lowered for a topology without weights or data."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from easy_jax import losses, optim, sharding
from easy_jax.config import ConfigError, LanguageConfig, LanguageMethodConfig
from easy_jax.language import add_adapters, stage_of, trainable_filter
from easy_jax.models import eval_view, hugging_face
from easy_jax.models.transformer import Transformer, abstract
from easy_jax.models.transformer_config import KNOWN, TransformerConfig
from easy_jax.scoring import make_score_step
from easy_jax.step import TrainState, make_train_step

_STEPS = 1000  # of the schedule: a constant in the program, of no weight
_SEGMENTS = 8  # of a row where the configuration sets no limit


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile, and what it is about.

    Attributes:
      name: `train` with the method's name, or `score`.
      lowered: by `jax.jit(...).lower`.
      state: abstract, with its shardings: a `TrainState`, or the model's variables.
      rows: of the global batch.
      activation_bytes: that a chip keeps from the forward pass for the backward pass.
      model_flops: of a step, over all chips, by `model_flops`.
      resident_bytes: of the pre-trained model, which an experiment keeps beside the state.
    """

    name: str
    lowered: Any
    state: Any
    rows: int
    activation_bytes: float
    model_flops: float
    resident_bytes: float


def model_config(config: LanguageConfig) -> TransformerConfig:
    """The model's sizes: from a folder's `config.json`, or by name where no weights are needed."""
    path = config.model.path
    if path in KNOWN and not Path(path).is_dir():
        return KNOWN[path]
    return hugging_face.read_config(hugging_face.resolve(path))


def train_program(
    config: LanguageConfig, method: LanguageMethodConfig, mesh: Mesh, rows: int
) -> Program:
    """The training step of a method on global batches of `rows` rows."""
    model = _abstract_model(config)
    frozen = nnx.state(model)
    resident = tree_bytes(_placed(frozen, mesh))
    if method.trainable == "lora":
        model = nnx.eval_shape(functools.partial(_with_adapters, config), model)
    graphdef, *states = nnx.split(model, trainable_filter(method, model.config), ...)
    params, rest = states
    stage = stage_of(config.finetune, method)
    optimizer = optim.make_optimizer(stage.optimizer, _STEPS)
    opt_state = jax.eval_shape(optimizer.init, params)
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
    state = _placed(TrainState(scalar, params, rest, opt_state), mesh)
    batch = _batch(config, mesh, rows, token_weights=method.weighting == "flow_token")
    step: Any = make_train_step(
        graphdef, losses.causal_lm_loss, optimizer, reduction=stage.reduction,
        micro_batches=stage.micro_batches, mesh=mesh,
    )  # fmt: skip
    with sharding.tracing_on(mesh):
        kept = _activation_bytes(graphdef, state, batch, stage.micro_batches, mesh)
    return Program(
        f"train {method.name}", step.lower(state, batch), state, rows, kept,
        model_flops(model.config, rows, config.text.row_length, _passes(method)), resident,
    )  # fmt: skip


def score_program(config: LanguageConfig, mesh: Mesh, rows: int) -> Program:
    """The scoring step on global batches of `rows` rows."""
    model = _abstract_model(config)
    graphdef, state = nnx.split(eval_view(model))
    state = _placed(state, mesh)
    step: Any = make_score_step(graphdef, losses.causal_lm_token_losses, mesh)
    batch = _batch(config, mesh, rows, token_weights=False)
    flops = model_flops(model.config, rows, config.text.row_length, passes=1.0)
    return Program("score", step.lower(state, batch), state, rows, 0.0, flops, 0.0)


def model_flops(config: TransformerConfig, rows: int, length: int, passes: float) -> float:
    """Operations that the model itself needs, by formula.

    A forward pass takes, per token, two for every weight of a matrix (the head's included, the
    embedding's look-up not) and 4 * length * heads * head_dim per layer for attention, all pairs
    of positions counted, as is the custom, though half are masked. Training is three passes; with
    adapters alone two, as frozen matrices need no gradient. Nothing computed again counts.

    Example:
      >>> round(model_flops(KNOWN["google/gemma-2-2b"], 1, 1024, passes=3.0) / 1e12, 1)
      16.7
    """
    attention = config.embed * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    layer = attention + 3 * config.embed * config.mlp
    weights = config.layers * layer + config.vocab * config.embed
    pairs = 4 * length * config.heads * config.head_dim * config.layers
    return passes * rows * length * (2 * weights + pairs)


def tree_bytes(tree: Any) -> float:
    """Bytes of a tree of abstract arrays on one chip."""
    return float(sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    ))  # fmt: skip


def _passes(method: LanguageMethodConfig) -> float:
    return 3.0 if method.trainable == "all" else 2.0


def _abstract_model(config: LanguageConfig) -> Transformer:
    return abstract(
        model_config(config), dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype), remat=config.model.remat,
    )  # fmt: skip


def _with_adapters(config: LanguageConfig, model: Transformer) -> Transformer:
    add_adapters(model, config)
    return model


def _placed(tree: Any, mesh: Mesh) -> Any:
    """Abstract arrays with the shardings that a state has on the mesh."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree, sharding.tree_shardings(tree, mesh),
    )  # fmt: skip


def _batch(
    config: LanguageConfig, mesh: Mesh, rows: int, *, token_weights: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    sharding.check_batch_size(rows, mesh, "the batch")
    place = sharding.batch_sharding(mesh)

    def array(columns: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=place)

    length, segments = config.text.row_length, config.text.max_segments or _SEGMENTS
    batch = {name: array(length, jnp.int32)
             for name in ("tokens", "targets", "segment_ids", "positions")}  # fmt: skip
    batch |= {"weight": array(segments, jnp.float32), "mask": array(segments, jnp.bool_)}
    if token_weights:
        batch["token_weight"] = array(length, jnp.float32)
    return batch


def _activation_bytes(
    graphdef: Any, state: TrainState, batch: Mapping[str, Any], parts: int, mesh: Mesh
) -> float:
    """What reverse-mode differentiation keeps per token, shared out like the batch."""
    rows, length = batch["tokens"].shape
    micro = {name: jax.ShapeDtypeStruct((rows // parts, *x.shape[1:]), x.dtype)
             for name, x in batch.items()}  # fmt: skip

    def backward(params: Any, rest: Any, batch: Any) -> Any:
        def hidden(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params, rest, copy=True)
            x: jax.Array = model.hidden_states(
                batch["tokens"], batch["positions"], batch["segment_ids"]
            )
            return x

        return jax.vjp(hidden, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, state.params, state.rest, micro))
    per_token = [x for x in kept if (rows // parts, length) in itertools.pairwise(x.shape)]
    total = sum(math.prod(x.shape) * x.dtype.itemsize for x in per_token)
    return total / sharding.num_shares(mesh)


def check_model(config: Any) -> LanguageConfig:
    """A validated language configuration.

    Raises:
      ConfigError: a configuration of the vision half.
    """
    if not isinstance(config, LanguageConfig):
        raise ConfigError("compile is for language models; an image model fits anywhere")
    return config.validate()
