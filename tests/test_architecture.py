"""Data flows one way: a module imports only those to its left in the design."""

import ast
from pathlib import Path

# Left to right. A package counts as one place; `theory`, the first, depends on nothing here.
ORDER = [
    "theory", "usage", "config", "config_file", "files", "fingerprint", "code_fingerprint",
    "sealed", "peers", "distributed", "lock_file", "lock", "sharding", "data", "models",
    "vocabulary_parallel", "lm_head", "losses", "contract", "compatibility", "weighting",
    "loss_parts", "loss_table", "throughput", "progress", "terminal", "scoring",
    "online_weights", "optim", "step", "identity", "checkpoint_reading", "checkpoint", "merge",
    "evaluate", "metrics", "measurements", "fitting", "plan", "results", "page", "figures",
    "report", "language_report", "workdir", "language", "image_networks", "vision", "ahead_of_time",
    "train", "theory_report", "errors", "main",
]  # fmt: skip


def _imports(path: Path) -> set[str]:
    """Top-level modules of easy_jax that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "easy_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("easy_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            found |= {part[1] for part in parts if part[0] == "easy_jax" and len(part) > 1}
    return found


def _place(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def _violations(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        place = _place(path, package)
        if place == "__init__":
            continue
        for imported in _imports(path) - {place}:
            if ORDER.index(imported) > ORDER.index(place):
                wrong.append(f"{path.name} imports easy_jax.{imported}, to its right")
    return wrong


def test_every_module_has_a_place(root):
    package = root / "easy_jax"
    places = {_place(path, package) for path in package.rglob("*.py")} - {"__init__"}
    assert places == set(ORDER)


def test_imports_go_one_way(root):
    assert _violations(root / "easy_jax") == []


def test_a_wrong_import_is_found(tmp_path):
    (tmp_path / "losses.py").write_text("from easy_jax import train\nimport easy_jax.config\n")
    assert _violations(tmp_path) == ["losses.py imports easy_jax.train, to its right"]


def test_configs_import_only_the_schema(root):
    for path in (root / "configs").glob("*.py"):
        assert _imports(path) <= {"config"}, path


def test_the_package_does_not_import_configs(root):
    for path in (root / "easy_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(name.startswith("configs") for name in [*names, module]), path
