"""What text has that is not used, or may not be meant: told, with counts and the first ids."""

import json
import sys
import warnings

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from easy_jax.config import ALPACA_INPUT, ConfigError, InstructionsConfig, TextConfig, replace
from easy_jax.data import (
    DataError,
    DataWarning,
    PackedSource,
    instructions,
    training_loader,
)
from easy_jax.data.bad_examples import BadExamples
from easy_jax.data.text import load_tokenizer, plain_text, tokenize

EOS, BOS, USER = "<eos>", "<bos>", "<user>"
WORDS = ["<unk>", "a", "b", "c", "in", "->"]
OPTIONS = {"eos_token": EOS, "template": "{instruction} ->"}


def words(own_start=()):
    """A tokenizer of a few words, that begins a text with some tokens of its own."""
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([EOS, BOS, USER, "<unk>"])
    if own_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*own_start, "$A", EOS],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*own_start, EOS)],
        )
    return tokenizer


def spell(tokenizer, source):
    """The tokens of each example, a bar before its targets."""
    lines = []
    for record in source:
        names = [tokenizer.id_to_token(token) for token in record["tokens"].tolist()]
        names.insert(int(record["target_start"]), "|")
        lines.append(" ".join(names))
    return lines


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tokenize(*args, **options)


def test_a_response_that_ends_in_eos_gets_no_second_one():
    tokenizer = words()
    responses = ["a", f"b {EOS}", f"c{EOS}\n", f"a{EOS} {EOS}"]
    with pytest.warns(
        DataWarning, match=r"3 of 4 .*, ids \[1, 2, 3\]: the response ends in '<eos>'"
    ):
        source = tokenize(["c"] * 4, responses, tokenizer, **OPTIONS)
    assert spell(tokenizer, source) == [f"c -> | {word} <eos>" for word in "abca"]
    with pytest.raises(DataError, match=r"blank response \(1\): id 0"):
        tokenize(["c"], [f" {EOS}"], tokenizer, **OPTIONS)


def test_a_blank_instruction_is_told():
    tokenizer = words()
    with pytest.warns(DataWarning, match=r"2 of 3 .*, ids \[0, 2\]: the instruction is blank"):
        source = tokenize(["", "a", " \n"], ["b"] * 3, tokenizer, **OPTIONS)
    assert spell(tokenizer, source)[0] == "-> | b <eos>"


def test_control_tokens_of_the_user_are_told_and_those_of_the_template_are_not():
    tokenizer = words()
    options = {**OPTIONS, "template": f"{USER} {{instruction}} ->"}
    # A word that is not known becomes <unk>, which is no control token.
    source = quiet(["a unknown"], ["b"], tokenizer, **options)
    assert spell(tokenizer, source) == ["<user> a <unk> -> | b <eos>"]
    with pytest.warns(DataWarning) as caught:
        source = tokenize(
            ["a", f"b{USER}a", "c"], ["b", "c", f"a {EOS} {USER} b"], tokenizer, **options
        )
    (message,) = [str(warning.message) for warning in caught]
    assert message == (
        "2 of 3 examples, ids [1, 2]: the text has ['<eos>', '<user>'], which are read as control "
        "tokens, not as text"
    )
    assert spell(tokenizer, source)[1] == "<user> b <user> a -> | c <eos>"


def test_a_bos_that_the_tokenizer_would_add():
    tokenizer = words([BOS])
    message = (
        r"2 of 2 .*, ids \[0, 1\]: the tokenizer begins a text with \['<bos>'\], .*set bos_token"
    )
    with pytest.warns(DataWarning, match=message):
        tokenize(["a", "b"], ["c"] * 2, tokenizer, **OPTIONS)
    with pytest.warns(DataWarning, match=r"1 of 1 .* begins a text with \['<bos>'\]"):
        plain_text(["a b c"], tokenizer, length=4)
    for options in (
        {**OPTIONS, "bos_token": BOS},
        {**OPTIONS, "template": f"{BOS}{{instruction}} ->"},
    ):
        assert spell(tokenizer, quiet(["a"], ["b"], tokenizer, **options))[0].startswith("<bos> a")
    plain_text(["a b c"], tokenizer, length=4, bos_token=BOS)
    with pytest.warns(DataWarning, match=r"begins a text with \['<user>', '<bos>'\]"):
        tokenize(["a"], ["b"], words([USER, BOS]), **OPTIONS)


@pytest.mark.parametrize("own", [(), (BOS,)])
def test_a_bos_that_comes_twice(own):
    options = {**OPTIONS, "template": f"{BOS} {{instruction}} ->", "bos_token": BOS}
    with pytest.warns(DataWarning, match=r"1 of 1 .*: they begin with \['<bos>'\] twice; leave it"):
        source = tokenize(["a"], ["b"], words(own), **options)
    assert spell(words(), source) == ["<bos> <bos> a -> | b <eos>"]


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"add_bos_token": True, "bos_token": BOS}, [BOS]),
        ({"add_bos_token": True, "bos_token": {"content": BOS, "lstrip": False}}, [BOS]),
        ({"add_bos_token": False, "bos_token": BOS}, []),
        ({"bos_token": BOS}, []),
        ({"add_bos_token": True, "bos_token": None}, []),
        ({"add_bos_token": True, "bos_token": "<none>"}, []),
    ],
)
def test_a_bos_in_the_settings_of_the_tokenizer(tmp_path, settings, added):
    words().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a b").tokens == [*added, "a", "b"]
    if added:
        with pytest.warns(DataWarning, match=r"begins a text with \['<bos>'\]"):
            tokenize(["a"], ["b"], tokenizer, **OPTIONS)
    else:
        quiet(["a"], ["b"], tokenizer, **OPTIONS)


def test_settings_of_a_tokenizer_that_has_its_bos_or_that_are_broken(tmp_path):
    words([BOS]).save(str(tmp_path / "tokenizer.json"))
    settings = {"add_bos_token": True, "bos_token": BOS}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode("a").tokens == [BOS, "a", EOS]
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)


# Inputs and weights.


def test_inputs_have_a_template_of_their_own():
    tokenizer = words()
    source = quiet(
        ["a", "b", "c"],
        ["c"] * 3,
        tokenizer,
        inputs=["b", None, " "],
        input_template="{input} in {instruction} ->",
        **OPTIONS,
    )
    assert spell(tokenizer, source) == [
        "b in a -> | c <eos>",
        "b -> | c <eos>",
        "c -> | c <eos>",
    ]
    # What a text says of the other's place is no place.
    source = quiet(
        ["{input}"],
        ["c"],
        tokenizer,
        inputs=["{instruction}"],
        input_template="{instruction} {input} in ->",
        **OPTIONS,
    )
    assert spell(tokenizer, source) == [f"{'<unk> ' * 6}in -> | c <eos>"]
    whole = ALPACA_INPUT.replace("{instruction}", "a b").replace("{input}", "c")
    source = quiet(["a b"], ["c"], tokenizer, inputs=["c"], eos_token=EOS)
    expected = tokenizer.encode(f"{whole}c{EOS}", add_special_tokens=False).ids
    assert source.tokens.tolist() == expected


def test_bad_inputs():
    tokenizer = words()
    with pytest.raises(DataError, match=r"input_template must have {instruction} and {input} once"):
        tokenize(["a"], ["b"], tokenizer, inputs=["c"], **OPTIONS)
    with pytest.raises(DataError, match=r"once each: '{input}'"):
        tokenize(["a"], ["b"], tokenizer, input_template="{input}", **OPTIONS)
    with pytest.raises(DataError, match="1 inputs for 2 responses"):
        tokenize(["a"] * 2, ["b"] * 2, tokenizer, inputs=[None], **OPTIONS)
    with pytest.raises(DataError, match=r"input is int, not a string \(1\): id 1"):
        tokenize(
            ["a"] * 2,
            ["b"] * 2,
            tokenizer,
            inputs=["c", 3],
            input_template="{instruction} {input} ->",
            **OPTIONS,
        )


# Examples that cannot be used.


def test_bad_examples_are_told_at_once_or_left_out_by_id():
    tokenizer = words()
    instructions = ["a", "b", "a b c a b c", None, "c", "a"]
    responses = ["b", " ", "c", "a", "a b", "c"]
    kinds = [
        r"blank response \(1\): id 1",
        r"no target token within max_length 6 \(1\): id 2 \[7 prompt tokens\]",
        r"instruction is null, not a string \(1\): id 3",
    ]
    for kind in kinds:
        with pytest.raises(DataError, match=r"^cannot use 3 of 6 examples: .*" + kind):
            tokenize(instructions, responses, tokenizer, max_length=6, **OPTIONS)
    bad = BadExamples("drop")
    with pytest.warns(DataWarning, match=r"^left out 3 of 6 examples: blank response"):
        source = tokenize(
            instructions,
            responses,
            tokenizer,
            max_length=6,
            bad=bad,
            weights=[1, 2, 3, 4, 5, 6],
            **OPTIONS,
        )
    assert bad.ids() == source.dropped_ids.tolist() == [1, 2, 3] and len(source) == 6
    assert spell(tokenizer, source) == [
        "a -> | b <eos>",
        "|",
        "|",
        "|",
        "c -> | a b <eos>",
        "a -> | c <eos>",
    ]
    assert source.describe().startswith("3 examples, 13 tokens, 7 targets; ")
    assert "; 3 examples left out; " in source.describe()
    assert source.describe().endswith("own weights from 1 to 6")
    packed = PackedSource(source, row_length=5)
    for epochs, weights in ((1, None), (2, np.ones(6, np.float32))):
        loader = training_loader(packed, 2, epochs=epochs, seed=0, weight_N=weights)
        ids = [i for batch in loader for i in batch["example_id"][batch["mask"]].tolist()]
        assert sorted(ids) == sorted([0, 4, 5] * epochs)


def test_nothing_is_left():
    with pytest.raises(DataError, match=r"no example is left: cannot use 2 of 2 examples: blank"):
        tokenize(["a"] * 2, [""] * 2, words(), bad=BadExamples("drop"), **OPTIONS)


def _config(tmp_path, lines, **fields):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return InstructionsConfig(path=str(path), instruction_field="q", response_field="r", **fields)


TEXT = TextConfig(
    template="{instruction} ->",
    input_template="{input} in {instruction} ->",
    eos_token=EOS,
    max_length=6,
    row_length=8,
)


def test_fields_of_a_configuration(tmp_path):
    rows = [
        {"q": "a", "r": "b", "input": "c", "weight": 2.5},
        {"q": "b", "r": "c", "input": "", "weight": 0, "id": "x"},
    ]
    config = _config(tmp_path, rows, input_field="input", weight_field="weight")
    with pytest.warns(DataWarning, match=r"not read: 'id' \(in 1 of 2 records\)$"):
        source = instructions.load(config, TEXT, words()).examples
    assert spell(words(), source) == ["c in a -> | b <eos>", "b -> | c <eos>"]
    assert source.weight.tolist() == [2.5, 0]
    config = replace(config, input_field="", weight_field="")
    with pytest.warns(
        DataWarning, match="'id' .*, 'input' .*input_field would .*, 'weight' .in 2 of"
    ):
        source = instructions.load(config, TEXT, words()).examples
    assert spell(words(), source)[0] == "a -> | b <eos>" and source.weight is None


def test_reading_and_tokenising_tell_their_bad_records_together(tmp_path):
    rows = [{"q": "a", "r": "b"}, "{", {"q": "a", "r": ""}, {"q": "a " * 6, "r": "b"}, {"q": "a"}]
    config = _config(tmp_path, [*rows, {"q": "c", "r": "b"}])
    message = (
        rf"^cannot use 4 of 6 examples of {config.path}: not JSON \(1\): line 2 \[.*\]; "
        r"blank response \(1\): line 3; no target token within max_length 6 \(1\): line 4 "
        r"\[7 prompt tokens\]; no field 'r' \(1\): line 5 \[it has \['q'\]\]\. Fix the data, "
    )
    with pytest.raises(DataError, match=message):
        instructions.load(config, TEXT, words())
    bad = BadExamples("drop")
    with pytest.warns(DataWarning, match=r"^left out 4 of 6 examples of .*jsonl: not JSON"):
        source = instructions.load(config, TEXT, words(), bad).examples
    assert source.dropped_ids.tolist() == [1, 2, 3, 4] and source.num_targets[5] == 2
    # A part of the file: its ids begin at 0, its places are the file's; others do not matter.
    config = replace(config, start=3, size=3)
    bad = BadExamples("drop")
    with pytest.warns(
        DataWarning, match=r"^left out 2 of 3 examples of .*\(1\): line 4 .*: line 5 "
    ):
        source = instructions.load(config, TEXT, words(), bad).examples
    assert source.dropped_ids.tolist() == [0, 1]
    assert [(row["id"], row["where"]) for row in bad.rows()] == [(0, "line 4"), (1, "line 5")]
    config = replace(config, start=5, size=1)
    assert len(instructions.load(config, TEXT, words())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"template": r"USER\n{instruction}\nBOT"},
            r"text\.template is .*it must be .*\$'\.\.\.\\n",
        ),
        ({"input_template": r"{instruction}\n{input}"}, r"text\.input_template is .*in a shell"),
        (
            {"input_template": "{instruction}"},
            r"text\.input_template is .*{instruction} and {input}",
        ),
        ({"border": "merged"}, r"text\.border is 'merged'; it must be one of \['joined', 'apart'"),
    ],
)
def test_bad_text_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        TextConfig(**changes).validate("text")
    TextConfig(template="USER\n{instruction}\nLaTeX: \\nabla ->").validate("text")


def test_fields_of_a_configuration_are_distinct():
    config = InstructionsConfig(path="x", instruction_field="q", response_field="q")
    with pytest.raises(ConfigError, match=r"train's fields is \['q', 'q'\]; it must be distinct"):
        config.validate("train")
    config = InstructionsConfig(format="gsm_symbolic", size=3, input_field="x")
    with pytest.raises(ConfigError, match=r"fields is \['query', 'response', 'x'\]; it must be an"):
        config.validate("train")


def test_generated_text_without_its_package(monkeypatch):
    for module in ("reasoning_gym", "reasoning_gym.data"):
        monkeypatch.setitem(sys.modules, module, None)
    config = InstructionsConfig(format="gsm_symbolic", size=3)
    advice = r' needs reasoning-gym: pip install "\.\[smollm2\]"'
    with pytest.raises(DataError, match="^gsm_symbolic" + advice):
        instructions.load(config, TextConfig(eos_token=EOS), words())
    with pytest.raises(DataError, match="^the text 'verne'" + advice):
        instructions.general("verne", 100, TextConfig(eos_token=EOS), words())
