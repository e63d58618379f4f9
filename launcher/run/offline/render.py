"""`omnilaunch render`: a run as a folder that is copied to its nodes, for sites where no SSH is allowed.

The folder is written under a temporary name and renamed, so that it is complete or does not exist. It holds no secret and no credential;
where one is needed, README.txt says so.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.check.strings import read_texts
from launcher.config.schema import Delivery
from launcher.errors import ConfigRefused, ImageFailed
from launcher.image.build import WHEELHOUSE, build_command, refuse_unready, write_secrets
from launcher.image.stack import context_files, digest, text_digest
from launcher.image.wheelhouse import SYSTEM
from launcher.plan.commands import NodeCommand, env_lines
from launcher.plan.local_context import local_context
from launcher.plan.plan import Plan, refuse, to_plain, with_container_options
from launcher.record.record import CONFIG_FILE, PLAN_FILE, SOURCE_FILE, SourceState
from launcher.redact import holds_credentials, mask_credentials
from launcher.run.diagnosis import describe_symptoms
from launcher.run.offline.node_script import build_script, env_name, is_own_variable, node_script, script_name
from launcher.run.offline.readme import write_readme
from trainer.contract import SPEC_FILE, decode, encode

CONTEXT = "image"
LISTING = "image.sha256"
DOCKERFILE = "Dockerfile"
SECRET_FILES = {"pip": Path("pip.conf"), "ca": Path("ca.pem")}


def write_bundle(plan: Plan, folder: Path, *, project: Path, source: SourceState) -> Path:
    """Everything that the plan's nodes need, in `folder`, which must be empty or not exist. Raises ConfigRefused, ImageFailed."""
    plan = with_container_options(plan, local_context(project))
    refuse(plan.verdict, launching=True, overrides=plan.overrides)
    refuse_unrenderable(plan)
    folder = folder.absolute()
    if (folder.exists() or folder.is_symlink()) and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigRefused(f"{folder} exists and is not an empty folder; nothing is overwritten. Choose another: --to FOLDER")
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
            bundle = Path(aside) / "bundle"
            bundle.mkdir()
            fill(bundle, plan, project, source)
            open_to_all(bundle)
            bundle.rename(folder)
    except OSError as error:
        raise ConfigRefused(f"{folder} cannot be written: {error}. Choose another: --to FOLDER") from error
    return folder


def refuse_unrenderable(plan: Plan) -> None:
    """Raise ConfigRefused for what scripts cannot do, and a launch does by itself."""
    cluster, image = plan.config.cluster, plan.image
    if cluster.runtime != "docker":
        raise ConfigRefused(
            "cluster.runtime=process starts the ranks on this machine, so there is nothing to render. Choose cluster.runtime=docker"
        )
    unnamed = [
        f"cluster.nodes.{index}.{key}"
        for index, node in enumerate(cluster.working)
        for key in ("address", "interface")
        if not getattr(node, key)
    ]
    if len(cluster.working) > 1 and unnamed:
        raise ConfigRefused(
            f"{', '.join(unnamed)} must be set: a launch finds the network of the nodes by itself, scripts cannot. "
            "`ip -br address` on each node prints its interfaces and addresses"
        )
    own = [name for name in cluster.secrets if is_own_variable(name)]
    if own:
        raise ConfigRefused(f"cluster.secrets names {', '.join(own)}, which the scripts use as a variable. Rename it, in upper case")
    if any(holds_credentials(text) for command in plan.commands for _, text in read_texts(command)):
        raise ConfigRefused(
            "a variable or path of the run holds a URL with credentials, which would be written to a file. Pass it as cluster.secrets=[NAME]"
        )
    refuse_unready(image, cluster.delivery)


def fill(bundle: Path, plan: Plan, project: Path, source: SourceState) -> None:
    plain, delivery = to_plain(plan), without_credentials(plan.config.cluster.delivery)
    fill_context(bundle / CONTEXT, plan, project, source)
    write_secrets(replace(delivery, ca_bundle=copy_bundle(delivery, bundle)), bundle)
    texts = {
        PLAN_FILE: as_json(plain),
        CONFIG_FILE: as_json(plain["config"]),
        SPEC_FILE: encode(plan.spec),
        SOURCE_FILE: encode(source),
        "deepspeed.json": as_json(plan.spec.deepspeed),
        "errors.md": describe_symptoms(),
        "README.txt": write_readme(plan),
        LISTING: listing(plan),
        "build.sh": build_script(plan, build_argv(plan, source, delivery), proxy=delivery.proxy),
        **{env_name(command.node_rank): env_text(plan, command) for command in plan.commands},
        **{script_name(command): node_script(plan, command) for command in plan.commands},
    }
    for name, text in texts.items():
        (bundle / name).write_text(text, encoding="utf-8")


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def env_text(plan: Plan, command: NodeCommand) -> str:
    """As `docker run --env-file` reads it, which skips lines that start with #."""
    secrets = (
        f"# {name} is a secret: export it where {script_name(command)} starts; it is never written to a file\n"
        for name in plan.config.cluster.secrets
    )
    return "".join(secrets) + env_lines(command.environment)


# ---------------------------------------------------------------------------------------------------------------- image


def fill_context(folder: Path, plan: Plan, project: Path, source: SourceState) -> None:
    """The context of `docker build`. Raises ImageFailed where the tree has changed since the run was planned."""
    image = plan.image
    files = context_files(project, image.lock)
    changed = [name for name in sorted({*files, *image.files}) if name not in files or digest(files[name]) != image.files.get(name)]
    if changed:
        raise ImageFailed(
            f"{', '.join(changed[:5])} in {project} changed since {image.tag} was planned: plan the run again, or check out "
            f"commit {source.commit or '(not known)'}"
        )
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    for name in (WHEELHOUSE, SYSTEM):
        (folder / name).mkdir()
    (folder / DOCKERFILE).write_text(image.dockerfile, encoding="utf-8")


def listing(plan: Plan) -> str:
    """Checksums of the context, as sha256sum --check reads them."""
    digests = {DOCKERFILE: text_digest(plan.image.dockerfile), **plan.image.files}
    return "".join(f"{sha256}  {CONTEXT}/{name}\n" for name, sha256 in sorted(digests.items()))


def build_argv(plan: Plan, source: SourceState, delivery: Delivery) -> tuple[str, ...]:
    """The launcher's own argv, with paths relative to the bundle."""
    secrets = {name: path for name, path in SECRET_FILES.items() if name != "ca" or delivery.ca_bundle}
    return build_command("docker", plan.image, Path(CONTEXT), secrets, source.commit or "unknown", delivery=delivery, fresh=False)


def without_credentials(delivery: Delivery) -> Delivery:
    plain: Delivery = decode(Delivery, mask_credentials(asdict(delivery)))
    return plain


def copy_bundle(delivery: Delivery, bundle: Path) -> str:
    """Copy the CA bundle next to the scripts; '' where the config names none."""
    if not delivery.ca_bundle:
        return ""
    if not Path(delivery.ca_bundle).is_file():
        raise ImageFailed(f"cluster.delivery.ca_bundle: the file {delivery.ca_bundle} does not exist")
    return str(shutil.copyfile(delivery.ca_bundle, bundle / SECRET_FILES["ca"]))


def open_to_all(bundle: Path) -> None:
    """Set modes that do not depend on the umask: one user may copy the folder and another use it."""
    for path in (bundle, *bundle.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
