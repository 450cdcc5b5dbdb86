"""A tiny checkpoint in the format of Hugging Face, and ways to change it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from easy_jax.pretrained import hugging_face
from easy_jax.pretrained.hugging_face import WeightsError

VOCAB, EMBED, MLP, HEADS = 17, 8, 12, 4
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": True,
}
EMBEDDING = "model.embed_tokens.weight"
Q, K = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qk")
INDEX = "model.safetensors.index.json"


def tensors(dtype=np.float32, seed=0, **config):
    """Every tensor of the checkpoint, spelt out here once more."""
    config = CONFIG | config
    wide = config["num_attention_heads"] * config["head_dim"]
    narrow = config["num_key_value_heads"] * config["head_dim"]
    gemma = config["model_type"] == "gemma2"
    shapes = {EMBEDDING: (VOCAB, EMBED), "model.norm.weight": (EMBED,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, EMBED)
    for layer in range(config["num_hidden_layers"]):
        layer_shapes = {
            "self_attn.q_proj": (wide, EMBED),
            "self_attn.k_proj": (narrow, EMBED),
            "self_attn.v_proj": (narrow, EMBED),
            "self_attn.o_proj": (EMBED, wide),
            "mlp.gate_proj": (MLP, EMBED),
            "mlp.up_proj": (MLP, EMBED),
            "mlp.down_proj": (EMBED, MLP),
            "input_layernorm": (EMBED,),
            "post_attention_layernorm": (EMBED,),
        }
        if gemma:
            layer_shapes["pre_feedforward_layernorm"] = (EMBED,)
            layer_shapes["post_feedforward_layernorm"] = (EMBED,)
        biases = {}
        if config["model_type"] == "qwen2":
            biases = {
                f"self_attn.{x}_proj": n for x, n in (("q", wide), ("k", narrow), ("v", narrow))
            }
        if config["model_type"] == "qwen3":
            layer_shapes |= dict.fromkeys(
                ("self_attn.q_norm", "self_attn.k_norm"), (config["head_dim"],)
            )
        shapes |= {f"model.layers.{layer}.{k}.bias": (n,) for k, n in biases.items()}
        shapes |= {f"model.layers.{layer}.{k}.weight": v for k, v in layer_shapes.items()}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_config(folder, **config):
    """The folder, which may be new, with a `config.json` of these changes."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write(folder):
    """A sound checkpoint, with the files of a tokenizer."""
    write_config(folder)
    save_file(tensors(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "tokenizer_config.json").write_text('{"b": 2}')
    return folder


def shard(folder):
    """Cuts the checkpoint into two files with an index, which is returned."""
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    weight_map = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: found[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    """The index of the shards: name of a tensor -> file."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(folder, function):
    """Calls a function on the tensors by name, which may change them."""
    found = load_file(folder / "model.safetensors")
    function(found)
    save_file(found, folder / "model.safetensors")


def assert_refused(folder, message, error=WeightsError):
    """Loading ends with that error."""
    with pytest.raises(error, match=message):
        hugging_face.load(folder)
