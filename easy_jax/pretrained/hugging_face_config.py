"""Reads a Hugging Face `config.json`; each field is used, known to have no effect, or refused."""

import math
from collections.abc import Mapping
from typing import Any

from easy_jax.io.checks import ConfigError
from easy_jax.models.families import FAMILIES, Family
from easy_jax.models.transformer_config import Llama3Rope, TransformerConfig

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
_OFF = {"add_cross_attention", "pruned_heads", "use_mrope", "use_sliding_window"}
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
# Names of Hugging Face for ours.
_ACTIVATIONS = {"silu": ("silu",), "gelu": ("gelu_pytorch_tanh", "gelu_tanh")}


def parse_config(content: Mapping[str, Any]) -> TransformerConfig:
    """Returns the configuration that the content of a `config.json` describes.

    Raises:
      ConfigError: an architecture that is not supported, a field that is not known, a
        missing one, or a value that this implementation cannot honour; each by name.

    Example:
      >>> parse_config({"model_type": "llama", "vocab_size": 8, "hidden_size": 4,
      ...     "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}).head_dim
      2
    """
    name = content.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"config.json: model_type is {name!r}; supported are {sorted(FAMILIES)}")
    family = FAMILIES[name]
    _check_fields(content)
    _check_types(content)
    _check_parts(content, family)
    sizes = _sizes(content)
    rope = _rope(content)
    windows = _windows(content, name, family.windows)
    return TransformerConfig(
        name,
        **sizes,
        **rope,
        query_scale=_query_scale(content, family, sizes["head_dim"]),
        attention_cap=_cap("attn_logit_softcapping", content, family.attention_cap),
        final_cap=_cap("final_logit_softcapping", content, family.final_cap),
        windows=windows,
        tied=content.get("tie_word_embeddings", family.tied),
    )


def _check_fields(content: Mapping[str, Any]) -> None:
    """Raises an error for missing fields, and for unknown ones that may have an effect."""
    unknown = sorted(name for name in content.keys() - _USED if not _without_effect(name, content))
    if unknown:
        raise ConfigError(
            f"config.json: the fields {unknown} are not supported; the model would not be the "
            "one that was trained"
        )
    missing = [name for name in _REQUIRED if name not in content]
    if missing:
        raise ConfigError(f"config.json: the fields {missing} are missing")


def _without_effect(name: str, content: Mapping[str, Any]) -> bool:
    """Whether a field does not change the model, by its name or because it switches a part off."""
    value = content[name]
    noted = name in _IGNORED or name.startswith(_IGNORED_STARTS) or name.endswith(_IGNORED_ENDS)
    noted |= name == "max_window_layers" and content.get("use_sliding_window") is False
    return noted or value is None or ((name in _OFF or "dropout" in name) and not value)


def _check_types(content: Mapping[str, Any]) -> None:
    """Checks that sizes are possible, and the types of all other fields."""
    for name in _SIZES:
        value, largest = content.get(name), _LARGEST.get(name, 2**31 - 1)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
            raise ConfigError(
                f"config.json: {name} is {value!r:.80}; it must be a positive integer, at most "
                f"{largest}"
            )
    for name, kind in _TYPES.items():
        value = content.get(name)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(
                f"config.json: {name} is {value!r:.80}; it must be of type {kind.__name__}"
            )
    if not all(isinstance(each, str) for each in content.get("layer_types") or ()):
        raise ConfigError("config.json: layer_types must be a list of strings")


def _positive(name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} is {value!r:.80}; it must be a positive number")
    return value


def _check_parts(content: Mapping[str, Any], family: Family) -> None:
    """Raises an error for an activation that the family does not have, and for unknown parts."""
    allowed = _ACTIVATIONS[family.activation]
    activation = content.get("hidden_activation", content.get("hidden_act"))
    _honour("hidden_act", allowed[0] if activation is None else activation, *allowed)
    for name in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        _honour(name, content.get(name), None, False)
    _honour("attention_dropout", content.get("attention_dropout"), None, 0, 0.0)


def _sizes(content: Mapping[str, Any]) -> dict[str, Any]:
    heads = content["num_attention_heads"]
    kv_heads = content.get("num_key_value_heads") or heads
    head_dim = content.get("head_dim") or content["hidden_size"] // heads
    norm_eps = _positive("rms_norm_eps", content.get("rms_norm_eps", 1e-6))
    if head_dim % 2 or head_dim < 2:
        raise ConfigError(
            f"config.json: head_dim is {head_dim}; rotary positions need an even number"
        )
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads is {heads}; it must be a multiple of "
            f"num_key_value_heads = {kv_heads}"
        )
    return {
        "vocab": content["vocab_size"],
        "embed": content["hidden_size"],
        "mlp": content["intermediate_size"],
        "layers": content["num_hidden_layers"],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "norm_eps": norm_eps,
    }


def _query_scale(content: Mapping[str, Any], family: Family, head_dim: int) -> float:
    if family.query_scale is None:
        return float(head_dim**-0.5)
    if "query_pre_attn_scalar" not in content:
        return family.query_scale
    scalar = _positive("query_pre_attn_scalar", content["query_pre_attn_scalar"])
    return float(scalar**-0.5)


def _cap(name: str, content: Mapping[str, Any], default: float | None) -> float | None:
    value = content.get(name, default)
    if default is None:
        _honour(name, value, None)
    return None if value is None else _positive(name, value)


def _windows(
    content: Mapping[str, Any], family: str, default: tuple[int | None, ...]
) -> tuple[int | None, ...]:
    """Returns the shortest period of the layers' sliding windows (None: full attention)."""
    sizes = [size for size in default if size is not None]
    if not sizes:
        if set(content.get("layer_types") or ["full_attention"]) != {"full_attention"}:
            raise ConfigError(f"config.json: layer_types of a {family} must all be full_attention")
        if content.get("use_sliding_window") is not False:  # Qwen's switch
            _honour("sliding_window", content.get("sliding_window"), None)
        return (None,)
    window = content.get("sliding_window", sizes[0])
    if window is not None:
        _positive("sliding_window", window)
    layers = content["num_hidden_layers"]
    kinds = ["full_attention" if size is None else "sliding_attention" for size in default]
    types = content.get("layer_types") or [kinds[layer % len(kinds)] for layer in range(layers)]
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


def _rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings of transformers 4 (`rope_scaling`) or 5 (`rope_parameters`)."""
    rope = {"rope_theta": content.get("rope_theta", 10_000.0)}
    rope |= content.get("rope_scaling") or {}
    rope |= content.get("rope_parameters") or {}
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
