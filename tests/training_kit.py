"""Made-up shards, and a plain training loop to hold ours against."""

import hashlib
import random

import numpy as np
import torch

from sisa.learners.columns import Categories, Columns
from sisa.learners.flags import derived_seed
from sisa.learners.models import build_model
from sisa.learners.preprocess import Preprocessor
from sisa.recipe import ColumnSpec, Recipe, parse_recipe
from sisa.routing.keys import ShardKeys, shard_keys
from sisa.state import StageState
from sisa.training.order import batch_sizes, epoch_order
from sisa.training.stage import train_stage

KEYS = shard_keys(bytes(range(32)), 0)


def recipe(*, model=None, training=None, features=6, classes=3, slices=3, image=None, columns=None) -> Recipe:
    """A resolved recipe; by default `features` numeric columns and a small mlp."""
    columns = columns or {f"n{i}": ColumnSpec(type="numeric") for i in range(features)}
    content = {
        "data": {
            "source": "-",
            "record_id": "id",
            "label": "y",
            "classes": list(range(classes)),
            "features": list(columns),
            **({"image": image} if image else {}),
        },
        "model": model or {"name": "mlp", "hidden": [5], "activation": "tanh"},
        "training": {
            "epochs": 4,
            "batch_size": 4,
            "optimizer": {"name": "sgd", "lr": 0.05},
            "seed": 7,
            **(training or {}),
        },
        "sisa": {"shards": 2, "slices": slices},
    }
    return parse_recipe(content).resolved(columns)


def numbers(counts, *, features=6, classes=3, seed=0) -> Columns:
    """Random numeric records; `counts` has one number of records per slice."""
    rng = np.random.default_rng(seed)
    total = sum(counts)
    return Columns(
        numeric_NP=rng.normal(3, 2, (features, total)).T,
        categories=(),
        vectors=(),
        labels_N=rng.integers(0, classes, total),
        uids_N=rng.integers(0, 2**63, total).astype(np.uint64),
        slices_N=np.repeat(np.arange(1, len(counts) + 1), counts).astype(np.int32),
    )


def images(counts, *, size, classes=3, seed=0, dtype=np.uint8) -> Columns:
    """Random records of one vector feature."""
    plain = numbers(counts, features=0, classes=classes, seed=seed)
    rng = np.random.default_rng(seed + 1)
    values = rng.integers(0, 256, (plain.count, size)).astype(dtype)
    return Columns(plain.numeric_NP, (), (values,), plain.labels_N, plain.uids_N, plain.slices_N)


def category(*texts) -> Categories:
    """A categorical column; None where there is no value."""
    values = tuple(dict.fromkeys(text for text in texts if text is not None))
    return Categories(np.array([-1 if t is None else values.index(t) for t in texts], np.int32), values)


def stage(
    recipe: Recipe,
    columns: Columns,
    *,
    number=1,
    epochs=2,
    parent=None,
    keys: ShardKeys = KEYS,
    shard=0,
    should_stop=lambda: False,
    on_progress=lambda _: None,
) -> StageState:
    """Train one stage on all of `columns`."""
    return train_stage(
        recipe=recipe,
        class_count=len(recipe.data.classes),
        shard=shard,
        stage=number,
        epochs=epochs,
        parent=parent or StageState(),
        columns=columns,
        keys=keys,
        should_stop=should_stop,
        on_progress=on_progress,
    )


def plain_loop(recipe: Recipe, columns: Columns, *, epochs=2, optimizer=None, stages=1, shape=None):
    """The loop that everybody writes: resident tensors, a gather per batch, torch's optimiser. Returns the module."""
    torch.set_num_threads(recipe.training.threads)
    first = Preprocessor.fit(recipe, columns.first_slice())
    shape = shape or first.feature_shape
    torch.manual_seed(derived_seed("sisa-init", recipe.training.seed, 0))
    module = build_model(recipe, shape, len(recipe.data.classes))
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=recipe.training.optimizer.lr)))(module.parameters())
    for number in range(1, stages + 1):
        seen = columns if stages == 1 else columns.through(number)
        X, y = torch.tensor(first.transform(seen)), torch.tensor(seen.labels_N)
        if len(shape) == 3:
            channels, height, width = shape
            X = X.view(-1, height, width, channels).permute(0, 3, 1, 2)
            X = X if recipe.model.name == "cnn" else X.contiguous()
        for epoch in range(epochs):
            seed = derived_seed("sisa-epoch", recipe.training.seed, 0, number, epoch)
            torch.manual_seed(seed)
            np.random.seed([seed >> 32, seed & 0xFFFFFFFF])  # noqa: NPY002
            random.seed(seed)
            order = epoch_order(KEYS.order, seen.uids_N, seed=recipe.training.seed, stage=number, epoch=epoch)
            sizes = batch_sizes(records=seen.count, batch_size=recipe.training.batch_size)
            module.train()
            for rows in torch.tensor(order).split(sizes):
                optimizer.zero_grad()
                batch = X[rows]
                if recipe.model.name == "cnn":
                    batch = batch.contiguous(memory_format=torch.channels_last)
                torch.nn.functional.cross_entropy(module(batch), y[rows]).backward()
                optimizer.step()
    return module


def same_weights(state: StageState, module: torch.nn.Module) -> bool:
    """Whether parameters and buffers of a stage and a module have equal bits."""
    theirs = {f"model.{n}": p for n, p in module.named_parameters()} | {
        f"buffer.{n}": b for n, b in module.named_buffers()
    }
    ours = {n: a for n, a in state.tensors.items() if n.startswith(("model.", "buffer."))}
    return ours.keys() == theirs.keys() and all(
        a.tobytes() == theirs[n].detach().contiguous().numpy().tobytes() for n, a in ours.items()
    )


def weights_digest(state: StageState) -> str:
    """A digest of parameters and buffers that doesn't use the code under test."""
    digest = hashlib.sha256()
    for name in sorted(state.tensors):
        if name.startswith(("model.", "buffer.")):
            digest.update(name.encode() + state.tensors[name].tobytes())
    return digest.hexdigest()
