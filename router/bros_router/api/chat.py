"""Chats: `/v1/chat/completions` and `/chat_tokenize`, from HTTP to HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiohttp import web

from bros_router.api import errors
from bros_router.api.call import API, Api, Call, inference_calls, preparation, whole_replies
from bros_router.api.chat_message import cut_behind
from bros_router.api.dialect import ASSISTANT
from bros_router.api.exchange import json_response, read_body, read_for_inference, stream_response
from bros_router.api.headers import compute_headers, compute_time_header, terms_headers, timing_headers
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.together import together
from bros_router.api.v1_bodies import AnyChatBody
from bros_router.api.v1_replies import (
    LAST_EVENT,
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatTokenizeReply,
    Delta,
    ReplyHead,
    Usage,
    error_event,
    logprobs,
    usage,
)
from bros_router.api.validation import InferenceRequest
from bros_router.chat_templates.renderer import TemplateError
from bros_router.request import OverloadedError, TokenEvent

#: TGI's word for the model that is served, whichever it is.
_PLACEHOLDER_MODEL: Final = "tgi"
#: When to come again where too many chats wait to be rendered: one takes no longer.
_RENDERING_RETRY_S: Final = 1.0


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`: as the body's `stream` says."""
    return await chat_reply(request, await read_for_inference(request, request.app[API].dialect.chat_decoder))


async def chat_reply(request: web.Request, body: AnyChatBody) -> web.StreamResponse:
    """What `/v1/chat/completions` answers to a body."""
    api = request.app[API]
    level = service_level(request.headers, body.request_class, api.config)
    # Told by the status, streams included: TGI renders before it answers.
    with preparation(api, level):
        inference = await _inference(api, body)
    named = None if body.model == _PLACEHOLDER_MODEL else body.model
    chat = _Chat(
        api,
        body,
        level,
        inference,
        ReplyHead(api.dialect.reply_id("chatcmpl", inference.request_id), named or api.model().model_id),
        compute_headers(api.model(), len(inference.inputs), level.request_class),
    )
    if not body.stream:
        return await chat.answer()
    return await stream_response(
        request, chat.headers, chat.send_events, error_event=error_event, last_event=LAST_EVENT
    )


async def chat_text(request: web.Request, body: AnyChatBody) -> str:
    """The text of the whole reply to a chat, the first of several, whatever its `stream` says. Raises `ApiError`."""
    api = request.app[API]
    level = service_level(request.headers, body.request_class, api.config)
    with preparation(api, level):
        inference = await _inference(api, body)
    replies = await whole_replies(api, inference, level)
    return replies[0].finish.generated_text


async def chat_tokenize(request: web.Request) -> web.StreamResponse:
    """`POST /chat_tokenize`: the prompt that the template makes of a chat, and its tokens. No permit is taken."""
    api = request.app[API]
    tokenizer = api.model().tokenizer
    prompt = await _rendered(api, await read_body(request, api.dialect.chat_decoder))
    tokens = await api.validator.tokenize(prompt, tokenizer, adds_special_tokens=False)
    return json_response(ChatTokenizeReply(tokens, prompt))


async def _inference(api: Api, body: AnyChatBody) -> InferenceRequest:
    """The chat as a prompt. Raises as `_rendered`."""
    return InferenceRequest(
        await _rendered(api, body),
        body.parameters(),
        adds_special_tokens=False,
        cuts_stop_sequences=api.dialect.cuts_stop_sequences,
        openai=body.openai,
    )


async def _rendered(api: Api, body: AnyChatBody) -> str:
    """The prompt. Raises `ApiError` where the server cannot do what the body asks for, or the template refuses."""
    body.check_supported()
    template = api.model().chat_template
    if template is None:
        raise errors.TemplateApiError("template not found")
    continues = body.continues_last_message
    variables = body.template_variables | {
        "messages": [{"role": message.role, "content": message.text} for message in body.messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": body.add_generation_prompt and not continues,
    }
    try:
        prompt = await api.templates.render(template, variables)
    except TemplateError as error:
        raise errors.TemplateApiError(str(error)) from None
    except OverloadedError:
        raise errors.OverloadedApiError(_RENDERING_RETRY_S) from None
    return cut_behind(prompt, body.messages[-1]) if continues else prompt


@dataclass(frozen=True, slots=True)
class _Chat:
    """A chat whose prompt was rendered."""

    api: Api
    body: AnyChatBody
    level: ServiceLevel
    inference: InferenceRequest
    head: ReplyHead
    headers: dict[str, str]

    async def answer(self) -> web.Response:
        """The whole reply as one object."""
        replies = await whole_replies(self.api, self.inference, self.level)
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(ASSISTANT, reply.finish.generated_text),
                logprobs=logprobs(reply.tokens) if self.body.logprobs else None,
                finish_reason=self.api.dialect.finish_reason(reply.finish.reason),
            )
            for index, reply in enumerate(replies)
        ]
        first, head = replies[0], self.head
        completion = ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage(first.num_prompt_tokens, sum(reply.finish.num_generated_tokens for reply in replies)),
        )
        return json_response(
            completion,
            self.headers | terms_headers(first.call) | compute_time_header(replies[-1]) | timing_headers(replies),
        )

    async def send_events(self, stream: EventStream) -> None:
        """One event a token, of whichever choice it is, and one that tells the usage where it was asked for."""
        async with inference_calls(self.api, self.inference, self.level, is_stream=True) as calls:
            await stream.open(self.headers | terms_headers(calls[0]))
            num_tokens = sum(await together(self._send_choice(stream, *item) for item in enumerate(calls)))
            if self.body.includes_usage:
                await stream.send_json(self._chunk([], usage(len(calls[0].request.prompt_token_ids), num_tokens)))

    async def _send_choice(self, stream: EventStream, index: int, call: Call) -> int:
        """Returns how many tokens it has."""
        num_tokens = 0
        async for event in call.events():
            await stream.send_json(self._chunk([self._choice(index, event, is_first=num_tokens == 0)]))
            num_tokens += 1
        return num_tokens

    def _choice(self, index: int, event: TokenEvent, *, is_first: bool) -> ChatChunkChoice:
        dialect = self.api.dialect
        return ChatChunkChoice(
            index=index,
            delta=Delta(role=dialect.delta_role(is_first=is_first), content=event.shown),
            logprobs=logprobs([event.token]) if self.body.logprobs else None,
            finish_reason=None if event.finish is None else dialect.finish_reason(event.finish.reason),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        head = self.head
        return ChatChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage,
        )
