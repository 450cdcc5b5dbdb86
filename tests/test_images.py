"""Decoding and views, against float64 computations that use no image library."""

import io
import warnings
import zlib

import numpy as np
import pytest
from image_data import encoded, picture
from PIL import Image, ImageEnhance

from easy_jax.data import DataError, images
from easy_jax.data.images import Transforms, decode, scoring_transform, training_transform, uniforms

GREY = np.array([0.299, 0.587, 0.114])


def filter_matrix(size, target, start, stop, kernel, reach):
    """Rows start to stop of the matrix that resamples `size` samples to `target`: kernel weights
    at the samples' centres, widened where it shrinks, cut at the border and normalised."""
    scale = size / target
    width = max(scale, 1.0)
    centre = (np.arange(start, stop) + 0.5) * scale
    at = np.arange(size) + 0.5
    weight = kernel((at[None] - centre[:, None]) / width)
    weight[np.abs(at[None] - centre[:, None]) > reach * width] = 0.0
    return weight / weight.sum(axis=1, keepdims=True)


def triangle(x):
    return np.clip(1.0 - np.abs(x), 0.0, None)


def cubic(x, a=-0.5):
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


KERNELS = {"bilinear": (triangle, 1.0), "bicubic": (cubic, 2.0)}


def cut(array, resize_size, size, left, top, interpolation):
    """The square of the resized image, float64: the shorter side becomes `resize_size`."""
    height, width, _ = array.shape
    new_height = resize_size * height // min(height, width)
    new_width = resize_size * width // min(height, width)
    rows = filter_matrix(height, new_height, top, top + size, *KERNELS[interpolation])
    columns = filter_matrix(width, new_width, left, left + size, *KERNELS[interpolation])
    return np.einsum("ah,bw,hwc->abc", rows, columns, array.astype(np.float64)).clip(0, 255)


def pixels(image):
    return np.asarray(image).astype(np.float64)


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize(
    ("width", "height", "resize_size", "size"),
    [(48, 36, 16, 12), (36, 48, 16, 15), (37, 101, 24, 21), (32, 32, 56, 56), (40, 40, 40, 40)],
)
def test_the_scoring_view_is_the_middle_of_the_resized_image(
    width, height, resize_size, size, interpolation
):
    array = picture(1, width, height)
    transforms = Transforms(size, resize_size, interpolation)
    view = scoring_transform(Image.fromarray(array), transforms)
    new_width = resize_size * width // min(width, height)
    new_height = resize_size * height // min(width, height)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    expected = cut(array, resize_size, size, left, top, interpolation)
    # Two passes, each rounded to whole levels.
    assert np.abs(pixels(view) - expected).max() <= 1.5
    assert np.abs(pixels(view) - expected).mean() <= 0.4


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize("flip", [False, True])
def test_a_training_view_is_a_cut_flipped_or_not(interpolation, flip):
    array = picture(2, 60, 45)
    transforms = Transforms(24, 30, interpolation, color_jitter=0.0)  # resized to 40 x 30
    uniform = np.array([0.99, 0.5, 0.4 if flip else 0.6, 0.0, 0.0, 0.0])
    view = pixels(training_transform(Image.fromarray(array), transforms, uniform))
    # 17 places to the right and 7 down: int(0.99 * 17) and int(0.5 * 7).
    expected = cut(array, 30, 24, 16, 3, interpolation)
    assert np.abs((view[:, ::-1] if flip else view) - expected).max() <= 1.5


def test_crops_reach_every_corner_and_no_further():
    image = Image.fromarray(picture(3, 60, 45))
    transforms = Transforms(24, 30, color_jitter=0.0)
    for u, v in ((0.0, 0.0), (1 - 2**-53, 1 - 2**-53)):
        view = training_transform(image, transforms, np.array([u, v, 0.9, 0.0, 0.0, 0.0]))
        left, top = (0, 0) if u == 0.0 else (16, 6)
        expected = cut(pixels(image), 30, 24, left, top, "bilinear")
        assert np.abs(pixels(view) - expected).max() <= 1.5


def test_an_image_of_the_right_size_is_not_touched():
    array = picture(4, 32, 32)
    transforms = Transforms(32, 32, color_jitter=0.0)
    np.testing.assert_array_equal(
        pixels(scoring_transform(Image.fromarray(array), transforms)), array
    )
    flipped = training_transform(Image.fromarray(array), transforms, np.zeros(6))
    np.testing.assert_array_equal(pixels(flipped), array[:, ::-1])


def test_without_augmentation_training_views_are_scoring_views():
    image = Image.fromarray(picture(5))
    transforms = Transforms(12, 16, augment=False)
    training = training_transform(image, transforms, np.full(6, 0.7))
    np.testing.assert_array_equal(pixels(training), pixels(scoring_transform(image, transforms)))


@pytest.mark.parametrize(
    "factors", [(1, 1, 1), (0.8, 1, 1), (1, 1.2, 1), (1, 1, 0.8), (1.2, 0.8, 1.2), (0.9, 1.1, 0.8)]
)
def test_jitter_scales_brightness_contrast_and_saturation(factors):
    brightness, contrast, saturation = factors
    array = picture(6)
    x = array.astype(np.float64)
    x = saturation * x + (1 - saturation) * (x @ GREY)[..., None]
    mean = (array @ GREY).mean()
    x = brightness * (contrast * x + (1 - contrast) * mean)
    jittered = pixels(images.jitter(Image.fromarray(array), *factors))
    # Half a level of rounding, and Pillow's grey is whole levels.
    assert np.abs(jittered - x.clip(0, 255)).max() <= 0.75


def test_jitter_is_that_of_image_editors():
    """Factor by factor, as Pillow's enhancers (and torchvision) do it, in any order."""
    array = (picture(7) // 2 + 60).astype(np.uint8)  # nothing is clipped
    ours = pixels(images.jitter(Image.fromarray(array), 1.1, 0.85, 1.15))
    enhancers = {
        ImageEnhance.Brightness: 1.1,
        ImageEnhance.Contrast: 0.85,
        ImageEnhance.Color: 1.15,
    }
    for order in (list(enhancers), list(reversed(enhancers))):
        image = Image.fromarray(array)
        for enhancer in order:
            image = enhancer(image).enhance(enhancers[enhancer])
        assert np.abs(pixels(image) - ours).max() <= 3.5  # they round down, three times


def test_training_views_jitter_by_at_most_the_given_share():
    image = Image.new("RGB", (40, 40), (100, 100, 100))
    transforms = Transforms(32, 36, color_jitter=0.2)
    extremes = [
        pixels(training_transform(image, transforms, np.array([0.5, 0.5, 0.5, u, 0.5, 0.5]))).max()
        for u in (0.0, 0.5, 1 - 2**-53)
    ]
    assert extremes == [80, 100, 120]


# Random numbers.


def test_uniforms_are_fixed_for_ever():
    """Written down once: another version of NumPy has to give the same views."""
    expected = [
        0.7668723250560862,
        0.8027926963915697,
        0.9706650463315797,
        0.23420931520336108,
        0.6194873335015861,
        0.6305491116361948,
    ]
    np.testing.assert_array_equal(uniforms(42, 3, 1000), expected)


def test_uniforms_are_uniform_and_differ():
    places = [(s, e, i) for s in range(4) for e in range(10) for i in range(50)]
    u = np.array([uniforms(*place) for place in places])
    assert u.shape == (2000, images.NUM_UNIFORMS)
    assert u.min() >= 0.0 and u.max() < 1.0
    assert len(np.unique(u)) == u.size
    sorted_u = np.sort(u, axis=0)
    distance = np.abs(sorted_u - (np.arange(2000)[:, None] + 0.5) / 2000).max()
    assert distance < 0.045  # Kolmogorov-Smirnov: 0.044 is passed by 0.1 % of uniform samples
    correlation = np.corrcoef(u.T) - np.eye(images.NUM_UNIFORMS)
    assert np.abs(correlation).max() < 0.1


# Decoding.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats(kind):
    array = picture(8)
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    image = decode(encoded(array, kind, **options.get(kind, {})), "it")
    assert image.mode == "RGB"
    assert np.abs(pixels(image) - array).max() <= (6 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "L"),
        ("PNG", "L"),
        ("PNG", "LA"),
        ("PNG", "1"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("JPEG", "CMYK"),
    ],
)
def test_other_colours_become_rgb(kind, mode):
    array = picture(9)
    if mode == "1":
        array = np.where(array[..., :1] > 127, np.uint8(255), np.uint8(0)).repeat(3, axis=-1)
    image = decode(encoded(array, kind, mode), "it")
    assert image.mode == "RGB"
    grey = mode in ("L", "LA")
    expected = np.repeat((array @ GREY)[..., None], 3, axis=-1) if grey else array
    # The palette is a coarse one, and a JPEG is approximate.
    tolerance = {"P": 60.0, "CMYK": 30.0}.get(mode, 6.0 if kind == "JPEG" else 0.51)
    assert np.abs(pixels(image) - expected).max() <= tolerance


def test_a_transparent_palette_raises_no_warning():
    palette = Image.fromarray(picture(10)).convert("P")
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(file.getvalue(), "it").mode == "RGB"


def test_deeper_greys_are_refused():
    data = encoded(np.full((4, 4), 40_000, np.uint16), "PNG")
    with pytest.raises(DataError, match=r"deep\.png has pixels of Pillow's mode 'I;16'.*8-bit"):
        decode(data, "deep.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_files_cut_short_are_refused(kind):
    data = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), kind)
    for length in (len(data) // 2, len(data) // 4):
        with pytest.raises(DataError, match=r"a/cut is (damaged|no image)"):
            decode(data[:length], "a/cut")


def test_what_is_no_image_is_refused():
    for data in (b"GIF89a" + bytes(100), b"<html>404</html>", bytes(1000)):
        with pytest.raises(
            DataError, match=r"a/page is no image in a format that is read \(JPEG, PNG"
        ):
            decode(data, "a/page")
    with pytest.raises(DataError, match="a/nothing is empty: it has 0 bytes"):
        decode(b"", "a/nothing")


def test_damage_within_a_png_is_noticed():
    data = bytearray(encoded(picture(11), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(DataError, match="a/flipped is damaged"):
        decode(bytes(data), "a/flipped")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 20_000])
def test_decompression_bombs_are_refused_unread(side, monkeypatch):
    """A head that promises many pixels; Pillow warns of the first, and refuses the second."""
    data = bytearray(encoded(picture(12), "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2  # IHDR: width and height
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")

    def loaded(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", loaded)
    with pytest.raises(DataError, match=r"a/bomb has more than 89,478,485 pixels"):
        decode(bytes(data), "a/bomb")


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:600, :800] / 100
    array = np.stack([np.sin(3 * x * y), np.cos(x + 2 * y), np.sin(5 * x)], axis=-1)
    array = (127 + 90 * array + rng.normal(0, 8, (600, 800, 3))).clip(0, 255).astype(np.uint8)
    data = encoded(array, quality=90)
    transforms = Transforms(64, 72)
    whole, small = decode(data, "it"), decode(data, "it", transforms.resize_size)
    assert (whole.size, small.size) == ((800, 600), (200, 150))
    distance = np.abs(
        pixels(scoring_transform(whole, transforms)) - pixels(scoring_transform(small, transforms))
    )
    assert distance.mean() < 1.0 and distance.max() <= 8.0
    assert decode(data, "it", 151).size == (800, 600)  # below twice the target at a half
