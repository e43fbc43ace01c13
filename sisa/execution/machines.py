"""What the machines of a Ray cluster offer, and whether they can ever give what a worker needs.

Ray itself waits for ever for a machine that nobody will bring. Here it is said at once, unless an autoscaler may bring
one: then its own description of what it may start is believed.
"""

from __future__ import annotations

import json
import time
from typing import Any

from sisa.errors import UserError
from sisa.planning.placement import Need, capacity, places

JOINING_S = 3.0
"""A cluster that has just been started may lack machines for a moment."""
UNNAMED = "node_"
"""How Ray calls the type of a machine that nobody named."""
UNLIMITED = 10**6
"""Workers of an autoscaler that names no limit."""


def require_place(ray: Any, need: Need) -> None:
    """Make sure that some machine can hold a worker, now or later.

    Raises:
        UserError: None can, and nobody will bring one.
    """
    deadline = time.monotonic() + JOINING_S
    while not room(ray, need):
        if time.monotonic() >= deadline:
            raise UserError(
                f"no machine of the Ray cluster can ever hold a worker that needs {need}; there are {_said(ray)}",
                hint="Lower workers.cpus, workers.gpus or workers.memory of the recipe (`sisa train --set workers.cpus=1`), "
                "or add machines to the cluster.",
            )
        time.sleep(0.25)


def room(ray: Any, need: Need) -> int:
    """Return how many workers the cluster holds, or may grow to hold, at a time."""
    return max(capacity(_machines(ray), need), _promised(ray, need))


def _machines(ray: Any) -> list[dict[str, float]]:
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _promised(ray: Any, need: Need) -> int:
    """Return for how many workers an autoscaler may start machines; 0 without one."""
    described = ray._private.state.state.get_cluster_config()
    if described is None:
        return UNLIMITED if _scales_itself(ray) else 0
    found = 0
    for group in described.node_group_configs:
        count = UNLIMITED if group.max_count < 0 else group.max_count
        found += count * places(dict(group.resources), need)
    return min(found, UNLIMITED)


def _scales_itself(ray: Any) -> bool:
    """Say whether an autoscaler runs that tells what it does and not what it may do.

    A head watches its machines in any case, and calls each by a type of its own; an autoscaler has named types.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2():
        return True
    said = _internal_kv_get(ray._private.ray_constants.DEBUG_AUTOSCALING_STATUS)
    return said is not None and names_types(said)


def names_types(status: bytes) -> bool:
    """Say whether an autoscaler's status tells of types of machines that somebody named."""
    report = json.loads(status).get("autoscaler_report") or {}
    found = [kind for field in ("active_nodes", "idle_nodes") for kind in report.get(field) or {}]
    return any(not kind.startswith(UNNAMED) for kind in found)


def _said(ray: Any) -> str:
    """Describe the machines, each kind once."""
    kinds: dict[str, int] = {}
    for machine in _machines(ray):
        parts = [f"{machine.get('CPU', 0):g} CPUs", *([f"{machine['GPU']:g} GPUs"] if machine.get("GPU") else [])]
        text = ", ".join([*parts, f"{machine.get('memory', 0) / 2**30:.3g} GiB of memory"])
        kinds[text] = kinds.get(text, 0) + 1
    return "; ".join(f"{count} with {text}" for text, count in sorted(kinds.items())) or "none at all"
