"""The page for one person and the index: everything is there, nothing can break out, nothing is loaded."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from sample_pathways import LABEL, REFER, a_blurred_pathway, a_pathway

from dermaflow.pathways.outputs.identity import file_name
from dermaflow.pathways.outputs.page import bars, index_page, page_name, patient_page, percent
from dermaflow.schemas.pathway import Pathway, SignOff
from dermaflow.schemas.patient import Lesion, Patient

HOSTILE = '<script>alert("x")</script>&\'"'
VOID = {"meta", "br", "img", "input", "hr", "link"}


class _Balanced(HTMLParser):
    """Fails on a tag that is not closed or closed twice, and gathers the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def text_of(page: str) -> str:
    return _Balanced(page).text


def signed(**changes: Any) -> Pathway:
    sign_off = SignOff(by="Dr Ada Byron", at="2026-03-02T08:00:00+00:00", decision="edited", reason="Mohs instead")
    return a_pathway(**({"status": "final", "sign_off": sign_off} | changes))


def test_the_page_holds_everything_a_clinician_needs() -> None:
    patient = Patient(patient_id="P1", age=31, pregnant="yes", fitzpatrick=5)
    lesions = {"L1": Lesion(lesion_id="L1", site="lower extremity", changing="yes")}
    text = text_of(patient_page([a_pathway()], patient=patient, lesions=lesions, index="../index.html"))
    for part in (
        "PRELIMINARY", "Patient P1", "age 31", "pregnant yes", "skin type (Fitzpatrick) 5", "site lower extremity",
        "U1 urgent suspected cancer: refer now", "from rules S01",
        "Refer as urgent suspected cancer. [S01; NICE NG12 2015; V ]",
        "melanocytic nevus 72 % in the set", "melanoma 18 % in the set", "basal cell carcinoma 2 %",
        "Estimated probability of malignancy: 21 %", "no quality flag", "decided from the pictures",
        "1 Excision biopsy possible", "2 Cryotherapy locked: confirm first", "Confirm: lesion: pigmented",
        "3 Fluorouracil cream blocked Blocked in pregnancy. [C02; Efudex PI; V ]", "What is the skin type? [K04]",
        "Examine at 3 and 12 months. [F06; Metvix SmPC; P ]", "the clinician edits it before use",
        "This spot needs to be looked at under a microscope soon.", "Sign-off by a clinician", "name and signature",
        "S01 finding.p mel: 0.18; threshold.mel: 0.08", "model tiny aaaaaaaaaaaa", "knowledge base draft bbbbbbbbbbbb",
        "thresholds mel 0.08", "all patients",
    ):  # fmt: skip
        assert part in text, part


def test_a_bar_is_as_long_as_the_probability_and_marked_if_malignant() -> None:
    page = patient_page([a_pathway()])
    assert re.search(r'<tr class="malignant ">.*melanoma.*width:18\.0%', page)
    assert re.search(r'<tr class=" ">.*melanocytic nevus.*width:72\.0%', page)
    assert [bar.code for bar in bars(a_pathway())][:2] == ["nv", "mel"]


def test_a_picture_that_cannot_be_assessed_shows_no_class() -> None:
    pathway = a_blurred_pathway(probabilities={"mel": 0.9, "nv": 0.1}, conformal_set=["mel"], p_malignant=0.9)
    text = text_of(patient_page([pathway]))
    assert "Not assessable." in text
    assert "blurred" in text
    assert "melanoma" not in text
    assert "90 %" not in text


def test_unknown_people_and_lesions_say_so() -> None:
    text = text_of(patient_page([a_pathway()]))
    assert "Nothing is known of the person. Unknown never counts as no." in text
    assert "Nothing beside its pictures." in text


def test_the_most_urgent_lesion_comes_first() -> None:
    pathways = [a_pathway(lesion_id="A", urgency="U4"), a_pathway(lesion_id="B", urgency="U2")]
    page = patient_page(pathways)
    assert page.index("Lesion B") < page.index("Lesion A")
    assert page == patient_page(pathways[::-1])


def test_a_signature_replaces_the_box_and_the_banner_waits_for_all_lesions() -> None:
    text = text_of(patient_page([signed()]))
    assert "Edited by Dr Ada Byron 2026-03-02T08:00:00+00:00 · Mohs instead" in text
    assert "SIGNED." in text
    assert "PRELIMINARY" not in text
    assert "Sign-off by a clinician" not in text
    half = text_of(patient_page([signed(), a_blurred_pathway()]))
    assert "PRELIMINARY" in half
    assert "SIGNED." not in half


def test_a_rejected_pathway_says_so() -> None:
    sign_off = SignOff(by="Dr Ada Byron", at="2026-03-02T08:00:00+00:00", decision="rejected", reason="wrong lesion")
    text = text_of(patient_page([signed(status="rejected", sign_off=sign_off)]))
    assert "Lesion L1 rejected" in text
    assert "Rejected by Dr Ada Byron" in text


def test_nothing_that_was_entered_becomes_html_and_nothing_is_loaded_or_run() -> None:
    line = REFER.model_copy(update={"text": HOSTILE, "source": HOSTILE})
    pathway = signed(
        patient_id=HOSTILE, lesion_id=HOSTILE, notices=[line], follow_up=[line], patient_texts={HOSTILE: HOSTILE},
        quality_flags=[HOSTILE], trace=[{"rule": HOSTILE, "facts": {HOSTILE: HOSTILE}}],
        sign_off=SignOff(by=HOSTILE, at=HOSTILE, decision="edited", reason=HOSTILE),
    )  # fmt: skip
    for page in (patient_page([pathway]), index_page([pathway], "patients")):
        assert "script" not in _Balanced(page).tags
        assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(|@import""", page)
        assert "default-src 'none'" in page


def test_neighbouring_options_with_the_same_reason_say_it_once() -> None:
    options = a_pathway().options
    assert patient_page([a_pathway()]).count("offered because") == 1
    other = options[1].model_copy(update={"offered_by": [LABEL]})
    assert patient_page([a_pathway(options=[options[0], other, options[2]])]).count("offered because") == 3


def test_a_reason_is_said_in_full_once_and_by_its_rule_after_that() -> None:
    text = text_of(patient_page([a_pathway()]))
    assert text.count("Refer as urgent suspected cancer.") == 1
    assert "offered because: [S01, said above]" in text
    text = text_of(patient_page([a_pathway(urgency_rules=[]), a_pathway(lesion_id="L2", urgency_rules=[])]))
    assert text.count("offered because: Refer as urgent suspected cancer. [S01; NICE NG12 2015; V ]") == 2


def test_a_referral_that_urgency_overtakes_is_called_too_slow() -> None:
    slow = a_pathway().options[2].model_copy(update={"option": "refer_soon", "group": "referral", "title": "Soon"})
    assert "Soon too slow for this urgency" in text_of(patient_page([a_pathway(options=[slow])]))


def test_many_open_questions_are_all_there_and_most_folded() -> None:
    missing = [{"fact": f"patient.f{n}", "question": f"Question {n}?", "rules": ["K04"]} for n in range(30)]
    page = patient_page([a_pathway(missing=missing)])
    assert all(f"Question {n}?" in page for n in range(30))
    assert "and 22 more" in text_of(page)


def test_pages_of_several_people_are_refused() -> None:
    with pytest.raises(ValueError, match="unpack"):
        patient_page([a_pathway(), a_pathway(patient_id="P2")])


def test_the_index_is_sorted_by_urgency_and_then_by_probability_and_links_to_pages() -> None:
    pathways = [
        a_pathway(patient_id="low", urgency="U5", p_malignant=0.9),
        a_pathway(patient_id="likely", urgency="U1", p_malignant=0.8),
        a_pathway(patient_id="less", urgency="U1", p_malignant=0.3),
        a_blurred_pathway(patient_id="blurred", urgency="U1"),
        signed(patient_id="a/b", urgency="U2"),
    ]
    page = index_page(pathways, "patients")
    order = re.findall(r'<td><a href="([^"]*)">', page)
    assert [name.removeprefix("patients/") for name in order][:3] == ["blurred.html", "likely.html", "less.html"]
    assert order[-1] == "patients/low.html"
    assert order[3] == "patients/" + page_name("a/b").replace("%", "%25")
    text = text_of(page)
    assert "5 lesions of 5 patients." in text
    assert "4 of 5 lesions wait for the signature" in text
    assert "not assessable" in text


@pytest.mark.parametrize(("share", "text"), [(0.2, "<\u00a01\u00a0%"), (1.4, "1\u00a0%"), (99.7, ">\u00a099\u00a0%")])
def test_no_probability_is_shown_as_certain(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize("patient", ["a/b", "..", ".hidden", "x" * 300, "a\x00b", "CON:1", "é", "a%2Fb"])
def test_a_file_name_stays_in_its_folder_and_is_its_own(patient: str) -> None:
    name = file_name(patient, ".html")
    assert "/" not in name
    assert "\x00" not in name
    assert not name.startswith(".")
    assert len(name.encode()) < 200
    others = {file_name(p, ".html") for p in ("a/b", "a%2Fb", "..", "%2E%2E", "a", "A" * 300, "A" * 301)}
    assert len(others) == 7
    assert file_name("P-1_2", ".html") == "P-1_2.html"
