"""TRL: its own DFT loss on SmolLM2, and exported weights in its data pipeline."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from datasets import Dataset, load_dataset
from flax import nnx
from helpers import devices_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import easy_jax as ej
from easy_jax.core.step import init_train_state, make_train_step
from easy_jax.data import PackedSource, text, training_loader
from easy_jax.parallel.sharding import shard_batch
from easy_jax.pretrained import hugging_face

PAIRS = {
    "What is 2 + 3?": "2 + 3 = 5.",
    "Name three colours.": "Red, green and blue.",
    "Translate 'good morning' into French.": "Bonjour.",
}


@pytest.fixture(scope="module")
def folder():
    return Path(os.environ["EASY_JAX_SMOLLM2"])


def _trl(folder, records, loss_type, where):
    """TRL's loss and the norm of its gradient, on one batch of tokens and labels."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = SFTConfig(
        output_dir=str(where),
        loss_type=loss_type,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dataset = Dataset.from_list(records)
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(records))
    loss.backward()
    squares = sum(float(p.grad.double().square().sum()) for p in trainer.model.parameters())
    return float(loss.detach()), squares**0.5


@pytest.mark.filterwarnings("ignore")  # those of TRL and its dependencies are not ours
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_dft_is_trls(folder, tmp_path, loss_type):
    examples = text.tokenize(
        list(PAIRS),
        list(PAIRS.values()),
        text.load_tokenizer(folder),
        eos_token="<|im_end|>",
        template="{instruction}\n",
    )
    records = []
    for record in examples:
        tokens, start = record["tokens"].tolist(), int(record["target_start"])
        records.append({"input_ids": tokens, "labels": [-100] * start + tokens[start:]})
    expected = _trl(folder, records, loss_type, tmp_path)
    mesh = devices_mesh(1)
    model, optimizer = hugging_face.load(folder, mesh=mesh), optax.sgd(0.0)
    step = make_train_step(
        nnx.graphdef(model),
        ej.causal_lm_loss,
        optimizer,
        reduction="token_mean",
        weighting=ej.weightings.get({"nll": "none"}.get(loss_type, loss_type)),
        mesh=mesh,
    )
    loader = training_loader(PackedSource(examples, 64), 2, epochs=1, seed=0, rows=np.arange(2))
    (batch,) = list(loader)
    del batch["example_id"]
    state = init_train_state(model, optimizer, mesh=mesh)
    _, metrics = step(state, shard_batch(jax.tree.map(jnp.asarray, batch), mesh))
    np.testing.assert_allclose(metrics["loss"], expected[0], rtol=2e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected[1], rtol=1e-4)


class WithWeights(DataCollatorForLanguageModeling):
    """TRL's collator with the column `weight`, as docs/weightings.md has it."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["weight"] = torch.tensor([example["weight"] for example in examples])
        return batch


@pytest.mark.parametrize("ending", [".parquet", ".jsonl"])
def test_exported_weights_in_trls_pipeline(tmp_path, ending):
    """`datasets` reads the file; TRL's own collator leaves the column out, five lines keep it."""
    source = ej.ArraySource({"i": np.arange(3, dtype=np.int32)})
    losses = jnp.array([1.0, 2.0, 3.0])
    table = ej.score(
        nnx.Linear(1, 1, rngs=nnx.Rngs(0)),
        source,
        tmp_path / "table",
        loss_fn=lambda model, batch: losses[batch["i"]],
        batch_size=4,
        mesh=devices_mesh(1),
    )
    columns = {"prompt": list(PAIRS), "completion": list(PAIRS.values())}
    path = ej.export_weights(table, tmp_path / f"weights{ending}", columns=columns)
    kind = {".parquet": "parquet", ".jsonl": "json"}[ending]
    data = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "c"))
    assert data["prompt"][:] == list(PAIRS)
    np.testing.assert_allclose(data["weight"][:], np.exp([-0.5, -1.0, -1.5]), rtol=1e-6)
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "weight": w} for w in data["weight"]]
    assert "weight" not in DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    batch = WithWeights(pad_token_id=0)(rows)
    np.testing.assert_allclose(batch["weight"], data["weight"][:])
