"""A decoder-only transformer in Flax NNX, with the features of the families in `families.py`.

Shape suffixes: B rows, T positions, P rows times positions, I and O inputs and outputs of a linear
map, D embed, N heads, K key-value heads, H head_dim, F mlp, V vocabulary, R rank of an adapter,
G groups of layers.

The forward pass scans over groups of layers, so that compile time does not grow with depth. A
group is one period of the attention pattern (in Gemma 2 two layers: sliding and full attention),
and every parameter of a layer has a leading axis over the groups. Parameters have `logical_axes`,
as in `resnet.py`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from easy_jax.kernels.attention import rotate
from easy_jax.kernels.splash import KEPT, attend
from easy_jax.models.embedding import look_up
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import sharding

Remat = Literal["none", "full", "dots", "outputs"]
Rope = tuple[jax.Array, jax.Array]  # cosines and sines
# Activations that the remat policy `outputs` saves. Per byte, saving the output of a linear map
# avoids as many operations as the map has inputs. `down` has the most inputs; `up`, one of the two
# widest outputs, is recomputed.
_OUTPUTS = ("q", "k", "v", KEPT, "o", "gate", "down")
_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "outputs": jax.checkpoint_policies.save_only_these_names(*_OUTPUTS),
}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
}
_INIT_SCALE = 0.02  # standard deviation of random weights: initializer_range of Llama and Gemma


class Linear(nnx.Module):
    """A stack of linear maps, one per group, optionally with a bias and low-rank adapters.

    Args:
      groups: number of maps in the stack.
      inputs, outputs: logical axis -> size, for the axes that are contracted and produced.
      param_dtype: dtype of the kernel.
      rngs: NNX random streams; `params` is used.
      bias: whether the maps have a bias, which starts at 0.
    """

    has_bias = False  # not set for maps without: it would be part of the structure of checkpoints

    def __init__(
        self,
        groups: int,
        inputs: dict[str, int],
        outputs: dict[str, int],
        param_dtype: Any,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.inputs = tuple(inputs.items())
        self.outputs = tuple(outputs.items())
        axes = {"layers": groups, **inputs, **outputs}
        self.kernel = _normal(rngs, axes, param_dtype)
        if bias:
            self.has_bias = True
            axes = {"layers": groups, **outputs}
            zeros = jnp.zeros(tuple(axes.values()), param_dtype)
            self.bias = nnx.Param(zeros, logical_axes=tuple(axes))
        # Declared as data, because Flax would treat None as static and lora.py adds adapters later.
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies one map of the stack, inside the scan: `[..., inputs] -> [..., outputs]`."""
        chex.assert_shape(x, (..., *(size for _, size in self.inputs)))
        y = self._product(x)
        if not self.has_bias:
            return y
        return y + jnp.expand_dims(_value(self.bias, x.dtype), range(x.ndim - len(self.inputs)))

    def _product(self, x: jax.Array) -> jax.Array:
        if sharding.is_tpu(sharding.current_mesh()):  # keeps heads as an axis with its own layout
            y = jnp.tensordot(x, _value(self.kernel, x.dtype), axes=len(self.inputs))
            if self.lora_a is not None and self.lora_b is not None:
                low = jnp.tensordot(x, _value(self.lora_a, x.dtype), axes=len(self.inputs))
                y += self.lora_scale * jnp.tensordot(low, _value(self.lora_b, x.dtype), axes=1)
            return y
        lead = x.shape[: x.ndim - len(self.inputs)]
        x_PI = x.reshape(math.prod(lead), -1)
        y_PO = x_PI @ _matrix(self.kernel, x_PI.shape[1], x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low_PR = x_PI @ _matrix(self.lora_a, x_PI.shape[1], x.dtype)
            y_PO += self.lora_scale * (low_PR @ _matrix(self.lora_b, low_PR.shape[1], x.dtype))
        return y_PO.reshape(*lead, *(size for _, size in self.outputs))


class RMSNorm(nnx.Module):
    """RMS norm in float32; the scale is the parameter plus the family's `norm_offset`."""

    def __init__(self, shape: dict[str, int], config: TransformerConfig, param_dtype: Any):
        self.offset = config.features.norm_offset
        self.eps = config.norm_eps
        scale = jnp.full(tuple(shape.values()), 1.0 - self.offset, param_dtype)
        self.scale = nnx.Param(scale, logical_axes=tuple(shape))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide_BTD = x_BTD.astype(jnp.float32)
        mean_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
        scale_D = self.scale.astype(jnp.float32) + self.offset
        wide_BTD = (
            wide_BTD
            * jax.lax.rsqrt(mean_BT1 + self.eps)
            * jnp.expand_dims(scale_D, range(x_BTD.ndim - 1))
        )
        return wide_BTD.astype(x_BTD.dtype)


class Block(nnx.Module):
    """The layers at one position of all groups: attention and a gated MLP with residuals."""

    def __init__(self, config: TransformerConfig, groups: int, param_dtype: Any, rngs: nnx.Rngs):
        self.config = config
        embed = {"embed": config.embed}
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.kv_heads, "head_dim": config.head_dim}
        mlp = {"mlp": config.mlp}
        norm = {"layers": groups, "norm": config.embed}

        def linear(inputs: dict[str, int], outputs: dict[str, int], bias: bool = False) -> Linear:
            return Linear(groups, inputs, outputs, param_dtype, rngs, bias)

        qkv_bias = config.features.qkv_bias
        self.q = linear(embed, heads, qkv_bias)
        self.k = linear(embed, kv_heads, qkv_bias)
        self.v = linear(embed, kv_heads, qkv_bias)
        self.o = linear(heads, embed)
        self.gate = linear(embed, mlp)
        self.up = linear(embed, mlp)
        self.down = linear(mlp, embed)
        self.attention_norm = RMSNorm(norm, config, param_dtype)
        self.mlp_norm = RMSNorm(norm, config, param_dtype)
        self.has_post_norms = config.features.post_norm
        if self.has_post_norms:
            self.attention_post_norm = RMSNorm(norm, config, param_dtype)
            self.mlp_post_norm = RMSNorm(norm, config, param_dtype)
        if config.features.head_norm:
            head_norm = {"layers": groups, "norm": config.head_dim}
            self.q_norm = RMSNorm(head_norm, config, param_dtype)
            self.k_norm = RMSNorm(head_norm, config, param_dtype)

    def __call__(
        self, x_BTD: jax.Array, rope: Rope, segment_ids_BT: jax.Array, window: int | None
    ) -> jax.Array:
        y_BTD = self.attention(self.attention_norm(x_BTD), rope, segment_ids_BT, window)
        x_BTD = x_BTD + (self.attention_post_norm(y_BTD) if self.has_post_norms else y_BTD)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (self.mlp_post_norm(y_BTD) if self.has_post_norms else y_BTD)

    def attention(
        self, x_BTD: jax.Array, rope: Rope, segment_ids_BT: jax.Array, window: int | None
    ) -> jax.Array:
        head_norm = self.config.features.head_norm
        q_BTNH = self.q(x_BTD)
        q_BTNH = rotate(self.q_norm(q_BTNH) if head_norm else q_BTNH, *rope)
        q_BTNH = checkpoint_name(q_BTNH, "q")
        k_BTKH = self.k(x_BTD)
        k_BTKH = rotate(self.k_norm(k_BTKH) if head_norm else k_BTKH, *rope)
        k_BTKH = checkpoint_name(k_BTKH, "k")
        y_BTNH = attend(
            q_BTNH,
            k_BTKH,
            checkpoint_name(self.v(x_BTD), "v"),
            segment_ids_BT,
            scale=self.config.query_scale,
            window=window,
            cap=self.config.attention_cap,
        )
        return checkpoint_name(self.o(y_BTNH), "o")

    def mlp(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = checkpoint_name(self.gate(x_BTD), "gate")
        gate_BTF = _ACTIVATIONS[self.config.features.activation](gate_BTF)
        up_BTF = checkpoint_name(self.up(x_BTD), "up")
        return checkpoint_name(self.down(gate_BTF * up_BTF), "down")


class Transformer(nnx.Module):
    """A decoder-only causal language model with random weights.

    `hugging_face.load` loads pre-trained ones.

    Args:
      config: sizes and family.
      dtype: dtype of the computation; softmax, norms, soft caps and the loss are always float32.
      param_dtype: dtype of the parameters.
      remat: which activations the backward pass recomputes. `none`: only attention's
        probabilities. `full`: everything except the inputs of layers. `dots`: everything except
        the outputs of linear maps (fastest on a CPU). `outputs`: everything except the outputs of
        attention and of all linear maps but `up` (fastest on a TPU among those that fit).
      rngs: NNX random streams; `params` is used.

    Example:
      >>> config = TransformerConfig("llama", vocab=11, embed=8, mlp=16, layers=1, heads=2,
      ...                            kv_heads=1, head_dim=4, query_scale=0.5)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((1, 5), int)).shape
      (1, 5, 11)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        if remat not in ("none", *_POLICIES):
            raise ValueError(f"remat is {remat!r}; it must be one of {['none', *_POLICIES]}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        vocab = {"vocab": config.vocab, "embed": config.embed}
        self.embedding = _normal(rngs, vocab, param_dtype)
        groups = config.layers // len(config.windows)
        self.blocks = nnx.List([Block(config, groups, param_dtype, rngs) for _ in config.windows])
        self.final_norm = RMSNorm({"norm": config.embed}, config, param_dtype)
        self.head = None if config.tied else _normal(rngs, vocab, param_dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns logits, float32 [B, T, V], for inspection.

        Losses use `hidden_states` and `head_VD` instead, which never materialise the logits. For
        the arguments, see `hidden_states`.
        """
        hidden_BTD = self.hidden_states(tokens_BT, positions_BT, segment_ids_BT)
        logits_BTV = jnp.einsum(
            "btd,vd->btv", hidden_BTD, self.head_VD(), preferred_element_type=jnp.float32
        )
        cap = self.config.final_cap
        return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)

    def hidden_states(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the final hidden states, [B, T, D] in the computation's dtype.

        Args:
          tokens_BT: token ids.
          positions_BT: positions within the segment, for the rotary embedding; default: 0, 1, ...
          segment_ids_BT: segment of each token; tokens attend to their own segment only. Default:
            one segment.
        """
        chex.assert_rank(tokens_BT, 2)
        batch, length = tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(length)[None, :], (batch, length))
        if segment_ids_BT is None:
            segment_ids_BT = jnp.zeros((batch, length), jnp.int32)
        chex.assert_equal_shape([tokens_BT, positions_BT, segment_ids_BT])
        x_BTD = look_up(self.embedding[...], tokens_BT, self.dtype)
        if self.config.features.scaled_embeddings:
            x_BTD = x_BTD * jnp.asarray(self.config.embed**0.5, self.dtype)
        rope = _rope(positions_BT, self.config)
        windows = tuple(None if w is None or w >= length else w for w in self.config.windows)
        graphdef: Any
        if sharding.is_tpu(sharding.current_mesh()) and len(set(windows)) == 1:
            graphdef, state = _flat(self.blocks, self.dtype)
            windows = windows[:1]
        else:
            graphdef, state = nnx.split(self.blocks)

        def layer(x_BTD: jax.Array, block: Block, window: int | None) -> jax.Array:
            x_BTD = block(x_BTD, rope, segment_ids_BT, window)
            return sharding.constrain(x_BTD, sharding.BATCH, None, None)

        if self.remat != "none":
            layer = jax.checkpoint(
                layer, prevent_cse=False, policy=_POLICIES[self.remat], static_argnums=2
            )

        def group(x_BTD: jax.Array, group_state: Any) -> tuple[jax.Array, None]:
            blocks: Any = nnx.merge(graphdef, group_state)
            for block, window in zip(blocks, windows, strict=True):
                x_BTD = layer(x_BTD, block, window)
            return x_BTD, None

        x_BTD, _ = jax.lax.scan(group, x_BTD, state)
        return self.final_norm(x_BTD)

    def head_VD(self) -> jax.Array:
        """Returns the matrix of the language-model head, in the computation's dtype."""
        head = self.embedding if self.head is None else self.head
        return head[...].astype(self.dtype)


def abstract(
    config: TransformerConfig, *, dtype: Any, param_dtype: Any, remat: Remat
) -> Transformer:
    """Returns a model of `ShapeDtypeStruct`s, which has the structure but allocates no arrays."""
    model: Transformer = nnx.eval_shape(
        lambda: Transformer(
            config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=nnx.Rngs(0)
        )
    )
    return model


def _normal(rngs: nnx.Rngs, axes: dict[str, int], dtype: Any) -> nnx.Param:
    value = _INIT_SCALE * jax.random.normal(rngs.params(), tuple(axes.values()), dtype)
    return nnx.Param(value, logical_axes=tuple(axes))


def _flat(blocks: Any, dtype: Any) -> tuple[Any, nnx.State]:
    """Interleaves the layers of all groups into one stack, for a scan over identical layers.

    Compared with a scan over pairs, the program and its memory are half as large. Kernels are cast
    to `dtype` before the scan, so that the gradients that the scan accumulates have that dtype too.
    """

    def join(*stacks: nnx.Variable[jax.Array]) -> nnx.Variable[jax.Array]:
        values = [stack.get_value() for stack in stacks]
        if "norm" not in stacks[0].get_metadata()["logical_axes"]:
            values = [value.astype(dtype) for value in values]
        value = jnp.stack(values, axis=1)
        return stacks[0].replace(value.reshape(-1, *value.shape[2:]))

    graphdef, _ = nnx.split(nnx.List([blocks[0]]))
    states = [nnx.state(nnx.List([block])) for block in blocks]
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return graphdef, jax.tree.map(join, *states, is_leaf=is_variable)


def _value(kernel: nnx.Variable[jax.Array], dtype: Any) -> jax.Array:
    """Returns the kernel of one layer, cast to `dtype` and then gathered from its shards."""
    axes = kernel.get_metadata()["logical_axes"][1:]  # inside the scan there is no group axis
    return sharding.gather_parameter(kernel[...].astype(dtype), axes)


def _matrix(kernel: nnx.Variable[jax.Array], rows: int, dtype: Any) -> jax.Array:
    """Returns a kernel as a matrix; with one contracted axis, gradients need no transposes."""
    return _value(kernel, dtype).reshape(rows, -1)


def _rope(positions_BT: jax.Array, config: TransformerConfig) -> Rope:
    """Returns cosines and sines of the rotary angles, float32 [B, T, 1, H/2] each."""
    half = config.head_dim // 2
    frequency_H = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling is not None:
        rope = config.rope_scaling
        turns_H = rope.original_length * frequency_H / (2.0 * jnp.pi)
        # 1 keeps a frequency with many turns in the original length; 0 divides it by `factor`.
        keep_H = (turns_H - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep_H = jnp.clip(keep_H, 0.0, 1.0)
        frequency_H = frequency_H * (keep_H + (1.0 - keep_H) / rope.factor)
    angle_BTH = positions_BT[:, :, None].astype(jnp.float32) * frequency_H[None, None, :]
    return jnp.cos(angle_BTH)[:, :, None], jnp.sin(angle_BTH)[:, :, None]
