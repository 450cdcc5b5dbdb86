"""Experiments that transfer from given weights to folders of images."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import devices_mesh
from image_data import stage, write_folder

from easy_jax import data
from easy_jax import pipeline as train
from easy_jax.config import (
    RESNETS,
    ConfigError,
    ExperimentConfig,
    ImageDataConfig,
    MethodConfig,
    ResNetConfig,
    TransferDataConfig,
    replace,
)
from easy_jax.core import losses
from easy_jax.core.online_weights import OnlineWeights
from easy_jax.data.images import training_transform, uniforms
from easy_jax.io.sealed import ArtefactError
from easy_jax.models import resnet
from easy_jax.models.modes import eval_mode
from easy_jax.pretrained import timm_weights
from easy_jax.train import evaluate


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two folders of JPEGs."""
    folder = tmp_path_factory.mktemp("photos")
    for task, classes in (("pretrain", ("a", "b", "c", "d")), ("target", ("cat", "dog"))):
        for split in ("train", "test"):
            write_folder(folder / task / split, classes=classes, per_class=10)
    return TransferDataConfig(
        *(
            ImageDataConfig("other", "folder", str(folder / task), image_size=32, threads=2)
            for task in ("pretrain", "target")
        )
    )


@pytest.mark.slow
def test_online_weights_are_of_the_view_trained_on(photos):
    source = data.load_images(photos.target, "train")
    model = eval_mode(resnet.ResNet(ResNetConfig(in_channels=3, width=4), 2, rngs=nnx.Rngs(0)))
    loader = data.training_loader(source, 8, epochs=2, seed=3)
    batch = list(loader)[-1]  # of the second epoch, with padding
    assert not batch["mask"].all()
    weigh = OnlineWeights(model, loss_fn=losses.classification_loss, tau=0.7, mesh=devices_mesh(1))
    ids = batch.pop("example_id")
    batch["weight"] = np.linspace(0.5, 1.0, 8, dtype=np.float32)
    weight_B = np.asarray(weigh(jax.device_put(batch))["weight"])
    views = []
    for example_id in ids[batch["mask"]].tolist():
        encoded, _ = source.store.read([source._positions[example_id]])[0]
        image = data.images.decode(encoded, "", source.transforms.resize_size)
        view = training_transform(image, source.transforms, uniforms(3, 1, example_id))
        views.append((np.asarray(view) / 255.0 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225))
    logits_BK = np.float64(nnx.jit(model)(np.float32(views)))
    label_B = batch["label"][batch["mask"]]
    chosen_B = np.take_along_axis(logits_BK, label_B[:, None], axis=1)[:, 0]
    loss_B = np.log(np.exp(logits_BK).sum(axis=1)) - chosen_B
    expected = batch["weight"][batch["mask"]] * np.exp(-loss_B / 0.7)
    np.testing.assert_allclose(weight_B[batch["mask"]], expected, rtol=1e-4)
    assert (weight_B[~batch["mask"]] == 0).all()


@pytest.fixture(scope="module")
def transfer(photos, tmp_path_factory):
    """An experiment on a given network and folders of JPEGs, and the folder of its inputs."""
    folder = tmp_path_factory.mktemp("transfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RESNETS, "small", ("basic", (1,)))  # compiles faster than resnet18
        model_config = ResNetConfig.named("small")
        network = resnet.ResNet(model_config, 4, rngs=nnx.Rngs(0))
        timm_weights.export(network, model_config, folder / "network")
        (folder / "pretrain").mkdir()
        (folder / "pretrain" / "test").symlink_to(f"{photos.pretrain.path}/test")
        config = ExperimentConfig(
            model=dataclasses.replace(model_config, path=str(folder / "network")),
            data=TransferDataConfig(
                dataclasses.replace(photos.pretrain, path=str(folder / "pretrain")), photos.target
            ),
            probe=stage(2, 0.01),
            finetune=stage(2, 0.01),
            head=stage(),
            learning_rates=(0.01,),
            seeds=(0, 1),
            eval_batch_size=64,
            methods=(
                MethodConfig("linear_probe", trainable="head"),
                MethodConfig("flow", start="probe", weighting="flow"),
            ),
        )
        yield replace(config, {"scoring.batch_size": 64}), network, folder


@pytest.mark.slow
def test_from_given_weights_and_folders_of_jpegs(transfer, capsys):
    """No training data of the pre-training task are needed, nor its validation."""
    config, network, folder = transfer
    results = train.run(config, folder / "run")
    printed = capsys.readouterr().out
    assert f"pretrained: from {folder / 'network'}" in printed
    assert results["tasks"] == ["pretrain", "target"] and "results_by_mean" not in results
    before = {row["pretrain_before"] for row in results["results"]}
    assert len(before) == 1 and len(results["results"]) == 4
    source = data.load_images(config.data.pretrain, "test")
    assert before == {evaluate.classification(network, source, batch_size=64)["accuracy"]}
    for found in results["results"]:
        assert found["pretrain_validation"] is None
        if found["method"] == "linear_probe":
            assert found["pretrain_after"] == found["pretrain_before"]
    assert (folder / "run" / "report.html").read_text().count("<figure>") == 6
    train.run(config, folder / "run")
    assert "all is done: 4 results" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_made_for_other_pixels_is_refused(transfer):
    config, _, folder = transfer
    path = folder / "network" / "config.json"
    before = path.read_text()
    content = json.loads(before)
    content["pretrained_cfg"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"pretrain: .* wants images of mean \(0\.5.*with \(0\.485"
    ):
        train.run(config, folder / "grey")
    path.write_text(before)


@pytest.mark.slow
def test_results_of_other_inputs_are_not_put_beside_new_ones(transfer):
    config, _, folder = transfer
    train.run(config, folder / "run")
    picture = next((folder / "pretrain" / "test").glob("*/*.jpg")).resolve()
    content = picture.read_bytes()
    picture.write_bytes(content + b"0")
    with pytest.raises(
        ArtefactError, match=r"results, of linear_probe, .*: pretrain/test is \w+ there"
    ):
        train.run(config, folder / "run")
    picture.write_bytes(content)
    train.run(config, folder / "run")
    other = resnet.ResNet(ResNetConfig.named("small"), 4, rngs=nnx.Rngs(1))
    shutil.move(folder / "network", folder / "before")
    timm_weights.export(other, config.model, folder / "network")
    with pytest.raises(
        ArtefactError, match=r"from other inputs than .*: base weights is \w+ there"
    ):
        train.run(config, folder / "run")
    shutil.rmtree(folder / "network")
    shutil.move(folder / "before", folder / "network")


@pytest.mark.slow
def test_a_network_of_another_number_of_classes_is_refused(transfer):
    config, _, folder = transfer
    data_config = TransferDataConfig(config.data.target, config.data.target)
    with pytest.raises(ConfigError, match=r"has 4 classes; target, the pre-training task, has 2"):
        train.run(dataclasses.replace(config, data=data_config), folder / "wrong")
