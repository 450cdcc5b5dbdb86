"""Data sources, their records, and the loaders for scoring and for training."""

from easy_jax.data.loader import Loader, scoring_loader, training_loader
from easy_jax.data.sources import ArraySource, DataError, Source, TfdsSource, fingerprint

__all__ = [
    "ArraySource",
    "DataError",
    "Loader",
    "Source",
    "TfdsSource",
    "fingerprint",
    "scoring_loader",
    "training_loader",
]
