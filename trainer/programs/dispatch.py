"""One rank of a run, from its spec to its result: checks, the process group, and the program of the stage's kind."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

import transformers

from trainer.checkpoint.resume import read_finished_result
from trainer.contract import RESULT_FILE, SINGLE_PROCESS_KINDS, InputRefused, RunFailed, TrainResult, TrainSpec, write
from trainer.device.device import require_determinism, seed_all
from trainer.device.log_prefix import report_phase
from trainer.device.rank import Rank, open_rank
from trainer.distributed.engine import start_distributed, start_single_process, stop_distributed
from trainer.observe.tracker import refuse_missing

LOST_PEER = re.compile("closed by peer|reset by peer|Broken pipe|remote process exited|Timed out waiting|Watchdog caught")  # gloo, NCCL
# Kind -> module with `run_program`. Imported when needed: training does not need the packages of the server.
PROGRAMS = {
    "train": "trainer.programs.train",
    "evaluate": "trainer.programs.evaluate",
    "merge": "trainer.programs.merge",
    "convert": "trainer.programs.convert",
    "quantize": "trainer.programs.quantize",
    "infer": "trainer.programs.infer",
    "serve": "trainer.programs.serve",
}
Program = Callable[[TrainSpec, Rank, Mapping[str, str]], TrainResult]


def run_stage(spec: TrainSpec, environ: Mapping[str, str]) -> TrainResult:
    """Run `spec` as the rank that `environ` names. Raises InputRefused and RunFailed."""
    silence_libraries()
    refuse_missing(spec)
    refuse_best_without_evaluation(spec)
    rank = open_rank(spec, environ)
    seed_all(spec.seed, deterministic=spec.deterministic)
    if spec.deterministic:
        require_determinism(spec.device.accelerator, os.environ)  # seed_all may have set a variable there
    report_phase(1)
    if spec.stage.kind in SINGLE_PROCESS_KINDS:
        start_single_process()
    else:
        start_distributed(spec.device)
    try:
        finished = read_finished_result(spec)
        result = finished or find_program(spec.stage.kind)(spec, rank, environ)
    except RuntimeError as error:
        if LOST_PEER.search(str(error)):
            raise RunFailed(
                f"rank {rank.number} lost the connection to another rank, which ended first: see its log for the cause. Checkpoints are "
                f"complete. ({error})"
            ) from error
        raise
    if rank.number == 0 and finished is None:
        write(result, Path(spec.output) / RESULT_FILE)
    stop_distributed()  # not after a failure: it would wait for ranks that are gone
    return result


def find_program(kind: str) -> Program:
    program: Program = import_module(PROGRAMS[kind]).run_program
    return program


def refuse_best_without_evaluation(spec: TrainSpec) -> None:
    """Raises InputRefused if the best checkpoint should be kept but no evaluation can find it."""
    if not spec.keep_best or spec.stage.kind != "train":
        return
    evaluation = spec.evaluation
    missing = [] if evaluation.every and evaluation.enabled else ["run.evaluation.every=N and run.evaluation.enabled=true"]
    missing += ["run.evaluation.loss=true"] if spec.keep_best == "loss" and not evaluation.loss else []
    if missing:
        raise InputRefused(
            f"run.keep_best={spec.keep_best}: no evaluation measures it. Set {' and '.join(missing)}, or leave run.keep_best empty."
        )


def silence_libraries() -> None:
    """Keep progress bars and warnings that a user cannot fix out of the log."""
    transformers.utils.logging.disable_progress_bar()
    # torch 2.13 renames two collectives that DeepSpeed 0.19.8 calls by their old names, once a step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # peft 0.21.2 calls transformers 5.23 by a deprecated name.
    warnings.filterwarnings("ignore", message=".?is_gradient_checkpointing", category=FutureWarning)
