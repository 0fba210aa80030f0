"""Chats: `/v1/chat/completions` and `/chat_tokenize`, from HTTP to HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web

from bros_router.api import errors
from bros_router.api.call import API, Api, Call, WholeReply, inference_call, preparation, whole_reply
from bros_router.api.chat_message import ASSISTANT, cut_behind
from bros_router.api.exchange import json_response, read_body, read_for_inference, stream_response
from bros_router.api.headers import compute_headers, compute_time_header, terms_headers, timing_headers
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.tool_call_reader import ToolCallReader
from bros_router.api.tool_reply import Calls
from bros_router.api.tools import ToolsInPlay
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
    ToolCallMessage,
    Usage,
    error_event,
    logprobs,
    usage,
)
from bros_router.api.validation import InferenceRequest
from bros_router.chat_templates.renderer import TemplateError
from bros_router.grammars.protocol import NO_TOOL
from bros_router.request import OverloadedError, TokenEvent

#: TGI's word for the model that is served, whichever it is.
_PLACEHOLDER_MODEL: Final = "tgi"
#: When to come again where too many chats wait to be rendered: one takes no longer.
_RENDERING_RETRY_S: Final = 1.0


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """`POST /v1/chat/completions`: as the body's `stream` says."""
    api = request.app[API]
    body = await read_for_inference(request, api.dialect.chat_decoder)
    level = service_level(request.headers, body.request_class, api.config)
    # Told by the status, streams included: TGI renders before it answers.
    with preparation(api, level):
        body.check_supported()
        tools = body.tools_in_play()
        inference = await _inference(api, body, tools)
    named = None if body.model == _PLACEHOLDER_MODEL else body.model
    chat = _Chat(
        api,
        body,
        level,
        tools,
        inference,
        ReplyHead(api.dialect.reply_id("chatcmpl", inference.request_id), named or api.model().model_id),
        compute_headers(api.model(), len(inference.inputs), level.request_class),
    )
    if not body.stream:
        return await chat.answer()
    return await stream_response(
        request, chat.headers, chat.send_events, error_event=error_event, last_event=LAST_EVENT
    )


async def chat_tokenize(request: web.Request) -> web.StreamResponse:
    """`POST /chat_tokenize`: the prompt that the template makes of a chat, and its tokens. No permit is taken."""
    api = request.app[API]
    tokenizer = api.model().tokenizer
    body = await read_body(request, api.dialect.chat_decoder)
    body.check_supported()
    prompt = await _rendered(api, body, body.tools_in_play())
    tokens = await api.validator.tokenize(prompt, tokenizer, adds_special_tokens=False)
    return json_response(ChatTokenizeReply(tokens, prompt))


async def _inference(api: Api, body: AnyChatBody, tools: ToolsInPlay | None) -> InferenceRequest:
    """What the engine is to be asked. Raises `ApiError` where there is no prompt."""
    return InferenceRequest(
        await _rendered(api, body, tools),
        body.parameters(),
        adds_special_tokens=False,
        cuts_stop_sequences=api.dialect.cuts_stop_sequences,
        grammar=body.grammar if tools is None else tools.source,
    )


async def _rendered(api: Api, body: AnyChatBody, tools: ToolsInPlay | None) -> str:
    """The prompt. Raises `ApiError` where the template refuses."""
    template = api.model().chat_template
    if template is None:
        raise errors.TemplateApiError("template not found")
    continues = body.continues_last_message
    messages = [api.dialect.template_message(message, template) for message in body.messages]
    if tools is not None and body.messages and body.messages[-1].content is not None:
        messages[-1]["content"] += tools.appendix(template_knows_tools=template.knows_tools)
    variables = body.template_variables | {
        "messages": messages,
        "tools": None if tools is None else api.dialect.template_tools(tools),
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
    tools: ToolsInPlay | None
    inference: InferenceRequest
    head: ReplyHead
    headers: dict[str, str]

    async def answer(self) -> web.Response:
        """The whole reply as one object."""
        reply = await whole_reply(self.api, self.inference, self.level)
        dialect = self.api.dialect
        if self.tools is None:
            return self._answer(_text_message(reply), reply, dialect.finish_reason(reply.finish.reason))
        text = reply.finish.generated_text
        calls = Calls.read(text)
        if calls.has_declined:
            second = await whole_reply(self.api, (await self._without_tools()).inference, self.level)
            told = reply if dialect.tells_of_declined_tools else second
            return self._answer(_text_message(second), told, dialect.finish_reason(told.finish.reason))
        tool_reply = dialect.tool_reply(self.body.messages)
        return self._answer(tool_reply.message(calls, text), reply, tool_reply.finish_reason(reply.finish.reason))

    def _answer(
        self, message: AssistantMessage | ToolCallMessage, reply: WholeReply, finish_reason: str
    ) -> web.Response:
        choice = ChatChoice(
            index=0,
            message=message,
            logprobs=logprobs(reply.tokens) if self.body.logprobs else None,
            finish_reason=finish_reason,
        )
        head = self.head
        completion = ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=[choice],
            usage=usage(reply.num_prompt_tokens, reply.finish.num_generated_tokens),
        )
        return json_response(
            completion,
            self.headers | terms_headers(reply.call) | compute_time_header(reply) | timing_headers([reply]),
        )

    async def send_events(self, stream: EventStream) -> None:
        """One event a token, and one that tells the usage where it was asked for."""
        if self.tools is not None:
            await self._send_calls(stream)
            return
        async with inference_call(self.api, self.inference, self.level, is_stream=True) as call:
            await stream.open(self.headers | terms_headers(call))
            is_first = True
            num_tokens = 0
            async for event in call.events():
                await stream.send_json(self._chunk([self._choice(event, is_first=is_first)]))
                is_first = False
                num_tokens += 1
            await self._send_usage(stream, call, num_tokens)

    async def _send_calls(self, stream: EventStream) -> None:
        """Tell what is called; or, where the model calls nothing, what it says without tools."""
        reader, tool_reply = ToolCallReader(), self.api.dialect.tool_reply(self.body.messages)
        has_declined = False
        num_tokens = 0
        async with inference_call(self.api, self.inference, self.level, is_stream=True) as call:
            await stream.open(self.headers | terms_headers(call))
            async for event in call.events():
                num_tokens += 1
                pieces = reader.feed(event.shown)
                has_declined = has_declined or any(piece.name == NO_TOOL for piece in pieces)
                reason = None if event.finish is None else event.finish.reason
                delta = None if has_declined else tool_reply.delta(pieces, reason)
                if delta is not None:
                    choice = ChatChunkChoice(
                        index=0,
                        delta=delta,
                        logprobs=logprobs([event.token]) if self.body.logprobs else None,
                        finish_reason=None if reason is None else tool_reply.finish_reason(reason),
                    )
                    await stream.send_json(self._chunk([choice]))
            if not has_declined:
                await self._send_usage(stream, call, num_tokens)
        if has_declined:
            await (await self._without_tools()).send_events(stream)

    async def _without_tools(self) -> _Chat:
        """The same chat, as if it had no tools."""
        return replace(self, tools=None, inference=await _inference(self.api, self.body, None))

    async def _send_usage(self, stream: EventStream, call: Call, num_tokens: int) -> None:
        if self.body.includes_usage:
            await stream.send_json(self._chunk([], usage(len(call.request.prompt_token_ids), num_tokens)))

    def _choice(self, event: TokenEvent, *, is_first: bool) -> ChatChunkChoice:
        dialect = self.api.dialect
        return ChatChunkChoice(
            index=0,
            delta=Delta(dialect.delta_role(is_first=is_first), event.shown),
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


def _text_message(reply: WholeReply) -> AssistantMessage:
    return AssistantMessage(ASSISTANT, reply.finish.generated_text)
