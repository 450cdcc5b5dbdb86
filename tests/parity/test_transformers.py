"""The transformer against PyTorch and `transformers`, on tiny random checkpoints.

`transformers` writes the checkpoints, so names, shapes and config.json are its own.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from helpers import devices_mesh
from safetensors.numpy import load_file
from transformers_cases import CASES, SHARED, Case

from easy_jax.config import MeshConfig
from easy_jax.kernels.linear_cross_entropy import NO_TARGET, linear_cross_entropy
from easy_jax.models.lora import TARGETS, add_adapters
from easy_jax.parallel import sharding
from easy_jax.pretrained import hugging_face

pytestmark = pytest.mark.filterwarnings("default")  # torch's and transformers' own are theirs


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    folder: Path
    case: Case
    torch_model: Any
    model: Any  # ours, loaded; not to be changed
    tokens: np.ndarray  # [B, T]
    targets: np.ndarray  # [B, T], some without
    weights: np.ndarray  # [B]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(name)`: the checkpoint of a case, made once."""
    return functools.cache(lambda name: _make(CASES[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request, make):
    return make(request.param)


@pytest.fixture(scope="module", params=["llama_tied", "gemma2", "qwen2", "qwen3"])
def family(request, make):
    """One checkpoint of each family, for what does not depend on the rest."""
    return make(request.param)


def _make(case, folder):
    config = getattr(transformers, f"{case.family}Config")(
        **SHARED,
        **case.config,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,  # PyTorch gives the embedding of that token no gradient
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # all ones or zeros otherwise
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(case.scale)
    model.to(case.dtype).save_pretrained(folder, max_shard_size=case.shard_size)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (3, case.length))
    targets = rng.integers(0, config.vocab_size, (3, case.length))
    targets[rng.random(targets.shape) < 0.3] = NO_TARGET
    weights = np.float32([0.3, 1.7, -0.6])
    model = _load(folder)
    return Checkpoint(folder, case, _reload(folder), model, tokens, targets, weights)


def _load(folder, **options):
    """On one device, which compiles faster than full copies on all."""
    return hugging_face.load(folder, mesh=devices_mesh(1), **options)


def _reload(folder):
    """In float32, with the attention that has a soft cap and a sliding window."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def _torch_nll(logits, targets):
    """[B, T] in float64; 0 where there is no target."""
    targets = torch.tensor(targets)
    there = targets != NO_TARGET
    chosen = torch.gather(logits, -1, torch.where(there, targets, 0)[..., None])[..., 0]
    return torch.where(there, torch.logsumexp(logits, -1) - chosen, 0.0)


def _assert_close(actual, expected, tolerance):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    difference = np.abs(np.float64(actual) - np.float64(expected)).max()
    assert difference <= tolerance, difference


@nnx.jit
def _logits(model, *tokens_positions_segments):
    return model(*tokens_positions_segments)


@nnx.jit
def _nll(model, tokens, targets):
    return linear_cross_entropy(
        model.hidden_states(tokens),
        model.head_VD(),
        targets,
        soft_cap=model.config.final_cap,
        vocab_block=32,
        token_chunk=21,
    )


def _weighted_gradient(model, checkpoint):
    """Of the weighted sum of the examples' losses, by the names of the checkpoint."""
    graphdef, state = nnx.split(model)

    def loss(state):
        nll = _nll(nnx.merge(graphdef, state), checkpoint.tokens, checkpoint.targets)
        return jnp.sum(checkpoint.weights * jnp.sum(nll, axis=1))

    flat = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(state)))
    gradient = {}
    for name, place in hugging_face._places(model).items():
        value = flat[place.path].get_value()
        shape = hugging_face._checkpoint_shape(value, place)
        gradient[name] = hugging_face._read_out(value, place, shape)
    return gradient


# The same function.


def test_logits(checkpoint):
    expected = _torch_logits(checkpoint.torch_model, checkpoint.tokens)
    assert expected.std() > 0.5  # not the uniform distribution of tiny weights
    _assert_close(_logits(checkpoint.model, checkpoint.tokens), expected, 1e-4)


def test_losses_of_tokens(checkpoint):
    logits = torch.tensor(_torch_logits(checkpoint.torch_model, checkpoint.tokens))
    expected = _torch_nll(logits.double(), checkpoint.targets)
    actual = _nll(checkpoint.model, checkpoint.tokens, checkpoint.targets)
    _assert_close(actual, expected, 1e-5)


def test_gradients(checkpoint):
    model = checkpoint.torch_model
    model.zero_grad()
    nll = _torch_nll(model(torch.tensor(checkpoint.tokens)).logits, checkpoint.targets)
    (torch.tensor(checkpoint.weights) * nll.sum(dim=1)).sum().backward()
    expected = {name: p.grad.numpy() for name, p in model.named_parameters()}
    actual = _weighted_gradient(checkpoint.model, checkpoint)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert np.any(gradient), name
        _assert_close(actual[name], gradient, 1e-4)


# The cases test what they are for.


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama_rope", {"rope_scaling": None}),
        ("llama_rope", {"rope_theta": 10_000.0}),
        ("mistral_window", {"windows": (None,)}),
        ("mistral_window", {"windows": (4,)}),
        ("qwen2", {"rope_theta": 10_000.0}),
        ("gemma2", {"windows": (None, None)}),
        ("gemma2", {"windows": (None, 5)}),
        ("gemma2", {"windows": (6, None)}),
        ("gemma2", {"query_scale": 10**-0.5}),
        ("gemma2", {"attention_cap": None}),
        ("gemma2", {"final_cap": None}),
    ],
)
def test_every_setting_matters(name, change, make):
    checkpoint = make(name)
    model = _load(checkpoint.folder)
    model.config = dataclasses.replace(model.config, **change)
    for block in model.blocks:
        block.config = model.config
    difference = _logits(model, checkpoint.tokens) - _logits(checkpoint.model, checkpoint.tokens)
    assert np.abs(difference).max() > 1e-2


def test_configurations(checkpoint):
    config = hugging_face.read_config(checkpoint.folder)
    theirs = checkpoint.torch_model.config
    assert config.family == checkpoint.case.family.lower()
    assert (config.layers, config.kv_heads, config.head_dim) == (
        theirs.num_hidden_layers,
        theirs.num_key_value_heads,
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
    )
    assert config.tied == theirs.tie_word_embeddings
    assert config.family != "mistral" or config.windows == (
        checkpoint.case.config["sliding_window"],
    )
    if config.family == "gemma2":
        assert config.windows == (5, None)
        assert config.query_scale == pytest.approx(7**-0.5)
        assert (config.attention_cap, config.final_cap) == (2.0, 3.0)


# Export.


def _tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("max_shard_bytes", [hugging_face.MAX_SHARD_BYTES, 20_000])
def test_exported_as_it_was(checkpoint, max_shard_bytes, tmp_path):
    folder = tmp_path / "out"
    hugging_face.export(
        checkpoint.model, folder, base=checkpoint.folder, max_shard_bytes=max_shard_bytes
    )
    count = len(list(folder.glob("*.safetensors")))
    assert count == 1 if max_shard_bytes == hugging_face.MAX_SHARD_BYTES else count > 1
    original, exported = _tensors(checkpoint.folder), _tensors(folder)
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype, name
        assert exported[name].shape == tensor.shape, name
        assert exported[name].tobytes() == tensor.tobytes(), name
    expected = _torch_logits(checkpoint.torch_model, checkpoint.tokens)
    _assert_close(_torch_logits(_reload(folder), checkpoint.tokens), expected, 0.0)


def test_shards_are_those_of_transformers(make):
    index = json.loads((make("llama_rope").folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2


def test_exported_with_adapters_merged(family, tmp_path):
    model = _load(family.folder)
    add_adapters(model, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
    for block in model.blocks:
        for number, name in enumerate(TARGETS):
            b = getattr(block, name).lora_b
            b[...] = 0.05 * jax.random.normal(jax.random.key(number), b.shape)
    adapted = _logits(model, family.tokens)
    without = _torch_logits(family.torch_model, family.tokens)
    assert np.abs(adapted - without).max() > 0.1
    hugging_face.export(model, tmp_path / "out", base=family.folder)
    _assert_close(_torch_logits(_reload(tmp_path / "out"), family.tokens), adapted, 1e-4)


# Packing, rematerialisation, sharding.


def test_packed_sequences_do_not_see_each_other(family):
    """And a sliding window counts places, in the row as in the segment."""
    model = family.model
    first, second = family.tokens[:1, :9], family.tokens[1:2, :13]
    padding = np.zeros((1, 2), int)
    row = np.concatenate([first, second, padding], axis=1)
    segments = np.repeat([[1, 2, 0]], [9, 13, 2], axis=1)
    positions = np.concatenate([np.arange(n) for n in (9, 13, 2)])[None]
    packed = _logits(model, row, positions, segments)
    _assert_close(packed[:, :9], _logits(model, first), 1e-5)
    _assert_close(packed[:, 9:22], _logits(model, second), 1e-5)


def test_remat_does_not_change_gradients(family):
    plain, *others = (
        _weighted_gradient(_load(family.folder, remat=remat), family)
        for remat in ("none", "full", "dots")
    )
    for other in others:
        for name, gradient in plain.items():
            _assert_close(other[name], gradient, 1e-5 * max(1.0, np.abs(gradient).max()))


def test_loaded_onto_a_mesh(family):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model = hugging_face.load(family.folder, mesh=mesh)
    tokens = sharding.shard_batch({"tokens": np.tile(family.tokens[:2], (2, 1))}, mesh)["tokens"]
    actual = _logits(model, tokens)
    expected = _logits(family.model, family.tokens[:2])
    _assert_close(actual, np.tile(expected, (2, 1, 1)), 1e-5 * np.abs(expected).max())
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = variable.get_value()
        assert len(array.addressable_shards) == 8
        # Kernels and the embedding lie over fsdp and tensor, biases over tensor, norms everywhere.
        parts = {"scale": 1, "bias": 2}.get(path[-1], 4)
        for shard in array.addressable_shards:
            assert shard.data.nbytes * parts == array.nbytes, path
