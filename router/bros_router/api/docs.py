"""The description of the API, and the page that shows it: Swagger UI from this package, so that it needs no network."""

from __future__ import annotations

import gzip
from importlib.resources import files
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

OPENAPI: Final = web.AppKey("openapi", bytes)

_FOLDER: Final = files("bros_router") / "swagger_ui"
#: The files of the page and their content types.
ASSETS: Final = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "start.js": "text/javascript",
}
#: Swagger UI's own files, unchanged: compressed, since they are large.
_COMPRESSED: Final = ("swagger-ui.css", "swagger-ui-bundle.js")
#: The page runs what comes from this server and asks nobody else. The styles and images in it are Swagger UI's.
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
    "X-Content-Type-Options": "nosniff",
}
_CACHED: Final = {"Cache-Control": "max-age=86400"}


async def openapi_json(request: web.Request) -> web.StreamResponse:
    """`GET /api-doc/openapi.json`."""
    return web.Response(body=request.app[OPENAPI], content_type="application/json")


async def to_folder(request: web.Request) -> web.StreamResponse:
    """`GET /docs`: to the page, whose links are relative to `/docs/`."""
    return web.Response(status=303, headers={"Location": "docs/"})


async def page(request: web.Request) -> web.StreamResponse:
    """`GET /docs/`."""
    body = (_FOLDER / "index.html").read_bytes()
    return web.Response(body=body, content_type="text/html", charset="utf-8", headers=_HEADERS)


def asset(name: str) -> Handler:
    """`GET /docs/…`: one of the files of the page, by a name of `ASSETS`."""

    async def answer(request: web.Request) -> web.StreamResponse:
        headers = _HEADERS | _CACHED
        if name not in _COMPRESSED:
            body = (_FOLDER / name).read_bytes()
        else:
            body = (_FOLDER / f"{name}.gz").read_bytes()
            if "gzip" in request.headers.get("Accept-Encoding", ""):
                headers |= {"Content-Encoding": "gzip"}
            else:
                body = gzip.decompress(body)
        return web.Response(body=body, content_type=ASSETS[name], charset="utf-8", headers=headers)

    return answer
