"""Folders of JPEGs and TFDS through scoring, training and evaluation with a small ResNet."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import devices_mesh
from image_data import encoded, picture, write_folder, write_tfds

from easy_jax.config import ImageDataConfig, OptimizerConfig, ResNetConfig, StageConfig
from easy_jax.core.losses import classification_loss, normalised_images
from easy_jax.data import ArraySource, Reading, load_images
from easy_jax.models import resnet
from easy_jax.models.modes import train_mode
from easy_jax.train import evaluate
from easy_jax.train.checkpoint import CheckpointError
from easy_jax.train.fitting import fit
from easy_jax.train.scoring import score

SIZE = 16
STAGE = StageConfig(epochs=3, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.05))


class InterruptionError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module", params=["folder", "tfds"])
def config(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    if request.param == "folder":
        write_folder(path / "train", per_class=7)
        write_folder(path / "test", per_class=2)
        name = "other"
    else:
        examples = [(encoded(picture(i), quality=95), i % 102) for i in range(21)]
        splits = {"train": examples, "validation": examples[:3], "test": examples[:6]}
        write_tfds(path, "oxford_flowers102", "2.1.1", 102, splits)
        name = "oxford_flowers102"
    return ImageDataConfig(
        name=name, format=request.param, path=str(path), image_size=SIZE, threads=2
    )


def network(source):
    config = ResNetConfig(in_channels=3, width=4, depths=(1,))
    return resnet.ResNet(config, source.num_classes, rngs=nnx.Rngs(0))


def normalised(source):
    """The same data in memory, normalised in float64 beforehand."""
    batch = source.batch(list(range(len(source))))
    mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
    image = (batch["image"].astype(np.float64) / 255.0 - mean) / std
    return ArraySource({"image": image.astype(np.float32), "label": batch["label"]})


@pytest.mark.slow
def test_losses_are_those_of_normalised_pixels(config, tmp_path):
    source = load_images(config, "train")
    model = network(source)
    tables = [
        score(model, data, tmp_path / name, loss_fn=classification_loss, batch_size=8)
        for name, data in (("files", source), ("arrays", normalised(source)))
    ]
    assert tables[0].num_examples == len(source)
    np.testing.assert_allclose(*(table.loss_N() for table in tables), rtol=1e-5)


@pytest.mark.slow
def test_a_table_is_scored_once_whatever_training_sees(config, tmp_path):
    """Scoring again finds the table, with other training views; not with other scoring views."""
    source = load_images(config, "train")
    model = network(source)
    first = score(model, source, tmp_path, loss_fn=classification_loss, batch_size=8)
    plain = load_images(dataclasses.replace(config, augment=False), "train")
    again = score(model, plain, tmp_path, loss_fn=classification_loss, batch_size=8)
    assert first.fingerprint() == again.fingerprint()
    other = load_images(dataclasses.replace(config, resize_size=30), "train")
    with pytest.raises(ValueError, match="data"):
        score(model, other, tmp_path, loss_fn=classification_loss, batch_size=8)


@pytest.mark.slow
def test_training_resumes_bit_for_bit_with_other_readers(config, tmp_path):
    source = load_images(config, "train")
    model = train_mode(network(source))
    weight_N = np.random.default_rng(0).random(len(source)).astype(np.float32)

    def run(directory, source=source, **options):
        return fit(
            model,
            source,
            tmp_path / directory,
            stage=STAGE,
            loss_fn=classification_loss,
            weight_N=weight_N,
            mesh=devices_mesh(2),
            seed=1,
            save_every_steps=3,
            **options,
        )

    whole = run("whole")
    assert whole.steps == -(-3 * len(source) // 8)
    done = iter(range(4))

    def stop(_):
        if next(done, None) is None:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run("parts", progress=stop)
    source.reading = Reading(threads=1, prefetch=1)
    parts = run("parts")
    assert parts.resumed_from == 3
    chex.assert_trees_all_equal(
        jax.device_get(parts.model_state), jax.device_get(whole.model_state)
    )
    with pytest.raises(CheckpointError, match=r"views\.augment: False now, True there"):
        run("parts", load_images(dataclasses.replace(config, augment=False), "train"))
    plain = run("plain", load_images(dataclasses.replace(config, augment=False), "train"))
    moved = jax.tree.leaves(
        jax.tree.map(
            lambda a, b: float(np.abs(a - b).max()),
            jax.device_get(plain.model_state),
            jax.device_get(whole.model_state),
        )
    )
    assert max(moved) > 1e-4  # the views do make a difference


@pytest.mark.slow
def test_training_learns(config, tmp_path):
    source = load_images(config, "train")
    model = train_mode(network(source))
    stage = StageConfig(epochs=10, batch_size=8, optimizer=OptimizerConfig(learning_rate=0.05))
    result = fit(model, source, tmp_path, stage=stage, loss_fn=classification_loss)
    trained = nnx.merge(nnx.graphdef(model), result.model_state)
    before, after = (evaluate.classification(m, source, batch_size=8) for m in (model, trained))
    assert before["count"] == after["count"] == len(source)
    assert after["loss"] < 0.9 * before["loss"]


def test_uint8_images_without_statistics_are_refused():
    batch = {"image": jnp.zeros((1, 2, 2, 3), jnp.uint8), "image_mean": jnp.zeros((1, 3))}
    with pytest.raises(ValueError, match="no fields image_mean and image_std"):
        normalised_images(batch)


def test_normalised_images_in_float64():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 5, 6, 3), np.uint8)
    mean, std = rng.uniform(0.2, 0.8, (2, 4, 3)).astype(np.float32)
    batch = {"image": image, "image_mean": mean, "image_std": std}
    ours = normalised_images(jax.tree.map(jnp.asarray, batch))
    expected = image / 255.0 - mean.astype(np.float64)[:, None, None]
    expected /= std.astype(np.float64)[:, None, None]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    floats = jnp.asarray(image, jnp.float32)
    assert normalised_images({"image": floats}) is floats
