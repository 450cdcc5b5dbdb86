"""Data sources, their records, and the loaders for scoring and for training."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from easy_jax.data.image_datasets import load_images
    from easy_jax.data.image_source import ImageSource
    from easy_jax.data.loader import AnySource, Loader, present_ids, scoring_loader, training_loader
    from easy_jax.data.packing import PackedSource, Ragged
    from easy_jax.data.reading import Reading
    from easy_jax.data.sources import (
        ArraySource,
        DataError,
        DataWarning,
        Source,
        Splits,
        Tasks,
        TfdsSource,
        fingerprint,
    )
    from easy_jax.data.text import TokenSource

__all__ = [
    "AnySource",
    "ArraySource",
    "DataError",
    "DataWarning",
    "ImageSource",
    "Loader",
    "PackedSource",
    "Ragged",
    "Reading",
    "Source",
    "Splits",
    "Tasks",
    "TfdsSource",
    "TokenSource",
    "fingerprint",
    "load_images",
    "present_ids",
    "scoring_loader",
    "training_loader",
]
