"""The image data sets of the paper (section 2), from TFDS, folders or Parquet."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from easy_jax.data.config import ImageDataConfig, ImageDataName
from easy_jax.data.image_folders import FolderImages, visible_folders, warn_of_order
from easy_jax.data.image_source import ImageSource
from easy_jax.data.image_splits import cut, told
from easy_jax.data.image_stores import ImageStore, ParquetImages, TfdsImages
from easy_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, Colour, ImageError, Views
from easy_jax.data.reading import Reading
from easy_jax.data.sources import DataError, DataWarning, first_of

Split = Literal["train", "validation", "test"]

_TRAIN_TEST = {"train": "train", "test": "test"}
_SPLIT_FOLDERS = ("train", "validation", "val", "test")
_MAX_THREADS = 8  # a view holds Python's lock for about a tenth of its time


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

    Labels are TFDS's, or count the class folders in order of name, as text, as torchvision and
    timm do; for ImageNet, whose folders are called by WordNet ids, the two agree with the order
    of pre-trained heads.

    Of a split of at most `config.check_images` images, all are decoded once, so that those which
    cannot be used are told together, before anything is trained or scored.

    Args:
      config: validated.
      split: `validation` is the data set's own, or cut out of its training data, which `train`
        then is without; so that every class keeps an image to train on.

    Returns:
      The source; its `left_out` has what `on_bad_example='drop'` has left out.

    Raises:
      DataError: the data cannot be read or does not fit the data set, or images cannot be used;
        with paths and fix.

    Warns:
      DataWarning: images are left out, or have an EXIF rotation that is not applied; classes are
        numbers, and not in their order.

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
    (source,) = load_all([(config, split)])
    return source


def load_all(wanted: Sequence[tuple[ImageDataConfig, Split]]) -> list[ImageSource]:
    """Several splits, as `load_images`; what cannot be used in any of them is told at once.

    Raises:
      DataError: as `load_images`.
    """
    sources = [_open_split(config, split) for config, split in wanted]
    found = []
    errors: dict[str, ImageError] = {}  # by path: what validates may be met twice
    counts: dict[str, int] = {}  # by store: what validates may be counted twice
    for source, (config, split) in zip(sources, wanted, strict=True):
        drop = config.on_bad_example == "drop"
        whole = split == "train" and not drop  # with what is cut out of it: told at once, too
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
            f"{told(list(errors.values()), sum(counts.values()))}. Mend or remove them, or set "
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
    """Raises DataError where nothing is left of a split, or of a class that is to be learnt."""
    label_N = source.labels()
    if len(source) == 0:
        raise DataError(
            f"{where}: no image is left that can be used: {first_of(list(source.left_out))}; mend "
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
    if config.name == "other" and _has(config, "validation"):
        splits["validation"] = "validation"
    if config.test_share:
        if _has(config, "test"):
            raise DataError(
                f"{config.path} has test data, and test_share is {config.test_share}; set it to 0, "
                "or remove what is in the way"
            )
        del splits["test"]
    store = _open(config, data_set, splits.get(split, "train"))
    size = config.image_size
    views = Views(
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
        views,
        mean=config.mean or data_set.mean,
        std=config.std or data_set.std,
        positions=positions,
        max_pixels=config.max_pixels,
        reading=_reading(config),
    )


def _open(config: ImageDataConfig, data_set: ImageDataSet, split: str) -> ImageStore:
    fields = {"image_field": config.image_field, "label_field": config.label_field}
    store: ImageStore
    if config.format == "tfds":
        fix = _fix(config, data_set)
        store = TfdsImages(config.name, split, config.path, **fields, fix=fix)
    elif config.format == "folder":
        store = _open_folder(config, data_set, split)
    else:
        num_classes = data_set.num_classes or config.num_classes
        store = ParquetImages(config.path, split, num_classes, **fields)
    if data_set.num_classes not in (None, store.num_classes):
        raise DataError(
            f"split {split!r} in {config.path} has {store.num_classes} classes; {config.name} has "
            f"{data_set.num_classes}"
        )
    return store


def _open_folder(config: ImageDataConfig, data_set: ImageDataSet, split: str) -> FolderImages:
    """A split's folder, with the classes of the training data, if that is there."""
    path = Path(config.path)
    folder = _split_folder(path, split)
    if path.is_dir():
        _check_folders(config, data_set, split, visible_folders(path))
    train = path / data_set.splits["train"]
    if split == "train" or not train.is_dir():
        store = FolderImages(folder, root=path)
        warn_of_order(store.classes, folder)
        return store
    return FolderImages(
        folder,
        FolderImages.classes_of(train, path),
        root=path,
        missing_classes=config.missing_classes == "allow",
    )


def _check_folders(
    config: ImageDataConfig, data_set: ImageDataSet, split: str, found: list[str]
) -> None:
    """Raises DataError for folders that are no splits, and where the split is not there."""
    path, name = Path(config.path), _split_folder(Path(config.path), split).name
    odd = [each for each in found if each not in _SPLIT_FOLDERS]
    if not odd and name in found:
        return
    has = f"{path} has the folders {found[:10]}"
    should = (
        f"it should have {', '.join(data_set.splits.values())}, each with a folder per class: "
        f"{path / split}/<class>/<image>.jpg"
    )
    if odd:
        what = "is no split" if len(odd) == 1 else "are no splits"
        raise DataError(f"{has}, of which {first_of(odd, ', ')} {what}; {should}")
    cures = []
    if config.name == "other" and split == "test" and "train" in found:
        other = [each for each in found if each != "train"]
        if other:
            cures.append(f"rename {other[0]} to test")
        cures.append("set test_share, for example to 0.1, to cut a test split out of train")
    raise DataError(f"{has}, and no {name}: {should}{''.join(f'; or {cure}' for cure in cures)}")


def _has(config: ImageDataConfig, split: str) -> bool:
    path = Path(config.path)
    if config.format == "parquet":
        return bool(ParquetImages.files_of(path, split))
    return _split_folder(path, split).exists()


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


def _reading(config: ImageDataConfig) -> Reading:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.threads or min(max(1, (cores or 1) // max(1, config.workers)), _MAX_THREADS)
    return Reading(threads=threads, prefetch=threads + 2, workers=config.workers)
