"""What a model and records must be: each mistake is one sentence with its cure."""

import flax.linen
import numpy as np
import pytest
from contract_runs import LABEL, STAGE, Model, X, fit, losses, score, tiny_model
from flax import nnx
from helpers import Records

import easy_jax as ej
from easy_jax import data
from easy_jax.core.losses import ContractError

# Models.


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(2)(x)


@pytest.mark.parametrize("run", [score, fit])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (LinenModel(), r"not a Flax Linen module \(LinenModel\): .*nnx\.bridge\.ToNNX"),
        (Model, "not the class Model: give an object"),
        (nnx.split(Model()), "not a tuple: give the module, nnx.merge"),
        (losses, "not a function$"),
    ],
    ids=["linen", "class", "split", "function"],
)
def test_models_that_are_none(model, message, run, tmp_path):
    with pytest.raises(ContractError, match=f"takes a Flax NNX module, {message}"):
        run(losses, tmp_path, model=model)


IMAGES = ej.ArraySource({"image": X, "label": LABEL})


def test_a_model_that_takes_no_mask(tmp_path):
    message = (
        r"classification_loss calls model\(image, mask\), and Model.__call__\(self, x\) does not "
        r"take that: give it a second argument, mask=None .*or give a loss function of your own"
    )
    for run in (score, fit):
        with pytest.raises(ContractError, match=message):
            run(ej.classification_loss, tmp_path, IMAGES)


class Masked(Model):
    result = staticmethod(lambda logits: logits)

    def __call__(self, x, mask=None):
        return self.result(self.head(x))


class Pair(Masked):
    result = staticmethod(lambda logits: (logits, None))


class Sum(Masked):
    result = staticmethod(lambda logits: logits.sum(axis=1))


def test_what_a_model_of_images_returns(tmp_path):
    assert score(ej.classification_loss, tmp_path / "right", IMAGES, Masked()).num_examples == 20
    for model, found in ((Pair(), "Pair returned tuple"), (Sum(), r"an array of shape \(\d,\)")):
        with pytest.raises(
            ContractError, match=rf"needs logits of shape \(\d, classes\), .*{found}"
        ):
            score(ej.classification_loss, tmp_path / "wrong", IMAGES, model)


def test_labels_that_are_not_integers(tmp_path):
    one_hot = ej.ArraySource({"image": X, "label": np.eye(2, dtype=np.float32)[LABEL]})
    with pytest.raises(ContractError, match=r"'label' has shape \(\d, 2\) .*of one-hot .* argmax"):
        score(ej.classification_loss, tmp_path, one_hot, Masked())


# Records.


def test_records_under_other_names(tmp_path):
    source = ej.ArraySource({"x": X, "label": LABEL})
    with pytest.raises(ContractError, match="looks for a field 'image', and the batch has label, "):
        score(ej.classification_loss, tmp_path, source, Masked())
    with pytest.raises(data.DataError, match=r"2, and there is no field 'label'.* are x, y: ren"):
        ej.ArraySource({"x": X, "y": LABEL}, num_classes=2)


@pytest.mark.parametrize("run", [score, fit])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Records(list(zip(X, LABEL, strict=True))), "is a tuple of 2; a record is"),
        (
            Records([{"x": x, "y": y, "text": "a"} for x, y in zip(X, LABEL, strict=True)]),
            r"field 'text' of example 0 holds text \(dtype <U1\), .* leave the field out",
        ),
        (ej.ArraySource({"x": X, "y": LABEL, "text": np.full(20, "a")}), "'text' .* holds text"),
        (ej.ArraySource({"x": X, "y": LABEL, "text": np.full(20, None)}), "'text' .* objects"),
        (Records([{"x": x, "y": {"a": 1}} for x in X]), r"'y' .* holds objects \(dict\)"),
        (Records([{"x": X[0], "y": LABEL[0]}] * 19 + [(X[0], LABEL[0])]), "19 is a tuple of 2"),
        (iter([]), "a list_iterator is no source: it needs a length"),
        (
            ej.ArraySource({"x": X, "y": np.where(LABEL, 2**32, 0)}),
            r"'y' has values that do not fit into int32 in example ids \[",
        ),
    ],
    ids=["tuples", "text", "text_column", "objects", "dicts", "late_tuple", "iterator", "64_bits"],
)
def test_records_that_are_none(source, message, run, tmp_path):
    with pytest.raises(data.DataError, match=message) as error:
        run(losses, tmp_path, source)
    assert "\n" not in str(error.value)


def test_fields_that_are_no_mapping():
    with pytest.raises(data.DataError, match=r"takes a mapping of names to arrays, .* not a tuple"):
        ej.ArraySource((X, LABEL))


@pytest.mark.slow
def test_tokens_outside_of_the_vocabulary(tmp_path):
    model = tiny_model()
    vocab = model.config.vocab
    tokens = ej.TokenSource([1, 2, 3, 1, vocab, 3, 1, 2, 3], [0, 3, 6, 9], [1, 1, 1])
    source = ej.PackedSource(tokens, row_length=8)
    message = rf"token id {vocab} \(in 1 examples, ids \[1\]\), the model a vocabulary of {vocab}"
    with pytest.raises(data.DataError, match=message):
        ej.score(model, source, tmp_path, loss_fn=ej.causal_lm_loss, batch_size=8)
    with pytest.raises(data.DataError, match=message):
        ej.fit(model, source, tmp_path, stage=STAGE, loss_fn=ej.causal_lm_loss)
    with pytest.raises(data.DataError, match="give PackedSource"):
        ej.score(model, tokens, tmp_path, loss_fn=ej.causal_lm_loss, batch_size=8)
