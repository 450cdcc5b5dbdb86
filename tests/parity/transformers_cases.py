"""Tiny configurations of `transformers`, several shapes for each family."""

import dataclasses
from typing import Any

import torch

SHARED = {"vocab_size": 98, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration of `transformers`; `scale` multiplies the random weights."""

    family: str
    config: dict[str, Any]
    length: int
    scale: float = 6.0
    shard_size: str = "5GB"
    dtype: Any = torch.float32


CASES = {
    "llama_tied": Case(
        "Llama",
        {"num_hidden_layers": 3, "num_key_value_heads": 2, "tie_word_embeddings": True},
        length=24,
    ),
    "llama_rope": Case(
        "Llama",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "rope_parameters": LLAMA3_ROPE,
            "max_position_embeddings": 128,
        },
        length=40,
        shard_size="20KB",
    ),
    "gemma2": Case(
        "Gemma2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "query_pre_attn_scalar": 7,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        length=24,
    ),
    "qwen2": Case(
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": QWEN_ROPE,
        },
        length=24,
    ),
    "qwen3": Case(
        "Qwen3",
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "head_dim": 10,  # times 4 heads is not the hidden size
            "tie_word_embeddings": True,
            "rope_parameters": QWEN_ROPE,
        },
        length=24,
    ),
    "qwen3_untied": Case(
        "Qwen3",
        {"num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": False},
        length=12,
        shard_size="20KB",
    ),
    "mistral": Case(
        "Mistral",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        length=24,
    ),
    "mistral_window": Case(
        "Mistral",
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5},
        length=24,
    ),
    "llama_bfloat16": Case(
        "Llama",
        {"num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True},
        length=12,
        shard_size="20KB",
        dtype=torch.bfloat16,
    ),
}
