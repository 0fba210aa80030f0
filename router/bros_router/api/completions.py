"""`/v1/completions`, from HTTP to HTTP: one generation a prompt, all in one reply."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from bros_router.api import errors
from bros_router.api.call import API, Api, Call, WholeReply, inference_calls, preparation, whole_replies
from bros_router.api.completion_logprobs import completion_logprobs, num_characters, prompt_tokens
from bros_router.api.exchange import json_response, read_for_inference, stream_response
from bros_router.api.headers import compute_headers, num_prompt_tokens, terms_headers, timing_headers
from bros_router.api.likeliest import likeliest_first
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.together import together
from bros_router.api.v1_bodies import AnyCompletionBody
from bros_router.api.v1_replies import (
    LAST_EVENT,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    ReplyHead,
    Usage,
    error_event,
    usage,
)
from bros_router.api.validation import InferenceRequest
from bros_router.request import PromptDetails, Token, TokenEvent


async def completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/completions`: as the body's `stream` says."""
    decoder = request.app[API].dialect.completion_decoder
    return await completions_reply(request, await read_for_inference(request, decoder))


async def completions_reply(request: web.Request, body: AnyCompletionBody) -> web.StreamResponse:
    """What `/v1/completions` answers to a body."""
    api = request.app[API]
    level = service_level(request.headers, body.request_class, api.config)
    with preparation(api, level):
        inferences = _inferences(api, body)
    length = sum(len(inference.inputs) for inference in inferences)
    batch = _Batch(
        api,
        level,
        body,
        inferences,
        ReplyHead(api.dialect.reply_id("cmpl", inferences[0].request_id), api.model().model_id),
        compute_headers(api.model(), length, level.request_class),
    )
    if not body.stream:
        return await batch.answer()
    return await stream_response(
        request, batch.headers, batch.send_events, error_event=error_event, last_event=LAST_EVENT
    )


def _inferences(api: Api, body: AnyCompletionBody) -> list[InferenceRequest]:
    """One a prompt. Raises `ApiError` where the server cannot do what the body asks for."""
    if body.suffix is not None:
        raise errors.SuffixError
    prompts = body.prompts
    if len(prompts) > api.config.max_client_batch_size:
        raise errors.ClientBatchSizeError(api.config.max_client_batch_size)
    body.check_supported()
    if body.echo and body.logprobs is not None and not api.config.enable_prefill_logprobs:
        raise errors.ValidationError("`echo` with `logprobs` needs a server started with --enable-prefill-logprobs")
    parameters, openai = body.parameters(), body.openai
    return [
        InferenceRequest(prompt, parameters, cuts_stop_sequences=api.dialect.cuts_stop_sequences, openai=openai)
        for prompt in prompts
    ]


@dataclass(frozen=True, slots=True)
class _Echo:
    """What stands in front of a reply: the prompt, where it is repeated."""

    text: str = ""
    #: Where their log-probabilities are told.
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class _Batch:
    """The prompts of one request. Each reply takes a permit of its own."""

    api: Api
    level: ServiceLevel
    body: AnyCompletionBody
    inferences: list[InferenceRequest]
    head: ReplyHead
    headers: dict[str, str]

    async def answer(self) -> web.Response:
        """The whole replies in one object. Where one prompt fails, the request does."""
        replies: list[WholeReply] = []
        finished: list[tuple[int, list[CompletionChoice]]] = []

        async def answer_one(index: int, inference: InferenceRequest) -> None:
            candidates = await whole_replies(self.api, inference, self.level)
            replies.extend(candidates)
            echo = await self._echo(inference, candidates[0].call, candidates[0].prompt)
            num_choices = inference.openai.num_choices
            chosen = likeliest_first(candidates)[:num_choices] if len(candidates) > num_choices else candidates
            choices = [
                self._whole_choice(index * num_choices + number, reply, echo) for number, reply in enumerate(chosen)
            ]
            finished.append((index, choices))

        await together(answer_one(*item) for item in enumerate(self.inferences))
        choices = [choice for _, choices in self.api.dialect.in_order(finished) for choice in choices]
        num_generated_tokens = sum(reply.finish.num_generated_tokens for reply in replies)
        completion = self._completion(choices, usage(num_prompt_tokens(replies), num_generated_tokens))
        return json_response(completion, self.headers | self._terms(replies) | timing_headers(replies))

    async def send_events(self, stream: EventStream) -> None:
        """One event a token, in the order in which they come. A prompt that fails leaves the others alone."""
        num_used = 0, 0

        async def send_one(index: int, inference: InferenceRequest) -> None:
            nonlocal num_used
            try:
                async with inference_calls(self.api, inference, self.level, is_stream=True) as calls:
                    await stream.open(self.headers | terms_headers(calls[0]))
                    num_tokens = await self._send_replies(stream, index, inference, calls)
                    num_used = num_used[0] + len(calls[0].request.prompt_token_ids), num_used[1] + num_tokens
            except errors.ApiError as error:
                await stream.open(self.headers | error.headers())
                await stream.send(error_event(error))

        await together(send_one(*item) for item in enumerate(self.inferences))
        if self.body.includes_usage:
            await stream.send_json(self._completion([], usage(*num_used)))

    async def _send_replies(
        self, stream: EventStream, prompt_index: int, inference: InferenceRequest, calls: list[Call]
    ) -> int:
        """Send the replies to one prompt. Returns how many tokens they have."""
        first_index = prompt_index * len(calls)
        return sum(
            await together(
                self._send_reply(stream, index, inference, call) for index, call in enumerate(calls, start=first_index)
            )
        )

    async def _send_reply(self, stream: EventStream, index: int, inference: InferenceRequest, call: Call) -> int:
        """Send one reply; its last event tells what it used. Returns how many tokens it has."""
        num_tokens = num_shown = 0
        async for event in call.events():
            echo = _Echo() if num_tokens else await self._echo(inference, call, event.prompt)
            num_tokens += 1
            choice = self._choice(index, event, echo, num_shown)
            num_shown += sum(num_characters(token) for token in (*echo.tokens, event.token))
            if event.finish is None:
                await stream.send_json(self._chunk(choice))
        await stream.send_json(self._completion([choice], usage(len(call.request.prompt_token_ids), num_tokens)))
        return num_tokens

    async def _echo(self, inference: InferenceRequest, call: Call, prompt: PromptDetails | None) -> _Echo:
        if not self.body.echo:
            return _Echo()
        token_ids, tokenizer = call.request.prompt_token_ids, self.api.model().tokenizer
        tokens = []
        if prompt is not None:
            tokens = await self.api.validator.in_thread(prompt_tokens, token_ids, prompt, tokenizer)
        text = inference.inputs
        if not isinstance(text, str):
            text = "".join(await self.api.validator.in_thread(tokenizer.stream_texts, token_ids))
        return _Echo(text, tuple(tokens))

    def _whole_choice(self, index: int, reply: WholeReply, echo: _Echo) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=echo.text + reply.finish.generated_text,
            logprobs=self._logprobs([*echo.tokens, *reply.tokens]),
            finish_reason=self.api.dialect.finish_reason(reply.finish.reason),
        )

    def _choice(self, index: int, event: TokenEvent, echo: _Echo, num_shown: int) -> CompletionChoice:
        dialect = self.api.dialect
        return CompletionChoice(
            index=index,
            text=echo.text + dialect.chunk_text(event),
            logprobs=self._logprobs([*echo.tokens, event.token], num_shown),
            finish_reason=dialect.chunk_finish_reason(event),
        )

    def _logprobs(self, tokens: list[Token], num_shown: int = 0) -> CompletionLogprobs | None:
        return None if self.body.logprobs is None else completion_logprobs(tokens, num_shown)

    def _chunk(self, choice: CompletionChoice) -> CompletionChunk:
        return CompletionChunk(
            **self.head.fields(),
            choices=[choice],
        )

    def _completion(self, choices: list[CompletionChoice], usage: Usage) -> Completion:
        return Completion(
            **self.head.fields(),
            choices=choices,
            usage=usage,
        )

    def _terms(self, replies: list[WholeReply]) -> dict[str, str]:
        """Prompts may be accepted on different terms: the last one's are told."""
        return {name: value for reply in replies for name, value in terms_headers(reply.call).items()}
