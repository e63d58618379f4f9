"""Roles as data sets write them: read where they have one meaning, refused with the nearest one elsewhere."""

import pytest

from trainer.data.rows.message.role import ReadRole, find_role, suggest_role

READ = {
    "user": ReadRole(role="user"),
    "gpt": ReadRole(role="assistant"),
    "observation": ReadRole(role="tool"),
    "function_call": ReadRole(role="assistant", is_call=True),
    "User": ReadRole(role="user", adjustment="role 'User' read as user"),
    "ASSISTANT": ReadRole(role="assistant", adjustment="role 'ASSISTANT' read as assistant"),
    "Function_Call": ReadRole(role="assistant", is_call=True, adjustment="role 'Function_Call' read as function_call"),
    "bot": ReadRole(role="assistant", adjustment="role 'bot' read as assistant"),
    "model": ReadRole(role="assistant", adjustment="role 'model' read as assistant"),
    "ChatGPT": ReadRole(role="assistant", adjustment="role 'ChatGPT' read as assistant"),
    "developer": ReadRole(role="system", adjustment="role 'developer' read as system"),
}


@pytest.mark.parametrize("name", READ)
def test_a_role_with_one_meaning(name: str) -> None:
    assert find_role(name) == READ[name]


@pytest.mark.parametrize("name", ["agent", "customer", "", None, 1, ["user"]])
def test_a_role_without_one_meaning(name: object) -> None:
    assert find_role(name) is None
    assert "valid roles: system, user" in suggest_role(name)


def test_the_nearest_role_is_suggested() -> None:
    assert suggest_role("asistant").startswith("did you mean 'assistant'? ")
    assert suggest_role("observations").startswith("did you mean 'observation'? ")
