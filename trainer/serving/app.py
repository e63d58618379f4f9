"""The routes, behind one guard that every request passes first."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from trainer.serving.chat import Chat
from trainer.serving.door import Door, knows, names_us
from trainer.serving.gate import Gate
from trainer.serving.metric import CONTENT_TYPE, Meters, outcome_of
from trainer.serving.page import make_page
from trainer.serving.refusal import RequestRefused, error_body, failed, stopping

COMPLETIONS = "/v1/chat/completions"
CLIENT_GONE = 499  # nobody sees it


def make_app(chat: Chat, gate: Gate, meters: Meters, door: Door, *, began: int) -> "Guard":
    """`began`: seconds since 1970, told as the model's birth."""
    page = make_page(files("trainer.serving").joinpath("page.html").read_text(encoding="utf-8"), token=bool(door.token))
    model = {"id": chat.name, "object": "model", "created": began, "owned_by": "omnilaunch"}
    # No page that describes the routes: it would load its scripts from elsewhere. No answer that sends a client elsewhere.
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
        phase = gate.phase
        return JSONResponse({"status": phase}, 200 if phase == "open" else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(meters.text(), media_type=CONTENT_TYPE)

    @app.get("/", response_model=None)
    async def show_page() -> Response:
        return page.response(200)

    app.add_exception_handler(RequestRefused, tell)
    app.add_exception_handler(HTTPException, tell_route)
    app.add_exception_handler(ClientDisconnect, tell_nobody)
    app.add_exception_handler(Exception, tell_failure)
    return Guard(app, gate, door, meters, page.response(401))


class Guard:
    """Host, origin and token of every request, and whether this is the time for it, before anything of it is read."""

    def __init__(self, app: ASGIApp, gate: Gate, door: Door, meters: Meters, page: Response) -> None:
        self.app, self.gate, self.door, self.meters, self.page = app, gate, door, meters, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, asks = Headers(scope=scope), scope["path"] == COMPLETIONS and scope["method"] == "POST"
        try:
            self.judge(headers)
            if asks:
                self.judge_time()
                with self.gate.visit():
                    await self.app(scope, receive, send)
                return
        except RequestRefused as refusal:
            if asks:
                self.meters.requests.labels(outcome_of(refusal.status)).inc()
            browser = refusal.status == 401 and scope["path"] == "/" and "text/html" in headers.get("accept", "")
            await (self.page if browser else answer(refusal))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def judge(self, headers: Headers) -> None:
        """Raises RequestRefused."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.door.loopback and not names_us(host):
            raise RequestRefused(403, "this server is called by 127.0.0.1, [::1] or localhost alone", code="host_not_allowed")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestRefused(403, "pages of other origins may not ask this server", code="origin_not_allowed")
        if self.door.token:
            given = headers.getlist("authorization")
            scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
            if scheme.lower() != "bearer" or not knows(self.door.token, token.strip(" ")):
                raise RequestRefused(401, "this server asks for a token: send Authorization: Bearer TOKEN", code="invalid_api_key")

    def judge_time(self) -> None:
        phase = self.gate.phase
        if phase == "draining":
            raise stopping()
        if phase == "loading":
            raise RequestRefused(503, "the model is being loaded; ask again later", code="loading", retry_s=5)


def answer(refusal: RequestRefused) -> Response:
    return JSONResponse(error_body(refusal), refusal.status, headers=refusal.headers)


async def tell(request: Request, error: Any) -> Response:
    return answer(error)


async def tell_route(request: Request, error: Any) -> Response:
    what = {404: "no such route", 405: "the route takes another method"}.get(error.status_code, "refused")
    refusal = answer(RequestRefused(error.status_code, f"{what}; see POST {COMPLETIONS} and GET /v1/models", code="unknown_route"))
    refusal.headers.update(error.headers or {})
    return refusal


async def tell_nobody(request: Request, error: Any) -> Response:
    return Response(status_code=CLIENT_GONE)


async def tell_failure(request: Request, error: Any) -> Response:
    return answer(failed())
