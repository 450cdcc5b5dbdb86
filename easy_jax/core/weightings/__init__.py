"""Weightings: from losses to the weights of examples and tokens.

A weighting that a configuration can name is one file here, imported below, where it registers
itself in `WEIGHTINGS`. The functions it is made of work on any arrays of losses.
"""

from easy_jax.core.weightings import controls, flow
from easy_jax.core.weightings.controls import control_weights
from easy_jax.core.weightings.exponential import (
    entropic_objective,
    flow_weights,
    flow_weights_token,
    kl_dro_weights,
    temperature,
)
from easy_jax.core.weightings.rule import WEIGHTINGS, Weighting, Weights

__all__ = [
    "WEIGHTINGS",
    "Weighting",
    "Weights",
    "control_weights",
    "controls",
    "entropic_objective",
    "flow",
    "flow_weights",
    "flow_weights_token",
    "kl_dro_weights",
    "temperature",
]
