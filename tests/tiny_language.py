"""A tiny random language model with data, in a folder; and, as a config file, its experiment.

easy-jax run --config=tests/tiny_language.py:FOLDER
"""

import json
import random
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from easy_jax.config import (
    InstructionsConfig,
    LanguageConfig,
    LanguageModelConfig,
    MethodConfig,
    OptimizerConfig,
    ScoringConfig,
    StageConfig,
    TextConfig,
)

WORDS = ["what", "is", "one", "two", "three", "and", "or", "more", "less", "give", "it"]


def write_folder(folder, train=24, heads=2, kv_heads=1, words=WORDS):
    """A model's folder, training and held-out data, and a general text."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "->", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    embed, mlp, vocab, head_dim = 8, 16, len(vocabulary), 4
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = {
        "self_attn.q_proj": (q, embed),
        "self_attn.k_proj": (kv, embed),
        "self_attn.v_proj": (kv, embed),
        "self_attn.o_proj": (embed, q),
        "mlp.gate_proj": (mlp, embed),
        "mlp.up_proj": (mlp, embed),
        "mlp.down_proj": (embed, mlp),
        "input_layernorm": (embed,),
        "post_attention_layernorm": (embed,),
    }
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": (vocab, embed), "model.norm.weight": (embed,)}
    tensors |= {f"model.layers.{i}.{k}.weight": v for i in range(2) for k, v in shapes.items()}
    values = {name: rng.normal(size=shape).astype("f") for name, shape in tensors.items()}
    save_file(values, folder / "model.safetensors")
    draw = random.Random(0)

    def text(count):
        return " ".join(draw.choices(words, k=count))

    for name, size in (("train", train), ("heldout", 8)):
        lines = [{"q": text(4), "a": " " + text(draw.randint(1, 6)) + " "} for _ in range(size)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "prose.txt").write_text(text(200))
    return folder


def get_config(folder: str) -> LanguageConfig:
    """FLOW on the training data of a folder: one example a row, 8 rows a step, saved often."""

    def data(name):
        path = str(Path(folder) / f"{name}.jsonl")
        return InstructionsConfig(path=path, instruction_field="q", response_field="a")

    return LanguageConfig(
        name="tiny-language",
        model=LanguageModelConfig(path=folder, dtype="float32", remat="none"),
        train=data("train"),
        heldout=(data("heldout"),),
        text=TextConfig(
            template="{instruction} ->",
            eos_token="<eos>",
            max_length=17,
            row_length=16,
            max_segments=1,
        ),
        scoring=ScoringConfig(batch_size=8, rows_per_part=8),
        finetune=StageConfig(
            epochs=1,
            batch_size=8,
            reduction="token_mean",
            optimizer=OptimizerConfig(name="adamw", learning_rate=0.01),
        ),
        methods=(MethodConfig("flow", weighting="flow"),),
        save_every_steps=3,
        log_every_steps=1,
    )
