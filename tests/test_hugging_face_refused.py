"""Checkpoints and configurations that cannot be read: one error that says why."""

import json

import jax.numpy as jnp
import llama_folder
import numpy as np
import pytest
from llama_folder import CONFIG, EMBEDDING, INDEX, K, Q, assert_refused
from safetensors.numpy import save_file

from easy_jax.config import ConfigError
from easy_jax.pretrained import hugging_face


@pytest.fixture
def folder(tmp_path):
    """A sound checkpoint, to be damaged."""
    return llama_folder.write(tmp_path / "model")


def test_missing_tensor(folder):
    llama_folder.change(folder, lambda t: t.pop(Q))
    assert_refused(folder, rf"lacks 1 tensors: {Q}$")


def test_many_missing_tensors_are_not_all_named(folder):
    llama_folder.write_config(folder, num_hidden_layers=3)
    assert_refused(folder, r"lacks 9 tensors: model.layers.2.input_layernorm.weight, .* \.\.\.$")


def test_extra_tensor(folder):
    llama_folder.change(
        folder, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t[Q][:, 0]})
    )
    assert_refused(folder, r"has 1 tensors that the model has no place for: .*q_proj\.bias")


@pytest.mark.slow
@pytest.mark.parametrize("name", [Q, EMBEDDING, "model.layers.0.input_layernorm.weight"])
def test_wrong_shape(folder, name):
    llama_folder.change(folder, lambda t: t.update({name: np.ascontiguousarray(t[name][:-1])}))
    assert_refused(folder, rf"model.safetensors: {name} has shape \(.*config.json makes it \(")


def test_transposed_kernel(folder):
    llama_folder.change(folder, lambda t: t.update({Q: np.ascontiguousarray(t[Q].T)}))
    assert_refused(folder, rf"{Q} has shape \(8, 16\); config.json makes it \(16, 8\)")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_])
def test_integer_tensor(folder, dtype):
    llama_folder.change(folder, lambda t: t.update({K: t[K].astype(dtype)}))
    assert_refused(folder, rf"{K} has dtype {np.dtype(dtype)}, not a float's")


def test_float8_tensor(folder):
    llama_folder.change(folder, lambda t: t.update({K: t[K].astype(jnp.float8_e4m3fn)}))
    assert_refused(folder, rf"{K} cannot be read: .*float8")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(folder, r"model.safetensors is damaged or not a safetensors file: .*copy it")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_with_advice(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    assert_refused(folder, rf"'{name}'.* are pickles, which can run code .*safe_serialization")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert_refused(folder, r"there is no model.safetensors in .*; copy model.safetensors")


def test_tied_model_with_another_head(folder):
    llama_folder.change(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}))
    assert_refused(folder, r"lm_head.weight differs from the embedding.* tie_word_embeddings")


def test_untied_model_without_a_head(folder):
    llama_folder.write_config(folder, tie_word_embeddings=False)
    assert_refused(folder, r"lacks 1 tensors: lm_head.weight")


def test_index_names_a_missing_file(folder):
    llama_folder.shard(folder)
    (folder / "b.safetensors").unlink()
    assert_refused(folder, r"there is no .*b\.safetensors, which the index names")


@pytest.mark.parametrize("file", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", ".."])
def test_index_leads_out_of_the_folder(folder, file):
    weight_map = llama_folder.shard(folder)
    (folder / "sub").mkdir()
    for outside in (folder.parent, folder / "sub"):
        save_file({Q: llama_folder.tensors()[Q]}, outside / "x.safetensors")
    llama_folder.write_index(folder, weight_map | {Q: file})
    assert_refused(folder, rf"index.json: the file of {Q}, .*, is not in its folder")


def test_index_places_a_tensor_in_the_wrong_file(folder):
    weight_map = llama_folder.shard(folder)
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map[Q]]
    llama_folder.write_index(folder, weight_map | {Q: other})
    assert_refused(folder, rf"{other} has no tensor {Q}, which the index places there")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "\udcff"]
)
def test_index_that_is_none(folder, text):
    llama_folder.shard(folder)
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(folder, r"index.json is not (an index of safetensors|JSON|UTF-8|a JSON object)")


# Configurations that cannot be honoured.


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert_refused(folder, r"there is no .*config.json: this is not a model's folder")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}"])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text)
    assert_refused(folder, r"config.json is not (JSON|UTF-8)")


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    assert_refused(folder, r"config.json is not a JSON object")


YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0}
QWEN = {"model_type": "qwen2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"'gpt2'; supported are \['gemma2', 'llama', 'mistral', 'q"),
        (QWEN | {"use_sliding_window": True}, r"fields \['use_sliding_window'\] are not supported"),
        (QWEN | {"max_window_layers": 2}, r"fields \['max_window_layers'\] are not supported"),
        ({"model_type": None}, r"model_type is None"),
        ({"quantization_config": {"quant_method": "x"}}, r"\['quantization_config'\] are not"),
        ({"use_sliding_window": True}, r"\['use_sliding_window'\] are not supported"),
        ({"resid_dropout": 0.1}, r"\['resid_dropout'\] are not supported"),
        ({"num_experts": 4}, r"the fields \['num_experts'\] are not supported"),
        ({"attention_bias": True}, r"attention_bias is True; supported: \[None, False\]"),
        ({"mlp_bias": True}, r"mlp_bias is True"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'; supported: \['silu'\]"),
        ({"sliding_window": 4}, r"sliding_window is 4"),
        ({"rope_scaling": YARN}, r"rope_type is 'yarn'; supported: \['llama3'\]"),
        ({"rope_parameters": YARN}, r"rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type is 'linear'"),
        ({"rope_scaling": LLAMA3}, r"rope_scaling has the fields \['factor'\]; llama3 has"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; it must be a positive integer"),
        ({"hidden_size": "16"}, r"hidden_size is '16'; it must be a positive integer"),
        ({"head_dim": 3}, r"head_dim is 3; rotary positions need an even number"),
        ({"num_key_value_heads": 3}, r"is 4; it must be a multiple of num_key_value_heads = 3"),
        ({"layer_types": ["sliding_attention"] * 2}, r"must all be full_attention"),
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, r"must have 2 entries"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, r"hidden_act is 'gelu'"),
    ],
)
def test_config_that_cannot_be_honoured(folder, changes, message):
    llama_folder.write_config(folder, **changes)
    assert_refused(folder, rf"model/config\.json: .*{message}", ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"unsloth_fixed": True},
        {"_attn_implementation_autoset": True},
        {"tokenizer_class": "LlamaTokenizer", "torchscript": True, "temperature": 0.7},
        {"auto_map": {"AutoConfig": "x"}},
        {"eos_token_id": [1, 2, 3], "sep_token_id": None, "decoder_start_token_id": 4},
        {"quantization_config": None, "num_experts": None},
        {"use_sliding_window": False, "pruned_heads": {}, "resid_dropout": 0.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_fields_without_effect_are_read_over(folder, changes):
    expected = hugging_face.read_config(folder)
    llama_folder.write_config(folder, **changes)
    assert hugging_face.read_config(folder) == expected


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_missing_field(folder, name):
    config = {key: value for key, value in CONFIG.items() if key != name}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, rf"the fields \['{name}'\] are missing", ConfigError)
