"""The image data sets of FLOW's experiments (arXiv:2502.02797), by their names in TFDS."""

import dataclasses
from collections.abc import Mapping

from easy_jax.data.images import IMAGENET_MEAN, IMAGENET_STD, Colour

_TRAIN_TEST = {"train": "train", "test": "test"}


@dataclasses.dataclass(frozen=True)
class ImageDataSet:
    """The known properties of a data set.

    Attributes:
      num_classes: number of classes; None: as many as the data have.
      splits: our name of a split -> its own. If it has no `validation`, a fixed random share is
        cut out of `train`, never out of the test split.
      validation_share: that share.
      mean, std: per channel, of pixels in [0, 1].
      photos: use transforms for photos (random crop and colour jitter), not the full image.
      dead: why TFDS's download does not work any more, if this is known.
    """

    num_classes: int | None
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: _TRAIN_TEST)
    validation_share: float = 0.1
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD
    photos: bool = True
    dead: str = ""


DATA_SETS: dict[str, ImageDataSet] = {
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
    # The labels of its test split are secret, so results are reported on its validation split.
    "imagenet2012": ImageDataSet(
        1000,
        splits={"train": "train", "test": "validation"},
        validation_share=0.01,
    ),
    "other": ImageDataSet(None),
}
