"""Small models of all kinds, compiled by libtpu for chips that are not there.

Run by `pytest tests/ahead_of_time` in an environment with [tpu]; not among the default tests.
"""

import json
import os
import subprocess
import sys

import pytest

SMALL = {
    "gemma2": {
        "model_type": "gemma2",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "sliding_window": 128,
    },
    "llama": {
        "model_type": "llama",
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
ROWS, LENGTH = 32, 256


def _compile(
    tmp_path, *arguments, family="gemma2", config="metamath.py:gemma2_2b,standard", **fields
):
    folder = tmp_path / family
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL[family], **fields}))
    return _run(
        f"--config=configs/{config}",
        "--topology=v5e:4x4",
        f"--config.model.path={folder}",
        f"--config.text.max_length={LENGTH}",
        f"--config.text.row_length={LENGTH}",
        f"--config.scoring.batch_size={ROWS}",
        f"--config.finetune.batch_size={ROWS}",
        "--config.finetune.micro_batches=1",
        *arguments,
    )


def _run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "easy_jax.main", "compile", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("family", "config"),
    [("gemma2", "metamath.py:gemma2_2b,standard"), ("llama", "metamath.py:llama32_3b,standard")],
)
def test_training_and_scoring_fit_and_use_the_kernel(tmp_path, family, config):
    code, out, err = _compile(tmp_path, "--json", family=family, config=config)
    assert code == 0, err
    train, score = json.loads(out)["programs"]
    layers, embed, mlp, heads, kv_heads, head_dim, vocab = (
        (4, 256, 512, 4, 2, 128, 4096) if family == "gemma2" else (4, 256, 512, 2, 2, 128, 4096)
    )
    weights = layers * embed * (head_dim * 2 * (heads + kv_heads) + 3 * mlp) + vocab * embed
    tokens = ROWS * LENGTH / 16
    forward = tokens * (2 * weights + 4 * LENGTH * heads * head_dim * layers)
    assert score["model_flops"] == pytest.approx(forward)
    assert train["model_flops"] == pytest.approx(3 * forward)
    for program in (train, score):
        assert program["fits"]
        assert not program["cost"]["unknown_loops"]
        # The walk counts what the formula does: nothing twice, no layer left out. Attention is
        # causal in the kernels, and full rematerialisation is a fourth pass over the layers.
        ratio = program["cost"]["flops"] / program["model_flops"]
        assert 0.8 < ratio <= (1.0 if program is score else 4 / 3)
        assert 0 < program["cost"]["seconds"] < 0.1
    # Parameters, gradients and moments are shared out: 1/16 of float32, norms whole.
    norms = 4 * (17 if family == "gemma2" else 9) * embed
    assert train["memory"]["parameters"] == pytest.approx(4 * weights / 16 + norms, rel=1e-3)
    assert train["memory"]["optimizer"] == pytest.approx(2 * train["memory"]["parameters"], 0.01)
    kernels = {**train["cost"]["kernels"]}
    assert kernels["splash_mha_fwd"] == 2 * layers  # once more in the backward pass
    assert kernels["splash_mha_dkv"] == layers
    assert score["cost"]["kernels"] == {"splash_mha_fwd": layers}
    # Gathered in bfloat16, layer by layer: no collective carries all parameters at once.
    gathered = (
        train["cost"]["collective_bytes"]["all-gather"] / train["cost"]["collectives"]["all-gather"]
    )
    assert gathered < 2 * weights / 4


def test_adapters_alone(tmp_path):
    """Frozen weights have neither moments nor gradients, and are neither summed nor updated."""
    results = {}
    for method in ("standard", "lora"):
        code, out, err = _compile(
            tmp_path,
            "--json",
            "--program=train",
            "--config.model.lora_rank=4",
            family="llama",
            config=f"metamath.py:llama32_3b,{method}",
        )
        assert code == 0, err
        (results[method],) = json.loads(out)["programs"]
    all_of_it, lora = results["standard"], results["lora"]
    layers, embed, mlp, heads, kv_heads, head_dim, rank = 4, 256, 512, 2, 2, 128, 4
    attention = 2 * (embed + heads * head_dim) + 2 * (embed + kv_heads * head_dim)
    adapters = layers * rank * (attention + 3 * (embed + mlp))
    assert lora["memory"]["optimizer"] >= 2 * 4 * adapters / 16
    assert lora["memory"]["optimizer"] < all_of_it["memory"]["optimizer"]
    extra = lora["memory"]["parameters"] - all_of_it["memory"]["parameters"]
    assert 2 * extra == pytest.approx(lora["memory"]["optimizer"], rel=0.01)
    assert lora["model_flops"] == pytest.approx(all_of_it["model_flops"] * 2 / 3)


def test_what_does_not_fit_is_a_result(tmp_path):
    code, out, err = _compile(
        tmp_path,
        "--program=train",
        "--config.model.remat=none",
        "--config.finetune.batch_size=4096",
        num_hidden_layers=32,
        intermediate_size=8192,
    )
    assert code == 1, err
    assert "no: needs" in out and "of 15.75 GiB" in out
    assert "Traceback" not in err


def test_a_topology_that_is_not_there_is_one_line(tmp_path):
    code, _, err = _compile(tmp_path, "--topology=v5e:5x5")
    assert code == 2
    assert "topology is 'v5e:5x5'" in err and "Traceback" not in err


IMAGES = (
    "--config=configs/resnet_transfer.py:resnet18,cars196",
    "--config.only=linear_probe,standard,l2",
    "--config.model.width=8",
    "--config.data.target.image_size=32",
    "--config.probe.batch_size=16",
    "--config.finetune.batch_size=16",
    "--config.scoring.batch_size=16",
)


def test_images_on_one_chip_need_neither_data_nor_weights():
    code, out, err = _run(*IMAGES, "--topology=v5e:1x1", "--json")
    assert code == 0, err
    result = json.loads(out)
    programs = {program["name"]: program for program in result["programs"]}
    assert list(programs) == ["train head", "train all", "train all, l2", "score"]
    forward = programs["score"]["model_flops"]
    head = 2 * 16 * 64 * 196
    assert programs["train head"]["model_flops"] == pytest.approx(forward + head)
    assert programs["train all"]["model_flops"] == pytest.approx(3 * forward)
    for program in programs.values():
        assert program["fits"] and not program["cost"]["unknown_loops"]
        # At 32 x 32, down to 1 x 1, much of the windows is padding.
        assert 0.4 < program["cost"]["flops"] / program["model_flops"] <= 1.0
        assert program["cost"]["seconds"] > 0
        assert not program["cost"]["collectives"]
    memory = {name: program["memory"] for name, program in programs.items()}
    # SGD's momentum of all parameters; and, for l2, where they were.
    assert memory["train all, l2"]["optimizer"] == pytest.approx(
        2 * memory["train all"]["optimizer"], rel=0.01
    )
    assert memory["train head"]["optimizer"] < 0.3 * memory["train all"]["optimizer"]


def test_letters_on_four_chips_print_a_table():
    arguments = (
        "--config=configs/quickstart.py:tiny",
        "--config.only=standard",
        "--topology=v5e:2x2",
    )
    code, out, err = _run(*arguments)
    assert code == 0, err
    assert "ResNet on v5e:2x2 (data 4, fsdp 1, tensor 1), an image of 8 x 8 a row" in out
    for name in ("pretrain", "train head", "train all", "score"):
        assert f"| {name} " in out
    assert "all-reduce" in out  # of gradients and of BatchNorm's statistics
    code, _, err = _run(*arguments, "--config.scoring.batch_size=6")
    assert code == 2
    assert "the batch is 6; it must be a multiple of the 4 devices" in err
