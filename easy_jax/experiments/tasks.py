"""Loading of the pre-training and the target task of an experiment with images."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from easy_jax.data import glyphs
from easy_jax.data.config import GlyphDataConfig, ImageDataConfig
from easy_jax.data.image_datasets import Split, load_all
from easy_jax.data.image_source import ImageSource
from easy_jax.data.sources import Splits, Tasks
from easy_jax.experiments.config import ExperimentConfig


def load_tasks(config: ExperimentConfig, seed: int, label_noise: float) -> Tasks:
    """Loads both tasks; only letters and digits depend on `seed` and `label_noise`.

    Args:
      config: a validated configuration. With pre-trained weights (`model.path`), the pre-training
        task has test data only. With `scoring.on_bad_example='drop'`, images that cannot be used
        are left out of the target's training and validation data.
      seed: random seed of rendering, split and wrong labels.
      label_noise: share of the target's training labels that are replaced by another class.

    Raises:
      DataError: the data cannot be read; the message gives the path and a solution.

    Example:
      >>> config = ExperimentConfig(data=GlyphDataConfig(pretrain_train=50))
      >>> load_tasks(config, seed=0, label_noise=0.0).target.num_classes
      10
    """
    if isinstance(config.data, GlyphDataConfig):
        return glyphs.load(config.data, seed, label_noise)
    data, target = config.data, config.data.target
    if config.scoring.on_bad_example == "drop":
        target = dataclasses.replace(target, on_bad_example="drop")
    wanted: dict[tuple[str, Split], ImageDataConfig] = {
        ("pretrain", "test"): data.pretrain,
        ("target", "test"): data.target,
        ("target", "train"): target,
        ("target", "validation"): target,
    }
    if not config.model.path:
        wanted |= {("pretrain", "train"): data.pretrain, ("pretrain", "validation"): data.pretrain}
    opened = load_all([(each, split) for (_, split), each in wanted.items()])
    sources = dict(zip(wanted, opened, strict=True))
    wrong_N = np.zeros(len(sources["target", "train"]), bool)
    return Tasks(_splits(sources, "pretrain"), _splits(sources, "target"), wrong_N)


def _splits(sources: Mapping[tuple[str, Split], ImageSource], task: str) -> Splits:
    train, validation = sources.get((task, "train")), sources.get((task, "validation"))
    test = sources[task, "test"]
    return Splits(train, validation, test, test.classes)
