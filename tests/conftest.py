"""Its place makes pytest put this folder on the path, so that tests of every kind can import `ham_predictions`."""

import os

# Ray's workers give way to every other process, and two test files run at a time: those with Ray would starve.
os.environ.setdefault("RAY_worker_niceness", "0")
