"""Weightings: rules that compute weights of examples and tokens from their losses.

`names()` and `get(name, **options)` return the weightings that a configuration can name, and
`register` adds one. Rules that read only the frozen model's losses are in `frozen`, those that
read the current model in `current`, controls of any of them in `controls`, and the registration
of your own in `own`.
"""

from easy_jax.core.weightings import controls, current, frozen
from easy_jax.core.weightings.controls import Control, control_weights
from easy_jax.core.weightings.current import (
    Deft,
    Dft,
    Eaft,
    Excess,
    Iw,
    IwToken,
    Power,
    ProFit,
    Psft,
    Talr,
)
from easy_jax.core.weightings.exponential import (
    entropic_objective,
    flow_weights,
    flow_weights_token,
    kl_dro_weights,
    temperature,
)
from easy_jax.core.weightings.frozen import Easiest, Flow, FlowOnline, FlowToken, Hardest, Stm
from easy_jax.core.weightings.own import register
from easy_jax.core.weightings.rule import (
    WEIGHTINGS,
    Weighting,
    get,
    names,
)

__all__ = [
    "WEIGHTINGS",
    "Control",
    "Deft",
    "Dft",
    "Eaft",
    "Easiest",
    "Excess",
    "Flow",
    "FlowOnline",
    "FlowToken",
    "Hardest",
    "Iw",
    "IwToken",
    "Power",
    "ProFit",
    "Psft",
    "Stm",
    "Talr",
    "Weighting",
    "control_weights",
    "controls",
    "current",
    "entropic_objective",
    "flow_weights",
    "flow_weights_token",
    "frozen",
    "get",
    "kl_dro_weights",
    "names",
    "register",
    "temperature",
]
