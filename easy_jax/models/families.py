"""Model families: how each differs from Llama, and the names of its tensors in checkpoints.

A new decoder-only family is one entry in `FAMILIES`. `models/transformer.py` and
`pretrained/hugging_face.py` read the features of the entry and never test its name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from easy_jax.io.registry import Registry

Activation = Literal["silu", "gelu"]

_MAPS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_PRE_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclasses.dataclass(frozen=True)
class Family:
    """Features of a family of decoder-only transformers; the defaults are Llama's.

    Attributes:
      activation: activation of the MLP's gate; `gelu` is the tanh approximation.
      norm_offset: constant added to the scale of every RMS norm; Gemma's scale is 1 + w.
      head_norm: whether an RMS norm is applied to every query and key head, before the rotation.
      qkv_bias: whether queries, keys and values have a bias.
      post_norm: whether RMS norms follow attention and MLP, before the residual is added.
      scaled_embeddings: whether embeddings are multiplied by sqrt(embed).
      tied: default for checkpoints whose configuration does not say whether the head shares the
        weights of the embedding.
      query_scale: default factor of the queries; None if it is always 1 / sqrt(head_dim).
      attention_cap, final_cap: default soft caps of the attention logits and of the head's logits.
        None: the family has no such cap, and a configuration that sets one is refused.
      windows: default period of sliding windows, in tokens, with None for full attention.
        (None,): the family has full attention only, and other configurations are refused.
      tensors: module of a layer -> its name in a checkpoint, below `model.layers.<i>.`.
    """

    activation: Activation = "silu"
    norm_offset: float = 0.0
    head_norm: bool = False
    qkv_bias: bool = False
    post_norm: bool = False
    scaled_embeddings: bool = False
    tied: bool = False
    query_scale: float | None = None
    attention_cap: float | None = None
    final_cap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: _MAPS | _PRE_NORMS)


# `model_type` in Hugging Face's `config.json` -> the family.
FAMILIES: Registry[Family] = Registry("model family")

FAMILIES.register("llama")(Family())  # Llama 2 and 3, SmolLM2
FAMILIES.register("mistral")(Family(windows=(4096,)))  # or none, as later checkpoints say
FAMILIES.register("qwen2")(Family(qkv_bias=True))  # Qwen 2 and 2.5
FAMILIES.register("qwen3")(
    Family(
        head_norm=True,
        tensors=_MAPS | _PRE_NORMS | {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"},
    )
)
FAMILIES.register("gemma2")(
    Family(
        activation="gelu",
        norm_offset=1.0,
        post_norm=True,
        scaled_embeddings=True,
        tied=True,
        query_scale=256**-0.5,
        attention_cap=50.0,
        final_cap=30.0,
        windows=(4096, None),
        tensors={
            **_MAPS,
            "attention_norm": "input_layernorm",
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        },
    )
)
