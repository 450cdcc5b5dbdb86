"""Every reader of a file, with every sort of malformed content: one line that names the file."""

import json

import pytest
import tiny_language

from easy_jax.cli.errors import USER_ERRORS
from easy_jax.config import LanguageConfig
from easy_jax.data import text
from easy_jax.experiments.measurements import Measurements
from easy_jax.experiments.workdir import open_workdir
from easy_jax.io import metrics_log
from easy_jax.pretrained import hugging_face, timm_weights, weight_files
from easy_jax.train import loss_table

READERS = {
    "metadata.json": lambda folder: loss_table.read_metadata(folder),
    "dropped-00000.json": loss_table.read_dropped,
    "config.json of a workdir": lambda folder: open_workdir(LanguageConfig(), folder),
    "config.json of a transformer": hugging_face.read_config,
    "config.json of timm": timm_weights.read_config,
    "model.safetensors.index.json": lambda folder: weight_files.tensor_files(folder, convert="x"),
    "tokenizer.json": text.load_tokenizer,
    "cells.jsonl": lambda folder: Measurements(folder / "cells.jsonl", dict).read(),
    "metrics.jsonl": metrics_log.read,
}
CONTENTS = {
    "not JSON": b"{]\n",
    "not UTF-8": b'{"a": "\xff"}\n',
    "half a character": b'{"\\ud800": 1, "checksum": "\\ud800"}\n',
    "a list": b"[1]\n",
    "a number": b"3\n",
    "null": b"null\n",
    "a text": b'"x"\n',
    "no fields": b"{}\n",
    "other fields": b'{"format_version": 2, "weight_map": {"a": {}}, "checksum": []}\n',
    "deep lists": b"[" * 100_000 + b"]" * 100_000 + b"\n",
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"\n",
    "a long number": b'{"stage": ' + b"9" * 5_000 + b"}\n",
    "zeros": bytes(4096) + b"\n",
}


def _refused(reader, folder):
    """The one line with which a reader refuses a folder, with the path of the file."""
    with pytest.raises(USER_ERRORS) as told:
        READERS[reader](folder)
    message = str(told.value)
    assert str(folder) in message
    # That a configuration differs in every field is told of the workdir.
    assert reader.split()[0] in message or reader == "config.json of a workdir"
    assert "\n" not in message and len(message) < 2000
    return message


@pytest.fixture
def folder(tmp_path, reader):
    if reader == "config.json of timm":
        tiny_language.write_folder(tmp_path)  # safetensors, of whatever
    return tmp_path


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_malformed_content_is_one_line(reader, content, folder):
    (folder / reader.split()[0]).write_bytes(CONTENTS[content])
    _refused(reader, folder)


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_in_place_of_a_file_is_one_line(reader, folder):
    path = folder / reader.split()[0]
    path.unlink(missing_ok=True)
    path.mkdir()
    _refused(reader, folder)


GEMMA = {
    "model_type": "gemma2",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("value", [1e9, 10**9, -1, 0, True, "2", [2], {"a": 2}, None, 10**40])
@pytest.mark.parametrize("name", ["num_hidden_layers", "vocab_size", "hidden_size"])
def test_absurd_sizes_are_refused_before_anything_is_made(name, value, tmp_path):
    folder = tiny_language.write_folder(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, name: value}))
    with pytest.raises(USER_ERRORS, match=r"config\.json") as told:
        hugging_face.load(folder)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500
    if type(value) is int and value == 10**9 and name != "num_hidden_layers":
        assert "has shape (14, 8); config.json makes it" in str(told.value)
    else:
        assert f"{name} is {str(value)[:60]}" in str(told.value).replace("'2'", "2")


@pytest.mark.parametrize("value", [0, -1.0, "x", [1], {"a": 1}, True, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "rms_norm_eps",
        "rope_theta",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "sliding_window",
        "layer_types",
        "tie_word_embeddings",
        "rope_scaling",
        "rope_parameters",
        "model_type",
        "hidden_act",
        "head_dim",
    ],
)
def test_fields_of_another_type_are_refused(name, value, tmp_path):
    if (name, value) in (("tie_word_embeddings", True), ("rope_scaling", 0)):
        return
    (tmp_path / "config.json").write_text(json.dumps({**GEMMA, name: value}))
    with pytest.raises(USER_ERRORS, match=f"{name}|the rope fields") as told:
        hugging_face.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [0.5, "x", [], ["0.5"], [float("nan")], {"a": 1}])
def test_colours_that_are_none_are_refused(name, value, tmp_path):
    tiny_language.write_folder(tmp_path)
    content = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5], "std": [0.5]}}
    content["pretrained_cfg"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(USER_ERRORS, match=rf"config.json: {name} is .*; it must be a list of num"):
        timm_weights.read_info(tmp_path)
