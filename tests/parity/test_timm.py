"""The residual networks against timm's, with random weights and BatchNorm statistics."""

import functools
import types

import jax
import numpy as np
import pytest
import timm
import torch
import torchvision
from flax import nnx
from helpers import devices_mesh
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from easy_jax.config import RESNETS, OptimizerConfig, ResNetConfig
from easy_jax.core import optim
from easy_jax.core.losses import classification_loss
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import ArraySource
from easy_jax.models import resnet
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.parallel.sharding import shard_batch
from easy_jax.pretrained import timm_weights
from easy_jax.train import scoring

pytestmark = pytest.mark.filterwarnings("default")  # torch's and timm's own are theirs

CLASSES = 7
BATCH_SIZE = 8
SIZE = 64  # of the images, in pixels
TRAINED = ("resnet18", "resnet50")  # one of each kind of block
TOLERANCE = 1e-4
# Momentum and weight decay are the authors'.
SGD = OptimizerConfig(learning_rate=3e-4, schedule="constant", momentum=0.9, weight_decay=5e-4)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(name)`: the folder that timm writes of a network of its own."""
    return functools.cache(lambda name: _write(name, tmp_path_factory.mktemp(name)))


def _write(name, folder):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            # timm starts with 1 and, at the ends of blocks, with 0, which would hide the blocks.
            norm.weight += torch.empty(norm.num_features).uniform_(0.1, 0.3)
            # Few values lie at the kink of ReLU, where rounding would decide about gradients.
            norm.bias.uniform_(1.0, 2.0)
            norm.momentum = 1.0
        model.train()(_torch(_images(seed=1)))
        for norm in norms:
            # Random, but near those of images: others would blow the activations up.
            norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn(norm.num_features)
            norm.running_var *= torch.empty(norm.num_features).uniform_(0.5, 2.0)
            norm.num_batches_tracked.fill_(123)
        # Small logits: rounding grows with them, in timm as here.
        model.fc.weight.normal_(0.0, 0.3 * model.num_features**-0.5)
        model.fc.bias.normal_()
    save_for_hf(model, folder, safe_serialization=True)
    return folder


def _timm(folder):
    """What timm loads from a folder, in eval mode."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _load(folder):
    return timm_weights.load(folder, mesh=devices_mesh(1))


def _images(seed=0):
    """Noise, on colours of their own, so that images differ as a whole."""
    rng = np.random.default_rng(seed)
    colour_BHWC = 2 * rng.normal(size=(BATCH_SIZE, 1, 1, 3))
    return np.float32(colour_BHWC + rng.normal(size=(BATCH_SIZE, SIZE, SIZE, 3)))


def _batch(seed=0):
    label_B = np.random.default_rng(seed).integers(0, CLASSES, BATCH_SIZE).astype(np.int32)
    return {"image": _images(seed), "label": label_B}


def _torch(image_BHWC):
    return torch.from_numpy(image_BHWC.transpose(0, 3, 1, 2).copy())


def _assert_close(actual, expected, what=""):
    """Within the tolerance: of values up to 1 absolutely, of larger ones relatively."""
    actual, expected = np.float64(actual), np.float64(expected)
    np.testing.assert_allclose(actual, expected, TOLERANCE, TOLERANCE, err_msg=what)


def _assert_trained_alike(state, theirs, name, start, folder):
    """Parameters and running statistics, and what training changed in them, by what is exported."""
    timm_weights.export(state, ResNetConfig.named(name), folder)
    ours, before = (load_file(path / "model.safetensors") for path in (folder, start))
    expected = theirs.state_dict()
    assert ours.keys() == expected.keys()
    for key in expected:
        if not key.endswith("num_batches_tracked"):
            _assert_close(ours[key], expected[key], key)
            change = expected[key] - before[key]
            rounding = torch.finfo(torch.float32).eps * expected[key].norm()
            assert (ours[key] - expected[key]).norm() < 0.01 * change.norm() + rounding, key


@pytest.mark.parametrize("name", RESNETS)
def test_logits(name, make):
    image_BHWC = _images()
    with torch.no_grad():
        expected_BK = _timm(make(name))(_torch(image_BHWC)).numpy()
    assert expected_BK.std(axis=0).min() > 0.02  # they depend on the image
    logits_BK = nnx.jit(eval_mode(_load(make(name))))(image_BHWC)
    np.testing.assert_allclose(logits_BK, expected_BK, rtol=0, atol=TOLERANCE)


# Training.


@pytest.fixture(scope="module")
def trainer(make):
    """`trainer(name)`: our network, its state before training, and a step of SGD."""

    @functools.cache
    def build(name):
        model = train_mode(_load(make(name)))
        optimizer = optim.make_optimizer(SGD, total_steps=3)
        step = make_train_step(
            nnx.graphdef(model), classification_loss, optimizer, reduction="example_mean"
        )
        start = functools.partial(init_train_state, model, optimizer, mesh=devices_mesh(1))
        return types.SimpleNamespace(model=model, start=start, step=step)

    return build


def _torch_sgd(model):
    return torch.optim.SGD(
        model.parameters(), SGD.learning_rate, SGD.momentum, weight_decay=SGD.weight_decay
    )


def _torch_losses(model, batch):
    label_B = torch.from_numpy(batch["label"]).long()
    return torch.nn.functional.cross_entropy(
        model(_torch(batch["image"])), label_B, reduction="none"
    )


@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_of_sgd(name, make, trainer, tmp_path, monkeypatch):
    theirs, ours = _timm(make(name)).train(), trainer(name)
    optimizer, state = _torch_sgd(theirs), ours.start()
    ones = {"weight": np.ones(BATCH_SIZE, np.float32), "mask": np.ones(BATCH_SIZE, bool)}
    for seed in (2, 3, 4):
        optimizer.zero_grad()
        loss = _torch_losses(theirs, _batch(seed)).mean()
        loss.backward()
        optimizer.step()
        state, metrics = ours.step(state, shard_batch(_batch(seed) | ones, devices_mesh(1)))
        _assert_close(metrics["loss"], loss.item())
    _assert_trained_alike(state.model_state(), theirs, name, make(name), tmp_path / "trained")

    # What every BatchNorm makes of a batch, in the order of the network.
    expected = []
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            # Cloned: timm's ReLU works in place.
            module.register_forward_hook(lambda _, inputs, output: expected.append(output.clone()))
    with torch.no_grad():
        theirs(_torch(_images(seed=5)))
    model = nnx.merge(nnx.graphdef(ours.model), state.model_state())
    actual = _batch_norm_outputs(model, _images(seed=5), monkeypatch)
    assert len(actual) == len(expected) == sum("running_var" in key for key in theirs.state_dict())
    for number, (y_BHWC, y_BCHW) in enumerate(zip(actual, expected, strict=True)):
        _assert_close(y_BHWC, y_BCHW.numpy().transpose(0, 2, 3, 1), f"BatchNorm {number}")


def _batch_norm_outputs(model, image_BHWC, monkeypatch):
    outputs = []
    normalise = resnet.BatchNorm.__call__

    def record(self, x_BHWC, mask_B=None):
        outputs.append(normalise(self, x_BHWC, mask_B))
        return outputs[-1]

    def forward(state):
        nnx.merge(graphdef, state, copy=True)(image_BHWC)
        return outputs

    graphdef, state = nnx.split(model)
    with monkeypatch.context() as patch:
        patch.setattr(resnet.BatchNorm, "__call__", record)
        return jax.jit(forward)(state)


@pytest.mark.parametrize("name", TRAINED)
def test_a_step_of_the_authors_objective(name, make, trainer, tmp_path):
    """mean_i w_i f_i with w_i = exp(-f_i / tau) by the frozen probed network; tau, a median."""
    batch = {key: array[:-1] for key, array in _batch(seed=6).items()}  # an odd number: one median
    theirs, frozen = _timm(make(name)).train(), _timm(make(name))
    with torch.no_grad():
        frozen_loss_B = _torch_losses(frozen, batch)
    weight_B = torch.exp(-frozen_loss_B / frozen_loss_B.median())
    optimizer = _torch_sgd(theirs)
    loss = (weight_B * _torch_losses(theirs, batch)).mean()
    loss.backward()
    optimizer.step()

    ours = trainer(name)
    table = scoring.score(
        ours.model,
        ArraySource(batch),
        tmp_path / "table",
        loss_fn=classification_loss,
        batch_size=BATCH_SIZE,
        mesh=devices_mesh(1),
    )
    _assert_close(table.flow_weights(), weight_B.numpy())
    batch["weight"] = table.flow_weights()
    # A last example that is padding, which neither the loss nor BatchNorm may see.
    padded = {key: np.concatenate([array, array[:1]]) for key, array in batch.items()}
    mask_B = np.arange(BATCH_SIZE) < BATCH_SIZE - 1
    state, metrics = ours.step(
        ours.start(), shard_batch(padded | {"mask": mask_B}, devices_mesh(1))
    )
    _assert_close(metrics["loss"], loss.item())
    _assert_trained_alike(state.model_state(), theirs, name, make(name), tmp_path / "trained")


# Files.


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_exported_loads_in_timm_bit_by_bit(name, make, tmp_path):
    folder = make(name)
    config = timm_weights.read_config(folder)
    timm_weights.export(_load(folder), config, tmp_path / "out", base=folder)
    theirs, again = _timm(folder), _timm(tmp_path / "out")
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for key, tensor in again.state_dict().items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
    assert again.num_classes == CLASSES
    for key in ("mean", "std", "interpolation", "crop_pct"):
        assert again.pretrained_cfg[key] == theirs.pretrained_cfg[key], key
    image_BCHW = _torch(_images())
    with torch.no_grad():
        assert torch.equal(again(image_BCHW), theirs(image_BCHW))


def test_a_state_dict_of_torchvision(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(num_classes=3).eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        expected_BK = theirs(_torch(_images())).numpy()
    logits_BK = nnx.jit(eval_mode(_load(tmp_path)))(_images())
    np.testing.assert_allclose(logits_BK, expected_BK, rtol=0, atol=TOLERANCE)
