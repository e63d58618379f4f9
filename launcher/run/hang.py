"""Which rank a step that does not end waits for, from the stacks that the watchdog of each rank printed (trainer/train/watchdog.py).

The rank that ends first has only noticed. The cause is the rank that waits in no collective, or that printed nothing at all; where all ranks
wait in collectives at different places, none of them is: the ranks have diverged.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.run.node_log import PREFIXED, lines_of
from trainer.contract.wording import plural

WAITED = re.compile(r"omnilaunch: rank (\d+) has waited [\d.]+ s in step (\d+) \((.*)\)$", re.MULTILINE)
THREAD = re.compile(r"^(?:Current thread|Thread) 0x\w+.*\(most recent call first\):$")
FRAME = re.compile(r'^\s*File "(.+)", line (\d+) in (\S+)$')
# torch 2.4 and later, ProcessGroupNCCL.cpp; torch_npu's ProcessGroupHCCL.cpp has the same words.
TIMED_OUT = re.compile(
    r"\[Rank (\d+)\] Watchdog caught collective operation timeout: Work\w+\(SeqNum=(\d+), OpType=(\w+), NumelIn=(\d+), NumelOut=(\d+)"
)
OWN = ("trainer/train/loop.py", "trainer/distributed/", "torch/autograd/")  # in the stack of a thread that carries out a step
# Where a rank waits for other ranks. The last one reads a value that all ranks make together.
COLLECTIVE = (
    *("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/comm/", "deepspeed/runtime/zero/partition_parameters.py"),
    "trainer/distributed/collective.py",
)
LIBRARIES = ("site-packages/", "dist-packages/", "lib/python3", "<frozen")
WATCHDOG = "trainer/train/watchdog.py"
SHOWN_RANKS = 4


@dataclass(frozen=True, kw_only=True)
class WaitingRank:
    """`frames`: FILE:LINE in FUNCTION of the thread that carries out the step, the innermost first; () for a rank that printed no stack."""

    rank: int
    step: int = 0
    phase: str = ""
    frames: tuple[str, ...] = ()

    @property
    def in_collective(self) -> bool:
        return any(part in frame for frame in self.frames for part in COLLECTIVE)

    @property
    def place(self) -> str:
        """The innermost frame outside of libraries."""
        outside = (frame for frame in self.frames if not any(part in frame for part in LIBRARIES))
        return shorten(next(outside, self.frames[0] if self.frames else ""))

    def describe(self) -> str:
        """With the collective too, if it waits in one."""
        inner = next((shorten(frame) for frame in self.frames if any(part in frame for part in COLLECTIVE)), self.place)
        return f"rank {self.rank} ({self.phase}): {self.place}" + (f", {inner}" if inner != self.place else "")


@dataclass(frozen=True, kw_only=True)
class HangVerdict:
    """`rank`: the one that the others wait for, -1: none of them. `mismatch`: the ranks are in different collectives."""

    rank: int
    message: str
    mismatch: bool = False


def shorten(frame: str) -> str:
    """The last two folders of the path are enough."""
    path, _, rest = frame.partition(":")
    return "/".join(path.rsplit("/", 3)[-3:]) + f":{rest}" if rest else frame


def judge_hang(logs: Sequence[str], ranks: int) -> HangVerdict | None:
    """`logs`: the ends of the nodes' logs; `ranks`: of the run. None if no rank has reported a step that does not end."""
    found = read_waiting(logs)
    if not found:
        return None
    waiting = [found.get(rank, WaitingRank(rank=rank)) for rank in range(ranks)]
    step = max(each.step for each in waiting)
    silent = [each for each in waiting if not each.frames]
    outside = [each for each in waiting if each.frames and not each.in_collective]
    if silent and len(silent) < ranks:
        return HangVerdict(rank=silent[0].rank, message=describe_silent(step, silent, ranks))
    if outside and len(outside) < ranks:
        named = "; ".join(each.describe() for each in outside[:SHOWN_RANKS])
        return HangVerdict(
            rank=outside[0].rank, message=f"step {step} has not ended: all other ranks wait in a collective, but not {named}"
        )
    if not outside and len({each.frames for each in waiting}) > 1:
        named = "; ".join(each.describe() for each in different(waiting))
        return HangVerdict(
            rank=-1,
            mismatch=True,
            message=f"collective mismatch in step {step}: the ranks wait for each other in different collectives: {named}",
        )
    what = "in no collective" if outside else "in the same collective"
    return HangVerdict(rank=-1, message=f"step {step} has not ended: every rank waits {what}: {waiting[0].describe()}")


def judge_timeouts(logs: Sequence[str], ranks: int) -> HangVerdict | None:
    """By the collectives that the ranks' watchdogs of NCCL printed when they timed out. None if none has, or if all ranks were in the same."""
    found = {int(match[1]): match.groups()[1:] for text in reversed(logs) for match in reversed(list(TIMED_OUT.finditer(text)))}
    if not found:
        return None
    said = {rank: f"{kind} number {number} of {size_in} elements" for rank, (number, kind, size_in, _) in sorted(found.items())}
    if len(set(found.values())) > 1:
        named = "; ".join(f"rank {rank}: {said[rank]}" for rank in list(said)[:SHOWN_RANKS])
        return HangVerdict(rank=-1, mismatch=True, message=f"collective mismatch: the ranks waited in different collectives: {named}")
    missing = [rank for rank in range(ranks) if rank not in found]
    if not missing:
        return None
    named = ", ".join(map(str, missing[:SHOWN_RANKS]))
    return HangVerdict(
        rank=missing[0],
        message=f"{plural(len(found), 'rank')} waited in {next(iter(said.values()))} until it timed out, and rank {named} did not arrive there",
    )


def describe_silent(step: int, silent: Sequence[WaitingRank], ranks: int) -> str:
    named = ", ".join(str(each.rank) for each in silent[:SHOWN_RANKS])
    more = f" and {len(silent) - SHOWN_RANKS} more" if len(silent) > SHOWN_RANKS else ""
    return (
        f"step {step} has not ended: rank {named}{more} reported nothing, while {plural(ranks - len(silent), 'other rank')} printed where "
        "they wait: its process is stopped, or hangs in a library that holds Python's lock"
    )


def different(waiting: Sequence[WaitingRank]) -> list[WaitingRank]:
    """One rank of each place, at most SHOWN_RANKS."""
    by_place: dict[tuple[str, ...], WaitingRank] = {}
    for each in waiting:
        by_place.setdefault(each.frames, each)
    return list(by_place.values())[:SHOWN_RANKS]


def read_waiting(logs: Sequence[str]) -> Mapping[int, WaitingRank]:
    """Rank -> the last step that it reported as not ending."""
    found: dict[int, WaitingRank] = {}
    for text in logs:
        plain = PREFIXED.sub("", text)
        for match in WAITED.finditer(plain):
            rank = int(match[1])
            own = "\n".join(lines_of(text, rank)) or plain
            place = own.rfind(match[0])
            found[rank] = WaitingRank(rank=rank, step=int(match[2]), phase=match[3], frames=frames_of(own[place:]))
    return found


def frames_of(text: str) -> tuple[str, ...]:
    """The stack of the thread that carries out the step, among those that follow the first line of `text`. In the backward pass on an
    accelerator another thread carries it out than the main one: one that is in a collective is taken first."""
    stacks: list[list[str]] = []
    for line in text.splitlines()[1:]:
        if THREAD.match(line.strip()):
            stacks.append([])
        elif stacks and (frame := FRAME.match(line)):
            stacks[-1].append(f"{frame[1]}:{frame[2]} in {frame[3]}")
        elif stacks and line.strip() and line.strip() != "...":
            break
    own = [tuple(stack) for stack in stacks if is_of_step(stack)]
    return next((stack for stack in own if WaitingRank(rank=0, frames=stack).in_collective), own[-1] if own else ())


def is_of_step(stack: Sequence[str]) -> bool:
    return not any(WATCHDOG in frame for frame in stack) and any(part in frame for frame in stack for part in OWN)
