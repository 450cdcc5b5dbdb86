"""Prints the structure of a package: packages, modules, floors, imports, cycles, largest pieces.

    python scripts/structure.py [OTHER_CHECKOUT]

It reads the source and imports nothing; an import inside a function counts like any other. A
*unit* is a top-level package or a module next to the packages. A *face* is a module that defines
no function or class, such as an `__init__` that re-exports names; it is left out.
"""

import argparse
import ast
from pathlib import Path

Graph = dict[str, set[str]]


def modules(package: Path) -> dict[str, Path]:
    """Returns the modules of a package by dotted name, without the package's own name."""
    paths = sorted(package.rglob("*.py"))
    names = [".".join(path.relative_to(package).with_suffix("").parts) for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports(path: Path, package: str) -> set[str]:
    """Returns the dotted names that a file imports from a package, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith(f"{package}.")}
    return {name.partition(".")[2] for name in found}


def import_graph(package: Path, name: str = "easy_jax") -> Graph:
    """Returns the modules of a package, each with the modules of the package that it imports."""
    known = modules(package)
    return {
        module: {
            imported if imported in known else imported.rpartition(".")[0]
            for imported in imports(path, name)
        }
        - {module}
        for module, path in known.items()
    }


def unit(module: str) -> str:
    """Returns the top-level package or module that a module belongs to."""
    return module.partition(".")[0]


def unit_graph(graph: Graph, faces: set[str]) -> Graph:
    """Returns the units that are not faces, each with the other units that its modules import."""
    units: Graph = {unit(module): set() for module in graph}
    for module, imported in graph.items():
        units[unit(module)] |= {unit(name) for name in imported} - {unit(module)}
    return without(units, faces)


def without(graph: Graph, left_out: set[str]) -> Graph:
    """Returns the graph without some of its nodes, and without names that are not nodes."""
    retained = graph.keys() - left_out
    return {name: graph[name] & retained for name in sorted(retained)}


def cycles(graph: Graph) -> list[set[str]]:
    """Returns the largest sets of at least two nodes in which each reaches every other one."""
    reached = {name: _reached(graph, name) for name in graph}
    sets = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(({*each} for each in sets if each), key=lambda each: (-len(each), min(each)))


def _reached(graph: Graph, start: str) -> set[str]:
    """Returns the nodes that can be reached from a node in one step or more."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def longest_chain(graph: Graph) -> list[str]:
    """Returns the longest chain of imports; nodes of a cycle are joined by `=` and count once."""
    joined = {node: " = ".join(sorted(each)) for each in cycles(graph) for node in each}
    name = {node: joined.get(node, node) for node in graph}
    below: Graph = {name[node]: set() for node in graph}
    for node, imported in graph.items():
        below[name[node]] |= {name[other] for other in imported} - {name[node]}
    chains: dict[str, list[str]] = {}

    def chain(node: str) -> list[str]:
        if node not in chains:
            chains[node] = [
                node,
                *max((chain(each) for each in sorted(below[node])), key=len, default=[]),
            ]
        return chains[node]

    return max((chain(node) for node in sorted(below)), key=len, default=[])


def is_face(path: Path) -> bool:
    """Returns whether a module defines no function and no class."""
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return not any(
        isinstance(node, defined) for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def functions(path: Path) -> dict[str, int]:
    """Returns lines without docstring of each function of a file, also methods and nested ones."""
    return {
        f"{path.name}:{node.lineno} {node.name}": _lines(node) - _docstring_lines(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return 0 if ast.get_docstring(node) is None else _lines(node.body[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--package", default="easy_jax")
    options = parser.parse_args()
    package = options.checkout / options.package
    known, graph = modules(package), import_graph(package, options.package)
    faces = {name for name, path in known.items() if is_face(path)}
    beside = {name for name in faces if known[name].parent == package}
    units, fine = unit_graph(graph, beside), without(graph, faces)
    packages = {unit(name) for name in known if "." in name}
    chain, circles = longest_chain(units), cycles(units)
    back = [f"{a} > {b}" for c in circles for a in sorted(c) for b in sorted(units[a] & c)]
    print(f"packages                  {len(packages)}")
    print(f"modules beside packages   {len(units.keys() - packages)}")
    print(f"modules                   {len(known)}")
    print(f"floors of units           {len(chain)}: {' > '.join(chain)}")
    print(f"arrows between units      {sum(map(len, units.values()))}")
    print(f"arrows in cycles of units {len(back)}{': ' * bool(back)}{', '.join(back)}")
    print(f"floors of modules         {len(longest_chain(fine))}")
    print(f"cycles of modules         {[' = '.join(sorted(each)) for each in cycles(fine)]}")
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()
    }
    lengths = {key: value for path in known.values() for key, value in functions(path).items()}
    for title, sizes in (("files", lines), ("functions without docstrings", lengths)):
        print(f"largest {title}, in lines")
        for name in sorted(sizes, key=lambda name: (-sizes[name], name))[:5]:
            print(f"{sizes[name]:6}  {name}")


if __name__ == "__main__":
    main()
