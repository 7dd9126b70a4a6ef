"""What is let in, and how a refusal reads."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from pydantic import BaseModel
from serve_parts import LESION, PATIENT, a_finding

from serve.bodies import parse
from serve.errors import Refused
from serve.routes_inference import ids_of
from serve.schemas import AssessRequest, CaseUpdate, ClassifyRequest, RecommendRequest

DATA = base64.b64encode(b"\xff\xd8").decode()


async def read(model: type[BaseModel], content: Any) -> Any:
    return await parse(content if isinstance(content, bytes) else json.dumps(content).encode(), model)


def refused(model: type[BaseModel], content: Any) -> Refused:
    import asyncio

    with pytest.raises(Refused) as caught:
        asyncio.run(read(model, content))
    return caught.value


def case(**patient: Any) -> dict[str, Any]:
    return {"cases": [{"patient": PATIENT | patient, "lesion": LESION, "findings": [a_finding()]}]}


def test_a_case_is_read_as_it_was_written() -> None:
    import asyncio

    [found] = asyncio.run(read(RecommendRequest, case(age=31, allergies=["peanut", "soya"]))).cases
    assert found.patient.age == 31.0
    assert found.patient.allergies == ("peanut", "soya")
    assert found.findings[0].prediction == "nv"


@pytest.mark.parametrize(
    "wrong",
    [{"age": float("nan")}, {"age": float("inf")}, {"age": -1}, {"age": 121}, {"age": True}, {"age": "61"},
     {"sex": "f"}, {"fitzpatrick": 2.5}, {"patient_id": ""}, {"patient_id": "x" * 201}, {"patient_id": "a\nb"},
     {"nickname": "Bob"}, {"allergies": "peanut"}, {"inr": 1e999}],
)  # fmt: skip
def test_a_person_that_cannot_be_is_422(wrong: dict[str, Any]) -> None:
    assert refused(RecommendRequest, case(**wrong)).status == 422


def test_a_refusal_names_the_place_and_not_what_was_sent() -> None:
    error = refused(RecommendRequest, case(sex="Josephine Baker", unheard_of="secret"))
    assert error.status == 422
    assert "cases.0.patient.sex" in error.message
    assert "Josephine" not in error.message
    assert "unheard_of" not in error.message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"cases": [' * 5000, b'"\\ud800"', b"nul"])
def test_no_json_is_400(body: bytes) -> None:
    assert refused(RecommendRequest, body).status in (400, 422)
    assert refused(RecommendRequest, b"{").code == "not_json"


@pytest.mark.parametrize(
    "changes",
    [{"p_nv": 0.1}, {"p_nv": None}, {"p_mel": 1.5}, {"prediction": "cancer"}, {"prediction": None},
     {"conformal_set": None}, {"lesion_id": "L2"}, {"conformal_set": ["nv"] * 8}],
)  # fmt: skip
def test_a_finding_that_cannot_be_is_422(changes: dict[str, Any]) -> None:
    content = case()
    content["cases"][0]["findings"][0] |= changes
    assert refused(RecommendRequest, content).status == 422


def test_one_image_once_one_model_and_plain_base64() -> None:
    twice = {"images": [{"image_id": "a", "data": DATA}, {"image_id": "a", "data": DATA}]}
    assert refused(ClassifyRequest, twice).status == 422
    assess = {"cases": [{"patient": PATIENT, "lesion": LESION, "images": twice["images"]}]}
    assert refused(AssessRequest, assess).status == 422
    for data in ("no base64!", "====", 7, None, ["x"], "é"):
        assert refused(ClassifyRequest, {"images": [{"image_id": "a", "data": data}]}).status == 422
    content = case()
    content["cases"][0]["findings"].append(a_finding("I2", model_sha256="b" * 64))
    assert refused(RecommendRequest, content).status == 422


def test_bounds_hold_for_lists() -> None:
    assert refused(ClassifyRequest, {"images": []}).status == 422
    assert refused(RecommendRequest, {"cases": []}).status == 422
    many = {"images": [{"image_id": str(i), "data": ""} for i in range(1001)]}
    assert refused(ClassifyRequest, many).status == 422
    assert refused(CaseUpdate, {"patient": PATIENT}).status == 422


def test_ids_come_from_file_names_each_once() -> None:
    assert ids_of(["a.jpg", "b.c.png", "x/y/z.jpg", "c:\\d\\e.jpg", ""]) == ["a", "b.c", "z", "e", "image"]
    assert ids_of(["a.jpg", "a.png", "a"]) == ["a", "a-2", "a-3"]
    assert len(set(ids_of(["a", "a", "a-2"]))) == 3
    assert ids_of(["<b>&'\";--\x00\n.jpg"]) == ["<b>&'\";--"]
