"""One numerical input with its right value, and the judgement of what comes out."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from easy_jax.cli import errors

NAN, INF, HUGE, TINY, SUBNORMAL = np.nan, np.inf, 3e38, 1e-39, 1e-45
BFLOAT16 = ml_dtypes.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
      name: for the output.
      call: what a user would.
      want: the right value; None if an error or warning must be raised.
      words: that a report must contain; with none, a right value must come.
      rtol: relative tolerance.
    """

    name: str
    call: Callable[[], Any]
    want: Any = None
    words: tuple[str, ...] = ()
    rtol: float = 2e-6


def judge(case):
    """`right`, `reported`, or else what is wrong; and what came out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = np.asarray(case.call(), np.float64)
        except (*errors.USER_ERRORS, ValueError) as error:
            return _reported(case, str(error))
        except Exception as error:  # what a user would see as a traceback
            return "traceback", f"{type(error).__name__}: {str(error)[:200]}"
    if case.want is not None and _close(got, np.asarray(case.want, np.float64), case.rtol):
        return "right", ""
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    if said and _reported(case, " ".join(said))[0] == "reported":
        return "reported", said[0]
    wanted = "an error or warning" if case.want is None else case.want
    return "silently wrong", f"{got.ravel()[:6].tolist()}, not {wanted}"


def _reported(case, message):
    lacking = [word for word in case.words if word not in message]
    if case.want is not None and not case.words:
        return "refused", message
    if "\n" in message.strip() or lacking:
        return "unclear", f"without {lacking}: {message[:300]!r}"
    return "reported", message


def _close(got, want, rtol):
    # What float32 has of a value below its smallest is 0, or the nearest of its subnormals.
    return got.shape == want.shape and np.allclose(got, want, rtol, 1.5e-45, equal_nan=True)
