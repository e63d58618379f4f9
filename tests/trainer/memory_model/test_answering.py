"""The estimate of stages that answer, against the tensors of real answers by the code of these stages, at real image sizes."""

import pytest

from launcher.memory import tokens
from launcher.record.checkpoint import checkpoint_record
from tests.benchmarks.fit_inference import CASES, Case, measure
from trainer.checkpoint import lineage
from trainer.memory_model import synthetic_batch

QUICK = {("qwen2_5_vl", "serve", 1536), ("llava", "evaluate", 700), ("omnilmm", "evaluate", 1024), ("internvl", "infer", 1536)}


def is_quick(case: Case) -> bool:
    return (case.family, case.stage, case.context) in QUICK


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if is_quick(case) else pytest.mark.slow, id=f"{case.family}-{case.stage}-{case.context}")
        for case in CASES
    ],
)
def test_the_planned_peak_is_that_of_real_answers(case: Case) -> None:
    row = measure(case)
    assert -0.03 <= row.error <= 0.06, (row.planned_items, row.measured_bytes)


def test_the_launcher_and_the_trainer_use_the_same_numbers() -> None:
    assert synthetic_batch.BUILTIN_TEXT_TOKENS == tokens.TEXT_TOKENS
    assert checkpoint_record.FINGERPRINT_BYTES == lineage.FINGERPRINT_BYTES
