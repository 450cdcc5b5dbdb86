"""Weights of a training stage: those that the caller gives, times those of a weighting."""

import dataclasses
from typing import Any

import numpy as np

from easy_jax import data
from easy_jax.core.weightings.rule import Weighting, Weights, all_but_dropped
from easy_jax.data import ragged
from easy_jax.io import code_fingerprint
from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.checks import ConfigError
from easy_jax.train.loss_table import LossTable


@dataclasses.dataclass(frozen=True)
class StageWeights:
    """Weights by example id, and a weighting that is computed in every step.

    Attributes:
      weight_N: float weights of examples; NaN leaves an example out; None: all 1.
      token_weight: weights of target tokens; None: all 1.
      weighting: computes further weights from the current model in every step; None: no further.
      frozen_nll: the frozen model's losses for `weighting`, of target tokens or [N] of examples.
    """

    weight_N: np.ndarray | None = None
    token_weight: data.Ragged | None = None
    weighting: Weighting | None = None
    frozen_nll: data.Ragged | np.ndarray | None = None

    def identity(self) -> dict[str, Any]:
        """Returns the entries of a checkpoint's identity for `weighting`; empty without one."""
        if self.weighting is None:
            return {}
        return {"the weighting": identity_of(self.weighting), "frozen losses": self._frozen()}

    def used_N(self) -> np.ndarray | None:
        """Returns which examples are trained on, bool by example id; None: all."""
        used_N = None if self.weight_N is None else ~np.isnan(self.weight_N)
        if self.token_weight is not None:  # examples without any were dropped by scoring
            used_N = np.diff(self.token_weight.offsets) > 0 if used_N is None else used_N
        return used_N

    def mean_batch(self, source: data.AnySource, epochs: int, steps: int) -> float:
        """Returns the mean number of examples in a step, not counting those with weight NaN."""
        present = data.present_ids(source)
        weight_n = np.ones(len(present))
        if self.weight_N is not None:
            weight_n = np.asarray(self.weight_N)[present]
        return np.count_nonzero(~np.isnan(weight_n)) * epochs / steps

    def _frozen(self) -> str:
        if self.frozen_nll is None:
            return "none"
        if isinstance(self.frozen_nll, data.Ragged):
            losses = self.frozen_nll
            return fingerprints.of_arrays({"values": losses.values, "offsets": losses.offsets})
        return fingerprints.of_arrays({"losses": self.frozen_nll})


def identity_of(weighting: Weighting) -> str:
    """Returns a weighting's name and options; for custom ones, with a hash of their code.

    It is the same in every process, because functions are identified by their code.

    Example:
      >>> from easy_jax.core import weightings
      >>> identity_of(weightings.Power(0.5))
      'Power.rule(exponent=0.5, floor=0.0)'
    """
    fields = {
        field.name: _described(getattr(weighting, field.name))
        for field in dataclasses.fields(weighting)
    }
    options = ", ".join(f"{name}={value}" for name, value in sorted(fields.items()))
    return f"{code_fingerprint.of_function(type(weighting).rule)}({options})"


def _described(value: Any) -> str:
    if isinstance(value, Weighting):
        return identity_of(value)
    if isinstance(value, frozenset):
        return repr(sorted(value))
    return code_fingerprint.of_function(value) if callable(value) else repr(value)


def resolve(
    weighting: Weighting | None,
    table: LossTable | None,
    source: data.AnySource,
    given: StageWeights,
    *,
    online: bool,
    seed: int,
) -> StageWeights:
    """Evaluates a weighting of the frozen model's losses, or prepares one of the current model.

    Args:
      weighting, table, source, seed: as in `easy_jax.fit`.
      given: the weights from the caller of `fit`, which are multiplied in.
      online: whether the frozen model computes weights in every step.

    Raises:
      ConfigError: the weighting needs a loss table, or the frozen model in every step, which is
        missing; or the table has another number of examples.
      DataError: the given weights and the table differ in their numbers of examples or tokens.
      LossTableError: the weighting needs token losses, which the table does not have.
    """
    if table is not None and table.num_examples != len(source):
        raise ConfigError(
            f"the loss table in {table.directory} is of {table.num_examples} examples, and the "
            f"training data have {len(source)}"
        )
    needs = frozenset() if weighting is None else weighting.needs
    for need, there, cure in (
        ("frozen", table is not None, "table=, what easy_jax.score returns"),
        ("frozen_model", online, "online=, an easy_jax.core.online_weights.OnlineWeights"),
    ):
        if need in needs and not there:
            raise ConfigError(f"{weighting} reads the frozen model's losses: give {cure}")
    found = Weights() if table is None else Weights(all_but_dropped(table))
    if weighting is None or weighting.level == "none":
        return product(given, found)
    if not weighting.reads_model():
        assert table is not None  # a weighting reads either a model or the table
        return product(given, weighting.of_table(table, seed))
    fitted = weighting if table is None else weighting.fit(table)
    frozen_nll = None
    if "frozen" in needs and table is not None:
        is_text = isinstance(source, data.PackedSource)
        frozen_nll = table.token_losses() if is_text else np.nan_to_num(table.loss_N())
    weights = product(given, found)
    return dataclasses.replace(weights, weighting=fitted, frozen_nll=frozen_nll)


def product(given: StageWeights, found: Weights) -> StageWeights:
    """Returns the products of the given weights and those of a weighting.

    Raises:
      DataError: their numbers of examples or tokens differ.
    """
    weight_N, token_weight = given.weight_N, given.token_weight
    if weight_N is None or found.weight_N is None:
        weight_N = found.weight_N if weight_N is None else weight_N
    elif np.shape(weight_N) != found.weight_N.shape:
        raise data.DataError(
            f"weight_N has shape {np.shape(weight_N)}, and the loss table {found.weight_N.shape}"
        )
    else:
        weight_N = np.asarray(weight_N) * found.weight_N
    if token_weight is None or found.token_weight is None:
        token_weight = found.token_weight if token_weight is None else token_weight
    else:
        token_weight = ragged.product(token_weight, found.token_weight)
    return StageWeights(weight_N, token_weight)
