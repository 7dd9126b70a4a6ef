"""The report in a real browser: it shows, fits a phone and asks for nothing outside the file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from ham_predictions import ham_like, ham_like_bundle, lesion_picture
from PIL import Image

from dermaflow.evaluation.evaluate import evaluate
from dermaflow.evaluation.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: install it to see the page rendered")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    predictions = ham_like(images=400, lesions=300)
    bundle = ham_like_bundle(predictions)
    evaluation = evaluate(predictions, bundle.calibration, resamples=50)
    out = tmp_path_factory.mktemp("report")
    return write_report(out, evaluation, predictions, bundle, images=lesion_picture, command="dermaflow evaluate")


def browse(tmp_path: Path, page: Path, *options: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def hosts(tmp_path: Path, page: Path) -> set[str]:
    """Hosts that showing a page asks for, without those the browser calls home to by itself."""
    log = tmp_path / "net.json"
    browse(tmp_path, page, "--dump-dom", f"--log-net-log={log}")
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = {urlsplit(event["params"]["url"]).hostname for event in events if "url" in event.get("params", {})}
    return {host for host in asked if host and not host.endswith(("google.com", "googleapis.com"))}


def test_the_page_shows_and_requests_nothing(tmp_path: Path, page: Path) -> None:
    dom = browse(tmp_path, page, "--dump-dom")
    assert "<title>Evaluation of ham10000-cpu</title>" in dom
    assert "melanoma images are found" in dom
    assert dom.count("<svg") > 20
    assert hosts(tmp_path, page) == set()


def test_the_watch_over_requests_sees_one_and_the_page_forbids_it(tmp_path: Path, page: Path) -> None:
    leaky = page.with_name("leaky.html")
    text = page.read_text(encoding="utf-8").replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">')
    leaky.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text), encoding="utf-8")
    assert hosts(tmp_path, leaky) == {"127.0.0.1"}
    leaky.write_text(text, encoding="utf-8")
    assert hosts(tmp_path, leaky) == set()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_dark_text_on_white_and_fits_its_width(tmp_path: Path, page: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    browse(tmp_path, page, f"--screenshot={picture}", f"--window-size={width},1600")
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape == (1600, width)
    assert (pixels == 255).mean() > 0.6
    assert (pixels < 100).mean() > 0.01
    assert (pixels[:, -8:] == 255).mean() > 0.98  # nothing runs over the right edge
