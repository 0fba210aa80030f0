"""`/v1/completions`, from HTTP to HTTP: one generation a prompt, all in one reply."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from bros_router.api import errors
from bros_router.api.call import API, Api, Call, WholeReply, inference_call, preparation, whole_reply
from bros_router.api.exchange import json_response, read_for_inference, stream_response
from bros_router.api.headers import compute_headers, terms_headers, timing_headers
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.together import together
from bros_router.api.v1_bodies import AnyCompletionBody
from bros_router.api.v1_replies import (
    LAST_EVENT,
    Completion,
    CompletionChoice,
    CompletionChunk,
    ReplyHead,
    Usage,
    error_event,
    usage,
)
from bros_router.api.validation import InferenceRequest
from bros_router.request import TokenEvent


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
    num_characters = sum(len(inference.inputs) for inference in inferences)
    batch = _Batch(
        api,
        level,
        inferences,
        ReplyHead(api.dialect.reply_id("cmpl", inferences[0].request_id), api.model().model_id),
        compute_headers(api.model(), num_characters, level.request_class),
        body.includes_usage,
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
    parameters = body.parameters()
    return [
        InferenceRequest(prompt, parameters, cuts_stop_sequences=api.dialect.cuts_stop_sequences) for prompt in prompts
    ]


@dataclass(frozen=True, slots=True)
class _Batch:
    """The prompts of one request. Each takes a permit of its own."""

    api: Api
    level: ServiceLevel
    inferences: list[InferenceRequest]
    head: ReplyHead
    headers: dict[str, str]
    includes_usage: bool

    async def answer(self) -> web.Response:
        """The whole replies in one object. Where one prompt fails, the request does."""
        finished: list[tuple[int, WholeReply]] = []

        async def answer_one(index: int, inference: InferenceRequest) -> None:
            finished.append((index, await whole_reply(self.api, inference, self.level)))

        await together(answer_one(*item) for item in enumerate(self.inferences))
        replies = [reply for _, reply in finished]
        choices = [
            CompletionChoice(
                index=index,
                text=reply.finish.generated_text,
                logprobs=None,
                finish_reason=self.api.dialect.finish_reason(reply.finish.reason),
            )
            for index, reply in self.api.dialect.in_order(finished)
        ]
        num_prompt_tokens = sum(reply.num_prompt_tokens for reply in replies)
        num_generated_tokens = sum(reply.finish.num_generated_tokens for reply in replies)
        completion = self._completion(choices, usage(num_prompt_tokens, num_generated_tokens))
        return json_response(completion, self.headers | self._terms(replies) | timing_headers(replies))

    async def send_events(self, stream: EventStream) -> None:
        """One event a token, in the order in which they come. A prompt that fails leaves the others alone."""
        used: list[Usage] = []

        async def send_one(index: int, inference: InferenceRequest) -> None:
            try:
                async with inference_call(self.api, inference, self.level, is_stream=True) as call:
                    await stream.open(self.headers | terms_headers(call))
                    used.append(await self._send_reply(stream, index, call))
            except errors.ApiError as error:
                await stream.open(self.headers | error.headers())
                await stream.send(error_event(error))

        await together(send_one(*item) for item in enumerate(self.inferences))
        if self.includes_usage:
            num_prompt_tokens = sum(one.prompt_tokens for one in used)
            num_generated_tokens = sum(one.completion_tokens for one in used)
            await stream.send_json(self._completion([], usage(num_prompt_tokens, num_generated_tokens)))

    async def _send_reply(self, stream: EventStream, index: int, call: Call) -> Usage:
        """Send the reply to one prompt. Returns what it used, which its last event tells."""
        num_tokens = 0
        async for event in call.events():
            num_tokens += 1
            if event.finish is None:
                await stream.send_json(self._chunk(self._choice(index, event)))
        used = usage(len(call.request.prompt_token_ids), num_tokens)
        await stream.send_json(self._completion([self._choice(index, event)], used))
        return used

    def _choice(self, index: int, event: TokenEvent) -> CompletionChoice:
        dialect = self.api.dialect
        return CompletionChoice(index, dialect.chunk_text(event), None, dialect.chunk_finish_reason(event))

    def _chunk(self, choice: CompletionChoice) -> CompletionChunk:
        head = self.head
        return CompletionChunk(
            id=head.id,
            created=head.created,
            choices=[choice],
            model=head.model,
            system_fingerprint=head.system_fingerprint,
        )

    def _completion(self, choices: list[CompletionChoice], usage: Usage) -> Completion:
        head = self.head
        return Completion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _terms(self, replies: list[WholeReply]) -> dict[str, str]:
        """Prompts may be accepted on different terms: the last one's are told."""
        return {name: value for reply in replies for name, value in terms_headers(reply.call).items()}
