"""Splits that are cut out of training data, and the message about unusable images."""

import collections
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from easy_jax.data.image_stores import ImageStore
from easy_jax.data.images import ImageError
from easy_jax.data.sources import DataError, first_of

_CUT = 20250715  # determines the validation examples, the same in all runs


def cut(
    store: ImageStore,
    split: Literal["train", "validation", "test"],
    validation_share: float,
    test_share: float,
    where: str | os.PathLike[str],
) -> np.ndarray:
    """Returns the positions of a split that is cut out of the training data, in order.

    The first images of a fixed random order are for validation, the last for testing. The last
    remaining image of a class stays in `train`, unless labels cannot be known without reading the
    images (TFDS).

    Args:
      store: the training data.
      split: the part to return.
      validation_share, test_share: shares of all images; 0: no such part, else at least one.
      where: names the data in errors.

    Raises:
      DataError: a part would have no images.
    """
    size = len(store)
    label_N = store.labels()
    label_N = np.zeros(size, np.int64) if label_N is None else label_N
    left = np.bincount(label_N)
    order = np.argsort(np.random.Philox(_CUT).random_raw(size), kind="stable")
    part_N = np.full(size, "train", dtype="<U10")
    for part, share, turn in (
        ("validation", validation_share, order),
        ("test", test_share, order[::-1]),
    ):
        wanted = max(1, round(share * size)) if share else 0
        for position in turn:
            if wanted == 0:
                break
            if part_N[position] == "train" and left[label_N[position]] > 1:
                part_N[position] = part
                left[label_N[position]] -= 1
                wanted -= 1
        if share and split == part and not (part_N == part).any():
            names = [store.classes[label] for label in np.flatnonzero(left).tolist()]
            raise DataError(
                f"no image of {where} can be cut out of train for {part}: the classes "
                f"{first_of(names, ', ')} have one image each left, which they need to train on; "
                f"add images, or a folder {part}"
            )
    return np.flatnonzero(part_N == split)


def told(errors: Sequence[ImageError], count: int, limit: int = 20) -> str:
    """Returns one line about unusable images: the number of each kind, and the first of them."""
    kinds = collections.Counter(error.kind for error in errors).most_common()
    by_kind = ", ".join(f"{number} {kind}" for kind, number in kinds)
    first = first_of([str(error) for error in errors], limit=limit)
    return f"{len(errors)} of {count} images cannot be used ({by_kind}): {first}"
