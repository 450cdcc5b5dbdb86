"""Sizes and constants of a decoder-only transformer."""

import dataclasses

from easy_jax.models.families import FAMILIES, Family


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Parameters of Llama 3's scaling of rotary frequencies (`rope_scaling` of type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and constants of a transformer; its family determines the rest of the architecture.

    These fields are part of the fingerprints of checkpoints and loss tables.

    Attributes:
      family: a name in `easy_jax.models.families.FAMILIES`, such as `llama` or `gemma2`.
      vocab: number of token ids.
      embed: number of features of the hidden states.
      mlp: number of hidden features of the MLP.
      layers: number of layers.
      heads, kv_heads: number of query heads, and of key and value heads.
      head_dim: number of features of a head.
      norm_eps: constant added to the mean square in RMS norms.
      rope_theta, rope_scaling: base of the rotary frequencies, and their scaling.
      query_scale: factor of the queries before the softmax.
      attention_cap, final_cap: soft caps of the attention logits and of the head's logits.
      windows: sliding window, in tokens, of each layer in one period of the pattern, which repeats
        over the layers; None for full attention. Gemma 2 has (4096, None).
      tied: whether the head shares the weights of the embedding.

    Example:
      >>> config = TransformerConfig(
      ...     "llama", vocab=256, embed=64, mlp=128, layers=2, heads=4, kv_heads=2, head_dim=16
      ... )
      >>> config.tied, config.windows
      (True, (None,))
    """

    family: str
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

    @property
    def features(self) -> Family:
        """The features of the family.

        Raises:
          ConfigError: the family is unknown; the message suggests the nearest name.
        """
        return FAMILIES.find(self.family, "family")


# Name on the Hugging Face Hub -> configuration.
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
