"""The endpoints: OpenAI's completions and models, /generate of our own, health, readiness and figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from latentforge import __version__
from latentforge.serve.answers import Completion, Generation, Served, encoded
from latentforge.serve.asking import CompletionAsk, GenerateAsk, StreamOptions, parse
from latentforge.serve.describing import DESCRIPTION, add_page, body, complete_schema
from latentforge.serve.engine import Engine
from latentforge.serve.guard import OPEN, App, Guard, Measured
from latentforge.serve.limits import Limits
from latentforge.serve.measures import Measures
from latentforge.serve.preparing import completion_choices, deadline_of, generate_choices, prompt_tokens
from latentforge.serve.refusing import Refusal, error_body
from latentforge.serve.talking import EventStream, Gone, read_body, while_connected
from latentforge.serve.texts import Choice, Conversation
from latentforge.writers.opening import Writer

PATHS = ("/", "/v1/completions", "/v1/models", "/generate", "/health", "/ready", "/metrics", *DESCRIPTION)
_UNREAD = 60.0  # seconds after its deadline until a stream that nobody reads is given up
_REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong: `error.param` names it"},
    401: {"description": "the key is missing or wrong"},
    404: {"description": "there is no such path, or no such model"},
    408: {"description": "the body did not come in time"},
    413: {"description": "the body is too long"},
    415: {"description": "the body is no JSON"},
    422: {"description": "no text came of it: `exact` found no draw that it accepts"},
    429: {"description": "the queue is full: `Retry-After` says when to come back"},
    503: {"description": "not ready, or stopping"},
    504: {"description": "the deadline passed first"},
}
_SHORT = 512  # bytes of a body: its prompt is walked through once for each of up to 64 texts
Answer = TypeVar("Answer")
Asked = TypeVar("Asked", CompletionAsk, GenerateAsk)


class Service:
    """What the endpoints share: the engine, under the ``name`` that clients know."""

    def __init__(self, engine: Engine, limits: Limits, measures: Measures, name: str) -> None:
        self.engine, self.limits, self.measures, self.name = engine, limits, measures, name
        self._created = int(time.time())

    @property
    def served(self) -> Served:
        """The writer by its name; a Refusal where it is not ready."""
        return Served(self.engine.writer, self.name, self._created)

    async def begin(
        self, request: Request, kind: type[Asked], choices: Callable[[Asked, Writer, Limits], list[Choice]]
    ) -> tuple[Asked, Served, Conversation]:
        """Read what is asked for, and ask for its texts."""
        began = time.monotonic()
        sent = await read_body(request, self.limits.max_body)

        def prepare() -> tuple[Asked, Served, list[Choice]]:
            asked = parse(kind, sent)
            if isinstance(asked, CompletionAsk):
                self.check_name(asked.model)
            served = self.served
            return asked, served, choices(asked, served.writer, self.limits)

        # A long prompt becomes tokens beside the loop; for a short one that takes longer than it does.
        asked, served, found = prepare() if len(sent) <= _SHORT else await asyncio.to_thread(prepare)
        conversation = Conversation(self.engine, found, began + deadline_of(asked, self.limits))
        self.measures.prompt_tokens.inc(prompt_tokens(asked, found))
        return asked, served, conversation

    def check_name(self, name: str) -> None:
        """A Refusal (404) where that is another model's."""
        if name != self.name:
            message = f"there is no such model; this server has {self.name}"
            raise Refusal(404, message, field="model", code="model_not_found")

    async def whole(self, request: Request, conversation: Conversation, answer: Awaitable[Answer]) -> Answer:
        """The answer, unless the client leaves before; then the work on it ends too."""
        try:
            return await while_connected(request.receive, answer)
        finally:
            conversation.close()

    def events(self, conversation: Conversation, answer: Completion | Generation) -> EventStream:
        """The answer as a stream."""
        seconds = self.limits.deadline + _UNREAD
        return EventStream(encoded(answer.events()), close=conversation.close, seconds=seconds)


def build(service: Service, *, key: str | None, hosts: list[str] | None, origins: list[str]) -> App:
    """The whole application, with figures, CORS and key around its endpoints."""
    app = FastAPI(
        title="LatentForge",
        version=__version__,
        description="Writes text with a student of K tokens a step, or of one. Errors are OpenAI's: `{error: {message, "
        "type, param, code}}`; `param` is the field to mend.",
        docs_url=None,
        redoc_url=None,
        # Its redirect would name a proxy's host by http: the client would send its key there in clear.
        redirect_slashes=False,
    )
    _routes(app, service)
    _errors(app)
    add_page(app)
    complete_schema(app, CompletionAsk, GenerateAsk, StreamOptions, key=key is not None)
    guarded = Guard(app, key=key, hosts=hosts, open_paths=(*OPEN, *DESCRIPTION))
    shared = CORSMiddleware(
        guarded,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )
    return Measured(shared, service.measures, PATHS)


def _routes(app: FastAPI, service: Service) -> None:
    @app.get("/")
    async def about() -> dict[str, Any]:
        """What this server is."""
        about = {"name": "latentforge", "version": __version__, "status": service.engine.state, "model": service.name}
        return {**about, **(service.served.facts() if service.engine.state == "ready" else {})}

    @app.get("/health")
    async def health() -> dict[str, str]:
        """That the process is alive, whatever it is busy with."""
        return {"status": "alive"}

    @app.get("/ready", responses={503: {"description": "not ready"}})
    async def ready() -> JSONResponse:
        """Whether texts can be asked for: 503 while the model is loaded, and once the server is stopping."""
        state = service.engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(await asyncio.to_thread(service.measures.text), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served model, as OpenAI lists it."""
        return {"object": "list", "data": [service.served.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """The served model, by its name."""
        service.check_name(name)
        return service.served.card()

    @app.post("/v1/completions", responses=_REFUSED, openapi_extra=body(CompletionAsk))
    async def completions(request: Request) -> Response:
        """OpenAI's completions: one or several texts after each prompt, whole or as server-sent events."""
        asked, served, conversation = await service.begin(request, CompletionAsk, completion_choices)
        answer = Completion(asked, served, conversation)
        if asked.stream:
            return service.events(conversation, answer)
        return JSONResponse(await service.whole(request, conversation, answer.whole()))

    @app.post("/generate", responses=_REFUSED, openapi_extra=body(GenerateAsk))
    async def generate(request: Request) -> Response:
        """A text after a prompt with all that is known of it, whole or as server-sent events."""
        asked, served, conversation = await service.begin(request, GenerateAsk, generate_choices)
        answer = Generation(served, conversation)
        if asked.stream:
            return service.events(conversation, answer)
        return JSONResponse(await service.whole(request, conversation, answer.finish()))


def _errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(HTTPException)
    async def not_so(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Gone)
    async def gone(_: Request, __: Gone) -> Response:
        return Response(status_code=499)  # nobody reads it; it is counted

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "the server could not answer", code="broken"), 500)
