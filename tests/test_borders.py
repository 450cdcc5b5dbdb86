"""The border of prompt and response: which tokens are targets, also where one merges over it."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from easy_jax.data import DataError
from easy_jax.data.text import tokenize

EOS = "<eos>"
SENTENCES = [
    "Q: Is it so? A: Yes, it is.",
    "Q: Who? A: You, yes. The answer is no.",
    "def f():\n    return x",
    "### Response:: see http://www.x.org ://",
    "\n\n\n\n    \n\n",
    "é è 日本 🙂🙂 🤖 ½",
]


def bpe(trim=False, **options):
    """A byte-level BPE tokenizer; its tokens spell bytes, one character each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


TOKENIZERS = {
    "plain": bpe(),
    "trimmed": bpe(trim=True),  # spaces are not in the extents that it gives tokens
    "no words": bpe(trim=True, use_regex=False),  # tokens across spaces and lines
}


def _pieces(tokenizer, source, i=0):
    """The tokens of the prompt and those of the targets, spelt out."""
    tokens, start = source[i]["tokens"].tolist(), int(source[i]["target_start"])
    words = [tokenizer.id_to_token(token).replace("Ġ", " ").replace("Ċ", "\n") for token in tokens]
    return words[:start], words[start:]


def _run(tokenizer, template, response, instruction="Is it so?", **options):
    return tokenize(
        [instruction], [response], tokenizer, eos_token=EOS, template=template, **options
    )


@pytest.mark.parametrize("kind", ["plain", "trimmed"])
def test_a_token_that_merges_over_the_border_is_a_target(kind):
    tokenizer = TOKENIZERS[kind]
    source = _run(tokenizer, "Q: {instruction} A: ", "Yes")
    prompt, targets = _pieces(tokenizer, source)
    assert "".join(prompt).endswith("so? A:") and targets == [" Yes", EOS]
    assert source.merged_ids.tolist() == [0]
    assert source.describe().endswith(
        "; 1 borders of prompt and response within a token, a target: ids [0]"
    )
    # The authors' way: the prompt alone has a token more, for its space, so EOS is what is left.
    theirs = _run(tokenizer, "Q: {instruction} A: ", "Yes", border="authors")
    assert _pieces(tokenizer, theirs)[1] == [EOS]
    assert theirs.tokens.tolist() == source.tokens.tolist()
    assert theirs.merged_ids.tolist() == [0] and theirs.fingerprint() != source.fingerprint()
    assert theirs.describe().endswith(" within a token, no target: ids [0]")
    # Apart: the prompt as it is on its own, and so the response.
    apart = _run(tokenizer, "Q: {instruction} A: ", "Yes", border="apart")
    prompt, targets = _pieces(tokenizer, apart)
    assert "".join(prompt) == "Q: Is it so? A: " and "".join(targets) == "Yes" + EOS
    assert apart.merged_ids.size == 0
    assert apart.describe().endswith("; 0 borders of prompt and response within a token")


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("template", "response"),
    [
        ("Q: {instruction} A:", "Yes"),
        ("{instruction} Response:", "://www.x.org"),
        ("{instruction} Response:", ":: see"),
        ("{instruction}\n", "\n\nYes"),
        ("{instruction}\n", "    return x"),
        ("Q: {instruction} 🙂", "🙂🤖"),
        ("Q: {instruction} A: ", " 🤖 é"),
        ("{instruction}", "\u200d日本"),
        ("{instruction} ", "   ½ "),
    ],
)
def test_every_byte_of_the_response_is_in_a_target(kind, template, response):
    _check_bytes(TOKENIZERS[kind], template, "Is it so?", response)


TEXT = st.text(st.sampled_from("aeYs Qé日🙂🤖½:?/\n.A\u200d"), max_size=8)


@pytest.mark.slow
@settings(deadline=None, max_examples=150, database=None)
@given(st.sampled_from(sorted(TOKENIZERS)), TEXT, TEXT.filter(str.strip))
def test_every_byte_of_a_random_response_is_in_a_target(kind, end, response):
    _check_bytes(TOKENIZERS[kind], "Q{instruction}" + end, "?", response)


def _check_bytes(tokenizer, template, instruction, response):
    """By counting bytes, which a byte-level token has as many of as its name has characters."""
    source = _run(tokenizer, template, response, instruction)
    prompt = template.replace("{instruction}", instruction)
    tokens = source[0]["tokens"].tolist()
    joined = tokenizer.encode(prompt + response + EOS, add_special_tokens=False)
    assert tokens == joined.ids and tokens[-1] == source.eos_id
    ends = np.cumsum([len(tokenizer.id_to_token(token)) for token in tokens[:-1]])
    border = len(prompt.encode())
    assert ends[-1] == border + len(response.encode())
    start = int(np.argmax(ends > border))
    assert source.target_start.tolist() == [start]
    begins_before = start > 0 and ends[start - 1] < border
    assert source.merged_ids.tolist() == [0] * int(begins_before)


def test_parts_of_a_character_share_a_token_with_the_prompt():
    """Two characters whose first three bytes are alike: the tokens divide them otherwise."""
    vocab = {"ð": 0, "Ł": 1, "Ļ": 2, "Ĥ": 3, "ĥ": 4, "ĤðŁ": 5, "ðŁ": 6, "?": 7}
    tokenizer = Tokenizer(models.BPE(vocab, [("ð", "Ł"), ("Ĥ", "ðŁ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([EOS])
    source = _run(tokenizer, "?{instruction}", "🙃", instruction="🙂")
    # ? F0 9F | 99 | 82 F0 9F | 99 | 83: the third of them has bytes of both.
    assert source.tokens.tolist() == [7, 6, 2, 5, 2, 4, tokenizer.token_to_id(EOS)]
    assert source.target_start.tolist() == [3] and source.merged_ids.tolist() == [0]


def test_bytes_without_a_word_of_their_own():
    """Byte fallback, as in SentencePiece models, with a space put first and spaces replaced."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"<unk>": 256, "▁": 257, "a": 258, "▁a": 259, "b": 260}
    tokenizer = Tokenizer(
        models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.add_special_tokens([EOS])
    source = _run(tokenizer, "b{instruction} ", "a🤖", instruction="🙂")
    ids = ["▁", "b", *(f"<0x{byte:02X}>" for byte in "🙂".encode()), "▁a"]
    ids += [f"<0x{byte:02X}>" for byte in "🤖".encode()]
    assert source.tokens.tolist() == [*(vocab[name] for name in ids), tokenizer.token_to_id(EOS)]
    assert source.target_start.tolist() == [6] and source.merged_ids.tolist() == [0]
    source = _run(tokenizer, "b{instruction}", "🤖", instruction="🙂")
    assert source.target_start.tolist() == [6] and source.merged_ids.size == 0


@pytest.mark.parametrize(
    ("prompt", "response", "start"),
    [
        ("ﬁ", "ﬂ x", 2),
        ("a ½ ﬁ", "½", 8),
        ("Ａ", "Ａ", 1),
        ("e", "\u0301 x", 0),
        ("xİ", "y", 3),
    ],
)
def test_a_normalizer_that_changes_lengths(prompt, response, start):
    """Compatibility forms and lower case: one character becomes several, or two become one."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {c: i for i, c in enumerate([*letters, " ", "1", "2", "⁄", "é", "\u0307", "<unk>"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_special_tokens([EOS])
    options = {"instruction": prompt, "template": "{instruction}", "response": response}
    if start == 0:
        with pytest.raises(DataError, match=r"no token before the target: .*BOS token \(1\): id 0"):
            _run(tokenizer, **options)
        return
    source = _run(tokenizer, **options)
    whole = normalizers.Lowercase().normalize_str(normalizers.NFKC().normalize_str(prompt))
    assert len(whole) == start  # one token a character, so what the prompt has on its own
    assert source.target_start.tolist() == [start] and source.merged_ids.size == 0


def test_the_first_ids_of_many():
    tokenizer = TOKENIZERS["plain"]
    responses = ["Yes", "4"] * 12
    source = tokenize(["x"] * 24, responses, tokenizer, eos_token=EOS, template="{instruction} A: ")
    assert source.merged_ids.tolist() == list(range(0, 24, 2))
    assert "; 12 borders of prompt and response within a token, a target: ids [0, 2, 4," in (
        source.describe()
    )
    assert source.describe().endswith("16, 18] ...")


def test_nothing_before_a_token_that_merges():
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b")]))
    tokenizer.add_special_tokens([EOS])

    def run(template="{instruction}", **options):
        return _run(tokenizer, template, "b", instruction="a", **options)

    with pytest.raises(DataError, match=r"1 of 1 .*: no token before the target: .* \(1\): id 0"):
        run()
    for source in (run(bos_token="<s>") for _ in range(tokenizer.add_special_tokens(["<s>"]))):
        assert source.tokens.tolist() == [5, 3, 4] and source.target_start.tolist() == [1]
        assert source.merged_ids.tolist() == [0]
    assert run("c{instruction}").target_start.tolist() == [1]
    assert run("c{instruction}", border="authors").target_start.tolist() == [2]
    assert run(border="apart").target_start.tolist() == [1]


def test_the_authors_way_refuses_a_response_that_vanishes():
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4}
    tokenizer = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "bc")]))
    tokenizer.add_special_tokens([EOS])
    # "ab" is two tokens, "abc" and EOS too: nothing is left of the response.
    with pytest.raises(DataError, match=r"merges with the end of the prompt; .* \(1\): id 0"):
        _run(tokenizer, "{instruction}b", "c", instruction="a", border="authors")


def test_the_tokenizer_given_stays_as_it_is():
    tokenizer = bpe(trim=True)
    before = tokenizer.to_str()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(tokenizer, "{instruction} A: ", "Yes")
    assert tokenizer.to_str() == before
