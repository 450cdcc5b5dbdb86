"""The errors that a user can mend: their message says what is wrong, where, and how to mend it."""

from easy_jax.checkpoint import CheckpointError
from easy_jax.config import ConfigError
from easy_jax.data import DataError
from easy_jax.distributed import DisagreementError
from easy_jax.files import WriteError
from easy_jax.fitting import TrainingError
from easy_jax.lock import LockError
from easy_jax.loss_table import LossTableError
from easy_jax.losses import ContractError
from easy_jax.models.weight_files import WeightsError
from easy_jax.scoring import ScoringError
from easy_jax.sealed import ArtefactError

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
