"""The page in a real browser, against the real service: a batch from upload to signature, by mouse and by keyboard."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from PIL import Image
from serve_parts import a_jpeg
from tiny_bundle import a_bundle, a_calibration

from dermaflow.bundles.bundle import save_bundle
from dermaflow.learning.backbones import BackboneConfig, build
from dermaflow.learning.inference import predict
from dermaflow.ports import free_port
from dermaflow.schemas.bundle import OodSpec, Reference

pytest.importorskip("ray.serve")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH: install it to see the page rendered"),
    pytest.mark.timeout(600),  # the first test starts Ray, Serve and Chromium, on whatever is left of a busy machine
]

HTML, SQL = "<img src=x onerror=alert(1)>", "x'; DROP TABLE jobs; --"
PATIENT = '<b>Bobby</b> & "Tables"'
IMAGES = 10  # readable ones; one more is grey, one more is cut off


def save_model(path: Path) -> None:
    """An untrained network with a calibration and a few made-up training lesions to be near to."""
    torch.manual_seed(0)
    bundle = a_bundle(a_calibration().model_copy(update={"ood": OodSpec(quantile=0.98, threshold=1e9)}))
    network = build(BackboneConfig(name="seed_cnn", dropout=0.1))
    width = predict(network, np.zeros((1, 36, 48, 3), np.uint8), bundle.input)[1].shape[1]
    features = np.random.default_rng(0).normal(size=(6, width))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    reference = Reference(
        features.astype(np.float16), np.zeros(width, np.float32), np.eye(width, dtype=np.float32),
        tuple(f"near{i}" for i in range(6)), tuple(f"known{i}" for i in range(6)), ("mel", "nv") * 3,
    )  # fmt: skip
    save_bundle(path, bundle, network.state_dict(), reference, "# Card\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained, calibrated model; an archive of synthetic images; a table of patients with hostile names."""
    root = tmp_path_factory.mktemp("page")
    save_model(root / "model")
    names = [HTML, SQL, *(f"lesion{i}" for i in range(IMAGES - 2)), "grey", "cut"]
    with zipfile.ZipFile(root / "clinic.zip", "w") as archive:
        for seed, name in enumerate(names[:IMAGES]):
            archive.writestr(f"{name}.jpg", a_jpeg(seed))
        Image.new("RGB", (200, 150), (128, 128, 128)).save(root / "grey.jpg")
        archive.write(root / "grey.jpg", "grey.jpg")
        archive.writestr("cut.jpg", a_jpeg()[:400])
    with (root / "patients.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["patient_id", "lesion_id", "age", "sex", "site"])
        writer.writerows([PATIENT if name == HTML else f"P-{name}", name, 60, "male", "back"] for name in names)
    return root


@pytest.fixture(scope="module")
def service(root: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "serve", "--model", str(root / "model"), "--port", str(port)]
    with (root / "serve.log").open("wb") as log:
        process = subprocess.Popen([*command, "--state", str(root / "state")], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 240
        while not _ready(address):
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail("the service did not start: " + (root / "serve.log").read_text(errors="replace")[-3000:])
            time.sleep(0.3)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz", trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def browser(root: Path, service: str) -> Iterator[Browser]:
    """One tab for all tests. What it asked for is looked at when all are done."""
    with Browser(root / "browser") as tab:
        tab.look()
        yield tab
        assert [problem for problem in tab.problems if "422" not in problem] == []  # 422: refusals that tests provoke
        assert tab.asked == {"127.0.0.1"}  # the page calls nobody else


@pytest.fixture(scope="module")
def batch(root: Path, service: str, browser: Browser) -> str:
    """The archive, uploaded through the page and scored to the end."""
    browser.open(service)
    browser.wait_for("document.querySelector('#pick-files')")
    browser.set_files("#pick-files", [root / "clinic.zip"])
    browser.set_files("#pick-patients", [root / "patients.csv"])
    browser.wait_for("document.querySelectorAll('.chosen li').length === 2")
    browser.click(".intake button.primary")
    browser.wait_for("location.hash.startsWith('#/batch/')")
    browser.wait_for("document.querySelector('.state.finished') && document.querySelector('.worklist tbody tr')", 400)
    return browser.evaluate("location.hash").split("/")[-1]


def lesion(browser: Browser, service: str, batch: str, name: str) -> None:
    browser.open(f"{service}/#/batch/{batch}/lesion/{quote(name, safe='')}")
    browser.wait_for(f"document.querySelector('h1')?.textContent === {json.dumps(f'Lesion {name}')}")


def worklist(browser: Browser, service: str, batch: str) -> list[str]:
    browser.open(f"{service}/#/batch/{batch}")
    browser.wait_for("document.querySelector('.worklist tbody tr')")
    return links(browser)


def links(browser: Browser) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('.worklist .row-link')].map(e => e.textContent)")


def cells(browser: Browser, rows: str) -> list[list[str]]:
    """Text of the children of each element that a selector finds."""
    return browser.evaluate(
        f"[...document.querySelectorAll({json.dumps(rows)})].map(e => [...e.children].map(c => c.textContent))"
    )


def urgency(browser: Browser) -> str:
    return browser.evaluate("document.querySelector('.urgency .level').textContent")


def test_every_image_is_accounted_for(browser: Browser, service: str, batch: str) -> None:
    worklist(browser, service, batch)
    figures = dict(cells(browser, ".figures div"))
    assert figures["images"] == f"{IMAGES + 2} of {IMAGES + 2}"
    assert int(figures["assessed"]) + int(figures["not assessable"]) + int(figures["not readable"]) == IMAGES + 2
    assert figures["not readable"] == "1"
    browser.click(".failures summary")
    browser.wait_for("document.querySelector('.failures tbody tr')")
    rows = cells(browser, ".failures tbody tr")
    what = {name: (status, reason) for name, status, reason in rows}
    assert what["cut"][0] == "not readable"
    assert what["grey"][0] == "not assessable"
    assert all(len(reason) > 5 for _, reason in what.values())


def test_the_work_list_is_sorted_and_shows_names_as_they_are(browser: Browser, service: str, batch: str) -> None:
    names = worklist(browser, service, batch)
    levels = browser.evaluate("[...document.querySelectorAll('.c-urgency b')].map(e => e.textContent)")
    assert len(levels) == len(names) == IMAGES + 2
    assert levels == sorted(levels)
    assert {HTML, SQL} <= set(names)
    assert PATIENT in browser.text()
    assert browser.evaluate("document.querySelectorAll('main img, main b b, main [onerror]').length") == 0
    grey = browser.evaluate(
        "[...document.querySelectorAll('.worklist tr')].find(e => e.textContent.includes('grey')).textContent"
    )
    assert "not assessable" in grey
    assert "%" not in grey


def test_filters_and_search_narrow_the_list(browser: Browser, service: str, batch: str) -> None:
    worklist(browser, service, batch)
    browser.key("/")
    browser.type("drop table")
    assert links(browser) == [SQL]
    assert "1 of 12" in browser.evaluate("document.querySelector('.found').textContent")
    browser.evaluate(
        "(() => { const e = document.querySelector('#search'); e.value = ''; e.dispatchEvent(new Event('input')) })()"
    )
    level = browser.evaluate("document.querySelector('.c-urgency b').textContent")
    browser.click(f"#f-{level}")
    assert set(browser.evaluate("[...document.querySelectorAll('.c-urgency b')].map(e => e.textContent)")) == {level}
    browser.click(f"#f-{level}")
    assert len(links(browser)) == IMAGES + 2


def test_a_lesion_shows_probabilities_set_and_pathway(browser: Browser, service: str, batch: str) -> None:
    found = httpx.get(f"{service}/v1/batches/{batch}/worklist", trust_env=False).json()["lesions"]
    one = next(row for row in found if row["status"] == "ok")
    lesion(browser, service, batch, one["lesion_id"])
    rows = cells(browser, ".bars tbody tr")
    assert len(rows) == 7
    assert sum("malignant" in name for _, name, *_ in rows) == 3
    assert sum("in the set" in mark for mark, *_ in rows) == len(one["conformal_set"])
    assert urgency(browser) == one["urgency"]
    assert "PRELIMINARY" in browser.evaluate("document.querySelector('.sign').textContent")
    assert browser.evaluate("document.querySelectorAll('.options > li').length") > 0
    assert browser.evaluate("document.querySelectorAll('.pathway .cite').length") > 0
    canvas = "document.querySelector('.picture')"
    browser.wait_for(f"{canvas}.width === 200 && {canvas}.getContext('2d').getImageData(100, 75, 1, 1).data[3] === 255")
    plain = browser.evaluate(f"{canvas}.toDataURL().length")
    browser.key("h")
    browser.wait_for(f"{canvas}.toDataURL().length !== {plain}")
    assert browser.evaluate("document.querySelector('[aria-pressed]').ariaPressed") == "true"
    browser.wait_for("document.querySelectorAll('.nearest li').length > 0")


def test_a_lesion_that_cannot_be_assessed_shows_no_class(browser: Browser, service: str, batch: str) -> None:
    lesion(browser, service, batch, "grey")
    about = browser.evaluate("document.querySelector('.look').textContent")
    assert "not assessable" in about
    assert "melanoma" not in about
    assert "%" not in about
    assert browser.evaluate("document.querySelectorAll('.bars').length") == 0


def test_an_answer_changes_the_pathway_at_once_and_says_how(browser: Browser, service: str, batch: str) -> None:
    lesion(browser, service, batch, SQL)
    browser.evaluate("[...document.querySelectorAll('.all-fields')].forEach(e => { e.open = true })")
    browser.wait_for("document.querySelectorAll('.all-fields .question').length > 60")
    browser.evaluate(
        "(() => { const labels = [...document.querySelectorAll('.all-fields label')];"
        "const label = labels.find(e => e.textContent.startsWith('histology') && e.control.tagName === 'SELECT');"
        "label.control.value = 'mel'; label.control.dispatchEvent(new Event('change')) })()"
    )
    browser.wait_for("document.querySelector('.changes').textContent.includes('Changed by histology: mel')")
    assert "New: Wide excision by stage" in browser.evaluate("document.querySelector('.changes').textContent")
    assert urgency(browser) == "U1"
    assert "follows histology" in browser.evaluate("document.querySelector('.look').textContent")
    kept = httpx.get(f"{service}/v1/batches/{batch}/lesions/{quote(SQL, safe='')}", trust_env=False).json()
    assert (kept["lesion"]["histology"], kept["pathway"]["basis"]) == ("mel", "histology")


def test_an_impossible_answer_is_refused_beside_its_field(browser: Browser, service: str, batch: str) -> None:
    lesion(browser, service, batch, "lesion1")
    browser.evaluate("document.querySelector('.all-fields').open = true")
    browser.wait_for("document.querySelectorAll('.all-fields .question').length > 30")
    browser.evaluate("document.querySelector('.all-fields input[type=number]').id = 'age'")
    browser.click("#age")
    browser.evaluate("document.querySelector('#age').select()")
    browser.type("400")
    browser.key("Tab")
    browser.wait_for("document.querySelector('.all-fields .question .problem')")
    kept = httpx.get(f"{service}/v1/batches/{batch}/lesions/lesion1", trust_env=False).json()
    assert kept["patient"]["age"] == 60


def test_a_rejection_needs_a_reason_and_is_kept(browser: Browser, service: str, batch: str) -> None:
    lesion(browser, service, batch, "lesion2")
    browser.click("#decision-rejected")
    browser.click("#by")
    browser.type("Dr <i>Roe</i>")
    browser.click(".sign-form button.primary")
    assert "reason is required" in browser.wait_for("document.querySelector('#reason-wrong').textContent")
    assert browser.evaluate("document.activeElement.id") == "reason"
    body = {"batch_id": batch, "lesion_id": "lesion2", "by": "Dr Roe", "decision": "rejected"}
    refused = httpx.post(f"{service}/v1/reviews", json=body, trust_env=False)
    assert refused.status_code in (400, 422)
    browser.type("the picture shows another lesion")
    browser.click(".sign-form button.primary")
    browser.wait_for("document.querySelector('.sign.is-signed')")
    status = browser.evaluate("document.querySelector('.sign-status').textContent")
    assert "Rejected by Dr <i>Roe</i>" in status
    assert "the picture shows another lesion" in status
    assert browser.evaluate("document.querySelectorAll('.sign i').length") == 0
    worklist(browser, service, batch)
    assert browser.evaluate("document.querySelectorAll('.signed.rejected').length") == 1


def test_the_whole_way_by_keyboard(browser: Browser, service: str, batch: str) -> None:
    names = worklist(browser, service, batch)
    browser.key("j")
    browser.key("j")
    assert browser.evaluate("document.activeElement.textContent") == names[1]
    browser.key("Enter")
    browser.wait_for(f"document.querySelector('h1').textContent === {json.dumps('Lesion ' + names[1])}")
    browser.key("j")
    browser.wait_for(f"document.querySelector('h1').textContent === {json.dumps('Lesion ' + names[2])}")
    browser.key("k")
    browser.wait_for(f"document.querySelector('h1').textContent === {json.dumps('Lesion ' + names[1])}")
    assert browser.evaluate("document.activeElement.tagName") == "H1"
    browser.key("e")
    assert browser.evaluate("[document.activeElement.id, document.querySelector('#decision-edited').checked]") == [
        "reason",
        True,
    ]
    browser.type("just biopsy first")  # j and k are letters here
    browser.key("Tab")
    assert browser.evaluate("document.activeElement.id") == "by"
    browser.evaluate("document.activeElement.select()")
    browser.type("Dr Kern")
    browser.key("Enter")
    browser.wait_for("document.querySelector('.sign.is-signed')?.textContent.includes('Edited by Dr Kern')")
    outline = browser.evaluate(
        "(document.querySelector('.walk a').focus(), getComputedStyle(document.querySelector('.walk a')).outlineStyle)"
    )
    assert outline == "solid"
    browser.key("?")
    assert "next lesion" in browser.wait_for("document.querySelector('dialog[open]')?.textContent")
    browser.key("Escape")
    browser.wait_for("!document.querySelector('dialog')")
    browser.key("u")
    browser.wait_for("document.querySelector('.worklist tbody tr')")


def test_the_exports_give_files(browser: Browser, service: str, batch: str) -> None:
    worklist(browser, service, batch)
    assert browser.evaluate("[...document.querySelectorAll('.exports a')].map(e => e.textContent)") == [
        "Parquet",
        "CSV",
        "JSON Lines",
        "FHIR",
    ]
    browser.click(".exports a[href*=csv]")
    end = time.monotonic() + 20
    while not (files := [f for f in browser.downloads.iterdir() if f.suffix == ".csv"]) and time.monotonic() < end:
        browser.evaluate("1")
        time.sleep(0.1)
    assert len(files[0].read_text(encoding="utf-8").splitlines()) == IMAGES + 3


NAMELESS = """[...document.querySelectorAll(
  'button, a[href], input, select, textarea, canvas, dialog, summary, progress'
)].filter(e => {
  if (e.closest('[hidden]')) return false;
  const by = document.getElementById(e.getAttribute('aria-labelledby') ?? '')?.textContent;
  const labels = [...(e.labels ?? [])].map(label => label.textContent);
  const name = [e.getAttribute('aria-label'), by, e.textContent, ...labels].join('').trim();
  return !name || (e.matches('input, select, textarea') && !labels.length);
}).map(e => e.outerHTML)"""
STRUCTURE = """(() => {
  const all = selector => [...document.querySelectorAll(selector)], ids = all('[id]').map(e => e.id);
  return {
    h1: all('h1').length, main: all('main').length, lang: document.documentElement.lang, title: document.title,
    nav: all('nav:not([aria-label])').length, cells: all('th:not([scope])').length,
    twice: ids.filter((id, i) => ids.indexOf(id) !== i),
    groups: all('fieldset').filter(e => !e.querySelector('legend')?.textContent.trim()).length,
    wide: document.documentElement.scrollWidth <= innerWidth ? [] : all('body *')
      .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => `${e.tagName} ${e.className} ${e.id}`),
    headings: all('h1, h2, h3').map(e => Number(e.tagName[1])),
  };
})()"""


@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_is_sound_for_readers_and_fits(
    browser: Browser, service: str, batch: str, root: Path, width: int
) -> None:
    browser.look(width=width)
    try:
        for view in ("", "#/model", f"#/batch/{batch}", f"#/batch/{batch}/lesion/lesion1"):
            browser.open(f"{service}/{view}")
            browser.wait_for("document.querySelector('main h1')")
            browser.evaluate("[...document.querySelectorAll('details')].forEach(e => { e.open = true })")
            time.sleep(0.2)
            assert browser.evaluate(NAMELESS) == [], view
            found = browser.evaluate(STRUCTURE)
            headings = found.pop("headings")
            assert all(b <= a + 1 for a, b in zip([0, *headings], headings, strict=False)), (view, headings)
            assert found.pop("title").endswith("· DermaFlow")
            assert found == {
                "h1": 1,
                "main": 1,
                "lang": "en",
                "nav": 0,
                "twice": [],
                "cells": 0,
                "groups": 0,
                "wide": [],
            }, view
            text = browser.text()
            assert "not a medical device" in text
            assert "reliminary until a clinician signs" in text
            assert "tiny" in text  # the model
    finally:
        browser.look()


def test_light_and_dark(browser: Browser, service: str, batch: str, root: Path) -> None:
    worklist(browser, service, batch)
    ground = "getComputedStyle(document.body).backgroundColor"
    light = browser.evaluate(ground)
    browser.screenshot(root / "light.png")
    browser.look(scheme="dark")
    dark = browser.evaluate(ground)
    browser.screenshot(root / "dark.png")
    assert Image.open(root / "light.png").size == (1280, 900)
    assert light != dark
    browser.click("#theme")  # auto, light, dark
    assert browser.evaluate(ground) == light
    browser.click("#theme")
    browser.look(scheme="light")
    assert browser.evaluate(ground) == dark
    browser.click("#theme")
    if folder := os.environ.get("DERMAFLOW_SCREENSHOTS"):
        shutil.copy(root / "light.png", folder)
        shutil.copy(root / "dark.png", folder)
