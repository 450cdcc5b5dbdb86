"""FLOW on a real language model, offline: SmolLM2-135M and grade-school problems.

SmolLM2-135M-Instruct is fine-tuned on problems that `reasoning-gym` generates, by every method
with the same steps and learning rate. Learning is measured on held-out problems of the same kind,
forgetting by the cross-entropy on a story by Jules Verne and on Python's docstrings.

  pip install ".[smollm2]" && python scripts/fetch_smollm2.py models/smollm2
  easy-jax run --config=configs/smollm2_gsm.py
  easy-jax score --config=configs/smollm2_gsm.py \
      --config.train.format=jsonl --config.train.path=FILE.jsonl   the loss table of any file

Hardware: 2 CPU cores, 19 minutes. Results (docs/results.md): plain fine-tuning forgets, FLOW
forgets as much, and WiSE-FT forgets less than half as much or nothing. At a learning rate of
1e-4, plain fine-tuning learns as much and forgets almost nothing.
"""

from easy_jax.config import (
    ConfigError,
    InstructionsConfig,
    LanguageConfig,
    LanguageModelConfig,
    MethodConfig,
    OptimizerConfig,
    ScoringConfig,
    StageConfig,
    TextConfig,
)

METHODS = (
    MethodConfig("standard"),
    MethodConfig("flow", weighting="flow"),
    MethodConfig("flow_token", weighting="flow_token"),
    *(
        MethodConfig(f"wise_ft_{alpha:g}", averaging="wise_ft", alpha=alpha)
        for alpha in (0.3, 0.5, 0.7)
    ),
)


ARGUMENTS = ("",)


def get_config(arg: str = "") -> LanguageConfig:
    """Returns the configuration, which has no variants."""
    if arg not in ARGUMENTS:
        raise ConfigError(f"smollm2_gsm.py:{arg} is unknown; it takes no argument")
    return LanguageConfig(
        name="smollm2-gsm",
        model=LanguageModelConfig(path="models/smollm2", dtype="float32", remat="dots"),
        train=InstructionsConfig(format="gsm_symbolic", seed=42, size=96),
        heldout=(InstructionsConfig(format="gsm_symbolic", seed=42, start=96, size=48),),
        general=("verne", "docstrings"),
        general_characters=12_288,
        # No border of these problems lies within a token, so `border` makes no difference.
        text=TextConfig(eos_token="<|im_end|>", max_length=384, row_length=512),
        scoring=ScoringConfig(batch_size=8),
        finetune=StageConfig(
            epochs=2,
            batch_size=4,
            reduction="token_mean",
            optimizer=OptimizerConfig(name="adamw", learning_rate=3e-4, warmup_ratio=0.03),
        ),
        methods=METHODS,
        eval_batch_size=8,
        save_every_steps=1000,
    )
