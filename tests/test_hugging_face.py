"""Checkpoints in and out, and what is said about those that cannot be read."""

import json
import sys

import huggingface_hub.constants
import jax
import jax.numpy as jnp
import llama_folder
import numpy as np
import pytest
from flax import nnx
from llama_folder import CONFIG, EMBEDDING, HEADS, INDEX, assert_refused
from safetensors.numpy import load_file, save_file

from easy_jax.models.transformer import Transformer, abstract
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.pretrained import hugging_face, timm_weights
from easy_jax.pretrained.hugging_face import WeightsError
from easy_jax.pretrained.hugging_face_config import parse_config


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound checkpoint; not to be changed."""
    return llama_folder.write(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def folder(tmp_path):
    """One that may be changed."""
    return llama_folder.write(tmp_path / "model")


# Round trips.


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].tobytes() == tensor.tobytes(), name
        assert actual[name].shape == tensor.shape, name


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": HEADS},
        {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 3},
        {"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 3},  # one group
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "num_hidden_layers": 3},
        {"model_type": "mistral", "sliding_window": 3, "tie_word_embeddings": False},
    ],
)
def test_what_is_loaded_is_exported(tmp_path, changes):
    base = llama_folder.write_config(tmp_path / "base", **changes)
    tensors = llama_folder.tensors(**changes)
    save_file(tensors, base / "model.safetensors")
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "notes.txt").write_text("not copied")
    model = hugging_face.load(base)
    hugging_face.export(model, tmp_path / "out", base=base)
    _assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)
    files = {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    assert not (tmp_path / "out.tmp").exists()


# Facts of the files on the Hugging Face Hub; the last one: how many parameters the model has.
_QWEN = {
    "attention_dropout": 0.0,
    "bos_token_id": 151_643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "num_hidden_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151_936,
}
_MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
REAL = {
    "Qwen3-0.6B": (
        _QWEN
        | {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40_960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "rope_scaling": None,
            "sliding_window": None,
        },
        596_049_920,
    ),
    "Qwen2.5-0.5B": (
        _QWEN
        | {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32_768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "sliding_window": 32_768,
            "use_mrope": False,
        },
        494_032_768,
    ),
    "Mistral-7B-v0.1": (
        _MISTRAL | {"rope_theta": 10_000.0, "sliding_window": 4096, "vocab_size": 32_000},
        7_241_732_096,
    ),
    "Mistral-7B-v0.3": (
        _MISTRAL | {"rope_theta": 1e6, "sliding_window": None, "vocab_size": 32_768},
        7_248_023_552,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configurations(name):
    content, size = REAL[name]
    config = parse_config(content)
    model = abstract(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat="none")
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == size
    assert config.windows == ((4096,) if name == "Mistral-7B-v0.1" else (None,))
    assert config.rope_theta == content["rope_theta"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_the_dtype_of_the_file_is_kept(tmp_path, dtype):
    base = llama_folder.write_config(tmp_path / "base")
    # Values that float32, in which the model is, holds exactly.
    tensors = {
        name: x.astype(jnp.bfloat16).astype(dtype) for name, x in llama_folder.tensors().items()
    }
    save_file(tensors, base / "model.safetensors")
    hugging_face.export(hugging_face.load(base), tmp_path / "out", base=base)
    _assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


@pytest.mark.slow
def test_shards_are_read_and_written(good, folder, tmp_path):
    llama_folder.shard(folder)
    tensors = load_file(good / "model.safetensors")
    (tmp_path / "out").mkdir()  # empty, which is allowed
    hugging_face.export(
        hugging_face.load(folder), tmp_path / "out", base=folder, max_shard_bytes=1000
    )
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    assert files == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    written = {}
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert all(weight_map[name] == file for name in part)
        assert sum(tensor.nbytes for tensor in part.values()) <= 1000 or len(part) == 1
        written |= part
    _assert_same(written, tensors)
    hugging_face.export(hugging_face.load(tmp_path / "out"), tmp_path / "again", base=good)
    _assert_same(load_file(tmp_path / "again" / "model.safetensors"), tensors)


def test_a_head_that_repeats_the_tied_embedding_is_allowed(folder):
    llama_folder.change(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()}))
    assert hugging_face.load(folder).head is None


def test_stored_rotary_frequencies_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    llama_folder.change(folder, lambda t: t.update({name: np.ones(2, np.float32)}))
    hugging_face.load(folder)


@pytest.mark.parametrize(
    ("before", "after"), [(2, 0), ([5, 7], 0), ([5, 0], [5, 0]), (0, 0), (None, 0)]
)
def test_the_export_stops_where_training_did(folder, tmp_path, before, after):
    llama_folder.write_config(folder, eos_token_id=before, bos_token_id=1)
    generation = {"eos_token_id": before, "temperature": 0.7, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    hugging_face.export(hugging_face.load(folder), tmp_path / "out", base=folder, eos_token_id=0)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == CONFIG | {"eos_token_id": after, "bos_token_id": 1}
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == generation | {"eos_token_id": after}


# Names, and exports that are refused.


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    assert_refused(name, r"there is no folder .*nowhere|there is no folder a/b/c")


def test_a_name_while_offline(monkeypatch, tmp_path):
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read once, at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused("hf://no-one/nothing", r"hf://no-one/nothing cannot be downloaded: ")


def test_the_hub_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused("hf://no-one/nothing", r"huggingface_hub: pip install 'easy-jax\[hub\]'")


@pytest.mark.parametrize("name", ["no-one/nothing", "timm/resnet50.a1_in1k"])
def test_a_path_is_never_looked_up_on_a_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # a call would be a TypeError
    for load in (hugging_face.load, timm_weights.load):
        with pytest.raises(WeightsError, match=rf"no folder {name} .*; .* write hf://{name}$"):
            load(name)


def test_a_name_of_the_hub_is_looked_up(good, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(good)
    )
    assert hugging_face.resolve("hf://some-one/a.model_1") == good
    assert asked == ["some-one/a.model_1"]


@pytest.mark.parametrize("name", ["hf://", "hf://model", "hf://a/b/c", "hf://../b c"])
def test_what_is_no_name_of_the_hub(name):
    assert_refused(name, "is no model of the hub; write hf://OWNER/NAME")


def test_export_does_not_overwrite(good, tmp_path):
    model = hugging_face.load(good)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    for target in (tmp_path / "out", tmp_path / "file", good):
        with pytest.raises(WeightsError, match=r"is not empty; export into a new folder"):
            hugging_face.export(model, target, base=good)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_export_of_another_model(good, folder, tmp_path):
    llama_folder.write_config(folder, rope_theta=5.0)
    with pytest.raises(WeightsError, match=r"is not the one that was trained"):
        hugging_face.export(hugging_face.load(good), tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()


# The model.


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "qwen3"])
def test_depth_does_not_lengthen_the_program(family):
    def equations(layers):
        config = TransformerConfig(
            family,
            vocab=7,
            embed=4,
            mlp=6,
            layers=layers,
            heads=2,
            kv_heads=1,
            head_dim=2,
            windows=(3, None) if family == "gemma2" else (None,),
            attention_cap=2.0 if family == "gemma2" else None,
        )
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)

        def loss(state, tokens):
            return jnp.sum(nnx.merge(graphdef, state)(tokens))

        tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        return _count(jax.make_jaxpr(jax.grad(loss))(state, tokens).jaxpr)

    assert equations(8) == equations(2) > 100


def _count(jaxpr):
    """The number of equations, those of sub-programs included."""
    count = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for leaf in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            leaf = getattr(leaf, "jaxpr", leaf)
            count += _count(leaf) if hasattr(leaf, "eqns") else 0
    return count
