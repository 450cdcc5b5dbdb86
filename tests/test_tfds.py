"""TensorFlow Datasets, offline and without TensorFlow."""

import numpy as np
import pytest
import tfds_data

from easy_jax.data import DataError, TfdsSource, scoring_loader, training_loader


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A prepared data set of 20 examples in three ArrayRecord shards."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.float32),
        "label": tfds.features.ClassLabel(num_classes=10),
        "name": tfds.features.Text(),
    }
    records = [
        {"image": np.full((4, 4, 1), i / 4, np.float32), "label": (3 * i) % 10, "name": f"{i}"}
        for i in range(20)
    ]
    splits = {"train": records, "test": records[:3]}
    return tfds_data.write(tmp_path_factory.mktemp("tfds"), "tiny", "1.2.3", features, splits)


FIELDS = {"image": "image", "label": "y"}


def test_tfds_records(tfds_folder):
    source = TfdsSource("tiny", "train", tfds_folder, FIELDS)
    assert len(source) == 20
    for i in range(20):
        record = source[i]
        assert sorted(record) == ["image", "y"]
        np.testing.assert_array_equal(record["image"], np.full((4, 4, 1), i / 4, np.float32))
        assert int(record["y"]) == (3 * i) % 10
    many = source.__getitems__([19, 0, 7])
    assert [int(record["y"]) for record in many] == [57 % 10, 0, 21 % 10]


def test_tfds_through_the_loaders(tfds_folder):
    source = TfdsSource("tiny:1.2.3", "train", tfds_folder, FIELDS)
    batches = list(scoring_loader(source, 8))
    ids = np.concatenate([batch["example_id"][batch["mask"]] for batch in batches])
    assert ids.tolist() == list(range(20))
    for batch in [*batches, *training_loader(source, 8, epochs=2, seed=0)]:
        mask = batch["mask"]
        ids = batch["example_id"][mask]
        np.testing.assert_array_equal(batch["y"][mask], (3 * ids) % 10)
        np.testing.assert_array_equal(batch["image"][mask][:, 0, 0, 0], ids / 4)


def test_tfds_slices_and_fingerprints(tfds_folder):
    part = TfdsSource("tiny", "train[5:9]", tfds_folder, FIELDS)
    assert [int(part[i]["y"]) for i in range(len(part))] == [5, 8, 1, 4]
    prints = [
        TfdsSource("tiny", split, tfds_folder, fields).fingerprint()
        for split, fields in (
            ("train", FIELDS),
            ("train[5:9]", FIELDS),
            ("train[6:10]", FIELDS),
            ("test", FIELDS),
            ("train", {"label": "y"}),
        )
    ]
    assert len(set(prints)) == 5
    assert TfdsSource("tiny", "train", tfds_folder, FIELDS).fingerprint() == prints[0]


def test_tfds_data_set_that_is_not_there(tfds_folder):
    with pytest.raises(DataError, match=r"'nothere' in (.|\s)*Prepare it first"):
        TfdsSource("nothere", "train", tfds_folder, FIELDS)
    with pytest.raises(DataError, match=r"split 'validation' of TFDS data set 'tiny'"):
        TfdsSource("tiny", "validation", tfds_folder, FIELDS)


def test_tfds_error_is_short(tfds_folder):
    with pytest.raises(DataError) as error:
        TfdsSource("nothere", "train", tfds_folder, FIELDS)
    assert len(str(error.value)) < 1000


def test_tfds_field_that_is_not_there(tfds_folder):
    with pytest.raises(DataError, match=r"no fields \['pixels'\]; it has \['image', 'label'"):
        TfdsSource("tiny", "train", tfds_folder, {"pixels": "image"})
