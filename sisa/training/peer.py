"""Stages that several processes train together: the side of those that follow the first one.

Runs as ``python -m sisa.training.peer``. Of each stage one line of its input says what to train, and a second one that
all are ready; its output has ``ready``, and an error as JSON if there is one. It writes no file that has a name, and ends with its
input.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import yaml

from sisa.errors import SisaError
from sisa.layout import Layout
from sisa.recipe import parse_recipe
from sisa.routing.keys import ShardKeys
from sisa.state import full_digest
from sisa.training.chain import ChainTask, stage_inputs
from sisa.training.group import Group, LostError
from sisa.training.stage import train_stage


def main() -> int:
    """Train as told, until the input ends."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a user's model prints is no answer
        try:
            while True:
                _train(json.loads(lines.get()), lines, answers)
        except LostError:
            return 1  # the first process is gone, or knows more than we do
        except SisaError as error:
            _say(answers, type(error).__name__, error.message, error.hint)
        except Exception as error:  # noqa: BLE001 - a message without values, which may be somebody's
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
            _say(answers, "TrainingError", f"training a shard together failed: {where}", "Check the model.")
    return 1


def _listen(lines: queue.SimpleQueue[str]) -> None:
    """Take lines; end at once when there are no more.

    Then the first process is gone: nobody may hold on to rows whose shard isn't locked any more.
    """
    for line in sys.stdin:
        lines.put(line)
    os._exit(1)


def _train(told: dict[str, Any], lines: queue.SimpleQueue[str], answers: Any) -> None:
    task, stage = _task_from(told["task"]), told["stage"]
    with stage_inputs(task, stage) as (parent, columns):
        answers.write("ready\n")
        answers.flush()
        lines.get()
        group = Group(Path(told["meeting"]), rank=told["rank"], size=told["size"], device=task.recipe.training.device)
        state = train_stage(
            recipe=task.recipe,
            class_count=len(task.recipe.data.classes or []),
            shard=task.shard,
            stage=stage,
            epochs=told["epochs"],
            parent=parent,
            columns=columns,
            keys=task.keys,
            should_stop=lambda: False,
            on_progress=lambda _: None,
            group=group,
        )
    group.agree(full_digest(state))


def _task_from(data: dict[str, Any]) -> ChainTask:
    """Return the task that the first process wrote down."""
    keys = data["keys"]
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    given["recipe"] = parse_recipe(yaml.safe_load(data["recipe"]))
    given["keys"] = ShardKeys(keys["shard"], bytes.fromhex(keys["order"]), bytes.fromhex(keys["digest"]))
    given["layout"] = Layout(**{**data["layout"], "root": Path(data["layout"]["root"])})
    return ChainTask(**given)


def _say(answers: Any, kind: str, message: str, hint: str) -> None:
    answers.write(json.dumps({"kind": kind, "message": message, "hint": hint}) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
