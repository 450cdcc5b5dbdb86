"""The package's structure: wings import only wings below them, and nothing imports in a circle."""

import ast
from pathlib import Path

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


def _module(path: Path, package: Path) -> str:
    name = ".".join(path.relative_to(package).with_suffix("").parts)
    return name.removesuffix(".__init__")


def _imports(path: Path) -> set[str]:
    """What a file imports of easy_jax, as dotted names without `easy_jax.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "easy_jax":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("easy_jax.")}
    return {name.partition(".")[2] for name in found}


def _graph(package: Path) -> dict[str, set[str]]:
    """Modules of a package, each with the modules that it imports."""
    modules = {_module(path, package): path for path in package.rglob("*.py")}
    return {
        name: {
            imported if imported in modules else imported.rpartition(".")[0]
            for imported in _imports(path)
        }
        - {name}
        for name, path in modules.items()
    }


def _wing(module: str) -> str:
    return module.partition(".")[0]


def _arrows_up(graph: dict[str, set[str]]) -> list[str]:
    floor = {wing: number for number, wings in enumerate(FLOORS) for wing in wings}
    return [
        f"{module} imports {imported}"
        for module, imports in sorted(graph.items())
        for imported in sorted(imports)
        if _wing(module) not in FACES
        and _wing(imported) != _wing(module)
        and (_wing(imported) in FACES or floor[_wing(imported)] >= floor[_wing(module)])
    ]


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import themselves by way of others; lazy faces of packages are left out."""
    done: set[str] = set()
    found = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                if "." in imported or imported == "pipeline":
                    visit(imported, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_every_module_has_a_floor(root):
    wings = {_wing(module) for module in _graph(root / "easy_jax")}
    assert wings == set().union(*FLOORS) | FACES


def test_wings_import_only_wings_below_them(root):
    assert _arrows_up(_graph(root / "easy_jax")) == []


def test_no_module_imports_itself_by_way_of_others(root):
    assert _cycles(_graph(root / "easy_jax")) == []


def test_an_arrow_up_and_a_cycle_are_found(tmp_path):
    for name, text in {
        "core/step.py": "from easy_jax.train import fitting\nfrom easy_jax import config\n",
        "train/fitting.py": "import easy_jax.core.step\n",
        "config.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    graph = _graph(tmp_path)
    assert _arrows_up(graph) == ["core.step imports config", "core.step imports train.fitting"]
    assert _cycles(graph) == [["core.step", "train.fitting", "core.step"]]


def test_configs_import_only_the_schema(root):
    for path in (root / "configs").glob("*.py"):
        assert {_wing(name) for name in _imports(path)} <= {"config"}, path


def test_the_package_does_not_import_configs(root):
    for path in (root / "easy_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(name.startswith("configs") for name in [*names, module]), path
