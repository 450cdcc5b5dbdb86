"""Fingerprints of functions and of model structures, computed from their code.

A function's fingerprint covers its byte code, its defaults, the values it closes over and the
globals it reads, recursively for every function and class that the user wrote. Whatever an
installed package (easy_jax and JAX included) defines counts by its name only, so that updating a
package does not change the fingerprints of the user's functions.
"""

import collections.abc
import dis
import enum
import functools
import hashlib
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from easy_jax.io import fingerprint as fingerprints

_SIMPLE = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_PLACES = (jax.sharding.Mesh, jax.sharding.AbstractMesh, jax.sharding.Sharding, jax.Device)
# Wrappers made by these packages can change the result (`jax.vmap(f, in_axes=...)`), so they count;
# wrappers of other packages, such as `chex.assert_max_traces`, only check.
_WITH_OPTIONS = ("jax", "flax", "optax")
_BOOKKEEPING = {
    "__dict__",
    "__weakref__",
    "__module__",
    "__doc__",
    "__annotations__",
    "__qualname__",
    "__firstlineno__",
    "__static_attributes__",
    "__dataclass_fields__",
    "__dataclass_params__",
    "__orig_bases__",
    "__parameters__",
    "__abstractmethods__",
    "_abc_impl",
    "__slots__",
    "__annotate_func__",
    "__annotations_cache__",
    "__match_args__",
}
# Current module name -> its name in version 0.1, which is the one that fingerprints contain. Moving
# a module within the package thus leaves the artefacts on disk valid.
_FIRST_NAMES = {
    "easy_jax.core.causal_lm": "easy_jax.losses",
    "easy_jax.core.losses": "easy_jax.losses",
    "easy_jax.core.merge": "easy_jax.merge",
    "easy_jax.core.optim": "easy_jax.optim",
    "easy_jax.core.step": "easy_jax.step",
    "easy_jax.core.train_state": "easy_jax.step",
    "easy_jax.core.weightings": "easy_jax.weighting",
    "easy_jax.core.weightings.controls": "easy_jax.weighting",
    "easy_jax.core.weightings.exponential": "easy_jax.weighting",
    "easy_jax.kernels.attention": "easy_jax.models.attention",
    "easy_jax.kernels.convolution": "easy_jax.models.convolution",
    "easy_jax.kernels.linear_cross_entropy": "easy_jax.lm_head",
    "easy_jax.kernels.splash": "easy_jax.models.splash",
    "easy_jax.kernels.vocabulary_parallel": "easy_jax.vocabulary_parallel",
    "easy_jax.models.config": "easy_jax.config.vision",
    "easy_jax.models.modes": "easy_jax.models",
    "easy_jax.parallel.sharding": "easy_jax.sharding",
    "easy_jax.pretrained.hugging_face": "easy_jax.models.hugging_face",
    "easy_jax.pretrained.timm_weights": "easy_jax.models.timm_weights",
    "easy_jax.train.compatibility": "easy_jax.compatibility",
    "easy_jax.train.evaluate": "easy_jax.evaluate",
    "easy_jax.train.loss_table": "easy_jax.loss_table",
}
_STDLIB = Path(sysconfig.get_path("stdlib"))


def name_of(function: Callable[..., Any]) -> str:
    """Returns the name of a function for messages: its qualified name.

    Example:
      >>> name_of(functools.partial(sorted, reverse=True))
      'partial of sorted'
    """
    if isinstance(function, functools.partial):
        return f"partial of {name_of(function.func)}"
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name


def of_function(function: Callable[..., Any]) -> str:
    """Returns a function's name and, unless an installed package defines it, a hash of its code.

    Two functions have the same fingerprint only if their code, defaults and closed-over values are
    the same, and so are the globals and the user's own functions and classes they use. The
    fingerprint does not depend on the process, on comments or on the function's place in its file.
    Arguments of `functools.partial` and attributes of callable objects count. An object with a
    method `fingerprint() -> str` provides its own fingerprint.

    Example:
      >>> one, two = (lambda model, batch: 1), (lambda model, batch: 2)
      >>> of_function(one) == of_function(two)
      False
      >>> of_function(np.linalg.norm)
      'norm'
    """
    name = name_of(function)
    if _name_in_package(function) is not None:
        return name
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    return f"{name} (code {_Values().of(function)[:16]}, {version})"


def of_structure(graphdef: nnx.GraphDef[Any]) -> str:
    """Returns a model's fingerprint without variables: classes, their code, static attributes."""
    return _Values().of(graphdef)[:16]


class _Values:
    """Hashes Python values recursively; an object may contain itself."""

    def __init__(self) -> None:
        # By identity; the reference to each object prevents its id from being reused.
        self._known: dict[int, tuple[str, Any]] = {}
        self._depth = 0

    def of(self, value: Any) -> str:
        """Returns a hash of the value."""
        if isinstance(value, _SIMPLE) and not isinstance(value, enum.Enum):
            return _hash(f"{type(value).__name__}:{value!r}")
        if id(value) not in self._known:
            self._known[id(value)] = (f"inside:{self._depth}", value)
            self._depth += 1
            parts = list(self._parts(value))
            self._depth -= 1
            self._known[id(value)] = (_hash("|".join(parts)), value)
        return self._known[id(value)][0]

    def _parts(self, value: Any) -> Iterator[str]:
        own = None if isinstance(value, type) else getattr(value, "fingerprint", None)
        name = _name_in_package(value)
        if name is not None:
            yield f"named:{name}"
        elif isinstance(value, _PLACES):  # the devices do not change what is computed
            yield type(value).__qualname__
        elif isinstance(value, types.ModuleType):
            yield f"module:{_first_name(value.__name__)}"
        elif isinstance(value, enum.Enum):
            yield f"{type(value).__qualname__}.{value.name}"
        elif isinstance(value, types.FunctionType):
            yield from self._function(value)
        elif isinstance(value, types.CodeType):
            yield from self._code(value)
        elif isinstance(value, type):
            yield from self._class(value)
        elif inspect.ismethod(value):
            yield from ("method", self.of(value.__func__), self.of(value.__self__))
        elif isinstance(value, functools.partial):
            yield from ("partial", self.of(value.func), self.of(value.args))
            yield self.of(value.keywords)
        elif isinstance(value, nnx.GraphDef):
            yield from self._graph(value)
        elif isinstance(value, nnx.Module):
            graphdef, state = nnx.split(value)
            yield from ("model", self.of(graphdef), fingerprints.of_state(state))
        elif isinstance(value, nnx.State):
            yield from ("state", fingerprints.of_state(value))
        elif isinstance(value, nnx.Variable):
            yield from ("variable", self.of(value.get_value()))
        elif isinstance(value, jax.Array):
            yield f"array:{fingerprints.of_state(nnx.State({'x': nnx.Param(value)}))}"
        elif isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
            content = array.tolist() if array.dtype.hasobject else None
            yield self.of(content) if content else f"array:{fingerprints.of_arrays({'x': array})}"
        elif callable(own) and not inspect.signature(own).parameters:
            yield from ("own", type(value).__qualname__, str(own()))
        else:
            yield from self._container(value)

    def _function(self, function: types.FunctionType) -> Iterator[str]:
        made_in = function.__globals__.get("__name__", "")
        inner = getattr(function, "__wrapped__", None)
        if _is_installed(made_in):  # a wrapper, or a function that a function of a package made
            if inner is not None and made_in.partition(".")[0] not in _WITH_OPTIONS:
                yield from ("wrapped", self.of(inner))
                return
            yield f"made in {_first_name(made_in)}"
        else:
            for name, used in _globals(function):
                yield f"{name}={self.of(used)}"
        yield from ("function", self.of(_without_docstring(function)))
        yield self.of((function.__defaults__, function.__kwdefaults__))
        yield self.of({k: v for k, v in vars(function).items() if k != "__wrapped__"})
        for cell in function.__closure__ or ():
            yield self.of(cell.cell_contents) if _is_filled(cell) else "empty"

    def _code(self, code: types.CodeType) -> Iterator[str]:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        yield from ("code", code.co_code.hex(), self.of(counts), self.of(code.co_names))
        for constant in code.co_consts:
            yield self.of(constant)

    def _class(self, cls: type) -> Iterator[str]:
        yield from ("class", cls.__qualname__, *(self.of(base) for base in cls.__bases__))
        for name, value in sorted(vars(cls).items()):
            if name not in _BOOKKEEPING and not name.startswith(("_pytree__", "_graph__")):
                yield f"{name}={self.of(value)}"

    def _graph(self, graphdef: nnx.GraphDef[Any]) -> Iterator[str]:
        for node in graphdef.nodes:  # a variable's class only: its metadata is about sharding
            yield f"{type(node).__name__}:{self.of(getattr(node, 'type', None))}"
        for name, attribute in graphdef.attributes:
            if not str(name).startswith("_pytree__"):
                static = getattr(attribute, "value", None)
                yield f"{name}:{type(attribute).__name__}:{self.of(static)}"

    def _container(self, value: Any) -> Iterator[str]:
        kind = type(value).__qualname__
        if isinstance(value, collections.abc.Mapping):
            pairs = [f"{self.of(key)}={self.of(item)}" for key, item in value.items()]
            yield from (kind, *sorted(pairs))
        elif isinstance(value, list | tuple):
            yield from (kind, *(self.of(item) for item in value))
        elif isinstance(value, set | frozenset):
            yield from (kind, *sorted(self.of(item) for item in value))
        elif isinstance(value, property):
            yield from (kind, self.of((value.fget, value.fset)))
        elif isinstance(value, classmethod | staticmethod):
            yield from (kind, self.of(value.__func__))
        elif getattr(value, "__wrapped__", None) is not None:
            yield from (kind, self.of(value.__wrapped__))  # a jitted function
        else:
            yield from self._object(value)

    def _object(self, value: Any) -> Iterator[str]:
        try:  # the protocol of `copy`: class, arguments and state
            made: Any = value.__reduce_ex__(4)
        except Exception:  # any error can come from the user's object: use its `repr` instead
            made = None
        if isinstance(made, tuple):
            make, arguments, *rest = made
            yield from ("object", self.of(type(value)), self.of(make), self.of(tuple(arguments)))
            for part in rest:
                yield self.of(list(part) if isinstance(part, collections.abc.Iterator) else part)
        else:
            text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
            yield from ("object", self.of(type(value)), made or text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _first_name(module: str) -> str:
    return _FIRST_NAMES.get(module, module)


def _is_installed(module: str | None) -> bool:
    """Returns whether a module belongs to easy_jax, Python or an installed package."""
    if module is None or module == "__main__":
        return False
    if module.partition(".")[0] in ("easy_jax", *sys.builtin_module_names):
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return False
    path = Path(file)
    return path.is_relative_to(_STDLIB) or not {"site-packages", "dist-packages"}.isdisjoint(
        path.parts
    )


def _name_in_package(value: Any) -> str | None:
    """Returns the full name of an object that an installed package defines, or else None."""
    name, module = (getattr(value, key, None) for key in ("__qualname__", "__module__"))
    if not isinstance(name, str) or "<" in name or not isinstance(module, str):
        return None
    if inspect.ismethod(value):
        return None  # the object it is bound to has values of its own
    made_in = getattr(value, "__globals__", {}).get("__name__", module)
    if made_in != module and made_in.partition(".")[0] in _WITH_OPTIONS:
        return None  # jax.vmap(function, in_axes=...) has the function's name
    return f"{_first_name(module)}.{name}" if _is_installed(module) else None


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018, raises where it is empty
    except ValueError:
        return False
    return True


def _without_docstring(function: types.FunctionType) -> types.CodeType:
    code = function.__code__
    constants = code.co_consts
    if constants and isinstance(constants[0], str) and constants[0] == function.__doc__:
        return code.replace(co_consts=(None, *constants[1:]))
    return code


def _globals(function: types.FunctionType) -> list[tuple[str, Any]]:
    """Returns the globals that a function and the functions inside it read, sorted by name.

    For a module, the attributes that are read from it are listed instead of the module.
    """
    found: dict[str, Any] = {}
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        name, value = "", None
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name = instruction.argval
                value = function.__globals__.get(name)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(
                value, types.ModuleType
            ):
                name = f"{name}.{instruction.argval}"
                value = getattr(value, instruction.argval, None)
            else:
                name, value = "", None
                continue
            if name.partition(".")[0] in function.__globals__:
                found[name] = value
    return sorted(found.items())
