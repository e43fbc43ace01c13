"""A stage is a pure function: the same bits as the plain loop, straight through or resumed, here or elsewhere."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_kit import KEYS, images, numbers, plain_loop, recipe, same_weights, stage, weights_digest

from sisa.learners.flags import derived_seed
from sisa.recipe import ColumnSpec
from sisa.routing.keys import shard_keys
from sisa.state import StageState, full_digest
from sisa.training.order import batch_sizes, epoch_order
from sisa.training.stage import Stopped, TrainingError

PIXELS = {"pixels": ColumnSpec(type="vector", size=192)}
IMAGE = {"height": 8, "width": 8, "channels": 3}
RESTLESS = {"name": "mlp", "hidden": [6], "batch_norm": True, "dropout": 0.3}
"""A model with all that a weights-only checkpoint would lose."""


def sgd(**arguments):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.05, **arguments)


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("hidden", [[5], [64, 33], [1], []])
@pytest.mark.parametrize(("batch_size", "count"), [(1, 5), (4, 9), (16, 50), (33, 2), (7, 1)])
def test_builtin_mlp_has_the_bits_of_the_plain_loop(activation, hidden, batch_size, count):
    ours = recipe(
        model={"name": "mlp", "hidden": hidden, "activation": activation},
        training={"batch_size": batch_size},
        features=11,
    )
    columns = numbers([count], features=11)
    assert same_weights(stage(ours, columns), plain_loop(ours, columns))


@pytest.mark.parametrize(
    "arguments",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        {"weight_decay": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("model", [{"name": "mlp", "hidden": [5]}, {"name": "logistic"}, RESTLESS], ids=str)
def test_our_sgd_has_the_bits_of_torch_optim(model, arguments):
    ours = recipe(model=model, training={"optimizer": {"name": "sgd", "lr": 0.05, **arguments}})
    columns = numbers([30])
    assert same_weights(stage(ours, columns), plain_loop(ours, columns, optimizer=sgd(**arguments)))


@pytest.mark.parametrize(
    "model",
    [
        {"name": "cnn", "channels": [4, 8], "hidden": [6]},
        {"name": "cnn", "channels": [4], "hidden": [], "batch_norm": True, "dropout": 0.2},
        {"name": "mlp", "hidden": [5]},
        {"factory": "training_models:convolution"},
    ],
    ids=str,
)
def test_models_of_images_have_the_bits_of_the_plain_loop(model):
    ours = recipe(model=model, columns=PIXELS, image=IMAGE)
    columns = images([21], size=192)
    assert same_weights(stage(ours, columns), plain_loop(ours, columns))


def test_a_module_with_parameters_that_are_frozen_shared_or_not_reached_has_the_bits_of_the_plain_loop():
    ours = recipe(
        model={"factory": "training_models:odd"}, training={"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
    )
    columns = numbers([30])
    state = stage(ours, columns)
    assert same_weights(state, plain_loop(ours, columns, optimizer=sgd(momentum=0.9)))
    assert "optimizer.used.weight.momentum_buffer" in state.tensors
    assert "optimizer.unused.weight.momentum_buffer" not in state.tensors


@pytest.mark.parametrize("name", ["adam", "adamw", "torch.optim.RMSprop", "torch.optim.Adagrad", "torch.optim.NAdam"])
def test_torch_optimisers_have_the_bits_of_the_plain_loop(name):
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name) or getattr(torch.optim, name.split(".")[-1])
    ours = recipe(training={"optimizer": {"name": name, "lr": 0.01}})
    columns = numbers([30])
    assert same_weights(stage(ours, columns), plain_loop(ours, columns, optimizer=lambda p: kind(p, lr=0.01)))


OPTIMIZERS = [
    {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"name": "adam", "lr": 0.01, "betas": [0.8, 0.99], "amsgrad": True},
    {"name": "adamw", "lr": 0.01},
    {"name": "torch.optim.Adagrad", "lr": 0.01},
    {"name": "torch.optim.ASGD", "lr": 0.01},
    {"name": "torch.optim.Rprop", "lr": 0.01},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
def test_weights_only_checkpoints_would_lose_moments_statistics_and_dropout(optimizer):
    """Resume = straight through, held against one loop that never stops and never stores anything."""
    ours = recipe(model=RESTLESS, training={"optimizer": optimizer})
    columns = numbers([9, 0, 8])
    state = StageState()
    for number in (1, 2, 3):
        state = json_and_back(stage(ours, columns.through(number), number=number, parent=state))
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in optimizer.items() if k not in {"name", "lr"}}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(optimizer["name"])
    kind = kind or getattr(torch.optim, optimizer["name"].split(".")[-1])
    straight = plain_loop(ours, columns, stages=3, optimizer=lambda p: kind(p, lr=optimizer["lr"], **arguments))
    assert same_weights(state, straight)


def json_and_back(state: StageState) -> StageState:
    """What a checkpoint does to a state: bytes that can't be written to, and scalars through JSON."""
    tensors = {}
    for name, array in state.tensors.items():
        tensors[name] = np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
        assert not tensors[name].flags.writeable or not array.size
    return StageState(tensors, json.loads(json.dumps(state.scalars, allow_nan=False)))


def test_the_parent_state_is_not_changed():
    ours, columns = recipe(training={"optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}), numbers([9, 8])
    first = stage(ours, columns.through(1))
    before = full_digest(first)
    stage(ours, columns, number=2, parent=first)
    assert full_digest(first) == before


def test_the_same_bits_in_another_process_whatever_was_set_there():
    script = (
        "import numpy as np, random, torch\n"
        "torch.set_num_threads(2); torch.set_default_dtype(torch.float64); torch.manual_seed(5)\n"
        "torch.set_float32_matmul_precision('medium'); torch.set_flush_denormal(True)\n"
        "torch.set_default_device('meta'); torch.set_grad_enabled(False)\n"
        "from training_kit import *\n"
        "print(weights_digest(stage(recipe(model={'factory': 'training_models:random_all_over'}), numbers([9]))))\n"
        "assert torch.get_num_threads() == 2 and torch.get_default_dtype() == torch.float64\n"
        "assert torch.get_float32_matmul_precision() == 'medium' and not torch.is_grad_enabled()\n"
        "assert torch.get_default_device().type == 'meta' and not torch.are_deterministic_algorithms_enabled()\n"
    )
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "random"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    here = stage(recipe(model={"factory": "training_models:random_all_over"}), numbers([9]))
    assert done.stdout.strip() == weights_digest(here)


@pytest.mark.parametrize("flushed", [False, True])
def test_small_numbers_are_flushed_afterwards_as_they_were_before(flushed):
    torch.set_flush_denormal(flushed)
    try:
        stage(recipe(), numbers([9]))
        assert (sys.float_info.min / 4 == 0.0) == flushed
    finally:
        torch.set_flush_denormal(False)


def test_random_numbers_of_a_users_model_are_seeded_and_the_callers_are_left_alone():
    ours = recipe(model={"factory": "training_models:random_all_over"})
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.random(), torch.rand(()).item()  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    first = stage(ours, numbers([9]))
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected  # noqa: NPY002
    random.seed(2), np.random.seed(2), torch.manual_seed(2)  # noqa: NPY002
    assert weights_digest(stage(ours, numbers([9]))) == weights_digest(first)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_recipe_says_how_many_threads_a_stage_uses(threads):
    ours = recipe(model={"factory": "training_models:threaded"}, training={"threads": threads})
    before = torch.get_num_threads()
    assert stage(ours, numbers([9])).tensors["buffer.threads"] == threads
    assert torch.get_num_threads() == before


def test_a_shard_of_one_record_and_a_last_batch_of_one_train_with_batch_norm():
    ours = recipe(model={"name": "mlp", "hidden": [5], "batch_norm": True})
    alone = stage(ours, numbers([1]))
    assert np.isfinite(alone.tensors["model.0.weight"]).all()
    assert alone.tensors["buffer.1.num_batches_tracked"] == 0
    joined = stage(ours, numbers([9]))  # batches of 4 and 5
    assert joined.tensors["buffer.1.num_batches_tracked"] == 2 * 2


def test_a_module_that_comes_in_evaluation_mode_is_trained_in_training_mode():
    ours = recipe(model={"factory": "training_models:evaluating"})
    assert stage(ours, numbers([9])).tensors["buffer.1.num_batches_tracked"] == 2 * 2


def test_slices_without_records_are_stages_all_the_same():
    ours, columns = recipe(), numbers([0, 6, 0])
    assert stage(ours, columns.through(1)).empty
    second = stage(ours, columns.through(2), number=2, parent=StageState())
    third = stage(ours, columns, number=3, parent=second)
    assert second.scalars["schedule.epoch"] == 2
    assert third.scalars["schedule.epoch"] == 4
    assert weights_digest(third) != weights_digest(second)


def test_scalers_stay_those_of_the_first_slice_that_has_records():
    ours, columns = recipe(), numbers([0, 6, 5])
    second = stage(ours, columns.through(2), number=2)
    third = stage(ours, columns, number=3, parent=second)
    expected = columns.numeric_NP[:6].mean(0)
    assert np.allclose(second.tensors["preprocess.numeric_scale"][0], expected)
    assert third.tensors["preprocess.numeric_scale"].tobytes() == second.tensors["preprocess.numeric_scale"].tobytes()


@pytest.mark.parametrize(
    "change",
    [{"shard": 1}, {"number": 2}, {"epochs": 3}, {"keys": shard_keys(bytes(32), 0)}],
    ids=lambda change: next(iter(change)),
)
def test_every_input_of_a_stage_moves_its_weights(change):
    ours, columns = recipe(), numbers([9])
    assert weights_digest(stage(ours, columns, **change)) != weights_digest(stage(ours, columns))


def test_the_seed_moves_the_weights():
    columns = numbers([9])
    assert weights_digest(stage(recipe(training={"seed": 8}), columns)) != weights_digest(stage(recipe(), columns))


def test_survivors_keep_their_order_when_a_record_is_gone():
    columns = numbers([50])
    order = epoch_order(KEYS.order, columns.uids_N, seed=7, stage=1, epoch=0)
    kept = np.delete(np.arange(50), 20)
    shorter = kept[epoch_order(KEYS.order, columns.uids_N[kept], seed=7, stage=1, epoch=0)]
    assert shorter.tolist() == [place for place in order if place != 20]
    assert order.tolist() != sorted(order)


def test_the_order_depends_on_seed_stage_epoch_and_key():
    uids = numbers([50]).uids_N
    settings = [(7, 1, 0), (8, 1, 0), (7, 2, 0), (7, 1, 1)]
    orders = [epoch_order(KEYS.order, uids, seed=s, stage=r, epoch=e).tolist() for s, r, e in settings]
    orders.append(epoch_order(bytes(16), uids, seed=7, stage=1, epoch=0).tolist())
    assert len({tuple(order) for order in orders}) == 5


def test_order_and_seeds_of_known_inputs_stay_what_they_are():
    """Golden: another value here means that every store's weights change; raise SEMANTICS then."""
    uids = np.arange(8, dtype=np.uint64)
    assert epoch_order(bytes(range(16)), uids, seed=7, stage=2, epoch=1).tolist() == [6, 5, 3, 2, 0, 1, 4, 7]
    assert derived_seed("sisa-init", 7, 0) == 12360260169629768318
    assert derived_seed("sisa-epoch", 7, 0, 1, 2) == 3773318966536993379


@pytest.mark.parametrize(
    ("records", "batch_size", "expected"),
    [(0, 4, []), (1, 4, [1]), (4, 4, [4]), (5, 4, [5]), (6, 4, [4, 2]), (9, 4, [4, 5]), (3, 1, [1, 1, 1]), (2, 9, [2])],
)
def test_a_last_batch_of_one_record_joins_the_one_before(records, batch_size, expected):
    assert batch_sizes(records=records, batch_size=batch_size) == expected


def test_a_training_stops_soon_after_it_is_asked_to():
    started = time.monotonic()
    with pytest.raises(Stopped, match="stage 1 of shard 0"):
        stage(recipe(), numbers([2000]), epochs=300, should_stop=lambda: time.monotonic() > started + 0.3)
    assert time.monotonic() < started + 5


def test_looking_up_often_does_not_move_the_weights(monkeypatch):
    expected = weights_digest(stage(recipe(), numbers([50])))
    monkeypatch.setattr("sisa.training.stage.LOOK_UP_S", 0.0)
    seen: list[int] = []
    state = stage(recipe(), numbers([50]), on_progress=seen.append)
    assert weights_digest(state) == expected
    assert sum(seen) == 100
    assert len(seen) > 10


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do():
    ours = recipe(training={"optimizer": {"name": "sgd", "lr": 3e38}})
    with pytest.raises(TrainingError, match="shard 0, stage 1") as caught:
        stage(ours, numbers([30]))
    assert "training.optimizer.lr" in caught.value.hint


def test_a_stage_with_plain_sgd_does_not_import_torchs_compiler():
    script = (
        "import sys\nfrom training_kit import *\nstage(recipe(), numbers([9]))\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
