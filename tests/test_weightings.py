"""Every weighting against NumPy in float64, on whole logits, and the registry of weightings."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lm_head import _case, _numpy
from test_token_stats import reference

import easy_jax as ej
from easy_jax.core import weightings
from easy_jax.io.checks import ConfigError
from easy_jax.kernels.linear_cross_entropy import weighted_sum

SHAPE = (6, 9)
NAMES = weightings.names()  # before any test adds one


def _median_of_rows(stats):
    means = [row[there].mean() for row, there in zip(stats.nll, stats.mask, strict=True)]
    return np.median(means)


def _excess(stats, share=0.7):
    flat = (stats.nll - stats.frozen_nll).ravel()
    there = np.flatnonzero(stats.mask.ravel())
    order = there[np.argsort(-flat[there], kind="stable")]
    w = np.zeros(flat.size)
    w[order[: math.ceil(share * there.size - 1e-9)]] = 1
    return w.reshape(stats.nll.shape)


def _median(stats):
    return np.median(stats.frozen_nll[stats.mask])


# By name: the formula, in NumPy. `s` has p, p0, the losses and the statistics, in float64.
FORMULAS = {
    "none": lambda s: np.ones(s.nll.shape),
    "flow": lambda s: np.exp(-s.frozen_nll / _median(s)),
    "flow_token": lambda s: np.exp(-s.frozen_nll / _median(s)),
    "flow_online": lambda s: np.exp(-s.frozen_nll / _median(s)),
    "stm": lambda s: 1.0 * (np.exp(-s.frozen_nll) >= 0.4),
    "easiest": lambda s: 1.0 * (s.frozen_nll <= np.quantile(s.frozen_nll[s.mask], 0.7)),
    "hardest": lambda s: 1.0 * (s.frozen_nll >= np.quantile(s.frozen_nll[s.mask], 1 - 0.7)),
    "dft": lambda s: np.exp(-s.nll),
    "power": lambda s: np.exp(-s.nll) ** 0.5,
    "talr": lambda s: np.maximum(np.exp(-s.nll / _median_of_rows(s)), 0.01),
    "deft": lambda s: np.exp(-s.nll) ** s.collision,
    "eaft": lambda s: np.minimum(s.entropy / np.log(20), 1),
    "profit": lambda s: 1.0 * (np.exp(-s.nll) >= 0.1),
    "iw": lambda s: np.clip(np.exp(s.frozen_nll - s.nll), 0, 16),
    "iw_token": lambda s: np.clip(np.exp(s.frozen_nll - s.nll), 0.2, 1.8),
    "excess": _excess,
    "psft": lambda s: np.exp(s.old_nll - s.nll) * (np.exp(s.old_nll - s.nll) <= 1.28),
    "uniform": lambda s: np.full(s.nll.shape, FORMULAS["flow"](s)[s.mask].mean()),
    "mean_one": lambda s: FORMULAS["flow"](s) / FORMULAS["flow"](s)[s.mask].mean(),
}
RANDOM = ("shuffled",)
THRESHOLDS = ("stm", "profit", "easiest", "hardest", "excess", "psft")
OPTIONS = (
    ("power", {"exponent": 3.0}, lambda s: np.exp(-3 * s.nll)),
    ("power", {"exponent": 0.0}, lambda s: np.ones(s.nll.shape)),
    ("talr", {"temperature": 2.0}, lambda s: np.maximum(np.exp(-s.nll / 2), 0.01)),
    ("flow", {"temperature": 2.0}, lambda s: np.exp(-s.frozen_nll / 2)),
    ("dft", {"floor": 0.3}, lambda s: np.maximum(np.exp(-s.nll), 0.3)),
    ("mean_one", {"of": "dft"}, lambda s: np.exp(-s.nll) / np.exp(-s.nll)[s.mask].mean()),
    ("uniform", {"of": "power", "exponent": 2.0}, lambda s: np.exp(-2 * s.nll)[s.mask].mean()),
    (
        "iw",
        {"scale": 2.0, "limit": 3.0},
        lambda s: np.minimum(np.exp(2 * (s.frozen_nll - s.nll)), 3),
    ),
    ("excess", {"share": 0.25}, functools.partial(_excess, share=0.25)),
)


def _random(seed, extreme=False):
    """Statistics of whole logits in float64, as TokenStats of NumPy arrays."""
    hidden, head, targets, _ = _case(SHAPE, 40, seed, scale=30.0 if extreme else 1.0)
    targets[1, :3] = 3
    found = reference(hidden, head, targets)
    found.pop("is_close")
    rng = np.random.default_rng(seed)
    more = {
        "frozen_nll": rng.gamma(1.0, size=SHAPE) * (targets >= 0),
        "old_nll": np.abs(found["nll"] + rng.normal(scale=0.2, size=SHAPE)),
    }
    rounded = {name: np.float64(np.float32(array)) for name, array in (found | more).items()}
    return ej.TokenStats(**rounded, mask=targets >= 0)


def _float32(stats):
    return jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype == bool else np.float32), stats)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_weights_are_those_of_numpy(name, extreme):
    _check(weightings.get(name), FORMULAS[name], extreme)


@pytest.mark.parametrize("name,options,formula", OPTIONS)
def test_options(name, options, formula):
    _check(weightings.get(name, **options), formula, False)


def _check(weighting, formula, extreme):
    stats = _random(1, extreme)
    expected = np.where(stats.mask, formula(stats), 0.0)
    assert np.ptp(expected[stats.mask]) >= 0
    actual = weighting(_float32(stats))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(actual, jax.jit(weighting.__call__)(_float32(stats)))


def test_every_name_has_a_formula():
    assert {*NAMES} == {*FORMULAS, *RANDOM}


def test_probabilities_of_zero_and_one():
    """The weights of every rule stay finite where p or p0 is 0 or 1 in float32."""
    nll = jnp.array([[0.0, 200.0, 0.0, 200.0]])
    frozen = jnp.array([[0.0, 0.0, 200.0, 200.0]])
    stats = ej.TokenStats(
        nll,
        frozen,
        entropy=jnp.zeros_like(nll),
        collision=jnp.ones_like(nll),
        old_nll=frozen,
    )
    for name in NAMES:
        weight = np.asarray(weightings.get(name)(stats))
        assert np.isfinite(weight).all() and (weight >= 0).all(), name


def test_segments_of_packed_rows_are_examples():
    nll = jnp.array([[1.0, 3.0, 5.0, 9.0], [7.0, 7.0, 0.0, 0.0]])
    segments = jnp.array([[1, 1, 2, 0], [1, 1, 0, 0]])
    stats = ej.TokenStats(nll, mask=segments > 0, segment_ids=segments)
    weight = weightings.get("talr")(stats)  # means 2, 5, 7
    np.testing.assert_allclose(
        weight[0, :3], np.maximum(np.exp(-np.array([1, 3, 5]) / 5), 0.01), rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(
    "name",
    [n for n in FORMULAS if weightings.get(n).reads_model() and not weightings.get(n).needs_pass()],
)
def test_gradients_of_the_fused_head(name, cap):
    """Weights from hidden states, and the gradient of stop_gradient(w) * nll, in float64."""
    hidden, head, targets, _ = _case(SHAPE, 40, 4)
    stats = _random(4)
    found = reference(hidden, head, targets, cap)
    found.pop("is_close")
    stats = dataclasses.replace(stats, **found)
    if name in THRESHOLDS:  # no token is near the threshold
        limit = {"profit": -np.log(0.1)}.get(name)
        near = stats.nll if limit is not None else stats.old_nll - stats.nll
        limit = np.log(1.28) if limit is None else limit
        targets[np.abs(near - limit) < 1e-3] = -1
        stats = dataclasses.replace(stats, mask=targets >= 0)
    expected = np.where(stats.mask, FORMULAS[name](stats), 0.0)
    _, hidden_bar, head_bar = _numpy(hidden, head, targets, expected, cap)
    weighting = weightings.get(name)
    fields = {"frozen": "frozen_nll", "old": "old_nll"}
    given = {
        fields[n]: np.float32(getattr(stats, fields[n])) for n in weighting.needs & fields.keys()
    }

    def loss(hidden, head):
        found = weighted_sum(
            hidden,
            head,
            targets,
            jnp.ones(SHAPE),
            rule=weighting,
            given=given,
            soft_cap=cap,
            more=weighting.reads_distribution(),
        )
        return found.total, found.rule_N

    (_, weight), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
    np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[0], hidden_bar, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], head_bar, rtol=1e-5, atol=1e-5)


def _positive(stats):
    return jnp.where(stats.mask, stats.collision, 1.0)


# Objectives whose gradient is that of stop_gradient(w) * nll, of p and what is constant.
OBJECTIVES = {
    "dft": lambda p, s: -p,
    "power": lambda p, s: (1 - p**0.5) / 0.5,
    "deft": lambda p, s: (1 - p ** _positive(s)) / _positive(s),
    "psft": lambda p, s: (
        -jnp.minimum(p * jnp.exp(s.old_nll), jnp.clip(p * jnp.exp(s.old_nll), 0.8, 1.28))
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_objective_that_a_rule_minimises(name):
    """Identities: the weighted gradient is the gradient of another function of p."""
    stats = _float32(_random(2))

    def objective(nll):
        value = OBJECTIVES[name](jnp.exp(-nll), stats)
        return jnp.sum(jnp.where(stats.mask, value, 0.0))

    expected = jax.grad(objective)(stats.nll)
    np.testing.assert_allclose(weightings.get(name)(stats), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*FORMULAS, *RANDOM} - {"none"}))
def test_no_gradient_passes_through_the_weights(name):
    stats = _float32(_random(3))

    def loss(nll):
        return jnp.sum(weightings.get(name)(dataclasses.replace(stats, nll=nll)) * nll)

    weight = weightings.get(name)(stats)
    np.testing.assert_allclose(jax.grad(loss)(stats.nll), weight, rtol=1e-6)


def test_a_shuffle_permutes_the_targets_weights_anew_in_every_step():
    stats = _float32(_random(5))
    plain = np.asarray(weightings.get("dft")(stats))
    seen = []
    for step in (1, 2, 2):
        shuffled = weightings.get("shuffled", of="dft")(
            dataclasses.replace(stats, step=jnp.asarray(step))
        )
        there = np.asarray(stats.mask)
        assert (np.asarray(shuffled)[~there] == 0).all()
        np.testing.assert_array_equal(np.sort(shuffled[there]), np.sort(plain[there]))
        seen.append(np.asarray(shuffled))
    assert (seen[0] != seen[1]).any() and (seen[1] == seen[2]).all()


def test_products_multiply():
    stats = _float32(_random(6))
    both = weightings.Dft() * weightings.FlowToken(2.0)
    np.testing.assert_allclose(
        both(stats), weightings.Dft()(stats) * weightings.FlowToken(2.0)(stats)
    )
    assert both.needs == {"current", "frozen"}
    with pytest.raises(ConfigError, match=r"Dft.*by token and Flow.*by example"):
        weightings.Dft() * weightings.Flow()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: weightings.get("dtf"), "weighting 'dtf'; did you mean 'dft'"),
        (lambda: weightings.get("dft", exponent=1.0), "'dft' has no option 'exponent'.*floor"),
        (lambda: weightings.get("stm", threshold="abc"), "^the option threshold .*'stm' is 'abc'"),
        (lambda: weightings.get("flow", temperature="1"), "'flow' is '1'; it must be a number$"),
        (lambda: weightings.get("talr", temperature=[1]), r"is \[1\]; it must be a number$"),
        (lambda: weightings.get("stm", threshold=None), "is None; it must be a number$"),
        (lambda: weightings.get("psft", refresh_steps=True), "is True; it must be a number$"),
        (lambda: weightings.get("shuffled", of="stm", threshold=""), "'stm' is ''; it must be"),
        (lambda: weightings.get("power", exponnt=1.0), "did you mean 'exponent'"),
        (lambda: weightings.get("mean_one", of="dft", exponent=1.0), "'dft' has no option"),
        (lambda: weightings.get("power", exponent=-1.0), "option exponent is -1.0"),
        (
            lambda: weightings.get("stm", threshold=40.0),
            "option threshold is 40.0; .*a probability",
        ),
        (lambda: weightings.get("easiest", share=0.0), "option share is 0.0"),
        (lambda: weightings.get("flow", temperature=np.nan), "option temperature is nan"),
        (lambda: weightings.get("dft", floor=-0.1), "option floor is -0.1"),
        (lambda: weightings.get("eaft")(ej.TokenStats(jnp.ones(2))), "needs.* entropy.*None"),
        (lambda: weightings.get("stm")(ej.TokenStats(jnp.ones(2))), "needs.* frozen_nll.*None"),
        (lambda: weightings.register(abs, needs=("tokens",)), "needs is 'tokens'"),
        (lambda: weightings.register(dict), "dict must be a subclass of Weighting"),
        (lambda: weightings.get("flow_online", floor=0.1), "option floor is 0.1; .*flow_online"),
        (lambda: weightings.get("mean_one", of="flow_online"), "no control of FlowOnline"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class _Table:
    """A loss table in memory; the second of its examples was dropped while scoring."""

    def loss_N(self):
        return np.float32([1.0, np.nan, 3.0, 2.0])

    def token_losses(self):
        return ej.Ragged(np.float32([1.0, 3.0, 2.0]), np.array([0, 1, 1, 2, 3]))

    def flow_weights(self, tau=None):
        return np.exp(-self.loss_N() / (tau or 2.0))

    def flow_token_weights(self, tau=None):
        losses = self.token_losses()
        return dataclasses.replace(losses, values=np.exp(-losses.values / (tau or 2.0)))


@pytest.mark.parametrize("name", ["uniform", "shuffled", "mean_one", "easiest", "hardest"])
def test_dropped_examples_stay_left_out(name):
    weight_N, token_weight = weightings.get(name).of_table(_Table(), seed=1)
    np.testing.assert_array_equal(np.isnan(weight_N), [False, True, False, False])
    assert token_weight is None
    if name not in ("easiest", "hardest"):
        flow = np.delete(_Table().flow_weights(), 1)
        expected = {"uniform": flow.mean(), "shuffled": flow, "mean_one": flow / flow.mean()}[name]
        actual = np.sort(np.delete(weight_N, 1))
        np.testing.assert_allclose(actual, np.sort(np.broadcast_to(expected, 3)), rtol=1e-6)


def test_a_rule_of_frozen_losses_that_is_not_finite_names_the_examples():
    @weightings.register(level="example")
    def mine_root(stats):
        return jnp.sqrt(2.5 - stats.frozen_nll)

    with pytest.raises(ConfigError, match=r"mine_root.*not finite, example ids \[2\]"):
        weightings.get("mine_root").of_table(_Table())


def test_an_own_function_is_a_weighting():
    @weightings.register
    def mine_of_both(stats, *, power=1.0):
        return jnp.exp(-power * stats.nll) * stats.entropy

    weighting = weightings.get("mine_of_both", power=2.0)
    assert weighting.needs == {"current", "entropy"} and weighting.level == "token"
    assert weighting == weightings.get("mine_of_both", power=2.0)
    stats = _float32(_random(7))
    expected = np.where(stats.mask, np.exp(-2 * stats.nll) * stats.entropy, 0)
    np.testing.assert_allclose(weighting(stats), expected, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"no option 'exponent'.*"):
        weightings.get("mine_of_both", exponent=1.0)
    with pytest.raises(ValueError, match="already a weighting 'dft'"):
        weightings.register(lambda stats: stats.nll, name="dft")


def test_an_own_function_may_call_other_weightings():
    @weightings.register
    def mine_both(stats):
        return weightings.Eaft()(stats) * weightings.FlowToken(2.0)(stats)

    weighting = weightings.get("mine_both")
    assert weighting.needs == {"current", "entropy", "frozen"}
    stats = _float32(_random(8))
    expected = weightings.Eaft()(stats) * weightings.FlowToken(2.0)(stats)
    np.testing.assert_array_equal(weighting(stats), expected)


def test_an_own_class_is_a_weighting():
    @weightings.register
    @dataclasses.dataclass(frozen=True)
    class MineHalf(weightings.Weighting):
        scale: float = 0.5

        def rule(self, stats):
            return jnp.full_like(stats.nll, self.scale)

    weight = weightings.get("mine_half", scale=0.25)(ej.TokenStats(jnp.ones(2)))
    np.testing.assert_array_equal(weight, [0.25, 0.25])


def test_a_reader_of_a_field_that_does_not_exist():
    @weightings.register
    def mine_wrong(stats):
        return stats.probability

    with pytest.raises(AttributeError, match="TokenStats has no field 'probability'"):
        weightings.get("mine_wrong")
