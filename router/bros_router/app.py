"""The HTTP application: what the routes share, and what every response carries."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from bros_router.admission import Permits
from bros_router.api import errors
from bros_router.api.call import API, Api, Timeouts
from bros_router.api.dialect import OpenAIDialect, TgiDialect
from bros_router.api.docs import OPENAPI
from bros_router.api.validation import Validator
from bros_router.chat_templates.renderer import TemplateRenderer
from bros_router.config import ApiConfig
from bros_router.grammars.vetter import GrammarVetter
from bros_router.metrics import Metrics
from bros_router.request import RequestClass
from bros_router.routes import add_routes, description, routes
from bros_router.service import Service
from bros_router.tracing import trace_request

#: How long a client that was answered early may go on sending before its connection is cut.
_LINGERING_S: Final = 2.0

log = structlog.get_logger()


class _NotTheClients(logging.Filter):
    """Lets through what the library logs, but not what clients can make it log: requests that are not HTTP."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, HttpProcessingError)


_http_log = logging.getLogger("bros_router.http")
_http_log.addFilter(_NotTheClients())


def create_app(
    config: ApiConfig, service: Service, metrics: Metrics, timeouts: Timeouts | None = None
) -> web.Application:
    """The application. `create_runner` runs it."""
    app = web.Application(middlewares=[_answer_preflight, trace_request, _answer_errors])
    dialect = TgiDialect() if config.strict_tgi else OpenAIDialect()
    grammars, templates = GrammarVetter(), TemplateRenderer()
    validator = Validator(config, grammars)
    app[API] = Api(
        config=config,
        dialect=dialect,
        service=service,
        metrics=metrics,
        validator=validator,
        templates=templates,
        permits={
            RequestClass.RT: Permits(config.max_concurrent_requests),
            RequestClass.BE: Permits(config.max_concurrent_be_requests),
        },
        timeouts=timeouts or Timeouts(),
    )
    every = routes(config, dialect)
    add_routes(app, every, config)
    app[OPENAPI] = description(every, config)
    app.on_response_prepare.append(_response_headers(config.cors_allow_origin))

    async def close_helpers(_: web.Application) -> AsyncIterator[None]:
        yield
        validator.close()
        await templates.close()
        await grammars.close()

    app.cleanup_ctx.append(close_helpers)
    return app


def create_runner(app: web.Application, *, shutdown_timeout_s: float = 60.0) -> web.AppRunner:
    """What runs the application on a socket.

    Handlers of clients that leave are cancelled, which ends their sequences. Bodies are left as they came: a
    compressed one is refused, not inflated.

    Args:
        shutdown_timeout_s: how long open replies may take once the runner is told to end.
    """
    return web.AppRunner(
        app,
        handler_cancellation=True,
        auto_decompress=False,
        access_log=None,
        logger=_http_log,
        lingering_time=_LINGERING_S,
        shutdown_timeout=shutdown_timeout_s,
    )


@web.middleware
async def _answer_preflight(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Browsers ask before they send: any OPTIONS, on any path, is allowed what the server allows at all."""
    if request.method != "OPTIONS":
        return await handler(request)
    return web.Response(
        headers={"Access-Control-Allow-Methods": "GET,POST", "Access-Control-Allow-Headers": "content-type"}
    )


@web.middleware
async def _answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what handlers raise into responses."""
    try:
        return await handler(request)
    except (errors.ApiError, errors.Rejection) as error:
        return errors.error_response(error)
    except web.HTTPNotFound:
        return web.Response(status=404)
    except ConnectionError:
        return web.Response(status=499)  # the client is gone: nobody will see this
    except Exception:
        log.exception("request failed", method=request.method, path=request.path)
        return errors.error_response(errors.InternalError())


def _response_headers(
    allowed_origins: tuple[str, ...],
) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """What adds to every response, errors and streams included: CORS, and no word about what serves it."""

    async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers.pop("Server", None)
        headers["Vary"] = "origin, access-control-request-method, access-control-request-headers"
        origin = request.headers.get("Origin")
        if not allowed_origins:
            headers["Access-Control-Allow-Origin"] = "*"
        elif origin in allowed_origins:
            headers["Access-Control-Allow-Origin"] = origin

    return add_headers
