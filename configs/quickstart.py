"""FLOW end to end on real input, offline: capital letters, then handwritten digits.

A small ResNet is pre-trained on letters rendered from fonts and fine-tuned on scikit-learn's
handwritten digits, by ten methods and three controls (see `METHODS`).

  easy-jax run --config=configs/quickstart.py          30 % of the training labels wrong
  easy-jax run --config=configs/quickstart.py:clean    labels as they are
  easy-jax run --config=configs/quickstart.py:full     both, 3 seeds, learning rates 0.003-0.1
  easy-jax compare --config=configs/quickstart.py:compare   3 seeds, and WiSE-FT at every alpha
  easy-jax run --config=configs/quickstart.py:weightings    all weightings and controls, as `full`
  easy-jax run --config=configs/quickstart.py:tiny     takes seconds, to test that it works

Hardware: 2 CPU cores. Time and results: README.md (default), docs/results.md (`:full`) and
docs/weightings.md (`:weightings`).
"""

import dataclasses

from easy_jax.config import (
    ConfigError,
    ExperimentConfig,
    GlyphDataConfig,
    MethodConfig,
    OptimizerConfig,
    ResNetConfig,
    ScoringConfig,
    StageConfig,
    replace,
)

ARGUMENTS = ("noisy", "clean", "full", "compare", "weightings", "tiny")
METHODS = (
    MethodConfig("standard"),
    MethodConfig("probe_standard", start="probe"),
    MethodConfig("linear_probe", trainable="head"),
    MethodConfig("bn_head", trainable="bn_head"),
    MethodConfig("l2", start="probe", anchor="l2_sp", anchor_strength=0.1),
    MethodConfig("wise_ft", start="probe", averaging="wise_ft", alpha=0.5),
    MethodConfig("flow", start="probe", weighting="flow", head_stage="unweighted"),
    MethodConfig("flow_weighted_head", start="probe", weighting="flow", head_stage="weighted"),
    MethodConfig("flow_no_head_stage", start="probe", weighting="flow"),
    MethodConfig("flow_wise_ft", start="probe", weighting="flow", averaging="wise_ft", alpha=0.5),
)
# Controls that separate FLOW's choice of examples from its smaller step. They differ from
# flow_no_head_stage only in the weights.
CONTROLS = (
    MethodConfig("control_uniform", start="probe", weighting="uniform"),
    MethodConfig("control_shuffled", start="probe", weighting="shuffled"),
    MethodConfig("control_mean_one", start="probe", weighting="mean_one"),
)

# Every weighting that an image experiment can have, with its default options, and with weights of
# mean 1: the same choice of examples with steps as large as the unweighted ones.
RULES = ("flow", "easiest", "hardest", "dft", "power", "talr", "deft", "eaft", "profit", "iw")
WEIGHTINGS = (
    MethodConfig("unweighted", start="probe"),
    *(MethodConfig(rule, start="probe", weighting=rule) for rule in RULES),
    *(
        MethodConfig(
            f"{rule}_mean_one",
            start="probe",
            weighting="mean_one",
            weighting_options=(("of", rule),),
        )
        for rule in RULES
    ),
    *CONTROLS[:2],
)

# Curves through `wise_ft` and `flow_wise_ft`.
ALPHAS = tuple(
    dataclasses.replace(method, name=f"{method.name}_{alpha:g}", alpha=alpha)
    for method in METHODS
    if method.averaging == "wise_ft"
    for alpha in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
)


def get_config(arg: str = "noisy") -> ExperimentConfig:
    """Returns the configuration of a setting, one of `ARGUMENTS`."""
    arg = arg or "noisy"
    if arg not in ARGUMENTS:
        raise ConfigError(f"quickstart.py:{arg} is unknown; use one of {', '.join(ARGUMENTS)}")

    def stage(epochs: int, learning_rate: float) -> StageConfig:
        optimizer = OptimizerConfig(learning_rate=learning_rate, weight_decay=5e-4)
        return StageConfig(epochs=epochs, batch_size=64, optimizer=optimizer)

    noise = {"clean": (0.0,), "full": (0.3, 0.0), "weightings": (0.3, 0.0)}.get(arg, (0.3,))
    config = ExperimentConfig(
        name="quickstart" if arg == "noisy" else f"quickstart-{arg}",
        seeds=(0,),
        model=ResNetConfig(in_channels=1, width=16, depths=(1, 1, 1)),
        data=GlyphDataConfig(label_noise=noise),
        pretrain=stage(6, 0.1),
        # The best of 0.03, 0.1, 0.3 and 1 on validation data with noisy labels, seeds 0 and 1.
        probe=stage(15, 0.1),
        scoring=ScoringConfig(batch_size=256),
        finetune=stage(15, 0.03),
        head=stage(15, 0.03),
        learning_rates=(0.03,),
        methods=METHODS,
        eval_every_epochs=3,
    )
    if arg in ("full", "weightings"):
        rates = (0.003, 0.01, 0.03, 0.1)
        methods = METHODS + CONTROLS if arg == "full" else WEIGHTINGS
        return replace(config, seeds=(0, 1, 2), learning_rates=rates, methods=methods)
    if arg == "compare":
        return replace(config, seeds=(0, 1, 2), methods=METHODS + ALPHAS)
    if arg == "tiny":
        data = GlyphDataConfig(
            image_size=8,
            pretrain_train=128,
            pretrain_validation=64,
            pretrain_test=64,
            target_train=128,
            target_validation=64,
            label_noise=(0.3,),
        )
        stages = ("pretrain", "probe", "finetune", "head")
        return replace(
            config,
            {f"{name}.epochs": 1 for name in stages},
            model=ResNetConfig(in_channels=1, width=8, depths=(1, 1)),
            data=data,
            methods=METHODS + CONTROLS,
        )
    return config
