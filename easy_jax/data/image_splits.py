"""Which images of a data set's training data validate and test, and how bad ones are told."""

import collections
import os
from collections.abc import Sequence
from typing import Literal

import numpy as np

from easy_jax.data.image_stores import ImageStore
from easy_jax.data.images import ImageError
from easy_jax.data.sources import DataError, first_of

_CUT = 20250715  # fixes which training examples validate, in all runs alike


def cut(
    store: ImageStore,
    split: Literal["train", "validation", "test"],
    validation_share: float,
    test_share: float,
    where: str | os.PathLike[str],
) -> np.ndarray:
    """Positions of a split that is cut out of the training data, in order.

    The first of a fixed random order validate, the last of it test; what would be the last image
    of its class stays in `train`. Where labels are not known unread (TFDS), nothing stays for that
    reason.

    Args:
      store: the training data.
      split: of its parts.
      validation_share, test_share: of all images; 0 for no such part, else it has one at least.
      where: names the data in errors.

    Raises:
      DataError: a part would have no image at all.
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
    """Images that cannot be used, as a line: how many, of each kind, and the first of them."""
    kinds = collections.Counter(error.kind for error in errors).most_common()
    by_kind = ", ".join(f"{number} {kind}" for kind, number in kinds)
    first = first_of([str(error) for error in errors], limit=limit)
    return f"{len(errors)} of {count} images cannot be used ({by_kind}): {first}"
