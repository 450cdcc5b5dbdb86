"""Small image data sets on disk, in the forms that are read."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tfds_data
from PIL import Image

from easy_jax.config import ImageDataConfig, OptimizerConfig, StageConfig
from easy_jax.data import load_images


def picture(number: int, width: int = 48, height: int = 36) -> np.ndarray:
    """A smooth image of its own, uint8 [height, width, 3]."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / a + p) + np.cos(y / b - p)
        for a, b, p in zip(*rng.uniform(3, 12, (2, 3)), rng.uniform(0, 6, 3), strict=True)
    ]
    return (127.5 + 60.0 * np.stack(waves, axis=-1)).round().clip(0, 255).astype(np.uint8)


def encoded(array: np.ndarray, kind: str = "JPEG", mode: str | None = None, **options) -> bytes:
    """The bytes of an image file."""
    image = Image.fromarray(array)
    file = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def jpegs(size: int, classes: int = 3, start: int = 0) -> list[tuple[bytes, int]]:
    """(bytes, label) pairs; image i is picture(start + i)."""
    return [(encoded(picture(start + i), quality=95), i % classes) for i in range(size)]


def write_folder(path: Path, classes=("bird", "cat", "dog"), per_class: int = 6) -> Path:
    """`path/<class>/<number>.jpg`; image i of class c is picture(100 c + i)."""
    for label, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for number in range(per_class):
            data = encoded(picture(100 * label + number), quality=95)
            (path / name / f"{number:03d}.jpg").write_bytes(data)
    return path


def write_splits(path: Path) -> Path:
    """The folders `train` and `test`, each of two classes of six images."""
    for split in ("train", "test"):
        write_folder(path / split, classes=("a", "b"))
    return path


def write_parquet(
    path: Path, examples, *, struct: bool = False, image: str = "image", label: str = "label"
) -> Path:
    """A file of (bytes, label) pairs; images as structs, as `datasets` of Hugging Face has them."""
    images = [data for data, _ in examples]
    if struct:
        images = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    columns = {image: images, label: [number for _, number in examples]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return path


def write_tfds(data_dir: Path, name: str, version: str, num_classes: int, splits) -> Path:
    """A data set as TFDS prepares it: split -> (bytes, label) pairs.

    TFDS stores the encoded bytes that it is given: no TensorFlow is needed.
    """
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
        "file_name": tfds.features.Text(),
    }
    records = {
        split: [
            {"image": data, "label": label, "file_name": f"{i}.jpg"}
            for i, (data, label) in enumerate(examples)
        ]
        for split, examples in splits.items()
    }
    return tfds_data.write(data_dir, name, version, features, records)


def data_config(path: Path, **options) -> ImageDataConfig:
    """A valid config of the data there, by default a folder of images of 16 x 16 pixels."""
    options = {"name": "other", "format": "folder", "image_size": 16, "threads": 2, **options}
    made = ImageDataConfig(path=str(path), **options)
    made.validate()
    return made


def load(path: Path, split: str = "train", **options):
    """A split of the data there; the options are those of `data_config`."""
    return load_images(data_config(path, **options), split)


def names(source) -> set[str]:
    """The files of a source of a folder, relative to it."""
    return {
        os.path.relpath(source.store.where(int(p)), source.store.folder) for p in source._positions
    }


def stage(epochs=1, rate=0.1):
    """A stage of an image experiment, in batches of 64."""
    return StageConfig(epochs=epochs, batch_size=64, optimizer=OptimizerConfig(learning_rate=rate))
