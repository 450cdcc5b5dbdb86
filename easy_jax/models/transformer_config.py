"""The shape of a decoder-only transformer, read from a Hugging Face `config.json`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from easy_jax.io.checks import ConfigError

# Fields that do not change what the model computes when it is trained or scored: what the file
# is about, and how text is generated. Older versions of transformers write all of them.
_IGNORED = {
    "architectures",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "cache_implementation",
    "chunk_size_feed_forward",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "max_position_embeddings",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "rope_interleaved",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
    "use_cache",
}
# The notes of tools (the code that `auto_map` names is never run), and ids of tokens.
_IGNORED_STARTS, _IGNORED_ENDS = ("_", "unsloth_"), ("_token_id",)
# Parts that a file may say it does not have.
_OFF = {"add_cross_attention", "pruned_heads", "use_sliding_window"}
_USED = {
    "attention_bias",
    "attention_dropout",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_bidirectional_attention",
    "vocab_size",
}
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_SIZES = (*_REQUIRED, "num_key_value_heads", "head_dim")
_LARGEST = {"num_hidden_layers": 10_000}  # each has names of its own, which are all listed
_TYPES = {
    "tie_word_embeddings": bool,
    "sliding_window": int,
    "layer_types": list,
    "rope_scaling": dict,
    "rope_parameters": dict,
}
_ACTIVATIONS = {"llama": ("silu",), "gemma2": ("gelu_pytorch_tanh", "gelu_tanh")}


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3's stretching of low rotary frequencies: `rope_scaling` of type `llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and constants of a Llama or a Gemma 2.

    Attributes:
      family: `llama` (SwiGLU, RMS norm before attention and MLP; also SmolLM2) or `gemma2`
        (GeGLU, norms before and after with scale 1 + w, embeddings times sqrt(embed)).
      embed, mlp, layers, heads, kv_heads, head_dim, vocab: sizes.
      windows: sliding window per layer of a period, None for full attention; the pattern
        repeats over the layers. Gemma 2 has (4096, None).
      query_scale: what queries are multiplied by before the softmax.
      attention_cap, final_cap: soft caps of attention logits and of the head's logits.
      tied: the head is the embedding.
    """

    family: Literal["llama", "gemma2"]
    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    query_scale: float = 1.0
    attention_cap: float | None = None
    final_cap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    tied: bool = True


# By their names on the Hugging Face hub: what their `config.json` says.
KNOWN = {
    "google/gemma-2-2b": TransformerConfig(
        "gemma2",
        vocab=256_000,
        embed=2304,
        mlp=9216,
        layers=26,
        heads=8,
        kv_heads=4,
        head_dim=256,
        query_scale=256**-0.5,
        attention_cap=50.0,
        final_cap=30.0,
        windows=(4096, None),
    ),
    "meta-llama/Llama-3.2-3B": TransformerConfig(
        "llama",
        vocab=128_256,
        embed=3072,
        mlp=8192,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=Llama3Rope(32, 1, 4, 8192),
        query_scale=128**-0.5,
    ),
}


def from_hugging_face(config: Mapping[str, Any]) -> TransformerConfig:
    """The configuration that a checkpoint's `config.json` describes.

    Raises:
      ConfigError: an architecture that is not supported, a field that is not known, a
        missing one, or a value that this implementation cannot honour; each by name.

    Example:
      >>> from_hugging_face({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
      ...     "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}).head_dim
      2
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _ACTIVATIONS:
        raise ConfigError(
            f"config.json: model_type is {family!r}; supported are {sorted(_ACTIVATIONS)}"
        )
    unknown = sorted(name for name in config.keys() - _USED if not _without_effect(name, config))
    if unknown:
        raise ConfigError(
            f"config.json: the fields {unknown} are not supported; the model would not be the "
            "one that was trained"
        )
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise ConfigError(f"config.json: the fields {missing} are missing")
    _check_types(config)
    activation = config.get("hidden_activation", config.get("hidden_act"))
    if activation is None:
        activation = _ACTIVATIONS[family][0]
    _honour("hidden_act", activation, *_ACTIVATIONS[family])
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        _honour(name, config.get(name), None, False)
    _honour("attention_dropout", config.get("attention_dropout"), None, 0, 0.0)
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    shared = {
        "vocab": config["vocab_size"],
        "embed": config["hidden_size"],
        "mlp": config["intermediate_size"],
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "norm_eps": _positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
        **_rope(config),
    }
    if head_dim % 2 or head_dim < 2:
        raise ConfigError(
            f"config.json: head_dim is {head_dim}; rotary positions need an even number"
        )
    if shared["heads"] % shared["kv_heads"]:
        raise ConfigError(
            f"config.json: num_attention_heads is {heads}; it must be a multiple of "
            f"num_key_value_heads = {shared['kv_heads']}"
        )
    if family == "llama":
        if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
            raise ConfigError("config.json: layer_types of a llama must all be full_attention")
        for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
            _honour(name, config.get(name), None)
        return TransformerConfig(
            "llama",
            **shared,
            query_scale=head_dim**-0.5,
            tied=config.get("tie_word_embeddings", False),
        )
    return TransformerConfig(
        "gemma2",
        **shared,
        query_scale=_positive("query_pre_attn_scalar", config.get("query_pre_attn_scalar", 256))
        ** -0.5,
        attention_cap=_cap("attn_logit_softcapping", config, 50.0),
        final_cap=_cap("final_logit_softcapping", config, 30.0),
        windows=_windows(config),
        tied=config.get("tie_word_embeddings", True),
    )


def _without_effect(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a field leaves the model as it is: by its name, or because it switches a part off."""
    noted = name in _IGNORED or name.startswith(_IGNORED_STARTS) or name.endswith(_IGNORED_ENDS)
    return (
        noted or config[name] is None or ((name in _OFF or "dropout" in name) and not config[name])
    )


def _check_types(config: Mapping[str, Any]) -> None:
    """Sizes that a model can have, and the types of all that is not a number."""
    for name in _SIZES:
        value, largest = config.get(name), _LARGEST.get(name, 2**31 - 1)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise ConfigError(
                f"config.json: {name} is {value!r:.80}; it must be a positive integer, at most "
                f"{largest}"
            )
    for name, kind in _TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"config.json: {name} is {value!r:.80}; it must be of type {kind.__name__}"
            )
    if not all(isinstance(each, str) for each in config.get("layer_types") or ()):
        raise ConfigError("config.json: layer_types must be a list of strings")


def _positive(name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} is {value!r:.80}; it must be a positive number")
    return value


def _cap(name: str, config: Mapping[str, Any], default: float) -> float | None:
    value = config.get(name, default)
    return None if value is None else _positive(name, value)


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """Gemma 2's alternation of sliding and full attention, as its shortest period."""
    window = config.get("sliding_window", 4096)
    if window is not None:
        _positive("sliding_window", window)
    layers = config["num_hidden_layers"]
    types = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)
    ]
    by_type = {"sliding_attention": window, "full_attention": None}
    if len(types) != layers or not set(types) <= by_type.keys():
        raise ConfigError(
            f"config.json: layer_types is {types}; it must have {layers} entries out of "
            f"{sorted(by_type)}"
        )
    windows = [by_type[kind] for kind in types]
    periods = [p for p in range(1, layers + 1) if layers % p == 0]
    period = next(p for p in periods if windows == windows[:p] * (layers // p))
    return tuple(windows[:period])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, in the form of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
    rope |= config.get("rope_scaling") or {}
    rope |= config.get("rope_parameters") or {}
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = _positive("rope_theta", rope.pop("rope_theta"))
    if kind == "default":
        if rope:
            raise ConfigError(f"config.json: the rope fields {sorted(rope)} are not supported")
        return {"rope_theta": theta}
    _honour("rope_scaling.rope_type", kind, "llama3")
    names = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    if rope.keys() != set(names):
        raise ConfigError(
            f"config.json: rope_scaling has the fields {sorted(rope)}; llama3 has {sorted(names)}"
        )
    values = (_positive(f"rope_scaling.{name}", rope[name]) for name in names)
    return {"rope_theta": theta, "rope_scaling": Llama3Rope(*values)}


def _honour(name: str, value: object, *allowed: object) -> None:
    if value not in allowed:
        raise ConfigError(f"config.json: {name} is {value!r}; supported: {list(allowed)}")
