"""README.txt of a rendered run: the steps in their order, for a person who knows neither the run nor this project. Pure."""

import textwrap

from launcher.plan.devices import ASCEND_MOUNTS, ASCEND_NETWORK_MOUNTS
from launcher.plan.plan import Plan
from launcher.redact import MASK, holds_credentials, mask_credentials
from launcher.run.offline.node_script import read_paths, script_name
from trainer.contract.wording import plural

WIDTH = 110
DRIVER_FILES = (*ASCEND_MOUNTS, *ASCEND_NETWORK_MOUNTS)  # are on a node with the driver, and belong to no other: `check` looks for them
RENDEZVOUS_WAIT_MINUTES = 10  # torch.distributed.elastic, static_tcp_rendezvous: 600 s
EXIT_CODES = (
    "Exit code of a container: 0 the run is finished, 1 it was stopped or failed (train_result.json or failure-rank*.json in the run's folder "
    "say which, the log has the cause, errors.md explains known ones), 137 it was killed. Exit code of the scripts: 2 the data or the arguments "
    "are wrong, 3 the image was not built, 4 the node is not ready."
)
CONTENTS = {
    "plan.json, config.json": "the plan, and the config that it was made from",
    "spec.json": "the input of the trainer; each script copies it to the run's folder",
    "deepspeed.json": "the part of it that DeepSpeed reads",
    "source.json": "the commit of the code",
    "node*.env": "variables of each node's container",
    "node*.sh": "the nodes' scripts: the docker commands are at the top, `help` lists what they do",
    "image/, image.sha256": "Dockerfile, locks and trainer, from which build.sh builds the image",
    "pip.conf": "the settings of pip for the build",
    "errors.md": "known failures as they appear in logs: what each means and what to do",
}


def write_readme(plan: Plan) -> str:
    """Sections in the order of use, numbered."""
    steps = (
        ("Copy this folder", describe_copy(plan)),
        ("Bring the image", describe_image(plan)),
        ("Bring the files that the run reads", describe_files(plan)),
        *((("Export the secrets", describe_secrets(plan)),) if plan.config.cluster.secrets else ()),
        ("Check that every node is ready", describe_check(plan)),
        ("Start", describe_start(plan)),
        ("Watch, stop", describe_watch(plan)),
        ("Keep the results", describe_results(plan)),
    )
    contents = "In this folder\n\n" + "\n".join(f"    {name:26} {text}" for name, text in CONTENTS.items())
    numbered = (f"{number}. {title}\n\n{text}" for number, (title, text) in enumerate(steps, start=1))
    return "\n".join(wrap(line) for line in "\n\n\n".join((describe_run(plan), *numbered, contents)).split("\n")) + "\n"


def wrap(line: str) -> str:
    """Wraps text only: commands and lists are indented."""
    return line if line.startswith(" ") else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)


def describe_run(plan: Plan) -> str:
    spec, image = plan.spec, plan.image
    rows = [
        f"Run {plan.run_id}: {plan.config.model.title}, stage {spec.stage.name}, {spec.steps} steps,",
        f"{plural(spec.device.world_size, 'rank')} on {plural(len(plan.commands), 'node')}, in containers of {image.tag}.",
        "",
        "Written by `omnilaunch render`. Nothing here connects to another machine: a person who is logged in on the node, and may use Docker "
        "there (or uses sudo), starts its script. In this order:",
        "",
        *(f"    node {command.node_rank}   {command.host:30} ./{script_name(command)}" for command in plan.commands),
        *([f"\nLicence of the image's contents: {image.licence}."] if image.licence else []),
    ]
    return "\n".join(rows)


def describe_copy(plan: Plan) -> str:
    where = "every node" if len(plan.commands) > 1 else "the node"
    return (
        f"Copy the whole folder to {where}, to any path. It holds no secret. A node needs Linux, bash and a Docker engine, 20.10 or newer."
    )


def describe_image(plan: Plan) -> str:
    delivery, image = plan.config.cluster.delivery, plan.image
    save = f"    docker save {image.tag} | gzip >image.tar.gz       # there\n    docker load -i image.tar.gz       # on every node"
    if delivery.kind == "pull":
        reference = f"{delivery.registry.rstrip('/')}/{image.tag}"
        return f"On every node:\n\n    docker pull {reference}\n    docker tag {reference} {image.tag}"
    if delivery.kind == "ship":
        return f"From the machine that has it to every node:\n\n{save}"
    copy = (
        f"It prints the image's tag and id at its end, and writes the id to image.id. From there to every node that lacks it:\n\n{save}\n\n"
        "Copy image.id as well to the folder on each node: its script then makes sure that all nodes run this image."
    )
    each = delivery.kind == "build_on_nodes"
    where = "every node" if each else f"one {image.architecture} machine"
    network = "" if delivery.wheelhouse else " and access to the package index"
    head = f"On {where}, with a docker that has BuildKit{network}:\n\n    ./build.sh{wheel_argument(plan)}\n"
    return "\n".join((head, *describe_build(plan), "It prints the image's tag and id at its end." if each else copy))


def wheel_argument(plan: Plan) -> str:
    delivery = plan.config.cluster.delivery
    if delivery.wheelhouse:
        return " WHEELHOUSE"
    return " [FOLDER]" if delivery.find_links and "://" not in delivery.find_links else ""


def describe_build(plan: Plan) -> list[str]:
    delivery, image = plan.config.cluster.delivery, plan.image
    lines = [f"It is built from {image.base} and the files of image/, whose checksums are in image.sha256."]
    if delivery.wheelhouse:
        lines.append(
            "It uses no network: the base image must be there already. WHEELHOUSE is the folder that `omnilaunch image fetch` filled, "
            f"{delivery.wheelhouse} on the machine that wrote this."
        )
    elif wheel_argument(plan):
        lines.append(f"FOLDER may hold packages of the lock, like {delivery.find_links} on the machine that wrote this.")
    if any(holds_credentials(url) for url in (delivery.index, delivery.extra_index, delivery.find_links)):
        lines.append(f"pip.conf names an index that asks for credentials: write them in place of {MASK} first, and chmod 600 pip.conf.")
    if holds_credentials(delivery.proxy):
        lines.append(f"Export http_proxy and https_proxy first: {mask_credentials(delivery.proxy)} with its credentials.")
    return [*lines, ""]


def describe_files(plan: Plan) -> str:
    cluster, spec = plan.config.cluster, plan.spec
    mounted = (path for command in plan.commands for path in read_paths(command) if path not in DRIVER_FILES)
    paths = tuple(dict.fromkeys((*mounted, *cluster.sync)))
    lines = ["These must be at the same path on every node; they are only read:\n", *(f"    {path}" for path in paths), ""] if paths else []
    if spec.model.source.kind == "hub":
        lines.append(
            f"The weights of {spec.model.source.id} are downloaded from the Hugging Face hub at the start: the nodes need access to it."
        )
    if plan.config.hardware.accelerator == "npu":
        lines.append(
            f"The files of the driver, such as {ASCEND_NETWORK_MOUNTS[-1]}, come with it on each node: the check below looks for them."
        )
    written = "one folder that all nodes share" if cluster.shared else "the script makes it on each node"
    lines.append(f"The run writes to {spec.output} ({written}){f' and {spec.data.root} (the built-in data)' if spec.data.builtin else ''}.")
    return "\n".join(lines)


def describe_secrets(plan: Plan) -> str:
    lines = [f"    read -rs {name} && export {name}" for name in plan.config.cluster.secrets]
    where = "On every node, in the shell that starts its script. They reach the container through a pipe, and are never written to a file"
    return "\n".join((f"{where} (with sudo: sudo -E).", "", *lines))


def describe_check(plan: Plan) -> str:
    lines = "\n".join(f"    ./{script_name(command)} check       # on {command.host}" for command in plan.commands)
    return f"{lines}\n\nIt changes nothing and lists all problems. To continue in spite of them, add --anyway, here and below."


def describe_start(plan: Plan) -> str:
    if len(plan.commands) == 1:
        (command,) = plan.commands
        return (
            f"    ./{script_name(command)}\n\nIt checks again, checks the data, starts the ranks, and ends; the container continues in the background.\n"
            "Started again after a failure (remove the container first), the run continues from its newest checkpoint."
        )
    check = "\n".join(f"    ./{script_name(command)} data        # on {command.host}" for command in plan.commands)
    begin = "\n".join(f"    ./{script_name(command)} start       # on {command.host}" for command in plan.commands)
    copied = f", after its folder checkpoints/ was copied from node 0 to {plan.spec.output} on the others"
    return (
        f"First the data, on all nodes; a large data set may take long:\n\n{check}\n\nThen all nodes, each within {RENDEZVOUS_WAIT_MINUTES} "
        f"minutes of the others, since that is how long they wait for each other:\n\n{begin}\n\nThe containers continue in the background. "
        f"Started again after a failure (remove the containers first), the run continues from its newest checkpoint"
        f"{'' if plan.config.cluster.shared else copied}."
    )


def describe_watch(plan: Plan) -> str:
    first, config = script_name(plan.commands[0]), plan.config
    lines = [
        f"    ./{first} follow       # the log until the end; Ctrl-C only stops showing it",
        f"    ./{first} status       # the state of the container",
        f"    ./{first} stop         # save and end",
        "",
    ]
    if len(plan.commands) > 1:
        lines.append(
            "After the first step, stopping one node ends all of them; before it, stop each. The nodes are not supervised here: where one "
            f"ends with an error, or is lost, the others notice after {config.run.collective_timeout_s} s at the latest "
            "(run.collective_timeout_s). The log of the node that ended first has the cause."
        )
    return "\n".join((*lines, EXIT_CODES))


def describe_results(plan: Plan) -> str:
    scripts = [script_name(command) for command in plan.commands]
    save, remove = ("\n".join(f"    ./{name} {verb}" for name in scripts) for verb in ("save", "remove"))
    return (
        f"Metrics, checkpoints and reports are in {plan.spec.output} (of the first node).\n\n{save}\n\ncopies log and reports to saved/TIME next "
        f"to the script. When the containers are no longer needed, remove them; their logs are removed with them:\n\n{remove}"
    )
