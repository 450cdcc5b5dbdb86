"""Formats of image data sets, which open the store of a split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from easy_jax.data.image_folders import FolderImages
    from easy_jax.data.image_stores import ImageStore
    from easy_jax.data.known_images import ImageDataSet

_SPLIT_FOLDERS = ("train", "validation", "val", "test")


class ImageFormat:
    """A format of image data sets, registered in `formats.py`.

    In all methods, `config` is an `ImageDataConfig`.

    Attributes:
      own_data: whether it can read the user's own data sets (`name='other'`).
      finds_classes: whether the data contain the number of classes; if not, `num_classes` does.
    """

    own_data: ClassVar[bool] = True
    finds_classes: ClassVar[bool] = True

    def has(self, config: Any, split: str) -> bool:
        """Returns whether a split exists; used only for the user's own data."""
        raise NotImplementedError

    def open(self, config: Any, split: str, data_set: ImageDataSet) -> ImageStore:
        """Returns the encoded images and labels of a split; raises DataError.

        Args:
          config: where the data are.
          split: the data set's own name for it.
          data_set: what is known about the data set.
        """
        raise NotImplementedError


class Tfds(ImageFormat):
    """A split that TFDS has prepared as ArrayRecord."""

    own_data: ClassVar[bool] = False

    def open(self, config: Any, split: str, data_set: ImageDataSet) -> ImageStore:
        from easy_jax.data.image_stores import TfdsImages

        return TfdsImages(
            config.name,
            split,
            config.path,
            image_field=config.image_field,
            label_field=config.label_field,
            fix=_fix(config, data_set),
        )


class Folders(ImageFormat):
    """Images in folders `path/<split>/<class>/<image>`."""

    def has(self, config: Any, split: str) -> bool:
        return _split_folder(Path(config.path), split).exists()

    def open(self, config: Any, split: str, data_set: ImageDataSet) -> ImageStore:
        return _open_folder(config, data_set, split)


class Parquet(ImageFormat):
    """Images in Parquet files `path/<split>*.parquet`."""

    finds_classes: ClassVar[bool] = False

    def has(self, config: Any, split: str) -> bool:
        from easy_jax.data.image_stores import ParquetImages

        return bool(ParquetImages.files_of(Path(config.path), split))

    def open(self, config: Any, split: str, data_set: ImageDataSet) -> ImageStore:
        from easy_jax.data.image_stores import ParquetImages

        return ParquetImages(
            config.path,
            split,
            data_set.num_classes or config.num_classes,
            image_field=config.image_field,
            label_field=config.label_field,
        )


def _open_folder(config: Any, data_set: ImageDataSet, split: str) -> FolderImages:
    """Opens a split's folder, with the classes of the training data if there are training data."""
    from easy_jax.data.image_folders import FolderImages, visible_folders, warn_of_order

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


def _check_folders(config: Any, data_set: ImageDataSet, split: str, found: list[str]) -> None:
    """Raises DataError for folders that are not splits, and if the split does not exist."""
    from easy_jax.data.sources import DataError, first_of

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


def _split_folder(path: Path, split: str) -> Path:
    """Returns a split's folder; `val`, the usual name for ImageNet, counts as `validation`."""
    short = path / "val"
    return short if split == "validation" and short.is_dir() else path / split


def _fix(config: Any, data_set: ImageDataSet) -> str:
    """Returns what to do if TFDS has not prepared a data set."""
    folders = " and ".join(f"PATH/{s}/<class>/<image>.jpg" for s in data_set.splits.values())
    own = f"get the images elsewhere, as {folders}, and set format='folder' and path='PATH'"
    if data_set.dead:
        return f"TFDS cannot download it any more: {data_set.dead}. Instead, {own}"
    return (
        f"Prepare it with tfds.builder({config.name!r}, data_dir={config.path!r}, "
        f"file_format='array_record').download_and_prepare(), which needs TensorFlow; or {own}"
    )
