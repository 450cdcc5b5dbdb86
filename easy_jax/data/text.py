"""Text: instruction/response pairs from files, tokenised into flat arrays."""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from tokenizers import Encoding, Tokenizer

from easy_jax.data import text_columns
from easy_jax.data.bad_examples import BadExamples, tell
from easy_jax.data.config import ALPACA, ALPACA_INPUT
from easy_jax.data.records import not_text, read_jsonl, read_parquet, read_tfds
from easy_jax.data.sources import DataError
from easy_jax.data.token_source import BORDERS, TokenSource, check_vocabulary
from easy_jax.data.tokenizer import bare, load_tokenizer, own_start, token_id, whole

__all__ = [
    "ALPACA",
    "ALPACA_INPUT",
    "BadExamples",
    "Border",
    "DataError",
    "TokenSource",
    "check_vocabulary",
    "load_tokenizer",
    "plain_text",
    "read_jsonl",
    "read_parquet",
    "read_tfds",
    "tokenize",
]

_INSTRUCTION, _INPUT = "{instruction}", "{input}"
_SLICE = 4096  # texts at a time, because encodings take far more memory than their ids

Border = Literal["joined", "apart", "authors"]


def tokenize(
    instructions: Sequence[str],
    responses: Sequence[str],
    tokenizer: Tokenizer,
    *,
    eos_token: str,
    template: str = ALPACA,
    inputs: Sequence[str | None] | None = None,
    input_template: str = "",
    weights: Sequence[float] | None = None,
    token_weights: Sequence[Sequence[float]] | None = None,
    max_length: int = 1024,
    bos_token: str | None = None,
    border: Border = "joined",
    bad: BadExamples | None = None,
) -> TokenSource:
    """Tokenises prompts and responses with an EOS; the responses and the EOS are the targets.

    Only the special tokens given here are added. Long examples are cut at the end and lose
    their EOS. An example's id is its position, even if others are left out (`bad`).

    Args:
      instructions, responses: texts, in equal number.
      tokenizer: the model's.
      eos_token: an added token of the tokenizer, put after every response without one.
      template: of the prompt, with `{instruction}` once; other braces have no meaning.
      inputs: the inputs that some instructions refer to; None or blank for the others.
      input_template: of prompts with an input, with `{instruction}` and `{input}` once each;
        default: Alpaca's, if `template` is Alpaca's.
      weights: multiplied into the training weights; at least 0.
      token_weights: for every example a list with a weight for each target token (the response's
        and the EOS, those within `max_length`), multiplied into the weights of tokens.
      max_length: the maximal number of tokens of an example.
      bos_token: put first, as part of the prompt; default: none.
      border: of prompt and response. `joined`: they are tokenised as one text, and all tokens
        with a character of the response are targets, even one that begins in the prompt.
        `authors`: also as one text, but the targets start after as many tokens as the prompt has
        by itself, as in the FLOW authors' code, so a token across the border is not a target.
        `apart`: the prompt and the response with its EOS are tokenised separately.
      bad: the known problems of the examples, and what to do about them. By default, unusable
        examples are refused in one message; `BadExamples("drop")` leaves them out.

    Raises:
      DataError: unusable examples: not text, blank responses, no token before the first target,
        no target within `max_length`, weights that are not numbers, a list of token weights of
        another length; or a template without its placeholders, or a token that the tokenizer
        does not have.

    Warns:
      DataWarning: examples left out; or what may be a mistake: blank instructions, responses
        that end in the EOS, control tokens in the texts, a BOS twice or not at all.

    Example:
      >>> from tokenizers import models, pre_tokenizers
      >>> tokenizer = Tokenizer(models.WordLevel({"2": 0, "+": 1, "=": 2, "4": 3}, "?"))
      >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> _ = tokenizer.add_special_tokens(["<eos>"])
      >>> source = tokenize(["2 + 2"], ["4"], tokenizer, eos_token="<eos>",
      ...                   template="{instruction} =")
      >>> source[0]["tokens"].tolist(), int(source[0]["target_start"])
      ([0, 1, 0, 2, 3, 4], 4)
    """
    if border not in BORDERS:
        raise DataError(f"border is {border!r}; it must be one of {list(BORDERS)}")
    bad = BadExamples() if bad is None else bad
    size = len(instructions)
    inputs = [None] * size if inputs is None else inputs
    templates = _templates(template, input_template, any(inputs))
    text_columns.check(instructions, responses, inputs, weights, token_weights, bad)
    eos_id = token_id(tokenizer, eos_token, "EOS")
    bos = [] if bos_token is None else [token_id(tokenizer, bos_token, "BOS")]
    answers = _answers(responses, eos_token, bad)
    prompts = {i: _prompt(templates, instructions[i], inputs[i]) for i in answers}

    parts = [np.zeros(0, np.int32)] * size
    start_N, full_N = np.zeros(size, np.int32), np.zeros(size, np.int64)
    merged_ids = []
    pairs = zip(prompts.values(), answers.values(), strict=True)
    encoded = _encode_pairs(tokenizer, pairs, eos_token, border)
    for i, (ids, start, merged) in zip(prompts, encoded, strict=True):
        if ids[-1:] != [eos_id]:
            raise DataError(f"{eos_token!r} is not read as one token; add it as special")
        ids, start = bos + ids, len(bos) + start
        wrong = _unusable(start, len(ids), max_length)
        if wrong := wrong or text_columns.wrong_length(token_weights, i, ids[start:max_length]):
            bad.add(i, *wrong)
            continue
        parts[i], start_N[i], full_N[i] = np.array(ids[:max_length], np.int32), start, len(ids)
        merged_ids += [i] * merged
    bad.settle(size)

    texts = {i: (instructions[i], inputs[i] or "", answers[i]) for i in answers if i not in bad}
    _warn(tokenizer, eos_token, bos, texts, responses, parts)
    return _joined(
        parts,
        start_N,
        eos_id=eos_id,
        max_length=max_length,
        num_truncated=int((full_N > max_length).sum()),
        num_cut_tokens=int(np.maximum(full_N - max_length, 0).sum()),
        weight=None if weights is None else [0.0 if i in bad else w for i, w in enumerate(weights)],
        token_weight=text_columns.ragged(token_weights, bad),
        dropped_ids=bad.ids(),
        border=border,
        merged_ids=merged_ids,
    )


def _warn(
    tokenizer: Tokenizer,
    eos_token: str,
    bos: list[int],
    texts: dict[int, tuple[str, str, str]],
    responses: Sequence[str],
    parts: list[np.ndarray],
) -> None:
    """Warns of what may be a mistake in the texts or with the BOS."""
    _tell_odd_texts(texts, responses, eos_token)
    _tell_control_tokens(tokenizer, texts, len(responses))
    _tell_bos(own_start(whole(tokenizer), eos_token), bos, {i: parts[i] for i in texts}, tokenizer)


def _tell_odd_texts(
    texts: dict[int, tuple[str, str, str]], responses: Sequence[str], eos_token: str
) -> None:
    """Warns about responses that end in the EOS, and about blank instructions."""
    size = len(responses)
    ended = [i for i, (_, _, answer) in texts.items() if answer != responses[i]]
    tell(size, ended, f"the response ends in {eos_token!r} already; it is put there once")
    blank = [i for i, (instruction, _, _) in texts.items() if not instruction.strip()]
    tell(size, blank, "the instruction is blank; the prompt is the template alone")


def _templates(template: str, input_template: str, needed: bool) -> tuple[str, str]:
    """Returns the templates without and with an input, after checking them."""
    if template.count(_INSTRUCTION) != 1:
        raise DataError(f"a template must have {_INSTRUCTION} once: {template!r}")
    if not input_template and template == ALPACA:
        input_template = ALPACA_INPUT
    counts = [input_template.count(place) for place in (_INSTRUCTION, _INPUT)]
    if (needed or input_template) and counts != [1, 1]:
        raise DataError(
            f"an input_template must have {_INSTRUCTION} and {_INPUT} once each: {input_template!r}"
        )
    return template, input_template


def _prompt(templates: tuple[str, str], instruction: str, source: str | None) -> str:
    # Not str.format, because templates and texts may contain other braces.
    if not (source or "").strip():
        return templates[0].replace(_INSTRUCTION, instruction)
    values = {_INSTRUCTION: instruction, _INPUT: source}
    parts = re.split(f"({'|'.join(map(re.escape, values))})", templates[1])
    return "".join(values.get(part) or part for part in parts)


def _answers(responses: Sequence[str], eos_token: str, bad: BadExamples) -> dict[int, str]:
    """Returns the usable responses by id, without an EOS at the end and what follows it."""
    answers = {}
    for i in range(len(responses)):
        if i in bad:
            continue
        answers[i] = responses[i]
        while answers[i].rstrip().endswith(eos_token):
            answers[i] = answers[i].rstrip().removesuffix(eos_token)
        if not answers[i].strip():
            bad.add(i, "blank response")
    return {i: answer for i, answer in answers.items() if i not in bad}


def _unusable(start: int, length: int, max_length: int) -> tuple[str, str] | None:
    """Returns why an example has no first target, at `start`, or nothing before it; or None."""
    if start == 0:
        return "no token before the target: use a prompt or a BOS token", ""
    if start >= length:
        return (
            "no more tokens with the response than without: it merges with the end of the prompt; "
            "end the template in another way"
        ), ""
    if start >= max_length:
        return f"no target token within max_length {max_length}", f"{start} prompt tokens"
    return None


def _encode_pairs(
    tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], eos_token: str, border: str
) -> Iterator[tuple[list[int], int, bool]]:
    """Yields the token ids of prompt, response and EOS, the position of the first target, and
    whether that token (of the joined text) begins in the prompt."""
    tokenizer = bare(tokenizer)
    normalizes = tokenizer.normalizer is not None
    pairs = iter(pairs)
    while part := list(itertools.islice(pairs, _SLICE)):
        prompts = [prompt for prompt, _ in part]
        ends = [response + eos_token for _, response in part]
        encode = functools.partial(tokenizer.encode_batch, add_special_tokens=False)
        alone = encode(prompts) if border != "joined" else []
        if border == "apart":
            for prompt, end in zip(alone, encode(ends), strict=True):
                yield prompt.ids + end.ids, len(prompt.ids), False
            continue
        joined = encode([text + end for text, end in zip(prompts, ends, strict=True)])
        for number, encoding in enumerate(joined):
            place = len(prompts[number])
            # A normalizer may merge the prompt's last character and an accent after it.
            accent = normalizes and unicodedata.combining(ends[number][0]) > 0
            start, merged = _first_target(encoding, place, place - accent)
            yield encoding.ids, len(alone[number].ids) if alone else start, merged


def _first_target(joined: Encoding, border: int, first: int) -> tuple[int, bool]:
    """Returns the first token that reaches `first`, and whether it begins before the border.

    The bytes of one character may be several tokens. These have the offsets of the character, or
    empty ones at its position.
    """
    for position, (start, end) in enumerate(joined.offsets):
        if start >= first or end > first:
            return position, start < border
    raise AssertionError("the EOS is behind the border")


def _tell_control_tokens(
    tokenizer: Tokenizer, texts: Mapping[int, tuple[str, ...]], size: int
) -> None:
    """Warns about control tokens in the texts; a template may have them."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    added = tokenizer.get_added_tokens_decoder().values()
    control = [token.content for token in added if token.special and token.content != unknown]
    if not control:
        return
    pattern = re.compile("|".join(map(re.escape, control)))
    found = {i: pattern.findall("\n".join(parts)) for i, parts in texts.items()}
    tokens = sorted(set(itertools.chain.from_iterable(found.values())))
    tell(
        size,
        [i for i, some in found.items() if some],
        f"the text has {tokens[:5]}, which are read as control tokens, not as text",
    )


def _tell_bos(
    own: list[int], bos: list[int], parts: Mapping[int, np.ndarray], tokenizer: Tokenizer
) -> None:
    """Warns about examples without the tokens that the tokenizer begins a text with, or with
    these tokens twice."""
    start = own or bos
    if not start:
        return
    names = [tokenizer.id_to_token(token) for token in start]
    begins = {i: ids[: 2 * len(start)].tolist() for i, ids in parts.items()}
    without = [i for i, ids in begins.items() if ids[: len(start)] != start]
    tell(
        len(parts),
        without,
        f"the tokenizer begins a text with {names}, these do not; set bos_token",
    )
    twice = [i for i, ids in begins.items() if ids == 2 * start]
    tell(
        len(parts),
        twice,
        f"they begin with {names} twice; leave it out of the template or bos_token",
    )


def plain_text(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    eos_token: str | None = None,
    bos_token: str | None = None,
) -> TokenSource:
    """Tokenises documents as one stream in pieces of `length`, for the perplexity of a text.

    All tokens except the first of a piece are targets. The last piece may be shorter; if it then
    has no target, its token is counted as cut.

    Args:
      texts: the documents; empty ones have no tokens.
      tokenizer: the model's.
      length: tokens of a piece, at least 2.
      eos_token: put after every document that has tokens; default: none.
      bos_token: put before every piece, as one of its tokens; default: none.

    Raises:
      DataError: fewer than 2 tokens, or a token the tokenizer does not have.

    Example:
      >>> from tokenizers import models, pre_tokenizers
      >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "?"))
      >>> tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> source = plain_text(["a b b", "a a"], tokenizer, length=3)
      >>> [record["tokens"].tolist() for record in source]
      [[0, 1, 1], [0, 0]]
    """
    if length < 2:
        raise DataError(f"length is {length}; a piece needs at least 2 tokens")
    if not len(texts):
        raise DataError("the data set is empty: it has no examples")
    bad = BadExamples()
    for i, one in enumerate(texts):
        if wrong := not_text(one):
            bad.add(i, f"text is {wrong[0]}", wrong[1])
    bad.settle(len(texts))
    eos = [] if eos_token is None else [token_id(tokenizer, eos_token, "EOS")]
    bos = [] if bos_token is None else [token_id(tokenizer, bos_token, "BOS")]
    documents = [np.array(ids + eos, np.int32) for ids in _encode(tokenizer, texts) if ids]
    stream = np.concatenate([*documents, np.zeros(0, np.int32)])
    body = length - len(bos)
    starts = range(0, len(stream), body)
    pieces = [np.append(bos, stream[i : i + body]).astype(np.int32) for i in starts]
    cut = int(bool(pieces) and len(pieces[-1]) < 2)
    pieces = pieces[: len(pieces) - cut]
    if not pieces:
        raise DataError(f"the texts have {len(stream)} tokens: too few for a target")
    own = own_start(whole(tokenizer), next(filter(None, texts))[:100])
    _tell_bos(own, bos, dict(enumerate(pieces)), tokenizer)
    return _joined(
        pieces,
        np.ones(len(pieces), np.int32),
        eos_id=eos[0] if eos else None,
        max_length=length,
        num_cut_tokens=cut,
    )


def _joined(parts: list[np.ndarray], target_start: np.ndarray, **rest: Any) -> TokenSource:
    offsets = np.cumsum([0, *map(len, parts)])
    return TokenSource(np.concatenate(parts), offsets, target_start, **rest)


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    tokenizer = whole(tokenizer)
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)
    texts = iter(texts)
    while part := list(itertools.islice(texts, _SLICE)):
        for encoding in encode(part, add_special_tokens=False):
            yield encoding.ids
