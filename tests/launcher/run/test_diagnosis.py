"""Known failures: which one a real log shows, which of many lines is the cause, and what each row of the tables must have."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest

from launcher.cli import parse
from launcher.config.schema import Config
from launcher.plan.plan import Plan
from launcher.record.record import NodeResult
from launcher.run.diagnosis import describe_symptoms, explain_log, root_rank
from launcher.run.failure_search import find_failure
from launcher.run.failures.symptom import KINDS, TABLES, load_symptoms
from launcher.run.launch import advice
from trainer import contract
from trainer.contract import SCHEMA, FailureReport

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "log"
ROWS = re.findall(r"^\| ([\w-]+) \| ([\w-]+) \| (\d+) \| (.+) \|$", (GOLDEN / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
TABLE_FILE = "docs/errors.md"
SYMPTOMS = load_symptoms()
BY_NAME = {symptom.name: symptom for symptom in SYMPTOMS}


def recorded(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------- logs


def test_every_recorded_log_has_a_row_with_its_source() -> None:
    assert {row[0] for row in ROWS} == {path.stem for path in GOLDEN.glob("*.txt")}
    assert len(ROWS) == len({row[0] for row in ROWS}) >= 70


@pytest.mark.parametrize(("name", "known", "code"), [row[:3] for row in ROWS], ids=[row[0] for row in ROWS])
def test_which_failure_a_recorded_log_shows(name: str, known: str, code: str) -> None:
    meaning = explain_log(recorded(name), int(code))
    assert meaning is not None and meaning.name == known
    assert meaning.line == "" if name == "killed-silently" else meaning.line in recorded(name)


@pytest.mark.parametrize("text", [
    "",
    "step 12/300  loss 0.91  lr 0.0002\nsaved checkpoints/step-000012\n",
    "RuntimeError: shape mismatch: value tensor of shape [4] cannot be broadcast\n",
    "[W socket.cpp:663] [c10d] The client socket has failed to connect to [host]:29500 (errno: 111 - Connection refused).\n",  # it tries again
    "W1121 07:57:36 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 25353 closing signal SIGTERM\n",
    "the answer was 'Permission denied' and the bus was late\n",
])  # fmt: skip
def test_text_that_is_not_a_known_failure(text: str) -> None:
    assert explain_log(text, 1) is None


def test_a_cause_is_preferred_to_its_consequences_in_any_order() -> None:
    after = recorded("nccl-watchdog") + recorded("store-closed") + recorded("cuda-memory")
    assert explain_log(after, 1).name == "cuda-out-of-memory"  # type: ignore[union-attr]
    two = recorded("disk-safetensors") + recorded("cuda-memory")
    assert explain_log(two, 1).name == "disk-full"  # type: ignore[union-attr]


def test_fifteen_timeouts_are_reported_once() -> None:
    meaning = explain_log(recorded("nccl-watchdog") * 15, 1)
    assert meaning is not None and meaning.kind == "consequence" and meaning.line.count("Watchdog caught") == 1


def test_an_exit_code_is_used_when_the_log_names_no_cause() -> None:
    assert explain_log("step 3\n", 137).name == explain_log("step 3\n", -9).name == "host-memory-killed"  # type: ignore[union-attr]
    assert explain_log(recorded("gloo-closed"), 137).name == "host-memory-killed"  # type: ignore[union-attr]
    assert explain_log(recorded("cuda-memory"), 137).name == "cuda-out-of-memory"  # type: ignore[union-attr]


def test_a_rank_that_torchrun_ended_is_not_the_cause() -> None:
    """The others are sent SIGTERM and, 30 s later, SIGKILL."""
    text = recorded("rank-killed").replace("exitcode  : -15 (pid: 25353)  (SIGTERM)", "exitcode  : -9 (pid: 25353)  (SIGKILL)")
    text = text.replace("failed (exitcode: -9)", "failed (exitcode: 1)").replace("-9 (pid: 25354)  (SIGKILL)", "1 (pid: 25354)")
    assert explain_log(text, 1).name == "rank-failed"  # type: ignore[union-attr]
    assert root_rank(text) == (1, 1)
    assert root_rank(recorded("rank-killed")) == (1, -9)
    assert root_rank("nothing") is None


# --------------------------------------------------------------------------------------------------------------- table


def test_every_row_is_complete() -> None:
    assert len(BY_NAME) == len(SYMPTOMS) >= 85
    for symptom in SYMPTOMS:
        assert symptom.means.endswith(".") and len(symptom.means) < 300, symptom.name
        assert symptom.fix and symptom.source and symptom.kind in KINDS, symptom.name
        assert re.search(symptom.pattern, symptom.example, re.MULTILINE), symptom.name


def test_every_file_of_the_folder_is_a_table() -> None:
    assert {path.stem for path in (ROOT / "launcher/run/failures").glob("*.yaml")} == set(TABLES)


def test_the_tables_are_read_only_when_a_log_is_explained() -> None:
    code = "import sys, launcher.run.diagnosis as d; print('yaml' in sys.modules); d.explain_log('x'); print('yaml' in sys.modules)"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_row_for_a_signal_matches_torchruns_line_and_the_exit_codes() -> None:
    killed = BY_NAME["host-memory-killed"]
    assert killed.codes == (137, -9) and re.search(killed.pattern, "failed (exitcode: -9) local_rank: 0")


def test_every_code_of_hccl_and_hccp_has_a_meaning_of_its_own() -> None:
    codes = [f"EI{number:04}" for number in (*range(1, 9), *range(10, 18), 19, 20)] + [f"EJ{number:04}" for number in range(1, 5)]
    for code in codes:
        plain, titled = explain_log(f"{code}: [PID: 1] 2025-01-01-00:00:00.000.000 tls"), explain_log(f"Some_Title({code}): tls")
        assert plain is not None and titled is not None, code
        assert plain.name == titled.name and plain.kind in ("cause", "consequence"), code


def test_every_key_that_a_fix_names_is_in_the_config() -> None:
    named = {
        (symptom.name, key)
        for symptom in SYMPTOMS
        for key in re.findall(rf"\b((?:{'|'.join(get_type_hints(Config))})(?:\.\w+)+)", symptom.fix)
    }
    assert len(named) > 40
    for name, key in named:
        where: object = Config
        for part in key.split("."):
            if not is_dataclass(where):
                break  # below a dict, every name goes
            assert part in {field.name for field in fields(where)}, f"{name}: {key}"
            where = get_type_hints(where)[part]


def test_every_command_that_a_fix_names_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    commands = {command for symptom in SYMPTOMS for command in re.findall(r"omnilaunch ((?:image )?[a-z]+)", symptom.fix)}
    assert {"doctor", "plan", "image build"} <= commands
    for command in sorted(commands):
        with pytest.raises(SystemExit) as ended:
            parse([*shlex.split(command), "--help"])
        assert ended.value.code == 0, command
    capsys.readouterr()


def test_the_page_is_written_from_the_tables() -> None:
    drawn = describe_symptoms()
    assert (ROOT / TABLE_FILE).read_text(encoding="utf-8") == drawn, f"python -m launcher.run.diagnosis > {TABLE_FILE}"
    assert drawn.count("\n### ") == len(SYMPTOMS)


# ------------------------------------------------------------------------------------------------------- which node it was


HOSTS = ("192.0.2.11", "192.0.2.12")


@pytest.fixture
def plan(plan_for: Callable[..., Plan], tmp_path: Path) -> Plan:
    """Two nodes with one rank each, whose logs are here."""
    made = replace(plan_for("cluster=example", "cluster.devices_per_node=1"), folder=str(tmp_path))
    (Path(made.folder) / "logs").mkdir(parents=True)
    return made


def log(plan: Plan, rank: int, text: str) -> None:
    (Path(plan.folder) / "logs" / f"node{rank}.log").write_text(text, encoding="utf-8")


def report(plan: Plan, rank: int, unix_s: float, message: str, code: int = 1) -> None:
    said = FailureReport(
        schema=SCHEMA, rank=rank, hostname="h", unix_s=unix_s, code=code, kind="RuntimeError", message=message, traceback=message
    )
    contract.write(said, Path(plan.folder) / contract.FAILURE_FILES.format(rank=rank))


def ended(rank: int, code: int, seconds: float, *, killed: bool = False, lost: bool = False) -> NodeResult:
    return NodeResult(host=HOSTS[rank], node_rank=rank, code=code, seconds=seconds, killed=killed, lost=lost)


def test_the_node_with_the_cause_is_named_and_not_the_one_that_failed_because_of_it(plan: Plan) -> None:
    log(plan, 0, recorded("peer-killed"))
    log(plan, 1, recorded("rank-killed"))
    report(plan, 0, 1.0, recorded("gloo-closed"))
    failure = find_failure(plan, (ended(0, 1, 5.0), ended(1, 1, 5.2)))
    assert failure is not None and failure.host == HOSTS[1] and failure.log.endswith("node1.log")
    assert failure.message == "rank 1 ended with exit code -9 and left no report"
    assert failure.meaning == BY_NAME["host-memory-killed"].means and "dmesg" in failure.fix
    assert advice(failure).split("\n") == ["", f"  meaning: {failure.meaning}", f"  do: {failure.fix}"]


def test_the_first_report_that_is_not_a_consequence_is_the_cause(plan: Plan) -> None:
    report(plan, 0, 1.0, recorded("gloo-closed"))
    report(plan, 1, 2.0, recorded("cuda-memory"))
    failure = find_failure(plan, ())
    assert failure is not None and failure.rank == 1 and failure.meaning == BY_NAME["cuda-out-of-memory"].means


def test_an_unknown_error_is_not_explained(plan: Plan) -> None:
    report(plan, 0, 1.0, "ValueError: the sampler returned a batch of 0")
    report(plan, 1, 2.0, recorded("cuda-memory"))
    failure = find_failure(plan, (ended(0, 1, 5.0), ended(1, 1, 5.0)))
    assert failure is not None and failure.rank == 0 and failure.meaning == failure.fix == "" and advice(failure) == ""


def test_an_error_that_names_only_a_layer_is_looked_up_in_the_log(plan: Plan) -> None:
    log(plan, 0, recorded("nccl-shm-old") + "\n".join(f"line {number}" for number in range(40)))
    report(plan, 0, 1.0, "ncclSystemError: System call (e.g. socket, malloc) or external library call failed")
    failure = find_failure(plan, ())
    assert failure is not None and failure.meaning == BY_NAME["nccl-shared-memory"].means
    assert "posix_fallocate failed" in failure.tail[0], "the line that tells is shown, though it is not among the last"


def test_a_lost_node_is_the_cause_of_the_errors_of_the_others(plan: Plan) -> None:
    report(plan, 0, 1.0, "RuntimeError: some error that no table has")
    failure = find_failure(plan, (ended(0, 1, 5.0), ended(1, 255, 50.0, lost=True)))
    assert failure is not None and failure.host == HOSTS[1] and failure.meaning == BY_NAME["node-lost"].means
    refused = "row 3 is too long"
    report(plan, 0, 1.0, refused, code=2)
    failure = find_failure(plan, (ended(0, 2, 5.0), ended(1, 255, 50.0, lost=True)))
    assert failure is not None and failure.message == refused


def test_an_exit_code_that_the_launcher_caused_is_not_explained(plan: Plan) -> None:
    log(plan, 0, recorded("peer-killed"))
    log(plan, 1, "step 4\n")
    failure = find_failure(plan, (ended(0, 1, 5.0, killed=True), ended(1, 137, 14.0, killed=True)))
    assert failure is not None and failure.host == HOSTS[0] and failure.meaning == BY_NAME["gloo-closed"].means
