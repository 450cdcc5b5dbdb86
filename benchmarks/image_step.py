"""The weighted training step of ResNet-18 against the authors' in PyTorch, and against no weights.

See README.md.

python benchmarks/image_step.py
"""

import copy
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timm
import torch
from flax import nnx
from timing import against_two
from timm.models import save_for_hf
from weighted_step import make_plain_step

import easy_jax as ej

NUM_CLASSES = 10
BATCH_SIZE = 64
IMAGE_SIZE = 64
SGD = {"learning_rate": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
STEPS = 3  # timed together
ROUNDS = 6
TORCH_BOUND = 1.3
PLAIN_BOUND = 1.02


def authors_step(network: torch.nn.Module, batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """Their objective: weights of the frozen probed network, which runs in every step."""
    frozen, trained = copy.deepcopy(network).eval(), copy.deepcopy(network).train()
    image_BCHW = torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy())
    label_B = torch.from_numpy(batch["label"]).long()
    tau = float(np.median(batch["frozen_loss"]))
    optimizer = torch.optim.SGD(
        trained.parameters(),
        SGD["learning_rate"],
        SGD["momentum"],
        weight_decay=SGD["weight_decay"],
    )

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


def make_batch(model: nnx.Module) -> dict[str, np.ndarray]:
    """Returns random images and labels, with the frozen losses and FLOW's weights."""
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32),
        "label": rng.integers(0, NUM_CLASSES, BATCH_SIZE).astype(np.int32),
        "mask": np.ones(BATCH_SIZE, bool),
    }
    loss_B, _ = jax.jit(lambda batch: ej.classification_loss(ej.eval_mode(model), batch))(batch)
    batch["frozen_loss"] = np.asarray(loss_B)
    batch["weight"] = np.exp(-batch["frozen_loss"] / np.median(batch["frozen_loss"]))
    return batch


def main() -> None:
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=NUM_CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(network, folder, safe_serialization=True)
        model = ej.timm_weights.load(folder)
    batch = make_batch(model)
    mesh = ej.make_mesh()
    placed = ej.shard_batch(batch, mesh)
    first_loss: dict[str, float] = {}

    optimizer = optax.chain(
        optax.add_decayed_weights(SGD["weight_decay"]),
        optax.sgd(SGD["learning_rate"], SGD["momentum"]),
    )
    trained = ej.train_mode(model)
    weighted_step = ej.make_train_step(
        nnx.graphdef(trained),
        ej.classification_loss,
        optimizer,
        reduction="example_mean",
        mesh=mesh,
    )
    state = ej.init_train_state(trained, optimizer, mesh=mesh)
    plain_step = make_plain_step(nnx.graphdef(trained), optimizer, mesh)
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

    weighted()
    pytorch()
    np.testing.assert_allclose(first_loss["weighted"], first_loss["torch"], rtol=1e-4)
    against_two(
        "image_step: the frozen probe in PyTorch's step",
        weighted,
        plain,
        pytorch,
        rounds=ROUNDS,
        torch_bound=TORCH_BOUND,
        plain_bound=PLAIN_BOUND,
        calls=STEPS,
    )


if __name__ == "__main__":
    main()
