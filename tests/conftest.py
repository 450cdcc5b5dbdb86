"""8 fake CPU devices, strict numerics, and annotations checked at run time."""

import os
import sys
import tempfile
from pathlib import Path

from processes import CHEAP_COMPILATION

os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        CHEAP_COMPILATION,
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook

# Shapes and dtypes in the annotations of these modules are checked at every call.
_HOOK = install_import_hook(
    ["easy_jax.core.losses", "easy_jax.core.merge", "easy_jax.core.weightings"], "beartype.beartype"
)

import jax  # noqa: E402
import pytest  # noqa: E402
from cpu_time import CpuTime  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run: what fails here fails everywhere.
settings.register_profile("easy_jax", derandomize=True, deadline=None)
settings.load_profile("easy_jax")

_ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))  # configs/ is no part of the package

# Compilations are shared within a run, by workers and sub-processes too, and never between runs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="easy_jax_compilations_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config):
    config.pluginmanager.register(CpuTime(), "cpu_time")


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the repository."""
    return _ROOT


@pytest.fixture(scope="session")
def tfds_images(tmp_path_factory) -> Path:
    """Flowers, of which TFDS knows the code as well, and a data set with a damaged image."""
    from image_data import jpegs, write_tfds

    data_dir = tmp_path_factory.mktemp("tfds")
    flowers = {"train": jpegs(20, 102), "validation": jpegs(4, 102, 50), "test": jpegs(9, 102, 70)}
    write_tfds(data_dir, "oxford_flowers102", "2.1.1", 102, flowers)
    broken = [*jpegs(3), (jpegs(1)[0][0][:100], 1)]
    return write_tfds(data_dir, "broken", "1.0.0", 3, {"train": broken})
