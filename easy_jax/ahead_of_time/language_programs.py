"""The training and scoring steps of a language model, lowered for a topology."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from easy_jax.ahead_of_time.programs import (
    STEPS,
    Lowering,
    Program,
    Suite,
    activation_bytes,
    batch_of,
    placed,
    train_state,
    tree_bytes,
)
from easy_jax.core import causal_lm, optim
from easy_jax.core.step import make_train_step
from easy_jax.core.weightings import Weighting
from easy_jax.experiments.config import MethodConfig
from easy_jax.experiments.language import add_adapters, stage_of, trainable_filter
from easy_jax.experiments.language_config import LanguageConfig
from easy_jax.experiments.plan import weighting_of
from easy_jax.models.modes import eval_mode
from easy_jax.models.transformer import Transformer, abstract
from easy_jax.models.transformer_config import KNOWN, TransformerConfig
from easy_jax.pretrained import hugging_face
from easy_jax.pretrained.weight_files import hub_name
from easy_jax.train.forward import make_score_step

_SEGMENTS = 8  # segments per row if the configuration sets no limit


def suite(config: LanguageConfig, mesh: Mesh, what: str) -> Suite:
    """Returns the steps of a configuration: `train`, once for each kind, `score`, or `all`."""
    lowerings = []
    if what != "score":
        lowerings += [
            Lowering(
                functools.partial(train_program, config, method, mesh),
                config.finetune.batch_size,
                config.finetune.micro_batches,
            )
            for method in _distinct(config)
        ]
    if what != "train":
        score = functools.partial(score_program, config, mesh)
        lowerings.append(Lowering(score, config.scoring.batch_size))
    row = f"{config.text.row_length} tokens a row, remat {config.model.remat}"
    return Suite(hub_name(config.model.path) or config.model.path, row, lowerings)


def model_config(config: LanguageConfig) -> TransformerConfig:
    """Returns the model's sizes, by its name or from its folder's `config.json`."""
    path = config.model.path
    known = KNOWN.get(hub_name(path) or "")
    return hugging_face.read_config(hugging_face.resolve(path)) if known is None else known


def train_program(config: LanguageConfig, method: MethodConfig, mesh: Mesh, rows: int) -> Program:
    """Lowers the training step of a method, on global batches of `rows` rows."""
    model = _abstract_model(config)
    resident = tree_bytes(placed(nnx.state(model), mesh))
    if method.trainable == "lora":
        model = nnx.eval_shape(functools.partial(_with_adapters, config), model)
    graphdef, *states = nnx.split(model, trainable_filter(method, model.config), ...)
    stage = stage_of(config.finetune, method)
    weighting = weighting_of(method)
    rule = weighting if weighting.reads_model() else None
    refresh_steps = weighting.old_steps()
    optimizer = optim.make_optimizer(stage.optimizer, STEPS, refresh_steps=refresh_steps)
    state = train_state(states, optimizer, mesh)
    batch = _batch(config, mesh, rows, _token_fields(config, weighting))
    step: Any = make_train_step(
        graphdef,
        causal_lm.causal_lm_loss,
        optimizer,
        reduction=stage.reduction,
        weighting=rule,
        micro_batches=stage.micro_batches,
        mesh=mesh,
    )

    def hidden(params: Any, rest: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, params, rest, copy=True)
        x: jax.Array = model.hidden_states(
            batch["tokens"], batch["positions"], batch["segment_ids"]
        )
        return x

    length = config.text.row_length
    kept = activation_bytes(
        hidden,
        state,
        batch,
        stage.micro_batches,
        mesh,
        lambda shape, rows: (rows, length) in itertools.pairwise(shape),
    )
    return Program(
        f"train {method.name}",
        step.lower(state, batch),
        state,
        rows,
        kept,
        model_flops(model.config, rows, length, _passes(method)),
        resident,
    )


def score_program(config: LanguageConfig, mesh: Mesh, rows: int) -> Program:
    """Lowers the scoring step, on global batches of `rows` rows."""
    model = _abstract_model(config)
    graphdef, state = nnx.split(eval_mode(model))
    state = placed(state, mesh)
    step: Any = make_score_step(graphdef, causal_lm.causal_lm_token_losses, mesh)
    batch = _batch(config, mesh, rows, ())
    flops = model_flops(model.config, rows, config.text.row_length, passes=1.0)
    return Program("score", step.lower(state, batch), state, rows, 0.0, flops, 0.0)


def model_flops(config: TransformerConfig, rows: int, length: int, passes: float) -> float:
    """Returns the number of operations that the model itself needs, by formula.

    A forward pass takes, per token, two for every weight of a matrix (including the head, without
    the embedding's look-up) and 4 * length * heads * head_dim per layer for attention, by
    convention for all pairs of positions, though half are masked. Training is three passes, of
    adapters alone two, as frozen matrices need no gradient. Recomputation does not count.

    Example:
      >>> round(model_flops(KNOWN["google/gemma-2-2b"], 1, 1024, passes=3.0) / 1e12, 1)
      16.7
    """
    attention = config.embed * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    layer = attention + 3 * config.embed * config.mlp
    weights = config.layers * layer + config.vocab * config.embed
    pairs = 4 * length * config.heads * config.head_dim * config.layers
    return passes * rows * length * (2 * weights + pairs)


def _passes(method: MethodConfig) -> float:
    frozen = 1.0 if method.anchor == "kl" else 0.0  # the frozen model's forward pass
    return frozen + (3.0 if method.trainable == "all" else 2.0)


def _abstract_model(config: LanguageConfig) -> Transformer:
    return abstract(
        model_config(config),
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        remat=config.model.remat,
    )


def _with_adapters(config: LanguageConfig, model: Transformer) -> Transformer:
    add_adapters(model, config)
    return model


def _batch(
    config: LanguageConfig, mesh: Mesh, rows: int, token_values: Iterable[str]
) -> dict[str, jax.ShapeDtypeStruct]:
    length, segments = config.text.row_length, config.text.max_segments or _SEGMENTS
    tokens = ("tokens", "targets", "segment_ids", "positions")
    fields: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(tokens, ((length,), jnp.int32))
    fields |= {"weight": ((segments,), jnp.float32), "mask": ((segments,), jnp.bool_)}
    fields |= dict.fromkeys(token_values, ((length,), jnp.float32))
    return batch_of(rows, mesh, fields)


def _distinct(config: LanguageConfig) -> list[MethodConfig]:
    """Returns one method for each kind of step; weights of examples do not change the program."""
    found: dict[Any, MethodConfig] = {}
    for method in config.selected_methods():
        weighting = weighting_of(method)
        rule = weighting if weighting.reads_model() else None
        kind = (method.trainable, method.anchor, _token_fields(config, weighting), rule)
        found.setdefault(kind, method)
    return list(found.values())


def _token_fields(config: LanguageConfig, weighting: Weighting) -> tuple[str, ...]:
    """Returns the fields of a batch with one value per token: own weights, a weighting's input."""
    has_weights = weighting.level == "token" and not weighting.reads_model()
    fields = ["token_weight"] * (has_weights or bool(config.train.token_weight_field))
    fields += ["frozen_nll"] * (weighting.reads_model() and "frozen" in weighting.needs)
    return tuple(fields)
