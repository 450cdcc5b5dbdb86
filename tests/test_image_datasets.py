"""Image data sets by name: splits, classes, transforms of images, configurations."""

import os
import re
import shutil
from typing import get_args

import numpy as np
import pytest
from image_data import data_config, jpegs, write_folder, write_parquet

from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    ImageDataConfig,
    ImageDataName,
    TransferDataConfig,
)
from easy_jax.data import DataError, Reading, known_images, load_images
from easy_jax.data.images import Transforms
from easy_jax.experiments.tasks import load_tasks

# Data sets.


def test_every_name_has_an_entry():
    assert set(known_images.DATA_SETS) == set(get_args(ImageDataName))


@pytest.mark.slow
def test_splits_of_tfds(tfds_images):
    made = data_config(tfds_images, name="oxford_flowers102", format="tfds")
    sizes = {split: len(load_images(made, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 20, "validation": 4, "test": 9}
    labels = [int(load_images(made, "train")[i]["label"]) for i in range(20)]
    assert labels == list(range(20))


def test_validation_is_cut_out_of_the_training_data(tmp_path):
    path = tmp_path / "data"
    write_folder(path / "train", per_class=10)
    write_folder(path / "test", per_class=2)
    made = data_config(path)
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
    made = data_config(tmp_path, format="parquet", num_classes=3)
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
        load_images(data_config(tmp_path), "test")


@pytest.mark.slow
def test_tasks_know_the_names_of_their_classes(tmp_path):
    for task, classes in (("old", ("ant", "bee")), ("new", ("bird", "cow", "dog"))):
        for split in ("train", "test"):
            write_folder(tmp_path / task / split, classes=classes)
    pretrain, target = data_config(tmp_path / "old"), data_config(tmp_path / "new")
    experiment = ExperimentConfig(data=TransferDataConfig(pretrain=pretrain, target=target))
    tasks = load_tasks(experiment, seed=0, label_noise=0.0)
    assert tasks.pretrain.classes == ["ant", "bee"] and tasks.pretrain.num_classes == 2
    assert tasks.target.classes == ["bird", "cow", "dog"]
    assert "".join(load_tasks(ExperimentConfig(), 0, 0.0).target.classes) == "0123456789"


def test_a_validation_split_of_ones_own(tmp_path):
    examples = jpegs(12)
    write_parquet(tmp_path / "train.parquet", examples)
    parquet = data_config(tmp_path, format="parquet", num_classes=3)
    cut = [len(load_images(parquet, split)) for split in ("train", "validation")]
    assert sum(cut) == 12 and cut[1] > 0
    write_parquet(tmp_path / "validation-00000.parquet", examples[:5])
    assert [len(load_images(parquet, split)) for split in ("train", "validation")] == [12, 5]


def test_a_number_of_classes_that_is_wrong(tmp_path):
    write_folder(tmp_path / "train")
    with pytest.raises(DataError, match=r"split 'train' .* has 3 classes; cifar10 has 10"):
        load_images(data_config(tmp_path, name="cifar10"), "train")


def test_folders_that_are_no_splits(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "held")
    with pytest.raises(
        DataError,
        match=r"has the folders \['held', 'train'\].* should have train, "
        r"test, each with a folder per class",
    ):
        load_images(data_config(tmp_path), "train")
    (tmp_path / "held").rename(tmp_path / "val")
    assert len(load_images(data_config(tmp_path), "validation")) == 18  # as `validation`
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/test/<class>/<image>.jpg")):
        load_images(data_config(tmp_path), "test")


def test_imagenet_is_tested_on_its_validation_split(tmp_path):
    """Whose folder may be all there is."""
    classes = [f"n{i:08d}" for i in range(1000)]
    data = jpegs(1)[0][0]
    for name in classes:
        (tmp_path / "validation" / name).mkdir(parents=True)
        (tmp_path / "validation" / name / f"{name}.JPEG").write_bytes(data)
    source = load_images(data_config(tmp_path, name="imagenet2012"), "test")
    assert (len(source), source.num_classes) == (1000, 1000)
    assert int(source[999]["label"]) == 999


def test_views_of_the_paper(tmp_path, tfds_images):
    flowers = data_config(tfds_images, name="oxford_flowers102", format="tfds", image_size=224)
    source = load_images(flowers, "train")
    assert source.transforms == Transforms(224, 256, "bilinear", True, 0.2)
    np.testing.assert_allclose(source[0]["image_mean"], (0.485, 0.456, 0.406), rtol=1e-6)
    write_parquet(tmp_path / "train.parquet", jpegs(20))
    cifar = data_config(tmp_path, name="cifar10", format="parquet", image_size=224)
    source = load_images(cifar, "train")
    assert source.transforms == Transforms(224, 224, "bilinear", True, 0.0)
    np.testing.assert_allclose(source[0]["image_std"], (0.2470, 0.2435, 0.2616), rtol=1e-6)
    made = data_config(tmp_path, name="cifar10", format="parquet", resize_size=18, augment=False)
    assert load_images(made, "train").transforms == Transforms(16, 18, "bilinear", False, 0.0)


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
        return load_images(data_config(tmp_path, **options), "train").reading

    assert reading(threads=0) == Reading(threads=8, prefetch=10)
    assert reading(threads=0, workers=16) == Reading(threads=2, prefetch=4, workers=16)
    assert reading(threads=3) == Reading(threads=3, prefetch=5)
