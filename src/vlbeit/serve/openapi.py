"""The OpenAPI 3.1 document, written from the table of modes."""

from typing import Any

from vlbeit import __version__
from vlbeit.config import ServeConfig
from vlbeit.serve.modes import MODES, NUMBER, STRING, Field, Kind, Mode, Schema, array, record

ERROR = record(error=record(code=STRING, message=STRING, request_id=STRING))
STATUSES = {
    400: "malformed, or a field is missing, unknown, of a wrong type or out of range",
    401: "the server wants a token (Bearer, or the password of Basic)",
    403: "a page of another origin asks",
    404: "no such route",
    405: "another method",
    408: "the request did not arrive in time",
    409: "no run served has this mode; the message names the command that adds it",
    411: "a body without a length",
    413: "a body, text or picture over its limit",
    415: "a content type or encoding that is not read",
    421: "the Host is none of the server's",
    422: "a picture or text that cannot be used",
    500: "the server failed",
    503: "busy or leaving; Retry-After says when to come again",
    504: "no answer before the deadline",
}
"""Of every error the server answers with, and what it means."""


def document(config: ServeConfig) -> dict[str, Any]:
    """The description of every route, for `/openapi.json`."""
    errors = {
        str(status): {
            "description": meaning,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, meaning in STATUSES.items()
    }
    paths: dict[str, Any] = {
        f"/v1/{mode.name}": {"post": operation(mode, config, errors)} for mode in MODES.values()
    }
    for path, (summary, kind) in GET_ROUTES.items():
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        paths[path] = {
            "get": {
                "summary": summary,
                "parameters": [
                    {"name": name, "in": "path", "required": True, "schema": STRING}
                    for name in names
                ],
                "responses": {"200": {"description": summary, "content": {kind: {}}}, **errors},
            }
        }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "vlbeit", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": ERROR}},
    }
    if config.token:
        described["components"]["securitySchemes"] = {
            name: {"type": "http", "scheme": name} for name in ("bearer", "basic")
        }
        described["security"] = [{"bearer": []}, {"basic": []}]
        for open_path in OPEN_ROUTES:
            paths[open_path]["get"]["security"] = []
    return described


GET_ROUTES = {
    "/": ("The page", "text/html"),
    "/static/{name}": ("A file of the page", "*/*"),
    "/examples": ("Example pictures of the page", "application/json"),
    "/indexed/{number}": ("A picture of the index that is searched, small", "image/jpeg"),
    "/live": ("200 while the server answers at all", "application/json"),
    "/ready": ("200 while the model answers and the server is not leaving", "application/json"),
    "/info": ("Runs, modes and limits", "application/json"),
    "/metrics": ("Counters in Prometheus' text format", "text/plain"),
    "/openapi.json": ("This document", "application/json"),
}
"""Path to what it gives and its media type; with /v1/MODE all that the server answers."""
OPEN_ROUTES = ("/live", "/ready")
"""These need no token: they are asked by what starts and stops servers."""


def operation(mode: Mode, config: ServeConfig, errors: dict[str, Any]) -> dict[str, Any]:
    def content(form: bool) -> Schema:
        found: Schema = {
            "type": "object",
            "properties": {f.name: field_schema(f, config, form) for f in mode.fields},
            "required": [f.name for f in mode.fields if f.required],
            "additionalProperties": False,
        }
        if mode.one_of:
            found["oneOf"] = [{"required": [name]} for name in mode.one_of]
        return {"schema": found}

    return {
        "summary": mode.help,
        "operationId": mode.name,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": content(form=False),
                "multipart/form-data": content(form=True),
            },
        },
        "responses": {
            "200": {
                "description": mode.help,
                "content": {"application/json": {"schema": mode.answer}},
            },
            **errors,
        },
    }


def field_schema(field: Field, config: ServeConfig, form: bool) -> Schema:
    return {"description": field.help, **_value_schema(field.kind, config, form)}


def _value_schema(kind: Kind, config: ServeConfig, form: bool) -> Schema:
    match kind:
        case Kind.PICTURE | Kind.WHOLE_PICTURE:
            media = "application/octet-stream"
            if form:
                return {"type": "string", "contentMediaType": media}
            return {"type": "string", "contentEncoding": "base64", "contentMediaType": media}
        case Kind.TEXT:
            return {"type": "string", "minLength": 1, "maxLength": config.max_characters}
        case Kind.TOP:
            return {"type": "integer", "minimum": 1, "maximum": config.max_top}
        case Kind.LAYER:
            return {"type": "integer", "minimum": 1}
        case Kind.PATCHES:
            return {**array({**NUMBER, "type": "integer", "minimum": 0}), "minItems": 1}
