"""Answering from the live version, in a process of one's own.

The live version is read again for every batch, and once more after it: an answer that a quarantine
overtook while it was computed is thrown away and computed again. A stage is verified when it is loaded;
one that a deletion purged between reading the version and loading it is a reason to read the version
again, not damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sisa.checkpoints import StageId
from sisa.ensemble.aggregation import PLAIN, Aggregator, Fitted, Scores, aggregator
from sisa.ensemble.stacked import Panel, Path
from sisa.errors import DamagedError, FootingError, NoConstituentError, NoScoreError, StoreError
from sisa.learners.columns import Columns
from sisa.learners.predict import Constituent
from sisa.learners.source import code_version
from sisa.ledger import Ledger, Member, Version
from sisa.opening import OpenStore
from sisa.recipe import Recipe

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
    path: Path
    """How the constituents were evaluated; the label is the same on each path."""
    aggregation: str
    """The rule that was used: the mean where parameters aren't those of these constituents."""


@dataclass(frozen=True)
class Loaded:
    """One version with its constituents in memory. Answers without a look at the ledger: whoever asks has one.

    Several threads may ask at a time.
    """

    version: int
    panel: Panel | None
    """None if there is nobody to answer."""
    rule: Aggregator
    nobody_because: NoConstituentError | None = None

    @classmethod
    def nobody(cls, error: NoConstituentError, *, version: int = 0) -> Loaded:
        """Return a version that has no constituent, and says so when it is asked."""
        return cls(version, None, aggregator("mean"), error)

    def answer(self, columns: Columns) -> Answer:
        """Return the scores for a batch of rows.

        Raises:
            NoConstituentError: There is no constituent.
            NoScoreError: The scores of a row are no numbers.
        """
        if self.panel is None:
            raise self.nobody_because or NoConstituentError("there is no constituent", hint="Run `sisa repair`.")
        scores_BC, path = self.panel.scores(columns, self.rule)
        _check_numbers(scores_BC)
        return Answer(scores_BC, self.version, len(self.panel.constituents), path, self.rule.name)


class LiveEnsemble:
    """The constituents of the live version, loaded when they are first needed. For one thread, as its ledger is."""

    def __init__(self, store: OpenStore) -> None:
        """Load nothing yet.

        Raises:
            FootingError: The source of model.factory is another than at the training.
        """
        _check_model_source(store)
        self._store = store
        self._loaded: dict[Member, Constituent] = {}
        self._panel: Panel | None = None

    def close(self) -> None:
        """Let go of the constituents and close the ledger."""
        self._loaded, self._panel = {}, None
        self._store.close()

    def load(self) -> Loaded:
        """Return the live version, loaded. Constituents that were there already aren't loaded again.

        One without constituents is returned too; it raises when it is asked.

        Raises:
            DamagedError: A stage that should answer is missing or damaged.
        """
        version, voters, fit = self._current()
        if not voters:
            self._panel = None
            return Loaded.nobody(_nobody(version), version=version.number)
        return Loaded(version.number, self._panel_of(voters), self._rule(version, fit))

    def answer(self, columns: Columns) -> Answer:
        """Return the ensemble's scores for a batch of rows.

        Raises:
            NoConstituentError: No clean constituent is left.
            DamagedError: A stage that should answer is missing or damaged.
        """
        for _ in range(TRIES):
            loaded = self.load()
            answer = loaded.answer(columns)
            if not self.overtaken(loaded.version):
                return answer
        raise StoreError(f"the ensemble changed {TRIES} times while a batch was computed", hint="Try again.")

    def overtaken(self, version: int) -> bool:
        """Say whether a quarantine was published after ``version``: its answers are void."""
        return self._store.ledger.versions.last_quarantine() > version

    def _panel_of(self, voters: Sequence[Constituent]) -> Panel:
        """Return the panel of these constituents; the one that there is, if nobody came or went."""
        if self._panel is None or not self._panel.holds(voters):
            self._panel = Panel(self._store.recipe, voters)
        return self._panel

    def _rule(self, version: Version, fit: str | None) -> Aggregator:
        """Return the rule with the parameters that were fitted for exactly these members; without any it is the mean."""
        rule = self._store.recipe.sisa.aggregation_name
        if rule in PLAIN:
            return aggregator(rule)
        try:
            fitted = Fitted.from_json(fit) if fit is not None else None
            return aggregator(rule, members=member_names(version), fitted=fitted)
        except (ValueError, TypeError, KeyError) as error:
            raise DamagedError("the aggregation's parameters in the ledger were changed", hint=MEND) from error

    def _current(self) -> tuple[Version, list[Constituent], str | None]:
        """Return the live version, its constituents, and the parameters of its aggregation if it has some."""
        versions = self._store.ledger.versions
        while True:
            with self._store.ledger.database.snapshot():  # parameters that come later make a version of their own
                version = versions.live()
                fit = versions.fit_of(member_names(version))
            members = [member for member in version.members if member.stage > 0]
            try:
                self._check_shards(version)
                voters = [self._constituent(member) for member in members]
            except DamagedError:
                if versions.live_number() != version.number:
                    continue
                raise
            self._loaded = dict(zip(members, voters, strict=True))
            return version, voters, fit

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


def _check_numbers(scores_BC: Scores) -> None:
    """Make sure that each row has scores: of what is no number none is the highest.

    Raises:
        NoScoreError: One hasn't.
    """
    good_B = np.isfinite(scores_BC).all(axis=1)
    if not good_B.all():
        raise NoScoreError(int(np.argmin(good_B)))


def _nobody(version: Version) -> NoConstituentError:
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


def member_names(version: Version) -> tuple[str, ...]:
    """Return what names the constituents that answer for a version, in the order of their posteriors.

    A stage's lineage key and platform: two stages of one name have the same bits.
    """
    return tuple(f"{member.key}.{member.platform}" for member in version.members if member.stage > 0)


def rule_in_use(recipe: Recipe, ledger: Ledger, version: Version) -> str:
    """Return the name of the rule that answers for a version: the mean where parameters were not fitted for it (yet)."""
    rule = recipe.sisa.aggregation_name
    return rule if rule in PLAIN or ledger.versions.fit_of(member_names(version)) is not None else "mean"


def predicted_classes(scores_BC: Scores, classes: list[bool | int | str]) -> list[bool | int | str]:
    """Return the class with the highest score of each row; the first declared one of a tie."""
    return [classes[index] for index in np.argmax(scores_BC, axis=1)]
