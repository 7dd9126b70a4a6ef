"""What a rule, an option and a table of utilities look like in the knowledge base's YAML."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dermaflow.schemas.pathway import Urgency
from dermaflow.taxonomy import CODES

Group = Literal[
    "diagnostic", "referral", "surgery", "destructive", "topical", "pdt", "systemic", "radiotherapy", "observation",
    "reassurance",
]  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


class Alternative(_Strict):
    """One of a rule's urgencies, and when it is that one."""

    when: str
    urgency: Urgency


class Restriction(_Strict):
    """Options that a rule restricts under a condition of their own, where one rule blocks and cautions."""

    when: str
    block: tuple[str, ...] = ()
    caution: tuple[str, ...] = ()


class Effect(_Strict):
    """What follows when a rule holds. Options are named by id or by group, which means all of the group."""

    model_config = ConfigDict(populate_by_name=True)

    gate: Literal["not_assessable"] | None = None  # no class and no treatment options are shown
    no_reassurance: bool = False  # U3 at least
    urgency: Urgency | None = None  # at least this urgent
    urgency_when: tuple[Alternative, ...] = ()  # the most urgent not definitely false; U4 has to be definitely true
    raise_: int = Field(0, ge=0, le=4, alias="raise")  # levels more urgent, after everything else
    offer: tuple[str, ...] = ()
    block: tuple[str, ...] = ()
    caution: tuple[str, ...] = ()
    restrict_when: tuple[Restriction, ...] = ()  # as block and caution, each under its own condition; unknown locks
    reassure: bool = False  # allows U5
    notice: bool = False
    follow_up: bool = False
    text: tuple[str, ...] = ()
    rank_first: tuple[str, ...] = ()
    rank_last: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _u5_is_a_reassurance(self) -> Effect:
        if self.urgency == "U5" and not self.reassure:
            raise ValueError("urgency U5 needs reassure: true, for nothing else allows it")
        if self.reassure and self.urgency not in (None, "U5"):
            raise ValueError(f"reassure: true contradicts urgency {self.urgency}")
        return self

    @property
    def options(self) -> set[str]:
        """All option ids and groups it names."""
        restricted = [name for part in self.restrict_when for name in (*part.block, *part.caution)]
        return {*self.offer, *self.block, *self.caution, *restricted, *self.rank_first, *self.rank_last}


class Rule(_Strict):
    """One rule of the reference, with where it comes from and who has reviewed it."""

    id: str = Field(pattern=r"^[A-Z][0-9]{2}[a-z]?$")
    condition: str  # the disease or treatment it is about, for people
    applies: str  # when it applies, for people
    when: str  # the same as a condition
    action: str = Field(min_length=1)  # shown to the clinician
    effect: Effect = Effect()
    if_unknown: Literal["ask", "hold"] = "ask"  # hold: counts as true while unknown
    note: str | None = None  # how the reference was read where it leaves room, for the reviewer
    honoured_by: str | None = None  # of a rule about the tool itself: what in the tool keeps it
    urgency: str = "-"  # as in the reference
    strength: str
    rationale: str
    source: str
    year: int | str | None = None
    verification: Literal["V", "P", "M"]
    reviewed_by: str | None = None  # None: a draft
    review_date: date | None = None

    @model_validator(mode="after")
    def _nobody_is_reassured_by_the_unknown(self) -> Rule:
        if self.effect.reassure and self.if_unknown == "hold":
            raise ValueError("if_unknown hold contradicts reassure: true, which has to be known")
        return self

    @property
    def cited(self) -> str:
        """Source and year, the year only where the source does not say it."""
        year = str(self.year or "")
        return self.source if not year or year in self.source else f"{self.source} ({year})"


class CatalogueOption(_Strict):
    """Something that can be done."""

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    title: str = Field(min_length=1)
    detail: str = ""
    group: Group


class Action(_Strict):
    """What a utility is of."""

    id: str
    title: str
    urgency: Urgency | None = None  # None: it makes nothing more urgent
    utility: tuple[float, ...]  # by true diagnosis, in the order of the taxonomy

    @model_validator(mode="after")
    def _seven(self) -> Action:
        if len(self.utility) != len(CODES):
            raise ValueError(f"{len(self.utility)} utilities, one a diagnosis is needed: {' '.join(CODES)}")
        return self


class Utilities(_Strict):
    """Utilities of actions; a site keeps its own file."""

    rule: str  # the rule that carries the decision by expected utility, S12
    source: str
    verification: Literal["V", "P", "M"]
    actions: tuple[Action, ...] = Field(min_length=2)
