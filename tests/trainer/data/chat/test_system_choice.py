import pytest

from trainer.data.chat.system_choice import LEFT_OUT, choose_system, with_system
from trainer.data.rows.sample import Message, Sample

OWN = Message(role="system", content="Own.")
TURNS = (Message(role="user", content="Hi"), Message(role="assistant", content="Yes"))
NONE = Message(role="system", content="")
TEXT = Message(role="system", content="Be brief.")


@pytest.mark.parametrize(
    ("rule", "with_own", "without"),
    [("row", OWN, None), ("default", None, None), ("none", NONE, NONE), ("Be brief.", TEXT, TEXT)],
)
def test_the_system_message_of_a_row(rule: str, with_own: Message | None, without: Message | None) -> None:
    for messages, wanted in (((OWN, *TURNS), with_own), (TURNS, without)):
        sample = Sample(id="1", images=(), messages=messages, file="rows.json", row=1, adjustments=("x",))
        chosen = choose_system(sample, rule)
        assert chosen.messages == ((wanted, *TURNS) if wanted else TURNS)
        assert chosen.adjustments == (("x", LEFT_OUT) if messages[0] == OWN and wanted != OWN else ("x",))
        assert choose_system(chosen, rule).messages == chosen.messages


@pytest.mark.parametrize(("rule", "first"), [("row", TURNS[0]), ("default", TURNS[0]), ("none", NONE), ("Be brief.", TEXT)])
def test_a_question_s_own_system_message_comes_first(rule: str, first: Message) -> None:
    assert with_system((OWN, TURNS[0]), rule) == (OWN, TURNS[0])
    assert with_system((TURNS[0],), rule)[0] == first
