"""Errors that users can fix, which the command line prints as one line without a traceback."""

from easy_jax.core.losses import ContractError
from easy_jax.data import DataError
from easy_jax.io.checks import ConfigError
from easy_jax.io.files import WriteError
from easy_jax.io.sealed import ArtefactError
from easy_jax.parallel.lock import LockError
from easy_jax.parallel.processes import DisagreementError
from easy_jax.pretrained.weight_files import WeightsError
from easy_jax.train.checkpoint import CheckpointError
from easy_jax.train.hooks import TrainingError
from easy_jax.train.loss_table import LossTableError
from easy_jax.train.scoring import ScoringError

USER_ERRORS = (
    ArtefactError,
    CheckpointError,
    ConfigError,
    ContractError,
    DataError,
    DisagreementError,
    LockError,
    LossTableError,
    ScoringError,
    TrainingError,
    WeightsError,
    WriteError,
)
