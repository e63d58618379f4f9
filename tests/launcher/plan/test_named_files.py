"""Files that a plan names: looked at where they are on this machine, and named where only the nodes can have them."""

from pathlib import Path

import pytest

from launcher.commands.plan import plan_here, plan_of

INFER = ("model=qwen2_5_vl_7b", "hardware=cpu", "precision=bf16", "stage=infer")
NODES = ("cluster=example", "cluster.delivery.accept_licence=true")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("stage.inference.image=no.png",), "stage.inference.image: there is no file {here}/no.png"),
        (("stage.inference.image=a/no.png",), "stage.inference.image: there is no file {here}/a/no.png, and no folder {here}/a"),
        (("stage.inference.image=.",), "stage.inference.image: {here} is a folder: name one image"),
        (("stage.inference.image=empty.png",), "stage.inference.image: {here}/empty.png is empty"),
        (("stage.inference.image=here.png",), ""),
    ],
)
def test_a_question_that_is_not_here_is_refused(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "here.png").write_bytes(b"x")
    plan, _ = plan_here((*INFER, "stage.inference.prompt=x", *words), "R")
    found = [f"{problem.key}: {problem.what}" for problem in plan.verdict.problems if problem.key.startswith("stage.inference")]
    assert found == ([said.format(here=tmp_path)] if said else [])


def test_questions_with_a_name_nearly_right(tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("{}")
    plan, _ = plan_here((*INFER, "stage.inference.input=question.jsonl"), "R")
    assert any("did you mean 'questions.jsonl'?" in problem.what for problem in plan.verdict.problems)


def test_what_only_the_nodes_can_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text("[]")
    words = ("model=qwen2_5_vl_7b", "hardware=h200", "stage=lora", "model.source.path=/models/q", "data=files", "data.train=/d/t.json")
    notes = plan_of((*words, "data.evaluation=held.json", *NODES), "R").verdict.notes
    (note,) = (note for note in notes if note.startswith("not on this machine"))
    assert "model.source.path=/models/q, data.train=/d/t.json. The nodes must have it" in note and "held.json" not in note
    assert not any("not on this machine" in note for note in plan_of(words, "R").verdict.notes), "of a local run it is a problem"


def test_a_set_of_its_own_is_no_file(tmp_path: Path) -> None:
    assert not any("not on this machine" in note for note in plan_of(("hardware=cpu", *NODES), "R").verdict.notes)
