"""Chats: `/v1/chat/completions` and `/chat_tokenize`, from HTTP to HTTP."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from aiohttp import web

from bros_router.api import errors
from bros_router.api.call import API, Api, Call, WholeReply, inference_call, inference_calls, preparation, whole_replies
from bros_router.api.chat_message import ASSISTANT, cut_behind
from bros_router.api.exchange import json_response, read_body, read_for_inference, stream_response
from bros_router.api.headers import compute_headers, compute_time_header, terms_headers, timing_headers
from bros_router.api.service_level import ServiceLevel, service_level
from bros_router.api.sse import EventStream
from bros_router.api.together import together
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
    Usage,
    error_event,
    logprobs,
    usage,
)
from bros_router.api.validation import InferenceRequest
from bros_router.chat_templates.renderer import TemplateError
from bros_router.grammars.protocol import NO_TOOL
from bros_router.request import OverloadedError, TokenEvent

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
        body.check_supported()
        tools = body.tools_in_play()
        inference = await _inference(api, body, tools)
    chat = _Chat(
        api,
        body,
        level,
        tools,
        inference,
        ReplyHead(api.dialect.reply_id("chatcmpl", inference.request_id), body.named_model or api.model().model_id),
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
        body.check_supported()
        inference = await _inference(api, body, body.tools_in_play())
    replies = await whole_replies(api, inference, level)
    return replies[0].finish.generated_text


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
        openai=body.openai,
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
class _Told:
    """What a choice of a whole reply tells: its message, and of which reply the counts and log-probabilities are."""

    message: AssistantMessage
    reply: WholeReply
    finish_reason: str


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
        replies = await whole_replies(self.api, self.inference, self.level)
        told = await together(self._told(reply) for reply in replies)
        choices = [
            ChatChoice(
                index=index,
                message=one.message,
                logprobs=logprobs(one.reply.tokens) if self.body.logprobs else None,
                finish_reason=one.finish_reason,
            )
            for index, one in enumerate(told)
        ]
        replies = [one.reply for one in told]
        first = replies[0]
        completion = ChatCompletion(
            **self.head.fields(),
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
            send = self._send_text if self.tools is None else self._send_calls
            sent = await together(send(stream, *item) for item in enumerate(calls))
        used = [one for one in sent if one is not None]
        if len(used) < len(sent):
            chat = await self._without_tools()
            used += await together(chat._send_alone(stream, i) for i, one in enumerate(sent) if one is None)
        if self.body.includes_usage:
            num_tokens = sum(one.completion_tokens for one in used)
            await stream.send_json(self._chunk([], usage(used[0].prompt_tokens, num_tokens)))

    async def _send_calls(self, stream: EventStream, index: int, call: Call) -> Usage | None:
        """Tell what is called; `None`: the model calls nothing."""
        reader, tool_reply = ToolCallReader(), self.api.dialect.tool_reply(self.body.messages)
        has_declined = False
        num_tokens = 0
        async for event in call.events():
            num_tokens += 1
            pieces = reader.feed(event.shown)
            has_declined = has_declined or any(piece.name == NO_TOOL for piece in pieces)
            reason = None if event.finish is None else event.finish.reason
            delta = None if has_declined else tool_reply.delta(pieces, reason)
            if delta is not None:
                choice = ChatChunkChoice(
                    index=index,
                    delta=delta,
                    logprobs=logprobs([event.token]) if self.body.logprobs else None,
                    finish_reason=None if reason is None else tool_reply.finish_reason(reason),
                )
                await stream.send_json(self._chunk([choice]))
        return None if has_declined else usage(len(call.request.prompt_token_ids), num_tokens)

    async def _send_text(self, stream: EventStream, index: int, call: Call) -> Usage:
        """Tell what is said."""
        num_tokens = 0
        async for event in call.events():
            await stream.send_json(self._chunk([self._choice(index, event, is_first=num_tokens == 0)]))
            num_tokens += 1
        return usage(len(call.request.prompt_token_ids), num_tokens)

    async def _send_alone(self, stream: EventStream, index: int) -> Usage:
        """Tell one choice more, from a call of its own."""
        async with inference_call(self.api, self.inference, self.level, is_stream=True) as call:
            return await self._send_text(stream, index, call)

    async def _without_tools(self) -> _Chat:
        """The same chat for one choice, as if it had no tools."""
        inference = await _inference(self.api, self.body, None)
        openai = replace(inference.openai, num_choices=1)
        return replace(self, tools=None, inference=replace(inference, openai=openai))

    async def _told(self, reply: WholeReply) -> _Told:
        """What a choice tells."""
        dialect = self.api.dialect
        if self.tools is None:
            return _Told(_text_message(reply), reply, dialect.finish_reason(reply.finish.reason))
        text = reply.finish.generated_text
        calls = Calls.read(text)
        if not calls.has_declined:
            tool_reply = dialect.tool_reply(self.body.messages)
            return _Told(tool_reply.message(calls, text), reply, tool_reply.finish_reason(reply.finish.reason))
        chat = await self._without_tools()
        (second,) = await whole_replies(self.api, chat.inference, self.level)
        told = reply if dialect.tells_of_declined_tools else second
        return _Told(_text_message(second), told, dialect.finish_reason(told.finish.reason))

    def _choice(self, index: int, event: TokenEvent, *, is_first: bool) -> ChatChunkChoice:
        dialect = self.api.dialect
        return ChatChunkChoice(
            index=index,
            delta=Delta(role=dialect.delta_role(is_first=is_first), content=event.shown),
            logprobs=logprobs([event.token]) if self.body.logprobs else None,
            finish_reason=None if event.finish is None else dialect.finish_reason(event.finish.reason),
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            **self.head.fields(),
            choices=choices,
            usage=usage,
        )


def _text_message(reply: WholeReply) -> AssistantMessage:
    return AssistantMessage(ASSISTANT, reply.finish.generated_text)
