"""Open Inference Protocol v2 (KServe/Triton's HTTP protocol), in JSON: one input tensor for each feature.

https://github.com/kserve/open-inference-protocol

Its clients expect an error to be a text, where the rest of this API has an object with a message and a hint.
"""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sisa.learners.columns import feature_specs
from sisa.recipe import Recipe
from sisa.serving.answer import Predictions, json_response
from sisa.serving.bodies import json_object, only_known
from sisa.serving.gather import Answered
from sisa.serving.limits import Refused

REQUEST_FIELDS = {"id": "text", "parameters": "object", "inputs": "list", "outputs": "list"}
TENSOR_FIELDS = {"name": "text", "shape": "list", "datatype": "text", "parameters": "object", "data": "list"}
OUTPUT_FIELDS = {"name": "text", "parameters": "object"}
OUTPUTS = ("prediction", "scores", "version")
NAMED = "The model's metadata list its inputs and outputs."
NUMBERS = ("FP64", "FP32", "FP16", "INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8", "BOOL")


class PlainErrors:
    """Puts message and hint of every error below ``/v2`` into one text, whoever made the error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request (ASGI)."""
        if scope["type"] != "http" or not scope["path"].startswith("/v2/"):
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        content = b""

        async def plain(message: Message) -> None:
            nonlocal start, content
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                content += message.get("body", b"")
                if not message.get("more_body", False):
                    await _send_plain(send, start, content)

        await self._app(scope, receive, plain)


async def _send_plain(send: Send, start: Message, content: bytes) -> None:
    told = json.loads(content)
    if "error" in told:
        error = told["error"]
        content = json.dumps({"error": " ".join(filter(None, [f"{error['message']}.", error["hint"]]))}).encode()
    headers = [(name, value) for name, value in start["headers"] if name != b"content-length"]
    await send({**start, "headers": [*headers, (b"content-length", str(len(content)).encode())]})
    await send({"type": "http.response.body", "body": content})


def model_metadata(name: str, recipe: Recipe, *, version: int) -> dict[str, Any]:
    """Return what ``GET /v2/models/{name}`` answers."""
    classes = list(recipe.data.classes or [])
    return {
        "name": name,
        "versions": [str(version)] if version else [],
        "platform": "sisa_ensemble",
        "inputs": [_described(feature, kind=spec.type, size=spec.size or 0) for feature, spec in feature_specs(recipe)],
        "outputs": [
            {"name": "prediction", "datatype": _class_type(classes), "shape": [-1]},
            {"name": "scores", "datatype": "FP64", "shape": [-1, len(classes)]},
            {"name": "version", "datatype": "INT64", "shape": [1]},
        ],
        "parameters": {"classes": classes},
    }


def _described(feature: str, *, kind: str | None, size: int) -> dict[str, Any]:
    if kind == "vector":
        return {"name": feature, "datatype": "FP32", "shape": [-1, size]}
    return {"name": feature, "datatype": "BYTES" if kind == "categorical" else "FP64", "shape": [-1, 1]}


def check_version(wanted: str | None, version: int) -> None:
    """Make sure that a request names no version but the live one.

    Raises:
        Refused: 404.
    """
    if wanted is not None and wanted != str(version):
        raise Refused(404, "this version is not the live one", hint="Leave the version out, or ask which one is live.")


async def infer(request: Request, name: str, predictions: Predictions, *, wanted: str | None = None) -> Response:
    """Answer ``POST /v2/models/{name}/infer``.

    Args:
        request: The request.
        name: What the model is called.
        predictions: Who answers.
        wanted: The version that has to answer; None for whichever is live.

    Raises:
        Refused: The body is no request of the protocol, or the live version isn't the wanted one.
        UserError: A value isn't what the recipe says it is.
    """
    if "inference-header-content-length" in request.headers:
        raise Refused(415, "tensors in binary form are not supported yet", hint="Send them as JSON: binary_data=False.")
    body = await json_object(request)
    only_known(body, REQUEST_FIELDS, what="the body")
    inputs, outputs = body.get("inputs"), _wanted(body.get("outputs", []))
    if not isinstance(inputs, list):
        raise Refused(422, "inputs: expected a list of tensors", hint=f"GET /v2/models/{name} lists them.")
    _check_parameters(body, "the body")
    found = {"model_name": name, **_id(body)}
    rows = _rows(inputs, predictions)
    answered = await predictions.answer(rows)
    check_version(wanted, answered.version)
    found["model_version"] = str(answered.version)
    return json_response({**found, "outputs": _outputs(answered, outputs, predictions)})


def _id(body: dict[str, Any]) -> dict[str, str]:
    """Return the caller's name for the request, which the answer repeats."""
    if "id" not in body:
        return {}
    if not isinstance(body["id"], str) or not _is_unicode(body["id"]):
        raise Refused(422, "id: expected a text", hint="Leave it out if there is none.")
    return {"id": body["id"]}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_parameters(owner: dict[str, Any], where: str) -> None:
    if not isinstance(owner.get("parameters", {}), dict):
        raise Refused(
            422, f"{where}: expected an object for parameters", hint="Leave them out: none has a meaning here."
        )


def _wanted(outputs: Any) -> list[str]:
    """Return the names of the outputs that were asked for."""
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise Refused(422, "outputs: expected a list of objects", hint="Leave it out to get every output.")
    for position, output in enumerate(outputs):
        only_known(output, OUTPUT_FIELDS, what=f"outputs[{position}]")
        _check_parameters(output, f"outputs[{position}]")
        if output.get("name") not in OUTPUTS:
            raise Refused(
                422, f"outputs[{position}].name: expected {', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}", hint=NAMED
            )
    return [output["name"] for output in outputs] or list(OUTPUTS)


def _rows(inputs: list[Any], predictions: Predictions) -> list[dict[str, Any]]:
    sizes = {name: spec.size for name, spec in feature_specs(predictions.recipe) if spec.type == "vector"}
    texts = {name for name, spec in feature_specs(predictions.recipe) if spec.type == "categorical"}
    columns: dict[str, list[Any]] = {}
    for position, tensor in enumerate(inputs):
        where = f"inputs[{position}]"
        if not isinstance(tensor, dict):
            raise Refused(422, f"{where}: expected an object", hint="A tensor has name, shape, datatype and data.")
        only_known(tensor, TENSOR_FIELDS, what=where)
        _check_parameters(tensor, where)
        name = tensor.get("name")
        if not isinstance(name, str) or name not in predictions.reader.names or name in columns:
            raise Refused(422, f"{where}: the name is no feature's, or comes twice", hint=NAMED)
        columns[name] = _values(tensor, where, size=sizes.get(name), text=name in texts)
    missing = [name for name in predictions.reader.names if name not in columns]
    if missing:
        raise Refused(422, f"inputs: {missing[0]!r} is missing", hint="Send one tensor for each feature.")
    counts = {len(values) for values in columns.values()}
    if len(counts) > 1:
        raise Refused(422, "inputs: tensors have different numbers of rows", hint="The first dimension is the row.")
    predictions.check_count(next(iter(counts)))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _values(tensor: dict[str, Any], where: str, *, size: int | None, text: bool) -> list[Any]:
    """Return one value for each row; data come flat, in row-major order, or nested."""
    shape, datatype, data = tensor.get("shape"), tensor.get("datatype"), tensor.get("data")
    if not isinstance(shape, list) or not isinstance(data, list):
        raise Refused(422, f"{where}: expected lists for shape and data", hint="Data are row-major.")
    allowed = ("BYTES", *NUMBERS[3:]) if text else NUMBERS
    if not isinstance(datatype, str) or datatype not in allowed:
        raise Refused(422, f"{where}.datatype: expected one of {', '.join(allowed)}", hint=NAMED)
    width = size or 1
    good = all(type(n) is int and n >= 0 for n in shape) and len(shape) in {1, 2} and shape[1:] in ([], [width])
    if not good or (size is not None and len(shape) == 1):
        expected = f"[rows, {width}]" if size is not None else "[rows] or [rows, 1]"
        raise Refused(422, f"{where}: expected the shape {expected}", hint=NAMED)
    nested = any(isinstance(row, list) for row in data)
    if nested and not (len(shape) == 2 and all(isinstance(row, list) and len(row) == width for row in data)):
        raise Refused(
            422, f"{where}: the nested data don't have the shape", hint="Or send them flat, in row-major order."
        )
    flat = [value for row in data for value in row] if nested else data
    if len(flat) != shape[0] * width:
        raise Refused(422, f"{where}: the data don't fill the shape", hint="Data are row-major, one value per element.")
    if not all(_is_of(value, datatype) for value in flat):
        raise Refused(
            422, f"{where}: a value is not of the datatype {datatype}", hint="A value that is not known is null."
        )
    return [flat[i : i + width] for i in range(0, len(flat), width)] if size is not None else flat


def _is_of(value: object, datatype: str) -> bool:
    """Say whether a value is one that a tensor's datatype can hold; null stands for a missing one."""
    if value is None:
        return True
    if datatype == "BYTES":
        return isinstance(value, str)
    if datatype == "BOOL":
        return value in {0, 1}
    if isinstance(value, bool):
        return False
    if datatype.startswith("FP"):
        return isinstance(value, int | float)
    bits = int(datatype.removeprefix("U").removeprefix("INT"))
    low, high = (0, 2**bits) if datatype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return isinstance(value, int) and low <= value < high


def _outputs(answered: Answered, names: list[str], predictions: Predictions) -> list[dict[str, Any]]:
    rows = len(answered.predictions)
    flat = [score for scores in answered.scores for score in scores]
    made = {
        "prediction": (_class_type(predictions.classes), [rows], answered.predictions),
        "scores": ("FP64", [rows, len(predictions.classes)], flat),
        "version": ("INT64", [1], [answered.version]),
    }
    return [{"name": n, "datatype": made[n][0], "shape": made[n][1], "data": made[n][2]} for n in names]


def _class_type(classes: list[bool | int | str]) -> str:
    kinds = {type(value) for value in classes}
    return "BOOL" if kinds == {bool} else "INT64" if kinds == {int} else "BYTES"
