"""The training step of SmolLM2 with the weighting `eaft` against PyTorch's on whole logits.

python benchmarks/eaft_step.py models/smollm2
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import smollm2
import torch
from flax import nnx
from timing import against_two

import easy_jax as ej

PROBLEMS = 64
ROWS = 2
LEARNING_RATE = 1e-6
ROUNDS = 6
TORCH_BOUND = 1.4
PLAIN_BOUND = 1.06


def torch_step(folder: Path, examples: ej.TokenSource, ids: np.ndarray) -> Callable[[], float]:
    """Returns a step in PyTorch: weights min(1, H / ln 20) from all logits in float32."""
    model = smollm2.torch_model(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    batch = smollm2.torch_batch(examples, ids)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels_BT = batch["labels"][:, 1:]
    there_BT = labels_BT != -100

    def step() -> float:
        logits_BTV = model(**inputs).logits[:, :-1].float()
        log_p_BTV = torch.log_softmax(logits_BTV, dim=-1)
        chosen_BT1 = labels_BT.clamp(min=0)[..., None]
        nll_BT = -log_p_BTV.gather(-1, chosen_BT1)[..., 0]
        with torch.no_grad():
            entropy_BT = -(log_p_BTV.exp() * log_p_BTV).sum(-1)
            weight_BT = (entropy_BT / math.log(20.0)).clamp(max=1.0) * there_BT
        loss = (weight_BT * nll_BT).sum() / there_BT.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    folder = smollm2.folder()
    mesh = ej.make_mesh()
    examples = smollm2.examples(folder, PROBLEMS)
    source = ej.PackedSource(examples, smollm2.ROW_LENGTH)
    batch = next(iter(ej.training_loader(source, ROWS, epochs=1, seed=0)))
    ids = batch.pop("example_id")
    ids = ids[batch["mask"]]
    placed = ej.shard_batch(batch, mesh)
    model = ej.hugging_face.load(folder, remat="dots", mesh=mesh)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    first_loss: dict[str, float] = {}

    def stepper(name: str) -> Callable[[], None]:
        step = ej.make_train_step(
            nnx.graphdef(model),
            ej.causal_lm_loss,
            optimizer,
            reduction="token_mean",
            weighting=ej.weightings.get(name),
        )
        state = ej.init_train_state(model, optimizer, mesh=mesh)

        def run() -> None:
            nonlocal state
            state, metrics = step(state, placed)
            jax.block_until_ready((state, metrics))
            first_loss.setdefault(name, float(metrics["loss"]))

        return run

    weighted, plain = stepper("eaft"), stepper("none")
    theirs = torch_step(folder, examples, ids)

    def pytorch() -> None:
        loss = theirs()
        first_loss.setdefault("torch", loss)

    weighted()
    pytorch()
    np.testing.assert_allclose(first_loss["eaft"], first_loss["torch"], rtol=1e-4)
    against_two(
        f"eaft_step: {len(ids)} examples in {ROWS} rows",
        weighted,
        plain,
        pytorch,
        rounds=ROUNDS,
        torch_bound=TORCH_BOUND,
        plain_bound=PLAIN_BOUND,
    )


if __name__ == "__main__":
    main()
