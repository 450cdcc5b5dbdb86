"""Data: the loaders' orders, fingerprints, the letters and digits, and TFDS offline."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from easy_jax import fingerprint as fingerprints
from easy_jax import sharding
from easy_jax.config import GlyphDataConfig, MeshConfig
from easy_jax.data import (
    ArraySource,
    DataError,
    TfdsSource,
    fingerprint,
    glyphs,
    scoring_loader,
    training_loader,
)

SIZES = (1, 7, 8, 65)
BATCH_SIZES = (8, 16)
PROCESS_COUNTS = (1, 2, 4)
GRID = list(itertools.product(SIZES, BATCH_SIZES))


def squares(size):
    """Record i holds i squared, so that a record cannot be taken for another."""
    return ArraySource({"x": np.arange(size, dtype=np.float32) ** 2})


def global_batches(make, processes):
    """The batches of all processes, their rows joined in the order of the processes."""
    loaders = [make(process_index=i, process_count=processes) for i in range(processes)]
    assert len({loader.steps for loader in loaders}) == 1
    rounds = list(zip(*map(iter, loaders), strict=True))
    assert len(rounds) == loaders[0].steps
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in rounds
    ]


def real_ids(batches):
    return np.concatenate([batch["example_id"][batch["mask"]] for batch in batches])


def assert_same_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# The order for scoring.


@pytest.mark.parametrize("processes", PROCESS_COUNTS)
@pytest.mark.parametrize(("size", "batch_size"), GRID)
def test_scoring_order_has_every_example_once(size, batch_size, processes):
    batches = global_batches(lambda **p: scoring_loader(squares(size), batch_size, **p), processes)
    ids = np.concatenate([batch["example_id"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    x = np.concatenate([batch["x"] for batch in batches])
    expected = list(range(size)) + [-1] * (-size % batch_size)
    assert ids.tolist() == expected
    assert mask.tolist() == [i >= 0 for i in expected]
    assert x[mask].tolist() == [i**2 for i in range(size)]
    assert all(len(batch["x"]) == batch_size for batch in batches)
    assert "weight" not in batches[0]


def test_scoring_order_of_chosen_ids():
    batches = list(scoring_loader(squares(20), 8, ids=np.array([3, 5, 19])))
    assert len(batches) == 1
    assert batches[0]["example_id"].tolist() == [3, 5, 19] + [-1] * 5
    assert batches[0]["x"][:3].tolist() == [9, 25, 361]


def test_ids_outside_of_the_data_set_are_named():
    with pytest.raises(DataError, match=r"ids \[-1, 20\] are not in \[0, 20\)"):
        scoring_loader(squares(20), 8, ids=np.array([-1, 3, 20]))


# The order for training.


@pytest.mark.parametrize("processes", PROCESS_COUNTS)
@pytest.mark.parametrize(("size", "batch_size"), GRID)
def test_training_sees_every_example_once_an_epoch(size, batch_size, processes):
    epochs = 3
    batches = global_batches(
        lambda **p: training_loader(squares(size), batch_size, epochs=epochs, seed=5, **p),
        processes,
    )
    ids = real_ids(batches)
    # Epochs follow one another without a gap, so each is a slice of the whole order.
    for epoch in range(epochs):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))
    assert len(ids) == epochs * size
    assert all(batch["mask"].all() for batch in batches[:-1])
    last = batches[-1]
    assert (last["example_id"][~last["mask"]] == -1).all()
    assert (last["weight"][~last["mask"]] == 0).all()
    for batch in batches:
        mask = batch["mask"]
        np.testing.assert_array_equal(batch["x"][mask], batch["example_id"][mask] ** 2)
        np.testing.assert_array_equal(batch["weight"][mask], 1.0)


@pytest.mark.parametrize(("size", "batch_size"), GRID)
def test_global_batches_do_not_depend_on_the_number_of_processes(size, batch_size):
    def batches(processes):
        return global_batches(
            lambda **p: training_loader(squares(size), batch_size, epochs=2, seed=1, **p),
            processes,
        )

    alone = batches(1)
    for processes in PROCESS_COUNTS[1:]:
        # Padding holds a copy of some record, which may differ; nothing else may.
        for a, b in zip(alone, batches(processes), strict=True):
            np.testing.assert_array_equal(a["example_id"], b["example_id"])
            np.testing.assert_array_equal(a["mask"], b["mask"])
            np.testing.assert_array_equal(a["weight"], b["weight"])
            np.testing.assert_array_equal(a["x"][a["mask"]], b["x"][b["mask"]])


def test_order_is_fixed_by_the_seed():
    def order(seed):
        return real_ids(training_loader(squares(65), 8, epochs=2, seed=seed)).tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert order(3)[:65] != order(3)[65:]
    assert order(3)[:65] != list(range(65))


def test_position_can_be_saved_and_restored_in_the_middle_of_an_epoch():
    loader = training_loader(squares(65), 8, epochs=3, seed=2)
    for taken in (0, 3, 11, loader.steps):
        batches = iter(loader)
        for _ in range(taken):
            next(batches)
        state = batches.get_state()
        rest = list(batches)
        assert len(rest) == loader.steps - taken
        fresh = iter(training_loader(squares(65), 8, epochs=3, seed=2))
        fresh.set_state(state)
        assert_same_batches(list(fresh), rest)


def test_position_does_not_depend_on_reading_ahead():
    loaders = [
        training_loader(squares(65), 8, epochs=1, seed=2, threads=threads, prefetch=prefetch)
        for threads, prefetch in ((1, 1), (4, 16))
    ]
    first, second = map(iter, loaders)
    for _ in range(4):
        next(first)
    second.set_state(first.get_state())
    assert_same_batches(list(second), list(first))


# Weights.


@pytest.mark.parametrize("processes", PROCESS_COUNTS)
def test_weights_are_joined_by_id(processes):
    weight_N = np.random.default_rng(0).random(65).astype(np.float32)
    batches = global_batches(
        lambda **p: training_loader(squares(65), 16, epochs=2, seed=0, weight_N=weight_N, **p),
        processes,
    )
    for batch in batches:
        expected = [weight_N[i] if i >= 0 else 0.0 for i in batch["example_id"]]
        np.testing.assert_array_equal(batch["weight"], np.float32(expected))


@pytest.mark.parametrize("given", [False, True])
def test_weights_of_the_records_are_multiplied_in(given):
    own_N = np.arange(10, dtype=np.float32)
    weight_N = np.linspace(0.1, 1.0, 10, dtype=np.float32) if given else None
    source = ArraySource({"x": np.zeros(10, np.float32), "weight": own_N})
    factor_N = np.ones(10, np.float32) if weight_N is None else weight_N
    for batch in training_loader(source, 8, epochs=1, seed=0, weight_N=weight_N):
        expected = [own_N[i] * factor_N[i] if i >= 0 else 0.0 for i in batch["example_id"]]
        np.testing.assert_array_equal(batch["weight"], np.float32(expected))


def test_weights_of_the_records_do_not_reach_scoring():
    source = ArraySource({"x": np.zeros(3, np.float32), "weight": np.ones(3, np.float32)})
    (batch,) = scoring_loader(source, 8)
    assert sorted(batch) == ["example_id", "mask", "x"]


def test_an_example_without_a_weight_is_left_out():
    weight_N = np.ones(20, np.float32)
    weight_N[[4, 7]] = np.nan
    ids = real_ids(training_loader(squares(20), 8, epochs=2, seed=0, weight_N=weight_N))
    expected = [i for i in range(20) if i not in (4, 7)]
    assert sorted(ids.tolist()) == sorted(expected * 2)


def test_an_example_of_weight_zero_stays():
    weight_N = np.ones(20, np.float32)
    weight_N[4] = 0.0
    ids = real_ids(training_loader(squares(20), 8, epochs=1, seed=0, weight_N=weight_N))
    assert sorted(ids.tolist()) == list(range(20))


# Sources.


class BatchSource:
    """Can be read only by the batch."""

    def __init__(self, size):
        self.size = size
        self.calls = []

    def __len__(self):
        return self.size

    def __getitem__(self, position):
        raise AssertionError(f"example {position} was read alone")

    def __getitems__(self, positions):
        self.calls.append(list(positions))
        return [{"x": np.float32(position)} for position in positions]


def test_batches_are_read_at_once_where_the_source_can():
    source = BatchSource(9)
    batches = list(scoring_loader(source, 8))
    assert [batch["x"][batch["mask"]].tolist() for batch in batches] == [
        list(map(float, range(8))),
        [8.0],
    ]
    assert len(source.calls) == 2
    # Padding is a copy of an example of the batch: no other example is read for it.
    assert {position for call in source.calls for position in call} == set(range(9))


class PlainSource:
    """Records without a fingerprint of their own."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, position):
        return self.records[position]


RECORDS = [{"x": np.float32(i), "y": np.int32(i % 2)} for i in range(4)]


def edited(position, **fields):
    return [{**record, **fields} if i == position else record for i, record in enumerate(RECORDS)]


def test_fingerprint_of_a_source_does_not_depend_on_the_order_of_the_fields():
    turned = [{"y": record["y"], "x": record["x"]} for record in RECORDS]
    assert fingerprint(PlainSource(RECORDS)) == fingerprint(PlainSource(turned))
    arrays = {"x": np.arange(4.0), "y": np.arange(4)}
    backwards = dict(reversed(arrays.items()))
    assert fingerprint(ArraySource(arrays)) == fingerprint(ArraySource(backwards))


@pytest.mark.parametrize(
    "other",
    [
        edited(2, x=np.float32(2.0000002)),
        edited(2, x=np.float64(2)),
        edited(3, y=np.int32(0)),
        [RECORDS[1], RECORDS[0], *RECORDS[2:]],
        RECORDS[:3],
        [*RECORDS, RECORDS[0]],
        [{"z": record["x"], "y": record["y"]} for record in RECORDS],
        [{"x": record["x"][None], "y": record["y"]} for record in RECORDS],
    ],
    ids=["value", "dtype", "label", "order", "shorter", "longer", "name", "shape"],
)
def test_fingerprint_of_a_source_depends_on_its_content(other):
    assert fingerprint(PlainSource(RECORDS)) != fingerprint(PlainSource(other))
    stacked, changed = (
        ArraySource({name: np.stack([r[name] for r in records]) for name in records[0]})
        for records in (RECORDS, other)
    )
    assert fingerprint(stacked) != fingerprint(changed)


def test_fingerprint_of_any_dtype():
    for dtype in (jnp.bfloat16, np.float16, np.uint8, bool, "datetime64[D]", "S4", "U4"):
        one, same, other = (
            ArraySource({"x": np.array(values).astype(dtype)})
            for values in ([1, 0, 1], [1, 0, 1], [1, 1, 1])
        )
        assert fingerprint(one) == fingerprint(same)
        assert fingerprint(one) != fingerprint(other)


def test_fingerprint_does_not_hash_addresses():
    # An array of Python objects holds pointers, which are others in every process.
    source = ArraySource({"text": np.array(["one", "two"], dtype=object)})
    with pytest.raises((TypeError, DataError), match=r"'text' .*object"):
        fingerprint(source)


def test_fingerprint_of_json_does_not_depend_on_the_order_of_the_keys():
    one = {"a": 1, "b": {"c": [1, 2], "d": None}}
    two = {"b": {"d": None, "c": [1, 2]}, "a": 1}
    assert fingerprints.of_json(one) == fingerprints.of_json(two)
    assert fingerprints.of_json(one) != fingerprints.of_json({**one, "a": 2})
    assert fingerprints.of_json([1, 2]) != fingerprints.of_json([2, 1])


# The fingerprint of a model.


SHAPES = {
    "conv": ((3, 3, 2, 8), ("conv_height", "conv_width", "conv_in", "conv_out")),
    "head": ((8, 5), ("features", "classes")),
    "scale": ((1,), ("norm",)),
    "step": ((), None),
}


def small_state(replaced=None):
    """Variables of every rank; `replaced` takes the place of some."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape) for name, (shape, _) in SHAPES.items()}
    values = {name: np.asarray(value, np.float32) for name, value in values.items()}
    return nnx.State(
        {
            name: nnx.Param(jnp.asarray(value), logical_axes=SHAPES[name][1])
            for name, value in (values | (replaced or {})).items()
        }
    )


def test_fingerprint_of_a_model_does_not_depend_on_its_sharding():
    state = small_state()
    sharded = sharding.shard_tree(state, sharding.make_mesh(MeshConfig(data=2, fsdp=4)))
    for name in ("conv", "head"):
        shards = sharded[name][...].addressable_shards
        assert len({str(shard.index) for shard in shards}) == 4
    assert fingerprints.of_state(sharded) == fingerprints.of_state(state)
    assert fingerprints.of_state(small_state()) == fingerprints.of_state(state)


@pytest.mark.parametrize("name", SHAPES)
def test_fingerprint_of_a_model_differs_when_one_bit_does(name):
    state = small_state()
    seen = {fingerprints.of_state(state)}
    size = state[name][...].size
    for place, bit in ((0, 0), (size // 2, 17), (size - 1, 31)):
        value = np.array(state[name][...])
        value.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
        seen.add(fingerprints.of_state(small_state({name: value})))
    assert len(seen) == 4


def test_fingerprint_of_a_model_depends_on_dtype_shape_and_name():
    value = np.zeros((8, 5), np.float32)
    states = [
        small_state({"head": value}),
        small_state({"head": value.astype(jnp.bfloat16)}),
        small_state({"head": value.astype(np.int32)}),
        small_state({"head": value.reshape(5, 8)}),
        nnx.State({"body": nnx.Param(jnp.asarray(value))}),
        nnx.State({"tail": nnx.Param(jnp.asarray(value))}),
    ]
    assert len({fingerprints.of_state(state) for state in states}) == len(states)


def test_fingerprint_of_a_model_differs_when_two_values_are_swapped():
    one = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0))
    two = nnx.clone(one)
    two.kernel[...] = two.kernel[...][::-1]
    assert fingerprints.of_state(nnx.state(one)) != fingerprints.of_state(nnx.state(two))


# Letters and digits.

SMALL = GlyphDataConfig(
    image_size=8, pretrain_train=40, pretrain_validation=20, pretrain_test=20,
    target_train=800, target_validation=400, label_noise=(0.3,),
)  # fmt: skip


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


# TensorFlow Datasets, offline and without TensorFlow.


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A prepared data set of 20 examples in three ArrayRecord shards."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    version = folder / "tiny" / "1.2.3"
    version.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Tensor(shape=(4, 4, 1), dtype=np.float32),
            "label": tfds.features.ClassLabel(num_classes=10),
            "name": tfds.features.Text(),
        }
    )
    identity = tfds.core.DatasetIdentity(
        name="tiny", version=tfds.core.Version("1.2.3"), data_dir=str(version), module_name="tiny"
    )
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(builder=identity, features=features),
        max_examples_per_shard=7,
        file_format=tfds.core.FileFormat.ARRAY_RECORD,
    )
    writer.initialize_splits(["train", "test"])
    for split, size in (("train", 20), ("test", 3)):
        writer.add_examples(
            {
                split: [
                    {
                        "image": np.full((4, 4, 1), i / 4, np.float32),
                        "label": (3 * i) % 10,
                        "name": f"example {i}",
                    }
                    for i in range(size)
                ]
            }
        )
    writer.close_all()
    return folder


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
    assert real_ids(batches).tolist() == list(range(20))
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
            ("train", FIELDS), ("train[5:9]", FIELDS), ("train[6:10]", FIELDS), ("test", FIELDS),
            ("train", {"label": "y"}),
        )
    ]  # fmt: skip
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
