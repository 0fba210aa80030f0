"""The HTTP application: which route is answered by what, who may ask, and what every response carries."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from bros_router.admission import Permits
from bros_router.api import chat, completions, errors, handlers
from bros_router.api.call import API, Api, Timeouts
from bros_router.api.dialect import OpenAIDialect, TgiDialect
from bros_router.api.validation import Validator
from bros_router.chat_templates.renderer import TemplateRenderer
from bros_router.config import ApiConfig
from bros_router.grammars.vetter import GrammarVetter
from bros_router.metrics import Metrics
from bros_router.request import RequestClass
from bros_router.service import Service

#: Routes that need the API key, where there is one: path to method to handler.
_GUARDED: Final[Mapping[str, Mapping[str, Handler]]] = {
    "/": {"POST": handlers.compat_generate},
    "/generate": {"POST": handlers.generate},
    "/generate_stream": {"POST": handlers.generate_stream},
    "/tokenize": {"POST": handlers.tokenize},
    "/v1/chat/completions": {"POST": chat.chat_completions},
    "/v1/completions": {"POST": completions.completions},
}
#: Routes that anybody may ask.
_OPEN: Final[Mapping[str, Mapping[str, Handler]]] = {
    "/": {"GET": handlers.health},
    "/health": {"GET": handlers.health},
    "/health/live": {"GET": handlers.health_live},
    "/health/startup": {"GET": handlers.health_startup},
    "/ping": {"GET": handlers.health},
    "/info": {"GET": handlers.info},
    "/metrics": {"GET": handlers.prometheus},
    "/chat_tokenize": {"POST": chat.chat_tokenize},
    "/v1/models": {"GET": handlers.models},
}

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
    app = web.Application(middlewares=[_answer_preflight, _answer_errors])
    grammars, templates = GrammarVetter(), TemplateRenderer()
    validator = Validator(config, grammars)
    app[API] = Api(
        config=config,
        dialect=TgiDialect() if config.strict_tgi else OpenAIDialect(),
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
    _add_routes(app, config.api_key)
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


def _add_routes(app: web.Application, api_key: str | None) -> None:
    guard = _key_guard(api_key)
    for path in {**_GUARDED, **_OPEN}:
        by_method = {method: guard(handler) for method, handler in _GUARDED.get(path, {}).items()}
        by_method |= _OPEN.get(path, {})
        if "GET" in by_method:
            by_method["HEAD"] = by_method["GET"]
        # TGI asks for the key before it looks at the method.
        refuse = _method_not_allowed(sorted(by_method))
        by_method["*"] = guard(refuse) if path in _GUARDED else refuse
        resource = app.router.add_resource(path)
        for method, handler in by_method.items():
            resource.add_route(method, handler)


def _key_guard(api_key: str | None) -> Callable[[Handler], Handler]:
    """What puts a handler behind the API key: without it, 401 and nothing else."""
    if api_key is None:
        return lambda handler: handler
    expected = f"Bearer {api_key}".encode()

    def guard(handler: Handler) -> Handler:
        async def guarded(request: web.Request) -> web.StreamResponse:
            given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            if not hmac.compare_digest(given, expected):
                return web.Response(status=401)
            return await handler(request)

        return guarded

    return guard


def _method_not_allowed(methods: list[str]) -> Handler:
    async def refuse(request: web.Request) -> web.StreamResponse:
        return web.Response(status=405, headers={"Allow": ",".join(methods)})

    return refuse


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
