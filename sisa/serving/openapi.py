"""The OpenAPI description of one store's API: its columns, its classes, and every answer that may come."""

from __future__ import annotations

from typing import Any

from sisa import __version__
from sisa.learners.columns import feature_specs
from sisa.ledger import STATES
from sisa.planning.clocks import REGIMES
from sisa.recipe import ColumnSpec, Recipe
from sisa.serving.limits import MAX_BODY_BYTES

JSON = dict[str, Any]
TEXT: JSON = {"type": "string"}
INTEGER: JSON = {"type": "integer"}
MAYBE_INTEGER: JSON = {"type": ["integer", "null"]}
ERROR = {"$ref": "#/components/schemas/Error"}
REASONS = {
    "400": "The body is not what its content type says.",
    "401": "A token is missing or wrong.",
    "403": "The token has another scope.",
    "404": "There is no such thing.",
    "408": "The body came too slowly.",
    "413": "The body, or the number of rows, is too large.",
    "415": "Another content type is expected.",
    "422": "A field, column or value is not what is expected; nothing was changed.",
    "429": "The token asked too often.",
    "503": "The store or this replica can't answer now.",
}


def describe(name: str, recipe: Recipe) -> JSON:
    """Return the description of the API of one store."""
    classes = list(recipe.data.classes or [])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"sisa: {name}",
            "version": __version__,
            "description": "Predictions of an ensemble that forgets, and deletions from it.",
        },
        "paths": {**_predictions(name), **_deletions(), **_operations()},
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {**_schemas(recipe, classes)},
        },
    }


def _predictions(name: str) -> JSON:
    model = f"/v2/models/{name}"
    return {
        "/predict": {"post": _operation("Predict rows", "Rows", "Prediction", "400 408 413 415 422 503", arrow=True)},
        model: {"get": _operation("Inputs, outputs and classes", None, "Model", "")},
        f"{model}/ready": {"get": _operation("Whether the model answers", None, "Any", "503")},
        f"{model}/infer": {
            "post": _operation("Open Inference Protocol v2", "Inference", "Any", "400 408 413 415 422 503")
        },
    }


def _deletions() -> JSON:
    submit = _operation("Delete people or records", "Deletion", "Receipt", "400 404 408 413 415 422 503", status="202")
    submit["parameters"] = [
        {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 255}}
    ]
    one = _operation("One deletion, its timeline and its evidence", None, "Any", "404 503")
    one["parameters"] = [{"name": "request_id", "in": "path", "required": True, "schema": TEXT}]
    return {
        "/deletions": {"post": submit, "get": _operation("All deletions, oldest first", None, "Any", "503")},
        "/deletions/{request_id}": {"get": one},
    }


def _operations() -> JSON:
    operations = {path: _operation(text, None, "Any", "503", door=False) for path, text in (
        ("/livez", "Whether the process runs"), ("/readyz", "Whether this replica answers"),
        ("/v2/health/live", "Whether the process runs"), ("/v2/health/ready", "Whether this replica answers"),
        ("/v2", "The server"),
    )}  # fmt: skip
    operations["/state"] = _operation("All that the page shows", None, "Any", "503")
    return {path: {"get": operation} for path, operation in operations.items()}


def _operation(
    summary: str,
    body: str | None,
    answer: str,
    failures: str,
    *,
    status: str = "200",
    door: bool = True,
    arrow: bool = False,
) -> JSON:
    codes = failures.split() + (["401", "403", "429"] if door else [])
    content: JSON = {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}
    found: JSON = {
        "summary": summary,
        "responses": {
            status: {"description": "Done.", "content": content},
            **{code: _failure(code) for code in sorted(codes)},
        },
    }
    if door:
        found["security"] = [{"token": []}]
    if body is not None:
        kinds: JSON = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        if arrow:
            stream = {"schema": {"type": "string", "contentMediaType": "application/vnd.apache.arrow.stream"}}
            kinds["application/vnd.apache.arrow.stream"] = stream
            content["application/vnd.apache.arrow.stream"] = stream
        found["requestBody"] = {"required": True, "content": kinds, "description": f"At most {MAX_BODY_BYTES:,} bytes."}
    return found


def _failure(code: str) -> JSON:
    return {"description": REASONS[code], "content": {"application/json": {"schema": ERROR}}}


def _schemas(recipe: Recipe, classes: list[bool | int | str]) -> JSON:
    features = {name: _value(spec) for name, spec in feature_specs(recipe)}
    row = _object(features)
    label = {"enum": classes}
    scores = {"type": "array", "items": {"type": "number"}, "minItems": len(classes), "maxItems": len(classes)}
    ids = {"type": "array", "minItems": 1, "items": {"type": ["string", "integer"]}}
    told = {"reason": {"type": "string", "maxLength": 10_000}, "regime": {"enum": list(REGIMES)},
            "ignore_missing": {"type": "boolean"}}  # fmt: skip
    return {
        "Any": {"type": "object"},
        "Error": _object({"error": _object({"message": TEXT, "hint": TEXT})}),
        "Rows": _object({"rows": {"type": "array", "items": row}}),
        "Prediction": _object({
            "version": INTEGER, "path": TEXT, "voters": INTEGER,
            "predictions": {"type": "array", "items": label}, "scores": {"type": "array", "items": scores},
        }),
        "Deletion": {"oneOf": [
            {**_object({kind: ids, **told}), "required": [kind]} for kind in ("subjects", "records")
        ]},
        "Receipt": _object({
            "request": TEXT, "requests": {"type": "array", "items": TEXT}, "state": {"enum": list(STATES)},
            "version_quarantine": MAYBE_INTEGER, "missing": {"type": "array", "items": TEXT},
            "repeated": {"type": "boolean"},
        }),
        "Model": _object({
            "name": TEXT, "versions": {"type": "array", "items": TEXT}, "platform": TEXT,
            "inputs": {"type": "array"}, "outputs": {"type": "array"},
            "parameters": _object({"classes": {"type": "array", "items": label}}),
        }),
        "Inference": {
            "type": "object", "required": ["inputs"], "additionalProperties": False,
            "properties": {
                "id": TEXT, "parameters": {"type": "object"},
                "inputs": {"type": "array", "items": _tensor(), "minItems": len(features)},
                "outputs": {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {
                    "name": {"enum": ["prediction", "scores", "version"]}}}},
            },
        },
    }  # fmt: skip


def _tensor() -> JSON:
    properties = {
        "name": TEXT,
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": TEXT,
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    }
    return {**_object(properties), "required": ["name", "shape", "datatype", "data"]}


def _value(spec: ColumnSpec) -> JSON:
    if spec.type == "vector":
        elements = {"type": ["number", "null"]}
        return {"type": ["array", "null"], "items": elements, "minItems": spec.size, "maxItems": spec.size}
    return {"type": ["number", "null"] if spec.type == "numeric" else ["string", "integer", "boolean", "null"]}


def _object(properties: JSON) -> JSON:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
