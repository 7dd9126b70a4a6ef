"""A folder that `dermaflow recommend` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dermaflow.forgetting.places import Ids, Link
from dermaflow.pathways.outputs.folder import PATHWAYS, UNMATCHED, read_folder
from dermaflow.pathways.outputs.forgetting import forget_in_folder, pathway_goes, sign_offs_about


class Pathways:
    """Pathways with their cases, pages, FHIR bundles and sign-offs.

    Args:
        folder: Local folder; sign-offs are made in local folders only.
        pseudonym: What stands for an id in the log of sign-offs.
        by: Who has it done, for that log.
    """

    def __init__(self, folder: str | Path, pseudonym: Callable[[str], str], by: str) -> None:
        self.name = str(folder)
        self._folder, self._pseudonym, self._by = Path(folder), pseudonym, by

    @property
    def there(self) -> bool:
        return (self._folder / PATHWAYS).exists()

    def links(self) -> list[Link]:
        """People, their lesions and the images of these."""
        pathways, cases, _ = read_folder(self._folder)
        found = [Link(case.patient.patient_id, case.lesion.lesion_id, None) for case in cases]
        for pathway in pathways:
            images: list[str] | list[None] = pathway.image_ids or [None]
            found += [Link(pathway.patient_id, pathway.lesion_id, image) for image in images]
        return found

    def holds(self, ids: Ids) -> dict[str, int]:
        pathways, _, _ = read_folder(self._folder)
        gone = [p for p in pathways if pathway_goes(p, ids.patients, ids.lesions, ids.images)]
        lesions = ids.lesions | {p.lesion_id for p in gone}
        counts = {
            "pathways": len(gone),
            "sign-offs made anonymous": sign_offs_about(self._folder, ids.patients, lesions),
            "unmatched": self._unmatched(ids),
        }
        return {kind: count for kind, count in counts.items() if count}

    def _unmatched(self, ids: Ids) -> int:
        import csv

        path = self._folder / UNMATCHED
        if not path.exists():
            return 0
        with path.open(encoding="utf-8", newline="") as stream:
            return sum(row[0] in ids.patients or row[1] in ids.lesions for row in csv.reader(stream))

    def remove(self, ids: Ids) -> None:
        forget_in_folder(self._folder, ids.patients, ids.lesions, ids.images, self._pseudonym, by=self._by)
