"""The environment as facts, and what counts as another one."""

from dataclasses import replace

import pytest

from trainer.contract import SCHEMA, EnvReport, RankFacts, facts_of
from trainer.contract.environment_facts import changed_facts, describe_change

RANK = RankFacts(hostname="a", device="a cuda 0: H200", driver="580", firmware="", threads=4, interop_threads=8, processors=16)
REPORT = EnvReport(
    schema=SCHEMA, hostname="a", platform="p", python="3.11.7", packages={"torch": "2.7.1", "peft": "0.21.2"}, accelerator="cuda",
    devices=("a cuda 0: H200", "b cuda 0: H200"), driver="580", world_size=2, threads=4, parameters={}, trainable={}, deepspeed={},
    environment={"OMP_NUM_THREADS": "4", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "OMNILAUNCH_RUN_ID": "y", "RANK": "0"},
    toolkit={"NCCL": "2.26.2"}, settings={"0 power.limit": "700.00 W"}, determinism={"cudnn.benchmark": "False"}, ranks=(RANK, RANK),
)  # fmt: skip


def test_facts_are_flat_and_of_what_counts() -> None:
    facts = facts_of(REPORT)
    assert facts["driver"] == "580" and facts["device 1"] == "H200" and facts["package torch"] == "2.7.1"
    assert facts["toolkit NCCL"] == "2.26.2" and facts["setting 0 power.limit"] == "700.00 W" and facts["threads of rank 1"] == "4"
    assert {key for key in facts if key.startswith("variable")} == {"variable OMP_NUM_THREADS"}
    assert "firmware" not in facts, "what cannot be asked is no fact"


CHANGES = {
    "another lock": (replace(REPORT, packages={**REPORT.packages, "peft": "0.20.0"}), "package peft"),
    "a package that is gone": (replace(REPORT, packages={"torch": "2.7.1"}), "package peft"),
    "another driver": (replace(REPORT, driver="535"), "driver"),
    "another driver on one node": (replace(REPORT, ranks=(RANK, replace(RANK, driver="535"))), "driver of rank 1"),
    "another device": (replace(REPORT, devices=("a cuda 0: H200", "b cuda 0: H100")), "device 1"),
    "another thread count": (replace(REPORT, threads=8), "threads"),
    "another toolkit": (replace(REPORT, toolkit={"NCCL": "2.27.3"}), "toolkit NCCL"),
    "a changed variable": (replace(REPORT, environment={"OMP_NUM_THREADS": "8"}), "variable OMP_NUM_THREADS"),
    "a variable more": (replace(REPORT, environment={"OMP_NUM_THREADS": "4", "MKL_CBWR": "AVX2"}), "variable MKL_CBWR"),
    "a variable less": (replace(REPORT, environment={}), "variable OMP_NUM_THREADS"),
    "another switch": (replace(REPORT, determinism={"cudnn.benchmark": "True"}), "determinism cudnn.benchmark"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_is_found_and_named(name: str) -> None:
    other, key = CHANGES[name]
    changes = changed_facts(facts_of(REPORT), facts_of(other))
    assert list(changes) == [key] and describe_change(key, changes[key]).startswith(f"{key}: ")


def test_what_varies_by_itself_is_no_difference() -> None:
    other = replace(REPORT, hostname="c", environment={**REPORT.environment, "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "z"})
    assert changed_facts(facts_of(REPORT), facts_of(other)) == {}


def test_a_newer_version_may_ask_for_more() -> None:
    less = {key: value for key, value in facts_of(REPORT).items() if not key.startswith(("toolkit", "variable"))}
    assert changed_facts(less, facts_of(REPORT)) == {}


def test_a_variable_that_earlier_versions_never_recorded_is_no_change() -> None:
    """They took TOKENIZERS_PARALLELISM for a secret; every run has it set."""
    expected = facts_of(REPORT)
    now = facts_of(replace(REPORT, environment={**REPORT.environment, "TOKENIZERS_PARALLELISM": "false"}))
    assert changed_facts(expected, now) == {} and list(changed_facts(now, expected)) == ["variable TOKENIZERS_PARALLELISM"]
