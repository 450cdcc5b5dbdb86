"""Sources: random-access collections of records. An example's id is its position."""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from easy_jax.io import fingerprint as fingerprints

Record = Mapping[str, np.ndarray]
EXAMPLE_RECORD = '{"image": array, "label": array}'
PREPARE_TFDS = (
    "Prepare it first, with tfds.builder(..., file_format='array_record').download_and_prepare()"
)


class DataError(ValueError):
    """A record or a data set cannot be used; the message names it and says how to fix it."""


class DataWarning(UserWarning):
    """Something in the data is not used, or possibly not as intended; the message says what."""


@runtime_checkable
class Source(Protocol):
    """Protocol of data sets: a length, and a record for every position below it.

    A record is a mapping of arrays, with the same fields and shapes for every position.
    A field `weight` (a scalar), if there is one, is multiplied into the training weight.
    Optional, if cheaper: `batch(positions) -> record of stacked arrays` or
    `__getitems__(positions) -> list of records`, to read a batch at once, and
    `fingerprint() -> str`, to identify the data without reading everything.

    Optional, for random transforms: `training_batch(positions, epochs, seed) -> record of stacked
    arrays`, which training reads instead of the above. Row i is a view of example positions[i]
    in epoch epochs[i], a pure function of these two and the seed: it must not depend on the
    other rows, on earlier calls, or on the thread or process it runs in. Scoring and evaluation
    never call it, so their records are fixed. Such a source also has `transforms`, a dataclass of
    all settings that determine them; training does not continue if they differ.

    Optional: `dropped_ids`, positions without a usable example. They are never read, and the
    other examples keep their ids.

    Optional: `reading: Reading` (`easy_jax.data.reading`), the default settings of loaders.

    Optional, for labelled data: `num_classes`, which all labels are below; `classes`, their names;
    `mean` and `std`, by channel, for the normalisation of images. A model that was made for other
    values is refused or reported (`easy_jax.train.compatibility`).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Record: ...


@dataclasses.dataclass(frozen=True)
class Splits:
    """The sources of one task; `train` and `validation` are None if nothing needs them.

    `classes` are the names of the labels.
    """

    train: Source | None
    validation: Source | None
    test: Source
    classes: Sequence[str]

    @property
    def num_classes(self) -> int:
        return len(self.classes)


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Both tasks of one repetition of an experiment.

    Attributes:
      pretrain: the task that the network is or was pre-trained on.
      target: the task that it is fine-tuned on; some of the training labels may be wrong.
      wrong_N: boolean by training id, True if the label was replaced by a wrong one.
    """

    pretrain: Splits
    target: Splits
    wrong_N: np.ndarray


class ArraySource:
    """Records in memory, one array per field.

    Args:
      fields: arrays with equal leading axes, for example `image` and `label`.
      num_classes: if given, `label` must be integers in [0, num_classes), and a classifier must
        have as many outputs (`easy_jax.train.compatibility`).

    Raises:
      DataError: no examples, unequal lengths, non-finite values, or labels out of range;
        the message gives the field and the ids.

    Example:
      >>> source = ArraySource({"image": np.zeros((3, 8, 8, 1)), "label": np.arange(3)})
      >>> len(source), int(source[2]["label"])
      (3, 2)
    """

    def __init__(self, fields: Mapping[str, np.ndarray], num_classes: int | None = None):
        if not isinstance(fields, Mapping):
            raise DataError(
                f"ArraySource takes a mapping of names to arrays, such as {EXAMPLE_RECORD}, not a "
                f"{type(fields).__name__}"
            )
        self.fields = {name: np.asarray(array) for name, array in fields.items()}
        lengths = {name: len(array) for name, array in self.fields.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"fields have unequal lengths: {lengths}")
        if not lengths or next(iter(lengths.values())) == 0:
            raise DataError("the data set is empty: it has no examples")
        for name, array in self.fields.items():
            if np.issubdtype(array.dtype, np.floating):
                _raise_if_any(
                    ~np.isfinite(array).reshape(len(array), -1).all(axis=1),
                    f"field {name!r} has NaN or infinite values",
                )
        self.num_classes = num_classes
        if num_classes is not None:
            if "label" not in self.fields:
                raise DataError(
                    f"num_classes is {num_classes}, and there is no field 'label' to check it "
                    f"with; the fields are {', '.join(self.fields)}: rename the labels' field to "
                    "'label', or leave num_classes out"
                )
            check_labels(self.fields["label"], num_classes)

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, position: int) -> Record:
        return {name: array[position] for name, array in self.fields.items()}

    def batch(self, positions: list[int]) -> Record:
        """Returns the records at these positions, each field stacked."""
        return {name: array[positions] for name, array in self.fields.items()}

    def fingerprint(self) -> str:
        """Returns a hash of every field's name, dtype, shape and content."""
        return fingerprints.of_arrays(self.fields)


class TfdsSource:
    """A prepared TensorFlow Datasets split, read from ArrayRecord without TensorFlow.

    Args:
      name: data set name, with optional config and version (`cifar10`, `mnist:3.0.1`).
      split: for example `train` or `train[:90%]`.
      data_dir: where it was prepared in the `array_record` file format.
      fields: the record's field -> our name, for example `{"image": "image", "label": "label"}`;
        others are left out.

    Raises:
      DataError: the data set is not prepared there.

    Example:
      >>> source = TfdsSource(
      ...     "mnist", "train", "data", {"image": "image", "label": "label"}
      ... )  # doctest: +SKIP
      >>> len(source)  # doctest: +SKIP
      60000
    """

    def __init__(
        self, name: str, split: str, data_dir: str | os.PathLike[str], fields: Mapping[str, str]
    ):
        builder, self._data = open_tfds(name, split, data_dir, fields)
        self._fields = dict(fields)
        features = builder.info.features
        labels = [features[theirs] for theirs, ours in fields.items() if ours == "label"]
        self.num_classes: int | None = getattr(labels[0], "num_classes", None) if labels else None
        self._identity = {
            **tfds_identity(builder, split),
            "fields": self._fields,
            "num_examples": len(self._data),
        }

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, position: int) -> Record:
        return self._rename(self._data[position])

    def __getitems__(self, positions: list[int]) -> list[Record]:
        return [self._rename(record) for record in self._data.__getitems__(positions)]

    def _rename(self, record: Mapping[str, Any]) -> Record:
        return {ours: np.asarray(record[theirs]) for theirs, ours in self._fields.items()}

    def fingerprint(self) -> str:
        """Returns a hash of name, version, split and sizes; TFDS versions its content."""
        return fingerprints.of_json(self._identity)


def open_tfds(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str],
    fields: Collection[str],
    *,
    decoders: Any = None,
    fix: str = PREPARE_TFDS,
) -> tuple[Any, Any]:
    """Returns the builder and the data source of a prepared split that has these fields.

    Raises:
      DataError: the data set is not prepared there (the message ends with `fix`), has no such
        field or is empty.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=os.fspath(data_dir), file_format="array_record")
        data = builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:
        # The other lines of an error of TFDS list all the data sets that it knows.
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"cannot read split {split!r} of TFDS data set {name!r} in {data_dir}: {reason}. {fix}"
        ) from error
    missing = [field for field in fields if field not in builder.info.features]
    if missing:
        raise DataError(
            f"TFDS data set {name!r} has no fields {missing}; it has "
            f"{sorted(builder.info.features)}"
        )
    if len(data) == 0:
        raise DataError(f"split {split!r} of TFDS data set {name!r} is empty")
    return builder, data


def tfds_identity(builder: Any, split: str) -> dict[str, Any]:
    """Returns the properties that identify a split; TFDS changes the version with the content."""
    return {
        "name": builder.info.full_name,
        "split": split,
        "checksums": {
            name: [info.num_examples, info.num_bytes] for name, info in builder.info.splits.items()
        },
    }


def fingerprint(source: Any) -> str:
    """Returns the source's own fingerprint or, if it has none, a hash of every record.

    Raises:
      DataError: a record is not a mapping, or contains Python objects.
    """
    own = getattr(source, "fingerprint", None)
    if own is not None:
        return own()
    return fingerprints.of_records(_hashable(source[i], i) for i in range(len(source)))


def _hashable(record: Any, position: int) -> Record:
    check_mapping(record, position)
    for name, value in record.items():
        if np.asarray(value).dtype.hasobject:
            raise DataError(_no_numbers(name, value, position))
    return record


def check_mapping(record: Any, position: int) -> None:
    """Raises DataError unless a record is a mapping."""
    if not isinstance(record, Mapping):
        length = f" of {len(record)}" if isinstance(record, tuple | list) else ""
        raise DataError(
            f"example {position} is a {type(record).__name__}{length}; a record is a mapping of "
            f"names to arrays, such as {EXAMPLE_RECORD}"
        )


def check_numbers(name: str, array: np.ndarray, position: int) -> None:
    """Raises DataError unless a field of an example, or of a batch, holds numbers or booleans."""
    is_extended = array.dtype.kind == "V" and array.dtype.names is None  # bfloat16 and similar
    if array.dtype.kind not in "biufc" and not is_extended:
        raise DataError(_no_numbers(name, array, position))


def _no_numbers(name: str, value: Any, position: int) -> str:
    array = np.asarray(value)
    kinds = {"U": "text", "S": "bytes", "O": f"objects ({type(array.flat[0]).__name__})"}
    what = kinds.get(array.dtype.kind, str(array.dtype)) if array.size else str(array.dtype)
    return (
        f"field {name!r} of example {position} holds {what} (dtype {array.dtype}), which a device "
        "cannot compute with: turn it into numbers, or leave the field out"
    )


def check_labels(label_N: np.ndarray, num_classes: int, used_N: np.ndarray | None = None) -> None:
    """Raises DataError unless all labels, or those that are used, are integers in
    [0, num_classes)."""
    if not np.issubdtype(label_N.dtype, np.integer):
        raise DataError(f"field 'label' has dtype {label_N.dtype}; labels are integers")
    outside_N = (label_N < 0) | (label_N >= num_classes)
    _raise_if_any(
        outside_N if used_N is None else outside_N & used_N,
        f"field 'label' is out of range for {num_classes} classes (0 to {num_classes - 1})",
    )


def first_of(items: Sequence[str], separator: str = "; ", limit: int = 20) -> str:
    """Joins the first of many items, for a message of one line.

    Example:
      >>> first_of(["a", "b", "c"], ", ", limit=2)
      'a, b, ... (3 in all)'
    """
    more = [f"... ({len(items)} in all)"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def _raise_if_any(bad_N: np.ndarray, what: str) -> None:
    if bad_N.any():
        ids = np.flatnonzero(bad_N)
        more = " ..." if ids.size > 10 else ""
        raise DataError(f"{what}: {ids.size} examples, ids {ids[:10].tolist()}{more}")
