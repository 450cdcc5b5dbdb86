"""Fingerprints of functions: what they do, whatever their name, process or place in a file."""

import functools
import os
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_language
from flax import nnx

import easy_jax as ej
from easy_jax.io import code_fingerprint

PREAMBLE = """
import functools
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import easy_jax as ej
factor = {factor}
def helper(x):
    {comment}
    return factor * x{helper}
class Scaled:
    def __init__(self, scale):
        self.scale = scale
    def __call__(self, model, batch):
        return self.scale * model(batch["x"]){call}
def linear(seed):
    return nnx.Linear(2, 2, rngs=nnx.Rngs(seed))
def closure(value):
    def loss(model, batch):
        return value, model(batch["x"])
    return loss
"""


def of(expression, factor=2.0, helper="", call="", comment='"""Says nothing."""'):
    """The fingerprint of an expression in a module of its own, as a notebook would have it."""
    module = types.ModuleType("__main__")
    text = PREAMBLE.format(factor=factor, helper=helper, call=call, comment=comment)
    exec(text, vars(module))
    return code_fingerprint.of_function(eval(expression, vars(module)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lambda m, b: m(b) + 1", "lambda m, b: m(b) + 2"),
        ("lambda m, b: m(b['x'])", "lambda m, b: m(b['y'])"),
        ("lambda m, b: jnp.sin(m(b))", "lambda m, b: jnp.cos(m(b))"),
        ("lambda m, b, k=1: m(b) + k", "lambda m, b, k=2: m(b) + k"),
        ("closure(1.0)", "closure(1)"),
        ("closure(np.arange(3))", "closure(np.array([0, 1, 3]))"),
        ("closure(jnp.arange(3.0))", "closure(jnp.arange(3))"),
        ("closure(linear(0))", "closure(linear(1))"),
        ("closure({'a': 1, 'b': 2})", "closure({'a': 2, 'b': 1})"),
        ("functools.partial(helper, y=1)", "functools.partial(helper, y=2)"),
        ("functools.partial(ej.squared_error, 1)", "functools.partial(ej.squared_error, 2)"),
        ("Scaled(1.0)", "Scaled(2.0)"),
        ("Scaled(1.0).__call__", "Scaled(2.0).__call__"),
        ("jax.vmap(helper, in_axes=0)", "jax.vmap(helper, in_axes=1)"),
        ("jax.jit(lambda m, b: m)", "jax.jit(lambda m, b: b)"),
        ("ej.classification_loss", "ej.causal_lm_loss"),
    ],
)
def test_what_differs_has_another_fingerprint(one, other):
    assert of(one) != of(other)


def test_what_a_function_uses_counts():
    loss = "lambda m, b: helper(m(b['x']))"
    found = {
        of(loss),
        of(loss, factor=3.0),
        of(loss, helper=" + 1"),
        of("Scaled(1.0)"),
        of("Scaled(1.0)", call=" + 1"),
    }
    assert len(found) == 5
    assert of(loss) == of(loss, call=" + 1")  # not used
    # An attribute is not a global of the same name.
    assert of("lambda m, b: m.factor") == of("lambda m, b: m.factor", factor=3.0)


def test_comments_and_docstrings_do_not_count():
    loss = "lambda m, b: helper(m(b['x']))"
    assert of(loss) == of(loss, comment="# Says nothing.\n") == of(loss, comment='"""Other."""')


def test_functions_of_installed_packages_are_known_by_name():
    assert code_fingerprint.of_function(ej.classification_loss) == "classification_loss"
    assert code_fingerprint.of_function(ej.causal_lm_loss) == "causal_lm_loss"
    traced = chex.assert_max_traces(ej.classification_loss, n=1)
    assert code_fingerprint.of_function(traced) == "classification_loss"


def test_recursion_and_objects_without_state():
    def again(model, batch):
        return again(model, batch) if batch else np.random.default_rng(0)

    box = []
    box.append(box)
    found = [code_fingerprint.of_function(functools.partial(again, x)) for x in (box, sys.stdout)]
    assert len(set(found)) == 2


def test_structure_of_a_model():
    class Model(nnx.Module):
        def __init__(self, rate, factor=1.0):
            self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(0))
            self.factor = factor

        def __call__(self, x):
            return self.factor * self.dropout(self.linear(x))

    def other_call(self, x):
        return self.factor * self.linear(x)

    Other = type("Model", (nnx.Module,), {"__init__": Model.__init__, "__call__": other_call})
    models = [Model(0.1), Model(0.2), Model(0.1, 2.0), ej.eval_mode(Model(0.1)), Other(0.1)]
    found = [code_fingerprint.of_structure(nnx.graphdef(model)) for model in models]
    assert len(set(found)) == len(models)
    again = Model(0.1)
    again.linear.kernel[...] = jnp.ones((2, 2))
    assert code_fingerprint.of_structure(nnx.graphdef(again)) == found[0]
    placed = Model(0.1)
    placed.linear.kernel.set_metadata("logical_axes", ("embed", "mlp"))  # says where it lies
    assert code_fingerprint.of_structure(nnx.graphdef(placed)) == found[0]


SCRIPT = """
import functools
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from easy_jax.io import code_fingerprint as c
names = {"a", "b", "c", "d"}
class Loss:
    def __init__(self, *values):
        self.values = values
    def __call__(self, model, batch):
        return [model(batch[n]) for n in names if n in {"p", "q", "r"}]
model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.relu, lambda x: 2 * x)
print(c.of_function(Loss(model, names, np.arange(3), jax.jit(jnp.sin), object(), Loss)))
print(c.of_function(functools.partial(lambda m, b, t: t, t=jnp.ones(3))))
print(c.of_function(jax.vmap(lambda m, b: names)))
print(c.of_structure(nnx.graphdef(model)))
"""


@pytest.mark.slow
def test_the_same_in_every_process(root, capsys):
    exec(SCRIPT, {"__name__": "__main__"})
    here = capsys.readouterr().out
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(root)}
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout == here
    assert len(set(here.splitlines())) == 4


def test_it_does_not_depend_on_where_arrays_lie():
    def loss(value):
        return lambda model, batch: value * model(batch)

    value = np.arange(8.0, dtype=np.float32)
    mesh = ej.make_mesh()
    spread = jax.device_put(value, jax.NamedSharding(mesh, jax.P("data")))
    one, other = (code_fingerprint.of_function(loss(x)) for x in (jnp.asarray(value), spread))
    assert one == other


@pytest.mark.slow
def test_artefacts_of_version_0_1_stay_valid(tmp_path):
    """These fingerprints are in checkpoints and loss tables: a move of a module is no change."""
    resnets = {
        "basic": ("small", "16226ede7d8d95da", "d26f2c08190a81fb"),
        "bottleneck": ("imagenet", "0cc78ee8de7bf480", "343c797d66114dd2"),
    }
    for block, (stem, training, evaluating) in resnets.items():
        config = ej.ResNetConfig(in_channels=3, width=4, depths=(1, 1), block=block, stem=stem)
        model = ej.ResNet(config, 5, rngs=nnx.Rngs(0))
        assert code_fingerprint.of_structure(nnx.graphdef(model)) == training
        assert code_fingerprint.of_structure(nnx.graphdef(ej.eval_mode(model))) == evaluating
    model = ej.hugging_face.load(tiny_language.write_folder(tmp_path), remat="full")
    assert code_fingerprint.of_structure(nnx.graphdef(model)) == "0336eb6b2f98d11f"
    assert code_fingerprint.of_function(ej.causal_lm_loss) == "causal_lm_loss"
