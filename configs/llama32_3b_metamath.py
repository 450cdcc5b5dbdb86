"""The paper's language experiment: Llama 3.2 3B on MetaMathQA.

395,000 grade-school problems with worked answers; the paper's hyper-parameters. The data are a
JSON-lines file with the fields `query` and `response`, the weights a folder in Hugging Face's
format or, as here, a model of the Hugging Face Hub:

  easy-jax run --config=configs/llama32_3b_metamath.py --config.train.path=MetaMathQA.jsonl
  easy-jax run --config=configs/llama32_3b_metamath.py:standard    unweighted
  easy-jax run --config=configs/llama32_3b_metamath.py:flow_token  a weight per token
  easy-jax run --config=configs/llama32_3b_metamath.py:lora        adapters alone, rank 64
  easy-jax run --config=configs/llama32_3b_metamath.py:flow_lora   adapters alone, FLOW's weights
  easy-jax run --config=configs/llama32_3b_metamath.py:l2          pulled to the pre-trained weights
  easy-jax run --config=configs/llama32_3b_metamath.py:flow_l2     the same with FLOW's weights

Without an argument it is FLOW by sequence, `llama32_3b_metamath.py:flow`.

Hardware: a TPU slice or a GPU node. Training everything takes 20 bytes for each of its 3.2 billion
parameters (weights, gradients, Adam, the frozen model), 64 GB in all, and activations.
"""

from easy_jax.config import (
    ConfigError,
    InstructionsConfig,
    LanguageConfig,
    LanguageModelConfig,
    MeshConfig,
    MethodConfig,
    OptimizerConfig,
    ScoringConfig,
    StageConfig,
    TextConfig,
)

METHODS = (
    MethodConfig("flow", weighting="flow"),
    MethodConfig("standard"),
    MethodConfig("flow_token", weighting="flow_token"),
    MethodConfig("lora", trainable="lora"),
    MethodConfig("flow_lora", weighting="flow", trainable="lora"),
    MethodConfig("l2", anchor="l2_sp", anchor_strength=1e-3),
    MethodConfig("flow_l2", weighting="flow", anchor="l2_sp", anchor_strength=1e-3),
)
ARGUMENTS = tuple(method.name for method in METHODS)


def get_config(arg: str = "") -> LanguageConfig:
    """The configuration of one method."""
    if (arg or "flow") not in ARGUMENTS:
        raise ConfigError(f"llama32_3b_metamath.py:{arg} is unknown; use one of {list(ARGUMENTS)}")
    method = METHODS[ARGUMENTS.index(arg or "flow")]
    return LanguageConfig(
        name=f"llama32-3b-metamath-{method.name.replace('_', '-')}",
        seed=42,
        mesh=MeshConfig(data=1, fsdp=-1),
        model=LanguageModelConfig(
            path="hf://meta-llama/Llama-3.2-3B",
            dtype="bfloat16",
            param_dtype="float32",
            remat="full",
            lora_rank=64,
            lora_alpha=64.0,
        ),
        train=InstructionsConfig(format="jsonl", path="MetaMathQA.jsonl"),
        text=TextConfig(
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
            border="authors",  # the paper's: targets start after the prompt's own tokens
            max_length=1024,
            row_length=1024,
            max_segments=1,
        ),
        scoring=ScoringConfig(batch_size=128),
        finetune=StageConfig(
            epochs=2,
            batch_size=128,
            reduction="token_mean",
            optimizer=OptimizerConfig(name="adamw", learning_rate=1e-5, warmup_ratio=0.03),
        ),
        methods=(method,),
        eval_batch_size=128,
    )
