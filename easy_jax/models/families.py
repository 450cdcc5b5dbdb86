"""Model families: what each adds to Llama, and what its tensors are called in checkpoints.

A family of the same kind is one entry of `FAMILIES`; `models/transformer.py` and
`pretrained/hugging_face.py` read its features and never test its name.
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
      activation: of the MLP's gate; `gelu` is the tanh approximation.
      norm_offset: added to the scale of every RMS norm; Gemma's scale is 1 + w.
      post_norm: RMS norms after attention and MLP, before the residual is added.
      scaled_embeddings: embeddings are multiplied by sqrt(embed).
      tied: the head is the embedding, where a checkpoint's configuration does not say.
      query_scale: factor of the queries where the configuration does not say; None: always
        1 / sqrt(head_dim).
      attention_cap, final_cap: soft caps of the attention logits and of the head's logits where
        the configuration does not say; None: the family has no such cap, and a configuration
        with one is refused.
      windows: period of sliding windows in tokens (None: full attention) where the configuration
        does not say; (None,): the family has full attention only, and others are refused.
      tensors: modules of a layer -> their names in a checkpoint, below `model.layers.<i>.`.
    """

    activation: Activation = "silu"
    norm_offset: float = 0.0
    post_norm: bool = False
    scaled_embeddings: bool = False
    tied: bool = False
    query_scale: float | None = None
    attention_cap: float | None = None
    final_cap: float | None = None
    windows: tuple[int | None, ...] = (None,)
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: _MAPS | _PRE_NORMS)


# By `model_type` of Hugging Face's `config.json`.
FAMILIES: Registry[Family] = Registry("model family")

FAMILIES.register("llama")(Family())  # Llama 2 and 3, SmolLM2
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
