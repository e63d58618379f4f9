"""docs/fit.md says what the plan computes: its tables and figures are made here, or computed from the rows of its benchmarks.

python -m tests.launcher.memory.test_fit_page    # prints the tables of cases and of published peaks
"""

import re
from collections.abc import Iterator

import pytest

from launcher.cli import main
from launcher.config.compose import compose
from launcher.memory.buffers import CHUNKED, HOST_FACTOR, WHOLE
from launcher.memory.deepspeed import LIVE_PARAMETERS, PREFETCH, REDUCE_BUCKET
from launcher.memory.estimate import SURE_SHARE, split_weights
from launcher.memory.states import GIB, NF4_BITS, STATE_BLOCK
from tests.launcher.memory.test_case import (
    ASKED,
    CHECKPOINTED,
    MINICPM_O,
    OWN,
    P4,
    PUBLISHED,
    QWEN,
    ROOT,
    SEED_C,
    SIXTEEN,
    SMALL,
    Published,
    gib_of,
    memory_of,
)

PAGE = ROOT / "docs" / "fit.md"
OFF_LOADING = ("stage=full", "strategy=zero2", "strategy.offload_optimizer=true", CHECKPOINTED)
NF4_BOTH = ("stage.lora.base=nf4", "stage.lora.base_groups=[lm,vision]")
FIGURE = re.compile(r"(?<![\w.#/-])\d[\d,]*(?:\.\d+)? ?(?:GiB|MiB|GB|%)")
# Sizes that are given, not computed: of cards, of files, and of a reader's machine.
GIVEN = {"32 GB", "64 GB", "80 GB", "24 GB", "8 GiB", "64 GiB", "100%", "24 GiB"}


# ------------------------------------------------------------------------------------------------------------------ cases


def host_gib(*words: str) -> dict[str, float]:
    return {item.name: item.size_bytes / GIB for item in memory_of(*words).host_items}


def split(*words: str) -> tuple[int, float]:
    cards, each = split_weights(compose((*QWEN, *ASKED, "cluster.devices_per_node=1", *words, *OWN), ROOT / "conf"))
    return cards, each / GIB


def states_of(*words: str) -> float:
    items = memory_of(*QWEN, "strategy=zero3", CHECKPOINTED, *words).items
    return sum(item.size_bytes for item in items if item.name in ("weights", "gradients", "optimizer")) / GIB


def cases() -> Iterator[tuple[str, str]]:
    """(case, verdict), with the figures of the plan."""
    host, pure = host_gib(*SEED_C), memory_of(*SEED_C, "precision=pure_bf16", "precision.rounding=nearest")
    lora_12b = (*P4, "model=omnilmm_12b", "stage=lora", "data.max_length=512", CHECKPOINTED)
    (two, each), (three, small) = split(), split(SMALL)
    states, pinned = host["offloaded states"], host["pinned buffers"]
    yield (
        "MiniCPM-o 2.6, full, two RTX 3090, ZeRO 3 with both offloads, 1,024 tokens, one slice (OpenBMB/MiniCPM-V#828)",
        f"the cards hold it ({gib_of(*SEED_C):.1f} GiB of 24); a node's host memory must hold {states:.0f} GiB of states, and {pinned:.0f} GiB of "
        "pinned buffers: refused with 64 GiB, LoRA offered",
    )
    yield (
        "what a refusal without offloading offers",
        f"ZeRO 2, optimizer offloaded: {gib_of(*MINICPM_O, *OFF_LOADING):.1f} GiB; LoRA, ZeRO 3: "
        f"{gib_of(*MINICPM_O, 'stage=lora', 'strategy=zero3', CHECKPOINTED):.1f} GiB",
    )
    yield (
        "the same in `pure_bf16`",
        f"refused without offloading; with both offloads and `precision.rounding=nearest` {pure.host_bytes / GIB:.0f} GiB of a node's host memory",
    )
    yield (
        "OmniLMM-3B on a P4 (8 GiB), float16",
        f"asked: {gib_of(*P4, 'model=omnilmm_3b', *ASKED):.1f} GiB, fits; LoRA fits up to 512 tokens, tight",
    )
    yield (
        "OmniLMM-12B on a P4, asked",
        f"refused in float16 ({gib_of(*P4, 'model=omnilmm_12b', *ASKED):.1f} GiB), and led to a checkpoint in NF4, whose weights take 6.1 GiB: one "
        "question at a time fits",
    )
    yield (
        "OmniLMM-12B on a P4, LoRA",
        f"refused in float16 ({gib_of(*lora_12b):.1f} GiB); `stage.lora.base=nf4` alone takes {gib_of(*lora_12b, NF4_BOTH[0]):.1f} GiB, because the "
        f"tower stays in float16; with `stage.lora.base_groups=[lm,vision]` {gib_of(*lora_12b, *NF4_BOTH):.1f} GiB. ZeRO 3 with both offloads is "
        "offered too",
    )
    yield "bfloat16 on a P4", "refused by the chip; `precision=fp16` offered"
    yield "Qwen2.5-VL-32B, LoRA, ZeRO 3, 8 or 16 x 910B", "fits with gradient checkpointing, with 64 and with 32 GB"
    yield (
        "the same, full",
        f"8 cards of 64 GB: refused ({states_of('stage=full'):.0f} GiB of states each); 16: fits ({states_of('stage=full', SIXTEEN):.0f}); 32 GB: "
        "refused with both",
    )
    yield (
        "Qwen2.5-VL-32B asked on one 910B",
        f"refused; whole layers over {two} cards would put {each:.1f} GiB on each, over {three} of 32 GB {small:.1f}",
    )


def cases_table() -> str:
    return "\n".join(("| case | verdict |", "|---|---|", *(f"| {case} | {verdict} |" for case, verdict in cases())))


# -------------------------------------------------------------------------------------------------------------- published


def published_row(row: Published, before: Published | None) -> str:
    size, unit = (row.gib, "GiB") if row.gib else (row.gb, "GB")
    source = row.source.replace("stage=", "").replace("strategy=", "")
    reason = "the same" if before and row.reason and row.reason == before.reason else row.reason
    return f"| {source} | {size:g} {unit} | {size * row.ratio:.1f} | {reason} |"


def published_table() -> str:
    return "\n".join(
        ("| source | published | ours | why not within 10 % |", "|---|---|---|---|", *map(published_row, PUBLISHED, (None, *PUBLISHED)))
    )


# ------------------------------------------------------------------------------------------------------------------- page


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the table that begins with this heading."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("| "):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


TRAINING, ANSWERS = "| family | stage | precision | rows x tokens |", "| family | stage | precision | questions x tokens |"


@pytest.mark.parametrize(("heading", "columns"), [(TRAINING, ((6, 9), (7, 10))), (ANSWERS, ((5, 7),))])
def test_the_errors_of_measured_rows_are_of_their_sizes(heading: str, columns: tuple[tuple[int, int], ...]) -> None:
    rows = rows_of(heading)
    assert len(rows) in (40, 20)
    for row in rows:
        measured = float(row[6 if heading == ANSWERS else 8])
        for size, error in columns:  # sizes are rounded to 0.1 MiB
            assert abs(float(row[size]) / measured - 1 - percent(row[error])) < 0.001 + 0.1 / measured, row


def percent(cell: str) -> float:
    return float(cell.rstrip("%")) / 100


def summary(errors: list[float]) -> tuple[str, str, str]:
    return f"{100 * min(errors):+.1f}", f"{100 * max(errors):+.1f}", f"{100 * sum(map(abs, errors)) / len(errors):.1f}"


def sentences() -> Iterator[str]:
    """What the page says about the rows and the constants, computed again."""
    plan, trace, answers = (
        [percent(row[column]) for row in rows_of(heading)] for heading, column in ((TRAINING, 9), (TRAINING, 10), (ANSWERS, 7))
    )
    low, high, mean = summary(plan)
    inside = sum(-0.03 <= error <= 0.10 for error in plan)
    yield f"{len(plan)} configurations. The plan's peak lies between {low} and {high} % (mean {mean} %): within 10 % are all, and at most 3 % below, "
    yield f"which is asked for, **{inside} of {len(plan)}**."
    low, high, mean = summary(trace)
    inside = sum(-0.03 <= error <= 0.05 for error in trace)
    yield f"The trace's lies between {low} and {high} % (mean {mean} %): **{inside} of {len(trace)}** within the 5 % and 3 % that are asked for."
    low, high, mean = summary(answers)
    yield f"The mean error is {mean} %, and all are between {low} and {high} %."
    yield f"NF4 {NF4_BITS:.3f} bits of the linear layers"
    yield f"8-bit moments 1 + 4/{STATE_BLOCK}"
    yield f"as many as train, at most {REDUCE_BUCKET:.0e}".replace("+0", "")
    yield f"up to {(LIVE_PARAMETERS + PREFETCH) / 1e9:.2f}e9 elements"
    yield f"{CHUNKED} float32 copies of a chunk (`strategy.loss_chunk`), {WHOLE} without chunks"
    yield f"at most {PREFETCH:.0e} elements, {2 * PREFETCH / 1e9:.1f} GB in 16 bits".replace("+0", "")
    yield "half as much again pinned" if HOST_FACTOR == 1.5 else f"{HOST_FACTOR - 1} as much again pinned"
    yield f"at most 70 % for states, {100 * SURE_SHARE:.0f} % at the peak"
    yield f"At most {100 * SURE_SHARE:.0f} % of the device's memory may be taken."
    yield f"takes at most {100 * SURE_SHARE:.0f} % of its memory |"
    yield f"takes more than {100 * SURE_SHARE:.0f} %: the estimate may be off by {100 - 100 * SURE_SHARE:.0f} %."
    yield f"above {100 * SURE_SHARE:.0f} % it is refused"


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_every_figure_of_the_page_is_computed(capsys: pytest.CaptureFixture[str]) -> None:
    """What is left when all that is computed is taken away has no size and no share of its own."""
    text = PAGE.read_text(encoding="utf-8")
    page = words_of(re.sub(r"^\| \w+ \| \w+(?:, vision too)? \| \w+ \| \d+ x .*$", "", text, flags=re.MULTILINE))
    for known in (cases_table(), published_table(), *sentences(), refusal(capsys)):
        assert words_of(known) in page, f"{known}\n\n(python -m tests.launcher.memory.test_fit_page prints the tables)"
        page = page.replace(words_of(known), "")
    left = set(FIGURE.findall(page)) - GIVEN
    assert not left, f"{left}: computed by no test; drop it, or add it here"


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What the command at the top of the page prints."""
    (command,) = re.findall(r"^\$ omnilaunch (plan .*data\.max_length=1024)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    capsys.readouterr()
    assert main(command.split()) == 2
    return capsys.readouterr().err


def test_the_rows_are_those_of_the_benchmarks() -> None:
    """Read as text: the benchmarks import torch, the launcher's tests do not."""
    for heading, file, count in ((TRAINING, "fit_error.py", 40), (ANSWERS, "fit_inference.py", 20)):
        code = (ROOT / "tests" / "benchmarks" / file).read_text(encoding="utf-8")
        listed = re.findall(r'^    case\("(\w+)", "(\w+)", "(\w+)", (\d+)', code, flags=re.MULTILINE)
        rows = rows_of(heading)
        assert len(listed) == len(rows) == count
        for (family, stage, precision, number), row in zip(listed, rows, strict=True):
            assert [family, precision] == [row[0], row[2]] and row[1].startswith(stage) and number in row[3], row


if __name__ == "__main__":
    print(f"{cases_table()}\n\n{published_table()}")
