"""The two tasks of an experiment with images."""

import numpy as np

from easy_jax.config import ExperimentConfig, GlyphDataConfig, ImageDataConfig
from easy_jax.data import glyphs
from easy_jax.data.image_datasets import load_images
from easy_jax.data.sources import Splits, Tasks


def load_tasks(config: ExperimentConfig, seed: int, label_noise: float) -> Tasks:
    """Both tasks in a setting; only letters and digits depend on it.

    Args:
      config: validated. Where it gives pre-trained weights (`model.path`), the pre-training task
        has test data only.
      seed: of rendering, split and wrong labels.
      label_noise: share of the target's training labels that are replaced by another class.

    Raises:
      DataError: data that cannot be read, with path and fix.

    Example:
      >>> config = ExperimentConfig(data=GlyphDataConfig(pretrain_train=50))
      >>> load_tasks(config, seed=0, label_noise=0.0).target.num_classes
      10
    """
    if isinstance(config.data, GlyphDataConfig):
        return glyphs.load(config.data, seed, label_noise)
    pretrain = _splits(config.data.pretrain, only_test=bool(config.model.path))
    target = _splits(config.data.target)
    assert target.train is not None
    return Tasks(pretrain, target, np.zeros(len(target.train), bool))


def _splits(config: ImageDataConfig, only_test: bool = False) -> Splits:
    test = load_images(config, "test")
    if only_test:
        return Splits(None, None, test, test.classes)
    train, validation = load_images(config, "train"), load_images(config, "validation")
    return Splits(train, validation, test, test.classes)
