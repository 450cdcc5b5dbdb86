"""The paper's configurations of ResNets: its values, and one of them as a user runs it."""

import json
import subprocess
import sys

import pytest
from helpers import load_config
from image_data import write_folder

from easy_jax.config import RESNETS, ConfigError, ResNetConfig, replace
from easy_jax.experiments.plan import run_stages, runs
from easy_jax.models.resnet import ResNet, nnx
from easy_jax.pretrained import timm_weights

# The paper's hyper-parameters: epochs; learning rates of FLOW, of probe and head, of standard.
PAPER = {
    "cifar10": (20, 0.001, 0.005, 0.005),
    "cifar100": (25, 0.005, 0.005, 0.01),
    "oxford_flowers102": (25, 0.05, 0.05, 0.05),
    "caltech101": (30, 0.01, 0.01, 0.005),
    "stanford_dogs": (30, 0.005, 0.005, 0.001),
    "cars196": (30, 0.01, 0.05, 0.05),
}
CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@pytest.fixture
def module(root):
    return load_config(root / "configs" / "resnet_transfer.py")


def test_every_model_with_every_data_set(module):
    assert set(module.ARGUMENTS) == {f"{model},{data}" for model in RESNETS for data in PAPER}
    names = {
        module.get_config(f"{a}{grid}").name for a in module.ARGUMENTS for grid in ("", ",grid")
    }
    assert len(names) == 2 * len(RESNETS) * len(PAPER)


@pytest.mark.parametrize("data", PAPER)
def test_values_are_the_papers(module, data):
    config = module.get_config(f"resnet18,{data}").validate()
    epochs, flow, head, standard = PAPER[data]
    methods = {method.name: method for method in config.methods}
    rates = {
        (run.method.name, stage.trainable): stage.config.optimizer.learning_rate
        for run in runs(config)
        for stage in run_stages(config, run)
    }
    assert rates["standard", "all"] == rates["l2", "all"] == rates["wise_ft", "all"] == standard
    assert rates["flow", "all"] == rates["flow_wise_ft", "all"] == flow
    assert rates["flow", "head"] == rates["linear_probe", "head"] == head
    for stage in (config.probe, config.finetune, config.head):
        sgd = stage.optimizer
        assert (stage.epochs, stage.batch_size, stage.reduction) == (epochs, 128, "example_mean")
        assert (sgd.name, sgd.momentum, sgd.weight_decay) == ("sgd", 0.9, 5e-4)
        assert (sgd.schedule, sgd.warmup_ratio) == ("cosine", 0.0)
    assert config.probe.optimizer.learning_rate == head
    assert config.seeds == (42,) and config.data.target.image_size == 224
    assert config.data.names == ("imagenet2012", data)
    # Tables 1 and 3.
    assert methods["flow"].weighting == methods["flow_wise_ft"].weighting == "flow"
    assert methods["flow"].start == "probe" and methods["flow"].head_stage == "unweighted"
    assert methods["wise_ft"].alpha == methods["flow_wise_ft"].alpha == 0.5


def test_a_flag_for_one_stage_is_for_that_stage(module):
    config = module.get_config("resnet18,cars196")
    config = replace(config, {"finetune.optimizer.weight_decay": 0.25})
    assert config.probe.optimizer.weight_decay == config.head.optimizer.weight_decay == 5e-4


def test_with_a_grid_every_method_has_all_rates(module):
    config = module.get_config("resnet50,cifar10,grid").validate()
    tried = {}
    for run in runs(config):
        tried.setdefault(run.method.name, []).append(run.learning_rate)
    assert all(rates == [0.001, 0.003, 0.01, 0.03, 0.1] for rates in tried.values())
    assert config.model.path == "hf://timm/resnet50.a1_in1k" and config.model.name() == "resnet50"


@pytest.mark.parametrize("argument", ["resnet50", "resnet20,cifar10", "resnet18,mnist,grid"])
def test_an_unknown_argument_is_told_what_there_is(module, argument):
    with pytest.raises(ConfigError, match=rf"{argument} is unknown.*resnet101.*stanford_dogs"):
        module.get_config(argument)


# A network that compiles faster than resnet18; then the `easy-jax` command.
PROGRAM = """
from easy_jax.cli import main
from easy_jax.config import RESNETS
RESNETS["small"] = ("basic", (1,))
main.cli()
"""


@pytest.mark.slow
def test_a_command_on_folders(root, tmp_path, monkeypatch):
    """ImageNet's validation images, CIFAR-10 and the network, small, in folders."""
    monkeypatch.setitem(RESNETS, "small", ("basic", (1,)))
    network = ResNetConfig.named("small")
    timm_weights.export(ResNet(network, 1000, rngs=nnx.Rngs(0)), network, tmp_path / "network")
    classes = [f"n{number:08d}" for number in range(1000)]
    write_folder(tmp_path / "imagenet" / "val", classes, per_class=1)
    for split, size in (("train", 5), ("test", 2)):
        write_folder(tmp_path / "cifar" / split, CIFAR10, per_class=size)
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "compare",
        f"--config={root}/configs/resnet_transfer.py:small,cifar10",
        f"--workdir={tmp_path / 'run'}",
        f"--config.model.path={tmp_path / 'network'}",
        "--config.only=standard,linear_probe,flow,wise_ft,wise_ft_1",
    ]
    for task, folder in (("pretrain", "imagenet"), ("target", "cifar")):
        command += [
            f"--config.data.{task}.format=folder",
            f"--config.data.{task}.path={tmp_path / folder}",
            f"--config.data.{task}.image_size=16",
        ]
    for stage in ("probe", "finetune", "head"):
        command += [f"--config.{stage}.epochs=1", f"--config.{stage}.batch_size=16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"] == ["imagenet2012", "cifar10"]
    rates = {row["method"]: row["learning_rate"] for row in results["results"]}
    assert rates == {
        "standard": 0.005,
        "linear_probe": 0.005,
        "flow": 0.001,
        "wise_ft": 0.005,
        "wise_ft_1": 0.005,
    }
    (curve,) = results["alpha_curves"]
    assert [point["alpha"] for point in curve["points"]] == [0.5, 1.0]
    assert "wise_ft by alpha" in done.stdout and "imagenet2012, test accuracy" in done.stdout
    assert (tmp_path / "run" / "report.html").exists()
