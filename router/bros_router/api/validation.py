"""Turning a decoded body into a valid request: every rule of the contract, in its order, in its words."""

from __future__ import annotations

import asyncio
import ctypes
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

from bros_router.api.errors import ValidationError
from bros_router.api.grammar import Grammar
from bros_router.api.guidance import vetted_grammar
from bros_router.api.service_level import ServiceLevel
from bros_router.api.types import GenerateParameters, SimpleToken
from bros_router.config import ApiConfig
from bros_router.grammars.protocol import GrammarSource
from bros_router.grammars.vetter import GrammarVetter
from bros_router.request import ValidRequest
from bros_router.service import ServedModel
from bros_router.tokenizer import Tokenizer, TokenizerError, byte_offsets
from bros_shard.protocol import MAX_BIASED_TOKENS, MAX_PROMPT_TOP_TOKENS, SamplingParams, Watermark

T = TypeVar("T")

#: TGI schedules at most this many new tokens at once, and judges a request by them alone.
NUM_JUDGED_NEW_TOKENS: Final = 1024
#: TGI has no upper bound here, but the wire to the ranks has. No useful value comes near.
_MAX_FACTOR: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class OpenAIParameters:
    """What OpenAI's clients may ask for beyond TGI's parameters. The defaults are neutral."""

    #: Replies to one prompt. Where `best_of` is more, the likeliest of so many.
    num_choices: int = 1
    presence_penalty: float = 0.0
    #: By token id.
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    #: As in `ValidRequest`; more than can be told are fewer.
    num_prompt_top_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """What a client asks for, by whichever route: a prompt, and how to go on from it, in TGI's own words."""

    #: A text, or the tokens themselves.
    inputs: str | Sequence[int]
    parameters: GenerateParameters
    #: Whether the tokenizer adds its special tokens to the text: a chat template has written them already.
    adds_special_tokens: bool = True
    #: As in `ValidRequest`.
    cuts_stop_sequences: bool = False
    openai: OpenAIParameters = OpenAIParameters()
    #: What the reply must match, where `parameters` cannot say it; `None`: as they say.
    grammar: GrammarSource | Grammar | None = None
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def num_sequences(self) -> int:
        """How many are generated."""
        return max(self.parameters.best_of or 1, self.openai.num_choices)


class Validator:
    """Checks requests: tokenises their prompts in a pool of threads, and has their grammars vetted."""

    def __init__(self, config: ApiConfig, grammars: GrammarVetter) -> None:
        self._config = config
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(config.validation_workers, thread_name_prefix="validation")

    def close(self) -> None:
        """End the threads. Prompts that wait for one are given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def check_before_admission(self, request: InferenceRequest, *, is_stream: bool) -> None:
        """The rules that are judged before a permit is taken. Raises `ValidationError`."""
        parameters = request.parameters
        num_choices, max_choices = request.openai.num_choices, self._config.max_client_batch_size
        if not 1 <= num_choices <= max_choices:
            raise ValidationError(f"`n` must be > 0 and <= {max_choices}. Given: {num_choices}")
        if is_stream:
            if parameters.best_of not in (None, 1):
                raise ValidationError("`best_of` != 1 is not supported when streaming tokens")
            if parameters.decoder_input_details:
                raise ValidationError("`decoder_input_details` == true is not supported when streaming tokens")
            return
        best_of, max_best_of = parameters.best_of or 1, self._config.max_best_of
        if best_of > 1 and max_best_of == 1:
            raise ValidationError("`best_of` != 1 is not allowed for this endpoint")
        if best_of > max_best_of:
            raise ValidationError(f"`best_of` must be > 0 and <= {max_best_of}. Given: {best_of}")

    async def validate(self, request: InferenceRequest, level: ServiceLevel, model: ServedModel) -> ValidRequest:
        """Check every other rule, those that cost nothing first.

        Raises:
            ValidationError: with the message of the first rule that is broken.
            OverloadedError: too many grammars wait to be vetted.
        """
        parameters = request.parameters
        sampling = self._sampling_params(parameters, request.openai, model.vocab_size)
        _check_inputs(request.inputs, parameters.truncate, model.max_input_tokens)
        prompt_token_ids = await self.in_thread(_prompt_token_ids, request, model)
        grammar = await self._vetted_grammar(request, model)
        num_free_tokens = model.max_total_tokens - len(prompt_token_ids)
        return ValidRequest(
            request_id=request.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            max_new_tokens=min(parameters.max_new_tokens or num_free_tokens, num_free_tokens),
            stop_sequences=tuple(parameters.stop),
            cuts_stop_sequences=request.cuts_stop_sequences,
            ignore_eos=parameters.ignore_eos,
            num_prompt_top_tokens=self._num_prompt_top_tokens(request),
            grammar=grammar,
            adapter=model.adapter_index(parameters.adapter_id),
            request_class=level.request_class,
            ttft_s=level.ttft_s,
            tpot_s=level.tpot_s,
            deadline_s=level.deadline_s,
        )

    async def tokenize(self, text: str, tokenizer: Tokenizer, *, adds_special_tokens: bool = True) -> list[SimpleToken]:
        """Every token of `text`, those that the tokenizer adds included. Raises `ValidationError`."""
        return await self.in_thread(_simple_tokens, text, tokenizer, adds_special_tokens)

    async def in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that takes as long as a prompt has tokens."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _vetted_grammar(self, request: InferenceRequest, model: ServedModel) -> str | None:
        grammar = request.grammar or request.parameters.grammar
        if grammar is None:
            return None
        if request.parameters.ignore_eos:
            raise ValidationError("`ignore_eos` cannot be set with a grammar, which says where the reply ends")
        return await vetted_grammar(grammar, self._grammars, model.guided)

    def _num_prompt_top_tokens(self, request: InferenceRequest) -> int | None:
        """TGI says nothing of a prompt unless the server was started for it."""
        if not self._config.enable_prefill_logprobs:
            return None
        if request.parameters.decoder_input_details:
            return 0
        wished = request.openai.num_prompt_top_tokens
        return None if wished is None else min(wished, MAX_PROMPT_TOP_TOKENS)

    def _sampling_params(
        self, parameters: GenerateParameters, openai: OpenAIParameters, vocab_size: int
    ) -> SamplingParams:
        """The rules on parameters alone. TGI holds 32-bit floats, so they are what is judged and sent on."""
        best_of = parameters.best_of or 1
        warpers = (parameters.temperature, parameters.top_k, parameters.top_p, parameters.typical_p)
        if best_of > 1 and not parameters.do_sample and all(value is None for value in warpers):
            raise ValidationError("you must use sampling when `best_of` is > 1")
        temperature = _factor("temperature", parameters.temperature)
        repetition_penalty = _factor("repetition_penalty", parameters.repetition_penalty)
        frequency_penalty = _float32(parameters.frequency_penalty or 0.0)
        if not -2.0 <= frequency_penalty <= 2.0:
            raise ValidationError("`frequency_penalty` must be >= -2.0 and <= 2.0")
        presence_penalty = _float32(openai.presence_penalty)
        if not -2.0 <= presence_penalty <= 2.0:
            raise ValidationError("`presence_penalty` must be >= -2.0 and <= 2.0")
        logit_bias = _logit_bias(openai.logit_bias, vocab_size)
        top_p = _share("top_p", parameters.top_p)
        typical_p = _share("typical_p", parameters.typical_p)
        if parameters.top_k is not None and parameters.top_k <= 0:
            raise ValidationError("`top_k` must be strictly positive")
        self._check_limits(parameters)
        top_k, config = parameters.top_k or 0, self._config
        return SamplingParams(
            do_sample=parameters.do_sample or temperature != 1.0 or top_k > 0 or top_p < 1.0 or typical_p < 1.0,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            typical_p=typical_p,
            repetition_penalty=repetition_penalty,
            frequency_penalty=frequency_penalty,
            seed=secrets.randbits(64) if parameters.seed is None else parameters.seed,
            watermark=Watermark(config.watermark_gamma, config.watermark_delta) if parameters.watermark else None,
            presence_penalty=presence_penalty,
            logit_bias=logit_bias,
            num_top_tokens=parameters.top_n_tokens or 0,
        )

    def _check_limits(self, parameters: GenerateParameters) -> None:
        if parameters.max_new_tokens == 0:
            raise ValidationError("`max_new_tokens` must be strictly positive")
        num_stops, max_stops = len(parameters.stop), self._config.max_stop_sequences
        if num_stops > max_stops:
            raise ValidationError(f"`stop` supports up to {max_stops} stop sequences. Given: {num_stops}")
        if parameters.seed is not None and (parameters.best_of or 1) > 1:
            raise ValidationError("`seed` must not be set when `best_of` > 1")
        top_n, max_top_n = parameters.top_n_tokens or 0, self._config.max_top_n_tokens
        if top_n > max_top_n:
            raise ValidationError(f"`top_n_tokens` must be >= 0 and <= {max_top_n}. Given: {top_n}")


def _float32(value: float) -> float:
    """The nearest 32-bit float; infinite beyond their range."""
    return ctypes.c_float(value).value


def _factor(name: str, value: float | None) -> float:
    """A positive parameter whose neutral value is 1."""
    factor = 1.0 if value is None else _float32(value)
    if factor <= 0.0:
        raise ValidationError(f"`{name}` must be strictly positive")
    if factor > _MAX_FACTOR:
        raise ValidationError(f"`{name}` must be <= {_MAX_FACTOR}")
    return factor


def _share(name: str, value: float | None) -> float:
    """A share of the probability mass: what is absent means all of it, which nobody may ask for."""
    if value is None:
        return 1.0
    share = _float32(value)
    if not 0.0 < share < 1.0:
        raise ValidationError(f"`{name}` must be > 0.0 and < 1.0")
    return share


def _logit_bias(biases: Mapping[int, float], vocab_size: int) -> list[tuple[int, float]]:
    if len(biases) > MAX_BIASED_TOKENS:
        raise ValidationError(f"`logit_bias` supports up to {MAX_BIASED_TOKENS} tokens. Given: {len(biases)}")
    for token_id, bias in biases.items():
        if token_id >= vocab_size:
            raise ValidationError(f"`logit_bias` must name token ids < {vocab_size}. Given: {token_id}")
        if not -100.0 <= bias <= 100.0:
            raise ValidationError(f"`logit_bias` must hold values >= -100 and <= 100. Given: {bias:g}")
    return [*biases.items()]


def _check_inputs(inputs: str | Sequence[int], truncate: int | None, max_input_tokens: int) -> None:
    if not inputs:
        raise ValidationError("`inputs` cannot be empty")
    if truncate is not None and not 1 <= truncate <= max_input_tokens:
        raise ValidationError(
            f"`truncate` must be strictly positive and less than {max_input_tokens}. Given: {truncate}"
        )


def _prompt_token_ids(request: InferenceRequest, model: ServedModel) -> tuple[int, ...]:
    """The prompt as the model will see it. Judges its length."""
    token_ids = _encoded(request, model)
    max_new_tokens = request.parameters.max_new_tokens
    num_tokens, max_total_tokens = len(token_ids), model.max_total_tokens
    if num_tokens == 0:
        raise ValidationError("`inputs` cannot be empty")  # a text that the tokenizer drops, such as a space
    if max_new_tokens is None:
        max_new_tokens = max(0, max_total_tokens - num_tokens)
    num_new_tokens = min(max_new_tokens, NUM_JUDGED_NEW_TOKENS)
    if num_tokens + num_new_tokens > max_total_tokens:
        raise ValidationError(
            f"`inputs` tokens + `max_new_tokens` must be <= {max_total_tokens}. "
            f"Given: {num_tokens} `inputs` tokens and {num_new_tokens} `max_new_tokens`"
        )
    if num_tokens > model.max_input_tokens:
        raise ValidationError(f"`inputs` must have less than {model.max_input_tokens} tokens. Given: {num_tokens}")
    return tuple(token_ids)


def _encoded(request: InferenceRequest, model: ServedModel) -> Sequence[int]:
    inputs, truncate = request.inputs, request.parameters.truncate
    if not isinstance(inputs, str):
        largest = max(inputs)
        if largest >= model.vocab_size:
            raise ValidationError(f"token ids must be < {model.vocab_size}. Given: {largest}")
        return inputs
    try:
        if truncate is None:
            encoding = model.tokenizer.encode(inputs, add_special_tokens=request.adds_special_tokens)
        else:
            encoding = model.tokenizer.encode_truncated(inputs, truncate)
    except TokenizerError as error:
        raise ValidationError(f"tokenizer error {error}") from None
    token_ids: list[int] = encoding.ids
    return token_ids


def _simple_tokens(text: str, tokenizer: Tokenizer, adds_special_tokens: bool) -> list[SimpleToken]:
    try:
        encoding = tokenizer.encode(text, add_special_tokens=adds_special_tokens)
    except TokenizerError as error:
        raise ValidationError(f"tokenizer error {error}") from None
    in_bytes = byte_offsets(text)
    return [
        SimpleToken(token_id, text[start:stop], in_bytes[start], in_bytes[stop])
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
