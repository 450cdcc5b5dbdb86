"""Where encoded images and their labels come from: folders, Parquet, TensorFlow Datasets.

A store gives bytes; decoding is `easy_jax.data.images`' work. An image's position is the same in
every process and every run: files in order of class and name, rows in order of file.
"""

import bisect
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from easy_jax import fingerprint as fingerprints
from easy_jax.data.sources import PREPARE_TFDS, DataError, open_tfds, tfds_identity

Location = str | os.PathLike[str]
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


class ImageStore(Protocol):
    """Encoded images and their labels, by position."""

    num_classes: int
    classes: Sequence[str]  # their names, by label

    def __len__(self) -> int: ...

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        """The file contents and labels at these positions; raises DataError."""

    def where(self, position: int) -> str:
        """What errors call the image: its path, or its row."""

    def fingerprint(self) -> str:
        """Identifies images and labels without reading all images."""


class FolderImages:
    """`folder/<class>/<image>`, JPEG, PNG or WebP. Labels count the classes in order of name.

    Hidden files are left out; any other file that is no image, and anything that leads out of
    the folder, is an error.

    Args:
      folder: with a folder per class.
      classes: the names that it must have; default: those it has.

    Raises:
      DataError: no folder or no class in it, classes that are not `classes`, a class without
        images, an empty file, a file that is no image by its ending, folders in a class, links
        out of the folder.

    Example:
      >>> import tempfile
      >>> from PIL import Image
      >>> folder = Path(tempfile.mkdtemp())
      >>> for name in ("dog", "cat"):
      ...   (folder / name).mkdir()
      ...   Image.new("RGB", (8, 8)).save(folder / name / "1.png")
      >>> store = FolderImages(folder)
      >>> store.classes, [label for _, label in store.read([0, 1])]
      (['cat', 'dog'], [0, 1])
    """

    def __init__(self, folder: Location, classes: Sequence[str] | None = None):
        self.folder = Path(folder)
        real = self.folder.resolve()
        self.classes: Sequence[str] = self.classes_of(self.folder)
        if classes is not None and list(self.classes) != list(classes):
            missing = sorted(set(classes) - set(self.classes))
            extra = sorted(set(self.classes) - set(classes))
            raise DataError(
                f"the classes of {self.folder} are not those of the training data: missing "
                f"{missing[:5]}, only here {extra[:5]}"
            )
        self.num_classes = len(self.classes)
        self._names: list[str] = []
        self._ends: list[int] = []  # of each class among the names
        digest = hashlib.sha256()
        for name in self.classes:
            start = len(self._names)
            for image, size in _images(self.folder / name, real):
                self._names.append(image)
                digest.update(f"{name}/{image}:{size}\n".encode(errors="surrogateescape"))
            if len(self._names) == start:
                raise DataError(
                    f"the class folder {self.folder / name} has no images; fill or remove it"
                )
            self._ends.append(len(self._names))
        self._digest = digest.hexdigest()

    @staticmethod
    def classes_of(folder: Path) -> list[str]:
        """The names of a folder's class folders, in order; raises DataError."""
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; it holds a folder of images per class")
        entries = list(_visible(folder, folder.resolve()))
        stray = [entry.path for entry in entries if not entry.is_dir()]
        if stray:
            raise DataError(f"{stray[0]} is no folder of a class; move it out of {folder}")
        if not entries:
            raise DataError(f"{folder} has no folders of classes")
        return [entry.name for entry in entries]

    def __len__(self) -> int:
        return len(self._names)

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        found = []
        for position in positions:
            path = self._path(position)
            try:
                found.append((path.read_bytes(), self._label(position)))
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error
        return found

    def where(self, position: int) -> str:
        return str(self._path(position))

    def fingerprint(self) -> str:
        """Hash of every image's class, name and size in bytes; other content of equal length is
        not noticed."""
        return fingerprints.of_json({"folder": self._digest})

    def _label(self, position: int) -> int:
        return bisect.bisect_right(self._ends, position)

    def _path(self, position: int) -> Path:
        return self.folder / self.classes[self._label(position)] / self._names[position]


def _images(folder: Path, real: Path) -> Iterator[tuple[str, int]]:
    """Names and sizes of a class's images, in order of name."""
    for entry in _visible(folder, real):
        if not entry.is_file():
            raise DataError(f"{entry.path} is no file; a class folder holds images only")
        if not entry.name.lower().endswith(_ENDINGS):
            raise DataError(
                f"{entry.path} is no image: its name ends in none of {', '.join(_ENDINGS)}; "
                "rename or remove it"
            )
        size = entry.stat().st_size
        if size == 0:
            raise DataError(f"{entry.path} is empty: it has 0 bytes")
        yield entry.name, size


def _visible(folder: Path, real: Path) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, in order of name, without hidden files; all of it inside `real`."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
                raise DataError(f"{entry.path} is a link that leads out of {real}; copy the file")
            yield entry


class ParquetImages:
    """A split in Parquet: `<split>.parquet`, `<split>-*.parquet` or `<split>/*.parquet`.

    The files are read into memory, encoded images and all (CIFAR-10 0.1 GB, cars 2 GB): Parquet
    has no way to read one row. Each worker process has a copy; prefer threads.

    Args:
      folder: with the files.
      split: which of them.
      num_classes: labels are below it.
      image_field: a column of file contents, or of structs with a field `bytes`, as
        `datasets` of Hugging Face writes them.
      label_field: a column of integers.

    Raises:
      DataError: no files or files that cannot be read, more of them than the machine has memory;
        columns that are missing, of another type or with nulls; labels out of range. With file
        and row, counted from 0 in each file.
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
            ParquetImages, folder, split, num_classes,
            image_field=image_field, label_field=label_field,
        )  # fmt: skip
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
        self.classes: Sequence[str] = [str(label) for label in range(num_classes)]
        bad = np.flatnonzero((self._label < 0) | (self._label >= self.num_classes))
        if bad.size:
            raise DataError(
                f"{bad.size} labels are out of range for {self.num_classes} classes (0 to "
                f"{self.num_classes - 1}), first {self._label[bad[0]]} in "
                f"{self.where(int(bad[0]))}"
            )

    @classmethod
    def files_of(cls, folder: Path, split: str) -> list[Path]:
        """The files of a split; none if it is not there."""
        return sorted(path for pattern in cls._patterns(split) for path in folder.glob(pattern))

    @staticmethod
    def _patterns(split: str) -> tuple[str, ...]:
        return f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet"

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process reads the files itself
        return self._again, ()

    def __len__(self) -> int:
        return len(self._label)

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        places = [(position, *self._place(position)) for position in positions]
        return [(self._images[f][row].as_py(), int(self._label[p])) for p, f, row in places]

    def where(self, position: int) -> str:
        file, row = self._place(position)
        return f"{self.files[file]}, row {row}"

    def fingerprint(self) -> str:
        """Hash of all labels and image sizes; other content of equal length is not noticed."""
        sizes = [pc.binary_length(image).to_numpy() for image in self._images]
        return fingerprints.of_arrays({"label": self._label, "bytes": np.concatenate(sizes)})

    def _place(self, position: int) -> tuple[int, int]:
        file = bisect.bisect_right(self._ends, position)
        return file, position - (self._ends[file - 1] if file else 0)


def _columns(
    path: Path, image_field: str, label_field: str
) -> tuple[pa.LargeBinaryArray, np.ndarray]:
    """The images and the labels of a Parquet file."""
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


class TfdsImages:
    """A split that TFDS has prepared as ArrayRecord, its images still encoded; no TensorFlow.

    Args:
      name, split, data_dir: as in `TfdsSource`.
      image_field, label_field: an image and a class label among the features.
      fix: ends the error that the data set is not prepared.

    Raises:
      DataError: the data set is not prepared there, or these features are none of images and
        labels.
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
            name, split, data_dir, (image_field, label_field),
            decoders={image_field: tfds.decode.SkipDecoding()}, fix=fix,
        )  # fmt: skip
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

    def read(self, positions: Sequence[int]) -> list[tuple[bytes, int]]:
        image, label = self._fields
        records = self._data.__getitems__(list(positions))
        return [(record[image], int(record[label])) for record in records]

    def where(self, position: int) -> str:
        return f"example {position} of {self._where}"

    def fingerprint(self) -> str:
        """Hash of name, version, split and sizes."""
        return fingerprints.of_json(self._identity)
