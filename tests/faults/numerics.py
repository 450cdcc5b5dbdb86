"""Extreme numbers through the public functions: each has the right value or a clear error.

  python tests/faults/numerics.py

Values are compared with NumPy's in float64. An error or warning is clear if it is one line that a
user can act on and names what the case asks for (an id, a field, a tensor). `--count` limits the
number of cases.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import attacks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny_language
from flax import nnx
from helpers import devices_mesh
from numerics_arrays import others, tables, temperatures, token_weights, weights
from numerics_case import BFLOAT16, HUGE, INF, NAN, Case, judge
from safetensors.numpy import load_file, save_file

import easy_jax as ej

# Steps and stages: a line through the origin, the square of its error, plain gradient descent.

KERNEL, RATE = 0.5, 0.25


def line():
    model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    model.kernel[...] = jnp.full((1, 1), KERNEL)
    return model


def squared(model, batch):
    return ej.squared_error(model(batch["x"]), batch["y"])


def surprise(model, batch):
    """Infinite where x is 0, and so is its gradient's factor."""
    nll_B = -jnp.log(model(batch["x"])[:, 0])
    return nll_B, jnp.ones_like(nll_B)


def corner(model, batch):
    """Finite where x is 0, but its gradient is not."""
    nll_B = jnp.sqrt(jnp.abs(model(batch["x"])[:, 0]))
    return nll_B, jnp.ones_like(nll_B)


def descent(x, y, weight, reduction="example_mean", mask=None):
    """The kernel after a step, in float64; y None is `surprise`."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    mask = np.ones(len(x), bool) if mask is None else np.array(mask, bool)
    counts = mask & (weight > 0)
    size = mask.sum() if reduction != "weight_mean" else weight[counts].sum()
    x_, w_ = x[counts], weight[counts]
    gradient_ = np.full(len(x_), -1 / KERNEL)
    if y is not None:
        gradient_ = 2 * (KERNEL * x_ - np.asarray(y, np.float64)[counts]) * x_
    return KERNEL - RATE * (w_ @ gradient_) / size if size else KERNEL


def step(x, y, weight, reduction="example_mean", mask=None, micro_batches=1, dtype=np.float32):
    mask = np.ones(len(x), bool) if mask is None else np.array(mask, bool)
    batch = {
        "x": jnp.asarray(np.asarray(x)[:, None].astype(dtype)),
        "y": jnp.asarray(np.asarray(y)[:, None].astype(dtype)),
        "weight": jnp.asarray(weight, jnp.float32),
        "mask": jnp.asarray(mask),
    }
    model, optimizer, mesh = line(), optax.sgd(RATE), devices_mesh(1)
    take = ej.make_train_step(
        nnx.graphdef(model),
        squared,
        optimizer,
        reduction=reduction,
        micro_batches=micro_batches,
        mesh=mesh,
    )
    state, metrics = take(ej.init_train_state(model, optimizer, mesh=mesh), batch)
    if not np.isfinite(float(metrics["loss"])):
        return float(metrics["loss"])
    return jax.tree.leaves(state.params)[0][0, 0]


def steps():
    x, y, w = np.float32([1, 2, 3, 4]), np.float32([1, 0, 1, 0]), np.float32([1, 0.5, 0.25, 2])

    def case(name, x=x, y=y, w=w, rtol=2e-6, dtype=np.float32, **options):
        call = lambda: step(x, y, w, dtype=dtype, **options)  # noqa: E731
        options = {name: options[name] for name in ("reduction", "mask") if name in options}
        return Case(f"step with {name}", call, descent(x, y, w, **options), rtol=rtol)

    padded = {"mask": [1, 0, 1, 0]}
    yield case("a micro-batch of padding", micro_batches=2, **padded)
    yield case("NaN in the padding", x=np.float32([1, NAN, 3, INF]), **padded)
    yield case("bfloat16 data", dtype=BFLOAT16, rtol=1e-2)
    yield case("float16 data", dtype=np.float16, rtol=1e-3)
    yield case("one example", x=x[:1], y=y[:1], w=w[:1])
    yield case("weights of zero", w=np.zeros(4))
    for reduction in ("token_mean", "example_mean", "weight_mean"):
        yield case(
            f"an infinite loss of weight 0, {reduction}",
            x=np.float32([1, 2, 1e30, 4]),
            w=np.float32([1, 0.5, 0, 2]),
            reduction=reduction,
        )
    yield case(
        "weights of 1e-30 and 1e30", w=np.float32([1e-30, 1e30, 1, 1]), reduction="weight_mean"
    )


def stage(batch_size, reduction):
    optimizer = ej.OptimizerConfig(learning_rate=RATE, schedule="constant", momentum=0.0)
    return ej.StageConfig(epochs=1, batch_size=batch_size, reduction=reduction, optimizer=optimizer)


def fitted(fields, weight_N=None, loss_fn=squared, batch_size=None, reduction="example_mean"):
    """The kernel after a stage, which is one step by default."""
    source = ej.ArraySource({name: np.asarray(value) for name, value in fields.items()})
    with tempfile.TemporaryDirectory() as folder:
        fit = ej.fit(
            line(),
            source,
            folder,
            stage=stage(batch_size or len(source), reduction),
            loss_fn=loss_fn,
            weight_N=weight_N,
            mesh=devices_mesh(1),
        )
        return jax.tree.leaves(jax.device_get(fit.model_state))[0][0, 0]


def stages():
    x, y = np.float32([1, 2, 3, 4]), np.float32([1, 0, 1, 0])
    fields = {"x": x[:, None], "y": y[:, None]}

    def case(name, w=None, want=None, words=(), fields=fields, **options):
        w = None if w is None else np.float32(w)
        return Case(f"stage with {name}", lambda: fitted(fields, w, **options), want, words)

    yield case("a weight of inf", [1, INF, 1, 1], None, ("weight", "[1]"))
    yield case("a negative weight", [1, 1, -1, 1], None, ("weight", "[2]"))
    rest = np.array([0, 1, 3])
    yield case("a weight of NaN", [1, 1, NAN, 1], descent(x[rest], y[rest], [1, 1, 1]))
    yield case("weights of zero", np.zeros(4), None, ("weight",))
    yield case("weights of NaN", np.full(4, NAN), None, ("weight",))
    yield case("three weights", np.ones(3), None, ("weight",))
    small = np.full(4, 1e-40)
    yield case(
        "weights of 1e-40", small, descent(x, y, np.ones(4)), ("weight",), reduction="weight_mean"
    )
    yield case("weights of 3e38", np.full(4, HUGE), None, ("step 1", "ids", "2"))
    far = {"x": np.float32([[1], [2], [1e30], [4]]), "y": fields["y"]}
    zero = np.float32([1, 0.5, 0, 2])
    yield case("an infinite loss of weight 0", zero, descent(x, y, zero), (), far)
    nothing = {"x": np.float32([[1], [2], [0], [4]])}
    yield case(
        "a NaN gradient of weight 0", zero, descent(x, None, zero), (), nothing, loss_fn=surprise
    )
    own = {**fields, "weight": np.float32([1, 1, -1, 1])}
    yield case("a negative weight of its own", None, None, ("weight", "2"), own)
    many = np.ones((6, 1), np.float32)
    many[4] = 0
    loader = ej.training_loader(ej.ArraySource({"x": many}), 1, epochs=1, seed=0, rows=np.arange(1))
    order = [int(batch["example_id"][0]) for batch in loader]
    at = f"step {1 + order.index(4)}"
    alone = {"fields": {"x": many}, "batch_size": 1}
    yield case("an infinite loss", None, None, (at, "[4]"), loss_fn=surprise, **alone)
    yield case("a NaN gradient of a finite loss", None, None, (at, "[4]"), loss_fn=corner, **alone)


# What a model and its data are read from.


class Classifier(nnx.Module):
    def __init__(self):
        self.head = nnx.Linear(2, 3, rngs=nnx.Rngs(0))

    def __call__(self, image, mask=None):
        return self.head(image)


def labels():
    image = np.ones((6, 2), np.float32)

    def source(bad, **options):
        label = np.array([0, 1, 2, bad, 1, 0], np.int32)
        return ej.ArraySource({"image": image, "label": label}, **options)

    def scored(bad):
        with tempfile.TemporaryDirectory() as folder:
            return ej.score(
                Classifier(),
                source(bad),
                folder,
                loss_fn=ej.classification_loss,
                batch_size=4,
                mesh=devices_mesh(1),
            ).loss_N()

    def trained(bad):
        with tempfile.TemporaryDirectory() as folder:
            return ej.fit(
                Classifier(),
                source(bad),
                folder,
                stage=stage(2, "example_mean"),
                loss_fn=ej.classification_loss,
                mesh=devices_mesh(1),
            ).steps

    for bad in (7, -1):
        yield Case(f"score with label {bad} of 3", lambda bad=bad: scored(bad), None, ("3",))
        yield Case(f"fit with label {bad} of 3", lambda bad=bad: trained(bad), None, ("3",))
    declared = lambda: len(source(7, num_classes=3))  # noqa: E731
    yield Case("label 7 of 3, declared", declared, None, ("[3]", "label"))


def texts(folder):
    """Of a tiny transformer's folder."""
    mesh = devices_mesh(1)

    def scored(token):
        examples = ej.TokenSource([3, 4, 5, 3, token, 5], [0, 3, 6], [1, 1])
        model = ej.hugging_face.load(folder, mesh=mesh)
        with tempfile.TemporaryDirectory() as where:
            return ej.score(
                model,
                ej.PackedSource(examples, row_length=4),
                where,
                mesh=mesh,
                batch_size=2,
                loss_fn=ej.causal_lm_loss,
            ).loss_N()

    yield Case("token 99 of 14", lambda: scored(99), None, ("99",))
    yield Case("token -5", lambda: scored(-5), None, ("-5",))
    name = "model.layers.1.mlp.up_proj.weight"
    for bad in (NAN, INF):
        damaged = folder.parent / f"with {bad}"
        damaged.mkdir()
        for path in folder.iterdir():
            (damaged / path.name).write_bytes(path.read_bytes())
        tensors = load_file(damaged / "model.safetensors")
        tensors[name] = tensors[name].copy()
        tensors[name][2, 1] = bad
        save_file(tensors, damaged / "model.safetensors")

        def load(where: Path = damaged) -> int:
            return len(jax.tree.leaves(nnx.state(ej.hugging_face.load(where, mesh=mesh))))

        yield Case(f"a transformer's tensor with {bad}", load, None, (name,))
    config = ej.ResNetConfig(in_channels=1, width=4, depths=(1,), stem="imagenet")
    where = folder.parent / "network"
    where.mkdir()
    save_file(_network(), where / "model.safetensors")
    load = lambda: ej.timm_weights.load(where, config, mesh=mesh).head.bias  # noqa: E731
    yield Case("a ResNet's tensor with nan", load, None, ("layer1.0.conv1.weight",))


def _network():
    """The tensors of a residual network with a block; one of them is not finite."""
    tensors = {"fc.weight": np.ones((2, 4), "f"), "fc.bias": np.ones(2, "f")}
    kernels = {"conv1": (1, 7, 7), "layer1.0.conv1": (4, 3, 3), "layer1.0.conv2": (4, 3, 3)}
    for name, shape in kernels.items():
        tensors[f"{name}.weight"] = np.ones((4, *shape), "f")
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            tensors[f"{name.replace('conv', 'bn')}.{leaf}"] = np.ones(4, "f")
    tensors["layer1.0.conv1.weight"][1, 2, 0, 1] = NAN
    return tensors


def cases(folder):
    """All of them; the folder is for files."""
    model = Path(folder) / "model"
    model.mkdir()
    tiny_language.write_folder(model)
    for kind in (temperatures, weights, token_weights, others, tables, steps, stages, labels):
        yield from kind()
    yield from texts(model)


def main(argv=None):
    args = attacks.arguments(__doc__, count=94, argv=argv)
    tally = attacks.Tally("right", "reported")
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(itertools.islice(cases(folder), args.count), start=1):
            tally.add(f"{number} {case.name}", *judge(case))
    return tally.finish()


if __name__ == "__main__":
    sys.exit(main())
