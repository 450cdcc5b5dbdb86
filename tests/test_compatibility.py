"""Heads, class names and pixels that do not fit the data are told before anything is computed."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import Records
from image_data import write_folder

import easy_jax as ej
from easy_jax.config import RESNETS, ConfigError
from easy_jax.data import ArraySource, DataError, DataWarning, Splits
from easy_jax.data.image_folders import FolderImages
from easy_jax.data.images import Transforms
from easy_jax.experiments.image_networks import ImageNetworks
from easy_jax.models.classifier import ClassifierInfo
from easy_jax.models.resnet import head_params
from easy_jax.pretrained.weight_files import WeightsError
from easy_jax.train import compatibility, evaluate, fitting, forward

TINY = ej.ResNetConfig(in_channels=3, width=4, depths=(1,))


class MLP(nnx.Module):
    """A user's own: no `head`, no `info`, no mask."""

    def __init__(self, outputs):
        self.first = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        self.last = nnx.Linear(8, outputs, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))


def own_loss(model, batch):
    return ej.softmax_cross_entropy(model(batch["x"]), batch["label"])


def points(classes=3, num_classes=None, size=12):
    rng = np.random.default_rng(0)
    fields = {
        "x": rng.normal(size=(size, 4)).astype(np.float32),
        "label": np.arange(size) % classes,
    }
    return ArraySource(fields, num_classes)


@pytest.fixture
def images(tmp_path):
    folder = write_folder(tmp_path / "train", classes=("cat", "dog"), per_class=4)
    return ej.ImageSource(FolderImages(folder), Transforms(image_size=8, resize_size=9))


@pytest.fixture
def nothing_runs(monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(forward, "make_score_step", compiled)
    monkeypatch.setattr(evaluate, "_make_step", compiled)
    monkeypatch.setattr(fitting, "_compiled", compiled)


STAGE = ej.StageConfig(batch_size=8)


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("outputs", [1000, 1])
def test_a_head_of_another_size_is_refused(images, outputs, tmp_path):
    model = ej.ResNet(TINY, outputs, rngs=nnx.Rngs(0))
    has = f"has {outputs} output{'s' if outputs > 1 else ''} and the data 2 classes"
    what = rf"the model {has}; .*easy_jax\.new_head\(model, 2\)"
    with pytest.raises(DataError, match=what):
        ej.score(model, images, tmp_path / "t", loss_fn=ej.classification_loss, batch_size=8)
    with pytest.raises(DataError, match=what):
        ej.fit(model, images, tmp_path / "c", stage=STAGE, loss_fn=ej.classification_loss)
    with pytest.raises(DataError, match=what):
        ej.classification(model, images, batch_size=8)
    written = [path.name for name in "tc" for path in (tmp_path / name).glob("*")]
    assert written == []


@pytest.mark.usefixtures("nothing_runs")
def test_a_model_and_a_loss_of_ones_own(tmp_path):
    with pytest.raises(DataError, match=r"has 5 outputs and the data 3 classes"):
        ej.score(MLP(5), points(3, 3), tmp_path, loss_fn=own_loss, batch_size=8)
    with pytest.raises(DataError, match=r"has 5 outputs and the data 3 classes"):
        ej.fit(MLP(5), points(3, 3), tmp_path, stage=STAGE, loss_fn=own_loss)


@pytest.mark.usefixtures("nothing_runs")
def test_labels_beyond_the_outputs_are_named_before_compilation(tmp_path):
    source = points(3)
    source.fields["label"][[2, 7]] = (4, -1)
    what = r"has 4 outputs, and field 'label' is out of range for 4 .*2 examples, ids \[2, 7\]"
    with pytest.raises(DataError, match=what):
        ej.score(MLP(4), source, tmp_path, loss_fn=own_loss, batch_size=8)
    with pytest.raises(DataError, match=what):
        ej.fit(MLP(4), source, tmp_path, stage=STAGE, loss_fn=own_loss)


@pytest.mark.slow
def test_labels_of_examples_that_are_dropped_may_be_wrong(tmp_path):
    source = points(3)
    source.fields["label"][5] = 4
    options = {"loss_fn": own_loss, "batch_size": 8}
    table = ej.score(MLP(4), source, tmp_path / "t", on_bad_example="drop", **options)
    assert table.metadata["dropped_ids"] == [5]
    weight_N = table.flow_weights()
    assert np.flatnonzero(np.isnan(weight_N)).tolist() == [5]
    ej.fit(MLP(4), source, tmp_path / "c", stage=STAGE, loss_fn=own_loss, weight_N=weight_N)


def test_what_is_not_known_is_not_guessed():
    """No number of classes, labels not in memory, or a loss of another kind: nothing to compare."""
    records = Records([{"x": np.zeros(4, np.float32), "label": np.int32(7)}])
    compatibility.check_classifier(MLP(3), records, own_loss)

    def sigmoid(model, batch):
        logit_B = model(batch["x"])[:, 0]
        loss_B = optax.sigmoid_binary_cross_entropy(logit_B, batch["label"])
        return loss_B, jnp.ones_like(loss_B)

    compatibility.check_classifier(MLP(1), points(2, 2), sigmoid)


# A new head.


@pytest.mark.slow
def test_a_new_head_keeps_the_rest(images, tmp_path):
    model = ej.ResNet(TINY, 1000, rngs=nnx.Rngs(0))
    before = model.head.kernel[...]
    other = ej.new_head(model, images.num_classes, classes=images.classes, seed=3)
    assert (other.head.out_features, other.head.kernel[...].shape) == (2, (4, 2))
    assert model.head.out_features == 1000 and model.info.classes == ()
    assert other.info.classes == ("cat", "dog")
    np.testing.assert_array_equal(model.head.kernel[...], before)
    assert not other.head.bias[...].any() and other.head.kernel[...].std() > 0
    paths = dict(nnx.to_flat_state(nnx.state(model)))
    for path, variable in nnx.to_flat_state(nnx.state(other)):
        if path[0] != "head":
            np.testing.assert_array_equal(variable.get_value(), paths[path].get_value())
    metadata = other.head.kernel.get_metadata()["logical_axes"]
    assert metadata == model.head.kernel.get_metadata()["logical_axes"]
    assert len(jax.tree.leaves(nnx.state(other, head_params))) == 2
    again, another = ej.new_head(model, 2, seed=3), ej.new_head(model, 2, seed=4)
    np.testing.assert_array_equal(again.head.kernel[...], other.head.kernel[...])
    assert (another.head.kernel[...] != other.head.kernel[...]).all()
    table = ej.score(other, images, tmp_path, loss_fn=ej.classification_loss, batch_size=8)
    assert table.num_examples == 8


def test_heads_that_cannot_be():
    model = ej.ResNet(TINY, 7, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"MLP has no `head` that is an nnx\.Linear"):
        ej.new_head(MLP(3), 2)
    with pytest.raises(ConfigError, match="num_classes is 0; it must be positive"):
        ej.new_head(model, 0)
    with pytest.raises(ConfigError, match="class names is 2; it must be num_classes, which is 3"):
        ej.new_head(model, 3, classes=["a", "b"])


# Names and pixels.


def test_class_names_are_compared(images):
    model = ej.ResNet(TINY, 2, rngs=nnx.Rngs(0))

    def check(*classes):
        model.info = ClassifierInfo(classes)
        compatibility.check_classifier(model, images, ej.classification_loss)

    check()
    check("cat", "dog")
    check("0", "1")  # no names
    with pytest.raises(DataError, match=r"in another order: class 0 is 'dog' .* and 'cat' of the"):
        check("dog", "cat")
    with pytest.raises(
        DataError,
        match=r"\['cat', 'owl'\], are not .*'dog'\]: it has no 'dog'; "
        r"give it a new head",
    ):
        check("cat", "owl")


def test_numbers_in_natural_order_are_explained():
    text = ["0", "1", "10", "2"]
    with pytest.raises(
        DataError,
        match=r"class 2 is '2' of the model and '10' of the data\. The "
        r"model's are in the order of their numbers",
    ):
        compatibility.check_names(["0", "1", "2", "10"], text)
    compatibility.check_names(text, text)
    # Names that count are compared with the same in another order only.
    counted = [str(number) for number in range(11)]
    for pair in ((counted, sorted(counted)), (sorted(counted), counted)):
        with pytest.raises(DataError, match=r"in another order: class 2 is '(2|10)' of the model"):
            compatibility.check_names(*pair)
    compatibility.check_names(counted, [f"class {name}" for name in counted])
    assert sorted(text, key=compatibility.natural_key) == ["0", "1", "2", "10"]


def test_what_data_tell_of_themselves(images):
    info = ClassifierInfo.of(images)
    assert info.classes == ("cat", "dog")
    assert (info.mean, info.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert ClassifierInfo.of(points(3, 3)) == ClassifierInfo()


def test_another_normalisation_is_told(images):
    model = ej.ResNet(TINY, 2, rngs=nnx.Rngs(0))
    model.info = ClassifierInfo(mean=(0.485, 0.456, 0.4061), std=(0.229, 0.224, 0.225))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compatibility.check_classifier(model, images, ej.classification_loss)
    model.info = ClassifierInfo(mean=(0.485, 0.456, 0.406), std=(0.5, 0.5, 0.5))
    what = r"images of std \(0\.5, 0\.5, 0\.5\); the data's are normalised with \(0\.229, 0\.224,"
    with pytest.warns(DataWarning, match=what):
        compatibility.check_classifier(model, images, ej.classification_loss)


# In and out of timm's folders.

RESNET18 = ej.ResNetConfig.named("resnet18")


def _config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_names_and_pixels_travel_with_an_export(images, tmp_path):
    model = ej.new_head(ej.ResNet(RESNET18, 7, rngs=nnx.Rngs(0)), 2, classes=["犬", "cat"])
    model.info = dataclasses.replace(model.info, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    ej.timm_weights.export(model, RESNET18, tmp_path / "first")
    content = _config(tmp_path / "first")
    assert content["label_names"] == ["犬", "cat"]
    assert content["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    again = ej.timm_weights.load(tmp_path / "first")
    assert again.info == model.info == ej.timm_weights.read_info(tmp_path / "first")
    with pytest.raises(DataError, match=r"classes, \['犬', 'cat'\], are not the data's"):
        ej.score(again, images, tmp_path / "t", loss_fn=ej.classification_loss, batch_size=8)
    # What is known of a fine-tuned network wins over what it started from.
    tuned = ej.new_head(again, 3, classes=["a", "b", "c"])
    ej.timm_weights.export(tuned, RESNET18, tmp_path / "second", base=tmp_path / "first")
    assert _config(tmp_path / "second")["label_names"] == ["a", "b", "c"]
    assert _config(tmp_path / "second")["pretrained_cfg"]["std"] == [0.2, 0.2, 0.1]
    state = nnx.state(ej.new_head(again, 3))
    with pytest.raises(WeightsError, match="has 3 outputs, and there are names of 2 classes"):
        ej.timm_weights.export(state, RESNET18, tmp_path / "third", info=again.info)
    assert not (tmp_path / "third").exists()
    ej.timm_weights.export(state, RESNET18, tmp_path / "third")
    assert "label_names" not in _config(tmp_path / "third")

    content = _config(tmp_path / "first")
    for change, what in (
        ({"label_names": ["a"]}, "label_names is not a list of 2 names"),
        ({"label_names": ["a", 3]}, "label_names is not a list of 2 names"),
        ({"label_names": {"0": "a"}}, "label_names is not a list of 2 names"),
    ):
        text = json.dumps({**content, **change})
        (tmp_path / "first" / "config.json").write_text(text)
        with pytest.raises(WeightsError, match=what):
            ej.timm_weights.read_info(tmp_path / "first")
    text = json.dumps({**content, "label_names": {"1": "b", "0": "a"}})
    (tmp_path / "first" / "config.json").write_text(text)
    assert ej.timm_weights.read_info(tmp_path / "first").classes == ("a", "b")


@pytest.mark.slow
def test_given_weights_are_compared_with_the_task(images, tmp_path, monkeypatch):
    """What `easy-jax` does with `model.path`, by all that `config.json` tells."""
    monkeypatch.setitem(RESNETS, "small", ("basic", (1,)))
    config = ej.ResNetConfig.named("small", path=str(tmp_path / "network"))
    model = ej.new_head(ej.ResNet(config, 7, rngs=nnx.Rngs(0)), 2, classes=images.classes)
    ej.timm_weights.export(model, config, tmp_path / "network", info=model.info)
    networks = ImageNetworks(config, ej.make_mesh())
    task = Splits(None, None, images, images.classes)
    kernel = networks.given(task, "pets")["head"]["kernel"]
    np.testing.assert_array_equal(kernel[...], model.head.kernel[...])

    content = _config(tmp_path / "network")
    for change, error, what in (
        ({"label_names": ["dog", "cat"]}, DataError, "network's classes are the data's in another"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}, ConfigError, r"for pets: .* mean \(0\.5, "),
    ):
        text = json.dumps({**content, **change})
        (tmp_path / "network" / "config.json").write_text(text)
        with pytest.raises(error, match=what):
            networks.given(task, "pets")
    other = Splits(None, None, images, ["a", "b", "c"])
    (tmp_path / "network" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="network has 2 classes; pets, the pre-training task, ha"):
        networks.given(other, "pets")
