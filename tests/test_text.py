"""Text: readers, tokenisation, flat arrays - and every mistake named."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from easy_jax.data import DataError, Source
from easy_jax.data.text import (
    ALPACA,
    TokenSource,
    check_vocabulary,
    load_tokenizer,
    plain_text,
    tokenize,
)

EOS, BOS = "<eos>", "<bos>"
SENTENCES = [
    ALPACA,
    "Ann has 12 apples and gives 5 of them to Bob. How many apples does she have?",
    "She has 12 - 5 = 7 apples left. The answer is 7.",
    "Übermut tut selten gut, sagte die Katze und fraß 3 Mäuse.",
]
INSTRUCTIONS = ["How many apples has Ann?", "Sum {1, 2} and {instruction}", "Or", "Zähle 日本 🙂"]
RESPONSES = ["She has 12.", " 3 {instruction}", "\nNothing", "7 apples\n"]


def bpe():
    """A byte-level BPE tokenizer that splits digits, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return bpe()


def ids_of(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def prompt_of(instruction):
    before, after = ALPACA.split("{instruction}")
    return before + instruction + after


# Tokenisation.


def test_alpaca_template():
    assert ALPACA == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    )


@pytest.mark.parametrize("bos", [None, BOS])
def test_tokens_are_those_of_the_joined_text(tokenizer, bos):
    source = tokenize(INSTRUCTIONS, RESPONSES, tokenizer, eos_token=EOS, bos_token=bos)
    assert isinstance(source, Source) and len(source) == 4
    head = [] if bos is None else [tokenizer.token_to_id(BOS)]
    for i, (instruction, response) in enumerate(zip(INSTRUCTIONS, RESPONSES, strict=True)):
        record = source[i]
        expected = head + ids_of(tokenizer, prompt_of(instruction) + response + EOS)
        start = len(head) + len(ids_of(tokenizer, prompt_of(instruction)))
        assert record["tokens"].dtype == np.int32 and record["target_start"].dtype == np.int32
        assert record["tokens"].tolist() == expected
        assert record["target_start"].shape == () and record["target_start"] == start
        targets = expected[start:]
        assert tokenizer.decode(targets, skip_special_tokens=False) == response + EOS
        assert targets[-1] == source.eos_id == tokenizer.token_to_id(EOS)
        assert source.lengths[i] == len(expected) and source.num_targets[i] == len(targets)
    assert source.lengths.dtype == source.num_targets.dtype == np.int64
    assert len(list(source)) == 4 and source[-1]["tokens"].tolist() == expected
    with pytest.raises(IndexError):
        source[4]


def test_more_examples_than_are_encoded_at_a_time(tokenizer, monkeypatch):
    whole = tokenize(INSTRUCTIONS, RESPONSES, tokenizer, eos_token=EOS)
    monkeypatch.setattr("easy_jax.data.text._SLICE", 3)
    assert tokenize(INSTRUCTIONS, RESPONSES, tokenizer, eos_token=EOS).fingerprint() == (
        whole.fingerprint()
    )


def test_truncation_cuts_the_end_and_counts(tokenizer):
    full = [ids_of(tokenizer, f"Q: {q} A:{r}{EOS}") for q, r in zip("abcd", RESPONSES, strict=True)]
    lengths = sorted(map(len, full))
    limit = lengths[1]
    source = tokenize(
        list("abcd"),
        RESPONSES,
        tokenizer,
        eos_token=EOS,
        template="Q: {instruction} A:",
        max_length=limit,
    )
    for i, ids in enumerate(full):
        assert source[i]["tokens"].tolist() == ids[:limit]
    over = [length - limit for length in lengths if length > limit]
    assert (source.num_truncated, source.num_cut_tokens) == (len(over), sum(over))
    assert source.max_length == limit
    cut = next(i for i, ids in enumerate(full) if len(ids) > limit)
    assert source.eos_id not in source[cut]["tokens"]
    total, targets = len(source.tokens), int(source.num_targets.sum())
    assert source.describe() == (
        f"4 examples, {total} tokens, {targets} targets; {len(over)} examples cut to {limit} "
        f"tokens, {sum(over)} tokens lost; 0 borders of prompt and response within a token"
    )


def test_no_target_left_after_truncation(tokenizer):
    instructions = ["short", "a very much longer instruction " * 4, "short"]
    prompts = [len(ids_of(tokenizer, f"{text}:")) for text in instructions]

    def run(max_length):
        return tokenize(
            instructions,
            ["yes"] * 3,
            tokenizer,
            eos_token=EOS,
            template="{instruction}:",
            max_length=max_length,
        )

    assert run(prompts[1] + 1).num_targets[1] == 1
    with pytest.raises(
        DataError,
        match=rf"1 of 3 examples: no target token within max_length {prompts[1]} \(1\): id 1 "
        rf"\[{prompts[1]} prompt tokens\]",
    ):
        run(prompts[1])


def test_placeholder_is_replaced_once(tokenizer):
    template = '{"q": {instruction}, {0} {}}'
    source = tokenize(
        ["{instruction} {x}"], ["{instruction}"], tokenizer, eos_token=EOS, template=template
    )
    assert tokenizer.decode(source[0]["tokens"].tolist(), skip_special_tokens=False) == (
        '{"q": {instruction} {x}, {0} {}}{instruction}' + EOS
    )


@pytest.mark.parametrize("template", ["no placeholder", "{instruction} {instruction}", ""])
def test_bad_template(tokenizer, template):
    with pytest.raises(DataError, match=r"must have \{instruction\} once: " + repr(template)[:5]):
        tokenize(["a"], ["b"], tokenizer, eos_token=EOS, template=template)


def test_bad_texts(tokenizer):
    with pytest.raises(DataError, match=r"2 of 4 examples: blank response \(2\): id 1, id 2\. "):
        tokenize(["a"] * 4, ["b", "", " \n\t", "c"], tokenizer, eos_token=EOS)
    with pytest.raises(DataError, match=r"1 instructions for 2 responses"):
        tokenize(["a"], ["b", "c"], tokenizer, eos_token=EOS)
    with pytest.raises(DataError, match=r"empty"):
        tokenize([], [], tokenizer, eos_token=EOS)
    with pytest.raises(DataError, match=r"response is null, not a string \(1\): id 1"):
        tokenize(["a", "b"], ["b", None], tokenizer, eos_token=EOS)
    with pytest.raises(DataError, match=r"instruction is not Unicode \(1\): id 0"):
        tokenize(["\ud800"], ["b"], tokenizer, eos_token=EOS)
    with pytest.raises(DataError, match=r"no token before the target: use a prompt .*: id 0"):
        tokenize([""], ["b"], tokenizer, eos_token=EOS, template="{instruction}")
    with pytest.raises(DataError, match=r"border is 'merged'; it must be one of \['joined', "):
        tokenize(["a"], ["b"], tokenizer, eos_token=EOS, border="merged")


def test_bad_special_tokens(tokenizer):
    with pytest.raises(DataError, match=r"EOS token '<end>' is not in the tokenizer's vocab"):
        tokenize(["a"], ["b"], tokenizer, eos_token="<end>")
    with pytest.raises(DataError, match=r"BOS token '<s>' is not in the tokenizer's vocab"):
        tokenize(["a"], ["b"], tokenizer, eos_token=EOS, bos_token="<s>")
    # In the vocabulary, yet never read as one token: it was not added.
    vocab = {"a": 0, "b": 1, "</s>": 2, "/": 3}
    bare = Tokenizer(models.BPE(vocab, []))
    with pytest.raises(DataError, match=r"'</s>' is not read as one token"):
        tokenize(["a", "b"], ["b", "a"], bare, eos_token="</s>", template="{instruction}")


def test_vocabulary_of_another_model(tokenizer):
    source = TokenSource([1, 7, 3], [0, 3], [1])
    check_vocabulary(source, 8)
    check_vocabulary(7, 8)
    for data in (source, 7):
        with pytest.raises(DataError, match=r"token id 7.*, the model a vocabulary of 7: .*belong"):
            check_vocabulary(data, 7)


def test_fingerprint(tokenizer):
    source = tokenize(INSTRUCTIONS, RESPONSES, tokenizer, eos_token=EOS)
    again = tokenize(INSTRUCTIONS, RESPONSES, bpe(), eos_token=EOS)
    assert source.fingerprint() == again.fingerprint()
    prints = {source.fingerprint()}
    for name, place in (("tokens", 5), ("offsets", 1), ("target_start", 2)):
        fields = {key: array.copy() for key, array in source.identity.items()}
        fields[name][place] += 1
        prints.add(TokenSource(**fields).fingerprint())
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (([], [0], []), r"the data set is empty"),
        (([1, 2], [0, 1], [1]), r"offsets must be 2, from 0 to 2"),
        (([1, 2], [0, 1, 2], [1]), r"offsets must be 2"),
        (([1] * 6, [0, 4, 2, 6], [1, 1, 1]), r"1 examples, ids \[1\]: offsets decrease"),
        (([1] * 6, [0, 2, 4, 6], [0, 1, 0]), r"2 examples, ids \[0, 2\]: no token before"),
        (([1] * 6, [0, 2, 4, 6], [1, 1, 2]), r"1 examples, ids \[2\]: no target token"),
        (([1.5, 2], [0, 2], [1]), r"tokens has dtype float64"),
        (([[1, 2]], [0, 2], [1]), r"tokens has dtype int64, shape \(1, 2\)"),
        (([-1, 2], [0, 2], [1]), r"tokens goes from -1 to 2"),
        (([1, 2**31], [0, 2], [1]), r"tokens goes from 1 to 2147483648; use int32"),
    ],
)
def test_arrays_that_do_not_fit(arrays, message):
    with pytest.raises(DataError, match=message):
        TokenSource(*arrays)


def test_example_longer_than_max_length():
    with pytest.raises(DataError, match=r"ids \[1\]: more than max_length 2 tokens"):
        TokenSource([1] * 5, [0, 2, 5], [1, 1], max_length=2)


TEXT = st.text(max_size=20)
_RANDOM = bpe()


@pytest.mark.slow
@settings(deadline=None, max_examples=40, database=None)
@given(
    st.lists(st.tuples(TEXT, TEXT.filter(lambda text: text.strip())), min_size=1, max_size=5),
    st.integers(30, 60),
)
def test_random_texts(pairs, max_length):
    instructions, responses = (list(column) for column in zip(*pairs, strict=True))
    instructions = [f"Q{text}" for text in instructions]  # none is blank
    full = [ids_of(_RANDOM, f"{q}\n{r}{EOS}") for q, r in zip(instructions, responses, strict=True)]
    starts = [len(ids_of(_RANDOM, f"{q}\n")) for q in instructions]
    bad = [
        i
        for i, (start, ids) in enumerate(zip(starts, full, strict=True))
        if start >= min(len(ids), max_length)
    ]
    arguments = {
        "eos_token": EOS,
        "template": "{instruction}\n",
        "max_length": max_length,
        "border": "authors",
    }
    if bad:
        places = ", ".join(f"id {i} [{starts[i]} prompt tokens]" for i in bad)
        with pytest.raises(DataError, match=re.escape(places)):
            tokenize(instructions, responses, _RANDOM, **arguments)
        return
    source = tokenize(instructions, responses, _RANDOM, **arguments)
    assert source.offsets.tolist() == np.cumsum([0, *source.lengths]).tolist()
    assert source.target_start.tolist() == starts
    assert [record["tokens"].tolist() for record in source] == [ids[:max_length] for ids in full]
    assert len(source.tokens) + source.num_cut_tokens == sum(map(len, full))
    assert (source.num_targets == source.lengths - starts).all()


# Text without instructions.


@pytest.mark.parametrize(("length", "eos", "bos"), [(7, None, None), (7, EOS, BOS), (2, None, BOS)])
def test_plain_text_is_one_stream(tokenizer, length, eos, bos):
    texts = [SENTENCES[1], "", SENTENCES[3]]
    stream = [t for text in texts if text for t in ids_of(tokenizer, text + (eos or ""))]
    source = plain_text(texts, tokenizer, length=length, eos_token=eos, bos_token=bos)
    head = [tokenizer.token_to_id(bos)] if bos else []
    pieces = [record["tokens"].tolist() for record in source]
    assert all(len(piece) == length for piece in pieces[:-1]) and 2 <= len(pieces[-1]) <= length
    assert all(piece[: len(head)] == head for piece in pieces)
    rest = [t for piece in pieces for t in piece[len(head) :]]
    assert rest == stream[: len(rest)]
    assert len(stream) - len(rest) == source.num_cut_tokens <= 1
    assert (source.target_start == 1).all() and source.max_length == length


def test_plain_text_last_piece(tokenizer):
    words = ids_of(tokenizer, "77777")  # digits are split
    assert len(words) == 5
    source = plain_text(["77777"], tokenizer, length=3)
    assert source.lengths.tolist() == [3, 2] and source.num_cut_tokens == 0
    source = plain_text(["77777"], tokenizer, length=2)
    assert source.lengths.tolist() == [2, 2] and source.num_cut_tokens == 1


def test_bad_plain_text(tokenizer):
    with pytest.raises(DataError, match=r"empty"):
        plain_text([], tokenizer, length=4)
    for texts in (["", ""], ["7"]):
        with pytest.raises(DataError, match=r"the texts have [01] tokens: too few"):
            plain_text(texts, tokenizer, length=4)
    with pytest.raises(DataError, match=r"length is 1; a piece needs at least 2"):
        plain_text(["77"], tokenizer, length=1)


# Tokenizer files.


def test_tokenizer_file_neither_cuts_nor_pads(tokenizer, tmp_path):
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(3)
    cutting.enable_padding(length=50)
    cutting.save(str(tmp_path / "tokenizer.json"))
    expected = ids_of(tokenizer, SENTENCES[1])
    for path in (tmp_path, str(tmp_path / "tokenizer.json")):
        assert ids_of(load_tokenizer(path), SENTENCES[1]) == expected
    # A tokenizer from elsewhere is treated alike, and left as it is.
    prints = [
        tokenize(INSTRUCTIONS, RESPONSES, one, eos_token=EOS).fingerprint()
        for one in (tokenizer, cutting)
    ]
    assert prints[0] == prints[1]
    assert len(ids_of(cutting, SENTENCES[1])) == 50


def test_bad_tokenizer_file(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json does not exist; only the fast format"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"other\.json does not exist"):
        load_tokenizer(tmp_path / "other.json")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer .*only the fast"):
        load_tokenizer(tmp_path)
