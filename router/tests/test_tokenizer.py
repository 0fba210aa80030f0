"""The tokenizer: what goes in comes out, token by token, whatever the tokens."""

import codecs
import itertools
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bros_router.tokenizer import Tokenizer, TokenizerError, byte_offsets

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Text that holds no U+FFFD itself: one that ends a reply cannot be told from an incomplete character.
texts = st.text(st.characters(exclude_characters=REPLACEMENT, exclude_categories=["Cs"]), max_size=40)
fixtures_are_immutable = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["byte_level_tokenizer", "sentencepiece_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    """The whole decoded at once: one context, nothing before it."""
    text: str = tokenizer._tokenizer.decode(token_ids, skip_special_tokens=False)
    return text


@fixtures_are_immutable
@given(text=texts, share=st.floats(0, 1))
@example(text="你好 hello", share=0.0)
@example(text="🙂🙂🙂", share=0.7)
@example(text="hello  world", share=0.5)
def test_steps_give_the_text_behind_the_prompt(tokenizer: Tokenizer, text: str, share: float):
    token_ids = tokenizer.encode(text).ids
    num_prompt_tokens = max(1, int(share * len(token_ids)))
    # A prompt is whole text, so it ends with a whole character.
    while decode(tokenizer, token_ids[:num_prompt_tokens]).endswith(REPLACEMENT):
        num_prompt_tokens += 1
    prompt, reply = token_ids[:num_prompt_tokens], token_ids[num_prompt_tokens:]
    detokenizer = tokenizer.detokenizer(prompt)
    steps = [detokenizer.step(token_id) for token_id in reply]
    assert decode(tokenizer, prompt) + "".join(steps) == decode(tokenizer, token_ids)
    assert all(REPLACEMENT not in step for step in steps)


@fixtures_are_immutable
@given(data=st.data(), prompt=texts)
def test_any_byte_level_tokens_come_out_as_their_bytes(
    byte_level_tokenizer: Tokenizer, data: st.DataObject, prompt: str
):
    """Against Python's incremental UTF-8 decoder, which too holds back what is incomplete and nothing else."""
    detokenizer = byte_level_tokenizer.detokenizer(byte_level_tokenizer.encode(prompt).ids)
    oracle = codecs.getincrementaldecoder("utf-8")(errors="replace")
    token_ids = data.draw(st.lists(st.integers(2, byte_level_tokenizer.vocab_size - 1), max_size=30))
    given_text = expected_text = ""
    for token_id in token_ids:
        given_text += detokenizer.step(token_id)
        expected_text += oracle.decode(token_bytes(byte_level_tokenizer, token_id))
        assert expected_text.startswith(given_text)
    last = byte_level_tokenizer.encode("a", add_special_tokens=False).ids[0]
    assert given_text + detokenizer.step(last) == expected_text + oracle.decode(b"a")


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes a byte-level token stands for: GPT-2's table, computed as it was published."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    token: str = tokenizer._tokenizer.id_to_token(token_id)
    return bytes(table[character] for character in token)


@fixtures_are_immutable
@given(data=st.data())
def test_random_tokens_never_raise_and_are_never_held_for_long(tokenizer: Tokenizer, data: st.DataObject):
    """Ids that the vocabulary lacks included: a model's output layer may be wider."""
    ids = st.integers(0, tokenizer.vocab_size + 3)
    detokenizer = tokenizer.detokenizer(data.draw(st.lists(ids, min_size=1, max_size=8)))
    for token_id in data.draw(st.lists(ids, max_size=40)):
        detokenizer.step(token_id)
        assert len(detokenizer._pending) <= 6


def test_incomplete_characters_wait_for_their_last_byte(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("🙂", add_special_tokens=False).ids[-4:]
    detokenizer = tokenizer.detokenizer(tokenizer.encode("hello").ids)
    *waiting, last = [detokenizer.step(token_id) for token_id in token_ids]
    assert (waiting[-1], last) == ("", "🙂")


def test_endless_invalid_bytes_come_out_as_they_go(byte_level_tokenizer: Tokenizer):
    detokenizer = byte_level_tokenizer.detokenizer(byte_level_tokenizer.encode("hello").ids)
    continuation_byte = byte_level_tokenizer.token_id("Ģ")  # 0x80
    assert continuation_byte is not None
    steps = [detokenizer.step(continuation_byte) for _ in range(1000)]
    assert "".join(steps) == REPLACEMENT * 997


def test_prompt_that_ends_in_a_replacement_character_is_not_repeated(tokenizer: Tokenizer):
    detokenizer = tokenizer.detokenizer(tokenizer.encode(f"hello{REPLACEMENT}").ids)
    assert detokenizer.step(tokenizer.encode("w", add_special_tokens=False).ids[-1]).strip() == "w"


def test_special_tokens_come_out_as_text(tokenizer: Tokenizer):
    detokenizer = tokenizer.detokenizer(tokenizer.encode("hello").ids)
    eos_id = tokenizer.token_id("</s>")
    assert eos_id is not None
    assert tokenizer.is_special(eos_id)
    assert detokenizer.step(eos_id) == "</s>"


@fixtures_are_immutable
@given(text=texts, num_tokens=st.integers(1, 60))
def test_truncation_keeps_bos_and_the_end(tokenizer: Tokenizer, text: str, num_tokens: int):
    content = tokenizer.encode(text, add_special_tokens=False).ids
    kept = content[max(0, len(content) - (num_tokens - 1)) :]
    assert tokenizer.encode_truncated(text, num_tokens).ids == [0, *kept]


@fixtures_are_immutable
@given(text=texts)
def test_truncation_that_cuts_nothing_changes_nothing(tokenizer: Tokenizer, text: str):
    assert tokenizer.encode_truncated(text, 10_000).ids == tokenizer.encode(text).ids


@given(text=texts)
def test_byte_offsets_agree_with_utf8(text: str):
    offsets = byte_offsets(text)
    data = text.encode()
    assert [data[start:stop].decode() for start, stop in itertools.pairwise(offsets)] == list(text)
    assert offsets[-1] == len(data)


def test_a_file_that_is_no_tokenizer_is_refused_by_name_alone(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"^tokenizer\.json: "):
        Tokenizer(path)
