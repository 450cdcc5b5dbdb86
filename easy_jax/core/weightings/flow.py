"""FLOW (arXiv:2502.02797): weights that fall with the frozen model's loss."""

import dataclasses

import numpy as np

from easy_jax.core.weightings.rule import WEIGHTINGS, Scored, Weighting, Weights


@dataclasses.dataclass(frozen=True)
class Flow(Weighting):
    """FLOW by example: w_i = exp(-f_i / tau), tau the median of the losses f.

    f_i is the frozen model's mean loss of example i. Source: arXiv:2502.02797, algorithm 1. It
    hurts where what is to be learnt is only in the examples that the model finds hard.
    """

    def __call__(self, table: Scored, seed: int = 0) -> Weights:
        return Weights(table.flow_weights())


@dataclasses.dataclass(frozen=True)
class FlowToken(Weighting):
    """FLOW by token: w_it = exp(-f_it / tau), tau the median over all target tokens.

    f_it is the frozen model's loss of token t. Source: arXiv:2502.02797. Denominators
    count the tokens, whatever their weights.
    """

    level = "token"

    def __call__(self, table: Scored, seed: int = 0) -> Weights:
        return Weights(_all_but_dropped(table), table.flow_token_weights())


@dataclasses.dataclass(frozen=True)
class FlowOnline(Weighting):
    """FLOW on each training batch: w_i = exp(-f(x_i) / tau), x_i the transformed image.

    The frozen model computes f in every step, on what is trained on; tau is the loss table's
    median. Source: the authors' code (`vision/FLOW_ft.py`). It costs a forward pass a step.
    """

    needs = frozenset({"table", "batch"})

    def __call__(self, table: Scored, seed: int = 0) -> Weights:
        return Weights(_all_but_dropped(table))


def _all_but_dropped(table: Scored) -> np.ndarray:
    """1, and NaN for the examples that scoring dropped."""
    return np.where(np.isnan(table.loss_N()), np.nan, 1.0).astype(np.float32)


WEIGHTINGS.register("flow")(Flow())
WEIGHTINGS.register("flow_token")(FlowToken())
WEIGHTINGS.register("flow_online")(FlowOnline())
