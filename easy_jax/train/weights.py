"""What a stage of training multiplies its losses by: weights that are given, and a weighting's."""

import dataclasses
from typing import Any

import numpy as np

from easy_jax import data
from easy_jax.core.weightings.rule import Weighting, all_but_dropped
from easy_jax.io import code_fingerprint
from easy_jax.io import fingerprint as fingerprints
from easy_jax.io.checks import ConfigError
from easy_jax.train.loss_table import LossTable


@dataclasses.dataclass(frozen=True)
class StageWeights:
    """Weights by example id, and what is left to compute in every step.

    Attributes:
      weight_N: float weights of examples; NaN leaves an example out; None: all 1.
      token_weight: weights of target tokens; None: all 1.
      weighting: computes further weights from the current model, in every step; None: none.
      frozen_nll: the frozen model's losses that it reads, of target tokens or [N] of examples.
    """

    weight_N: np.ndarray | None = None
    token_weight: data.Ragged | None = None
    weighting: Weighting | None = None
    frozen_nll: data.Ragged | np.ndarray | None = None

    def identity(self) -> dict[str, Any]:
        """Returns what a checkpoint records of a weighting of the current model."""
        if self.weighting is None:
            return {}
        return {"the weighting": identity_of(self.weighting), "frozen losses": self._frozen()}

    def used_N(self) -> np.ndarray | None:
        """Returns which examples are trained on, bool by example id; None: all."""
        used_N = None if self.weight_N is None else ~np.isnan(self.weight_N)
        if self.token_weight is not None:  # an example without any was dropped while scoring
            used_N = np.diff(self.token_weight.offsets) > 0 if used_N is None else used_N
        return used_N

    def mean_batch(self, source: data.AnySource, epochs: int, steps: int) -> float:
        """Returns the mean number of examples in a step; those without a weight do not count."""
        present = data.present_ids(source)
        weight_n = np.ones(len(present))
        if self.weight_N is not None:
            weight_n = np.asarray(self.weight_N)[present]
        return np.count_nonzero(~np.isnan(weight_n)) * epochs / steps

    def _frozen(self) -> str:
        if self.frozen_nll is None:
            return "none"
        if isinstance(self.frozen_nll, data.Ragged):
            ragged = self.frozen_nll
            return fingerprints.of_arrays({"values": ragged.values, "offsets": ragged.offsets})
        return fingerprints.of_arrays({"losses": self.frozen_nll})


def identity_of(weighting: Weighting) -> str:
    """Returns a weighting's name and options, and of own ones a hash of what they compute.

    The same in every process: functions are named by their code.

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
    weight_N: np.ndarray | None,
    token_weight: data.Ragged | None,
    seed: int,
) -> StageWeights:
    """Evaluates a weighting of the frozen model's losses, or prepares one of the current model.

    Args:
      weighting, table, source, weight_N, token_weight, seed: as in `easy_jax.fit`.

    Raises:
      ConfigError: a weighting that needs a loss table, and there is none.
      LossTableError: a weighting of tokens, and a table without token losses.
    """
    given = StageWeights(weight_N, token_weight)
    if weighting is None or weighting.level == "none":
        return given
    if "frozen" in weighting.needs and table is None:
        raise ConfigError(
            f"{weighting} reads the frozen model's losses: give table=, what easy_jax.score returns"
        )
    if not weighting.reads_model():
        assert table is not None
        found = weighting.of_table(table, seed)
        weights = (_product(weight_N, found.weight_N), _ragged(token_weight, found.token_weight))
        return StageWeights(*weights)
    if table is None:
        return dataclasses.replace(given, weighting=weighting)
    present = _product(weight_N, all_but_dropped(table))
    given = dataclasses.replace(given, weight_N=present, weighting=weighting.fit(table))
    if "frozen" not in weighting.needs:
        return given
    of_tokens = isinstance(source, data.PackedSource)
    losses = table.token_losses() if of_tokens else np.nan_to_num(table.loss_N())
    return dataclasses.replace(given, frozen_nll=losses)


def _product(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None or b is None:
        return a if b is None else b
    return np.asarray(a) * b


def _ragged(a: data.Ragged | None, b: data.Ragged | None) -> data.Ragged | None:
    if a is None or b is None:
        return a if b is None else b
    return data.Ragged(a.values * b.values, a.offsets)
