"""The public names of easy_jax with their signatures, as text.

    python tests/public_surface.py > tests/public_surface.txt

writes the file that `tests/test_public_names.py` compares. Annotations are those of the source:
the versions of Python and JAX print the same type in different ways.
"""

import ast
import dataclasses
import inspect
import textwrap
from typing import Any

import easy_jax as ej


def written_annotations(of: Any) -> dict[str, str]:
    """The annotations of a function's parameters or of a class's fields, as in the source."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    if isinstance(node, ast.ClassDef):
        fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
        return {ast.unparse(field.target): ast.unparse(field.annotation) for field in fields}
    assert isinstance(node, ast.FunctionDef)
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    found = {
        each.arg: ast.unparse(each.annotation) for each in arguments if each and each.annotation
    }
    return found | ({"return": ast.unparse(node.returns)} if node.returns else {})


def default(value: Any) -> str:
    """A default value, without addresses in memory."""
    return str(getattr(value, "__name__", value)) if callable(value) else repr(value)


def signature(name: str, of: Any) -> str:
    """One line: `name(parameter: annotation = default) -> annotation`."""
    if inspect.isclass(of) and issubclass(of, Exception):
        return f"{name}({of.__base__.__name__})"
    if not inspect.isfunction(of) and not inspect.isclass(of):
        of = type(of).__call__  # of an object that is called like a function
    elif inspect.isclass(of) and not dataclasses.is_dataclass(of):
        of = of.__init__
    annotations = written_annotations(inspect.unwrap(of))
    words = []
    star = False
    for parameter in inspect.signature(of).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        word = stars.get(parameter.kind, "") + parameter.name
        if parameter.name in annotations:
            word += f": {annotations[parameter.name]}"
        if parameter.default is not parameter.empty:
            word += f" = {default(parameter.default)}"
        if parameter.name not in ("self", "cls"):
            words.append(word)
    arrow = f" -> {annotations['return']}" if "return" in annotations else ""
    return f"{name}({', '.join(words)}){arrow}"


def public_callables() -> dict[str, Any]:
    """Every public class and function by its dotted name, those of public modules included."""
    found: dict[str, Any] = {}
    for name in ej.__all__:
        entry = getattr(ej, name)
        if not inspect.ismodule(entry):
            found[name] = entry
            continue
        own = [each for each, member in vars(entry).items() if _is_of(member, entry.__name__)]
        for inner in getattr(entry, "__all__", own):
            member = getattr(entry, inner)
            if inspect.isfunction(member) or inspect.isclass(member):
                found[f"{name}.{inner}"] = member
    return found


def _is_of(member: Any, module: str) -> bool:
    return getattr(member, "__module__", "") == module and member.__name__[0] != "_"


def lines() -> list[str]:
    """The signatures of all public callables, and of the public methods of public classes."""
    found = []
    for name, entry in public_callables().items():
        if name.partition(".")[2] in ej.__all__:
            continue  # a class that a public module names once more
        found.append(signature(name, entry))
        if inspect.isclass(entry):
            for inner, member in sorted(vars(entry).items()):
                function = getattr(member, "__func__", member)
                if inner[0] != "_" and inspect.isfunction(function):
                    found.append(f"  {signature(f'{name}.{inner}', function)}")
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
