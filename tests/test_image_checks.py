"""Image folders as people have them: what is read, passed over, told all at once, or left out."""

import io
import json
import os
import shutil
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_data import encoded, picture, write_folder, write_parquet, write_tfds
from PIL import Image

from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    ImageDataConfig,
    MethodConfig,
    TransferDataConfig,
    replace,
)
from easy_jax.data import DataError, DataWarning, ImageSource, load_images
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.image_stores import ParquetImages, TfdsImages
from easy_jax.data.images import FORMATS, Views, decode
from easy_jax.experiments.plan import Stage
from easy_jax.experiments.tasks import load_tasks
from easy_jax.experiments.vision import ImageExperiment
from easy_jax.io.terminal import Terminal

STAGE = Stage("probe", 0, 0.0, None, False, None)


@pytest.fixture
def path(tmp_path):
    """Two splits of two classes, six images each."""
    for split in ("train", "test"):
        write_folder(tmp_path / split, classes=("a", "b"))
    return tmp_path


def load(path, split="train", **options):
    options = {"name": "other", "format": "folder", "image_size": 16, "threads": 2, **options}
    config = ImageDataConfig(path=str(path), **options)
    config.validate()
    return load_images(config, split)


def names(source):
    return {
        os.path.relpath(source.store.where(int(p)), source.store.folder) for p in source._positions
    }


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
    views = Views(image_size=16, resize_size=18)
    bad, rotated = ImageSource(ParquetImages(tmp_path, "train", 3), views).examine()
    assert {i: error.kind for i, error in bad.items()} == {2: "empty", 3: "damaged"}
    assert bad[3].where == f"{tmp_path}/train.parquet, row 3" and rotated == 0
    bad, _ = ImageSource(TfdsImages("broken", "train", tmp_path), views).examine()
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


# What else lies in folders.


def test_what_systems_leave_behind_is_passed_over(path):
    (path / "__MACOSX").mkdir()
    (path / "train/@eaDir").mkdir()
    for name in (
        "train/desktop.ini",
        "train/a/Thumbs.db",
        "train/a/Desktop.ini",
        "train/a/tmp",
        "train/b/000.jpg.tmp",
        ".DS_Store",
        "train/b/._0.jpg",
    ):
        (path / name).write_bytes(b"x")
    assert len(load(path)) == 11
    (path / "train/tmp").mkdir()  # a folder may be a class
    with pytest.raises(DataError, match=r"the class folder .*train/tmp has no images"):
        load(path)


def test_strays_are_told_at_once(path):
    for number in range(3):
        (path / "train/b" / f"{number}.csv").touch()
    (path / "train/a/more").mkdir()
    (path / "train/a/x.jpg").symlink_to("gone.jpg")
    with pytest.raises(DataError, match=rf"^5 entries of {path}/train: .*a/more is no file") as e:
        load(path)
    assert "a/x.jpg is a link to a file that is not there" in str(e.value)
    assert str(e.value).count("is no image: its name ends in none of .jpg") == 3
    (path / "train/x").touch()
    (path / "train/y").touch()
    with pytest.raises(DataError, match=r"train/x, .*train/y are no folders of classes; move them"):
        load(path)


def test_links_within_the_data_set_are_read(path, tmp_path_factory):
    (path / ".pool").mkdir()
    for name in ("train/a", "test/b"):
        (path / name / "000.jpg").rename(path / ".pool" / name.replace("/", "-"))
        (path / name / "000.jpg").symlink_to(f"../../.pool/{name.replace('/', '-')}")
    assert (len(load(path)), len(load(path, "test"))) == (11, 12)
    outside = tmp_path_factory.mktemp("outside") / "x.jpg"
    shutil.copy(path / ".pool/train-a", outside)
    (path / "train/a/x.jpg").symlink_to(outside)
    with pytest.raises(DataError, match=rf"a/x\.jpg is a link that leads out of {path}; copy"):
        load(path)


def test_odd_folders_are_named(path):
    (path / "extra").mkdir()
    with pytest.raises(
        DataError, match=r"\['extra', 'test', 'train'\], of which extra is no split"
    ):
        load(path)
    (path / "more").mkdir()
    with pytest.raises(
        DataError, match=r"of which extra, more are no splits; it should have train"
    ):
        load(path)


# Classes and splits.


def test_names_that_are_numbers_count_as_text(path):
    for split in ("train", "test"):
        shutil.rmtree(path / split)
        write_folder(path / split, classes=[str(i) for i in range(11)], per_class=2)
    with pytest.warns(
        DataWarning,
        match=r"label 2 is class '10', not '2'\. Names of equal length, "
        r"such as '00'",
    ):
        source = load(path)
    assert source.classes == ["0", "1", "10", *"23456789"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(10):
            for split in ("train", "test"):
                (path / split / str(number)).rename(path / split / f"0{number}")
        assert load(path).classes == [f"{i:02d}" for i in range(11)]


def test_every_class_keeps_a_training_image(path):
    """Of 21 classes with an image each, and one with 40, a tenth validates: all of the one."""
    shutil.rmtree(path / "train")
    classes = [f"c{i:02d}" for i in range(21)]
    write_folder(path / "train", classes=classes, per_class=1)
    write_folder(path / "train2", classes=["many"], per_class=40)
    (path / "train2/many").rename(path / "train/many")
    (path / "train2").rmdir()
    train, validation = load(path), load(path, "validation")
    assert (len(train), len(validation)) == (55, 6)
    assert set(train.labels().tolist()) == set(range(22))
    assert set(validation.labels().tolist()) == {21}
    assert names(train).isdisjoint(names(validation))


def test_a_cut_that_empties_no_class_is_the_one_it_was(tmp_path):
    write_folder(tmp_path / "train", per_class=20)
    order = np.argsort(np.random.Philox(20250715).random_raw(60), kind="stable")
    validation = load(tmp_path, "validation")
    assert validation._positions.tolist() == sorted(order[:6].tolist())


def test_no_validation_image_to_spare(path):
    shutil.rmtree(path / "train")
    write_folder(path / "train", classes=("a", "b"), per_class=1)
    assert len(load(path)) == 2
    with pytest.raises(
        DataError, match=r"can be cut out of train for validation: the classes a, b"
    ):
        load(path, "validation")


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_test_data_can_be_cut_out_of_training_data(tmp_path, kind):
    options = {"format": kind}
    if kind == "parquet":
        examples = [(encoded(picture(i)), i % 3) for i in range(30)]
        write_parquet(tmp_path / "train.parquet", examples)
        options["num_classes"] = 3
    else:
        write_folder(tmp_path / "train", per_class=10)
    plain = [load(tmp_path, split, **options) for split in ("train", "validation")]
    options["test_share"] = 0.2
    parts = [load(tmp_path, split, **options) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [21, 3, 6]
    positions = np.concatenate([part._positions for part in parts])
    assert sorted(positions.tolist()) == list(range(30))
    assert set(parts[0].labels().tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(parts[1]._positions, plain[1]._positions)
    again = load(tmp_path, "test", **options)
    assert again.fingerprint() == parts[2].fingerprint()


def test_a_test_share_beside_test_data(path):
    with pytest.raises(DataError, match=r"has test data, and test_share is 0\.2; set it to 0"):
        load(path, test_share=0.2)
    with pytest.raises(ConfigError, match=r"test_share is 1\.0; it must be between 0 and 1 for"):
        load(path, test_share=1.0)
    with pytest.raises(ConfigError, match=r"test_share is 0\.2; .* and 0 elsewhere"):
        load(path, name="cifar10", test_share=0.2)


def test_no_test_data(path):
    shutil.rmtree(path / "test")
    with pytest.raises(DataError, match=r"folders \['train'\], and no test: .*; or set test_share"):
        load(path, "test")
    shutil.copytree(path / "train", path / "val")
    with pytest.raises(
        DataError,
        match=r"\['train', 'val'\], and no test: .*; or rename val to "
        r"test; or set test_share",
    ):
        load(path, "test")
    assert len(load(path, "validation")) == 12


@pytest.mark.parametrize("missing", ["images", "folder"])
def test_classes_without_test_images_can_be_allowed(path, missing):
    shutil.rmtree(path / "test/a")
    if missing == "images":
        (path / "test/a").mkdir()
        what = "the class folder .*test/a has no images"
    else:
        what = r"missing \['a'\], only here \[\]; set missing_classes='allow'"
    with pytest.raises(DataError, match=what):
        load(path, "test")
    source = load(path, "test", missing_classes="allow")
    assert (source.classes, source.num_classes, len(source)) == (["a", "b"], 2, 6)
    assert source.batch(range(6))["label"].tolist() == [1] * 6
    (path / "test/c").mkdir()  # what training does not know is wrong all the same
    with pytest.raises(DataError, match=r"only here \['c'\]"):
        load(path, "test", missing_classes="allow")


def test_normalisation_of_ones_own(path):
    source = load(path, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    np.testing.assert_allclose(source[0]["image_mean"], (0.5, 0.4, 0.3), rtol=1e-6)
    np.testing.assert_allclose(source[0]["image_std"], (0.2, 0.2, 0.1), rtol=1e-6)
    for options in ({"mean": (0.5,)}, {"std": (0.5, 0.5, 0.0)}, {"mean": (np.nan, 0.0, 0.0)}):
        with pytest.raises(ConfigError, match=rf"data\.{next(iter(options))} is .* three"):
            load(path, **options)


def test_a_store_of_its_own_passes_over_its_links(path):
    """Without the data set's folder, links stay within the split's."""
    (path / "test/a/x.jpg").symlink_to("../../train/a/000.jpg")
    with pytest.raises(DataError, match=rf"leads out of {path}/test"):
        FolderImages(path / "test")
    assert len(FolderImages(path / "test", root=path)) == 13


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"info": {"features": {"label": {"names": ["x", "y", "z"]}}}}, ["x", "y", "z"]),
        ({"info": {"features": {"label": {"dtype": "int64"}}}}, ["0", "1", "2"]),
        ({"info": {"features": {"label": {"names": "xyz"}}}}, ["0", "1", "2"]),
        ([], ["0", "1", "2"]),
    ],
)
def test_class_names_in_parquet(tmp_path, metadata, expected):
    path = write_parquet(tmp_path / "train.parquet", [(encoded(picture(i)), i) for i in range(3)])
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(metadata)}), path)
    assert list(ParquetImages(tmp_path, "train", 3).classes) == expected
    if expected[0] == "x":
        with pytest.raises(
            DataError, match=r"names 3 classes of column 'label', x, y, z; num_cl.*4"
        ):
            ParquetImages(tmp_path, "train", 4)
