import json
from pathlib import Path

import pytest

from trainer.contract import RunFailed, StepRow
from trainer.observe.environment import select
from trainer.observe.metric import open_metrics


def row(step: int) -> StepRow:
    return StepRow(step=step, steps=2, loss=0.1, lr=1e-3, grad_norm=1.0, samples=8, tokens=9, seconds=0.5, peak_bytes=1)


def test_a_row_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    with open_metrics(tmp_path, writes=True) as write:
        for step in (1, 2):
            write(row(step))
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert [StepRow(**json.loads(line)) for line in lines] == [row(n) for n in range(1, step + 1)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with open_metrics(tmp_path, writes=False) as write:
        write(row(1))
    assert list(tmp_path.iterdir()) == []


def test_only_steering_variables_are_told_and_no_secret() -> None:
    environ = {
        "OMP_NUM_THREADS": "2",
        "NCCL_SOCKET_IFNAME": "eth0",
        "RANK": "0",
        "HF_TOKEN": "canary",
        "OMNILAUNCH_TOKEN": "canary",
        "CUDA_API_KEY": "canary",
        "PASSWORD": "canary",
        "HOME": "/home/me",
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_IB_PKEY": "0x8001",
    }
    assert select(environ) == {
        "NCCL_IB_PKEY": "0x8001",
        "NCCL_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "2",
        "RANK": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def test_a_full_disk_ends_the_run_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with open_metrics(tmp_path, writes=True) as write, pytest.raises(RunFailed, match=r"metrics.jsonl: .*No space left on device.*step 1"):
        write(row(1))
