"""What `import easy_jax` gives, and what it does not load."""

import inspect
import pickle
import re
import subprocess
import sys

import pytest
from public_surface import lines, public_callables

import easy_jax as ej

HEAVY = "grain matplotlib orbax pyarrow sklearn tensorboardX tensorflow tokenizers torch"
PROGRAM = f"""
import sys
import easy_jax
for name in sys.argv[1:]:
    getattr(easy_jax, name)
print(*sorted({{module.partition(".")[0] for module in sys.modules}} & set({HEAVY.split()!r})))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "used",
    [
        (),
        ("flow_weights", "temperature", "make_train_step", "TrainState", "wise_ft"),
        ("Transformer", "ResNet", "causal_lm_loss", "linear_cross_entropy", "make_mesh"),
        ("ExperimentConfig", "LanguageConfig"),
    ],
)
def test_nothing_heavy_is_loaded_before_it_is_used(used):
    run = [sys.executable, "-c", PROGRAM, *used]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_public_name_is_there():
    assert sorted(ej.__all__) == ej.__all__
    for name in ej.__all__:
        assert getattr(ej, name) is not None
    assert set(ej.__all__) <= set(dir(ej))


def test_a_star_imports_the_public_names_and_functions_can_be_pickled():
    names = {}
    exec("from easy_jax import *", names)
    assert {name for name in names if name[:2] != "__"} == {*ej.__all__}
    for each in (ej.flow_weights, ej.TrainState, ej.causal_lm_token_losses):
        assert pickle.loads(pickle.dumps(each)) is each


@pytest.mark.slow
def test_a_type_checker_knows_the_public_names(root, tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import easy_jax as ej\nej.flow_weights([1.0])\nej.nope\nej.fit()\n")
    checked = [sys.executable, "-m", "mypy", str(program)]
    done = subprocess.run(checked, cwd=root, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert {line.split(":")[1] for line in errors} == {"3", "4"}, done.stdout


@pytest.mark.parametrize(("former", "now"), ej._FORMER.items())
def test_a_former_name_works_and_says_the_new_one(former, now):
    with pytest.warns(DeprecationWarning, match=f"^easy_jax.{former} is now easy_jax.{now}$"):
        assert getattr(ej, former) is getattr(ej, now)
    assert former not in ej.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nope"):
        ej.nope  # noqa: B018


def test_the_public_signatures_are_those_of_the_file(root):
    """A change is meant if the file changes with it: `tests/public_surface.py` writes it."""
    assert (root / "tests" / "public_surface.txt").read_text().splitlines() == lines()


def test_every_public_name_has_a_docstring_with_an_example():
    for name, entry in public_callables().items():
        if inspect.isclass(entry) and issubclass(entry, Exception):
            continue
        if name in ("timm_weights.read_config", "timm_weights.read_info"):
            continue  # `timm_weights.load` shows what they read
        known = inspect.isclass(entry) or inspect.isfunction(entry)
        documented = entry if known else type(entry)  # an object that is called like a function
        text = inspect.getdoc(documented) or ""
        assert ">>> " in text, f"{name} has no example"
        called = entry if known else type(entry).__call__
        if {*inspect.signature(called).parameters} - {"self"}:
            assert re.search(r"Args:|Attributes:|`\w+", text), f"{name} does not tell its arguments"
