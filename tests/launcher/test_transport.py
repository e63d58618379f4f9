"""Commands reach a machine as they are, and come back whole."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import NodeFailed
from launcher.transport import Local

LOCAL = Local({"PATH": "/usr/bin:/bin", "SECRET_OF_MY_SHELL": "x", "HOME": "/nowhere"})
TEXT = st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)


@settings(max_examples=25, deadline=None)
@given(words=st.lists(TEXT, max_size=4))
def test_arguments_arrive_byte_equal(words: list[str]) -> None:
    code = "import sys; sys.stdout.buffer.write('\\0'.join(sys.argv[1:]).encode())"
    result = LOCAL.run((sys.executable, "-X", "utf8", "-c", code, *words))
    assert result.output.split("\0") == (words or [""]) or "\r" in "".join(words)


def test_only_kept_variables_pass() -> None:
    output = LOCAL.run((sys.executable, "-c", "import os; print(sorted(os.environ))"), environment={"OURS": "1"}).output
    assert "SECRET_OF_MY_SHELL" not in output and "'HOME'" in output and "'OURS'" in output


def test_a_code_is_a_result_and_expect_raises() -> None:
    result = LOCAL.run((sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"))
    assert result.code == 3
    with pytest.raises(NodeFailed, match=r"probing failed with exit code 3(.|\n)*why"):
        result.expect("probing")


def test_timeout_and_missing_program_say_so(tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match=r"no answer within 0\.2 s"):
        LOCAL.run((sys.executable, "-c", "import time; time.sleep(9)"), timeout_s=0.2)
    with pytest.raises(NodeFailed, match="'no-such-program' was not found"):
        LOCAL.run(("no-such-program",))
    with pytest.raises(NodeFailed, match="'no-such-program' was not found"):
        LOCAL.start(("no-such-program",), log=tmp_path / "log")
