"""README.txt of a rendered run: what to do in which order, for one who knows neither the run nor this project. Pure."""

import textwrap

from launcher.plan.plan import Plan
from launcher.redact import MASK, holds_credentials, mask_credentials
from launcher.run.offline.node_script import options_of, script_name

WIDTH = 110
RENDEZVOUS_WAIT_MINUTES = 10  # torch.distributed.elastic, static_tcp_rendezvous: 600 s
EXIT_CODES = (
    "Exit code of a container: 0 the run is finished, 1 it was stopped or failed (train_result.json or failure-rank*.json in the run's folder "
    "say which, the log says why, errors.md what it means), 137 it was killed. Of the scripts: 2 the data or the words are wrong, 3 the image "
    "was not built, 4 the node is not ready."
)


def guide(plan: Plan) -> str:
    """Sections in the order of use, numbered."""
    steps = (
        ("Bring this folder", carry(plan)),
        ("Bring the image", bring_image(plan)),
        ("Bring what the run reads", bring_files(plan)),
        *((("Export the secrets", secrets(plan)),) if plan.config.cluster.secrets else ()),
        ("Look whether every node is ready", look(plan)),
        ("Start", start(plan)),
        ("Watch, stop", watch(plan)),
        ("Keep what came of it", keep(plan)),
    )
    parts = [introduction(plan)]
    parts += [f"{number}. {title}\n\n{text}" for number, (title, text) in enumerate(steps, start=1)]
    return "\n".join(wrapped(line) for line in "\n\n\n".join((*parts, contents())).split("\n")) + "\n"


def wrapped(line: str) -> str:
    """Prose alone: commands and lists are indented."""
    return line if line.startswith(" ") else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)


def introduction(plan: Plan) -> str:
    spec, image = plan.spec, plan.image
    rows = [
        f"Run {plan.run_id}: {plan.config.model.title}, stage {spec.stage.name}, {spec.steps} steps,",
        f"{spec.device.world_size} rank(s) on {len(plan.commands)} node(s), in containers of {image.tag}.",
        "",
        "Written by `omnilaunch render`. Nothing here reaches out to another machine: each node is started by its own script, "
        "by someone who is logged in there and may use Docker (or by sudo). In this order:",
        "",
        *(f"    node {command.node_rank}   {command.host:30} ./{script_name(command)}" for command in plan.commands),
        *([f"\nLicence of what the image holds: {image.licence}."] if image.licence else []),
    ]
    return "\n".join(rows)


def carry(plan: Plan) -> str:
    where = "every node" if len(plan.commands) > 1 else "the node"
    return f"Copy it whole to {where}, anywhere. It holds no secret. A node needs Linux, bash and a Docker engine, 20.10 or newer."


def bring_image(plan: Plan) -> str:
    image, delivery = plan.image, plan.config.cluster.delivery
    save = f"    docker save {image.tag} | gzip >image.tar.gz       # there\n    docker load -i image.tar.gz       # on every node"
    if delivery.kind == "pull":
        reference = f"{delivery.registry.rstrip('/')}/{image.tag}"
        return f"On every node:\n\n    docker pull {reference}\n    docker tag {reference} {image.tag}"
    if delivery.kind == "ship":
        return f"From the machine that has it to every node:\n\n{save}"
    spread = (
        f"It ends with the image's tag and id, and writes the id to image.id. From there to every node that lacks it:\n\n{save}\n\n"
        "Copy image.id, too, to the folder on each node: its script then makes sure that all run this very image."
    )
    each = delivery.kind == "build_on_nodes"
    where = "every node" if each else f"one {image.architecture} machine"
    network = "" if delivery.wheelhouse else " and a way to the package index"
    head = f"On {where}, with a docker that has BuildKit{network}:\n\n    ./build.sh{wheels(plan)}\n"
    return "\n".join((head, *built_from(plan), "It ends with the image's tag and id." if each else spread))


def wheels(plan: Plan) -> str:
    delivery = plan.config.cluster.delivery
    if delivery.wheelhouse:
        return " WHEELHOUSE"
    return " [FOLDER]" if delivery.find_links and "://" not in delivery.find_links else ""


def built_from(plan: Plan) -> list[str]:
    delivery, image = plan.config.cluster.delivery, plan.image
    lines = [f"It is built from {image.base} and the files of image/, whose sums are in image.sha256."]
    if delivery.wheelhouse:
        lines.append(
            "It uses no network: the base has to be there before. WHEELHOUSE is the folder that `omnilaunch image fetch` filled, "
            f"{delivery.wheelhouse} where this was written."
        )
    elif wheels(plan):
        lines.append(f"FOLDER may hold packages of the lock, as {delivery.find_links} did where this was written.")
    if any(holds_credentials(url) for url in (delivery.index, delivery.extra_index, delivery.find_links)):
        lines.append(f"pip.conf names an index that asks for credentials: put them in the place of {MASK} first, and chmod 600 pip.conf.")
    if holds_credentials(delivery.proxy):
        lines.append(f"Export http_proxy and https_proxy first: {mask_credentials(delivery.proxy)} with its credentials.")
    return [*lines, ""]


def bring_files(plan: Plan) -> str:
    cluster, spec = plan.config.cluster, plan.spec
    read = tuple(dict.fromkeys((*(path for command in plan.commands for path in options_of(command.start).sources), *cluster.sync)))
    lines = (
        ["These have to be at the same place on every node; they are only read:\n", *(f"    {path}" for path in read), ""] if read else []
    )
    if spec.model.source.kind == "hub":
        lines.append(f"The weights of {spec.model.source.id} come from the Hugging Face hub when it starts: the nodes need a way there.")
    written = "one folder that all nodes see" if cluster.shared else "made by the script, on each node its own"
    lines.append(f"It writes to {spec.output} ({written}){f' and {spec.data.root} (the built-in data)' if spec.data.builtin else ''}.")
    return "\n".join(lines)


def secrets(plan: Plan) -> str:
    lines = [f"    read -rs {name} && export {name}" for name in plan.config.cluster.secrets]
    told = (
        "On every node, in the shell that starts it. They reach the container through a pipe, and are written nowhere (with sudo: sudo -E)."
    )
    return "\n".join((told, "", *lines))


def look(plan: Plan) -> str:
    lines = "\n".join(f"    ./{script_name(command)} check       # on {command.host}" for command in plan.commands)
    return f"{lines}\n\nIt changes nothing and names all that is missing. What it sees wrongly is passed over by adding --anyway, here and below."


def start(plan: Plan) -> str:
    if len(plan.commands) == 1:
        (command,) = plan.commands
        return (
            f"    ./{script_name(command)}\n\nIt looks again, checks the data, starts the ranks, and ends; the container goes on by itself.\n"
            "Started again after a failure (remove the container first), it goes on from its newest checkpoint."
        )
    check = "\n".join(f"    ./{script_name(command)} data        # on {command.host}" for command in plan.commands)
    begin = "\n".join(f"    ./{script_name(command)} start       # on {command.host}" for command in plan.commands)
    same = (
        "" if plan.config.cluster.shared else f", after its folder checkpoints/ was copied from node 0 to {plan.spec.output} on the others"
    )
    return (
        f"First the data, on all nodes; of a large set that may take long:\n\n{check}\n\nThen all nodes, each within {RENDEZVOUS_WAIT_MINUTES} "
        f"minutes of the others, since that is how long they wait for one another:\n\n{begin}\n\nThe containers go on by themselves. Started "
        f"again after a failure (remove the containers first), the run goes on from its newest checkpoint{same}."
    )


def watch(plan: Plan) -> str:
    first, config = script_name(plan.commands[0]), plan.config
    lines = [
        f"    ./{first} follow       # the log until the end; Ctrl-C only stops showing",
        f"    ./{first} status       # what the engine says",
        f"    ./{first} stop         # save and end",
        "",
    ]
    if len(plan.commands) > 1:
        lines.append(
            "A stop of one node ends all of them once the first step is done; before that, stop each. Nobody watches over them here: where "
            f"one ended with an error, or was lost, the others notice after {config.run.collective_timeout_s} s at the latest "
            "(run.collective_timeout_s). The log of the node that ended first has the cause."
        )
    return "\n".join((*lines, EXIT_CODES))


def keep(plan: Plan) -> str:
    scripts = [script_name(command) for command in plan.commands]
    return (
        f"Rows, checkpoints and reports are in {plan.spec.output} (of the first node).\n\n"
        + "\n".join(f"    ./{name} save" for name in scripts)
        + "\n\ncopies log and reports to saved/TIME beside the script. And when they are no longer needed, the containers, whose logs end with them:\n\n"
        + "\n".join(f"    ./{name} remove" for name in scripts)
    )


def contents() -> str:
    rows = {
        "plan.json, config.json": "all that was decided, and from what",
        "spec.json": "what the trainer is told; each script puts it into the run's folder",
        "deepspeed.json": "what of it DeepSpeed is told",
        "source.json": "the commit of the code",
        "node*.env": "variables of each node's container",
        "node*.sh": "the nodes' scripts: the docker commands are at the beginning, `help` lists what they do",
        "image/, image.sha256": "Dockerfile, locks and trainer, from which build.sh builds the image",
        "pip.conf": "what pip is told while building",
        "errors.md": "known failures, as logs show them: what each means and what to do",
    }
    return "In this folder\n\n" + "\n".join(f"    {name:26} {text}" for name, text in rows.items())
