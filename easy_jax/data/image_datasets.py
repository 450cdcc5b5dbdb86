"""The image data sets of the paper (section 2), from TFDS, folders or Parquet."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from easy_jax.config import ImageDataConfig, ImageDataName
from easy_jax.data.image_source import ImageSource
from easy_jax.data.image_stores import FolderImages, ImageStore, ParquetImages, TfdsImages
from easy_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, Colour, Views
from easy_jax.data.reading import Reading
from easy_jax.data.sources import DataError

Split = Literal["train", "validation", "test"]

_TRAIN_TEST = {"train": "train", "test": "test"}
_MAX_THREADS = 8  # a view holds Python's lock for about a tenth of its time
_CUT = 20250715  # fixes which training examples validate, in all runs alike


@dataclasses.dataclass(frozen=True)
class ImageDataSet:
    """What is known of a data set.

    Attributes:
      num_classes: None: as many as there are.
      splits: our split -> its own. Without a `validation`, that is cut out of `train`: a fixed
        random share. The test split is never used for it.
      validation_share: that share.
      mean, std: per channel, of pixels in [0, 1].
      photos: views for photos: random crop and colour jitter; else the whole image.
      dead: why TFDS's download does not work any more, if that is known.
    """

    num_classes: int | None
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TRAIN_TEST)
    validation_share: float = 0.1
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    photos: bool = True
    dead: str = ""


DATA_SETS: dict[ImageDataName, ImageDataSet] = {
    "cifar10": ImageDataSet(
        10, photos=False, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    "cifar100": ImageDataSet(
        100, photos=False, mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)
    ),
    "oxford_flowers102": ImageDataSet(102, splits={**_TRAIN_TEST, "validation": "validation"}),
    "caltech101": ImageDataSet(102),  # 101 objects and Google's background
    "cars196": ImageDataSet(
        196,
        dead="its server has answered 404 since 2023 (github.com/tensorflow/datasets/issues/5656)",
    ),
    "stanford_dogs": ImageDataSet(120),
    # The labels of its test split are secret: its validation split is what results are on.
    "imagenet2012": ImageDataSet(
        1000,
        splits={"train": "train", "test": "validation"},
        validation_share=0.01,
    ),
    "other": ImageDataSet(None),
}


def load_images(config: ImageDataConfig, split: Split) -> ImageSource:
    """A split of a data set of images.

    Labels are TFDS's, or count the class folders in order of name; for ImageNet, whose folders
    are called by WordNet ids, the two agree with the order of pre-trained heads.

    Args:
      config: validated.
      split: `validation` is the data set's own, or cut out of its training data, which `train`
        then is without.

    Raises:
      DataError: the data cannot be read or does not fit the data set; with path and fix.

    Example:
      >>> import tempfile
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
    data_set = DATA_SETS[config.name]
    splits = dict(data_set.splits)
    if config.name == "other" and _has_validation(config):
        splits["validation"] = "validation"
    cut = split != "test" and "validation" not in splits
    store = _open(config, data_set, "train" if cut else splits[split])
    size = config.image_size
    views = Views(
        image_size=size,
        resize_size=config.resize_size or (size * 8 // 7 if data_set.photos else size),
        interpolation=config.interpolation,
        augment=config.augment,
        color_jitter=0.2 if data_set.photos else 0.0,
    )
    positions = _cut(len(store), data_set.validation_share, split) if cut else None
    return ImageSource(
        store, views, mean=config.mean or data_set.mean, std=config.std or data_set.std,
        positions=positions, reading=_reading(config),
    )  # fmt: skip


def _open(config: ImageDataConfig, data_set: ImageDataSet, split: str) -> ImageStore:
    fields = {"image_field": config.image_field, "label_field": config.label_field}
    store: ImageStore
    if config.format == "tfds":
        fix = _fix(config, data_set)
        store = TfdsImages(config.name, split, config.path, **fields, fix=fix)
    elif config.format == "folder":
        store = _open_folder(Path(config.path), data_set, split)
    else:
        num_classes = data_set.num_classes or config.num_classes
        store = ParquetImages(config.path, split, num_classes, **fields)
    if data_set.num_classes not in (None, store.num_classes):
        raise DataError(
            f"split {split!r} in {config.path} has {store.num_classes} classes; {config.name} has "
            f"{data_set.num_classes}"
        )
    return store


def _open_folder(path: Path, data_set: ImageDataSet, split: str) -> FolderImages:
    """A split's folder, with the classes of the training data, if that is there."""
    names = ("train", "validation", "val", "test")
    folder = _split_folder(path, split)
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        odd = [name for name in found if name not in names and not name.startswith(".")]
        if odd or folder.name not in found:
            raise DataError(
                f"{path} has the folders {found[:10]}, no or not only those of splits; it should "
                f"have {', '.join(data_set.splits.values())}, each with a folder per class: "
                f"{path / split}/<class>/<image>.jpg"
            )
    train = path / data_set.splits["train"]
    others = split != "train" and train.is_dir()
    return FolderImages(folder, FolderImages.classes_of(train) if others else None)


def _has_validation(config: ImageDataConfig) -> bool:
    path = Path(config.path)
    if config.format == "parquet":
        return bool(ParquetImages.files_of(path, "validation"))
    return _split_folder(path, "validation").exists()


def _split_folder(path: Path, split: str) -> Path:
    """`val` is as good as `validation`: so ImageNet's is called wherever it is unpacked."""
    short = path / "val"
    return short if split == "validation" and short.is_dir() else path / split


def _fix(config: ImageDataConfig, data_set: ImageDataSet) -> str:
    """What to do where TFDS has not prepared a data set."""
    folders = " and ".join(f"PATH/{s}/<class>/<image>.jpg" for s in data_set.splits.values())
    own = f"get the images elsewhere, as {folders}, and set format='folder' and path='PATH'"
    if data_set.dead:
        return f"TFDS cannot download it any more: {data_set.dead}. Instead, {own}"
    return (
        f"Prepare it with tfds.builder({config.name!r}, data_dir={config.path!r}, "
        f"file_format='array_record').download_and_prepare(), which needs TensorFlow; or {own}"
    )


def _cut(size: int, share: float, split: Split) -> np.ndarray:
    """Positions of the training examples that validate, or of the others; in order."""
    bits = np.random.Philox(_CUT).random_raw(size)
    order = np.argsort(bits, kind="stable")
    validating = max(1, round(share * size))
    return np.sort(order[:validating] if split == "validation" else order[validating:])


def _reading(config: ImageDataConfig) -> Reading:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.threads or min(max(1, (cores or 1) // max(1, config.workers)), _MAX_THREADS)
    return Reading(threads=threads, prefetch=threads + 2, workers=config.workers)
