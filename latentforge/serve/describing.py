"""The page that describes the endpoints: its script and style come from this machine, never from another host."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse
from pydantic import BaseModel

_PAGE, _SCHEMA = "/docs", "/openapi.json"
_PARTS = {  # of the page: files of Swagger UI that fastapi-offline carries
    "/docs/swagger-ui-bundle.js": "text/javascript",
    "/docs/swagger-ui.css": "text/css",
    "/docs/favicon.png": "image/png",
}
DESCRIPTION = (_PAGE, _SCHEMA, *_PARTS)
"""What a browser asks for to show the page; it sends no key of its own, and the same is said of every server."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)
"""The browser asks nobody else, whatever the script would like to: the page's own lines are all that is inline."""


def add_page(app: FastAPI) -> None:
    """Answer /docs, and what that page refers to."""
    folder = Path(str(files("fastapi_offline"))) / "static"

    @app.get(_PAGE, include_in_schema=False)
    async def page() -> HTMLResponse:
        script, style, icon = _PARTS
        answer = get_swagger_ui_html(
            openapi_url=_SCHEMA,
            title=app.title,
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url=icon,
            swagger_ui_parameters={"validatorUrl": None},
        )
        answer.headers["Content-Security-Policy"] = _POLICY
        return answer

    def part(path: str, kind: str) -> None:
        @app.get(path, include_in_schema=False)
        async def answer() -> FileResponse:
            return FileResponse(folder / path.rpartition("/")[2], media_type=kind)

    for path, kind in _PARTS.items():
        part(path, kind)


def body(kind: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is told of an endpoint's body, whose schema ``complete_schema`` adds."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def complete_schema(app: FastAPI, *kinds: type[BaseModel], key: bool) -> None:
    """Describe the bodies, which are read here and not by FastAPI, and the ``key`` where one is needed; leave out the
    errors of FastAPI's own, which nobody is answered with."""
    found = app.openapi()
    for path in found["paths"].values():
        for operation in path.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    parts: dict[str, Any] = {"schemas": {}}
    found["components"] = parts
    if key:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    for kind in kinds:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        parts["schemas"][kind.__name__] = schema
