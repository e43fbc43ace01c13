"""Answering from the live version, in a process of one's own.

The live version is read again for every batch, and once more after it: an answer that a quarantine
overtook while it was computed is thrown away and computed again. A stage is verified when it is loaded;
one that a deletion purged between reading the version and loading it is a reason to read the version
again, not damage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sisa.checkpoints import StageId
from sisa.ensemble.aggregation import Scores, aggregate
from sisa.errors import DamagedError, FootingError, NoConstituentError, StoreError
from sisa.learners.columns import Columns
from sisa.learners.predict import Constituent
from sisa.learners.source import code_version
from sisa.ledger import Member, Version
from sisa.opening import OpenStore

TRIES = 100
"""How often an answer is computed again because versions changed under it."""
MEND = (
    "The ledger was changed by other means. `sisa verify` lists what is wrong; `sisa repair` publishes a version anew."
)


@dataclass(frozen=True)
class Answer:
    """Scores for a batch, all from one version."""

    scores_BC: Scores
    version: int
    voters: int


class LiveEnsemble:
    """The constituents of the live version, loaded when they are first needed."""

    def __init__(self, store: OpenStore) -> None:
        _check_model_source(store)
        self._store = store
        self._loaded: dict[Member, Constituent] = {}

    def answer(self, columns: Columns) -> Answer:
        """Return the ensemble's scores for a batch of rows.

        Raises:
            NoConstituentError: No clean constituent is left.
            DamagedError: A stage that should answer is missing or damaged.
        """
        for _ in range(TRIES):
            version, voters = self._current()
            posteriors = [voter.posteriors(columns) for voter in voters]
            if self._store.ledger.versions.last_quarantine() <= version.number:
                scores_BC = aggregate(posteriors, self._store.recipe.sisa.aggregation)
                return Answer(scores_BC, version.number, len(voters))
        raise StoreError(f"the ensemble changed {TRIES} times while a batch was computed", hint="Try again.")

    def overtaken(self, version: int) -> bool:
        """Say whether a quarantine was published after ``version``: its answers are void."""
        return self._store.ledger.versions.last_quarantine() > version

    def _current(self) -> tuple[Version, list[Constituent]]:
        while True:
            version = self._store.ledger.versions.live()
            members = [member for member in version.members if member.stage > 0]
            try:
                self._check_shards(version)
                if not members:
                    raise self._nobody(version)
                voters = [self._constituent(member) for member in members]
            except DamagedError:
                if self._store.ledger.versions.live_number() != version.number:
                    continue
                raise
            self._loaded = dict(zip(members, voters, strict=True))
            return version, voters

    def _check_shards(self, version: Version) -> None:
        """Make sure that each shard has one voice, or none and says so."""
        shards = [member.shard for member in version.members]
        if version.number and shards != list(range(self._store.shards)):
            raise DamagedError(f"version {version.number} doesn't have exactly one member for each shard", hint=MEND)

    def _constituent(self, member: Member) -> Constituent:
        if member not in self._loaded:
            store = self._store
            row = store.ledger.stages.get(member.key, member.platform)
            if row is None or row.tainted:
                raise DamagedError(f"stage {member.stage} of shard {member.shard} is not in the ledger any more")
            if (row.shard, row.stage) != (member.shard, member.stage):
                raise DamagedError(
                    f"shard {member.shard} would be served from stage {row.stage} of shard {row.shard}, "
                    f"not from its own stage {member.stage}",
                    hint=MEND,
                )
            identity = StageId(row.shard, row.stage, row.key, row.platform)
            _, state = store.checkpoints.load(identity, expect_full_digest=row.full_digest)
            self._loaded[member] = Constituent.from_state(store.recipe, len(store.classes), state)
        return self._loaded[member]

    def _nobody(self, version: Version) -> NoConstituentError:
        if version.number == 0:
            return NoConstituentError("the store has no trained ensemble yet", hint="Run `sisa train` to its end.")
        return NoConstituentError(
            f"no clean constituent is left in version {version.number}: every shard is out of service",
            hint="`sisa repair` retrains them.",
        )


def _check_model_source(store: OpenStore) -> None:
    """Make sure that weights are put into the model that they were trained in.

    Raises:
        FootingError: The source of model.factory is another than at the training.
    """
    footing = store.ledger.footing()
    if store.recipe.model.factory is None or footing is None or footing[0] == code_version(store.recipe):
        return
    raise FootingError(
        f"the source of model.factory ({store.recipe.model.factory}) is not the one that the store was trained with, "
        "so its weights may mean something else in it",
        hint="Go back to the old source, or rebuild everything with `sisa train CONFIG --upgrade`.",
    )


def predicted_classes(scores_BC: Scores, classes: list[bool | int | str]) -> list[bool | int | str]:
    """Return the class with the highest score of each row; the first declared one of a tie."""
    return [classes[index] for index in np.argmax(scores_BC, axis=1)]
