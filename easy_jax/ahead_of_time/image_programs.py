"""The training and scoring steps of an image experiment, lowered for a topology."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from easy_jax.ahead_of_time.programs import (
    STEPS,
    Lowering,
    Program,
    Suite,
    activation_bytes,
    batch_of,
    placed,
    train_state,
    tree_bytes,
)
from easy_jax.core import losses, optim
from easy_jax.core.anchors import stored_name
from easy_jax.core.step import make_train_step
from easy_jax.data.config import GlyphDataConfig
from easy_jax.data.glyphs import DIGITS, LETTERS
from easy_jax.data.known_images import DATA_SETS
from easy_jax.experiments.config import ExperimentConfig
from easy_jax.experiments.plan import Stage, plan, shared_stages
from easy_jax.experiments.vision import TRAINABLE
from easy_jax.io.checks import ConfigError
from easy_jax.models import resnet
from easy_jax.models.config import ResNetConfig
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.train.forward import make_score_step

# Models that an experiment keeps in memory besides the trained one: the pre-trained model and the
# model with the probed head. A final stage that trains only the head also keeps the fine-tuned one.
_RETAINED = 2

# The cost of a step in forward passes, of the body and of the head: one each for the outputs, for
# gradients of inputs and for gradients of weights, where needed. By convention the first
# convolution counts as three passes too, although images need no gradient.
_PASSES = {"all": (3, 3), "head": (1, 2), "bn_head": (2, 3)}


def suite(config: ExperimentConfig, mesh: Mesh, what: str) -> Suite:
    """Returns the steps of a configuration to compile.

    Args:
      config: the experiment's configuration.
      mesh: the mesh of the topology's devices.
      what: `train` for one training step of each kind, `score` for the scoring step, or `all`.
    """
    lowerings = []
    if what != "score":
        for name, stages in kinds(config).items():
            # Several stages may run the same program; take the one that retains most models.
            stage = max(stages, key=lambda stage: _num_retained(config, stage))
            assert stage.config is not None
            lower = functools.partial(train_program, config, name, stage, mesh)
            lowerings.append(Lowering(lower, stage.config.batch_size, stage.config.micro_batches))
    if what != "train":
        score = functools.partial(score_program, config, mesh)
        lowerings.append(Lowering(score, config.scoring.batch_size))
    size, _ = _task(config, pretraining=False)
    row = f"an image of {size} x {size} a row, {config.model.dtype}"
    return Suite(config.model.name() or "ResNet", row, lowerings)


def kinds(config: ExperimentConfig) -> dict[str, list[Stage]]:
    """Groups the training stages of the plan by the program that they run.

    Learning rate, anchor strength and example weights do not change the program. With the
    weighting `flow_online`, every step additionally costs a `score` of the same batch.

    Example:
      >>> from easy_jax.config import MethodConfig
      >>> methods = (MethodConfig(), MethodConfig("l2", anchor="l2_sp", anchor_strength=0.1))
      >>> list(kinds(ExperimentConfig(methods=methods)))
      ['pretrain', 'train head', 'train all', 'train all, l2']
    """
    found: dict[Any, list[Stage]] = {}
    for stage in plan(config).values():
        if stage.config is not None:
            optimizer = dataclasses.replace(
                stage.config.optimizer, learning_rate=0.0, anchor_strength=0.0
            )
            settings = dataclasses.replace(stage.config, epochs=1, optimizer=optimizer)
            key = (_kind(stage), repr(settings))
            found.setdefault(key, []).append(stage)
    named: dict[str, list[Stage]] = {}
    for (kind, _), stages in found.items():
        named[kind if kind not in named else f"{kind} ({stages[0].key.path})"] = stages
    return named


def train_program(
    config: ExperimentConfig, name: str, stage: Stage, mesh: Mesh, rows: int
) -> Program:
    """Lowers the training step of a stage on global batches of `rows` images."""
    assert stage.config is not None
    settings, pretraining = stage.config, stage.label_noise is None
    size, num_classes = _task(config, pretraining)
    model = _abstract_model(config, num_classes)
    resident = _num_retained(config, stage) * tree_bytes(placed(nnx.state(model), mesh))
    view = eval_mode if stage.frozen_norm else train_mode
    trainable: Any = TRAINABLE[stage.trainable]
    graphdef, *states = nnx.split(view(model), trainable, ...)
    optimizer = optim.make_optimizer(settings.optimizer, STEPS, resnet.is_backbone)
    state = train_state(states, optimizer, mesh)
    batch = _batch(config, mesh, rows, size)
    step: Any = make_train_step(
        graphdef,
        losses.classification_loss,
        optimizer,
        reduction=settings.reduction,
        micro_batches=settings.micro_batches,
        mesh=mesh,
    )

    def loss(params: Any, rest: Any, batch: Any) -> jax.Array:
        return losses.classification_loss(nnx.merge(graphdef, params, rest, copy=True), batch)[0]

    kept = activation_bytes(
        loss,
        state,
        batch,
        settings.micro_batches,
        mesh,
        lambda shape, rows: len(shape) == 4 and shape[0] == rows,
    )
    of_body, of_head = forward_flops(config.model, size, num_classes)
    body_passes, head_passes = _PASSES[stage.trainable]
    flops = rows * (body_passes * of_body + head_passes * of_head)
    return Program(name, step.lower(state, batch), state, rows, kept, flops, resident)


def score_program(config: ExperimentConfig, mesh: Mesh, rows: int) -> Program:
    """Lowers the scoring step on global batches of `rows` images.

    Evaluation differs only by an argmax, and is not compiled separately.
    """
    size, num_classes = _task(config, pretraining=False)
    model = _abstract_model(config, num_classes)
    graphdef, state = nnx.split(eval_mode(model))
    state = placed(state, mesh)
    step: Any = make_score_step(graphdef, losses.classification_loss, mesh)
    flops = rows * sum(forward_flops(config.model, size, num_classes))
    batch = _batch(config, mesh, rows, size)
    resident = (_RETAINED - 1) * tree_bytes(state)  # one of them is the scored model itself
    return Program("score", step.lower(state, batch), state, rows, 0.0, flops, resident)


def forward_flops(config: ResNetConfig, image_size: int, num_classes: int) -> tuple[float, float]:
    """Returns the operations of one image's forward pass: of all convolutions, and of the head.

    A convolution counts two for every output, position in the window and input channel, by
    convention including those in the padding.

    Example:
      >>> body, head = forward_flops(ResNetConfig.named("resnet50"), 224, 1000)
      >>> round((body + head) / 2e9, 2)  # multiply-adds, in thousands of millions
      4.09
    """
    has_pool = config.stem == "imagenet"
    window, stride = (7, 2) if has_pool else (3, 1)
    size = -(-image_size // stride)
    total = _conv_flops(size, window, config.in_channels, config.width)
    size = -(-size // 2) if has_pool else size
    features = config.width
    expansion = 4 if config.block == "bottleneck" else 1
    for stage, depth in enumerate(config.depths):
        width = config.width * 2**stage
        for block in range(depth):
            before, stride = size, 2 if stage > 0 and block == 0 else 1
            size = -(-size // stride)
            out = expansion * width
            if config.block == "bottleneck":
                total += _conv_flops(before, 1, features, width)
                total += _conv_flops(size, 3, width, width)
                total += _conv_flops(size, 1, width, out)
            else:
                total += _conv_flops(size, 3, features, width)
                total += _conv_flops(size, 3, width, width)
            if stride != 1 or features != out:
                total += _conv_flops(size, 1, features, out)
            features = out
    return total, 2.0 * features * num_classes


def _conv_flops(size: int, window: int, in_features: int, features: int) -> float:
    """Returns the operations of a convolution with a square output and a square window."""
    return 2.0 * size**2 * window**2 * in_features * features


def _num_retained(config: ExperimentConfig, stage: Stage) -> int:
    """Returns how many models an experiment keeps in memory besides the one that a stage trains."""
    if stage.label_noise is None:
        return 0
    shared = {each.key for each in shared_stages(config, stage.seed, stage.label_noise)}
    return _RETAINED + (stage.start not in shared)


def _kind(stage: Stage) -> str:
    assert stage.config is not None
    if stage.label_noise is None:
        return "pretrain"
    anchor = stage.config.optimizer.anchor
    parts = [
        f"train {stage.trainable}",
        stored_name(anchor) if anchor != "none" else "",
        "frozen BatchNorm" if stage.frozen_norm else "",
    ]
    return ", ".join(part for part in parts if part)


def _task(config: ExperimentConfig, pretraining: bool) -> tuple[int, int]:
    """Returns the image size and the number of classes of a task.

    Raises:
      ConfigError: the number of classes cannot be known without reading the data.
    """
    data = config.data
    if isinstance(data, GlyphDataConfig):
        return data.image_size, len(LETTERS if pretraining else DIGITS)
    task = data.pretrain if pretraining else data.target
    num_classes = DATA_SETS[task.name].num_classes or task.num_classes
    if not num_classes:
        field = f"config.data.{'pretrain' if pretraining else 'target'}.name"
        raise ConfigError(
            f"{field} is {task.name!r}, whose classes are known from its folders only, but compile "
            f"reads no data; use one of {sorted(set(DATA_SETS) - {'other'})} with about as many "
            "classes"
        )
    return task.image_size, num_classes


def _abstract_model(config: ExperimentConfig, num_classes: int) -> resnet.ResNet:
    model: resnet.ResNet = nnx.eval_shape(
        lambda: resnet.ResNet(config.model, num_classes, rngs=nnx.Rngs(params=0))
    )
    return model


def _batch(
    config: ExperimentConfig, mesh: Mesh, rows: int, size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract batch: floats for glyphs; for files uint8 pixels, mean and std."""
    is_drawn, channels = isinstance(config.data, GlyphDataConfig), config.model.in_channels
    fields: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((size, size, channels), jnp.float32 if is_drawn else jnp.uint8),
        "label": ((), jnp.int32),
        "weight": ((), jnp.float32),
        "mask": ((), jnp.bool_),
    }
    if not is_drawn:
        fields |= dict.fromkeys(("image_mean", "image_std"), ((channels,), jnp.float32))
    return batch_of(rows, mesh, fields)
