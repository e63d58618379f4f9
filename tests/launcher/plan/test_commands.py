"""Config -> the exact commands."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import PurePosixPath

import pytest

from launcher.errors import ConfigRefused
from launcher.plan.commands import data_paths
from launcher.plan.plan import Plan
from trainer.contract.checkpoint_files import flatten

PlanFor = Callable[..., Plan]
ASCEND = ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "precision=bf16", "cluster=example")
RUN = "/srv/omnilaunch/runs/R"


def test_process_on_this_machine(plan_for: PlanFor) -> None:
    (command,) = plan_for().commands
    run = "/home/ann/work/runs/R"
    assert command.prepare == ("/venv/bin/python", "-m", "trainer", "data", f"{run}/spec.json")
    assert command.start == (
        "/venv/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "trainer", "run", f"{run}/spec.json",
    )  # fmt: skip
    assert command.environment == {
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMNILAUNCH_RUN_FOLDER": "/home/ann/work/runs/R",
        "OMNILAUNCH_RUN_ID": "R",
        "OMP_NUM_THREADS": "2",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TRANSFORMERS_OFFLINE": "1",
    }


def test_docker_on_two_ascend_nodes(plan_for: PlanFor) -> None:
    plan = plan_for(*ASCEND)
    first, second = plan.commands
    mounts = [f"type=bind,source={path},target={path}" for path in (RUN, "/srv/omnilaunch/.cache/data")]
    assert first.start[:25] == (
        "docker", "run", "--detach", "--name", "omnilaunch-R-7aa70a-n0", "--env-file", f"{RUN}-node0.env", "--network", "host", "--user", "1000:1000",
        "--label", "omnilaunch.run=R", "--label", "omnilaunch.node=0", "--shm-size", "16g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864",
        "--mount", mounts[0], "--mount", mounts[1],
    )  # fmt: skip
    devices = [first.start[i + 1] for i, word in enumerate(first.start) if word == "--device"]
    assert devices == [f"/dev/davinci{i}" for i in range(8)] + ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]
    assert first.start[-14:] == (
        "python", "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", "0", "--master-addr", "192.0.2.11", "--master-port", "29500",
        "--nproc-per-node", "8", "-m", "trainer", "run", f"{RUN}/spec.json",
    )[-14:]  # fmt: skip
    assert plan.image.tag in first.start
    assert second.start[second.start.index("--node-rank") + 1] == "1"
    assert (first.environment["HCCL_IF_IP"], second.environment["HCCL_IF_IP"]) == ("192.0.2.11", "192.0.2.12")
    assert first.environment["HCCL_SOCKET_IFNAME"] == "=eth0"
    assert second.environment["ASCEND_PROCESS_LOG_PATH"] == f"{RUN}/cann/node1", "one for each node: the folder may be shared"
    assert first.stop == ("docker", "kill", "--signal", "TERM", "omnilaunch-R-7aa70a-n0")


def test_cuda_devices_are_quoted_for_dockers_csv(plan_for: PlanFor) -> None:
    (command,) = plan_for("hardware=rtx3090", "cluster.runtime=docker", "cluster.devices_per_node=2").commands
    assert command.start[command.start.index("--gpus") + 1] == '"device=0,1"'
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.parametrize(
    "cluster", [ASCEND, ("hardware=rtx3090", "cluster.runtime=docker"), ("cluster.runtime=docker",)], ids=["ascend", "cuda", "cpu"]
)
def test_never_privileged_never_root_never_secret(plan_for: PlanFor, cluster: tuple[str, ...]) -> None:
    for command in plan_for(*cluster).commands:
        for argv in (command.prepare, command.start):
            assert not {"--privileged", "-e", "--env", "--pid"} & set(argv)
            assert argv[argv.index("--user") + 1] == "1000:1000"
            assert ":latest" not in " ".join(argv)


def test_named_data_is_mounted_read_only(plan_for: PlanFor) -> None:
    data = ("data=files", "data.train=rows.json", "data.images=/data/images", "cluster.runtime=docker")
    (command,) = plan_for(*data).commands
    assert "type=bind,source=/home/ann/work,target=/home/ann/work,readonly" in command.start
    assert "type=bind,source=/data/images,target=/data/images,readonly" in command.start


@pytest.mark.parametrize("images", ["", "data.images=/data/images"])
def test_what_lies_beside_a_file_of_rows_is_mounted_with_it(plan_for: PlanFor, images: str) -> None:
    """dataset_info.json, and the files that a meta file of InternVL lists. Of a file in / the file alone: no container takes another /."""
    data = ("data=files", "data.train=set/rows.json", "data.evaluation=/held.json", "cluster.runtime=docker", *([images] if images else []))
    if not images:
        data = (*data[:2], "data.evaluation=/held/out.json", *data[3:])
    (command,) = plan_for(*data).commands
    assert command.container is not None
    mounted = [mount.path for mount in command.container.mounts if mount.read_only]
    assert mounted == ["/home/ann/work/set", *(["/held.json", "/data/images"] if images else ["/held"])]


def test_every_file_that_a_spec_names_is_in_a_mount(plan_for: PlanFor) -> None:
    """Every path of the spec: a new one must be mounted too."""
    base, docker = "run.evaluation.base=/base", "cluster.runtime=docker"
    data = ("data=files", "data.train=/rows/train.json", "data.evaluation=/rows/held.json", "data.images=/pictures")
    plans = {
        "train": plan_for(*data, base, docker, "stage=full", "stage.checkpoint=/weights", "model.source.path=/model"),
        "infer": plan_for(*data, docker, "stage=infer", "stage.checkpoint=/weights", "stage.inference.input=/ask/questions.jsonl"),
        "one": plan_for(
            *data, docker, "stage=infer", "stage.checkpoint=/weights", "stage.inference.image=/one/a.png", "stage.inference.prompt=x"
        ),
    }
    for plan in plans.values():
        container = plan.commands[0].container
        assert container is not None
        mounted = [PurePosixPath(mount.path) for mount in container.mounts]
        values = {key: value for key, value in flatten(asdict(plan.spec)) if key != "data.root"}  # of built-in sets, of which this is none
        named = [text for text in values.values() if isinstance(text, str) and text.startswith("/")]
        assert len(named) > 4
        for path in named:
            assert any(PurePosixPath(path).is_relative_to(folder) for folder in mounted), path


def test_without_a_folder_of_images_the_folders_of_the_files_are_mounted(plan_for: PlanFor) -> None:
    """Image paths start there; the hash of the data, and the check of the nodes, see the same folders."""
    plan = plan_for("data=files", "data.train=set/rows.json", "data.evaluation=/held/out.json", "cluster.runtime=docker")
    mounted = [mount.path for mount in plan.commands[0].container.mounts if mount.read_only]  # type: ignore[union-attr]
    assert mounted == ["/home/ann/work/set", "/held"] == list(data_paths(plan.spec))
    asked = plan_for("stage=infer", "stage.checkpoint=/c", "stage.inference.input=questions.jsonl", "cluster.runtime=docker")
    assert "/home/ann/work" in [mount.path for mount in asked.commands[0].container.mounts]  # type: ignore[union-attr]
    assert data_paths(asked.spec) == (), "a built-in set is written, not read"


def test_paths_and_values_that_a_channel_cannot_carry_are_refused_by_name(plan_for: PlanFor) -> None:
    with pytest.raises(ConfigRefused, match=r"Docker cannot mount the path '/data/a,b\.json'"):
        plan_for("data=files", "data.train='/data/a,b.json'", "data.images=/data", "cluster.runtime=docker")
    with pytest.raises(ConfigRefused, match=r"cluster\.environment\.KEY: an env-file cannot hold a newline"):
        plan_for('cluster.environment.KEY="a\nb"')
    with pytest.raises(ConfigRefused, match="starts with '~'"):
        plan_for("data=files", "data.train='~/rows.json'", "data.images=/data")


def test_what_the_cluster_sets_wins(plan_for: PlanFor) -> None:
    (command,) = plan_for("cluster.environment.OMP_NUM_THREADS='1'").commands
    assert command.environment["OMP_NUM_THREADS"] == "1"
