"""Identity of a training stage: everything its result depends on, recorded in checkpoints."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from easy_jax import data
from easy_jax.core.anchors import stored_name
from easy_jax.core.losses import LossFn
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.io import code_fingerprint
from easy_jax.io import fingerprint as fingerprints
from easy_jax.train.config import StageConfig
from easy_jax.train.weights import StageWeights

ANCHORED = "the anchored parameters"
Filter = Callable[[Any, Any], bool]


def of_stage(
    model: nnx.Module,
    source: data.AnySource,
    stage: StageConfig,
    loss_fn: LossFn,
    weights: StageWeights,
    online: OnlineWeights | None,
    *,
    trainable: Any,
    anchored: Filter | None,
    sfa_beta: float | None,
    seed: int,
) -> dict[str, Any]:
    """Returns the arguments of `easy_jax.fit` that decide its result, as fingerprints or values.

    The keys are the words that error messages use for the arguments that differ. A source
    without a method `fingerprint` is read once.

    Args:
      model, source, stage, loss_fn: as in `easy_jax.fit`.
      weights: the weights of the stage, given by the caller or computed by a weighting.
      online: computes further weights for every batch.
      trainable, anchored, sfa_beta, seed: as in `easy_jax.fit`.

    Example:
      >>> source = data.ArraySource({"x": np.zeros((2, 1), "f")})
      >>> model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> loss = lambda model, batch: model(batch["x"])[:, 0] ** 2
      >>> found = of_stage(
      ...     model, source, StageConfig(), loss, StageWeights(), None,
      ...     trainable=nnx.Param, anchored=None, sfa_beta=None, seed=0)
      >>> found["the weights"], found["the trainable parameters"].split(", ")[0]
      ('none', '2 of 2')
    """
    graphdef, state = nnx.split(model)
    params = nnx.filter_state(state, trainable)
    trained = [path for path, _ in nnx.to_flat_state(params)]
    anchors = None
    if stage.optimizer.anchor != "none":
        flat = nnx.to_flat_state(params)
        chosen = [path for path, each in flat if anchored is None or anchored(path, each)]
        anchors = _some_of(chosen, state)
    return {
        "the starting parameters": fingerprints.of_state(state),
        "the model's structure": code_fingerprint.of_structure(graphdef),
        "the training data": data.fingerprint(source),
        "the number of examples": len(source),
        "the loss function": code_fingerprint.of_function(loss_fn),
        "the trainable parameters": _some_of(trained, state),
        ANCHORED: anchors,
        "the weights": weights_fingerprint(weights.weight_N, weights.token_weight),
        "the weights of every batch": None if online is None else online.fingerprint(),
        "stage": _stored(stage),
        "seed": seed,
        "sfa_beta": sfa_beta,
        **_arrangement(source),
        **weights.identity(),
    }


def weights_fingerprint(
    weight_N: np.ndarray | None, token_weight: data.Ragged | None = None
) -> str:
    """Returns a fingerprint of the weights as training uses them; `none` without weights."""
    arrays = {}
    if weight_N is not None:
        with np.errstate(over="ignore"):  # the loader refuses weights that overflow
            arrays["weight"] = np.asarray(weight_N, np.float32)
    if token_weight is not None:
        arrays |= {"token_weight": token_weight.values, "offsets": token_weight.offsets}
    return fingerprints.of_arrays(arrays) if arrays else "none"


def _stored(stage: StageConfig) -> dict[str, Any]:
    """Returns a stage as checkpoints store it, with the original name of its anchor."""
    fields = dataclasses.asdict(stage)
    fields["optimizer"]["anchor"] = stored_name(stage.optimizer.anchor)
    if not stage.optimizer.ema_decay:  # a field that earlier versions did not have
        del fields["optimizer"]["ema_decay"]
    return fields


def _some_of(paths: list[Any], state: nnx.State) -> str:
    """Returns the number of these parameters, the model's total, and a hash of their names."""
    names = sorted(".".join(map(str, path)) for path in paths)
    total = len(nnx.to_flat_state(nnx.filter_state(state, nnx.Param)))
    return f"{len(names)} of {total}, {fingerprints.of_json(names)}"


def _arrangement(source: data.AnySource) -> dict[str, Any]:
    """Returns the source's settings that only affect training: packed rows, augmentation."""
    if isinstance(source, data.PackedSource):
        return {"rows": [source.row_length, source.max_segments]}
    transforms = getattr(source, "transforms", getattr(source, "views", None))  # the former name
    return {} if transforms is None else {"views": dataclasses.asdict(transforms)}
