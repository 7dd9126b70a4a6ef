"""The application as Serve deploys it: by `serve deploy serve/config.yaml`, or by `dermaflow serve`."""

from __future__ import annotations

import json
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from dermaflow import __version__, storage
from serve.classifier import Classifier
from serve.ingress import Ingress
from serve.models import Chosen, choose
from serve.options import Options, checked
from serve.recommender import Recommender

NAME = "dermaflow"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Serve's access log would hold paths, and so ids of lesions and images."""


def build(args: dict[str, Any]) -> Application:
    """The application of a config file.

    Args:
        args: The fields of `Options`.

    Raises:
        ServeError: It would be open to everybody.
        BundleError: The model is damaged, not calibrated or not there.
    """
    options = checked(Options.model_validate(args))
    return bind(options, choose(options.model))


def bind(options: Options, model: Chosen) -> Application:
    """The application of options and a model.

    Deployed again with another model and the same options, only the classifiers' user config differs: Serve
    reconfigures them and restarts nothing. That is what the version of each deployment is for.
    """
    same = storage.sha256(f"{__version__} {json.dumps(options.to_send())}".encode())[:16]

    def deployment(of: type[Any], cpus: float, **choices: Any) -> Any:
        actor = {"num_cpus": cpus} | ({"num_gpus": choices.pop("gpus")} if choices.get("gpus") else {})
        choices.pop("gpus", None)
        made = serve.deployment(of, name=of.__name__, ray_actor_options=actor, logging_config=QUIET,  # type: ignore[call-overload]
                                health_check_period_s=5, health_check_timeout_s=30, graceful_shutdown_timeout_s=20,
                                graceful_shutdown_wait_loop_s=0.5, **choices)  # fmt: skip
        return made.options(_internal=True, version=same)

    classifier = deployment(
        Classifier, options.cpus, gpus=options.gpus, num_replicas=options.replicas,
        max_ongoing_requests=options.working, max_queued_requests=options.waiting,
        user_config=model.user_config(batch=options.batch, wait_ms=options.wait_ms),
    ).bind(options.threads)  # fmt: skip
    recommender = deployment(
        Recommender, 0.1, num_replicas=options.recommenders, max_ongoing_requests=8,
        max_queued_requests=options.waiting,
    ).bind()  # fmt: skip
    limits = options.limits
    ingress = deployment(
        serve.ingress()(Ingress), 0.1, num_replicas=options.ingresses,
        # the ingress counts by itself, and refuses in our words; Serve's limits only catch what gets past it
        max_ongoing_requests=2 * limits.in_flight + limits.streams + 64, max_queued_requests=4 * limits.in_flight,
    )  # fmt: skip
    return ingress.bind(options.to_send(), classifier, recommender)  # type: ignore[no-any-return]
