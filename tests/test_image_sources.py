"""Folders, Parquet and TFDS as sources: order, ids, splits, fingerprints, views, errors."""

import os
import re
import shutil
import sys
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_data import encoded, picture, write_folder, write_parquet, write_tfds

from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    ImageDataConfig,
    ImageDataName,
    TransferDataConfig,
)
from easy_jax.data import (
    DataError,
    ImageSource,
    Reading,
    image_datasets,
    load_images,
    scoring_loader,
    training_loader,
)
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.image_stores import ParquetImages, TfdsImages
from easy_jax.data.images import Views
from easy_jax.experiments.tasks import load_tasks

VIEWS = Views(image_size=16, resize_size=20)


def jpegs(size, classes=3, start=0):
    """(bytes, label) pairs; image i is picture(start + i)."""
    return [(encoded(picture(start + i), quality=95), i % classes) for i in range(size)]


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "train")


@pytest.fixture
def source(folder):
    return ImageSource(FolderImages(folder), VIEWS)


def config(path, **options):
    options = {"name": "other", "format": "folder", "image_size": 16, "threads": 2, **options}
    made = ImageDataConfig(path=str(path), **options)
    made.validate()
    return made


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


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """Flowers, of which TFDS knows the code as well, and a data set with a damaged image."""
    data_dir = tmp_path_factory.mktemp("tfds")
    flowers = {"train": jpegs(20, 102), "validation": jpegs(4, 102, 50), "test": jpegs(9, 102, 70)}
    write_tfds(data_dir, "oxford_flowers102", "2.1.1", 102, flowers)
    broken = [*jpegs(3), (jpegs(1)[0][0][:100], 1)]
    return write_tfds(data_dir, "broken", "1.0.0", 3, {"train": broken})


def test_tfds_images_stay_encoded(tfds_folder):
    store = TfdsImages("oxford_flowers102", "train", tfds_folder)
    examples = jpegs(20, 102)
    assert (len(store), store.num_classes, len(store.classes)) == (20, 102, 102)
    assert store.read([19, 0, 7]) == [examples[i] for i in (19, 0, 7)]
    assert store.where(7) == (
        f"example 7 of split 'train' of TFDS data set 'oxford_flowers102' in {tfds_folder}"
    )
    test = TfdsImages("oxford_flowers102", "test", tfds_folder)
    assert store.fingerprint() != test.fingerprint()
    assert "tensorflow" not in sys.modules


def test_tfds_bytes_that_end_in_zeros(tmp_path):
    data = encoded(picture(0), "PNG") + bytes(5)
    write_tfds(tmp_path, "zeros", "1.0.0", 1, {"train": [(data, 0)]})
    assert TfdsImages("zeros", "train", tmp_path).read([0]) == [(data, 0)]


def test_tfds_features_that_are_no_images(tfds_folder):
    with pytest.raises(DataError, match=r"field 'file_name' of .* is Text.*, no Image"):
        TfdsImages("oxford_flowers102", "train", tfds_folder, image_field="file_name")
    with pytest.raises(DataError, match=r"no fields \['id'\]; it has"):
        TfdsImages("oxford_flowers102", "train", tfds_folder, label_field="id")


def test_tfds_that_is_not_prepared(tmp_path):
    """The error says how to prepare it or, where that cannot work any more, what else to do."""
    with pytest.raises(DataError) as error:
        load_images(config(tmp_path, name="stanford_dogs", format="tfds"), "train")
    assert "cannot read split 'train' of TFDS data set 'stanford_dogs'" in str(error.value)
    assert "download_and_prepare(), which needs TensorFlow" in str(error.value)
    assert "PATH/train/<class>/<image>.jpg and PATH/test/<class>/<image>.jpg" in str(error.value)
    with pytest.raises(DataError) as error:
        load_images(config(tmp_path, name="cars196", format="tfds"), "test")
    assert "TFDS cannot download it any more: its server has answered 404" in str(error.value)
    assert "set format='folder' and path='PATH'" in str(error.value)
    assert "download_and_prepare" not in str(error.value)


# The source.


def test_records(source):
    record = source[7]
    assert {name: (array.dtype.name, array.shape) for name, array in record.items()} == {
        "image": ("uint8", (16, 16, 3)),
        "label": ("int32", ()),
        "image_mean": ("float32", (3,)),
        "image_std": ("float32", (3,)),
    }
    assert int(record["label"]) == 1
    # The middle of picture(101), the second of the second class: 48 x 36, its square resized.
    close = np.asarray(picture(101)[2:-2, 8:-8], np.float64).reshape(16, 2, 16, 2, 3)
    assert np.abs(record["image"].astype(float) - close.mean(axis=(1, 3))).max() < 25
    batch = source.batch([7, 0])
    for name, array in record.items():
        np.testing.assert_array_equal(batch[name][0], array)


@pytest.mark.parametrize("kind", ["truncated", "deep", "page"])
def test_bad_images_are_named_by_path_and_id(folder, kind):
    data = {
        "truncated": encoded(picture(0))[:400],
        "deep": encoded(np.full((8, 8), 40_000, np.uint16), "PNG"),
        "page": b"<html>",
    }[kind]
    (folder / "dog" / "003.jpg").write_bytes(data)
    source = ImageSource(FolderImages(folder), VIEWS)
    with pytest.raises(DataError, match=rf"{folder}/dog/003\.jpg \(example id 15\) (is|has)"):
        list(scoring_loader(source, 8))
    with pytest.raises(DataError, match=r"dog/003\.jpg \(example id 15\) (is|has)"):
        list(training_loader(source, 8, epochs=1, seed=0))


def test_a_bad_image_of_tfds_is_named_by_example(tfds_folder):
    source = ImageSource(TfdsImages("broken", "train", tfds_folder), VIEWS)
    with pytest.raises(DataError, match="example 3 of split 'train' of TFDS data set 'broken'"):
        list(scoring_loader(source, 8))


def test_a_label_out_of_range_is_named(folder):
    store = FolderImages(folder)
    store.num_classes = 2
    with pytest.raises(DataError, match=r"dog/000\.jpg \(example id 12\) has label 2; .* 2 class"):
        ImageSource(store, VIEWS).batch([12])


def test_fingerprints_hold_what_scoring_sees(folder):
    store = FolderImages(folder)

    def fingerprint(views=VIEWS, **options):
        return ImageSource(store, views, **options).fingerprint()

    different = [
        fingerprint(),
        fingerprint(Views(16, 21)),
        fingerprint(Views(15, 20)),
        fingerprint(Views(16, 20, "bicubic")),
        fingerprint(mean=(0.5, 0.5, 0.5)),
        fingerprint(std=(0.5, 0.5, 0.5)),
        fingerprint(positions=np.arange(17)),
    ]
    assert len(set(different)) == len(different)
    same = [
        fingerprint(Views(16, 20, color_jitter=0.4)),
        fingerprint(Views(16, 20, augment=False)),
        fingerprint(reading=Reading(threads=7)),
    ]
    assert set(same) == {different[0]}


# Views in the loaders.


def by_place(loader):
    """(epoch of the example, id) -> image, over all batches."""
    seen, images = {}, {}
    for batch in loader:
        for id_, image in zip(batch["example_id"].tolist(), batch["image"], strict=True):
            if id_ >= 0:
                images[seen.setdefault(id_, 0), id_] = image
                seen[id_] += 1
    return images


def test_scoring_views_are_fixed(source):
    views = [by_place(scoring_loader(source, size)) for size in (8, 16)]
    for place, image in views[0].items():
        np.testing.assert_array_equal(image, views[1][place])
        np.testing.assert_array_equal(image, source[place[1]]["image"])


def test_training_views_are_a_function_of_seed_epoch_and_id(source):
    views = by_place(training_loader(source, 8, epochs=3, seed=5))
    assert sorted(views) == [(e, i) for e in range(3) for i in range(18)]
    alone = source.training_batch([4, 17, 4, 9], [0, 2, 1, 1], seed=5)
    for row, place in enumerate([(0, 4), (2, 17), (1, 4), (1, 9)]):
        np.testing.assert_array_equal(alone["image"][row], views[place])
    # In other batches, in other threads, and split over two processes.
    reading = Reading(threads=4, prefetch=8)
    other = by_place(training_loader(source, 16, epochs=3, seed=5, reading=reading))
    for place, image in other.items():
        np.testing.assert_array_equal(image, views[place])
    loaders = [
        training_loader(source, 8, epochs=3, seed=5, rows=rows)
        for rows in (np.arange(8), np.arange(4), np.arange(4, 8))
    ]
    for batches in zip(*loaders, strict=True):
        whole, *parts = (batch["image"][batch["mask"]] for batch in batches)
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_training_views_differ(source):
    """Between epochs, seeds and from the scoring view."""
    views = [source.training_batch([3], [epoch], seed) for seed in (0, 1) for epoch in range(4)]
    views.append(source.batch([3]))
    assert len({view["image"].tobytes() for view in views}) == 9


def test_padding_is_not_decoded(folder):
    read_positions = []

    class Counted(FolderImages):
        def read(self, positions):
            read_positions.extend(positions)
            return super().read(positions)

    source = ImageSource(Counted(folder), VIEWS)
    (batch,) = scoring_loader(source, 32)
    assert read_positions == list(range(18))
    np.testing.assert_array_equal(batch["image"][20], batch["image"][0])


def test_worker_processes_give_the_same_and_resume(source, tmp_path):
    """With two workers, from the middle of a run without any, and back."""

    def loader(workers):
        reading = Reading(threads=1, prefetch=2, workers=workers)
        return training_loader(source, 8, epochs=2, seed=3, reading=reading)

    whole = list(loader(0))
    batches = iter(loader(0))
    for _ in range(2):
        next(batches)
    resumed = iter(loader(2))
    resumed.set_state(batches.get_state())
    some = [next(resumed) for _ in range(2)]
    state = resumed.get_state()
    assert state == {"next_index": 4}
    resumed.close()
    last = iter(loader(0))
    last.set_state(state)
    parts = [*whole[:2], *some, *last]
    assert len(parts) == len(whole) == 5
    for ours, theirs in zip(parts, whole, strict=True):
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_errors_of_worker_processes_are_ours(folder):
    (folder / "dog" / "003.jpg").write_bytes(b"<html>")
    source = ImageSource(FolderImages(folder), VIEWS, reading=Reading(1, 1, workers=1))
    with pytest.raises(DataError, match=r"dog/003\.jpg \(example id 15\) is no image in"):
        list(scoring_loader(source, 8))


@pytest.mark.parametrize("kind", ["parquet", "tfds"])
def test_stores_reach_worker_processes(tmp_path, tfds_folder, kind):
    if kind == "tfds":
        store = TfdsImages("oxford_flowers102", "test", tfds_folder)
    else:
        write_parquet(tmp_path / "train.parquet", jpegs(9))
        store = ParquetImages(tmp_path, "train", 3)
    alone, others = (
        list(scoring_loader(ImageSource(store, VIEWS, reading=Reading(1, 1, workers)), 8))
        for workers in (0, 1)
    )
    for ours, theirs in zip(others, alone, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])


# Data sets.


def test_every_name_has_an_entry():
    assert set(image_datasets.DATA_SETS) == set(get_args(ImageDataName))


def test_splits_of_tfds(tfds_folder):
    made = config(tfds_folder, name="oxford_flowers102", format="tfds")
    sizes = {split: len(load_images(made, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 20, "validation": 4, "test": 9}
    labels = [int(load_images(made, "train")[i]["label"]) for i in range(20)]
    assert labels == list(range(20))


def test_validation_is_cut_out_of_the_training_data(tmp_path):
    path = tmp_path / "data"
    write_folder(path / "train", per_class=10)
    write_folder(path / "test", per_class=2)
    made = config(path)
    train, validation, test = (load_images(made, s) for s in ("train", "validation", "test"))
    assert (len(train), len(validation), len(test)) == (27, 3, 6)
    names = [{s.store.where(int(p)) for p in s._positions} for s in (train, validation)]
    assert names[0].isdisjoint(names[1]) and len(names[0] | names[1]) == 30
    again = load_images(made, "validation")
    assert again.fingerprint() == validation.fingerprint() != train.fingerprint()
    np.testing.assert_array_equal(again._positions, validation._positions)
    shutil.copytree(path / "test", path / "validation")
    assert [len(load_images(made, split)) for split in ("train", "validation")] == [30, 6]


def test_parquet_of_your_own(tmp_path):
    examples = jpegs(20)
    write_parquet(tmp_path / "train.parquet", examples)
    write_parquet(tmp_path / "test.parquet", examples[:5])
    made = config(tmp_path, format="parquet", num_classes=3)
    assert [len(load_images(made, s)) for s in ("train", "validation", "test")] == [18, 2, 5]
    assert load_images(made, "test").num_classes == 3
    assert load_images(made, "test").classes == ["0", "1", "2"]


def test_classes_that_differ_between_splits(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test", classes=("bird", "cow", "dog"))
    with pytest.raises(
        DataError,
        match=r"test are not those of the training data: missing "
        r"\['cat'\], only here \['cow'\]",
    ):
        load_images(config(tmp_path), "test")


def test_tasks_know_the_names_of_their_classes(tmp_path):
    for task, classes in (("old", ("ant", "bee")), ("new", ("bird", "cow", "dog"))):
        for split in ("train", "test"):
            write_folder(tmp_path / task / split, classes=classes)
    pretrain, target = config(tmp_path / "old"), config(tmp_path / "new")
    experiment = ExperimentConfig(data=TransferDataConfig(pretrain=pretrain, target=target))
    tasks = load_tasks(experiment, seed=0, label_noise=0.0)
    assert tasks.pretrain.classes == ["ant", "bee"] and tasks.pretrain.num_classes == 2
    assert tasks.target.classes == ["bird", "cow", "dog"]
    assert "".join(load_tasks(ExperimentConfig(), 0, 0.0).target.classes) == "0123456789"


def test_a_validation_split_of_ones_own(tmp_path):
    examples = jpegs(12)
    write_parquet(tmp_path / "train.parquet", examples)
    parquet = config(tmp_path, format="parquet", num_classes=3)
    cut = [len(load_images(parquet, split)) for split in ("train", "validation")]
    assert sum(cut) == 12 and cut[1] > 0
    write_parquet(tmp_path / "validation-00000.parquet", examples[:5])
    assert [len(load_images(parquet, split)) for split in ("train", "validation")] == [12, 5]


def test_a_number_of_classes_that_is_wrong(tmp_path):
    write_folder(tmp_path / "train")
    with pytest.raises(DataError, match=r"split 'train' .* has 3 classes; cifar10 has 10"):
        load_images(config(tmp_path, name="cifar10"), "train")


def test_folders_that_are_no_splits(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "held")
    with pytest.raises(
        DataError,
        match=r"has the folders \['held', 'train'\].* should have train, "
        r"test, each with a folder per class",
    ):
        load_images(config(tmp_path), "train")
    (tmp_path / "held").rename(tmp_path / "val")
    assert len(load_images(config(tmp_path), "validation")) == 18  # as `validation`
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/test/<class>/<image>.jpg")):
        load_images(config(tmp_path), "test")


def test_imagenet_is_tested_on_its_validation_split(tmp_path):
    """Whose folder may be all there is."""
    classes = [f"n{i:08d}" for i in range(1000)]
    data = jpegs(1)[0][0]
    for name in classes:
        (tmp_path / "validation" / name).mkdir(parents=True)
        (tmp_path / "validation" / name / f"{name}.JPEG").write_bytes(data)
    source = load_images(config(tmp_path, name="imagenet2012"), "test")
    assert (len(source), source.num_classes) == (1000, 1000)
    assert int(source[999]["label"]) == 999


def test_views_of_the_paper(tmp_path, tfds_folder):
    flowers = config(tfds_folder, name="oxford_flowers102", format="tfds", image_size=224)
    source = load_images(flowers, "train")
    assert source.views == Views(224, 256, "bilinear", True, 0.2)
    np.testing.assert_allclose(source[0]["image_mean"], (0.485, 0.456, 0.406), rtol=1e-6)
    write_parquet(tmp_path / "train.parquet", jpegs(20))
    cifar = config(tmp_path, name="cifar10", format="parquet", image_size=224)
    source = load_images(cifar, "train")
    assert source.views == Views(224, 224, "bilinear", True, 0.0)
    np.testing.assert_allclose(source[0]["image_std"], (0.2470, 0.2435, 0.2616), rtol=1e-6)
    made = config(tmp_path, name="cifar10", format="parquet", resize_size=18, augment=False)
    assert load_images(made, "train").views == Views(16, 18, "bilinear", False, 0.0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"name": "mnist"}, "data.name is 'mnist'; it must be one of"),
        ({"path": ""}, "data.path is ''; it must be a folder"),
        ({"name": "other", "format": "tfds"}, "data.format is 'tfds'; it must be 'folder' or"),
        ({"name": "other", "format": "parquet"}, "data.num_classes is 0; it must be positive"),
        ({"num_classes": 7}, "data.num_classes is 7; it must be positive for .* and 0 elsewhere"),
        ({"resize_size": 100}, "data.resize_size is 100; it must be 0 or at least image_size"),
        ({"interpolation": "nearest"}, "data.interpolation is 'nearest'"),
        ({"threads": -1}, "data.threads is -1; it must be at least 0"),
        ({"image_field": ""}, "data.image_field"),
    ],
)
def test_impossible_configurations(options, what):
    with pytest.raises(ConfigError, match=what):
        ImageDataConfig(**{"path": "somewhere", **options}).validate()


def test_threads_are_those_of_the_machine_or_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)))
    write_folder(tmp_path / "train")

    def reading(**options):
        return load_images(config(tmp_path, **options), "train").reading

    assert reading(threads=0) == Reading(threads=8, prefetch=10)
    assert reading(threads=0, workers=16) == Reading(threads=2, prefetch=4, workers=16)
    assert reading(threads=3) == Reading(threads=3, prefetch=5)
