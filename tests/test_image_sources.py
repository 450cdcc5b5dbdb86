"""Images as a source of examples: records, transforms in the loaders, worker processes, errors."""

import numpy as np
import pytest
from image_data import encoded, jpegs, picture, write_folder, write_parquet

from easy_jax.data import DataError, ImageSource, Reading, scoring_loader, training_loader
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.image_stores import ParquetImages, TfdsImages
from easy_jax.data.images import Transforms

VIEWS = Transforms(image_size=16, resize_size=20)


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "train")


@pytest.fixture
def source(folder):
    return ImageSource(FolderImages(folder), VIEWS)


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


@pytest.mark.slow
def test_a_bad_image_of_tfds_is_named_by_example(tfds_images):
    source = ImageSource(TfdsImages("broken", "train", tfds_images), VIEWS)
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
        fingerprint(Transforms(16, 21)),
        fingerprint(Transforms(15, 20)),
        fingerprint(Transforms(16, 20, "bicubic")),
        fingerprint(mean=(0.5, 0.5, 0.5)),
        fingerprint(std=(0.5, 0.5, 0.5)),
        fingerprint(positions=np.arange(17)),
    ]
    assert len(set(different)) == len(different)
    same = [
        fingerprint(Transforms(16, 20, color_jitter=0.4)),
        fingerprint(Transforms(16, 20, augment=False)),
        fingerprint(reading=Reading(threads=7)),
    ]
    assert set(same) == {different[0]}


# Transforms in the loaders.


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_errors_of_worker_processes_are_ours(folder):
    (folder / "dog" / "003.jpg").write_bytes(b"<html>")
    source = ImageSource(FolderImages(folder), VIEWS, reading=Reading(1, 1, workers=1))
    with pytest.raises(DataError, match=r"dog/003\.jpg \(example id 15\) is no image in"):
        list(scoring_loader(source, 8))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "tfds"])
def test_stores_reach_worker_processes(tmp_path, tfds_images, kind):
    if kind == "tfds":
        store = TfdsImages("oxford_flowers102", "test", tfds_images)
    else:
        write_parquet(tmp_path / "train.parquet", jpegs(9))
        store = ParquetImages(tmp_path, "train", 3)
    alone, others = (
        list(scoring_loader(ImageSource(store, VIEWS, reading=Reading(1, 1, workers)), 8))
        for workers in (0, 1)
    )
    for ours, theirs in zip(others, alone, strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])


def test_former_names_of_transforms(tmp_path):
    from easy_jax.data import images

    write_folder(tmp_path, classes=("a", "b"), per_class=2)
    with pytest.warns(DeprecationWarning, match="Views is now .*Transforms"):
        views = images.Views(16, 20)
    with pytest.warns(DeprecationWarning, match=r"\(views=\) is now ImageSource\(transforms=\)"):
        source = ImageSource(FolderImages(tmp_path), views=views)
    assert source.transforms == Transforms(16, 20)
