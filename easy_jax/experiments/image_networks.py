"""Networks of an experiment with images: random, pre-trained, or with the variables of a stage."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from easy_jax.data import Splits
from easy_jax.io.checks import ConfigError
from easy_jax.models import resnet
from easy_jax.models.config import ResNetConfig
from easy_jax.models.modes import eval_mode, train_mode
from easy_jax.parallel import sharding
from easy_jax.pretrained import timm_weights
from easy_jax.train import compatibility


class ImageNetworks:
    """Factory of networks of one configuration on one mesh; caches what it has traced.

    Args:
      config: the configuration of the networks.
      mesh: the device mesh that holds their variables.
    """

    def __init__(self, config: ResNetConfig, mesh: Mesh):
        self._config = config
        self._mesh = mesh
        self._graphdefs: dict[tuple[int, bool], nnx.GraphDef[Any]] = {}
        self._inits: dict[tuple[int, Any], Callable[[jax.Array], nnx.State]] = {}

    def given(self, task: Splits, name: str) -> nnx.State:
        """Returns the variables of the pre-trained network at the configuration's `path`.

        Args:
          task: the data of the task that it was trained on.
          name: the name of the task, for errors.

        Raises:
          ConfigError, DataError: the network expects another normalisation, another number of
            classes or other class names than those of the task.
        """
        path = self._config.path
        model = timm_weights.load(path, self._config, mesh=self._mesh)
        difference = compatibility.difference_of_pixels(model.info, task.test)
        if difference:
            raise ConfigError(f"{path}, for {name}: {difference}")
        if model.head.out_features != task.num_classes:
            raise ConfigError(
                f"the head of {path} has {model.head.out_features} classes; {name}, the "
                f"pre-training task, has {task.num_classes}"
            )
        compatibility.check_names(model.info.classes, task.classes, path)
        return nnx.state(model)

    def merge(
        self, model_state: nnx.State, num_classes: int, frozen_norm: bool = False
    ) -> resnet.ResNet:
        """Returns a network with these variables, in train mode; with `frozen_norm`, eval mode."""
        if (num_classes, frozen_norm) not in self._graphdefs:
            model = nnx.eval_shape(lambda: self._build(num_classes, jax.random.key(0)))
            view = eval_mode if frozen_norm else train_mode
            self._graphdefs[num_classes, frozen_norm] = nnx.graphdef(view(model))
        return nnx.merge(self._graphdefs[num_classes, frozen_norm], model_state)

    def fresh(self, num_classes: int, seed: int, part: Any = ...) -> nnx.State:
        """Returns the variables, or a part, of a random initialisation, created sharded."""
        if (num_classes, part) not in self._inits:
            self._inits[num_classes, part] = sharding.jit_init(
                lambda key: nnx.state(self._build(num_classes, key), part), self._mesh
            )
        return self._inits[num_classes, part](jax.random.key(seed))

    def with_new_head(self, model_state: nnx.State, num_classes: int, seed: int) -> nnx.State:
        """Returns the variables with a randomly initialised head."""
        head = self.fresh(num_classes, seed, resnet.is_head)
        return nnx.merge_state(nnx.filter_state(model_state, resnet.is_backbone), head)

    def _build(self, num_classes: int, key: jax.Array) -> resnet.ResNet:
        return resnet.ResNet(self._config, num_classes, rngs=nnx.Rngs(params=key))
