"""The HTTP routes, behind one middleware that checks every request first."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from trainer.serving.admission import Admission
from trainer.serving.chat import ChatHandler
from trainer.serving.endpoint import Endpoint, is_loopback_host, tokens_match
from trainer.serving.metric import CONTENT_TYPE, Metrics, outcome_of
from trainer.serving.page import make_page
from trainer.serving.refusal import RequestRefused, error_body, failed, stopping

COMPLETIONS = "/v1/chat/completions"
CLIENT_CLOSED = 499  # nginx's code for a client that disconnected; the response is never sent


def make_app(chat: ChatHandler, admission: Admission, metrics: Metrics, endpoint: Endpoint, *, began: int) -> "AccessMiddleware":
    """`began`: seconds since 1970, reported as the time when the model was created."""
    page = make_page(files("trainer.serving").joinpath("page.html").read_text(encoding="utf-8"), token=bool(endpoint.token))
    model = {"id": chat.name, "object": "model", "created": began, "owned_by": "omnilaunch"}
    # No documentation pages, because they load scripts from other hosts; no redirects.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.post(COMPLETIONS, response_model=None)
    async def complete(request: Request) -> Response:
        return await chat.complete(request)

    @app.get("/v1/models", response_model=None)
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}", response_model=None)
    async def show_model(name: str) -> Response:
        if name != chat.name:
            raise RequestRefused(404, f"this server has {chat.name!r}", param="model", code="model_not_found")
        return JSONResponse(model)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        phase = admission.phase
        return JSONResponse({"status": phase}, 200 if phase == "open" else 503)

    @app.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", response_model=None)
    async def show_page() -> Response:
        return page.response(200)

    app.add_exception_handler(RequestRefused, handle_refusal)
    app.add_exception_handler(HTTPException, handle_http_error)
    app.add_exception_handler(ClientDisconnect, handle_disconnect)
    app.add_exception_handler(Exception, handle_failure)
    return AccessMiddleware(app, admission, endpoint, metrics, page.response(401))


class AccessMiddleware:
    """Checks host, origin and token of every request, and whether the server accepts requests, before the body is read."""

    def __init__(self, app: ASGIApp, admission: Admission, endpoint: Endpoint, metrics: Metrics, page: Response) -> None:
        self.app, self.admission, self.endpoint, self.metrics, self.page = app, admission, endpoint, metrics, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, completes = Headers(scope=scope), scope["path"] == COMPLETIONS and scope["method"] == "POST"
        try:
            self.check_access(headers)
            if completes:
                self.check_phase()
                with self.admission.count_request():
                    await self.app(scope, receive, send)
                return
        except RequestRefused as refusal:
            if completes:
                self.metrics.requests.labels(outcome_of(refusal.status)).inc()
            browser = refusal.status == 401 and scope["path"] == "/" and "text/html" in headers.get("accept", "")
            await (self.page if browser else error_response(refusal))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def check_access(self, headers: Headers) -> None:
        """Raises RequestRefused."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.endpoint.loopback and not is_loopback_host(host):
            raise RequestRefused(403, "the Host header must be 127.0.0.1, [::1] or localhost", code="host_not_allowed")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestRefused(403, "requests from pages of other origins are not allowed", code="origin_not_allowed")
        if self.endpoint.token:
            given = headers.getlist("authorization")
            scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
            if scheme.lower() != "bearer" or not tokens_match(self.endpoint.token, token.strip(" ")):
                raise RequestRefused(401, "a token is required: send the header Authorization: Bearer TOKEN", code="invalid_api_key")

    def check_phase(self) -> None:
        phase = self.admission.phase
        if phase == "draining":
            raise stopping()
        if phase == "loading":
            raise RequestRefused(503, "the model is still loading; try again later", code="loading", retry_s=5)


def error_response(refusal: RequestRefused) -> Response:
    return JSONResponse(error_body(refusal), refusal.status, headers=refusal.headers)


async def handle_refusal(request: Request, error: Any) -> Response:
    return error_response(error)


async def handle_http_error(request: Request, error: Any) -> Response:
    what = {404: "no such route", 405: "the route does not accept this method"}.get(error.status_code, "refused")
    refusal = RequestRefused(error.status_code, f"{what}; use POST {COMPLETIONS} or GET /v1/models", code="unknown_route")
    response = error_response(refusal)
    response.headers.update(error.headers or {})
    return response


async def handle_disconnect(request: Request, error: Any) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def handle_failure(request: Request, error: Any) -> Response:
    return error_response(failed())
