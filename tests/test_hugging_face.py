"""Checkpoints in and out, and what is said about those that cannot be read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from easy_jax.config import ConfigError
from easy_jax.models.transformer import Transformer
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.pretrained import hugging_face, timm_weights
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


def _tensors(dtype=np.float32, seed=0, **config):
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
        shapes |= {f"model.layers.{layer}.{k}.weight": v for k, v in layer_shapes.items()}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def _write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sound checkpoint; not to be changed."""
    folder = _write_config(tmp_path_factory.mktemp("checkpoint"))
    save_file(_tensors(), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "tokenizer_config.json").write_text('{"b": 2}')
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of the sound checkpoint, to be damaged."""
    return shutil.copytree(good, tmp_path / "model")


def _shard(folder):
    """Cuts the checkpoint into two files with an index, which is returned."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    _write_index(folder, weight_map)
    return weight_map


def _write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _change(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Round trips.


def _assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].tobytes() == tensor.tobytes(), name
        assert actual[name].shape == tensor.shape, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": HEADS},
        {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window": 3},
        {"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 3},  # one group
    ],
)
def test_what_is_loaded_is_exported(tmp_path, changes):
    base = _write_config(tmp_path / "base", **changes)
    tensors = _tensors(**changes)
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


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_the_dtype_of_the_file_is_kept(tmp_path, dtype):
    base = _write_config(tmp_path / "base")
    # Values that float32, in which the model is, holds exactly.
    tensors = {name: x.astype(jnp.bfloat16).astype(dtype) for name, x in _tensors().items()}
    save_file(tensors, base / "model.safetensors")
    hugging_face.export(hugging_face.load(base), tmp_path / "out", base=base)
    _assert_same(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_shards_are_read_and_written(good, folder, tmp_path):
    _shard(folder)
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
    _change(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()}))
    assert hugging_face.load(folder).head is None


def test_stored_rotary_frequencies_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _change(folder, lambda t: t.update({name: np.ones(2, np.float32)}))
    hugging_face.load(folder)


# Checkpoints that cannot be read.


def _assert_refused(folder, message, error=WeightsError):
    with pytest.raises(error, match=message):
        hugging_face.load(folder)


def test_missing_tensor(folder):
    _change(folder, lambda t: t.pop(Q))
    _assert_refused(folder, rf"lacks 1 tensors: {Q}$")


def test_many_missing_tensors_are_not_all_named(folder):
    _write_config(folder, num_hidden_layers=3)
    _assert_refused(folder, r"lacks 9 tensors: model.layers.2.input_layernorm.weight, .* \.\.\.$")


def test_extra_tensor(folder):
    _change(folder, lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": t[Q][:, 0]}))
    _assert_refused(folder, r"has 1 tensors that the model has no place for: .*q_proj\.bias")


@pytest.mark.parametrize("name", [Q, EMBEDDING, "model.layers.0.input_layernorm.weight"])
def test_wrong_shape(folder, name):
    _change(folder, lambda t: t.update({name: np.ascontiguousarray(t[name][:-1])}))
    _assert_refused(folder, rf"model.safetensors: {name} has shape \(.*config.json makes it \(")


def test_transposed_kernel(folder):
    _change(folder, lambda t: t.update({Q: np.ascontiguousarray(t[Q].T)}))
    _assert_refused(folder, rf"{Q} has shape \(8, 16\); config.json makes it \(16, 8\)")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_])
def test_integer_tensor(folder, dtype):
    _change(folder, lambda t: t.update({K: t[K].astype(dtype)}))
    _assert_refused(folder, rf"{K} has dtype {np.dtype(dtype)}, not a float's")


def test_float8_tensor(folder):
    _change(folder, lambda t: t.update({K: t[K].astype(jnp.float8_e4m3fn)}))
    _assert_refused(folder, rf"{K} cannot be read: .*float8")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    _assert_refused(folder, r"model.safetensors is damaged or not a safetensors file: .*copy it")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_a_pickle_is_refused_with_advice(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    _assert_refused(folder, rf"'{name}'.* are pickles, which can run code .*safe_serialization")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    _assert_refused(folder, r"there is no model.safetensors in .*; copy model.safetensors")


def test_tied_model_with_another_head(folder):
    _change(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}))
    _assert_refused(folder, r"lm_head.weight differs from the embedding.* tie_word_embeddings")


def test_untied_model_without_a_head(folder):
    _write_config(folder, tie_word_embeddings=False)
    _assert_refused(folder, r"lacks 1 tensors: lm_head.weight")


def test_index_names_a_missing_file(folder):
    _shard(folder)
    (folder / "b.safetensors").unlink()
    _assert_refused(folder, r"there is no .*b\.safetensors, which the index names")


@pytest.mark.parametrize("file", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", ".."])
def test_index_leads_out_of_the_folder(folder, file):
    weight_map = _shard(folder)
    (folder / "sub").mkdir()
    for outside in (folder.parent, folder / "sub"):
        save_file({Q: _tensors()[Q]}, outside / "x.safetensors")
    _write_index(folder, weight_map | {Q: file})
    _assert_refused(folder, rf"index.json: the file of {Q}, .*, is not in its folder")


def test_index_places_a_tensor_in_the_wrong_file(folder):
    weight_map = _shard(folder)
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[weight_map[Q]]
    _write_index(folder, weight_map | {Q: other})
    _assert_refused(folder, rf"{other} has no tensor {Q}, which the index places there")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "\udcff"]
)
def test_index_that_is_none(folder, text):
    _shard(folder)
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    _assert_refused(folder, r"index.json is not (an index of safetensors|JSON|UTF-8|a JSON object)")


# Configurations that cannot be honoured.


def test_no_config(folder):
    (folder / "config.json").unlink()
    _assert_refused(folder, r"there is no .*config.json: this is not a model's folder")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}"])
def test_config_that_is_not_json(folder, text):
    (folder / "config.json").write_bytes(text)
    _assert_refused(folder, r"config.json is not (JSON|UTF-8)")


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_config_that_is_no_object(folder, text):
    (folder / "config.json").write_text(text)
    _assert_refused(folder, r"config.json is not a JSON object")


YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2'; supported are \['gemma2', 'llama'\]"),
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
    _write_config(folder, **changes)
    _assert_refused(folder, rf"model/config\.json: .*{message}", ConfigError)


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
def test_fields_without_effect_are_read_over(good, folder, changes):
    expected = hugging_face.read_config(good)
    _write_config(folder, **changes)
    assert hugging_face.read_config(folder) == expected


@pytest.mark.parametrize(
    ("before", "after"), [(2, 0), ([5, 7], 0), ([5, 0], [5, 0]), (0, 0), (None, 0)]
)
def test_the_export_stops_where_training_did(folder, tmp_path, before, after):
    _write_config(folder, eos_token_id=before, bos_token_id=1)
    generation = {"eos_token_id": before, "temperature": 0.7, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    hugging_face.export(hugging_face.load(folder), tmp_path / "out", base=folder, eos_token_id=0)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == CONFIG | {"eos_token_id": after, "bos_token_id": 1}
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == generation | {"eos_token_id": after}


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_attention_heads"])
def test_missing_field(folder, name):
    config = {key: value for key, value in CONFIG.items() if key != name}
    (folder / "config.json").write_text(json.dumps(config))
    _assert_refused(folder, rf"the fields \['{name}'\] are missing", ConfigError)


# Names, and exports that are refused.


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    _assert_refused(name, r"there is no folder .*nowhere|there is no folder a/b/c")


def test_a_name_while_offline(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # read once, at import
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    _assert_refused("hf://no-one/nothing", r"hf://no-one/nothing cannot be downloaded: ")


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
    _assert_refused(name, "is no model of the hub; write hf://OWNER/NAME")


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
    _write_config(folder, rope_theta=5.0)
    with pytest.raises(WeightsError, match=r"is not the one that was trained"):
        hugging_face.export(hugging_face.load(good), tmp_path / "out", base=folder)
    assert not (tmp_path / "out").exists()


# The model.


@pytest.mark.parametrize("family", ["llama", "gemma2"])
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
