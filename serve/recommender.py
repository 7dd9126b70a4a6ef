"""The deployment that decides pathways: rules and numpy, no network, so it scales on its own."""

from __future__ import annotations

import asyncio
from typing import Any

from dermaflow.errors import DermaflowError


class Recommender:
    """Cases to pathways."""

    def __init__(self) -> None:
        from dermaflow.pathways.knowledge import load_knowledge
        from dermaflow.settings import start_logging

        start_logging()
        self._knowledge = load_knowledge()

    async def recommend(self, body: bytes, thresholds: dict[str, float]) -> dict[str, Any]:
        """Pathways of cases.

        Args:
            body: JSON of a `RecommendRequest`, checked before.
            thresholds: ``mel``, ``malignant``, ``entropy`` of the model that made the findings.

        Returns:
            ``pathways`` (JSON, a list in the order of the cases) and ``urgencies``; or ``problem``: what, expected,
            todo.
            An error is a value here, because Serve writes the text of an exception, and so ids, into its log.
        """
        return await asyncio.to_thread(self._recommend, body, thresholds)

    def _recommend(self, body: bytes, thresholds: dict[str, float]) -> dict[str, Any]:
        from dermaflow.pathways.engine import Thresholds, recommend
        from dermaflow.trust.lesions import merge_lesion
        from serve.schemas import RecommendRequest

        cases = RecommendRequest.model_validate_json(body).cases
        limits = Thresholds(**{name: thresholds[name] for name in ("mel", "malignant", "entropy")})
        try:
            decided = recommend(
                [case.patient for case in cases],
                [case.lesion for case in cases],
                [merge_lesion(c.lesion.lesion_id, list(c.findings)) if c.findings else None for c in cases],
                self._knowledge,
                limits,
            )
            pathways = [decided.pathway(i) for i in range(len(decided))]
        except DermaflowError as error:
            return {"problem": {"what": str(error.what), "expected": error.expected, "todo": error.todo}}
        return {
            "pathways": b"[" + b",".join(pathway.model_dump_json().encode() for pathway in pathways) + b"]",
            "urgencies": [pathway.urgency for pathway in pathways],
        }
