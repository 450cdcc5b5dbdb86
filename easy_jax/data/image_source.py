"""A source that decodes, crops and labels the images of a data set."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from easy_jax.data import images
from easy_jax.data.image_stores import ImageStore
from easy_jax.data.images import ImageError, Transforms
from easy_jax.data.loader import Batch
from easy_jax.data.reading import Reading
from easy_jax.data.sources import DataError, Record
from easy_jax.io import fingerprint as fingerprints

_EXAMINED_AT_ONCE = 16  # images that a thread reads at a time


class ImageSource:
    """Images that are decoded and cropped when they are read, in the thread or process that reads.

    A record is `{"image": uint8 [S, S, 3], "label": int32, "image_mean": float32 [3],
    "image_std": float32 [3]}`; the last two, in units of the largest value, are what
    `easy_jax.core.losses` normalises with on the device.

    Args:
      store: encoded images and labels.
      transforms: how images are resized, cropped and augmented; default: `Transforms()`.
      views: the former name of `transforms`.
      mean, std: per channel, of images in [0, 1]; default: ImageNet's.
      positions: positions in the store of the source's examples, in order; default: all.
      max_pixels: an image with more is an error.
      reading: threads, read-ahead and worker processes.

    Attributes:
      num_classes, classes: of the store.
      mean, std: float32 [3].
      left_out: reason by path (or file and row) of what `without` has taken out.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from PIL import Image
      >>> from easy_jax.data.image_folders import FolderImages
      >>> folder = Path(tempfile.mkdtemp())
      >>> (folder / "red").mkdir()
      >>> Image.new("RGB", (40, 30), "red").save(folder / "red" / "1.png")
      >>> source = ImageSource(FolderImages(folder), Transforms(image_size=8, resize_size=9))
      >>> record = source[0]
      >>> record["image"].shape, record["image"][0, 0].tolist(), int(record["label"])
      ((8, 8, 3), [255, 0, 0], 0)
    """

    def __init__(
        self,
        store: ImageStore,
        transforms: Transforms | None = None,
        *,
        mean: Sequence[float] = images.IMAGENET_MEAN,
        std: Sequence[float] = images.IMAGENET_STD,
        positions: np.ndarray | None = None,
        max_pixels: int = images.MAX_PIXELS,
        reading: Reading | None = None,
        views: Transforms | None = None,
    ):
        if views is not None:
            message = "ImageSource(views=) is now ImageSource(transforms=)"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        self.store = store
        self.transforms = transforms or views or Transforms()
        self.num_classes = store.num_classes
        self.classes = store.classes
        self.reading = Reading() if reading is None else reading
        self.max_pixels = max_pixels
        self.left_out: dict[str, str] = {}
        self.mean = np.array(mean, np.float32)
        self.std = np.array(std, np.float32)
        self._positions = np.arange(len(store)) if positions is None else np.asarray(positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, position: int) -> Record:
        return {name: array[0] for name, array in self.batch([position]).items()}

    def batch(self, positions: Sequence[int]) -> Batch:
        """Returns the records at these positions as scoring sees them, each field stacked."""
        return self._batch(
            positions, lambda row, image: images.scoring_transform(image, self.transforms)
        )

    def training_batch(self, positions: Sequence[int], epochs: Sequence[int], seed: int) -> Batch:
        """Returns the records for training, each a pure function of (seed, epoch, position)."""

        def view(row: int, image: Image.Image) -> Image.Image:
            uniform = images.uniforms(seed, epochs[row], positions[row])
            return images.training_transform(image, self.transforms, uniform)

        return self._batch(positions, view)

    def examine(
        self, *, decode: bool = True, whole_store: bool = False
    ) -> tuple[dict[int, ImageError], int]:
        """Decodes images in several threads, to find those that cannot be used.

        Args:
          decode: decode all images; if False, only what the store knows without reading is found.
          whole_store: also examine images of the store that are not the source's.

        Returns:
          The error of each, by example id (with `whole_store`, by position in the store), and how
          many of the others have an EXIF rotation.
        """
        positions = np.arange(len(self.store)) if whole_store else self._positions
        known = getattr(self.store, "unusable", {})
        bad = {i: known[p] for i, p in enumerate(positions.tolist()) if p in known}
        if not decode:
            return bad, 0

        def look(start: int) -> list[ImageError | bool]:
            stored = positions[start : start + _EXAMINED_AT_ONCE].tolist()
            found: list[ImageError | bool] = []
            for position in stored:
                try:
                    ((encoded, _),) = self.store.read([position])
                    image = self._decode(encoded, self.store.where(position), rotate=False)
                    found.append(images.orientation(image) != 1)
                except ImageError as error:
                    found.append(error)
            return found

        with ThreadPoolExecutor(max(1, self.reading.threads)) as pool:
            starts = range(0, len(positions), _EXAMINED_AT_ONCE)
            found = [each for some in pool.map(look, starts) for each in some]
        errors = {i: each for i, each in enumerate(found) if isinstance(each, ImageError)}
        return errors | bad, sum(each is True for each in found)

    def without(self, bad: Mapping[int, ImageError]) -> "ImageSource":
        """Returns the source without these examples, renumbered; `left_out` has the reasons."""
        other = copy.copy(self)
        other._positions = np.delete(self._positions, sorted(bad))
        other.left_out = {**self.left_out, **{error.where: error.reason for error in bad.values()}}
        return other

    def labels(self) -> np.ndarray | None:
        """Returns all labels, int64 [N]; None if that would need reading all images."""
        label_N = self.store.labels()
        return None if label_N is None else label_N[self._positions]

    def fingerprint(self) -> str:
        """Returns a hash of the store, the choice of examples, and the settings that scoring uses.

        The settings that only training uses, `augment` and `color_jitter`, are not part of it.
        """
        transforms = dataclasses.asdict(self.transforms)
        names = ("image_size", "resize_size", "interpolation", "rotate")
        fixed = {name: transforms[name] for name in names}
        arrays = {"positions": self._positions, "mean": self.mean, "std": self.std}
        return fingerprints.of_json(
            {"store": self.store.fingerprint(), "arrays": fingerprints.of_arrays(arrays), **fixed}
        )

    def _decode(self, encoded: bytes, where: str, *, rotate: bool) -> Image.Image:
        size, limit = self.transforms.resize_size, self.max_pixels
        return images.decode(encoded, where, size, rotate=rotate, max_pixels=limit)

    def _batch(
        self, positions: Sequence[int], view: Callable[[int, Image.Image], Image.Image]
    ) -> Batch:
        size, count = self.transforms.image_size, len(positions)
        image_BHWC = np.empty((count, size, size, 3), np.uint8)
        label_B = np.empty(count, np.int32)
        stored = self._positions[positions].tolist()
        for row, (encoded, label) in enumerate(self.store.read(stored)):
            where = f"{self.store.where(stored[row])} (example id {positions[row]})"
            if not 0 <= label < self.num_classes:
                raise DataError(
                    f"{where} has label {label}; the data set has {self.num_classes} classes (0 "
                    f"to {self.num_classes - 1})"
                )
            image = self._decode(encoded, where, rotate=self.transforms.rotate)
            image_BHWC[row] = np.asarray(view(row, image))
            label_B[row] = label
        return {
            "image": image_BHWC,
            "label": label_B,
            "image_mean": np.tile(self.mean, (count, 1)),
            "image_std": np.tile(self.std, (count, 1)),
        }
