"""What several test modules need."""

import importlib.util

import jax

from easy_jax.config import GlyphDataConfig
from easy_jax.parallel import sharding


def load_config(path):
    """The module of a file in `configs/`."""
    spec = importlib.util.spec_from_file_location(f"configs.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def devices_mesh(count: int, fsdp: int = 1) -> jax.sharding.Mesh:
    """A mesh over the first devices: `count / fsdp` on data, `fsdp` on fsdp."""
    devices = jax.devices()[:count]
    return jax.make_mesh(
        (count // fsdp, fsdp, 1),
        sharding.AXES,
        devices=devices,
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


class Records:
    """A source of the records it is given, unchecked and without a fingerprint of its own."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, position):
        return self.records[position]


class InterruptionError(Exception):
    """Stands for a kill."""


def stop_after(calls):
    """A `progress` that raises InterruptionError once it has been called that often."""
    left = iter(range(calls))

    def progress(_):
        if next(left, None) is None:
            raise InterruptionError

    return progress


def small_glyphs(**fields):
    """Letters and digits of 8 x 8 pixels, one batch of 32 of each to train on."""
    sizes = {"pretrain_train": 32, "pretrain_validation": 16, "pretrain_test": 16}
    sizes |= {"target_train": 32, "target_validation": 16}
    return GlyphDataConfig(image_size=8, **sizes, **fields)
