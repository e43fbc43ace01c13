"""Optimisers and schedules: rates along a chain, and states that come back whole."""

import json

import numpy as np
import pytest
import torch
from training_kit import numbers, recipe, stage, weights_digest

from sisa.errors import UserError
from sisa.learners.optimizers import build_optimizer, implementation
from sisa.learners.schedules import build_schedule
from sisa.state import StageState
from sisa.training.platform import fingerprint, platform_id

TOTAL = 6
"""Epochs of a chain of 3 slices with 4 whole-data epochs: 2 a stage."""

TORCH = "torch.optim.lr_scheduler."
SCHEDULES = [
    ({"name": "step", "step_size": 2, "gamma": 0.5}, lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)),
    ({"name": "exponential", "gamma": 0.9}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)),
    ({"name": "cosine", "eta_min": 0.01}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL, 0.01)),
    (
        {"name": TORCH + "MultiStepLR", "milestones": [1, 4]},
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 4]),
    ),
    (
        {"name": TORCH + "CosineAnnealingWarmRestarts", "T_0": 2},
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    ),
    (
        {"name": TORCH + "OneCycleLR", "max_lr": 0.5, "total_steps": 9},
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=9),
    ),
]


def parameters():
    return {"w": torch.nn.Parameter(torch.ones(3))}


def resumed(spec, schedule, optimizer, named):
    """New ones with the state of the old, through JSON."""
    parts = [optimizer.dump(), schedule.dump()]
    scalars = json.loads(json.dumps({k: v for part in parts for k, v in part.scalars.items()}, allow_nan=False))
    state = StageState({k: v for part in parts for k, v in part.tensors.items()}, scalars)
    optimizer = build_optimizer(spec, named)
    schedule = build_schedule(spec, optimizer)
    schedule.restore(state)
    optimizer.restore(state)
    return schedule, optimizer


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize(("settings", "theirs"), SCHEDULES, ids=[settings["name"] for settings, _ in SCHEDULES])
def test_rates_are_torchs_and_go_on_where_they_were(settings, theirs, name):
    spec = recipe(training={"schedule": settings, "optimizer": {"name": name, "lr": 0.1}})
    named = parameters()
    optimizer = build_optimizer(spec, named)
    schedule = build_schedule(spec, optimizer)
    inner = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name](parameters().values(), lr=0.1)
    reference = theirs(inner)
    for _ in range(TOTAL):
        schedule.begin_epoch()
        assert optimizer.lr == pytest.approx(inner.param_groups[0]["lr"], rel=1e-9)
        optimizer.step([torch.ones(3)])
        inner.step()
        schedule.end_epoch()
        reference.step()
        schedule, optimizer = resumed(spec, schedule, optimizer, named)


def test_without_a_schedule_the_rate_stays():
    spec = recipe()
    optimizer = build_optimizer(spec, parameters())
    schedule = build_schedule(spec, optimizer)
    for _ in range(3):
        schedule.begin_epoch()
        assert optimizer.lr == 0.05
        schedule.end_epoch()


def test_the_schedule_moves_the_weights_and_its_position_is_kept():
    columns = numbers([9, 8])
    spec = recipe(training={"schedule": {"name": "exponential", "gamma": 0.5}})
    first = stage(spec, columns.through(1))
    second = stage(spec, columns, number=2, parent=first)
    assert (first.scalars["schedule.epoch"], second.scalars["schedule.epoch"]) == (2, 4)
    restarted = StageState(first.tensors, {**first.scalars, "schedule.epoch": 0})
    assert weights_digest(stage(spec, columns, number=2, parent=restarted)) != weights_digest(second)


def test_a_schedule_that_can_not_be_kept_is_refused():
    spec = recipe(training={"schedule": {"name": TORCH + "LambdaLR", "lr_lambda": 3}})
    with pytest.raises(UserError, match=r"training\.schedule"):
        build_schedule(spec, build_optimizer(spec, parameters()))


def test_lost_moments_would_move_the_weights():
    columns = numbers([9, 8])
    for optimizer in ({"name": "sgd", "lr": 0.05, "momentum": 0.9}, {"name": "adam", "lr": 0.01}):
        spec = recipe(training={"optimizer": optimizer})
        first = stage(spec, columns.through(1))
        moments = [name for name in first.tensors if name.startswith("optimizer.")]
        assert moments
        zeroed = {n: np.zeros_like(a) if n in moments else a for n, a in first.tensors.items()}
        whole = stage(spec, columns, number=2, parent=first)
        assert weights_digest(
            stage(spec, columns, number=2, parent=StageState(zeroed, first.scalars))
        ) != weights_digest(whole)


def test_a_parameter_reached_only_now_and_then_has_torchs_bits():
    gradients = [(torch.ones(3), None), (None, torch.ones(3)), (torch.full((3,), 2.0), torch.full((3,), 3.0))]
    spec = recipe(training={"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}})
    ours, theirs = ({"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(3))} for _ in range(2))
    optimizer = build_optimizer(spec, ours)
    reference = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for pair in gradients:
        optimizer.step(pair)
        for parameter, gradient in zip(theirs.values(), pair, strict=True):
            parameter.grad = gradient
        reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_fingerprint_names_what_bits_depend_on(monkeypatch):
    base = fingerprint(recipe())
    assert {
        "python",
        "torch",
        "numpy",
        "pyarrow",
        "sisa_semantics",
        "capability",
        "processor",
        "threads",
        "device",
        "optimizer",
    } <= base.keys()
    assert json.loads(json.dumps(base)) == base
    assert len(platform_id(base)) == 12
    assert platform_id(base) == platform_id(fingerprint(recipe()))
    others = [
        fingerprint(recipe(training={"threads": 2})),
        fingerprint(recipe(training={"optimizer": {"name": "adam", "lr": 0.1}})),
    ]
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    others.append(fingerprint(recipe()))
    assert len({platform_id(other) for other in [base, *others]}) == 4


def test_the_fingerprint_does_not_depend_on_what_the_caller_set():
    before = fingerprint(recipe())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert fingerprint(recipe()) == before
    finally:
        torch.set_num_threads(threads)


def test_own_sgd_makes_way_for_torchs_only_where_a_torch_scheduler_needs_it():
    assert implementation(recipe()) == "sisa.SGD"
    assert implementation(recipe(training={"schedule": {"name": "cosine"}})) == "sisa.SGD"
    assert (
        implementation(recipe(training={"schedule": {"name": TORCH + "StepLR", "step_size": 1}})) == "torch.optim.SGD"
    )
