"""The peers: which environment and checkout each needs, and the command that asks it. Paths are relative to the folder that --peers names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.peer_rows.golden import PeerSet

HERE = Path(__file__).parent
ALL = 10**6  # more rows than any file has


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`environment`: a virtual environment; `script`: of this folder; `more`: what follows the model and the rows, with {peers}, {folder} and {set}
    filled in. `of_set`: another script for a set."""

    environment: str
    script: str
    more: tuple[str, ...] = ()
    of_set: Mapping[str, str] = ()

    def command(self, peers: Path, model: Path, each: PeerSet) -> tuple[tuple[str, ...], dict[str, str]]:
        """The argv, and its environment: nothing of ours, and no network."""
        python = peers / self.environment / "bin" / "python"
        script = dict(self.of_set).get(each.folder.name, self.script)
        filled = {"peers": str(peers), "folder": str(each.folder), "set": each.folder.name, "all": str(ALL)}
        more = [
            part.format(**filled)
            for part in (("{folder}", "{set}", "{all}") if script == "run_llamafactory.py" else (str(each.file), *self.more))
        ]
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
        caches = {"HF_HOME": str(peers / "cache"), "MODELSCOPE_CACHE": str(peers / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return (str(python), str(HERE / script), str(model), *more), {**kept, **caches}


PEERS = {
    "llamafactory": Peer(
        environment="lf",
        script="run_llamafactory.py",
        of_set=dict.fromkeys(("v1_sft_demo", "v1_multimodal_demo", "v1_dpo_demo", "reason_tool_use_demo"), "run_llamafactory_v1.py"),
    ),
    "ms_swift": Peer(environment="sw", script="run_swift.py", more=("qwen2_5_vl",)),
    "llava": Peer(environment="sw", script="run_llava.py", more=("{peers}/src/LLaVA", "llava")),
    "sharegpt4v": Peer(environment="sw", script="run_llava.py", more=("{peers}/src/ShareGPT4V", "share4v")),
    "qwen_vl_finetune": Peer(environment="sw", script="run_qwen.py", more=("{peers}/src/Qwen3-VL",)),
    "minicpm_v": Peer(environment="sw", script="run_minicpm.py", more=("{peers}/src/MiniCPM-V",)),
    "rlaif_v": Peer(environment="sw", script="run_rlaif.py", more=("{peers}/src/RLAIF-V",)),
    "internvl_chat": Peer(environment="sw", script="run_internvl.py", more=("{peers}/src/InternVL",)),
}
