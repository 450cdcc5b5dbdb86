"""Images as people have them: damaged, rotated, in other formats or under other names."""

import io
import json
import shutil

import numpy as np
import pytest
from image_data import (
    encoded,
    load,
    names,
    picture,
    write_folder,
    write_parquet,
    write_splits,
    write_tfds,
)
from PIL import Image

from easy_jax.config import (
    ExperimentConfig,
    ImageDataConfig,
    MethodConfig,
    TransferDataConfig,
    replace,
)
from easy_jax.data import DataError, DataWarning, ImageSource
from easy_jax.data.image_stores import ParquetImages, TfdsImages
from easy_jax.data.images import FORMATS, Transforms, decode
from easy_jax.experiments.plan import Stage, probe_key
from easy_jax.experiments.tasks import load_tasks
from easy_jax.experiments.vision import ImageExperiment
from easy_jax.io.terminal import Terminal

STAGE = Stage(probe_key(0, 0.0), seed=0, start=None, new_head=False, config=None)


@pytest.fixture
def path(tmp_path):
    """Two splits of two classes, six images each."""
    return write_splits(tmp_path)


# Damaged images.


@pytest.fixture
def damaged(path):
    """Five of the twelve training images, in five ways; one of them validates."""
    whole = encoded(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    (path / "train/a/001.jpg").write_bytes(b"<html>404</html>")
    (path / "train/a/004.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "train/b/002.jpg").write_bytes(b"")
    deep = encoded(np.full((8, 8), 40_000, np.uint16), "PNG")
    (path / "train/b/003.jpg").write_bytes(deep)
    (path / "train/b/005.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert "a/004.jpg" in names(load(path, "validation", check_images=0))
    return path


def test_all_damaged_images_are_told_at_once(damaged):
    with pytest.raises(DataError) as error:
        load(damaged)
    message = str(error.value)
    assert message.startswith("5 of 13 images cannot be used (")
    for count in ("1 not an image", "1 damaged", "1 empty", "1 not 8-bit", "1 HEIC"):
        assert count in message
    for name, reason in (
        ("a/001.jpg", "is no image in a format"),
        ("a/004.jpg", "is damaged: "),
        ("b/002.jpg", "is empty: it has 0 bytes"),
        ("b/003.jpg", "has pixels of Pillow's mode"),
        ("b/005.heic", "is in HEIC format, which is not read; convert it to JPEG"),
    ):
        assert f"{damaged}/train/{name} {reason}" in message
    assert message.endswith("or set on_bad_example='drop' to leave them out")
    assert "\n" not in message


def test_twenty_of_many_are_named(path):
    for number in range(30):
        (path / "train/a" / f"x{number:02d}.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"30 of 42 images .*\(30 not an image\)") as error:
        load(path)
    assert str(error.value).count("x1") == 10 and "x20.jpg" not in str(error.value)
    assert "... (30 in all)" in str(error.value)


def test_damaged_images_are_left_out_counted_and_listed(damaged):
    what = r"train: left out, 4 of 12 images cannot be used \(.*1 empty.*\): .*a/001\.jpg is no"
    with pytest.warns(DataWarning, match=what):
        source = load(damaged, on_bad_example="drop")
    train = damaged / "train"
    assert set(source.left_out) == {
        f"{train}/{name}" for name in ("a/001.jpg", "b/002.jpg", "b/003.jpg", "b/005.heic")
    }
    assert source.left_out[f"{train}/b/002.jpg"] == "is empty: it has 0 bytes"
    assert len(source) == 8 and len(names(source) & set(source.left_out)) == 0
    batch = source.batch(range(8))
    assert batch["label"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    with (
        pytest.warns(DataWarning, match=r"no image is left|left out"),
        pytest.raises(DataError, match="validation: no image is left that can be used"),
    ):
        load(damaged, "validation", on_bad_example="drop")


def test_a_class_of_damaged_images_alone_cannot_be_left_out(path):
    for file in (path / "train/b").iterdir():
        file.write_bytes(b"<html>")
    with (
        pytest.warns(DataWarning),
        pytest.raises(DataError, match=r"no image that can be used is left of the classes b"),
    ):
        load(path, on_bad_example="drop")


def test_larger_data_sets_are_looked_at_unread(damaged):
    with pytest.raises(DataError, match=r"2 of 13 images .*\(1 empty, 1 HEIC\)"):
        load(damaged, check_images=12)
    for name in ("b/002.jpg", "b/005.heic"):
        (damaged / "train" / name).unlink()
    source = load(damaged, check_images=10)
    with pytest.raises(DataError, match=r"a/001\.jpg \(example id 1\) is no image"):
        source.batch(range(len(source)))


def test_both_tasks_are_told_at_once(damaged, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for split in ("train", "test"):
        write_folder(other / split, classes=("c", "d"))
    (other / "test/c/002.jpg").write_bytes(b"")
    pretrain, target = (
        ImageDataConfig("other", "folder", str(path), image_size=16, threads=2)
        for path in (other, damaged)
    )
    experiment = ExperimentConfig(data=TransferDataConfig(pretrain, target))
    with pytest.raises(DataError, match=r"^6 of 49 images") as error:
        load_tasks(experiment, 0, 0.0)
    assert str(error.value).count("004.jpg") == 1  # met in train and in validation
    shutil.copy(other / "test/c/000.jpg", other / "test/c/002.jpg")
    shutil.copy(other / "test/c/000.jpg", damaged / "train/a/004.jpg")
    experiment = replace(experiment, {"scoring.on_bad_example": "drop"})
    with pytest.warns(DataWarning, match="left out, 4 of 12 images"):
        tasks = load_tasks(experiment, 0, 0.0)
    assert (len(tasks.target.train), len(tasks.target.test)) == (8, 12)
    experiment = replace(experiment, {"model.in_channels": 3}, methods=(MethodConfig(),))
    with pytest.warns(DataWarning, match="left out"):
        ImageExperiment(experiment.validate(), other, Terminal(quiet=True)).data(STAGE)
    listed = json.loads((other / "left_out_images.json").read_text())
    assert listed == {"target/train": tasks.target.train.left_out}
    assert sorted(reason.split(maxsplit=1)[0] for reason in listed["target/train"].values()) == [
        "has",
        "is",
        "is",
        "is",
    ]
    (damaged / "test/a/000.jpg").write_bytes(b"")  # what is measured on is never left out by that
    with pytest.raises(DataError, match=r"test/a/000\.jpg is empty"):
        load_tasks(experiment, 0, 0.0)


def test_damage_in_parquet_and_tfds(tmp_path):
    examples = [(encoded(picture(i)), i % 3) for i in range(5)]
    examples[2:4] = [(b"", 2), (examples[3][0][:200], 0)]
    write_parquet(tmp_path / "train.parquet", examples)
    write_tfds(tmp_path, "broken", "1.0.0", 3, {"train": examples[:2] + examples[3:]})
    transforms = Transforms(image_size=16, resize_size=18)
    bad, rotated = ImageSource(ParquetImages(tmp_path, "train", 3), transforms).examine()
    assert {i: error.kind for i, error in bad.items()} == {2: "empty", 3: "damaged"}
    assert bad[3].where == f"{tmp_path}/train.parquet, row 3" and rotated == 0
    bad, _ = ImageSource(TfdsImages("broken", "train", tmp_path), transforms).examine()
    assert list(bad) == [2]


# Formats, rotation, size.


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "AVIF"])
def test_formats_are_read_whatever_the_ending(path, kind):
    assert kind in FORMATS
    array = picture(0, 32, 24)
    data = encoded(array, kind, **({"quality": 100} if kind == "AVIF" else {}))
    (path / "train/a" / f"x.{kind.lower()}").write_bytes(data)
    (path / "train/a/y.jpg").write_bytes(data)
    source = load(path, augment=False)
    assert {f"a/x.{kind.lower()}", "a/y.jpg"} <= names(source)
    close = np.asarray(decode(data, "it")).astype(float) - array
    assert np.abs(close).mean() < (12 if kind == "GIF" else 3)  # a palette of 256


def test_heic_under_another_name(path):
    (path / "train/a/x.jpg").write_bytes(b"\0\0\0\x18ftypmif1" + bytes(100))
    with pytest.raises(DataError, match=r"\(1 HEIC\): .*a/x\.jpg is in HEIC format"):
        load(path)


def rotated(array, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda x: x),
        (3, lambda x: x[::-1, ::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (8, np.rot90),
        (2, lambda x: x[:, ::-1]),
    ],
)
def test_exif_rotation_is_applied_if_asked_for(orientation, turn):
    array = picture(3, 40, 24)
    data = rotated(array, orientation)
    np.testing.assert_array_equal(np.asarray(decode(data, "it")), array)
    np.testing.assert_array_equal(np.asarray(decode(data, "it", rotate=True)), turn(array))


def test_exif_rotation_that_is_not_applied_is_told(path):
    (path / "train/b/x.png").write_bytes(rotated(picture(3, 40, 24), 6))
    with pytest.warns(DataWarning, match=r"1 of 13 images of .*train have an EXIF rotation, .*not"):
        ignored = load(path)
    applied = load(path, rotate=True)
    assert ignored.fingerprint() != applied.fingerprint()
    (place,) = np.flatnonzero([ignored.store.where(p).endswith("x.png") for p in range(13)])
    row = ignored._positions.tolist().index(place)
    upright = np.rot90(ignored[row]["image"], -1).astype(int)
    assert np.abs(applied[row]["image"].astype(int) - upright).max() <= 2


def test_more_pixels_than_pillow_allows(path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    (path / "train/a/x.png").write_bytes(encoded(np.zeros((500, 500), np.uint8), "PNG", mode="1"))
    with pytest.raises(DataError, match=r"\(1 too large\): .*x\.png has more than 9,999 pixels"):
        load(path, max_pixels=9_999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    source = load(path, max_pixels=250_000)
    assert "a/x.png" in names(source)
    source.batch(range(len(source)))
