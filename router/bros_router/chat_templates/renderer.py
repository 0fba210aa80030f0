"""Renders chat templates: the router's side of the template helper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from bros_router.chat_templates.protocol import MAX_REPLY_BYTES, Refused, Rendered, RenderReply, RenderRequest
from bros_router.chat_templates.source import ChatTemplate
from bros_router.helper.frame import to_frame
from bros_router.helper.process import HelperError, HelperProcess

_HELPER: Final = "bros_router.chat_templates.helper"

_reply_decoder: msgspec.json.Decoder[RenderReply] = msgspec.json.Decoder(RenderReply)


class TemplateError(Exception):
    """A chat template gave no prompt. The message is public."""


class TemplateRenderer:
    """Renders chat templates in a helper process, which is started by the first chat: one template after another.

    All methods belong to the event loop's thread (`HelperProcess`).
    """

    def __init__(self) -> None:
        self.helper = HelperProcess(_HELPER, decoder=_reply_decoder, max_reply_bytes=MAX_REPLY_BYTES)

    async def render(self, template: ChatTemplate, variables: Mapping[str, Any]) -> str:
        """The prompt that `template` makes of `variables`, which are JSON.

        Raises:
            TemplateError: the template is none, refuses the messages, or takes too much time or memory.
            OverloadedError: too many chats wait for the helper.
        """
        try:
            frame = to_frame(RenderRequest(template.source, {**template.special_tokens, **variables}))
        except UnicodeEncodeError:
            raise TemplateError("the template is not Unicode") from None
        try:
            reply = await self.helper.ask(frame)
        except HelperError as error:
            raise TemplateError("rendering takes too long" if error.took_too_long else "rendering failed") from None
        match reply:
            case Rendered(prompt):
                return prompt
            case Refused(reason):
                raise TemplateError(reason)

    async def close(self) -> None:
        """End the helper. Chats that wait for it are given up."""
        await self.helper.close()
