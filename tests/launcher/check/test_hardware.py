"""Kernels of attention, and other names in lists, that the chip, the image or the model does not have."""

import pytest

from tests.launcher.check.test_rules import judge

KEY = "hardware.capability.attention"
REFUSED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((f"{KEY}=[flash2]",), "sdpa", "flash2 is a kernel for cuda devices; "),
    (("hardware=p4", f"{KEY}=[sdpa,flash2,eager]"), "sdpa,eager", "flash2 needs sm_80 or newer; NVIDIA Tesla P4 is sm_61"),
    (("hardware=rtx3090", f"{KEY}=[flash3]"), "sdpa", "flash3 needs sm_90 or newer; "),
    (("hardware=rtx3090", f"{KEY}=[flash2]"), "sdpa", "flash2 needs the package flash-attn, which is in no image"),
    (("hardware=h200", f"{KEY}=[flash3]"), "sdpa", "flash3 needs the package flash-attn-3, which is in no image"),
    (("hardware=h200", f"{KEY}=[npu_fusion]"), "sdpa", "npu_fusion is a kernel for npu devices; "),
    (("hardware=ascend910b", f"{KEY}=[flash2]"), "sdpa", "flash2 is a kernel for cuda devices; "),
)


@pytest.mark.parametrize(("words", "kept", "why"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_a_kernel_that_chip_or_image_lacks_is_refused(words: tuple[str, ...], kept: str, why: str) -> None:
    (problem,) = (problem for problem in judge(*words).problems if problem.key == KEY)
    assert why in problem.what and problem.changes == (f"{KEY}=[{kept}]",)
    again = (*(word for word in words if not word.startswith(KEY)), problem.changes[0])
    assert KEY not in [problem.key for problem in judge(*again).problems]


@pytest.mark.parametrize("hardware", ["cpu", "p4", "rtx3090", "h200", "ascend910b", "ascend910c"])
def test_kernels_that_a_file_of_hardware_lists_pass(hardware: str) -> None:
    assert KEY not in [problem.key for problem in judge(f"hardware={hardware}").problems]


def test_a_group_that_no_model_has_is_named_with_the_nearest() -> None:
    (problem,) = (problem for problem in judge("stage.optimizer.group_lr.visoin=1e-5").problems)
    assert (problem.key, problem.changes) == ("stage.optimizer.group_lr.visoin", ())
    assert problem.what.startswith("there is no group visoin; did you mean 'vision'?")
