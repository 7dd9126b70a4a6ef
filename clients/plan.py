"""What a federated run is to do: one flat list of choices that the coordinator reads and Flower carries."""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clients.wire import Precision
from dermaflow import __version__
from dermaflow.errors import RecipeError
from dermaflow.learning.optimisation import Scope
from dermaflow.learning.recipe import Recipe

StrategyName = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold", "trimmed_mean", "median", "krum"
]


PresetName = Literal["plain", "label-skew"]
Norm = Literal["shared", "local", "frozen"]
Weigh = Literal["images", "steps"]
Privacy = Literal["none", "lesion", "site", "central"]


class Preset(NamedTuple):
    """Choices that belong together: fields of the plan, and keys of the recipe."""

    plan: dict[str, Any]
    recipe: dict[str, Any]


PRESETS: dict[PresetName, Preset] = {
    "plain": Preset({}, {}),
    "label-skew": Preset(
        {
            "rounds": 96, "local_epochs": 1 / 16, "head": "statistics", "norm": "frozen", "weigh": "steps",
            "average": 0.8,
        },
        {"optim.lr": 4e-4, "optim.clip": 1e6},
    ),
}  # fmt: skip
"""label-skew: for sites that see different diagnoses. Why: docs/federation.md; measured: bench/federation.py."""


class Plan(BaseModel):
    """One federated run. Every field is a key of Flower's ``--run-config``, with hyphens."""

    model_config = ConfigDict(extra="forbid")

    recipe: str = Field(description="The recipe as JSON: network, first weights, local training.")
    strategy: StrategyName = "fedavg"
    rounds: int = Field(20, ge=0, description="0 with head=statistics: the head from sums is the result.")
    local_epochs: float = Field(1.0, gt=0, description="Epochs of each site on its own images in a round.")
    scope: Scope = Field("all", description="What is trained and sent: head, last_block or all.")
    head_rounds: int = Field(0, ge=0, description="So many first rounds train the head only.")
    head: Literal["new", "statistics"] = Field(
        "new", description="statistics: the first head comes from class sums of all sites, exact in one exchange."
    )
    loss: Literal["recipe", "adjusted"] = Field(
        "recipe",
        description="recipe: class weights are those of all sites together, so that every site minimises its share of "
        "one loss; adjusted: each site corrects for its own class frequencies (logit adjustment).",
    )
    weights_of: Literal["all", "site"] = Field("all", description="Whose class frequencies give the class weights.")
    norm: Norm = Field(
        "shared",
        description="Normalisation layers: shared; local, they stay at the site (FedBN); frozen, with the running "
        "statistics of the first weights.",
    )
    keep_moments: bool = Field(True, description="A site's optimiser goes on where it stopped in the round before.")
    weigh: Weigh = Field(
        "images",
        description="What an update counts by: images, the site's share of them; steps, that share for each of its "
        "steps alike, so that a site with more images does not count twice, by its share and by its steps (FedNova).",
    )
    decay: Literal["cosine", "none"] = Field(
        "cosine", description="Learning rate over the rounds; cosine rises first, as the recipe's warmup says."
    )
    average: float = Field(
        0.0, ge=0, lt=1, description="Decay a round of the averaged model that is kept; 0 keeps the last round's."
    )
    precision: Precision = Field(
        "float32",
        description="Of the weights sent to a site in a round and its answer; sums and the model are float32.",
    )
    proximal_mu: float = Field(0.01, ge=0, description="fedprox only.")
    server_rate: float = Field(0.0, ge=0, description="Step of the server; 0 for the strategy's own default.")
    server_momentum: float = Field(0.9, ge=0, lt=1, description="fedavgm only.")
    malicious: int = Field(1, ge=0, description="krum and trimmed_mean: so many sites may lie.")
    largest_update: float = Field(
        10.0, gt=1, description="An update longer than this many times the median of the round is refused."
    )
    fraction: float = Field(1.0, gt=0, le=1, description="Share of the sites that train in a round.")
    min_sites: int = Field(1, ge=1, description="Fewer answers than this, and the run stops.")
    quorum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of answers after which only `grace` is waited; and of sites online, to begin.",
    )
    grace: float = Field(5.0, ge=0, description="Seconds.")
    timeout: float = Field(3600.0, gt=0, description="Seconds that a round may take.")
    monitor_every: int = Field(1, ge=1, description="Rounds between looks at the sites' calibration splits.")
    secure: bool = Field(False, description="Secure aggregation: the coordinator learns sums of sites only.")
    secure_threshold: int = Field(
        0, ge=0, description="Sites that must stay until the end of a secure sum; 0 for more than half of those asked."
    )
    secure_range: float = Field(8.0, gt=0, description="Largest change of a weight in a round that secure sums carry.")
    dp: Privacy = Field(
        "none",
        description="Differential privacy: lesion, each site protects each of its lesions; site, each site "
        "hides its whole update in noise; central, the coordinator does so with the sum.",
    )
    epsilon: float = Field(4.0, gt=0, description="dp=lesion: what each site guarantees for the run.")
    delta: float = Field(1e-5, gt=0, lt=1, description="Of the guarantee; below one over the number of lesions.")
    noise: float = Field(1.0, gt=0, description="dp=site and central: noise of a round over the length of an update.")
    clip: float = Field(
        1.0,
        gt=0,
        description="Length to which are cut: lesion, centred features; site and central, updates of the first round.",
    )
    directions: int = Field(128, ge=2, description="dp=lesion: random directions to which sums project features.")
    seed: int = Field(0, ge=0, lt=2**31)
    resamples: int = Field(1000, ge=1, description="Lesion resamples of each site for the intervals.")
    name: str = Field(
        "", description="Under which sites remember the run, so that it can go on; by default its number."
    )
    sites: str = Field("", description="Names of the sites and their node ids: a=123,b=456. A simulation has its own.")
    shards: str = Field("", description="Simulation only: shard folder that is divided among the sites.")
    partition: str = Field(
        "natural",
        description="Simulation only: natural (HAM10000's sources), iid:N or dirichlet:ALPHA:N; with +pooled, one more "
        "site that holds everything.",
    )
    only: str = Field("", description="The sites that train, comma-separated, by default all; all are evaluated.")
    out: str = Field(description="Folder of the result, on the coordinator's machine.")

    @model_validator(mode="after")
    def _secure_sums_hide_what_some_strategies_need(self) -> Plan:
        if self.secure and self.strategy in ("trimmed_mean", "median", "krum", "scaffold"):
            raise ValueError(
                f"strategy {self.strategy} needs each site's update, secure aggregation shows their sum only; use "
                "fedavg, fedprox, fedavgm, fedadam or fedyogi, or secure=false"
            )
        if self.secure and self.precision != "float32":
            raise ValueError(f"precision {self.precision} cannot be masked; secure sums are fixed-point, 32 bits")
        return self

    @model_validator(mode="after")
    def _privacy_covers_everything_that_is_learnt(self) -> Plan:
        if not self.rounds and self.head != "statistics":
            raise ValueError("no rounds and no head from sums: nothing is learnt; use rounds=1 or head=statistics")
        if self.dp == "none":
            return self
        if self.weigh == "steps":
            raise ValueError(f"weigh=steps does not go with dp={self.dp}, which cuts whole updates; use weigh=images")
        if self.strategy not in ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"):
            raise ValueError(f"strategy {self.strategy} does not go with dp={self.dp}; use fedavg or one of its kin")
        if self.dp == "lesion" and (self.scope != "head" or self.head != "statistics" or self.rounds):
            raise ValueError(
                "dp=lesion is for the head from sums on a frozen backbone; use scope=head, head=statistics and rounds=0"
            )
        if self.dp != "lesion" and self.head == "statistics":
            raise ValueError(f"dp={self.dp} is for updates; sums of features go with dp=lesion")
        if self.norm != "frozen" and self.scope != "head":
            raise ValueError(
                f"dp={self.dp} adds no noise to running statistics, which would then leave as they are; use "
                "norm=frozen or scope=head"
            )
        if self.dp == "central" and self.secure:
            raise ValueError("dp=central needs each site's update, which secure=true hides; use dp=site")
        return self

    @property
    def parsed_recipe(self) -> Recipe:
        """The recipe; raises RecipeError if it is none."""
        try:
            return Recipe.model_validate_json(self.recipe)
        except ValidationError as error:
            raise RecipeError(str(error), where="recipe") from error

    def run_config(self) -> dict[str, Any]:
        """As Flower carries it."""
        return {name.replace("_", "-"): value for name, value in self.model_dump().items()}

    @classmethod
    def from_run_config(cls, config: dict[str, Any]) -> Plan:
        """Read what Flower carried; keys of others are left out."""
        known = {name.replace("_", "-"): name for name in cls.model_fields}
        return cls.model_validate({known[key]: value for key, value in config.items() if key in known})

    def node_ids(self) -> dict[int, str]:
        """Names of the sites by node id; empty in a simulation."""
        found = {}
        for entry in filter(None, self.sites.split(",")):
            name, _, node = entry.strip().rpartition("=")
            if not name or not node.isdigit():
                raise RecipeError(f"{entry!r} is no site", where="sites", expected="name=node-id, comma-separated")
            found[int(node)] = name
        return found


class Order(BaseModel):
    """What a site is asked to do with the weights that come along."""

    model_config = ConfigDict(extra="forbid")

    version: str = __version__  # of DermaFlow at the coordinator
    run: str
    round: int
    rounds: int
    strategy: StrategyName
    recipe: Recipe
    scope: Scope
    local_epochs: float = 1.0
    rate: float = 1.0  # of the recipe's learning rates
    adjusted: bool = False
    counts: list[int] | None = None  # training images of each class over all sites; class weights come from them
    norm: Norm = "shared"
    weigh: Weigh = "images"
    keep_moments: bool = True
    mu: float = 0.0
    monitor: bool = False
    precision: Precision = "float32"
    secure_range: float = 0.0  # 0 without secure aggregation
    most_images: int = 0  # largest number of training images of a site, to which secure updates are weighed
    dp: Privacy = "none"
    epsilon: float = 4.0
    delta: float = 1e-5
    noise: float = 1.0
    clip: float = 1.0
    directions: int = 128
    seed: int = 0
    resamples: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of what is the same in all messages of a run."""
        changes = {"version", "round", "scope", "rate", "counts", "monitor", "precision", "most_images"}
        if self.dp != "lesion":
            changes.add("clip")  # follows the updates
        return hashlib.sha256(self.model_dump_json(exclude=changes).encode()).hexdigest()
