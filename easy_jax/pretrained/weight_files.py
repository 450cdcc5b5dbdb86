"""Finds, reads and writes folders of pre-trained weights.

Files are not trusted: only safetensors are read, never pickle, and only from their own folder.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from easy_jax.io import files
from easy_jax.parallel import processes

INDEX = "model.safetensors.index.json"
HUB = "hf://"  # what a location on the Hugging Face Hub begins with
_PICKLES = (".bin", ".pt", ".pth")


class WeightsError(ValueError):
    """Pre-trained weights are missing, damaged or of another model; the message names them."""


def resolve(location: str | os.PathLike[str]) -> Path:
    """Finds a local folder: the one given, or the snapshot of a model on the Hugging Face Hub.

    Args:
      location: a folder; or `hf://OWNER/NAME`, such as `hf://timm/resnet50.a1_in1k`, which is
        downloaded if it is not in the cache. Nothing else is looked up on a hub.

    Raises:
      WeightsError: there is no such folder, or the model cannot be had.

    Example:
      >>> resolve("nowhere")
      Traceback (most recent call last):
      easy_jax.pretrained.weight_files.WeightsError: there is no folder nowhere with a model
    """
    name = hub_name(location)
    if name is None:
        path = Path(location)
        if not path.is_dir():
            raise WeightsError(f"there is no folder {path} with a model{_hub_advice(path)}")
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        advice = "pip install 'easy-jax[hub]'"
        raise WeightsError(f"{HUB}{name} needs huggingface_hub: {advice}") from error
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{HUB}{name} cannot be downloaded: {reason}") from error


def hub_name(location: str | os.PathLike[str]) -> str | None:
    """Returns the name of a model on the Hugging Face Hub, or None for a folder.

    Raises:
      WeightsError: `hf://` with something else than an owner and a name after it.

    Example:
      >>> hub_name("hf://google/gemma-2-2b"), hub_name("google/gemma-2-2b")
      ('google/gemma-2-2b', None)
    """
    text = os.fspath(location)
    if not text.startswith(HUB):
        return None
    name = text.removeprefix(HUB)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise WeightsError(f"{text} is no model of the hub; write {HUB}OWNER/NAME")
    return name


def _hub_advice(path: Path) -> str:
    """Returns advice if a path that does not exist looks like a model's name."""
    is_name = len(path.parts) == 2 and not path.is_absolute() and path.parts[0] != ".."
    return f"; for that model of the Hugging Face Hub write {HUB}{path}" if is_name else ""


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's `config.json`.

    Raises:
      WeightsError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        return files.read_json(path, WeightsError, "copy it again")
    except FileNotFoundError as error:
        raise WeightsError(f"there is no {path}: this is not a model's folder") from error


def tensor_files(folder: Path, *, convert: str) -> dict[str, Path]:
    """Returns the file of every tensor in a folder, by the tensor's name.

    Args:
      folder: with `model.safetensors`, or with shards and their index.
      convert: what makes safetensors of a pickle, for the advice to those who have one.

    Raises:
      WeightsError: no safetensors, damaged ones, or an index that points out of the folder.
    """
    index = folder / INDEX
    if index.exists():
        weight_map = files.read_json(index, WeightsError, "copy it again").get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(_is_text, weight_map.values())):
            raise WeightsError(
                f"{index} is not an index of safetensors: its weight_map is not a name of a file "
                "for every tensor; copy it again"
            )
        found = {name: folder / file for name, file in weight_map.items()}
        for name, path in found.items():
            if path.parent != folder or ".." in path.parts:
                raise WeightsError(f"{index}: the file of {name}, {path}, is not in its folder")
        return found
    path = folder / "model.safetensors"
    if path.exists():
        with _open(path) as file:
            return dict.fromkeys(file.keys(), path)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLES)
    advice = (
        f"{pickles} are pickles, which can run code when opened, and are not read: "
        f"convert them with {convert}"
        if pickles
        else "copy model.safetensors, or its shards and their index, there"
    )
    raise WeightsError(f"there is no model.safetensors in {folder}; {advice}")


def _is_text(name: object) -> bool:
    return isinstance(name, str) and name != "" and "\0" not in name


def tensor_dtype(path: Path, name: str) -> np.dtype:
    """Returns the dtype that a tensor has in its file."""
    known = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = _describe(path, name).get_dtype()
    if found not in known:
        raise WeightsError(f"{path}: {name} has dtype {found}; supported: {sorted(known)}")
    return jnp.dtype(known[found])


def tensor_shape(path: Path, name: str) -> tuple[int, ...]:
    """Returns the shape that a tensor has in its file."""
    return tuple(_describe(path, name).get_shape())


def read_tensors(
    files: Mapping[str, Path], names: Iterable[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the named tensors one after the other, file by file.

    Raises:
      WeightsError: a damaged file, a tensor that is not where the index says, of a dtype that
        NumPy does not have, or with NaN or infinite values.
    """
    names = sorted(names)
    for path in sorted({files[name] for name in names}):
        with _open(path) as file:
            there = set(file.keys())
            for name in (name for name in names if files[name] == path):
                if name not in there:
                    raise _not_there(path, name)
                try:
                    tensor = file.get_tensor(name)
                # AttributeError: a dtype that NumPy does not have, such as float8.
                except (safetensors.SafetensorError, OSError, AttributeError) as error:
                    raise WeightsError(f"{path}: {name} cannot be read: {error}") from error
                _check_finite(path, name, tensor)
                yield name, tensor


def _check_finite(path: Path, name: str, tensor: np.ndarray) -> None:
    """Raises WeightsError for NaN and infinity: floats whose exponent has all bits set.

    Testing the bits is several times as fast as `isfinite` for types that NumPy does not have.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.size == 0:
        return
    unsigned = np.dtype(f"uint{8 * tensor.dtype.itemsize}").type
    exponent = np.asarray(np.inf, tensor.dtype).view(unsigned)[()]
    bits = tensor.reshape(-1).view(unsigned)
    bad = 0
    for start in range(0, bits.size, 1 << 22):  # in pieces: no second copy of a large tensor
        bad += int(np.count_nonzero((bits[start : start + (1 << 22)] & exponent) == exponent))
    if bad:
        raise WeightsError(
            f"{path}: {bad} of {tensor.size} values of {name} are NaN or infinite: the file is "
            "damaged, or the training that made it diverged; take another checkpoint"
        )


def check_float(path: Path, name: str, tensor: np.ndarray) -> None:
    """Raises WeightsError unless a tensor holds floats."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise WeightsError(f"{path}: {name} has dtype {tensor.dtype}, not a float's")


def check_names(
    location: Path, expected: Iterable[str], found: Iterable[str], *, hint: str = ""
) -> None:
    """Raises WeightsError unless a checkpoint has the tensors of a model, and no others.

    Args:
      location: of the checkpoint.
      expected, found: names of tensors.
      hint: added to the message.
    """
    missing, extra = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    if missing:
        raise WeightsError(
            f"the checkpoint in {location} lacks {len(missing)} tensors: {_some(missing)}{hint}"
        )
    if extra:
        raise WeightsError(
            f"the checkpoint in {location} has {len(extra)} tensors that the model has no place "
            f"for: {_some(extra)}{hint}"
        )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets its name when it is complete, for one process to write to.

    All processes enter, and leave when the folder is there.

    Raises:
      WeightsError: it exists, and is not empty.
      WriteError: it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder} is not empty; export into a new folder")
    processes.barrier("the start of an export")
    temporary = folder.with_name(folder.name + ".tmp")
    with files.writing(folder):
        if processes.is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        try:
            yield temporary
        except safetensors.SafetensorError as error:  # what it makes of the disk's errors, too
            raise OSError(str(error)) from error
        if processes.is_main_process():
            if folder.exists():
                folder.rmdir()
            files.publish(temporary, folder)
    processes.barrier("the end of an export")


def _describe(path: Path, name: str) -> Any:
    """A tensor's entry in its file: its dtype and shape."""
    with _open(path) as file:
        if name not in file.keys():  # noqa: SIM118, it is no mapping
            raise _not_there(path, name)
        return file.get_slice(name)


def _not_there(path: Path, name: str) -> WeightsError:
    return WeightsError(f"{path} has no tensor {name}, which the index places there")


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise WeightsError(f"there is no {path}, which the index names") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged or not a safetensors file: {error}; copy it again"
        ) from error
