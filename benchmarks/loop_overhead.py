"""Share of the training loop's wall time outside of compiled code. See README.md.

python benchmarks/loop_overhead.py
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from timing import exit_unless, median_ratio

import easy_jax as ej
from easy_jax.config import GlyphDataConfig
from easy_jax.data import glyphs

EPOCHS = 8
ROUNDS = 15
BOUND = 0.10


def main() -> None:
    tasks = glyphs.load(GlyphDataConfig(pretrain_train=26), seed=0, label_noise=0.3)
    source = tasks.target.train
    weight_N = (1.0 - np.random.default_rng(0).random(len(source))).astype(np.float32)
    model = ej.train_mode(ej.ResNet(ej.ResNetConfig(), tasks.target.num_classes, rngs=nnx.Rngs(0)))
    stage = ej.StageConfig(
        epochs=EPOCHS, batch_size=64, optimizer=ej.OptimizerConfig(learning_rate=0.01)
    )
    mesh = ej.make_mesh()

    loader = ej.training_loader(source, stage.batch_size, epochs=EPOCHS, seed=0, weight_N=weight_N)
    steps = loader.steps
    optimizer = ej.make_optimizer(stage.optimizer, steps)
    step = ej.make_train_step(
        nnx.graphdef(model), ej.classification_loss, optimizer, reduction=stage.reduction, mesh=mesh
    )
    first = {name: array for name, array in next(iter(loader)).items() if name != "example_id"}
    batch = ej.shard_batch(first, mesh)

    def compiled() -> float:
        state = jax.block_until_ready(ej.init_train_state(model, optimizer, mesh=mesh))
        start = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        fresh = (Path(folder) / str(number) for number in itertools.count())

        def loop() -> float:
            result = ej.fit(
                model,
                source,
                next(fresh),
                stage=stage,
                loss_fn=ej.classification_loss,
                weight_N=weight_N,
                mesh=mesh,
                save_every_steps=steps,
            )
            return result.seconds

        loop(), compiled()  # compilation is not what is measured
        fit_seconds, compiled_seconds = [], []
        for _ in range(ROUNDS):
            fit_seconds.append(loop())
            compiled_seconds.append(compiled())

    overhead = 1.0 - median_ratio(compiled_seconds, fit_seconds)
    fit_ms, compiled_ms = (
        1e3 * statistics.median(times) / steps for times in (fit_seconds, compiled_seconds)
    )
    print(
        f"loop_overhead: fit {fit_ms:.2f} ms, compiled step {compiled_ms:.2f} ms per step, RATIO "
        f"{1.0 - overhead:.3f}, overhead {100 * overhead:.1f} % (bound {100 * BOUND:.0f} %)"
    )
    exit_unless(overhead <= BOUND, f"1 - compiled / fit <= {100 * BOUND:.0f} %")


if __name__ == "__main__":
    main()
