"""The same predictor behind LitServe, with its own batching.

python bench/litserve_app.py MODEL PORT
"""

import sys
from typing import Any

import litserve
from bare_app import BATCH, WAIT
from fastapi import Request  # LitServe reads the annotation

from dermaflow.bundles.bundle import load_bundle
from dermaflow.scoring.predictor import Predictor


class Classify(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.predictor = Predictor(load_bundle(sys.argv[1]))

    def decode_request(self, request: Request) -> bytes:
        return request["images"].file.read()

    def predict(self, images: list[bytes]) -> list[Any]:
        return self.predictor.predict(images, [str(i) for i in range(len(images))])

    def encode_response(self, finding: Any) -> dict[str, Any]:
        return {"findings": [finding.model_dump()]}


if __name__ == "__main__":
    api = Classify(max_batch_size=BATCH, batch_timeout=WAIT, api_path="/v1/classify")
    server = litserve.LitServer(api, accelerator="cpu", healthcheck_path="/readyz")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", generate_client_file=False)
