"""The step of accelerator_language.py in PyTorch and `transformers`, for accelerator.py."""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROUNDS, STEPS = 4, 5
SIZES = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def step(small: bool, attention: str, compiled: bool) -> dict[str, Any]:
    """AdamW on the mean loss of full rows of one text each; parameters float32, autocast."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # see smollm2.py
    import torch
    import transformers

    rows, length = (2, 128) if small else (8, 2048)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = transformers.LlamaConfig(**{**SIZES, **(SMALL if small else {})})
    config._attn_implementation = attention
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = transformers.LlamaForCausalLM(config).to(device).train()
    call = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=device == "cuda")
    tokens = torch.randint(0, config.vocab_size, (rows, length), device=device)

    def steps() -> float:
        for _ in range(STEPS):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = call(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits

    steps()
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        steps()
        seconds.append((time.perf_counter() - start) / STEPS)
    one = statistics.median(seconds)
    found = {"rows": rows, "length": length, "ms": round(1e3 * one, 2)}
    if device == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.reset_peak_memory_stats()
    return {**found, "tokens_per_second": round(rows * length / one)}


def pytorch(small: bool, shared: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    del shared
    for attention in ("sdpa", "eager"):
        yield f"transformers, {attention}", functools.partial(step, small, attention, False)
    if not small:
        yield "transformers, sdpa, compiled", functools.partial(step, small, "sdpa", True)


PARTS = {"pytorch": pytorch}
