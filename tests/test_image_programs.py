"""What `compile` takes an image experiment to cost: formulas against programs and publications."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from easy_jax.ahead_of_time import chips, cost, image_programs
from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    GlyphDataConfig,
    ImageDataConfig,
    MethodConfig,
    ResNetConfig,
    ScoringConfig,
    StageConfig,
    TransferDataConfig,
    replace,
)
from easy_jax.models.resnet import ResNet
from easy_jax.parallel import sharding

ROWS, SIZE, WIDTH = 4, 16, 8
METHODS = (
    MethodConfig(),
    MethodConfig("bn_head", trainable="bn_head"),
    MethodConfig("l2", anchor="l2_sp", anchor_strength=0.1),
    MethodConfig("stronger", start="probe", anchor="l2_sp", anchor_strength=1.0, weighting="flow"),
)


def _config(**fields):
    def stage():
        return StageConfig(batch_size=ROWS)

    default = ExperimentConfig(
        model=ResNetConfig(1, WIDTH, (1, 1)),
        data=GlyphDataConfig(image_size=SIZE),
        pretrain=stage(),
        probe=stage(),
        finetune=stage(),
        head=stage(),
        scoring=ScoringConfig(batch_size=ROWS),
        methods=METHODS,
    )
    return dataclasses.replace(default, **fields)


def _mesh(devices=1):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def _programs(config, mesh=None, what="all"):
    suite = image_programs.suite(config.validate(), mesh or _mesh(), what)
    return {p.name: p for p in (step.lower(step.rows) for step in suite.lowerings)}


# Multiply-adds, in thousands of millions, at 224 x 224 with 1,000 classes, as torchvision has them.
@pytest.mark.parametrize(
    ("name", "published"),
    [("resnet18", 1.81), ("resnet34", 3.66), ("resnet50", 4.09), ("resnet101", 7.80)],
)
def test_the_named_sizes_cost_what_is_published(name, published):
    flops = image_programs.forward_flops(ResNetConfig.named(name), 224, 1000)
    assert round(sum(flops) / 2e9, 2) == published


def _products(jaxpr):
    """Operations of the convolutions and products that a function is traced to."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
        if equation.primitive.name == "conv_general_dilated":
            _, (*window, in_features, _), out = shapes
            total += 2 * math.prod(out) * math.prod(window) * in_features
        elif equation.primitive.name == "dot_general":
            (rows, in_features), _, (_, features) = shapes
            total += 2 * rows * in_features * features
        total += sum(map(_products, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [33, 64])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_a_forward_pass_has_the_operations_of_the_formula(block, stem, image_size):
    config = ResNetConfig(3, WIDTH, (1, 2), block, stem)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ResNet(config, 10, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)
    assert _products(traced.jaxpr) == sum(image_programs.forward_flops(config, image_size, 10))


@pytest.mark.slow
def test_steps_do_the_passes_that_they_are_said_to():
    """Compiled for the CPU. The walk leaves out padding and the gradient of the images."""
    topology = chips.parse_topology("v5e:1x1")
    programs = _programs(_config(model=ResNetConfig(1, WIDTH, (1,)), methods=METHODS[:2]))
    done = {
        name: cost.cost_of(program.lowered.compile().as_text(), topology).flops
        for name, program in programs.items()
        if name != "pretrain"
    }
    score, head = done["score"], 2 * ROWS * WIDTH * 10
    in_range = (3 * SIZE - 2) ** 2  # pairs of a pixel and a place of the 3x3 window, both ways
    images = 2 * ROWS * in_range * WIDTH
    assert done["train head"] == score + head
    assert done["train all"] == 3 * score - images
    assert done["train bn_head"] == 2 * score + head - images
    forward = programs["score"].model_flops
    assert programs["train head"].model_flops == forward + head
    assert programs["train all"].model_flops == 3 * forward
    assert programs["train bn_head"].model_flops == 2 * forward + head
    assert 0.85 < score / forward < 1.0


def test_each_kind_of_step_is_compiled_once():
    kinds = image_programs.kinds(_config())
    assert {name: len(stages) for name, stages in kinds.items()} == {
        "pretrain": 1,
        "train head": 1,
        "train all": 1,
        "train bn_head": 1,
        "train all, l2": 2,
    }
    flow = MethodConfig("flow", start="probe", weighting="flow", head_stage="unweighted")
    config = _config(
        methods=(flow,), head=StageConfig(batch_size=2 * ROWS), frozen_batch_norm=("probe",)
    )
    assert list(image_programs.kinds(config)) == [
        "pretrain",
        "train head, frozen BatchNorm",
        "train all",
        "train head",
    ]
    config = dataclasses.replace(config, frozen_batch_norm=())
    assert list(image_programs.kinds(config)) == [
        "pretrain",
        "train head",
        "train all",
        "train head (seed0/noise0.3/lr0.03/probe-all-flow-head-unweighted)",
    ]


@pytest.mark.slow
def test_memory_is_of_the_whole_experiment():
    flow = MethodConfig("flow", start="probe", weighting="flow", head_stage="unweighted")
    programs = _programs(_config(methods=(METHODS[0], flow)))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(programs["score"].state))
    assert programs["score"].resident_bytes == size  # the pre-trained model beside the probed one
    assert programs["train all"].resident_bytes == 2 * size
    assert programs["pretrain"].resident_bytes == 0
    assert programs["train head"].resident_bytes == 3 * size  # and what was fine-tuned
    assert programs["train head"].activation_bytes == programs["score"].activation_bytes == 0
    # At least the two inputs of the convolutions of the first block.
    block = 2 * 4 * ROWS * SIZE**2 * WIDTH
    assert programs["train all"].activation_bytes > block
    finetune = StageConfig(batch_size=ROWS, micro_batches=2)
    halves = _programs(_config(finetune=finetune, methods=METHODS[:1]), what="train")
    half = programs["train all"].activation_bytes / 2
    assert halves["train all"].activation_bytes == half


@pytest.mark.slow
def test_files_need_not_be_there():
    """Data and weights are only named; images are bytes that the device normalises."""
    config = _config(
        model=ResNetConfig(3, WIDTH, (1, 1), path="hf://timm/not-there"),
        data=TransferDataConfig(
            ImageDataConfig("imagenet2012", path="not-there"),
            ImageDataConfig("cars196", path="not-there", image_size=SIZE),
        ),
        methods=METHODS[:1],
    )
    programs = _programs(config)
    assert list(programs) == ["train head", "train all", "score"]
    for program in programs.values():
        dtypes = {x.shape: x.dtype for x in jax.tree.leaves(program.lowered.in_avals)}
        assert dtypes[ROWS, SIZE, SIZE, 3] == jnp.uint8
        assert dtypes[2 * WIDTH, 196] == jnp.float32


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ConfigError, match="the batch is 4; it must be a multiple of the 8 devices"):
        _programs(_config(), _mesh(8))


def test_classes_that_only_the_data_tell_are_an_error():
    task = ImageDataConfig("other", format="folder", path="mine", image_size=SIZE)
    pretrain = ImageDataConfig("imagenet2012", path="not-there")
    config = _config(
        model=ResNetConfig(3, WIDTH, (1, 1), path="hf://timm/not-there"),
        data=TransferDataConfig(pretrain, task),
    )
    with pytest.raises(ConfigError, match=r"config\.data\.target\.name is 'other'"):
        _programs(config)
    changes = {"data.target.format": "parquet", "data.target.num_classes": 7}
    config = replace(config, changes)
    assert "score" in _programs(config, what="score")
