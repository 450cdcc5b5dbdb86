"""The weighted training step of SmolLM2 against PyTorch's, and against no weights. See README.md.

python benchmarks/language_step.py models/smollm2
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import smollm2
import torch
from flax import nnx
from plain_language_step import make_plain_step
from timing import against_two

import easy_jax as ej

PROBLEMS = 64
ROWS = 2
LEARNING_RATE = 1e-6
ROUNDS = 6
TORCH_BOUND = 1.0
PLAIN_BOUND = 1.02


def main() -> None:
    folder = smollm2.folder()
    mesh = ej.make_mesh()
    examples = smollm2.examples(folder, PROBLEMS)
    weight_N = np.random.default_rng(0).random(PROBLEMS).astype(np.float32)
    source = ej.PackedSource(examples, smollm2.ROW_LENGTH)
    batch = next(iter(ej.training_loader(source, ROWS, epochs=1, seed=0, weight_N=weight_N)))
    ids = batch.pop("example_id")
    ids = ids[batch["mask"]]
    placed = ej.shard_batch(batch, mesh)
    first_loss: dict[str, float] = {}

    model = ej.hugging_face.load(folder, remat="dots", mesh=mesh)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    weighted_step = ej.make_train_step(
        nnx.graphdef(model), ej.causal_lm_loss, optimizer, reduction="token_mean"
    )
    state = ej.init_train_state(model, optimizer, mesh=mesh)

    def weighted() -> None:
        nonlocal state
        state, metrics = weighted_step(state, placed)
        jax.block_until_ready((state, metrics))
        first_loss.setdefault("weighted", float(metrics["loss"]))

    plain_step = make_plain_step(nnx.graphdef(model), optimizer)
    params = jax.tree.map(jnp.copy, nnx.state(model))
    plain_state = (params, optimizer.init(params))

    def plain() -> None:
        nonlocal plain_state
        plain_state, loss = plain_step(plain_state, placed)
        jax.block_until_ready((plain_state, loss))

    reference = smollm2.torch_model(folder).train()
    torch_optimizer = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    torch_batch = smollm2.torch_batch(examples, ids)
    torch_weight_B = torch.from_numpy(weight_N[ids])

    def pytorch() -> None:
        nll_BT = smollm2.torch_nll(reference, torch_batch)
        count = (torch_batch["labels"] != -100).sum()
        loss = (torch_weight_B * nll_BT.sum(1)).sum() / count
        loss.backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        first_loss.setdefault("torch", loss.item())

    weighted()
    pytorch()
    np.testing.assert_allclose(first_loss["weighted"], first_loss["torch"], rtol=1e-4)
    against_two(
        f"language_step: {len(ids)} examples in {ROWS} rows",
        weighted,
        plain,
        pytorch,
        rounds=ROUNDS,
        torch_bound=TORCH_BOUND,
        plain_bound=PLAIN_BOUND,
    )


if __name__ == "__main__":
    main()
