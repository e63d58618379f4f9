"""How long a run may take to finish its step and to save, when it is asked to stop. Arithmetic only, in seconds."""

import math

from launcher.config.schema import Config
from launcher.memory.states import States, ranks_per_node

LEAST_S = 120.0
DISK_BYTES_S = 1e8  # of a slow disk: a single hard disk, or a busy network share
LEAVING_S = 10  # for a server to exit after its last answer


def stop_limit_s(config: Config, states: States) -> float:
    """run.stop_timeout_s, or by default what writing the states to a slow disk takes, and LEAST_S for the step and everything else. It is
    a limit: the wait ends when the ranks have ended. A server first answers the requests that it has accepted."""
    serving = config.stage.serving if config.stage.kind == "serve" else None
    answering_s = serving.drain_timeout_s + LEAVING_S if serving else 0
    chosen_s = config.run.stop_timeout_s
    return max(answering_s, saving_limit_s(config, states) if chosen_s is None else chosen_s)


def saving_limit_s(config: Config, states: States) -> float:
    """Frozen weights count too, although they are not written: too long is better than too short. Nodes with a shared folder write at the
    same disks."""
    if config.stage.kind != "train":
        return LEAST_S
    writers = len(config.cluster.working) if config.cluster.shared else 1
    node_bytes = states.total_bytes * ranks_per_node(config) + states.host_bytes
    return LEAST_S + math.ceil(node_bytes * writers / DISK_BYTES_S)
