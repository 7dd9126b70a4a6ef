"""A case that a clinician completes: its pathway is computed anew and stored beside the others of the batch."""

from __future__ import annotations

from dermaflow.pathways.engine import Thresholds
from dermaflow.pathways.intake import Case
from dermaflow.pathways.outputs.revision import revise_folder
from dermaflow.pathways.run import thresholds_of
from dermaflow.schemas.patient import Lesion, Patient
from dermaflow.trust.lesions import merge_lesions
from serve import results
from serve.jobs import Job
from serve.results import NotThere
from serve.schemas import CaseUpdate


def revise(job: Job, update: CaseUpdate) -> None:
    """Store the case of one lesion and the pathways that follow from it.

    What is said of a person holds for all their lesions, so all their pathways are computed anew.

    Raises:
        NotThere: The batch has no such lesion.
        BundleError: The model of the batch is not there any more.
        SignOffError: The log of sign-offs was tampered with.
    """
    case = Case(Patient.model_validate(update.patient.model_dump()), Lesion.model_validate(update.lesion.model_dump()))
    thresholds: Thresholds = thresholds_of(job.model["uri"], job.model["sha256"])

    def finding(lesion_id: str):  # type: ignore[no-untyped-def]
        try:
            return merge_lesions(results.lesion_findings(job.out, lesion_id))[0]
        except NotThere:
            return None

    if finding(case.lesion.lesion_id) is None:
        raise NotThere("no such lesion in this batch", expected="a lesion_id of the work list")
    revise_folder(results.pathways_folder(job.out), case, finding, thresholds)
