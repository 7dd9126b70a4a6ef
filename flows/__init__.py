"""Prefect flows over the library: order, retries, time limits, caching, artifacts. No maths.

Run one here (`python -m flows pipeline --help`), offer all of them to a Prefect server (`python -m flows serve`), or
deploy one by its entrypoint (`flows/pipeline.py:pipeline`).
"""

import os
from pathlib import Path

# Prefect reads these when it is first imported, so they are set here, before any flow is.
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")  # its 20 are few on a busy machine
if "PREFECT_HOME" in os.environ:  # Prefect 3.7 moves its database there, but leaves the results in ~/.prefect
    os.environ.setdefault("PREFECT_LOCAL_STORAGE_PATH", str(Path(os.environ["PREFECT_HOME"], "storage")))
