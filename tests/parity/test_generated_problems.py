"""The data that `configs/smollm2_gsm.py` generates are those behind docs/results.md.

They need reasoning-gym, which `.[smollm2]` installs and `.[test]` does not: pycosat, on which it
depends, has no wheels and needs a C compiler.
"""

import hashlib

from easy_jax.config import InstructionsConfig
from easy_jax.data import instructions
from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.formats import TEXT_FORMATS


def sha256(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def test_the_problems_are_those_of_the_results():
    config = InstructionsConfig(format="gsm_symbolic", seed=42, size=96 + 48)
    columns = TEXT_FORMATS["gsm_symbolic"].read(config, ["q", "a"], [], BadExamples())
    questions, answers = columns["q"], columns["a"]
    assert len(questions) == len(answers) == 144
    assert questions[0].startswith("There are 12 students playing basketball and twice that number")
    assert answers[0].endswith("12 + 24 + 34 = 70 students.\n#### 70")
    found = sha256(*questions, *answers)
    assert found == "0a1472bffbcf08eece5097b927d134c2d27d9982470960d3688b71aa59d0b68a"


def test_the_story_is_the_one_of_the_results():
    found = sha256(instructions._general_text("verne")[:12_288])
    assert found == "0cb05950f01967a38d03a0e4f99af4a1298cbd757d184ab7e4b7c9c2fc776a33"
