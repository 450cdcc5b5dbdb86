"""Evaluation counts every example once, and swapping the task's parts is exact."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import devices_mesh

from easy_jax.config import OptimizerConfig, ResNetConfig, StageConfig
from easy_jax.core.losses import classification_loss
from easy_jax.core.step import make_train_step
from easy_jax.data import ArraySource
from easy_jax.io import terminal
from easy_jax.models import resnet
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.train import evaluate, forward
from easy_jax.train.fitting import fit

CONFIG = ResNetConfig(width=4, depths=(1, 1))


def _source(size, classes, seed=0):
    rng = np.random.default_rng(seed)
    return ArraySource(
        {
            "image": rng.normal(size=(size, 8, 8, 1)).astype(np.float32),
            "label": rng.integers(0, classes, size).astype(np.int32),
        }
    )


def _trained(model, source, directory, learning_rate, trainable=nnx.Param):
    stage = StageConfig(
        epochs=2, batch_size=16, optimizer=OptimizerConfig(learning_rate=learning_rate)
    )
    return fit(
        train_mode(model),
        source,
        directory,
        stage=stage,
        loss_fn=classification_loss,
        trainable=trainable,
        mesh=devices_mesh(1),
    ).model_state


@pytest.mark.slow
def test_accuracy_and_loss_equal_numpy_for_any_batch_and_device_count():
    model = resnet.ResNet(CONFIG, 3, rngs=nnx.Rngs(0))
    source = _source(45, 3)
    logits = np.float64(eval_mode(model)(source.fields["image"]))
    label = source.fields["label"]
    accuracy = 100.0 * np.mean(logits.argmax(axis=1) == label)
    shifted = logits - logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(45), label]
    for count, batch_size in ((1, 7), (1, 64), (2, 8), (8, 16)):
        found = evaluate.classification(
            model, source, batch_size=batch_size, mesh=devices_mesh(count)
        )
        assert abs(found["accuracy"] - accuracy) < 1e-9 and found["count"] == 45
        np.testing.assert_allclose(found["loss"], nll.mean(), rtol=1e-5)


def _predictions(graphdef, state, image):
    return np.asarray(eval_mode(nnx.merge(graphdef, state))(image)).argmax(axis=1)


@pytest.mark.slow
def test_the_swap_is_exact(tmp_path):
    old = resnet.ResNet(CONFIG, 5, rngs=nnx.Rngs(0))
    letters, digits = _source(64, 5), _source(48, 3, seed=1)
    pretrained = _trained(old, letters, tmp_path / "pretrain", 0.05)
    graphdef = nnx.graphdef(train_mode(old))
    before = _predictions(graphdef, pretrained, letters.fields["image"])

    new = resnet.ResNet(CONFIG, 3, rngs=nnx.Rngs(1))
    fresh_head = nnx.state(new, resnet.is_head)
    start = nnx.merge_state(nnx.filter_state(pretrained, resnet.is_backbone), fresh_head)
    model = nnx.merge(nnx.graphdef(new), start)

    # Probing moves head and BatchNorm statistics only: the old task must not notice.
    probed = _trained(model, digits, tmp_path / "probe", 0.05, resnet.head_params)
    changed = [
        path
        for (path, a), (_, b) in zip(
            nnx.to_flat_state(start), nnx.to_flat_state(probed), strict=True
        )
        if (np.asarray(a[...]) != np.asarray(b[...])).any()
    ]
    assert any("mean" in path for path in changed) and ("head", "kernel") in changed
    assert all(resnet.is_task_specific(path, None) for path in changed)
    swapped = evaluate.with_task_parts(probed, pretrained, resnet.is_task_specific)
    after = _predictions(graphdef, swapped, letters.fields["image"])
    np.testing.assert_array_equal(before, after)

    # So must full fine-tuning with a learning rate of 0; its parameters do not move at all.
    still = _trained(model, digits, tmp_path / "still", 0.0)
    swapped = evaluate.with_task_parts(still, pretrained, resnet.is_task_specific)
    jax.tree.map(np.testing.assert_array_equal, swapped, pretrained)

    # And full fine-tuning, which moves the body, must be seen.
    moved = _trained(model, digits, tmp_path / "moved", 0.05)
    swapped = evaluate.with_task_parts(moved, pretrained, resnet.is_task_specific)
    kernel = [s["blocks"][0]["conv1"]["kernel"][...] for s in (swapped, pretrained)]
    assert (np.asarray(kernel[0]) != np.asarray(kernel[1])).any()
    np.testing.assert_array_equal(swapped["head"]["bias"][...], pretrained["head"]["bias"][...])


def test_compilations_of_these_functions_are_shown():
    graphdef = nnx.graphdef(nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    mesh, loss_fn = devices_mesh(1), classification_loss
    step = make_train_step(graphdef, loss_fn, optax.sgd(0.1), reduction="token_mean", mesh=mesh)
    assert terminal._COMPILED[step.__name__] == "the training step"
    for passed in (
        forward.make_score_step(graphdef, loss_fn, mesh),
        evaluate._make_step(graphdef, loss_fn, ("loss",), mesh),
    ):
        assert terminal._COMPILED[passed.__name__] == "the forward pass"
