"""Folders, Parquet and TFDS as stores of images: order, contents, fingerprints, errors."""

import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_data import data_config, encoded, jpegs, picture, write_folder, write_parquet, write_tfds

from easy_jax.data import DataError, load_images
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.image_stores import ParquetImages, TfdsImages


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "train")


# Folders.


def test_a_folder_in_order_of_class_and_name(tmp_path):
    for name in ("b/2.jpg", "b/10.PNG", "a/z.webp", "a/.hidden", ".git/x.txt"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    store = FolderImages(tmp_path / "data")
    assert (store.classes, store.num_classes, len(store)) == (["a", "b"], 2, 3)
    assert store.read([2, 0, 1]) == [(b"b/2.jpg", 1), (b"a/z.webp", 0), (b"b/10.PNG", 1)]
    assert store.where(2) == str(tmp_path / "data" / "b" / "2.jpg")


def test_a_folder_without_images_of_a_class(folder):
    (folder / "ant").mkdir()
    (folder / "ant" / ".keep").touch()
    with pytest.raises(DataError, match=rf"{folder}/ant has no images; fill or remove it"):
        FolderImages(folder)


def test_other_things_in_a_folder(folder):
    for name, what in (
        ("readme.txt", r"readme\.txt is no folder of a class"),
        ("cat/list.csv", r"cat/list\.csv is no image: its name ends in none of \.jpg"),
    ):
        (folder / name).touch()
        with pytest.raises(DataError, match=what):
            FolderImages(folder)
        (folder / name).unlink()
    (folder / "cat" / "more").mkdir()
    with pytest.raises(DataError, match="cat/more is no file; a class folder holds images only"):
        FolderImages(folder)


def test_links_may_not_lead_out_of_a_folder(folder, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpegs(1)[0][0])
    link = folder / "cat" / "x.jpg"
    link.symlink_to(folder / "cat" / "000.jpg")
    assert len(FolderImages(folder)) == 19
    link.unlink()
    link.symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=rf"cat/x\.jpg is a link that leads out of {folder}"):
        FolderImages(folder)
    link.unlink()
    (tmp_path / "elsewhere").mkdir()
    (folder / "wolf").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="wolf is a link that leads out"):
        FolderImages(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="nowhere is no folder; it holds a folder of images per"):
        FolderImages(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no folders of classes"):
        FolderImages(tmp_path)


def test_a_file_that_went_away(folder):
    store = FolderImages(folder)
    (folder / "cat" / "002.jpg").unlink()
    with pytest.raises(DataError, match=r"cat/002\.jpg cannot be read: No such file"):
        store.read([8])


def test_fingerprints_of_folders(folder):
    first = FolderImages(folder).fingerprint()
    assert FolderImages(folder).fingerprint() == first
    (folder / "cat" / "000.jpg").rename(folder / "cat" / "0.jpg")
    renamed = FolderImages(folder).fingerprint()
    with (folder / "cat" / "0.jpg").open("ab") as file:
        file.write(b"more")
    longer = FolderImages(folder).fingerprint()
    (folder / "cat").rename(folder / "cats")
    assert len({first, renamed, longer, FolderImages(folder).fingerprint()}) == 4


# Parquet.


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_in_order_of_file_and_row(tmp_path, struct):
    examples = jpegs(11)
    write_parquet(tmp_path / "train-00000.parquet", examples[:6], struct=struct)
    write_parquet(tmp_path / "train-00001.parquet", examples[6:], struct=struct)
    write_parquet(tmp_path / "test.parquet", examples[:2])
    store = ParquetImages(tmp_path, "train", 3)
    assert store.read([7, 0, 10]) == [examples[i] for i in (7, 0, 10)]
    assert store.where(7) == f"{tmp_path}/train-00001.parquet, row 1"
    assert store.fingerprint() != ParquetImages(tmp_path, "test", 3).fingerprint()
    write_parquet(tmp_path / "dev" / "0.parquet", examples)  # one file in place of two
    assert store.fingerprint() == ParquetImages(tmp_path, "dev", 3).fingerprint()


def test_parquet_labels_out_of_range(tmp_path):
    examples = [(data, label) for (data, _), label in zip(jpegs(5), (0, 1, 2, 3, -1), strict=True)]
    path = write_parquet(tmp_path / "train.parquet", examples)
    with pytest.raises(
        DataError,
        match=rf"2 labels are out of range for 3 classes \(0 to 2\), "
        rf"first 3 in {path}, row 3",
    ):
        ParquetImages(tmp_path, "train", 3)


def test_parquet_of_other_columns(tmp_path):
    path = tmp_path / "train.parquet"
    for columns, what in (
        ({"image": [b"x"]}, r"has no columns \['label'\]; it has \['image'\]"),
        ({"image": ["x"], "label": [0]}, "column 'image' of .* is of string; it must be of file"),
        ({"image": [b"x"], "label": [0.5]}, "column 'label' of .* is of double, not of integers"),
        ({"image": [b"x", None], "label": [0, 1]}, r"train\.parquet, row 1 has a null in.*'image'"),
        ({"image": [b"x", b"y"], "label": [None, 1]}, "row 0 has a null in column 'label'"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "is empty"),
    ):
        pq.write_table(pa.table(columns), path)
        with pytest.raises(DataError, match=what):
            ParquetImages(tmp_path, "train", 3)
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match=rf"cannot read {path}"):
        ParquetImages(tmp_path, "train", 3)
    with pytest.raises(DataError, match=r"has none of test\.parquet, test-\*\.parquet, test/\*"):
        ParquetImages(tmp_path, "test", 3)


def test_parquet_of_other_names(tmp_path):
    examples = jpegs(3)
    write_parquet(tmp_path / "train.parquet", examples, image="img", label="fine_label")
    store = ParquetImages(tmp_path, "train", 3, image_field="img", label_field="fine_label")
    assert store.read([2]) == [examples[2]]


def test_more_parquet_than_memory(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train.parquet", jpegs(3))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": 10}.get)
    with pytest.raises(DataError, match=r"than the 0 GiB of memory.*unpack them into"):
        ParquetImages(tmp_path, "train", 3)


# TFDS.


def test_tfds_images_stay_encoded(tfds_images):
    store = TfdsImages("oxford_flowers102", "train", tfds_images)
    examples = jpegs(20, 102)
    assert (len(store), store.num_classes, len(store.classes)) == (20, 102, 102)
    assert store.read([19, 0, 7]) == [examples[i] for i in (19, 0, 7)]
    assert store.where(7) == (
        f"example 7 of split 'train' of TFDS data set 'oxford_flowers102' in {tfds_images}"
    )
    test = TfdsImages("oxford_flowers102", "test", tfds_images)
    assert store.fingerprint() != test.fingerprint()
    assert "tensorflow" not in sys.modules


def test_tfds_bytes_that_end_in_zeros(tmp_path):
    data = encoded(picture(0), "PNG") + bytes(5)
    write_tfds(tmp_path, "zeros", "1.0.0", 1, {"train": [(data, 0)]})
    assert TfdsImages("zeros", "train", tmp_path).read([0]) == [(data, 0)]


def test_tfds_features_that_are_no_images(tfds_images):
    with pytest.raises(DataError, match=r"field 'file_name' of .* is Text.*, no Image"):
        TfdsImages("oxford_flowers102", "train", tfds_images, image_field="file_name")
    with pytest.raises(DataError, match=r"no fields \['id'\]; it has"):
        TfdsImages("oxford_flowers102", "train", tfds_images, label_field="id")


def test_tfds_that_is_not_prepared(tmp_path):
    """The error says how to prepare it or, where that cannot work any more, what else to do."""
    with pytest.raises(DataError) as error:
        load_images(data_config(tmp_path, name="stanford_dogs", format="tfds"), "train")
    assert "cannot read split 'train' of TFDS data set 'stanford_dogs'" in str(error.value)
    assert "download_and_prepare(), which needs TensorFlow" in str(error.value)
    assert "PATH/train/<class>/<image>.jpg and PATH/test/<class>/<image>.jpg" in str(error.value)
    with pytest.raises(DataError) as error:
        load_images(data_config(tmp_path, name="cars196", format="tfds"), "test")
    assert "TFDS cannot download it any more: its server has answered 404" in str(error.value)
    assert "set format='folder' and path='PATH'" in str(error.value)
    assert "download_and_prepare" not in str(error.value)
