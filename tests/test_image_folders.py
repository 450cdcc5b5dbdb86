"""Image folders as people have them: stray files, links, class names, splits."""

import json
import shutil
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from image_data import encoded, load, names, picture, write_folder, write_parquet, write_splits

from easy_jax.config import ConfigError
from easy_jax.data import DataError, DataWarning
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.image_stores import ParquetImages


@pytest.fixture
def path(tmp_path):
    """Two splits of two classes, six images each."""
    return write_splits(tmp_path)


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
