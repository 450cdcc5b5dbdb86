"""The image data sets of the paper (section 2), from TFDS, folders or Parquet."""

import os
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np

from easy_jax.data.config import ImageDataConfig
from easy_jax.data.formats import IMAGE_FORMATS
from easy_jax.data.image_source import ImageSource
from easy_jax.data.image_splits import cut, told
from easy_jax.data.image_stores import ImageStore
from easy_jax.data.images import ImageError, Transforms
from easy_jax.data.known_images import DATA_SETS, ImageDataSet
from easy_jax.data.reading import Reading
from easy_jax.data.sources import DataError, DataWarning, first_of

Split = Literal["train", "validation", "test"]

_MAX_THREADS = 8  # a view holds Python's lock for about a tenth of its time


def load_images(config: ImageDataConfig, split: Split) -> ImageSource:
    """Opens a split of a data set of images.

    Labels are those of TFDS, or the positions of the class folders in the order of their names
    as text, as in torchvision and timm. For ImageNet, whose folders are named by WordNet ids,
    both agree with the order of pre-trained heads.

    If a split has at most `config.check_images` images, all are decoded once, so that all
    unusable ones are reported together, before anything is trained or scored.

    Args:
      config: validated.
      split: `validation` is the data set's own, or is cut out of its training data. `train`
        is then without these images, but keeps at least one image of every class.

    Returns:
      The source; its `left_out` has what `on_bad_example='drop'` has left out.

    Raises:
      DataError: the data cannot be read or does not fit the data set, or images cannot be used;
        the message has the paths and says what to do.

    Warns:
      DataWarning: images are left out, or have an EXIF rotation that is not applied; class
        names are numbers, but their order as text is not numerical.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from PIL import Image
      >>> folder = Path(tempfile.mkdtemp())
      >>> for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
      ...   (folder / place).mkdir(parents=True)
      ...   for number in range(5):
      ...     Image.new("RGB", (48, 32)).save(folder / place / f"{number}.jpg")
      >>> config = ImageDataConfig(name="other", format="folder", path=str(folder), image_size=16)
      >>> [len(load_images(config, split)) for split in ("train", "validation", "test")]
      [9, 1, 10]
    """
    (source,) = load_all([(config, split)])
    return source


def load_all(wanted: Sequence[tuple[ImageDataConfig, Split]]) -> list[ImageSource]:
    """Opens several splits, as `load_images` does; one error lists the unusable images of all.

    Raises:
      DataError: as `load_images`.
    """
    sources = [_open_split(config, split) for config, split in wanted]
    found = []
    errors: dict[str, ImageError] = {}  # by path: validation images may be seen twice
    counts: dict[str, int] = {}  # by store: validation images may be counted twice
    for source, (config, split) in zip(sources, wanted, strict=True):
        drop = config.on_bad_example == "drop"
        whole = split == "train" and not drop  # includes the parts that are cut out of it
        size = len(source.store) if whole else len(source)
        bad, rotated = source.examine(decode=drop or size <= config.check_images, whole_store=whole)
        where = f"{config.path}, {split}"
        found.append((where, bad if drop else {}))
        errors |= {} if drop else {error.where: error for error in bad.values()}
        store = source.store.where(0)
        counts[store] = max(size, counts.get(store, 0))
        if rotated and not config.rotate:
            warnings.warn(
                f"{rotated} of {size} images of {where} have an EXIF rotation, which is not "
                "applied; set rotate=True to turn them upright",
                DataWarning,
                stacklevel=3,
            )
    if errors:
        raise DataError(
            f"{told(list(errors.values()), sum(counts.values()))}. Fix or remove them, or set "
            "on_bad_example='drop' to leave them out"
        )
    for place, (where, bad) in enumerate(found):
        if bad:
            some = told(list(bad.values()), len(sources[place]), limit=5)
            warnings.warn(f"{where}: left out, {some}", DataWarning, stacklevel=3)
            sources[place] = sources[place].without(bad)
            _check_left(sources[place], wanted[place][1], where)
    return sources


def _check_left(source: ImageSource, split: Split, where: str) -> None:
    """Raises DataError if a split, or a class of the training data, has no image left."""
    label_N = source.labels()
    if len(source) == 0:
        raise DataError(
            f"{where}: no image is left that can be used: {first_of(list(source.left_out))}; fix "
            "them, or add images"
        )
    if split == "train" and label_N is not None:
        counts = np.bincount(label_N, minlength=source.num_classes)
        empty = [source.classes[label] for label in np.flatnonzero(counts == 0).tolist()]
        if empty:
            raise DataError(
                f"{where}: no image that can be used is left of the classes {first_of(empty, ', ')}"
            )


def _open_split(config: ImageDataConfig, split: Split) -> ImageSource:
    data_set = DATA_SETS[config.name]
    splits = dict(data_set.splits)
    if config.name == "other" and IMAGE_FORMATS[config.format].has(config, "validation"):
        splits["validation"] = "validation"
    if config.test_share:
        if IMAGE_FORMATS[config.format].has(config, "test"):
            raise DataError(
                f"{config.path} has test data, and test_share is {config.test_share}; set it to 0, "
                "or remove what is in the way"
            )
        del splits["test"]
    store = _open(config, data_set, splits.get(split, "train"))
    size = config.image_size
    transforms = Transforms(
        image_size=size,
        resize_size=config.resize_size or (size * 8 // 7 if data_set.photos else size),
        interpolation=config.interpolation,
        augment=config.augment,
        color_jitter=0.2 if data_set.photos else 0.0,
        rotate=config.rotate,
    )
    positions = None
    if split not in splits or split == "train":
        share = 0.0 if "validation" in splits else data_set.validation_share
        positions = cut(store, split, share, config.test_share, config.path)
    return ImageSource(
        store,
        transforms,
        mean=config.mean or data_set.mean,
        std=config.std or data_set.std,
        positions=positions,
        max_pixels=config.max_pixels,
        reading=_reading(config),
    )


def _open(config: ImageDataConfig, data_set: ImageDataSet, split: str) -> ImageStore:
    store = IMAGE_FORMATS[config.format].open(config, split, data_set)
    if data_set.num_classes not in (None, store.num_classes):
        raise DataError(
            f"split {split!r} in {config.path} has {store.num_classes} classes; {config.name} has "
            f"{data_set.num_classes}"
        )
    return store


def _reading(config: ImageDataConfig) -> Reading:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.threads or min(max(1, (cores or 1) // max(1, config.workers)), _MAX_THREADS)
    return Reading(threads=threads, prefetch=threads + 2, workers=config.workers)
