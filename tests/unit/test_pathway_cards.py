"""CDS Hooks cards: short, cited, never a label alone, never an order."""

from __future__ import annotations

import json

import pytest
from fhir.resources.R4B.servicerequest import ServiceRequest
from hypothesis import given
from hypothesis import strategies as st
from sample_pathways import a_blurred_pathway, a_pathway

from dermaflow.pathways.outputs.cards import OVERRIDE_REASONS, cards, discovery
from dermaflow.schemas.pathway import SignOff


@pytest.mark.parametrize(
    ("urgency", "indicator"),
    [("U1", "critical"), ("U2", "warning"), ("U3", "warning"), ("U4", "info"), ("U5", "info")],
)
def test_the_indicator_follows_the_urgency(urgency: str, indicator: str) -> None:
    card = cards([a_pathway(urgency=urgency)])[0]
    assert card.indicator == indicator
    assert card.summary.startswith(f"PRELIMINARY: {urgency} ")
    assert len(card.overrideReasons or []) == len(OVERRIDE_REASONS)


@given(lesion=st.text(min_size=1, max_size=400), urgency=st.sampled_from(["U1", "U2", "U3", "U4", "U5"]))
def test_the_summary_is_always_shorter_than_140_characters(lesion: str, urgency: str) -> None:
    for card in cards([a_pathway(lesion_id=lesion, urgency=urgency)]):
        assert 0 < len(card.summary) < 140


def test_many_restricted_options_do_not_make_the_summary_too_long() -> None:
    pathway = a_pathway()
    blocked = [o.model_copy(update={"title": f"Option {n} with a long title", "status": "blocked"})
               for n, o in enumerate(pathway.options * 10)]  # fmt: skip
    restrictions = cards([a_pathway(options=blocked)])[1]
    assert len(restrictions.summary) < 140
    assert restrictions.detail.count("Blocked in pregnancy. [C02; Efudex PI; V]") == 20


def test_the_detail_shows_probabilities_set_quality_options_and_sources_together() -> None:
    detail = cards([a_pathway(quality_flags=["occlusion"])])[0].detail
    for part in (
        "nv 72 %, mel 18 %", "Conformal set: mel, nv", "occlusion", "1. Excision biopsy (available; S01)",
        "3. Fluorouracil cream (blocked; S01)", "What is the skin type? (K04)", "[G01; NICE HTE24 2025; V]",
        "[F06; Metvix SmPC; P]", "Model tiny aaaaaaaaaaaa",
    ):  # fmt: skip
        assert part in detail, part


def test_a_picture_that_cannot_be_assessed_shows_no_class() -> None:
    detail = cards([a_blurred_pathway()])[0].detail
    assert "Not assessable" in detail
    assert "Conformal set" not in detail


def test_blocked_and_locked_options_get_a_card_with_the_reason() -> None:
    main, restrictions = cards([a_pathway()])
    assert restrictions.indicator == "warning"
    assert "Cryotherapy, Fluorouracil cream" in restrictions.summary
    assert "Confirm first: lesion.pigmented" in restrictions.detail
    assert main.uuid != restrictions.uuid
    assert len(cards([a_pathway(options=[])])) == 1


def test_a_referral_that_urgency_overtakes_is_no_contraindication() -> None:
    slow = a_pathway().options[2].model_copy(update={"option": "refer_soon", "group": "referral"})
    assert len(cards([a_pathway(options=[slow])])) == 1


def test_the_suggestion_creates_a_proposal_that_is_valid_fhir() -> None:
    card = cards([a_pathway()], patient="Patient/123")[0]
    assert card.selectionBehavior == "at-most-one"
    [suggestion] = card.suggestions or []
    [action] = suggestion.actions
    request = ServiceRequest.model_validate(action.resource)
    assert (request.intent, request.status, request.subject.reference) == ("proposal", "draft", "Patient/123")
    by_id = (cards([a_pathway()])[0].suggestions or [])[0].actions[0].resource
    assert by_id["subject"]["identifier"]["value"] == "P1"


@pytest.mark.parametrize("urgency", ["U4", "U5"])
def test_low_urgency_suggests_no_referral(urgency: str) -> None:
    assert cards([a_pathway(urgency=urgency)])[0].suggestions is None


def test_what_is_signed_suggests_nothing_more() -> None:
    sign_off = SignOff(by="Dr Ada Byron", at="2026-03-02T08:00:00+00:00", decision="accepted")
    card = cards([a_pathway(status="final", sign_off=sign_off)])[0]
    assert card.suggestions is None
    assert card.summary.startswith("FINAL")


def test_most_urgent_lesion_first_and_the_same_cards_every_time() -> None:
    pathways = [a_pathway(lesion_id="A", urgency="U4"), a_pathway(lesion_id="B", urgency="U1")]
    first = cards(pathways)
    assert [card.indicator for card in first if card.overrideReasons] == ["critical", "info"]
    assert first == cards(reversed(pathways))


def test_over_the_wire_there_are_no_empty_fields() -> None:
    content = json.dumps({"cards": [card.model_dump(exclude_none=True) for card in cards([a_pathway()])]})
    assert "null" not in content


def test_the_discovery_document_lists_one_service_a_hook() -> None:
    services = discovery()["services"]
    assert [service["hook"] for service in services] == ["patient-view", "order-select", "order-sign"]
    assert len({service["id"] for service in services}) == 3
    assert all("{{context.patientId}}" in query for service in services for query in service["prefetch"].values())
