"""Loading a knowledge base, the errors of a wrong one, and what lint finds beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_knowledge import RULES, UTILITIES, rule, write
from typer.testing import CliRunner

from dermaflow.cli.console import console
from dermaflow.cli.pathways import app
from dermaflow.errors import KnowledgeError
from dermaflow.pathways.knowledge import load_knowledge
from dermaflow.pathways.lint import lint
from dermaflow.schemas.patient import Lesion, Patient


def test_a_knowledge_base_is_read_in_the_order_of_the_decision(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "gates.yaml").write_text(yaml.safe_dump([rule("G09", "always", {})]))
    knowledge = load_knowledge(tmp_path)
    assert [r.id for r in knowledge.rules] == ["G09", *RULES]
    assert knowledge.files["G09"] == "gates.yaml" and knowledge.files["S01"] == "rules.yaml"
    assert knowledge.members(["topical", "reassure"]) == ["fluorouracil", "imiquimod", "reassure"]
    assert knowledge.version == f"{len(RULES) + 1} rules, draft, 0 reviewed"


def test_the_hash_is_that_of_the_content(tmp_path: Path) -> None:
    one, same = load_knowledge(write(tmp_path / "a")), load_knowledge(write(tmp_path / "b"))
    other = load_knowledge(write(tmp_path / "c", S01=("finding.p_mel > threshold.mel", {})))
    assert one.sha256 == same.sha256 != other.sha256


def test_a_site_brings_its_own_utilities(tmp_path: Path) -> None:
    own = tmp_path / "site.yaml"
    own.write_text(yaml.safe_dump(UTILITIES | {"source": "our clinic"}))
    knowledge = load_knowledge(write(tmp_path / "kb"), own)
    assert knowledge.utilities and knowledge.utilities.source == "our clinic"
    assert knowledge.sha256 != load_knowledge(tmp_path / "kb").sha256


@pytest.mark.parametrize(
    ("changes", "where", "said"),
    [
        ({"X01": ("lesion.sight == face", {})}, "rule X01", "did you mean lesion.site"),
        ({"X01": ("fired(Z99)", {})}, "rule X01", "there is no rule Z99"),
        ({"X01": ("fired(X02)", {}), "X02": ("not fired(X01)", {})}, "rule X01", "X01 -> X02 -> X01"),
        ({"X01": ("fired(X01)", {})}, "rule X01", "X01 -> X01"),
        ({"X01": ("always", {"offer": ["fluorouracile"]})}, "rule X01", "did you mean fluorouracil?"),
        ({"X01": ("always", {"block": ["creams"]})}, "rule X01", "unknown option or group 'creams'"),
        ({"X01": ("always", {"text": ["T-nev"]})}, "rule X01", "unknown text 'T-nev'"),
        ({"X01": ("always", {"ofer": ["reassure"]})}, "rule X01", "did you mean offer?"),
        ({"X01": rule("X01", "always", {}, wen="always")}, "rule X01", "wen"),
        ({"X01": ("always", {"urgency": "U6"})}, "rule X01", "effect.urgency"),
        ({"X01": ("always", {"urgency": "U5"})}, "rule X01", "needs reassure: true"),
        ({"X01": ("always", {"reassure": True, "urgency": "U2"})}, "rule X01", "contradicts urgency U2"),
        ({"X01": rule("X01", "always", {"reassure": True}, if_unknown="hold")}, "rule X01", "has to be known"),
        ({"X01": rule("X01", "always", {}, verification="Q")}, "rule X01", "verification"),
        ({"X01": ("always", {"urgency_when": [{"when": "lesion.nu", "urgency": "U1"}]})}, "rule X01", "lesion.nu"),
        ({"X1": ("always", {})}, "rule X1", "id"),
    ],
)
def test_a_wrong_rule_is_named_with_its_file_and_what_to_do(
    tmp_path: Path, changes: dict[str, Any], where: str, said: str
) -> None:
    with pytest.raises(KnowledgeError) as caught:
        load_knowledge(write(tmp_path, **changes))
    assert f"rules.yaml: {where}" in str(caught.value)
    assert said.lower() in str(caught.value).lower()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("texts.yaml", "T-nv: a\nT-nv: b\nT-bcc: c\n", "'T-nv' is given twice"),
        ("options.yaml", "- {id: a, title: A, group: cream}\n", "group"),
        ("options.yaml", "id: a\n", "expected a list"),
        ("rules.yaml", "- id: [\n", "no YAML"),
        ("rules.yaml", "- just text\n", "rule number 1"),
        ("utilities.yaml", yaml.safe_dump(UTILITIES | {"rule": "Z01"}), "there is no rule Z01"),
        ("utilities.yaml", "rule: S12\nactions: [{id: a, title: A, utility: [1]}]\n", "one a diagnosis"),
        ("second.yaml", yaml.safe_dump([rule("S01", "always", {})]), "its id is taken in rules.yaml"),
        ("texts.yaml", "T-nv: !!python/object/apply:os.getcwd []\n", "no YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_text(text)
    assert any(p.where.startswith(name) and said in f"{p.where} {p.message}" for p in lint(tmp_path).errors)


def test_a_folder_without_rules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="no rules here"):
        load_knowledge(tmp_path)


def test_all_problems_are_counted_in_the_first(tmp_path: Path) -> None:
    write(tmp_path, X01=("lesion.nu", {}), X02=("always", {"offer": ["nothing"]}))
    with pytest.raises(KnowledgeError, match="lists all 2 problems"):
        load_knowledge(tmp_path)


def found(folder: Path, level: str, **rules: Any) -> list[str]:
    return [f"{p.where} {p.message}" for p in lint(write(folder, **rules)).problems if p.level == level]


def test_a_sound_knowledge_base_has_no_errors(tmp_path: Path) -> None:
    assert found(tmp_path, "error") == []


@pytest.mark.parametrize(
    "when",
    [
        "lesion.new and not lesion.new",
        "patient.age < 18 and patient.age >= 40",
        "case.zone == H and lesion.site == back",
        "case.confirmed and mel in finding.set",
    ],
)
def test_lint_finds_a_rule_that_cannot_hold(tmp_path: Path, when: str) -> None:
    assert any("rule X01 no case was found" in line for line in found(tmp_path, "error", X01=(when, {})))


def test_lint_finds_a_part_of_a_rule_that_cannot_hold(tmp_path: Path) -> None:
    effect = {"urgency_when": [{"when": "not lesion.new", "urgency": "U1"}, {"when": "lesion.new", "urgency": "U2"}]}
    assert any("X01 no case was found for its part" in x for x in found(tmp_path, "error", X01=("lesion.new", effect)))


def test_lint_finds_equal_conditions_that_offer_and_block(tmp_path: Path) -> None:
    rules = {
        "X01": ("lesion.new and lesion.firm", {"offer": ["cryotherapy"]}),
        "X02": ("lesion.new  and (lesion.firm)", {"block": ["destructive"], "urgency": "U2"}),
        "X03": ("lesion.new and lesion.firm", {"reassure": True}),
    }
    lines = found(tmp_path, "error", **rules)
    assert any("rule X01 offers what X02 blocks" in line for line in lines)
    assert any("rule X03 reassures where X02" in line for line in lines)


def test_lint_finds_an_offer_that_is_always_blocked(tmp_path: Path) -> None:
    rules = {
        "X01": ("lesion.new and lesion.firm", {"offer": ["cryotherapy"]}),
        "X02": ("lesion.new", {"block": ["destructive"]}),
    }
    lines = found(tmp_path, "warning", **rules)
    assert any("X01 offers cryotherapy, which X02 seems to block always" in line for line in lines)
    assert not any("B05 offers" in line for line in lines)  # blocked in some cases only


def test_lint_finds_missing_sources_and_odd_reviews(tmp_path: Path) -> None:
    rules = {
        "X01": rule("X01", "always", {}, source="-"),
        "X02": rule("X02", "always", {}, reviewed_by="Dr A"),
        "X03": rule("X03", "always", {}, reviewed_by="Dr A", review_date="2999-01-01"),
    }
    write(tmp_path, **rules)
    report = lint(tmp_path)
    said = {f"{p.where} {p.message}" for p in report.problems}
    assert "rules.yaml: rule X01 has no source" in said
    assert "rules.yaml: rule X02 reviewed_by and review_date belong together" in said
    assert any("X03 review_date 2999-01-01 lies in the future" in line for line in said)
    assert "X02" not in report.unreviewed and "X01" in report.unreviewed


def test_lint_finds_what_nobody_uses_and_words_that_no_patient_must_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "texts.yaml").write_text("T-nv: This is benign.\nT-bcc: Think.\nT-old: Unused.\n")
    options = yaml.safe_load((tmp_path / "options.yaml").read_text())
    (tmp_path / "options.yaml").write_text(
        yaml.safe_dump([*options, {"id": "leech", "title": "L", "group": "topical"}])
    )
    said = [problem.message for problem in lint(tmp_path).problems]
    assert "T-nv: says 'benign', which rule X02 forbids" in said
    assert "no rule uses T-old" in said and "no rule offers leech" in said


def test_the_knowledge_base_of_dermaflow_has_no_errors() -> None:
    report = lint()
    assert report.errors == []
    assert report.rules == 149


def test_the_commands_say_what_they_found(tmp_path: Path) -> None:
    runner = CliRunner()
    good = runner.invoke(app, ["lint", "--knowledge", str(write(tmp_path / "good"))])
    assert good.exit_code == 0 and "0 errors" in good.output and f"0 of {len(RULES)} reviewed" in good.output
    bad = runner.invoke(app, ["lint", "--knowledge", str(write(tmp_path / "bad", X01=("lesion.nu", {})))])
    assert bad.exit_code == 1 and "1 errors" in bad.output
    shown = runner.invoke(app, ["show", "C10", "--knowledge", str(tmp_path / "good")])
    assert shown.exit_code == 0 and "any(patient.pregnant, patient.immunosuppressed)" in shown.output
    assert "not reviewed" in shown.output
    unknown = runner.invoke(app, ["show", "C11", "--knowledge", str(tmp_path / "good")])
    assert unknown.exit_code == 1


def test_fields_names_every_column_that_the_intake_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 300)
    said = CliRunner().invoke(app, ["fields"])
    shown = {line.split("│")[1].strip() for line in said.output.splitlines() if line.startswith("│")} - {
        ""
    }  # long cells go on
    assert shown == {*Patient.model_fields, *Lesion.model_fields}
