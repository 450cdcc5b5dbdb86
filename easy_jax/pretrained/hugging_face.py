"""Loads and exports Hugging Face checkpoints of the transformer, from safetensors only.

Reading goes tensor by tensor: one tensor is in host memory, its shares go to the devices, and
a jitted, donating update writes them into the stacked parameter. Writing is the reverse.
"""

import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from easy_jax.io import files
from easy_jax.io.checks import ConfigError
from easy_jax.models.lora import merged_kernel
from easy_jax.models.transformer import Linear, Remat, Transformer, abstract
from easy_jax.models.transformer_config import TransformerConfig
from easy_jax.parallel import processes, sharding
from easy_jax.pretrained import weight_files
from easy_jax.pretrained.hugging_face_config import parse_config
from easy_jax.pretrained.weight_files import WeightsError, resolve

MAX_SHARD_BYTES = 5 * 10**9
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_CONVERT = "transformers' save_pretrained(..., safe_serialization=True)"


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor of a checkpoint belongs: `path` in our state, at index `group` of a stack.

    `outputs` is the number of trailing axes of a linear map's kernel, [in..., out...], that
    come first in the checkpoint, [out, in], or of its bias's axes; 0 for embeddings and norms.
    """

    path: tuple[Any, ...]
    group: int | None = None
    outputs: int = 0


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: Remat = "none",
    mesh: Mesh | None = None,
) -> Transformer:
    """Loads a pre-trained transformer; each device receives only its shards.

    Args:
      folder: with `config.json` and safetensors (one file, or shards with an index), or
        `hf://OWNER/NAME`, which is downloaded from the Hugging Face Hub if it is not in the cache.
      dtype: of the computation.
      param_dtype: of the parameters; default: `dtype`.
      remat: see `Transformer`.
      mesh: default: all devices on the data axis, with full copies of the parameters.

    Raises:
      WeightsError: no folder, no safetensors (a pickle is refused), missing or extra tensors,
        wrong shapes, damaged files.
      ConfigError: an architecture or a field of `config.json` that is not supported.

    Example:
      >>> model = load("models/smollm2")  # doctest: +SKIP
      >>> model = load("hf://HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    """
    folder = resolve(folder)
    mesh = sharding.make_mesh() if mesh is None else mesh
    config = read_config(folder)
    files = weight_files.tensor_files(folder, convert=_CONVERT)
    _check_sizes(config, files)
    param_dtype = dtype if param_dtype is None else param_dtype
    model = abstract(config, dtype=dtype, param_dtype=param_dtype, remat=remat)
    graphdef, state = nnx.split(model)
    placed = dict(nnx.to_flat_state(sharding.tree_shardings(state, mesh)))
    variables = dict(nnx.to_flat_state(state))
    places = _places(model)
    _check_names(folder, places, files, tied=config.tied)
    arrays: dict[tuple[Any, ...], jax.Array] = {}
    for name, tensor in weight_files.read_tensors(files, places.keys()):
        weight_files.check_float(files[name], name, tensor)
        place = places[name]
        variable = variables[place.path].get_value()
        arrays[place.path] = _write(
            arrays.get(place.path),
            tensor,
            place,
            variable,
            placed[place.path].get_value(),
            f"{files[name]}: {name}",
        )
    flat = [(path, variable.replace(arrays[path])) for path, variable in variables.items()]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def export(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    eos_token_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads: adapters merged, dtypes as in the base model.

    The folder appears complete or not at all. All processes call it, one writes.

    Args:
      model: what `load` made of the base model, trained or not.
      folder: must not exist, or be empty.
      base: the folder or name given to `load`; `config.json` and the tokenizer's files are
        copied from it, and every tensor gets the dtype that it has there.
      eos_token_id: the token that training put at the end of a text (`TokenSource.eos_id`), at
        which generation is to stop: written into `config.json` and `generation_config.json`,
        unless it is one of those that are there. Default: they stay as they are.
      max_shard_bytes: size of a safetensors file, at most; a larger tensor has its own file.

    Raises:
      WeightsError: the folder is not empty, or the base is another model.

    Example:
      >>> model = load("models/smollm2")  # doctest: +SKIP
      >>> export(model, "fine-tuned", base="models/smollm2")  # doctest: +SKIP
    """
    folder, base = Path(folder), resolve(base)
    if read_config(base) != model.config:
        raise WeightsError(f"the base model in {base} is not the one that was trained")
    places = _places(model)
    files = weight_files.tensor_files(base, convert=_CONVERT)
    dtypes = {name: weight_files.tensor_dtype(path, name) for name, path in files.items()}
    kernels = _kernels(model)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    shapes = {
        name: _checkpoint_shape(flat[place.path].get_value(), place)
        for name, place in places.items()
    }
    sizes = {name: dtypes[name].itemsize * int(np.prod(shapes[name])) for name in places}
    shards = _shards(sizes, max_shard_bytes)
    with weight_files.new_folder(folder) as temporary:
        weight_map = {}
        for number, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                place = places[name]
                value = kernels.get(place.path, flat[place.path].get_value)
                tensors[name] = _read_out(value(), place, shapes[name]).astype(dtypes[name])
                weight_map[name] = file
            if processes.is_main_process():
                save_file(tensors, temporary / file, metadata={"format": "pt"})
        if processes.is_main_process():
            _write_beside(temporary, base, len(shards), weight_map, sizes)
            if eos_token_id is not None:
                _write_eos(temporary, eos_token_id)


def _write_beside(
    folder: Path,
    base: Path,
    num_shards: int,
    weight_map: Mapping[str, str],
    sizes: Mapping[str, int],
) -> None:
    """Writes the files beside the tensors: their index, the configuration and the tokenizer."""
    if num_shards > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        files.write_json(folder / weight_files.INDEX, index)
    for file in ("config.json", *_TOKENIZER_FILES):
        if (base / file).exists():
            shutil.copyfile(base / file, folder / file)


def _write_eos(folder: Path, eos_token_id: int) -> None:
    """Sets the token at which generation stops, in the files that configure generation."""
    for path in (folder / "config.json", folder / "generation_config.json"):
        if not path.exists():  # without the second, the first decides
            continue
        content = files.read_json(path, WeightsError)
        found = content.get("eos_token_id")
        if eos_token_id not in (found if isinstance(found, list) else [found]):
            files.write_json(path, {**content, "eos_token_id": eos_token_id})


def read_config(folder: Path) -> TransformerConfig:
    """Returns the configuration in a checkpoint's `config.json`.

    Args:
      folder: with `config.json`.

    Example:
      >>> read_config(Path("models/smollm2")).layers  # doctest: +SKIP
      30
    """
    content = weight_files.read_config(folder)
    try:
        return parse_config(content)
    except ConfigError as error:
        raise ConfigError(f"{folder}/{error}") from error


def _places(model: Transformer) -> dict[str, _Place]:
    """Returns the place of every tensor of a checkpoint, by its name there."""
    places = {
        "model.embed_tokens.weight": _Place(("embedding",)),
        "model.norm.weight": _Place(("final_norm", "scale")),
    }
    if not model.config.tied:
        places["lm_head.weight"] = _Place(("head",))
    period = len(model.config.windows)
    for layer in range(model.config.layers):
        group, index = divmod(layer, period)
        for ours, theirs in model.config.features.tensors.items():
            part = getattr(model.blocks[index], ours)
            name, path = f"model.layers.{layer}.{theirs}", ("blocks", index, ours)
            if not isinstance(part, Linear):
                places[f"{name}.weight"] = _Place((*path, "scale"), group)
                continue
            places[f"{name}.weight"] = _Place((*path, "kernel"), group, len(part.outputs))
            if part.has_bias:
                places[f"{name}.bias"] = _Place((*path, "bias"), group, len(part.outputs))
    return places


def _kernels(model: Transformer) -> dict[tuple[Any, ...], Any]:
    """Returns, by path, functions that return a stack of kernels with its adapters merged in."""
    return {
        ("blocks", index, name, "kernel"): functools.partial(merged_kernel, part)
        for index, block in enumerate(model.blocks)
        for name, part in vars(block).items()
        if isinstance(part, Linear)
    }


# Reading.


def _check_sizes(config: TransformerConfig, files: Mapping[str, Path]) -> None:
    """Compares the configured sizes with the shapes in the files, before anything is allocated."""
    tensors = config.features.tensors
    layer = "model.layers.0."
    rows = {
        "model.embed_tokens.weight": config.vocab,
        f"{layer}{tensors['q']}.weight": config.heads * config.head_dim,
        f"{layer}{tensors['k']}.weight": config.kv_heads * config.head_dim,
        f"{layer}{tensors['gate']}.weight": config.mlp,
    }
    for name, size in rows.items():
        if name in files:  # what is missing is told with all else that is
            shape = weight_files.tensor_shape(files[name], name)
            _check_shape(f"{files[name]}: {name}", shape, (size, config.embed))


def _check_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise WeightsError(f"{what} has shape {found}; config.json makes it {expected}")


def _check_names(
    folder: Path, places: Mapping[str, _Place], files: Mapping[str, Path], tied: bool
) -> None:
    found = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    weight_files.check_names(folder, places, found - {"lm_head.weight"} if tied else found)
    if tied and "lm_head.weight" in found:
        both = ["lm_head.weight", "model.embed_tokens.weight"]
        (_, one), (_, other) = weight_files.read_tensors(files, both)
        if not np.array_equal(one, other):
            raise WeightsError(
                f"{files['lm_head.weight']}: lm_head.weight differs from the embedding, though "
                "config.json has tie_word_embeddings"
            )


def _write(
    stack: jax.Array | None,
    tensor: np.ndarray,
    place: _Place,
    variable: jax.ShapeDtypeStruct,
    target: NamedSharding,
    what: str,
) -> jax.Array:
    """Returns the parameter with this tensor in its place; each device gets only its shard."""
    expected = _checkpoint_shape(variable, place)
    _check_shape(what, tensor.shape, expected)
    shape = variable.shape if place.group is None else variable.shape[1:]
    spec = tuple(target.spec) if place.group is None else tuple(target.spec)[1:]
    inputs = len(shape) - place.outputs
    # As it lies in the file, only with heads and features as axes of their own.
    order = (*range(inputs, len(shape)), *range(inputs)) if place.outputs else range(len(shape))
    view = tensor.reshape([shape[axis] for axis in order])
    lies = NamedSharding(target.mesh, PartitionSpec(*(spec[axis] for axis in order)))
    array = jax.make_array_from_callback(view.shape, lies, lambda index: view[index])
    if stack is None:
        stack = _zeros(variable.shape, variable.dtype, target)
    return _put(stack, array, place.group, place.outputs, target)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, target: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), target)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _put(
    stack: jax.Array, array: jax.Array, group: Any, outputs: int, target: NamedSharding
) -> jax.Array:
    order = (*range(outputs, array.ndim), *range(outputs))
    array = jnp.transpose(array, order).astype(stack.dtype)
    stack = array if group is None else stack.at[group].set(array)
    return jax.lax.with_sharding_constraint(stack, target)


# Writing.


def _checkpoint_shape(variable: Any, place: _Place) -> tuple[int, ...]:
    """Returns the shape of a tensor in the checkpoint."""
    shape = variable.shape if place.group is None else variable.shape[1:]
    if not place.outputs:
        return tuple(shape)
    inputs = len(shape) - place.outputs
    outputs = int(np.prod(shape[inputs:]))
    return (outputs, int(np.prod(shape[:inputs]))) if inputs else (outputs,)


def _read_out(value: jax.Array, place: _Place, shape: tuple[int, ...]) -> np.ndarray:
    value = value if place.group is None else value[place.group]
    array = sharding.whole(value)  # one tensor at a time comes together
    if place.outputs:
        array = array.reshape(shape[::-1]).T
    return np.ascontiguousarray(array)


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Splits the sorted names into files of at most `limit` bytes each."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
