"""Language experiments of arXiv:2502.02797: Gemma 2 2B or Llama 3.2 3B on MetaMathQA.

MetaMathQA has 395,000 grade-school problems with worked answers. The hyper-parameters are the
paper's. The data are a JSON-lines file with the fields `query` and `response`; the weights are a
folder in Hugging Face's format or, as here, a model of the Hugging Face Hub. The argument is a
model and a method:

  easy-jax run --config=configs/metamath.py:gemma2_2b --config.train.path=MetaMathQA.jsonl
  easy-jax run --config=configs/metamath.py:gemma2_2b,standard    unweighted
  easy-jax run --config=configs/metamath.py:gemma2_2b,flow_token  one weight per token
  easy-jax run --config=configs/metamath.py:gemma2_2b,lora        adapters of rank 64 alone
  easy-jax run --config=configs/metamath.py:gemma2_2b,flow_lora   adapters alone, FLOW's weights
  easy-jax run --config=configs/metamath.py:gemma2_2b,l2          L2 distance to the start
  easy-jax run --config=configs/metamath.py:gemma2_2b,flow_l2     the same with FLOW's weights
  easy-jax run --config=configs/metamath.py:gemma2_2b,dft         DFT (likewise eaft)
  easy-jax run --config=configs/metamath.py:gemma2_2b,kl          KL to the frozen distribution
  easy-jax run --config=configs/metamath.py:gemma2_2b,asft        the same with DFT's weights

The other model is `llama32_3b`. Without a method, the method is FLOW by sequence (`flow`).

Hardware: a TPU slice or a GPU node. Full fine-tuning takes 20 bytes per parameter (weights,
gradients, Adam, the frozen model): 52 GB for the 2.6 billion parameters of Gemma 2 2B and 64 GB
for the 3.2 billion of Llama 3.2 3B, in addition to the activations. `kl` and `asft` hold the
frozen parameters once more, in the optimiser's state.
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
    MethodConfig("dft", weighting="dft"),
    MethodConfig("eaft", weighting="eaft"),
    MethodConfig("kl", anchor="kl", anchor_strength=0.05),
    MethodConfig("asft", weighting="dft", anchor="kl", anchor_strength=0.05),
)
# Path of the weights, BOS token and EOS token.
MODELS = {
    "gemma2_2b": ("hf://google/gemma-2-2b", "<bos>", "<eos>"),
    "llama32_3b": ("hf://meta-llama/Llama-3.2-3B", "<|begin_of_text|>", "<|end_of_text|>"),
}
ARGUMENTS = tuple(f"{model},{method.name}" for model in MODELS for method in METHODS)


def get_config(arg: str = "gemma2_2b") -> LanguageConfig:
    """Returns the configuration of a model and a method."""
    arg = arg if "," in arg else f"{arg},flow"
    if arg not in ARGUMENTS:
        raise ConfigError(
            f"metamath.py:{arg} is unknown; use one of the models {list(MODELS)} and, after a "
            f"comma, one of the methods {[method.name for method in METHODS]}"
        )
    model, name = arg.split(",")
    path, bos_token, eos_token = MODELS[model]
    (method,) = (each for each in METHODS if each.name == name)
    return LanguageConfig(
        name=f"{model}-metamath-{name}".replace("_", "-"),
        seed=42,
        mesh=MeshConfig(data=1, fsdp=-1),
        model=LanguageModelConfig(
            path=path,
            dtype="bfloat16",
            param_dtype="float32",
            remat="full",
            lora_rank=64,
            lora_alpha=64.0,
        ),
        train=InstructionsConfig(format="jsonl", path="MetaMathQA.jsonl"),
        text=TextConfig(
            bos_token=bos_token,
            eos_token=eos_token,
            border="authors",  # as in the paper, targets start after the prompt's own tokens
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
