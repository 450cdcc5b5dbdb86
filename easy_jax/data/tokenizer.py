"""Readers of tokenizers from files, and functions to find the tokens that they add to a text."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from easy_jax.data.sources import DataError
from easy_jax.io import files


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer from its `tokenizer.json`, without truncation or padding.

    If a `tokenizer_config.json` beside it sets `add_bos_token`, the tokenizer puts its BOS token
    before each text, unless it does so already.

    Args:
      path: of the file, or of the folder with it.

    Raises:
      DataError: the file is missing or broken.

    Example:
      >>> load_tokenizer("models/smollm2").encode("2 + 2").ids  # doctest: +SKIP
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    fix = "only the fast format, `tokenizer.json`, is read: look for that file next to the model"
    if not file.is_file():
        raise DataError(f"{file} does not exist; {fix}")
    try:
        tokenizer = Tokenizer.from_file(os.fspath(file))
    except Exception as error:  # the library raises no narrower class
        raise DataError(f"{file} is not a tokenizer ({error}); {fix}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = file.with_name("tokenizer_config.json")
    if settings.is_file():
        _add_bos(tokenizer, files.read_json(settings, DataError))
    return tokenizer


def _add_bos(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> None:
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, Mapping) else bos
    bos_id = tokenizer.token_to_id(bos) if isinstance(bos, str) else None
    if settings.get("add_bos_token") is not True or bos_id is None:
        return
    # The encoding of an empty text has only the tokens that the tokenizer adds.
    if bos_id not in tokenizer.encode("").ids:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, bos_id)]
        )


def own_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids that a tokenizer puts before a text.

    Args:
      text: any text that the tokenizer can encode.
    """
    encoding = tokenizer.encode(text)
    pairs = zip(encoding.ids, encoding.sequence_ids, strict=True)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[1] is None, pairs)]


def whole(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer without truncation and padding; a copy if it has any."""
    if tokenizer.truncation is not None or tokenizer.padding is not None:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer without truncation, padding and post-processing.

    Post-processing adds tokens, and removes spaces from the tokens' offsets.
    """
    tokenizer = whole(tokenizer)
    if tokenizer.post_processor is not None:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.post_processor = None
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str, what: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise DataError(f"the {what} token {token!r} is not in the tokenizer's vocabulary")
    return token_id
