"""The quickstart's data: rendered capital letters, and real handwritten digits.

Letters: 26 classes, rendered by Pillow from the fonts that matplotlib ships, with random
shift, rotation, scale and noise. Digits: scikit-learn's copy of the UCI handwritten digits
(Alpaydin and Kaynak 1998), 1,797 images of 8x8 pixels. Both work offline.
"""

import functools
import string
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from easy_jax.data.config import GlyphDataConfig
from easy_jax.data.sources import ArraySource, Splits, Tasks

LETTERS = string.ascii_uppercase
DIGITS = string.digits
_CANVAS = 48  # pixels, before scaling down
_FONT_SIZE = 34
# Families with plain capitals; matplotlib's other fonts are symbols and duplicates.
_FONT_PATTERNS = (
    "DejaVuSans*.ttf",
    "DejaVuSerif*.ttf",
    "STIXGeneral*.ttf",
    "cmr10.ttf",
    "cmb10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
    "cmmi10.ttf",
)


def load(config: GlyphDataConfig, seed: int, label_noise: float) -> Tasks:
    """Returns both tasks, which are determined by the seed.

    Args:
      config: sizes.
      seed: of the rendering, the split of the digits and the wrong labels.
      label_noise: share of the digits' *training* labels that are replaced by another
        class; validation and test labels stay correct.

    Example:
      >>> data = load(GlyphDataConfig(pretrain_train=50), seed=0, label_noise=0.3)
      >>> len(data.target.train), int(data.wrong_N.sum()), data.pretrain.num_classes
      (800, 240, 26)
    """
    target, wrong_N = _digits(config, seed, label_noise)
    return Tasks(_letters(config, seed), target, wrong_N)


@functools.lru_cache(maxsize=4)
def _letters_cached(size: int, image_size: int, seed: int, stream: int) -> ArraySource:
    rng = np.random.default_rng([seed, stream])
    image, label = render_letters(size, image_size, rng)
    return ArraySource({"image": image, "label": label}, num_classes=len(LETTERS))


def _letters(config: GlyphDataConfig, seed: int) -> Splits:
    sizes = (config.pretrain_train, config.pretrain_validation, config.pretrain_test)
    sources = [
        _letters_cached(size, config.image_size, seed, stream) for stream, size in enumerate(sizes)
    ]
    train, validation, test = sources
    return Splits(train, validation, test, classes=LETTERS)


def render_letters(
    size: int, image_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Renders random capital letters.

    Args:
      size: how many.
      image_size: side in pixels.
      rng: source of all randomness.

    Returns:
      `(image, label)`: float32 [size, image_size, image_size, 1] with a mean of about zero
      (see `normalise`), and int32 [size].
    """
    fonts = [ImageFont.truetype(str(path), _FONT_SIZE) for path in font_paths()]
    label = rng.integers(len(LETTERS), size=size).astype(np.int32)
    font_index = rng.integers(len(fonts), size=size)
    angle = np.deg2rad(rng.uniform(-15.0, 15.0, size))
    scale = rng.uniform(0.8, 1.2, size)
    shift = rng.uniform(-0.08, 0.08, (size, 2)) * _CANVAS
    blank = np.empty((size, image_size, image_size), np.float32)
    middle = _CANVAS / 2
    for i in range(size):
        canvas = Image.new("L", (_CANVAS, _CANVAS))
        draw = ImageDraw.Draw(canvas)
        draw.text((middle, middle), LETTERS[label[i]], 255, fonts[font_index[i]], anchor="mm")
        # Pillow's affine maps output to input pixels, hence the inverse rotation and scale.
        cos, sin = np.cos(angle[i]) / scale[i], np.sin(angle[i]) / scale[i]
        x, y = middle + shift[i]
        matrix = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        canvas = canvas.transform(
            (_CANVAS, _CANVAS), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
        small = canvas.resize((image_size, image_size), Image.Resampling.BOX)
        blank[i] = np.asarray(small, np.float32) / 255.0
    noisy = np.clip(blank + rng.normal(0.0, 0.08, blank.shape).astype(np.float32), 0.0, 1.0)
    return normalise(noisy), label


def font_paths() -> list[Path]:
    """Returns the paths of matplotlib's fonts that have all capital letters, sorted."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted({path for pattern in _FONT_PATTERNS for path in folder.glob(pattern)})
    usable = [
        path for path in paths if set(map(ord, LETTERS)) <= set(FT2Font(str(path)).get_charmap())
    ]
    if not usable:
        raise FileNotFoundError(f"no fonts with capital letters in {folder}; reinstall matplotlib")
    return usable


def normalise(image_NHW: np.ndarray) -> np.ndarray:
    """Maps grey values from [0, 1] to [-1, 1] and adds a channel axis."""
    return ((image_NHW - 0.5) / 0.5).astype(np.float32)[..., None]


def _digits(config: GlyphDataConfig, seed: int, label_noise: float) -> tuple[Splits, np.ndarray]:
    image, label = read_digits(config.image_size)
    rng = np.random.default_rng([seed, 100])
    order = rng.permutation(len(label))
    first, second = config.target_train, config.target_train + config.target_validation
    parts = (order[:first], order[first:second], order[second:])
    train_label, wrong_N = corrupt_labels(label[parts[0]], len(DIGITS), label_noise, rng)
    labels = (train_label, label[parts[1]], label[parts[2]])
    sources = [
        ArraySource({"image": image[part], "label": labels[i]}, num_classes=len(DIGITS))
        for i, part in enumerate(parts)
    ]
    train, validation, test = sources
    return Splits(train, validation, test, classes=DIGITS), wrong_N


@functools.lru_cache(maxsize=4)
def read_digits(image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns all 1,797 digits and their labels.

    Returns:
      float32 [N, image_size, image_size, 1] in [-1, 1], and int32 [N].
    """
    from sklearn.datasets import load_digits  # takes a second or two, and few runs need it

    digits = load_digits()
    image = normalise(np.stack([_enlarge(image, image_size) for image in digits.images]))
    return image, digits.target.astype(np.int32)


def _enlarge(image_HW: np.ndarray, image_size: int) -> np.ndarray:
    """Resizes an 8x8 image with values 0 to 16 to `image_size`, with values 0 to 1."""
    picture = Image.fromarray(image_HW.astype(np.float32) / 16.0)
    return np.asarray(picture.resize((image_size, image_size), Image.Resampling.BILINEAR))


def corrupt_labels(
    label_N: np.ndarray, num_classes: int, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces a fixed share of the labels, chosen at random, by other classes.

    Returns:
      `(label_N, wrong_N)`: the new labels, and a boolean mask of the wrong ones.

    Example:
      >>> new, wrong = corrupt_labels(np.zeros(10, int), 3, 0.5, np.random.default_rng(0))
      >>> int(wrong.sum()), bool((new[wrong] != 0).all())
      (5, True)
    """
    wrong_N = np.zeros(len(label_N), bool)
    wrong_N[rng.permutation(len(label_N))[: round(share * len(label_N))]] = True
    offset_N = rng.integers(1, num_classes, size=len(label_N))
    corrupted_N = np.where(wrong_N, (label_N + offset_N) % num_classes, label_N)
    return corrupted_N.astype(label_N.dtype), wrong_N
