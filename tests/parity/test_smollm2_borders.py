"""The border of prompt and response under SmolLM2's own tokenizer, in every way of taking it."""

import os
from pathlib import Path

import pytest

from easy_jax.config import ALPACA
from easy_jax.data import text

EOS = "<|im_end|>"
CHAT = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
SPACE = "Q: {instruction} A: "


@pytest.fixture(scope="module")
def tokenizer():
    """Made by scripts/fetch_smollm2.py; without it these tests fail, they are not skipped."""
    return text.load_tokenizer(Path(os.environ["EASY_JAX_SMOLLM2"]))


@pytest.mark.parametrize(
    ("template", "response", "joined", "authors"),
    [
        (SPACE, "Yes", [" Yes"], 0),
        (SPACE, "The answer is no.", [" The", " answer", " is", " no", "."], 4),
        (SPACE, "4", ["4"], 1),
        (ALPACA, "Yes", ["Yes"], 1),
        (ALPACA, "//www.x.org", ["://", "www", ".", "x", ".", "org"], 5),
        (ALPACA, ":) sure", ["::", ")", " sure"], 2),
        (ALPACA, "\n4", ["\n", "4"], 2),
        (CHAT, "\nYes", ["\n", "Yes"], 2),
        (CHAT, "\n\nYes", ["\n\n", "\n", "Yes"], 2),
        ("{instruction}\n", "    return x", ["\n   ", " return", " x"], 2),
    ],
)
def test_the_targets(tokenizer, template, response, joined, authors):
    def targets(border):
        source = text.tokenize(
            ["Is it?"], [response], tokenizer, eos_token=EOS, template=template, border=border
        )
        tokens = source.tokens[source.target_start[0] :].tolist()
        return [tokenizer.decode([i], skip_special_tokens=False) for i in tokens], source

    found, source = targets("joined")
    assert found == [*joined, EOS]
    theirs, other = targets("authors")
    assert theirs == [*joined, EOS][len(joined) - authors :]
    # Told in both, wherever the two differ.
    assert len(source.merged_ids) == len(other.merged_ids) == int(authors < len(joined))
    apart, source = targets("apart")
    assert "".join(apart) == response + EOS and source.merged_ids.size == 0
