"""SmolLM2 in easy_jax and in PyTorch: what the two language benchmarks share."""

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

import easy_jax as ej

# The package index has torchvision for CUDA, which does not import beside a PyTorch for CPUs, and
# `transformers` imports it where it is installed. A language model does without.
sys.modules["torchvision"] = None  # type: ignore[assignment]
import transformers  # noqa: E402

PROBLEMS = Path(__file__).parent.parent / "tests" / "oracle" / "problems.jsonl"
EOS = "<|im_end|>"
ROW_LENGTH = 512


def folder() -> Path:
    """The model's folder, as given on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="made by scripts/fetch_smollm2.py")
    return parser.parse_args().folder


def examples(model: Path, count: int) -> ej.TokenSource:
    """The first problems of the tests' JSON-lines file, tokenised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ej.DataWarning)  # the fields that the tests alone read
        columns = ej.text.read_jsonl(PROBLEMS, ["query", "response"])
    texts = (column[:count] for column in columns.values())
    tokenizer = ej.text.load_tokenizer(model)
    return ej.text.tokenize(*texts, tokenizer, eos_token=EOS, border="authors")


def torch_model(model: Path) -> torch.nn.Module:
    """In float32, as the library's; attention is PyTorch's fused one."""
    return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def torch_batch(source: ej.TokenSource, ids: np.ndarray) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch; -100 where there is no target."""
    length = int(source.lengths[ids].max())
    tokens = np.zeros((len(ids), length), np.int64)
    labels = np.full((len(ids), length), -100, np.int64)
    mask = np.zeros((len(ids), length), np.int64)
    for row, i in enumerate(ids):
        record = source[int(i)]
        size, start = len(record["tokens"]), int(record["target_start"])
        tokens[row, :size] = record["tokens"]
        labels[row, start:size] = record["tokens"][start:]
        mask[row, :size] = 1
    arrays = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def torch_nll(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], *, with_labels: bool = False
) -> torch.Tensor:
    """nll_BT in nats from all logits in float32; 0 where there is no target.

    `with_labels` hands the labels to the model too, as the paper's authors do when they score:
    it then also computes the mean loss, which is not used.
    """
    inputs = batch if with_labels else {n: x for n, x in batch.items() if n != "labels"}
    logits_BTV = model(**inputs).logits.float()
    labels_BT = batch["labels"][:, 1:]
    nll_N = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]),
        labels_BT.reshape(-1),
        reduction="none",
        ignore_index=-100,
    )
    return nll_N.reshape(labels_BT.shape)
