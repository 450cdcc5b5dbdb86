"""What README.md and docs/ refer to exists: files, functions, links and headings."""

import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import easy_jax as ej

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "launch/README.md", "benchmarks/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def _anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page, root):
    text = (root / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (root / page).parent / path if path else root / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in map(_anchor, headings), target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page, root):
    text = (root / page).read_text()
    folders = [root, root / "easy_jax", root / "docs", (root / page).parent]
    named = re.findall(r"`(?:python )?([\w./]+\.(?:py|sh|yaml|ipynb))`", text)
    missing = {name for name in named if not any((folder / name).exists() for folder in folders)}
    assert missing <= {"FILE.py"}, missing  # it stands for a file of the reader


@pytest.mark.parametrize("page", PAGES)
def test_functions_are_where_a_page_says_they_are(page, root):
    text = " ".join((root / page).read_text().split())
    for name, file in re.findall(r"`([\w.]+)` in `([\w/]+\.py)`", text):
        (path,) = [base / file for base in (root, root / "easy_jax") if (base / file).exists()]
        code = path.read_text()
        defined = re.findall(r"^ *(?:def|class) (\w+)", code, re.MULTILINE)
        defined += re.findall(r"^(\w+)(?::.*)? = ", code, re.MULTILINE)
        assert {*name.split(".")} <= {*defined}, f"{name} in {file}"


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page, root):
    for name in re.findall(r"\bej\.(\w+)", (root / page).read_text()):
        assert name in ej.__all__, name


@pytest.mark.slow
def test_the_example_of_the_readme_for_images(root, tmp_path, monkeypatch):
    """The short form trains the model in place; the loop written by hand makes as many steps."""
    blocks = (root / "README.md").read_text().split("```python\n")[1:]
    with_fit, by_hand = (
        block.split("```")[0].replace("epochs=15", "epochs=1") for block in blocks[:2]
    )
    draws = np.random.default_rng(0)
    config = ej.ResNetConfig(in_channels=1, width=8, depths=(1,))
    model = ej.ResNet(config, 10, rngs=nnx.Rngs(params=0))
    names = {
        "image": draws.random((128, 8, 8, 1), np.float32),
        "label": np.arange(128) % 10,
        "model": model,
    }
    before = nnx.to_pure_dict(nnx.state(nnx.clone(model), nnx.Param))["head"]["kernel"]
    monkeypatch.chdir(tmp_path)
    exec(with_fit, names)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))["head"]["kernel"]
    assert names["result"].steps == 2 and not np.array_equal(before, after)
    exec(by_hand, names)
    assert int(names["state"].step) == 2 and np.isfinite(float(names["metrics"]["loss"]))
