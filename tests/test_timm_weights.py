"""Residual networks' checkpoints in and out, and what is said about those that cannot be read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import devices_mesh
from safetensors.numpy import load_file, save_file

from easy_jax.config import ConfigError, ResNetConfig
from easy_jax.models.resnet import ResNet
from easy_jax.parallel import sharding
from easy_jax.pretrained import timm_weights, weight_files
from easy_jax.pretrained.weight_files import WeightsError

TINY = ResNetConfig(in_channels=3, width=8, depths=(1, 1), block="bottleneck", stem="imagenet")
RESNET18 = ResNetConfig.named("resnet18")
CLASSES = 5
KERNELS = {
    "conv1": (8, 3, 7, 7),
    "layer1.0.conv1": (8, 8, 1, 1),
    "layer1.0.conv2": (8, 8, 3, 3),
    "layer1.0.conv3": (32, 8, 1, 1),
    "layer1.0.downsample.0": (32, 8, 1, 1),
    "layer2.0.conv1": (16, 32, 1, 1),
    "layer2.0.conv2": (16, 16, 3, 3),
    "layer2.0.conv3": (64, 16, 1, 1),
    "layer2.0.downsample.0": (64, 32, 1, 1),
}


def _tiny_tensors():
    """Every tensor of `TINY`, spelt out."""
    rng = np.random.default_rng(0)
    tensors = {"fc.weight": rng.normal(size=(CLASSES, 64)), "fc.bias": rng.normal(size=CLASSES)}
    for name, shape in KERNELS.items():
        tensors[f"{name}.weight"] = rng.normal(size=shape)
        norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{norm}.{leaf}"] = rng.uniform(0.5, 1.5, size=shape[0])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint of `TINY`, without `config.json`; to be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(_tiny_tensors(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """A ResNet-18 of random numbers, as exported; not to be changed."""
    folder = tmp_path_factory.mktemp("resnet18") / "model"
    timm_weights.export(_random_state(RESNET18), RESNET18, folder)
    return folder


def _random_state(config):
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: ResNet(config, CLASSES, rngs=nnx.Rngs(0)))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 1.0, size=x.shape), x.dtype), nnx.state(model)
    )


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def _write_config(folder, **content):
    (folder / "config.json").write_text(json.dumps(content))


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name


# What can be read.


def test_every_tensor_has_its_place(folder):
    model, tensors = timm_weights.load(folder, TINY, mesh=devices_mesh(1)), _tiny_tensors()
    kernel = model.blocks[1].conv2.kernel[...]
    np.testing.assert_array_equal(kernel, tensors["layer2.0.conv2.weight"].transpose(2, 3, 1, 0))
    norm = model.blocks[1].downsample_bn
    for ours, theirs in (("scale", "weight"), ("mean", "running_mean"), ("var", "running_var")):
        expected = tensors[f"layer2.0.downsample.1.{theirs}"]
        np.testing.assert_array_equal(getattr(norm, ours)[...], expected)
    np.testing.assert_array_equal(model.head.kernel[...], tensors["fc.weight"].T)


def test_weights_are_loaded_in_their_shards(folder):
    mesh = devices_mesh(8, fsdp=8)
    model = timm_weights.load(folder, TINY, mesh=mesh)
    whole = nnx.state(timm_weights.load(folder, TINY, mesh=devices_mesh(1)))
    state = nnx.state(model)
    leaves = jax.tree.leaves(state)
    for leaf, expected, place in zip(
        leaves,
        jax.tree.leaves(whole),
        jax.tree.leaves(sharding.tree_shardings(state, mesh)),
        strict=True,
    ):
        assert leaf.sharding == place and leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, expected)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert held < sum(leaf.nbytes for leaf in leaves) / 4


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_other_floats_become_float32(folder, dtype):
    _change(folder, lambda t: t.update({"fc.bias": t["fc.bias"].astype(dtype)}))
    model = timm_weights.load(folder, TINY, mesh=devices_mesh(1))
    expected = _tiny_tensors()["fc.bias"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(model.head.bias[...], expected)
    assert model.head.bias[...].dtype == jnp.float32


@pytest.mark.slow
def test_what_is_loaded_in_shards_is_exported(resnet18, tmp_path):
    base = shutil.copytree(resnet18, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "tag": "a1_in1k"}
    _write_config(base, **config)
    _change(base, lambda t: t.update({"bn1.num_batches_tracked": np.array(123)}))
    model = timm_weights.load(base, mesh=devices_mesh(8, fsdp=4))
    timm_weights.export(model, RESNET18, tmp_path / "out", base=base)
    written, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "out", base))
    _assert_same(written, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architecture"] == "resnet18" and config["num_classes"] == CLASSES
    assert config["pretrained_cfg"]["mean"] == [0.1, 0.2, 0.3]
    assert "tag" not in config["pretrained_cfg"]  # which names the weights
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.slow
def test_the_network_is_known_with_and_without_config_json(resnet18, tmp_path):
    found = timm_weights.read_config(resnet18)
    assert found == ResNetConfig.named("resnet18", path=str(resnet18))
    shutil.copy(resnet18 / "model.safetensors", tmp_path)
    assert timm_weights.read_config(tmp_path).name() == "resnet18"


# What cannot.


def _assert_refused(folder, message, config=TINY, error=WeightsError):
    with pytest.raises(error, match=message):
        timm_weights.load(folder, config, mesh=devices_mesh(1))


@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight", "layer1.0.bn2.running_mean"])
def test_missing_tensor(folder, name):
    _change(folder, lambda t: t.pop(name))
    _assert_refused(folder, rf"checkpoint in .*model lacks 1 tensors: {name}$")


def test_extra_tensor(folder):
    _change(folder, lambda t: t.update({"layer1.0.se.fc1.weight": t["fc.weight"]}))
    _assert_refused(
        folder, r"has 1 tensors that the model has no place for: layer1.0.se.fc1.weight"
    )


@pytest.mark.parametrize("name", ["layer2.0.conv1.weight", "bn1.bias", "fc.bias", "conv1.weight"])
def test_other_shape(folder, name):
    _change(folder, lambda t: t.update({name: t[name][:-1].copy()}))
    _assert_refused(folder, rf"model.safetensors: {name} has shape \(.*the network's is \(")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_a_value_that_is_not_finite(folder, value):
    def change(tensors):
        tensors["bn1.bias"] = tensors["bn1.bias"].astype(np.float64)
        tensors["bn1.bias"][3] = value

    _change(folder, change)
    in_the_file = r"model.safetensors: 1 of 8 values of bn1.bias are NaN or infinite"
    beyond_float32 = r"model.safetensors: bn1.bias has 1 values that are not finite"
    _assert_refused(folder, beyond_float32 if value == 1e300 else in_the_file)


def test_negative_variance(folder):
    _change(folder, lambda t: t["layer1.0.bn1.running_var"].__setitem__(0, -0.1))
    _assert_refused(folder, r"layer1.0.bn1.running_var has negative values, which no variance has")


def test_integers(folder):
    _change(folder, lambda t: t.update({"fc.bias": t["fc.bias"].astype(np.int32)}))
    _assert_refused(folder, r"model.safetensors: fc.bias has dtype int32, not a float's")


def test_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "resnet50-0676ba61.pth")
    _assert_refused(folder, r"\['resnet50-0676ba61.pth'\] are pickles.*safetensors.torch.save_file")


def test_a_damaged_file(folder):
    (folder / "model.safetensors").write_bytes(b"\x10")
    _assert_refused(folder, r"model.safetensors is damaged or not a safetensors file")


def test_no_folder():
    _assert_refused("nowhere/at/all", r"there is no folder nowhere/at/all")


def test_tensors_of_no_network_that_is_known(folder):
    with pytest.raises(
        WeightsError, match=r"has no config.json, and tensors of none of \['resnet18"
    ):
        timm_weights.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"architecture": "resnetblur50"}, r"architecture is 'resnetblur50'; supported are \['res"),
        ({"model_type": "resnet"}, r"architecture is None"),
        ({"architecture": "resnet50", "global_pool": "max"}, r"global_pool is 'max'"),
        ({"architecture": "resnet50", "model_args": {"global_pool": "max"}}, r"pool is 'max'"),
        ({"architecture": "resnet50", "model_args": {"output_stride": 8}}, r"\['output_stride'\]"),
        ({"architecture": "resnet50", "model_args": [8]}, r"model_args is not a JSON object"),
    ],
)
def test_config_json_of_a_network_that_there_is_not_here(folder, content, message):
    _write_config(folder, **content)
    _assert_refused(folder, rf"config.json: .*{message}", None, ConfigError)


def test_config_json_of_another_network_than_configured(folder):
    _write_config(folder, architecture="resnet50")
    _assert_refused(folder, r"config.json: architecture is 'resnet50'.*is resnet18$", RESNET18)


@pytest.mark.slow
def test_config_json_of_another_network_than_the_tensors(resnet18, tmp_path):
    folder = shutil.copytree(resnet18, tmp_path / "model")
    _write_config(folder, architecture="resnet34")
    _assert_refused(folder, r"lacks \d+ tensors: .*; they are of resnet18, not resnet34", None)


def test_config_json_of_another_number_of_classes(resnet18, tmp_path):
    folder = shutil.copytree(resnet18, tmp_path / "model")
    _write_config(folder, architecture="resnet18", num_classes=1000)
    _assert_refused(folder, r"config.json: num_classes is 1000; the head, fc.weight, has 5", None)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "not a JSON object")])
def test_config_json_that_is_none(folder, text, message):
    (folder / "config.json").write_text(text)
    _assert_refused(folder, rf"config.json .*{message}")


def test_files_asked_for_what_they_do_not_have(folder):
    path = folder / "model.safetensors"
    with pytest.raises(WeightsError, match=r"has no tensor nothing, which the index places there"):
        weight_files.tensor_shape(path, "nothing")
    _change(folder, lambda t: t.update({"fc.bias": t["fc.bias"].astype(np.int32)}))
    with pytest.raises(WeightsError, match=r"fc.bias has dtype I32; supported: \['BF16'"):
        weight_files.tensor_dtype(path, "fc.bias")


# Exports that are refused.


@pytest.mark.slow
def test_export_does_not_overwrite(resnet18, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    with pytest.raises(WeightsError, match=r"out is not empty; export into a new folder"):
        timm_weights.export(_random_state(RESNET18), RESNET18, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_export_of_a_network_that_timm_does_not_have(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be exported; timm has \['resnet18'"):
        timm_weights.export(_random_state(TINY), TINY, tmp_path / "out")


@pytest.mark.slow
def test_export_of_another_network(resnet18, folder, tmp_path):
    state = _random_state(RESNET18)
    with pytest.raises(WeightsError, match=r"is not the resnet34 that its configuration says"):
        timm_weights.export(state, ResNetConfig.named("resnet34"), tmp_path / "out")
    with pytest.raises(WeightsError, match=r"lacks \d+ tensors"):
        timm_weights.export(state, RESNET18, tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()


def test_an_unknown_name():
    with pytest.raises(ConfigError, match=r"'resnet51'.*one of \['resnet18'"):
        ResNetConfig.named("resnet51")
