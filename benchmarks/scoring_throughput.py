"""Images per second of scoring against a plain jitted forward pass. See README.md.

python benchmarks/scoring_throughput.py
"""

import functools
import itertools
import statistics
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from timing import exit_unless, interleave, median_ratio

import easy_jax as ej
from easy_jax.parallel import sharding
from easy_jax.train import forward

NUM_IMAGES = 8192
BATCH_SIZE = 256
ROUNDS = 10
BOUND = 0.9
NUM_CLASSES = 10


def main() -> None:
    model = ej.eval_mode(ej.ResNet(ej.ResNetConfig(), NUM_CLASSES, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    mesh = ej.make_mesh()
    rng = np.random.default_rng(0)
    image = rng.normal(size=(NUM_IMAGES, 16, 16, 1)).astype(np.float32)
    label = rng.integers(NUM_CLASSES, size=NUM_IMAGES).astype(np.int32)
    source = ej.ArraySource({"image": image, "label": label})
    placed = [
        ej.shard_batch({"image": image[start : start + BATCH_SIZE]}, mesh)["image"]
        for start in range(0, NUM_IMAGES, BATCH_SIZE)
    ]
    loader = ej.scoring_loader(source, BATCH_SIZE)

    @functools.partial(jax.jit, compiler_options=sharding.compiler_options(mesh))
    def plain_forward(state: nnx.State, image_BHWC: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(image_BHWC)

    def plain() -> None:
        jax.block_until_ready([plain_forward(state, image_BHWC) for image_BHWC in placed])

    step = forward.make_score_step(graphdef, ej.classification_loss, mesh)

    def per_example() -> None:
        for _ in forward.per_example(step, state, loader, mesh):
            pass

    with tempfile.TemporaryDirectory() as folder:
        fresh = (Path(folder) / str(number) for number in itertools.count())

        def whole() -> None:
            ej.score(
                model,
                source,
                next(fresh),
                loss_fn=ej.classification_loss,
                batch_size=BATCH_SIZE,
                mesh=mesh,
            )

        functions = {"plain": plain, "per_example": per_example, "score": whole}
        seconds = interleave(functions, ROUNDS)

    rate = {name: NUM_IMAGES / statistics.median(times.wall) for name, times in seconds.items()}
    # Throughput is the inverse of time: ours / peer = seconds of the peer / our seconds.
    ratio = median_ratio(seconds["plain"].wall, seconds["per_example"].wall)
    ratio_cpu = median_ratio(seconds["plain"].cpu, seconds["per_example"].cpu)
    ratio_whole = median_ratio(seconds["plain"].wall, seconds["score"].wall)
    print(
        f"scoring_throughput: per_example {rate['per_example']:.0f}, plain forward "
        f"{rate['plain']:.0f} images/s, RATIO {ratio:.3f} (bound {BOUND}; of CPU time "
        f"{ratio_cpu:.3f}); ej.score with Parquet {rate['score']:.0f} images/s, ratio "
        f"{ratio_whole:.3f}"
    )
    exit_unless(ratio >= BOUND, f"per_example / plain forward >= {BOUND}")


if __name__ == "__main__":
    main()
