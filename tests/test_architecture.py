"""The package's structure: wings import only wings below them, and nothing imports in a circle."""

import ast
import subprocess
import sys

import pytest
import structure
from structure import cycles, import_graph, imports, is_face, longest_chain, modules, unit, without

# Bottom to top. `theory` stands alone; what lies in one row may not import each other.
FLOORS = [
    {"io", "theory"},
    {"parallel"},
    {"kernels"},
    {"models", "data"},
    {"core"},
    {"pretrained"},
    {"train"},
    {"experiments"},
    {"ahead_of_time", "report"},
    {"pipeline"},
    {"cli"},
]
FACES = {"__init__", "config", "main"}  # they only name what lies elsewhere


def _arrows_up(graph: dict[str, set[str]]) -> list[str]:
    floor = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
    return [
        f"{module} imports {imported}"
        for module, imports in sorted(graph.items())
        for imported in sorted(imports)
        if unit(module) not in FACES
        and unit(imported) != unit(module)
        and (unit(imported) in FACES or floor[unit(imported)] >= floor[unit(module)])
    ]


@pytest.mark.slow
def test_every_module_has_a_floor(root):
    wings = {unit(module) for module in import_graph(root / "easy_jax")}
    assert wings == set().union(*FLOORS) | FACES


@pytest.mark.slow
def test_wings_import_only_wings_below_them(root):
    assert _arrows_up(import_graph(root / "easy_jax")) == []


@pytest.mark.slow
def test_no_module_imports_itself_by_way_of_others(root):
    package = root / "easy_jax"
    faces = {name for name, path in modules(package).items() if is_face(path)}
    assert cycles(without(import_graph(package), faces)) == []


def test_an_arrow_up_and_a_cycle_are_found(tmp_path):
    for name, text in {
        "core/step.py": "from easy_jax.train import fitting\nfrom easy_jax import config\n",
        "train/fitting.py": "import easy_jax.core.step\n",
        "config.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    graph = import_graph(tmp_path)
    assert _arrows_up(graph) == ["core.step imports config", "core.step imports train.fitting"]
    assert cycles(graph) == [{"core.step", "train.fitting"}]


def test_the_longest_chain_counts_a_cycle_once():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"b"}, "d": set(), "e": {"d"}}
    assert cycles(graph) == [{"b", "c"}]
    assert longest_chain(graph) == ["a", "b = c", "d"]


def test_the_structure_is_printed_for_any_checkout(tmp_path):
    for name, text in {
        "house/__init__.py": "from house.top import run\n",
        "house/top.py": "from house.low import sum_of\n\n\ndef run():\n    pass\n",
        "house/low/__init__.py": "",
        "house/low/sum_of.py": 'import house.top\n\ndef f():\n    """F."""\n\n    pass\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, structure.__file__, str(tmp_path), "--package=house"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [
        "packages                  1",
        "modules beside packages   1",
        "modules                   4",
        "floors of units           1: low = top",
        "arrows between units      2",
        "arrows in cycles of units 2: low > top, top > low",
        "floors of modules         1",
        "cycles of modules         ['low.sum_of = top']",
        "largest files, in lines",
        "     6  low.sum_of",
        "     5  top",
        "     1  __init__",
        "     0  low",
        "largest functions without docstrings, in lines",
        "     3  sum_of.py:3 f",
        "     2  top.py:4 run",
    ]


@pytest.mark.slow
def test_files_and_functions_are_short(root):
    for path in (root / "easy_jax").rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        long = {name: lines for name, lines in structure.functions(path).items() if lines > 60}
        assert not long, path


def test_configs_import_only_the_schema(root):
    for path in (root / "configs").glob("*.py"):
        assert {unit(name) for name in imports(path, "easy_jax")} <= {"config"}, path


@pytest.mark.slow
def test_the_package_does_not_import_configs(root):
    for path in (root / "easy_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(name.startswith("configs") for name in [*names, module]), path
