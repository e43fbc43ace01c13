"""The OpenAPI description of one store's API: its columns, its classes, and every answer that may come.

It is written by hand, next to the code that it describes: routes declare no body, so that a door is asked before
anything is read, and nothing could be derived from them.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np

from sisa import __version__
from sisa.learners.columns import feature_specs
from sisa.ledger import STATES
from sisa.planning.clocks import REGIMES
from sisa.recipe import ColumnSpec, Recipe
from sisa.serving.deletions import MOST_LISTED
from sisa.serving.inference import NUMBERS, OUTPUTS
from sisa.serving.limits import MAX_BODY_BYTES

JSON = dict[str, Any]
TEXT: JSON = {"type": "string"}
INTEGER: JSON = {"type": "integer"}
MAYBE_INTEGER: JSON = {"type": ["integer", "null"]}
MAYBE_TEXT: JSON = {"type": ["string", "null"]}
TIME: JSON = {"type": "string", "format": "date-time"}
MAYBE_TIME: JSON = {"type": ["string", "null"], "format": "date-time"}
LARGEST_FLOAT64, LARGEST_FLOAT32 = float(np.finfo(np.float64).max), float(np.finfo(np.float32).max)
STAGE_STATES = ["serving", "trained", "quarantined", "retraining", "empty"]
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


BODY = "400 408 413 415 422 503"
"""How a request with a body may fail."""


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
    paths = {"/predict": {"post": _operation("Predict rows", "Rows", "Prediction", BODY, arrow=True)}}
    for version in ("", "/versions/{version}"):
        model, unknown = f"/v2/models/{quote(name, safe='')}{version}", " 404" if version else ""
        about = {
            model: {"get": _operation("Inputs, outputs and classes", None, "Model", unknown)},
            f"{model}/ready": {"get": _operation("Whether the model answers", None, "Ready", f"503{unknown}")},
            f"{model}/infer": {
                "post": _operation("Open Inference Protocol v2", "Inference", "Inferred", BODY + unknown)
            },
        }
        not_ready = about[f"{model}/ready"]["get"]["responses"]["503"]
        for operations in about.values():
            _plain_errors(next(iter(operations.values())))
            if version:
                operations["parameters"] = [_in_path("version")]  # type: ignore[assignment]
        either = [{"$ref": "#/components/schemas/Ready"}, {"$ref": "#/components/schemas/PlainError"}]
        not_ready["content"]["application/json"]["schema"] = {"anyOf": either}
        paths |= about
    return paths


def _plain_errors(operation: JSON) -> None:
    """Say that errors have the protocol's form."""
    for code, answer in operation["responses"].items():
        if code >= "400":
            answer["content"]["application/json"]["schema"] = {"$ref": "#/components/schemas/PlainError"}


def _deletions() -> JSON:
    submit = _operation("Delete people or records", "Deletion", "Receipt", f"{BODY} 404", status="202")
    submit["parameters"] = [
        {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 255}}
    ]
    listed = _operation("A page of deletions, oldest first", None, "Requests", "422 503")
    listed["parameters"] = [
        _in_query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_LISTED, "default": MOST_LISTED}),
        _in_query("after", {**TEXT, "description": "A request's id: what the page before said as `next`."}),
    ]
    one = _operation("One deletion, its timeline and its evidence", None, "RequestDetail", "404 503")
    return {
        "/deletions": {"post": submit, "get": listed},
        "/deletions/{request_id}": {"get": one, "parameters": [_in_path("request_id")]},
    }


def _in_query(name: str, schema: JSON) -> JSON:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _in_path(name: str) -> JSON:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _operations() -> JSON:
    operations = {path: _operation(text, None, answer, failures, door=False) for path, text, answer, failures in (
        ("/livez", "Whether the process runs", "Live", ""),
        ("/readyz", "Whether this replica answers", "Ready", ""),
        ("/v2/health/live", "Whether the process runs", "Live", ""),
        ("/v2/health/ready", "Whether this replica answers", "Ready", ""),
        ("/v2", "The server", "Server", ""), ("/openapi.json", "This description", "Any", ""),
    )}  # fmt: skip
    for path in ("/readyz", "/v2/health/ready"):
        operations[path]["responses"]["503"] = {**operations[path]["responses"]["200"], "description": REASONS["503"]}
    state = operations["/state"] = _operation("All that the page shows", None, "State", "503")
    state["parameters"] = [{"name": "If-None-Match", "in": "header", "required": False, "schema": TEXT}]
    state["responses"]["200"]["headers"] = {"ETag": {"required": True, "schema": TEXT}}
    state["responses"]["304"] = {"description": "Nothing changed but the time."}
    scrape = operations["/metrics"] = _operation("What Prometheus reads", None, "Any", "503")
    scrape["responses"]["200"]["content"] = {"text/plain": {"schema": TEXT}}
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
    return {
        "Any": {"type": "object"},
        "Error": _object({"error": _object({"message": TEXT, "hint": TEXT})}),
        "PlainError": _object({"error": TEXT}),
        "Live": _object({"live": {"const": True}}),
        "Ready": {**_object({"ready": {"type": "boolean"}, "version": INTEGER, "reason": TEXT}),
                  "required": ["ready", "reason"]},
        "Server": _object({"name": TEXT, "version": TEXT, "extensions": _list(TEXT)}),
        **_prediction_schemas(features, classes),
        **_inference_schemas(features, classes),
        **_deletion_schemas(),
        "State": _state(classes),
    }  # fmt: skip


def _prediction_schemas(features: JSON, classes: list[bool | int | str]) -> JSON:
    scores = {**_list({"type": "number"}), "minItems": len(classes), "maxItems": len(classes)}
    return {
        "Rows": _object({"rows": _list(_object(features))}),
        "Prediction": _object({
            "version": INTEGER, "path": TEXT, "voters": INTEGER, "predictions": _list({"enum": classes}),
            "scores": _list(scores),
        }),
    }  # fmt: skip


def _inference_schemas(features: JSON, classes: list[bool | int | str]) -> JSON:
    described = _list(_object({"name": TEXT, "datatype": TEXT, "shape": _list(INTEGER)}))
    asked = {**_object({"name": {"enum": list(OUTPUTS)}, "parameters": {"type": "object"}}), "required": ["name"]}
    given = {"name": {"enum": list(features)}, "shape": _list({"type": "integer", "minimum": 0}),
             "datatype": {"enum": ["BYTES", *NUMBERS]}, "parameters": {"type": "object"}, "data": {"type": "array"}}  # fmt: skip
    tensor = {**_object(given), "required": ["name", "shape", "datatype", "data"]}
    inputs = {**_list(tensor), "minItems": len(features), "maxItems": len(features)}
    inference = {"id": TEXT, "parameters": {"type": "object"}, "inputs": inputs, "outputs": _list(asked)}
    made = {"name": {"enum": list(OUTPUTS)}, "datatype": TEXT, "shape": _list(INTEGER), "data": {"type": "array"}}
    inferred = {"model_name": TEXT, "model_version": TEXT, "id": TEXT, "outputs": _list(_object(made))}
    return {
        "Model": _object({
            "name": TEXT, "versions": _list(TEXT), "platform": TEXT, "inputs": described, "outputs": described,
            "parameters": _object({"classes": _list({"enum": classes})}),
        }),
        "Inference": {**_object(inference), "required": ["inputs"]},
        "Inferred": {**_object(inferred), "required": ["model_name", "model_version", "outputs"]},
    }  # fmt: skip


def _deletion_schemas() -> JSON:
    ids = {"type": "array", "minItems": 1, "items": {"type": ["string", "integer"], "minLength": 1}}
    told = {"reason": {"type": "string", "maxLength": 10_000}, "regime": {"enum": list(REGIMES)},
            "ignore_missing": {"type": "boolean"}}  # fmt: skip
    request = _request()
    purged = {"shard": INTEGER, "stage": INTEGER, "at": TIME}
    evidence = {"stages_purged": _list(_object(purged)), "stages_retrained": _list(_object({**purged, "worker": TEXT})),
                "version_quarantine": MAYBE_INTEGER, "version_after": MAYBE_INTEGER}  # fmt: skip
    detail = {**request, "timeline": _list(_object({"at": TIME, "what": TEXT})), "evidence": _object(evidence)}
    return {
        "Deletion": {"oneOf": [
            {**_object({kind: ids, **told}), "required": [kind]} for kind in ("subjects", "records")
        ]},
        "Receipt": _object({
            "request": TEXT, "requests": _list(TEXT), "state": {"enum": list(STATES)},
            "version_quarantine": MAYBE_INTEGER, "missing": _list(TEXT), "repeated": {"type": "boolean"},
        }),
        "Request": _object(request),
        "Requests": _object({
            "deletions": _list({"$ref": "#/components/schemas/Request"}), "next": MAYBE_TEXT,
        }),
        "RequestDetail": _object(detail),
    }  # fmt: skip


def _request() -> JSON:
    """Fields of a deletion."""
    return {
        "request": TEXT, "kind": {"enum": ["deletion", "correction"]}, "state": {"enum": list(STATES)}, "created_at": TIME, "updated_at": TIME, "reason": TEXT,
        "regime": {"enum": list(REGIMES)}, "due_at": MAYBE_TIME, "subjects": INTEGER, "records": INTEGER,
        "shards": _list(INTEGER), "slices": _list(INTEGER), "stages_retrained": INTEGER, "version_before": INTEGER,
        "version_quarantine": MAYBE_INTEGER, "version_after": MAYBE_INTEGER,
        "seconds_to_quarantine": {"type": ["number", "null"]}, "note": TEXT,
    }  # fmt: skip


def _state(classes: list[bool | int | str]) -> JSON:
    stage = {"shard": INTEGER, "stage": INTEGER, "state": {"enum": STAGE_STATES}, "records": INTEGER,
             "created_at": MAYBE_TIME}  # fmt: skip
    version = {"number": INTEGER, "created_at": TIME, "cause": TEXT, "request": MAYBE_TEXT, "voters": INTEGER,
               "accuracy": {"type": ["number", "null"]}}  # fmt: skip
    replica = {"id": TEXT, "version": INTEGER, "confirmed": {"type": "boolean"}}
    numbers = ("version", "shards", "slices", "generations", "records", "subjects", "holdout_records", "open_requests")
    return _object({
        "store": TEXT, "now": TIME, "state": TEXT, **dict.fromkeys(numbers, INTEGER), "classes": _list({"enum": classes}),
        "aggregation": TEXT, "aggregation_in_use": TEXT, "stages": _list(_object(stage)), "versions": _list(_object(version)),
        "requests": _list({"$ref": "#/components/schemas/Request"}), "oldest_open_at": MAYBE_TIME,
        "replicas": _list(_object(replica)), "lease_seconds": {"type": "number"},
    })  # fmt: skip


def _value(spec: ColumnSpec) -> JSON:
    if spec.type == "vector":
        elements = {"type": ["number", "boolean", "null"], "minimum": -LARGEST_FLOAT32, "maximum": LARGEST_FLOAT32}
        return {"type": ["array", "null"], "items": elements, "minItems": spec.size, "maxItems": spec.size}
    if spec.type == "numeric":
        return {"type": ["number", "boolean", "null"], "minimum": -LARGEST_FLOAT64, "maximum": LARGEST_FLOAT64}
    return {"type": ["string", "integer", "boolean", "null"]}


def _list(items: JSON) -> JSON:
    return {"type": "array", "items": items}


def _object(properties: JSON) -> JSON:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
