"""A trainer for sceptics: table, recipe and key in, weights of every stage out; it shares no code with the package.

One process, no checkpoint, no cache: each shard is trained straight through by the loop that everybody writes.
"""

import hashlib
import hmac
import json
import struct

import numpy as np
import pyarrow.parquet as papq
import torch
from siphash24 import siphash24


def derived(key, *parts):
    texts = [str(part).encode() for part in parts]
    return hmac.new(key, b"".join(struct.pack("<Q", len(text)) + text for text in texts), "sha256").digest()


def sip(key, message):
    return int.from_bytes(siphash24(message, key=key).digest(), "little")


def seed(*parts):
    return int.from_bytes(hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()[:8], "big")


def slices_of(path, recipe, key, shard):
    data, found = recipe["data"], [[] for _ in range(recipe["sisa"]["slices"])]
    for row in papq.read_table(path).to_pylist():
        place = sip(derived(key, "route")[:16], str(row[data.get("subject_id", data["record_id"])]).encode()) >> 24
        if place * recipe["sisa"]["shards"] >> 40 == shard:
            found[place * recipe["sisa"]["shards"] % 2**40 * len(found) >> 40].append(row)
    secret = {"key": derived(key, "digest", shard), "digest_size": 16, "person": b"sisa-record"}
    ids = data["record_id"]
    return [sorted(p, key=lambda r: hashlib.blake2b(str(r[ids]).encode(), **secret).digest()) for p in found]


def numbers(values):
    width = max((len(value) for value in values if isinstance(value, list)), default=0)
    lists = [[None] * width if value is None else value for value in values]
    return np.array(lists, np.float32).astype(np.float64) if width else np.array(values, np.float64)[:, None]


def fitted(rows, data):
    how = {}
    for name in data["features"]:
        values = [row[name] for row in rows if row[name] is not None]
        if name in data.get("columns", ()) or any(isinstance(value, str) for value in values):
            how[name] = sorted({str(value) for value in values})
        else:
            present = numbers(values)[np.isfinite(numbers(values))] if values else np.zeros(1)
            how[name] = (present.mean(), present.std() or 1.0)
    return how


def encoded(rows, how):
    parts = []
    for name, rule in how.items():
        values = [row[name] for row in rows]
        if isinstance(rule, tuple):
            parts.append(np.nan_to_num(((numbers(values) - rule[0]) / rule[1]).astype(np.float32)))
        else:
            codes = [0 if v is None else rule.index(str(v)) + 2 if str(v) in rule else 1 for v in values]
            parts.append(np.eye(len(rule) + 2, dtype=np.float32)[codes])
    return torch.tensor(np.concatenate(parts, axis=1))


def train_shard(path, recipe, key, shard, *, build, gamma=1.0, added=()):
    """Yield weights and buffers after each stage. ``build(width)`` makes the module and its optimiser.

    Each table of ``added`` is a generation: all that it has for the shard is one slice after the others.
    """
    data, training, order_key = recipe["data"], recipe["training"], derived(key, "order", shard)[:16]
    whole = {**recipe, "sisa": {**recipe["sisa"], "slices": 1}}
    parts, model, done = slices_of(path, recipe, key, shard), None, 0
    first = len(parts)
    parts += [part for table in added for part in slices_of(table, whole, key, shard)]
    for stage in range(1, len(parts) + 1):
        rows = [row for part in parts[:stage] for row in part]
        if not rows:
            yield {}
            continue
        if model is None:
            how = fitted(rows, data)
            torch.manual_seed(seed("sisa-init", training["seed"], shard))
            model, optimizer = build(encoded(rows, how).shape[1])
        X, y = encoded(rows, how), torch.tensor([data["classes"].index(row[data["label"]]) for row in rows])
        uids = [sip(order_key, str(row[data["record_id"]]).encode()) for row in rows]
        ends = [2 * training["epochs"] * s // (first + 1) for s in (stage - 1, stage)]
        for epoch in range(ends[1] - ends[0]):
            optimizer.param_groups[0]["lr"] = training["optimizer"]["lr"] * gamma**done
            torch.manual_seed(seed("sisa-epoch", training["seed"], shard, stage, epoch))
            hashes = [sip(order_key, struct.pack("<4Q", uid, training["seed"], stage, epoch)) for uid in uids]
            batches = list(torch.tensor(np.argsort(np.array(hashes, np.uint64))).split(training["batch_size"]))
            batches[-2:] = [torch.cat(batches[-2:])] if len(batches[-1]) == 1 else batches[-2:]
            for batch in batches:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model.train()(X[batch]), y[batch]).backward()
                optimizer.step()
            done += 1
        held = [("model", *p) for p in model.named_parameters()] + [("buffer", *b) for b in model.named_buffers()]
        yield {f"{kind}.{name}": tensor.detach().clone().numpy() for kind, name, tensor in held}
