"""The weighted training step of ResNet-18 against the authors' in PyTorch, and against no weights.

See README.md.

python benchmarks/image_step.py
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timm
import torch
from flax import nnx
from timing import compared, exit_unless, interleave
from timm.models import save_for_hf

import easy_jax as ej

NUM_CLASSES = 10
BATCH_SIZE = 64
IMAGE_SIZE = 64
SGD = {"learning_rate": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
STEPS = 3  # timed together
ROUNDS = 6
TORCH_BOUND = 1.3
PLAIN_BOUND = 1.02


def make_plain_step(
    graphdef: nnx.GraphDef[Any], optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """An unweighted step written by hand: the mean cross-entropy of the same network."""

    def loss_fn(params: nnx.State, rest: nnx.State, batch: dict[str, jax.Array]) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)
        logits_BK = model(batch["image"])
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BK, batch["label"])
        return losses_B.mean(), nnx.split(model, nnx.Param, ...)[2]

    def step(state: Any, batch: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
        params, rest, opt_state = state
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, rest), grads = gradient(params, rest, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), loss

    return jax.jit(step, donate_argnums=0)


def authors_step(network: torch.nn.Module, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """Their objective: weights of the frozen probed network, which runs in every step."""
    frozen, trained = copy.deepcopy(network).eval(), copy.deepcopy(network).train()
    image_BCHW = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy())
    label_B = torch.from_numpy(batch["label"]).long()
    tau = float(np.median(batch["frozen_loss"]))
    optimizer = torch.optim.SGD(
        trained.parameters(), SGD["learning_rate"], SGD["momentum"],
        weight_decay=SGD["weight_decay"],
    )  # fmt: skip

    def losses(model: torch.nn.Module) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(image_BCHW), label_B, reduction="none")

    def step() -> float:
        optimizer.zero_grad()
        with torch.no_grad():
            weight_B = torch.exp(-losses(frozen) / tau)
        loss = (weight_B * losses(trained)).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(network, folder, safe_serialization=True)
        model = ej.timm_weights.load(folder)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, BATCH_SIZE).astype(np.int32),
        "mask": np.ones(BATCH_SIZE, bool),
    }
    loss_B, _ = jax.jit(lambda batch: ej.classification_loss(ej.eval_view(model), batch))(batch)
    batch["frozen_loss"] = np.asarray(loss_B)
    batch["weight"] = np.exp(-batch["frozen_loss"] / np.median(batch["frozen_loss"]))
    mesh = ej.make_mesh()
    placed = ej.shard_batch(batch, mesh)
    first_loss: dict[str, float] = {}

    optimizer = optax.chain(
        optax.add_decayed_weights(SGD["weight_decay"]),
        optax.sgd(SGD["learning_rate"], SGD["momentum"]),
    )
    trained = ej.train_view(model)
    weighted_step = ej.make_train_step(
        nnx.graphdef(trained), ej.classification_loss, optimizer, reduction="example_mean"
    )
    state = ej.init_train_state(trained, optimizer, mesh=mesh)
    plain_step = make_plain_step(nnx.graphdef(trained), optimizer)
    params, rest = jax.tree.map(jnp.copy, nnx.split(trained, nnx.Param, ...)[1:])
    plain_state = (params, rest, optimizer.init(params))
    theirs = authors_step(network, batch)

    def weighted() -> None:
        nonlocal state
        for _ in range(STEPS):
            state, metrics = weighted_step(state, placed)
            if "weighted" not in first_loss:
                first_loss["weighted"] = float(metrics["loss"])
        jax.block_until_ready(state)

    def plain() -> None:
        nonlocal plain_state
        for _ in range(STEPS):
            plain_state, _ = plain_step(plain_state, placed)
        jax.block_until_ready(plain_state)

    def pytorch() -> None:
        for _ in range(STEPS):
            first_loss.setdefault("torch", theirs())

    # In pairs, as in language_step.py: PyTorch's memory is in the way of whoever follows.
    against_plain = interleave({"weighted": weighted, "plain": plain}, ROUNDS)
    against_torch = interleave({"weighted": weighted, "torch": pytorch}, ROUNDS)
    np.testing.assert_allclose(first_loss["weighted"], first_loss["torch"], rtol=1e-4)
    faster, faster_text = compared(against_torch["torch"], against_torch["weighted"], STEPS)
    slower, slower_text = compared(against_plain["weighted"], against_plain["plain"], STEPS)
    print(
        f"image_step: PyTorch with the frozen probe / weighted {faster_text}, bound "
        f"{TORCH_BOUND}; weighted / unweighted {slower_text}, bound {PLAIN_BOUND}"
    )
    exit_unless(
        faster >= TORCH_BOUND and slower <= PLAIN_BOUND,
        f"PyTorch / weighted >= {TORCH_BOUND}, weighted / unweighted <= {PLAIN_BOUND}",
    )


if __name__ == "__main__":
    main()
