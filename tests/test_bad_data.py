"""Bad examples and weights: the error names the field and the examples."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import Records
from points import classify, linear, points

from easy_jax.config import StageConfig
from easy_jax.data import ArraySource, DataError, scoring_loader, training_loader
from easy_jax.train.checkpoint import Checkpointer
from easy_jax.train.fitting import fit
from easy_jax.train.hooks import TrainingError
from easy_jax.train.scoring import ScoringError, score

# Data.


def test_empty_data_set():
    with pytest.raises(DataError, match="data set is empty"):
        ArraySource({"x": np.zeros((0, 2))})
    with pytest.raises(DataError, match="data set is empty"):
        ArraySource({})
    with pytest.raises(DataError, match="data set is empty"):
        scoring_loader(Records([]), 8)
    with pytest.raises(DataError, match="data set is empty"):
        training_loader(Records([]), 8, epochs=1, seed=0)


def test_fields_of_unequal_length():
    with pytest.raises(DataError, match=r"unequal lengths: \{'x': 3, 'label': 2\}"):
        ArraySource({"x": np.zeros((3, 2)), "label": np.zeros(2, int)})


@pytest.mark.parametrize("bad", [-1, 10])
def test_label_out_of_range(bad):
    label = np.arange(10)
    label[[2, 7]] = bad
    with pytest.raises(DataError, match=r"'label' is out of range for 10 classes.*ids \[2, 7\]"):
        ArraySource({"label": label}, num_classes=10)


def test_label_that_is_no_integer():
    with pytest.raises(DataError, match=r"'label' has dtype float64; labels are integers"):
        ArraySource({"label": np.zeros(3)}, num_classes=2)


@pytest.mark.parametrize("bad", [-1, 3])
def test_label_out_of_range_while_scoring(bad, tmp_path):
    source = points(bad_label=[5, 13], value=bad)
    with pytest.raises(ScoringError, match=r"2 of 20 .*id 5 has loss nan; id 13 has loss nan"):
        score(linear(), source, tmp_path, loss_fn=classify, batch_size=8)


def test_label_out_of_range_while_training(tmp_path):
    # The 20 examples are one padded batch, so the bad one is in step 1.
    with pytest.raises(TrainingError, match=r"probe: the loss is nan at step 1\b") as error:
        fit(
            linear(),
            points(bad_label=11),
            tmp_path,
            stage=StageConfig(batch_size=24),
            loss_fn=classify,
            name="probe",
        )
    listed = json.loads(re.search(r"example ids (\[.*?\])", str(error.value))[1])
    assert len(listed) == 10
    assert set(listed) <= set(range(20))
    assert "learning rate" in str(error.value)


def test_training_error_names_the_step_and_its_examples(tmp_path):
    source = points(bad_label=11)
    batches = list(training_loader(source, 8, epochs=2, seed=0))
    step_, ids = next(
        (number, batch["example_id"].tolist())
        for number, batch in enumerate(batches, start=1)
        if 11 in batch["example_id"]
    )
    with pytest.raises(TrainingError, match=rf"at step {step_}, on example ids") as error:
        fit(
            linear(),
            source,
            tmp_path,
            stage=StageConfig(epochs=2, batch_size=8),
            loss_fn=classify,
        )
    assert str([i for i in ids if i >= 0]) in str(error.value)


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The loss need not show them: here the broken parameter reaches no logit."""

    class WithUnused(nnx.Module):
        def __init__(self):
            self.used = linear()
            self.unused = nnx.Param(jax.numpy.array([1.0, np.nan]))

        def __call__(self, x):
            return self.used(x)

    with pytest.raises(TrainingError, match=r"after step 3 in \.params\['unused'\]") as error:
        fit(WithUnused(), points(), tmp_path, stage=StageConfig(batch_size=8), loss_fn=classify)
    assert "learning rate" in str(error.value)
    assert Checkpointer(tmp_path, {}).latest_step() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_image(bad):
    image = np.zeros((6, 4, 4, 1), np.float32)
    image[[1, 4], 2, 3, 0] = bad
    with pytest.raises(DataError, match=r"'image' has NaN or infinite values.*ids \[1, 4\]"):
        ArraySource({"image": image})


@pytest.mark.parametrize(
    "make", [lambda s: scoring_loader(s, 8), lambda s: training_loader(s, 8, epochs=1, seed=0)]
)
def test_nan_image_in_a_loader(make):
    records = [{"image": np.full((4, 4, 1), i, np.float32)} for i in range(20)]
    records[13]["image"][0, 0, 0] = np.nan
    with pytest.raises(
        DataError, match=r"'image' has NaN or infinite values in example ids \[13\]"
    ):
        list(make(Records(records)))


def test_duplicate_ids_for_a_loader():
    with pytest.raises(DataError, match=r"duplicate example ids: \[3, 7\]"):
        scoring_loader(points(), 8, ids=np.array([3, 1, 3, 7, 7]))


def test_unequal_shapes():
    records = [{"x": np.zeros(2 + (i == 4), np.float32)} for i in range(8)]
    with pytest.raises(DataError, match=r"'x' of example 4 has shape \(3,\), .*example 0 \(2,\)"):
        list(scoring_loader(Records(records), 8))


def test_unequal_fields():
    records = [{"x": np.zeros(2)} for _ in range(8)]
    records[5] = {"z": np.zeros(2)}
    with pytest.raises(DataError, match=r"example 5 has fields \['z'\], example 0 \['x'\]"):
        list(scoring_loader(Records(records), 8))


@pytest.mark.parametrize("name", ["example_id", "mask"])
def test_reserved_field_name(name):
    source = ArraySource({"x": np.zeros((3, 2)), name: np.zeros(3)})
    with pytest.raises(DataError, match=rf"fields \['{name}'\], which the loader makes itself"):
        list(scoring_loader(source, 8))


# Weights.


@pytest.mark.parametrize(
    ("weight_N", "message"),
    [
        (np.ones(19), r"\(19,\) weights for 20 examples"),
        (np.ones((20, 1)), r"\(20, 1\) weights for 20 examples"),
        (np.where(np.arange(20) == 6, -0.5, 1.0), r"infinite for 1 examples, ids \[6\]"),
        (np.where(np.arange(20) == 9, np.inf, 1.0), r"infinite for 1 examples, ids \[9\]"),
        (np.full(20, np.nan), "no example is left to train on"),
    ],
    ids=["length", "rank", "negative", "infinite", "none"],
)
def test_bad_weights(weight_N, message):
    with pytest.raises(DataError, match=message):
        training_loader(points(), 8, epochs=1, seed=0, weight_N=weight_N)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 2.0, -3.0], r"'weight' is negative in example ids \[1, 3\]"),
        ([np.ones(2)] * 4, r"must be a number per example; in example \d it has shape \(2,\)"),
    ],
)
def test_bad_weight_field(weights, message):
    source = Records([{"x": np.zeros(2, np.float32), "weight": weight} for weight in weights])
    with pytest.raises(DataError, match=message):
        list(training_loader(source, 8, epochs=1, seed=0))
