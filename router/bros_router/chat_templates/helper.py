"""The template helper: a process that renders chat templates for the router, and may not do much else.

python -m bros_router.chat_templates.helper
"""

from __future__ import annotations

import codecs
import importlib
import time
from typing import Final

import msgspec

from bros_router.chat_templates.protocol import Refused, Rendered, RenderReply, RenderRequest
from bros_router.chat_templates.sandbox import RefusedTemplateError, render
from bros_router.helper.loop import give_up_resources, serve

_MEMORY_LIMIT_BYTES: Final = 512 * 2**20
#: What Jinja and Python load when they first need it, which is too late once no file can be opened.
_LATE_MODULES: Final = ("jinja2.constants", "jinja2.debug", "pprint", "textwrap", "unicodedata")
_LATE_CODECS: Final = ("ascii", "latin-1", "unicode-escape", "utf-8")

_request_decoder = msgspec.json.Decoder(RenderRequest)


def main() -> None:
    """Serve until the router closes stdin."""
    time.localtime()  # reads the time zone, for `strftime_now`
    for module in _LATE_MODULES:
        importlib.import_module(module)
    for codec in _LATE_CODECS:
        codecs.lookup(codec)
    give_up_resources(_MEMORY_LIMIT_BYTES)
    serve(_answer)


def _answer(body: bytes) -> RenderReply:
    request = _request_decoder.decode(body)
    try:
        return Rendered(render(request.source, request.variables))
    except RefusedTemplateError as error:
        return Refused(str(error))


if __name__ == "__main__":
    main()
