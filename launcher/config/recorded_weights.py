"""What a record says about the weights that a run starts from: the section stage.recorded of a config."""

from dataclasses import dataclass
from typing import Literal

from trainer.contract import Lora


@dataclass(frozen=True, kw_only=True)
class RecordedWeights:
    """What the record of stage.checkpoint says about its weights. Set by the plan, never typed. `run_id`: the run that wrote them, by its stage
    `stage`; `source`: the checkpoint that it made them from, '' = none. `adapter`: its settings, null = full weights. `dtype`: of the weights,
    '' = not known. `quantized`: all linear layers but those of the groups in `kept`. `trained`: groups trained so far, () = not known.
    `differences`: of the chosen model from the recorded one. `taken`: what the config has from the record, in words.
    `notes`: what the files say that was not taken. Weights of no run of ours have no run_id."""

    run_id: str
    stage: str
    model: str
    source: str = ""
    adapter: Lora | None = None
    dtype: str = ""
    quantized: Literal["", "int8", "nf4"] = ""
    kept: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    taken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
