"""Decoding of images, and the transforms that make what a model gets of them.

A view is a uint8 square. The scoring view of an image is always the same. A training view is a
pure function of the image and a few uniform numbers, which are a pure function of (seed, epoch,
example id). So a run's images do not depend on threads, processes or where it was resumed.

Pixels stay uint8 until they are on the device, where `easy_jax.core.losses` normalises them. This
is exact and needs a quarter of the bytes in read-ahead, between processes and on the way to the
device; the compiler fuses the two operations into the first convolution.
"""

import dataclasses
import io
import warnings
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, features

from easy_jax.data.sources import DataError

Interpolation = Literal["bilinear", "bicubic"]
Colour = tuple[float, float, float]

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
MAX_PIXELS = 89_478_485  # the size from which Pillow suspects a decompression bomb
NUM_UNIFORMS = 6  # crop (2), flip, brightness, contrast, saturation
# Pillow's formats of pictures, without those that run other programs (EPS) or are very rare.
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    *(["AVIF"] if features.check("avif") else []),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ORIENTATION = 0x0112  # the EXIF tag; 1 is upright
# Greys are repeated, palettes looked up, CMYK mixed, alpha dropped. Pillow would clip other modes
# (16-bit greys, floats).
_TO_RGB = ("RGB", "1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr")
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601 luma, as Pillow's mode L
_STREAM = 0x11A6E5  # separates these numbers from those of the order, which depend on (seed, epoch)


class ImageError(DataError):
    """An image that cannot be used.

    Attributes:
      kind: what is wrong, in a word or two, for counting.
      reason: what is wrong, as the text that follows the image's path.
    """

    def __init__(self, where: str, kind: str, reason: str):
        super().__init__(f"{where} {reason}")
        self.where, self.kind, self.reason = where, kind, reason

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes pickle it
        return ImageError, (self.where, self.kind, self.reason)


@dataclasses.dataclass(frozen=True, slots=True)
class Transforms:
    """Settings of the transforms of images into squares of equal size.

    Attributes:
      image_size: side of a view, in pixels.
      resize_size: length of the shorter side before the crop; at least `image_size`.
      interpolation: of the resize; both methods widen their filter when they shrink an image.
      augment: whether training transforms are random; if False, training uses those of scoring.
      color_jitter: j: brightness, contrast and saturation are each multiplied by a factor from
        [1 - j, 1 + j].
      rotate: turn images upright by their EXIF orientation first.
    """

    image_size: int = 224
    resize_size: int = 256
    interpolation: Interpolation = "bilinear"
    augment: bool = True
    color_jitter: float = 0.2
    rotate: bool = False


def decode(
    encoded: bytes,
    where: str,
    resize_size: int = 0,
    *,
    rotate: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Returns the RGB image of an encoded file in one of `FORMATS`; of several frames, the first.

    A JPEG whose sides are all at least four times as long as after resizing is decoded at a half,
    quarter or eighth of its size, but at least at twice the final size. The decoder then averages
    blocks, which the resize would do anyway (the difference is less than one level on average).

    Args:
      encoded: the file's content.
      where: names the image in errors.
      resize_size: later length of the shorter side; 0: decode at full size.
      rotate: turn it upright by its EXIF orientation; by default it is ignored, as in
        `tf.image` and torchvision.
      max_pixels: larger images are refused before decoding. A value above Pillow's own limit
        raises that limit for this process.

    Raises:
      ImageError: not an image or a damaged one, more than `max_pixels` pixels, or pixels that
        are not 8-bit colours or greys. Damage that the decoder tolerates is not noticed.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("L", (4, 3), 200).save(file, "PNG")
      >>> image = decode(file.getvalue(), "grey.png")
      >>> image.size, image.getpixel((0, 0))
      ((4, 3), (200, 200, 200))
    """
    if not encoded:
        raise empty(where)
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        if image.width * image.height <= max_pixels:
            if resize_size:
                width, height = _resized(image.size, resize_size)
                image.draft(None, (2 * width, 2 * height))
            image.load()
            if rotate and orientation(image) != 1:
                image = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError as error:
        if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIC:
            raise heic(where) from error
        reason = f"is no image in a format that is read ({', '.join(FORMATS)}), or its head is "
        raise ImageError(where, "not an image", f"{reason}damaged") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(where, max_pixels) from error
    except Exception as error:  # Pillow's decoders have no narrower class in common
        raise ImageError(where, "damaged", f"is damaged: {error}") from error
    if image.width * image.height > max_pixels:
        raise _too_large(where, max_pixels)
    if image.mode not in _TO_RGB:
        raise ImageError(
            where,
            "not 8-bit",
            f"has pixels of Pillow's mode {image.mode!r}, which are no 8-bit colours; convert the "
            "file to 8-bit RGB or grey",
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct conversion
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """Returns a picture's EXIF orientation: 1 is upright, also if there is no tag."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # the EXIF block cannot be read, but the picture can
        return 1
    return value if value in range(1, 9) else 1


def empty(where: str) -> ImageError:
    """Returns the error for an empty file."""
    return ImageError(where, "empty", "is empty: it has 0 bytes")


def heic(where: str) -> ImageError:
    """Returns the error for a HEIC file, the format of iPhone photos."""
    return ImageError(where, "HEIC", "is in HEIC format, which is not read; convert it to JPEG")


def _too_large(where: str, max_pixels: int) -> ImageError:
    return ImageError(
        where,
        "too large",
        f"has more than {max_pixels:,} pixels: a decompression bomb, or a picture to make smaller "
        "first, or to allow with max_pixels",
    )


def uniforms(seed: int, epoch: int, example_id: int) -> np.ndarray:
    """Returns the numbers that determine a training view: float64 [NUM_UNIFORMS] in [0, 1).

    Example:
      >>> bool((uniforms(0, 1, 2) == uniforms(0, 1, 2)).all())
      True
    """
    # NumPy may change its distributions between versions, but not the raw bits.
    bits = np.random.Philox([seed, epoch, example_id, _STREAM]).random_raw(NUM_UNIFORMS)
    return (bits >> np.uint64(11)) * 2.0**-53


def scoring_transform(image: Image.Image, transforms: Transforms) -> Image.Image:
    """Returns the fixed view: shorter side resized, central square."""
    size = transforms.image_size
    width, height = _resized(image.size, transforms.resize_size)
    return _cut(image, transforms, round((width - size) / 2), round((height - size) / 2))


def training_transform(
    image: Image.Image, transforms: Transforms, uniform: np.ndarray
) -> Image.Image:
    """Returns a random view: resized, random square, flip, colours (arXiv:2502.02797).

    Args:
      image: RGB.
      transforms: the settings; without `augment`, this is `scoring_transform`.
      uniform: [NUM_UNIFORMS] in [0, 1), of `uniforms`.
    """
    if not transforms.augment:
        return scoring_transform(image, transforms)
    size = transforms.image_size
    width, height = _resized(image.size, transforms.resize_size)
    left, top = (
        int(u * (side - size + 1)) for u, side in zip(uniform[:2], (width, height), strict=True)
    )
    view = _cut(image, transforms, left, top)
    if uniform[2] < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if transforms.color_jitter:
        view = jitter(view, *(1.0 + transforms.color_jitter * (2.0 * uniform[3:] - 1.0)))
    return view


def jitter(
    image: Image.Image, brightness: float, contrast: float, saturation: float
) -> Image.Image:
    """Multiplies brightness, contrast (about the mean grey m) and saturation (about the grey g):

        brightness * (contrast * (saturation * x + (1 - saturation) * g(x)) + (1 - contrast) * m)

    This is one affine map of the colours, rounded and clipped once. Without rounding and
    clipping, the three operations commute, so their order, which torchvision draws at random,
    does not matter.
    """
    mean = float(np.asarray(image.convert("L")).mean())
    mix = saturation * np.eye(3) + (1.0 - saturation) * _GREY[None, :]
    offset = np.full((3, 1), brightness * (1.0 - contrast) * mean)
    matrix = np.hstack([brightness * contrast * mix, offset])
    return image.convert("RGB", tuple(matrix.reshape(-1).tolist()))


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Returns width and height with the shorter side at `shorter`, the longer one rounded down."""
    width, height = size
    if width <= height:
        return shorter, shorter * height // width
    return shorter * width // height, shorter


def _cut(image: Image.Image, transforms: Transforms, left: int, top: int) -> Image.Image:
    """Returns a square of the resized image.

    Pillow resizes only this square, but its filter also reads pixels beyond the square's edge."""
    size = transforms.image_size
    width, height = _resized(image.size, transforms.resize_size)
    x, y = image.width / width, image.height / height
    box = (
        left * x,
        top * y,
        min((left + size) * x, image.width),
        min((top + size) * y, image.height),
    )
    return image.resize((size, size), _RESAMPLE[transforms.interpolation], box)


def __getattr__(name: str) -> Any:
    """Finds `Views`, the former name of `Transforms`."""
    if name == "Views":
        message = "easy_jax.data.images.Views is now easy_jax.data.images.Transforms"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return Transforms
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
