"""Stores of encoded images and labels: Parquet and TensorFlow Datasets.

Folders of images are in `easy_jax.data.image_folders`.

A store returns bytes; `easy_jax.data.images` decodes them. An image's position is the same in
every process and every run: files in order of class and name, rows in order of file.
"""

import bisect
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from easy_jax.data.sources import PREPARE_TFDS, DataError, first_of, open_tfds, tfds_identity
from easy_jax.io import fingerprint as fingerprints

Location = str | os.PathLike[str]


class ImageStore(Protocol):
    """Encoded images and their labels, by position."""

    num_classes: int
    classes: Sequence[str]  # their names, by label

    def __len__(self) -> int: ...

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """Returns the encoded images and labels at these positions; raises DataError."""

    def labels(self) -> np.ndarray | None:
        """Returns all labels, int64 [N]; None if this would need reading all images."""

    def where(self, position: int) -> str:
        """Returns the name of an image in errors: its path, or its row."""

    def fingerprint(self) -> str:
        """Returns a hash that identifies images and labels, without reading all images."""


class ParquetImages:
    """A split in Parquet: `<split>.parquet`, `<split>-*.parquet` or `<split>/*.parquet`.

    The files are read into memory completely (CIFAR-10 0.1 GB, cars 2 GB), because single rows of
    Parquet cannot be read. Each worker process has a copy; prefer threads.

    Args:
      folder: contains the files.
      split: which of them.
      num_classes: labels are below it. Class names are those that Hugging Face's `datasets` has
        written into the first file, otherwise numbers.
      image_field: a column of file contents, or of structs with a field `bytes`, as
        `datasets` of Hugging Face writes them.
      label_field: a column of integers.

    Raises:
      DataError: no files, files that cannot be read or that are larger than the machine's
        memory; another number of class names than of classes; columns that are missing, of
        another type or with nulls; labels out of range. The message has the file and the row,
        counted from 0 in each file.
    """

    def __init__(
        self,
        folder: Location,
        split: str,
        num_classes: int,
        *,
        image_field: str = "image",
        label_field: str = "label",
    ):
        self._again = functools.partial(
            ParquetImages,
            folder,
            split,
            num_classes,
            image_field=image_field,
            label_field=label_field,
        )
        folder = Path(folder)
        self.files = self.files_of(folder, split)
        if not self.files:
            raise DataError(f"{folder} has none of {', '.join(self._patterns(split))}")
        size = sum(path.stat().st_size for path in self.files)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if size > memory:
            raise DataError(
                f"the {len(self.files)} files of split {split!r} in {folder} have "
                f"{size / 2**30:.0f} GiB, more than the {memory / 2**30:.0f} GiB of memory they "
                "are read into; unpack them into folders (format 'folder')"
            )
        tables = [_columns(path, image_field, label_field) for path in self.files]
        self._ends = np.cumsum([len(label_n) for _, label_n in tables]).tolist()
        self._images = [image for image, _ in tables]
        self._label = np.concatenate([label_n for _, label_n in tables])
        if len(self._label) == 0:
            raise DataError(f"split {split!r} in {folder} is empty: its files have no rows")
        self.num_classes = num_classes
        self.classes: Sequence[str] = _class_names(self.files[0], label_field, num_classes)
        bad = np.flatnonzero((self._label < 0) | (self._label >= self.num_classes))
        if bad.size:
            raise DataError(
                f"{bad.size} labels are out of range for {self.num_classes} classes (0 to "
                f"{self.num_classes - 1}), first {self._label[bad[0]]} in "
                f"{self.where(int(bad[0]))}"
            )

    @classmethod
    def files_of(cls, folder: Path, split: str) -> list[Path]:
        """Returns the files of a split; empty if there are none."""
        return sorted(path for pattern in cls._patterns(split) for path in folder.glob(pattern))

    @staticmethod
    def _patterns(split: str) -> tuple[str, ...]:
        return f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet"

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process reads the files itself
        return self._again, ()

    def __len__(self) -> int:
        return len(self._label)

    def labels(self) -> np.ndarray:
        return self._label

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        places = [(position, *self._place(position)) for position in positions]
        return [(self._images[f][row].as_py(), int(self._label[p])) for p, f, row in places]

    def where(self, position: int) -> str:
        file, row = self._place(position)
        return f"{self.files[file]}, row {row}"

    def fingerprint(self) -> str:
        """Returns a hash of labels and image sizes; it misses changes that keep the sizes."""
        sizes = [pc.binary_length(image).to_numpy() for image in self._images]
        return fingerprints.of_arrays({"label": self._label, "bytes": np.concatenate(sizes)})

    def _place(self, position: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, position)
        return file, position - (self._ends[file - 1] if file else 0)


def _columns(
    path: Path, image_field: str, label_field: str
) -> tuple[pa.LargeBinaryArray, np.ndarray]:
    """Returns the images and the labels of a Parquet file."""
    try:
        with pq.ParquetFile(path) as parquet:
            names = parquet.schema_arrow.names
            missing = [field for field in (image_field, label_field) if field not in names]
            if missing:
                raise DataError(f"{path} has no columns {missing}; it has {sorted(names)}")
            table = parquet.read(columns=[image_field, label_field])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    image, label = table.column(image_field), table.column(label_field)
    if pa.types.is_struct(image.type) and image.type.get_field_index("bytes") >= 0:
        image = pc.struct_field(image, "bytes")
    if not (pa.types.is_binary(image.type) or pa.types.is_large_binary(image.type)):
        raise DataError(
            f"column {image_field!r} of {path} is of {image.type}; it must be of file contents "
            "(binary), or of structs with a field `bytes`"
        )
    if not pa.types.is_integer(label.type):
        raise DataError(f"column {label_field!r} of {path} is of {label.type}, not of integers")
    for field, column in ((image_field, image), (label_field, label)):
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy())[0]
            raise DataError(f"{path}, row {row} has a null in column {field!r}")
    return image.cast(pa.large_binary()).combine_chunks(), label.to_numpy().astype(np.int64)


def _class_names(path: Path, label_field: str, num_classes: int) -> list[str]:
    """Returns the label names in the metadata that `datasets` writes; numbers without it."""
    written = (pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(written)["info"]["features"][label_field]["names"]
    except (ValueError, LookupError, TypeError, RecursionError):
        names = None  # written by another library, or another kind of column
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return [str(label) for label in range(num_classes)]
    if len(names) != num_classes:
        raise DataError(
            f"{path} names {len(names)} classes of column {label_field!r}, "
            f"{first_of(names, ', ', 3)}; num_classes is {num_classes}"
        )
    return names


class TfdsImages:
    """A split that TFDS has prepared as ArrayRecord, read without TensorFlow and not yet decoded.

    Args:
      name, split, data_dir: as in `TfdsSource`.
      image_field, label_field: an image and a class label among the features.
      fix: the end of the error message if the data set is not prepared.

    Raises:
      DataError: the data set is not prepared there, or these features are not an image and a
        class label.
    """

    def __init__(
        self,
        name: str,
        split: str,
        data_dir: Location,
        *,
        image_field: str = "image",
        label_field: str = "label",
        fix: str = PREPARE_TFDS,
    ):
        import tensorflow_datasets as tfds

        builder, self._data = open_tfds(
            name,
            split,
            data_dir,
            (image_field, label_field),
            decoders={image_field: tfds.decode.SkipDecoding()},
            fix=fix,
        )
        features = builder.info.features
        for field, kind in ((image_field, "Image"), (label_field, "ClassLabel")):
            if not isinstance(features[field], getattr(tfds.features, kind)):
                raise DataError(
                    f"field {field!r} of TFDS data set {name!r} is {features[field]}, no {kind}"
                )
        self.num_classes: int = features[label_field].num_classes
        self.classes: Sequence[str] = features[label_field].names
        self._fields = (image_field, label_field)
        self._where = f"split {split!r} of TFDS data set {name!r} in {data_dir}"
        self._identity = {**tfds_identity(builder, split), "fields": self._fields}

    def __len__(self) -> int:
        return len(self._data)

    def labels(self) -> None:
        """Returns None: a label cannot be read without its image."""

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        image, label = self._fields
        records = self._data.__getitems__(list(positions))
        return [(record[image], int(record[label])) for record in records]

    def where(self, position: int) -> str:
        return f"example {position} of {self._where}"

    def fingerprint(self) -> str:
        """Returns a hash of name, version, split and sizes."""
        return fingerprints.of_json(self._identity)
