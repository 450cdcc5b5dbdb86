"""Letters and digits: splits, wrong labels, fonts."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from easy_jax.config import GlyphDataConfig
from easy_jax.data import glyphs

# Letters and digits.

SMALL = GlyphDataConfig(
    image_size=8,
    pretrain_train=40,
    pretrain_validation=20,
    pretrain_test=20,
    target_train=800,
    target_validation=400,
    label_noise=(0.3,),
)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.55])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_wrong_labels_are_an_exact_share_and_never_right(share, num_classes):
    rng = np.random.default_rng(1)
    label_N = rng.integers(num_classes, size=200).astype(np.int32)
    new_N, wrong_N = glyphs.corrupt_labels(label_N, num_classes, share, rng)
    assert wrong_N.sum() == round(share * 200)
    np.testing.assert_array_equal(new_N != label_N, wrong_N)
    assert new_N.dtype == label_N.dtype
    assert set(new_N.tolist()) <= set(range(num_classes))


def test_wrong_labels_take_every_other_class():
    label_N = np.full(2000, 3)
    new_N, wrong_N = glyphs.corrupt_labels(label_N, 10, 0.5, np.random.default_rng(0))
    counts = np.bincount(new_N[wrong_N], minlength=10)
    assert counts[3] == 0
    assert (np.delete(counts, 3) > 1000 / 9 * 0.6).all()


def test_letters_are_fixed_by_the_seed():
    first, again, other = (
        glyphs.render_letters(30, 12, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other[1])
    image, label = first
    assert image.shape == (30, 12, 12, 1) and image.dtype == np.float32
    assert image.min() >= -1.0 and image.max() <= 1.0
    assert label.dtype == np.int32 and label.min() >= 0 and label.max() < 26


def ink(path, text):
    """Share of inked pixels, and the picture."""
    picture = Image.new("L", (64, 64))
    font = ImageFont.truetype(str(path), 40)
    ImageDraw.Draw(picture).text((32, 32), text, 255, font, anchor="mm")
    array = np.asarray(picture) > 127
    return array.mean(), array


def test_fonts_are_letters_not_symbols():
    paths = glyphs.font_paths()
    assert len(paths) >= 10
    symbols = ("NonUni", "Siz", "Display", "cmsy", "cmex")
    assert not [path.name for path in paths if any(word in path.name for word in symbols)]
    reference = next(path for path in paths if path.name == "DejaVuSans.ttf")
    letter, other = ink(reference, "A")[1], ink(reference, "I")[1]
    for path in paths:
        share, picture = ink(path, "A")
        assert 0.03 < share < 0.4, path.name
        missing = ink(path, "\U0010fffd")[1]  # what the font draws for what it does not have
        assert not np.array_equal(picture, missing), path.name
        # An A looks more like another font's A than like its I.
        assert (picture & letter).sum() > (picture & other).sum(), path.name


def pixels(*sources):
    """One row of bytes per image, to compare as a multiset."""
    return sorted(row.tobytes() for s in sources for row in s.fields["image"])


def test_digit_splits_are_disjoint_and_complete():
    image, label = glyphs.read_digits(8)
    digits = load_digits()
    assert len(image) == 1797
    # At 8x8 pixels nothing is scaled: 0 to 16 becomes -1 to 1.
    np.testing.assert_allclose(image[..., 0], digits.images / 8 - 1, atol=1e-6)
    np.testing.assert_array_equal(label, digits.target)
    for seed in (0, 1):
        target = glyphs.load(SMALL, seed, label_noise=0.3).target
        parts = (target.train, target.validation, target.test)
        assert [len(part) for part in parts] == [800, 400, 597]
        assert len(set(pixels(*parts))) == len({row.tobytes() for row in image})
        assert pixels(*parts) == sorted(row.tobytes() for row in image)


def true_labels(source):
    """Looked up by picture in scikit-learn's own data."""
    digits = load_digits()
    known = {
        np.rint(row).astype(int).tobytes(): t
        for row, t in zip(digits.images, digits.target, strict=True)
    }
    images = np.rint((source.fields["image"][..., 0] + 1) * 8).astype(int)
    return np.array([known[image.tobytes()] for image in images])


def test_only_training_labels_are_wrong():
    data = glyphs.load(SMALL, 0, label_noise=0.3)
    for part in (data.target.validation, data.target.test):
        np.testing.assert_array_equal(part.fields["label"], true_labels(part))
    train = data.target.train
    np.testing.assert_array_equal(train.fields["label"] != true_labels(train), data.wrong_N)
    assert data.wrong_N.sum() == 240


def test_noise_changes_labels_alone():
    clean, noisy = (glyphs.load(SMALL, 0, label_noise=noise) for noise in (0.0, 0.3))
    for split in ("train", "validation", "test"):
        a, b = getattr(clean.target, split), getattr(noisy.target, split)
        np.testing.assert_array_equal(a.fields["image"], b.fields["image"])
        a, b = getattr(clean.pretrain, split), getattr(noisy.pretrain, split)
        assert a.fingerprint() == b.fingerprint()
    assert not clean.wrong_N.any()


def test_seeds_give_other_data():
    one, two = (glyphs.load(SMALL, seed, label_noise=0.3) for seed in (0, 1))
    assert one.target.train.fingerprint() != two.target.train.fingerprint()
    assert one.pretrain.train.fingerprint() != two.pretrain.train.fingerprint()
    pretrain = one.pretrain
    parts = (pretrain.train, pretrain.validation, pretrain.test)
    assert len(set(pixels(*parts))) == 80
