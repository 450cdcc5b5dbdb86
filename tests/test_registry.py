"""Registries of what can be chosen by name."""

import re

import pytest

from easy_jax.io.checks import ConfigError
from easy_jax.io.registry import Registry


@pytest.fixture
def letters():
    registry = Registry("letter")
    registry.register("alpha")(1)
    registry.register("beta", former=("b",))(2)
    return registry


def test_entries_in_order_of_registration(letters):
    assert dict(letters) == {"alpha": 1, "beta": 2}
    assert len(letters) == 2
    assert "b" not in letters


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alhpa", "field is 'alhpa'; did you mean 'alpha'? Every letter: alpha, beta"),
        ("xyz", "field is 'xyz'; Every letter: alpha, beta"),
    ],
)
def test_an_unknown_name(letters, name, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        letters.find(name, "field")


def test_a_former_name_finds_the_entry_with_a_warning(letters):
    with pytest.warns(DeprecationWarning, match="^field is 'b'; it is now 'beta'$"):
        assert letters.canonical("b", "field") == "beta"
    with pytest.warns(DeprecationWarning, match="letter 'b'; it is now 'beta'"):
        assert letters["b"] == 2


@pytest.mark.parametrize(("name", "former"), [("alpha", ()), ("b", ()), ("c", ("beta",))])
def test_a_name_is_registered_once(letters, name, former):
    with pytest.raises(ValueError, match="already a letter"):
        letters.register(name, former=former)(3)
