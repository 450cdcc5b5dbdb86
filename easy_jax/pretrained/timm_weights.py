"""Loads and exports residual networks of timm and torchvision, from safetensors only.

The two name tensors alike. PyTorch's kernels are [out, in, height, width] and [out, in].
"""

import bisect
import collections
import dataclasses
import itertools
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from easy_jax.io import files
from easy_jax.io.checks import ConfigError
from easy_jax.models.classifier import ClassifierInfo, info_of
from easy_jax.models.config import RESNETS, ResNetConfig
from easy_jax.models.resnet import ResNet
from easy_jax.parallel import processes, sharding
from easy_jax.pretrained import weight_files
from easy_jax.pretrained.weight_files import WeightsError

_CONVERT = "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
# A number of batches, which PyTorch does not use where it has a momentum: copied, not read.
_COUNT = "num_batches_tracked"
_MODULES = {"head": "fc", "downsample_conv": "downsample.0", "downsample_bn": "downsample.1"}
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Of timm's `pretrained_cfg`: what holds for a fine-tuned network as well.
_IMAGES = (
    "input_size",
    "test_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "test_crop_pct",
    "crop_mode",
    "mean",
    "std",
    "license",
)

_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # by the number of axes
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}

_Path = tuple[Any, ...]  # of a variable in the network's state


def load(
    path: str | os.PathLike[str], config: ResNetConfig | None = None, *, mesh: Mesh | None = None
) -> ResNet:
    """Loads a pre-trained residual network, with the head that is in the file.

    Args:
      path: a folder with safetensors and, if it is timm's, `config.json`; or
        `hf://OWNER/NAME`, such as `hf://timm/resnet50.a1_in1k`, which is downloaded from the
        Hugging Face Hub if it is not in the cache.
      config: what the network should be; default: what `read_config` finds.
      mesh: default: all devices on the data axis, with full copies of the parameters.

    Returns:
      The network; parameters and BatchNorm's statistics are float32, in their shards. Its `info`
      has what `config.json` tells: the names of the classes, and the images' mean and standard
      deviation, which scoring and training compare with the data's.

    Raises:
      WeightsError: nothing there, a pickle, a damaged file; tensors that are missing, extra, of
        another shape or not finite; another network than `config` or `config.json` says.
      ConfigError: `config.json` tells of a network that there is not here.

    Example:
      >>> import tempfile
      >>> config = ResNetConfig.named("resnet18")
      >>> folder = Path(tempfile.mkdtemp()) / "network"
      >>> export(ResNet(config, num_classes=5, rngs=nnx.Rngs(0)), config, folder)
      >>> load(folder).head.bias.shape
      (5,)
    """
    checkpoint = _find(path)
    config = checkpoint.config() if config is None else config
    graphdef, state = nnx.split(_abstract(config, checkpoint.num_classes()))
    variables = dict(nnx.to_flat_state(state))
    paths = _paths(config, variables)
    checkpoint.check(config, paths)
    flat = []
    for name, tensor in weight_files.read_tensors(checkpoint.files, paths):
        file, variable = checkpoint.files[name], variables[paths[name]]
        weight_files.check_float(file, name, tensor)
        value = _read_in(tensor, variable.get_value().shape, f"{file}: {name}")
        if name.endswith(_LEAVES["var"]) and (value < 0.0).any():
            raise WeightsError(f"{file}: {name} has negative values, which no variance has")
        flat.append((paths[name], variable.replace(value)))
    mesh = sharding.make_mesh() if mesh is None else mesh
    model = nnx.merge(graphdef, sharding.shard_tree(nnx.from_flat_state(flat), mesh))
    model.info = checkpoint.info()
    return model


def read_config(path: str | os.PathLike[str]) -> ResNetConfig:
    """Returns the network of a checkpoint: by `config.json` or, without one, by its tensors' names.

    Args:
      path: see `load`.

    Returns:
      Its configuration, with this path, and computing in float32.

    Raises:
      WeightsError: see `load`; or tensors of a network that there is not here.
      ConfigError: `config.json` tells of a network that there is not here.
    """
    return dataclasses.replace(_find(path).config(), path=os.fspath(path))


def read_info(path: str | os.PathLike[str]) -> ClassifierInfo:
    """Returns the classes and the normalisation of a network, as far as `config.json` has them.

    Args:
      path: see `load`.

    Raises:
      WeightsError: see `load`; names that are not one for every class.
      ConfigError: a mean or standard deviation that is no list of numbers.
    """
    return _find(path).info()


def export(
    model: ResNet | nnx.State,
    config: ResNetConfig,
    folder: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    info: ClassifierInfo | None = None,
) -> None:
    """Writes a folder that timm loads: `timm.create_model("local-dir:...", pretrained=True)`.

    The folder appears complete or not at all. All processes call it, one writes.

    Args:
      model: a network, or its state.
      config: of the network; one of `RESNETS`.
      folder: must not exist, or be empty.
      base: the path given to `load`; what its `config.json` says of images (their size, mean,
        standard deviation) and BatchNorm's numbers of batches are copied. Without it, timm
        takes its defaults, ImageNet's, for the images; the numbers of batches are 0.
      info: the names of the classes, which timm's `label_names` will be, and the images' mean
        and standard deviation; default: the network's own `info`. A state has none.

    Raises:
      ConfigError: a network that timm does not have.
      WeightsError: the folder is not empty; the model or the base is of another network; another
        number of names than of outputs.

    Example:
      >>> export(model, RESNETS["resnet50"], "fine-tuned")  # doctest: +SKIP
    """
    architecture = config.name()
    if architecture is None:
        raise ConfigError(f"{config} cannot be exported; timm has {list(RESNETS)} of this kind")
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    variables = dict(nnx.to_flat_state(state))
    num_classes = len(variables["head", "bias"].get_value())
    expected = dict(nnx.to_flat_state(nnx.state(_abstract(config, num_classes))))
    if _shapes(variables) != _shapes(expected):
        raise WeightsError(f"the model is not the {architecture} that its configuration says")
    if info is None:
        info = ClassifierInfo() if isinstance(model, nnx.State) else info_of(model)
    if info.classes and len(info.classes) != num_classes:
        raise WeightsError(
            f"the head has {num_classes} outputs, and there are names of {len(info.classes)} "
            "classes; give it a head of their number with easy_jax.new_head"
        )
    paths = _paths(config, variables)
    counts = {name: np.zeros((), np.int64) for name in _counts(paths)}
    images: dict[str, Any] = {"input_size": [config.in_channels, 224, 224]}
    if base is not None:
        checkpoint = _find(base)
        checkpoint.check(config, paths)
        counts |= weight_files.read_tensors(checkpoint.files, counts.keys() & checkpoint.files)
        images |= checkpoint.images()
    images |= {key: list(getattr(info, key)) for key in ("mean", "std") if getattr(info, key)}
    with weight_files.new_folder(Path(folder)) as temporary:
        # On every process: what is in shards comes together.
        tensors = {name: _read_out(variables[path].get_value()) for name, path in paths.items()}
        if processes.is_main_process():
            save_file(tensors | counts, temporary / "model.safetensors", metadata={"format": "pt"})
            content = {
                "architecture": architecture,
                "num_classes": num_classes,
                "num_features": tensors["fc.weight"].shape[1],
                **({"label_names": list(info.classes)} if info.classes else {}),
                "pretrained_cfg": {
                    **images,
                    "num_classes": num_classes,
                    "first_conv": "conv1",
                    "classifier": "fc",
                },
            }
            files.write_json(temporary / "config.json", content)


# What a checkpoint is of.


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint whose tensors are not read yet: the file of each tensor, and `config.json`."""

    folder: Path
    files: dict[str, Path]
    content: dict[str, Any]  # empty without a `config.json`, as torchvision's are

    def config(self) -> ResNetConfig:
        name = self.architecture() or _guess(self.files)
        if name is None:
            raise WeightsError(
                f"{self.folder} has no config.json, and tensors of none of {list(RESNETS)}: "
                f"{', '.join(sorted(self.files)[:5])} ..."
            )
        return ResNetConfig.named(name, in_channels=self._axis("conv1.weight", 1))

    def num_classes(self) -> int:
        return self._axis("fc.weight", 0)

    def architecture(self) -> str | None:
        """Returns the network of timm's `config.json`, if it is one that this package builds.

        Others have tensors of the same names: resnetblur50, for one, or a resnet50 with dilation.
        """
        if not self.content:
            return None
        where = self.folder / "config.json"
        name = self.content.get("architecture")
        if name not in list(RESNETS):
            raise ConfigError(f"{where}: architecture is {name!r}; supported are {list(RESNETS)}")
        arguments = dict(self._object("model_args"))
        pool = arguments.pop("global_pool", self.content.get("global_pool", "avg"))
        if pool != "avg":
            raise ConfigError(f"{where}: global_pool is {pool!r}; supported: 'avg'")
        unknown = sorted(arguments.keys() - {"num_classes", "in_chans"})
        if unknown:
            raise ConfigError(
                f"{where}: the model_args {unknown} are not supported; the network would not be "
                "the one that was trained"
            )
        return str(name)

    def images(self) -> dict[str, Any]:
        """Returns the image settings of `config.json`, which a fine-tuned network keeps."""
        told = self._object("pretrained_cfg")
        for key in ("mean", "std"):
            if not _is_colour(told.get(key, [1.0]), positive=key == "std"):
                raise ConfigError(
                    f"{self.folder / 'config.json'}: {key} is {told[key]!r:.80}; it must be a "
                    "list of numbers, one for each channel"
                )
        return {key: told[key] for key in _IMAGES if key in told}

    def info(self) -> ClassifierInfo:
        """Returns the classes and the normalisation in `config.json`."""
        names = self.content.get("label_names") or self._object("pretrained_cfg").get("label_names")
        count = self.num_classes()
        if isinstance(names, dict):  # by number, as timm allows it as well
            names = [names.get(str(number)) for number in range(count)]
        if names is not None and not (
            isinstance(names, list)
            and len(names) == count
            and all(isinstance(name, str) for name in names)
        ):
            raise WeightsError(
                f"{self.folder / 'config.json'}: label_names is not a list of {count} names, one "
                "for each output of the head, fc.weight; correct or remove it"
            )
        images = self.images()
        colours = (tuple(map(float, images.get(key, ()))) for key in ("mean", "std"))
        return ClassifierInfo(tuple(names or ()), *colours)

    def check(self, config: ResNetConfig, paths: Mapping[str, _Path]) -> None:
        """Raises unless this is the configured network, as far as names and shapes show."""
        wanted = config.name() or str(config)
        architecture, guess = self.architecture(), _guess(self.files)
        if architecture not in (None, wanted):
            raise WeightsError(
                f"{self.folder / 'config.json'}: architecture is {architecture!r}; the "
                f"configuration is {wanted}"
            )
        hint = f"; they are of {guess}, not {wanted}" if guess not in (None, wanted) else ""
        found = self.files.keys() - set(_counts(paths))
        weight_files.check_names(self.folder, paths, found, hint=hint)
        told = self.content.get("num_classes", self.num_classes())
        if told != self.num_classes():
            raise WeightsError(
                f"{self.folder / 'config.json'}: num_classes is {told!r}; the head, fc.weight, "
                f"has {self.num_classes()}"
            )

    def _axis(self, name: str, axis: int) -> int:
        """Returns a size of a tensor's shape; 1 if missing, which `check` and `load` report."""
        shape = weight_files.tensor_shape(self.files[name], name) if name in self.files else ()
        return shape[axis] if axis < len(shape) else 1

    def _object(self, key: str) -> dict[str, Any]:
        value = self.content.get(key) or {}
        if not isinstance(value, dict):
            raise ConfigError(f"{self.folder / 'config.json'}: {key} is not a JSON object")
        return value


def _is_colour(value: object, positive: bool) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(each, int | float) and math.isfinite(each) and (each > 0 or not positive)
            for each in value
        )
    )


def _find(path: str | os.PathLike[str]) -> _Checkpoint:
    folder = weight_files.resolve(path)
    files = weight_files.tensor_files(folder, convert=_CONVERT)
    has_config = (folder / "config.json").exists()
    return _Checkpoint(folder, files, weight_files.read_config(folder) if has_config else {})


def _guess(names: Collection[str]) -> str | None:
    """Returns the name in `RESNETS` whose network has tensors of these names; None if none has."""
    blocks = {tuple(name.split(".")[:2]) for name in names if name.startswith("layer")}
    stages = collections.Counter(block[0] for block in blocks)
    depths = tuple(stages[stage] for stage in sorted(stages))
    kind = "bottleneck" if "layer1.0.conv3.weight" in names else "basic"
    return next((name for name, sizes in RESNETS.items() if sizes == (kind, depths)), None)


# Tensors.


def _abstract(config: ResNetConfig, num_classes: int) -> ResNet:
    """Returns a network of `ShapeDtypeStruct`s, which takes no memory."""
    model: ResNet = nnx.eval_shape(lambda: ResNet(config, num_classes, rngs=nnx.Rngs(0)))
    return model


def _shapes(variables: Mapping[_Path, Any]) -> dict[_Path, tuple[int, ...]]:
    return {path: variable.get_value().shape for path, variable in variables.items()}


def _paths(config: ResNetConfig, variables: Iterable[_Path]) -> dict[str, _Path]:
    """Returns the path of every variable of a network, by its name in PyTorch."""
    starts = list(itertools.accumulate(config.depths, initial=0))
    paths = {}
    for path in variables:
        *modules, leaf = path
        if modules[0] == "blocks":
            _, block, module = modules
            stage = bisect.bisect_right(starts, block) - 1
            modules = [f"layer{stage + 1}", block - starts[stage], module]
        names = [_MODULES.get(module, module) for module in modules]
        paths[".".join(map(str, [*names, _LEAVES[leaf]]))] = path
    return paths


def _counts(names: Iterable[str]) -> list[str]:
    """The names of BatchNorm's numbers of batches, in a network with these tensors."""
    end = "running_var"
    return [name.removesuffix(end) + _COUNT for name in names if name.endswith(end)]


def _read_in(tensor: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """A tensor as it is here, float32, if it can be."""
    expected = tuple(shape[axis] for axis in _TO_TORCH[len(shape)])
    if tensor.shape != expected:
        raise WeightsError(f"{where} has shape {tensor.shape}; the network's is {expected}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is told below
        value = tensor.transpose(_FROM_TORCH[len(shape)]).astype(np.float32)
    wrong = np.count_nonzero(~np.isfinite(value))
    if wrong:
        raise WeightsError(f"{where} has {wrong} values that are not finite")
    return value


def _read_out(value: jax.Array) -> np.ndarray:
    """A variable as PyTorch has it."""
    array = sharding.whole(value)
    return np.ascontiguousarray(array.transpose(_TO_TORCH[array.ndim]))
