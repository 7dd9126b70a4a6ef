"""What a user would write instead of Ray Serve: the same predictor behind FastAPI and uvicorn, with micro-batching.

python bench/bare_app.py MODEL PORT
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

from dermaflow.bundles.bundle import load_bundle
from dermaflow.scoring.predictor import Predictor

BATCH, WAIT = 16, 0.005  # images, seconds; as serve's classifier


def bare(model: str, port: int) -> None:
    predictor = Predictor(load_bundle(model))
    queue: asyncio.Queue[tuple[bytes, asyncio.Future[Any]]] = asyncio.Queue()

    async def pump() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await queue.get()]
            end = loop.time() + WAIT
            while len(batch) < BATCH:
                try:
                    batch.append(await asyncio.wait_for(queue.get(), max(0.0, end - loop.time())))
                except TimeoutError:
                    break
            images = [image for image, _ in batch]
            found = await asyncio.to_thread(predictor.predict, images, [str(i) for i in range(len(images))])
            for (_, future), finding in zip(batch, found, strict=True):
                future.set_result(finding)

    @asynccontextmanager
    async def life(_: FastAPI):
        task = asyncio.create_task(pump())
        yield
        task.cancel()

    api = FastAPI(lifespan=life)

    @api.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/v1/classify")
    async def classify(request: Request) -> dict[str, Any]:
        form = await request.form()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await queue.put((await form["images"].read(), future))
        return {"findings": [(await future).model_dump()]}

    uvicorn.run(api, host="127.0.0.1", port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    bare(sys.argv[1], int(sys.argv[2]))
