"""The image built by every node that lacks it, from the same Dockerfile and context, sent to all of them at once: where a link is too slow
for an image, or this machine has no engine or another architecture.

Two builds of one context have different ids (file times, a base that is not pinned), so what is compared is the fingerprint of all
that went in, which every image carries as a label. Index, CA bundle and proxy are files that only the build's user may read, gone
when it ends.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed, NodeFailed
from launcher.image.build import advice_on, build_command, fill_context, only_builder, refuse_unready, source_commit, write_secrets
from launcher.image.stack import LABEL, Image
from launcher.plan.commands import is_absent
from launcher.run.delivery.ship import send
from launcher.run.run_folder import WorkingNode
from launcher.ssh.parallel import each, together
from launcher.ssh.transport import Transport

SECRETS = "secrets"
PROXY = "proxy"
FORMAT = f'{{{{index .Config.Labels "{LABEL}fingerprint"}}}}'
# Arguments: cluster.root, then those of `docker`, of which the first on PATH is taken that can do BuildKit builds. Stdin: an archive of
# context and secrets. Modes are kept, since the image's user must be able to read what the context holds; the folder above is the
# builder's own.
BUILD = f"""set -e
exec 2>&1
umask 022
mkdir -p -- "$1"
umask 077
work=$(mktemp -d -- "$1/.omnilaunch-build.XXXXXX")
trap 'rm -r -- "$work"' EXIT
shift
tar -C "$work" --no-same-owner -xpf -
cd -- "$work"
if [ -f {SECRETS}/{PROXY} ]; then http_proxy=$(cat {SECRETS}/{PROXY}); https_proxy=$http_proxy; export http_proxy https_proxy; fi
export DOCKER_BUILDKIT=1
client=docker
IFS=:
for folder in $PATH; do
  if "$folder/docker" build --help 2>/dev/null | grep -q -e --secret; then client=$folder/docker; break; fi
done
"$client" "$@"
"""
# An address that means another machine on every node.
OWN = re.compile(r"^(file:|[\w+]+://([^/@]*@)?(localhost|127\.[\d.]+|\[::1\])([:/]|$))")


def build_on(
    image: Image, sites: Sequence[WorkingNode], *, project: Path, root: str, delivery: Delivery, source: Transport, say: Callable[[str], None]
) -> None:
    """Have every node build what it lacks. `root`: cluster.root on the nodes, where the context lies meanwhile. Raises ImageFailed for an
    image that cannot be built so, NodeFailed that names the nodes where it was not, each with its last lines."""
    found = each(lambda site: fingerprint_on(site, image.tag), sites)
    lacking = [site for site, there in zip(sites, found, strict=True) if there != image.fingerprint]
    if not lacking:
        return
    refuse_unready(image, delivery)
    refuse_unsendable(delivery)
    hosts = ", ".join(site.command.host for site in lacking)
    say(f"building {image.tag} on {hosts}, from {image.base}; a first build takes minutes")
    with ExitStack() as stack:
        stack.enter_context(only_builder(project, image, say))
        context = fill_context(image, project, delivery)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="omnilaunch-")))
        secrets = gather_secrets(delivery, folder)
        command = build_command("docker", image, Path(context.name), secrets, source_commit(project), delivery=delivery, fresh=False)
        save = ("tar", "-C", str(context.parent), "-cf", "-", context.name, "-C", str(folder), SECRETS)
        answers = send(
            save, ("sh", "-c", BUILD, "sh", root, *command[1:]), lacking, source, say, what=f"the context of {image.tag}, and building it,"
        )
    failures = [advised(answer) for answer in answers if answer]
    if failures:
        raise together(failures, len(lacking))
    require(image, lacking)
    say(f"built on {hosts}: one fingerprint, {image.fingerprint[:12]}; the ids may differ between nodes")


def refuse_unsendable(delivery: Delivery) -> None:
    """Wheels and the CA bundle go along with the context; an address of this machine alone cannot."""
    for key in ("index", "extra_index", "find_links", "proxy"):
        value = getattr(delivery, key)
        if OWN.match(value):
            raise ImageFailed(
                f"cluster.delivery.{key} is an address of this machine, which another node means itself by: name the host as the nodes reach it, "
                "take wheels from a folder (cluster.delivery.wheelhouse=FOLDER, sent along), or use cluster.delivery.kind=build"
            )


def gather_secrets(delivery: Delivery, folder: Path) -> dict[str, Path]:
    """All that must stay out of argv and layers, as files below `folder`/secrets; secret id -> its path from there. The proxy is none
    of the build's secrets, and is read by the script."""
    held = folder / SECRETS
    held.mkdir(mode=0o700)
    found = write_secrets(delivery, held)
    for name, path in found.items():
        if path.parent != held:
            shutil.copyfile(path, held / name)
            found[name] = held / name
    if delivery.proxy:
        (held / PROXY).touch(mode=0o600)
        (held / PROXY).write_text(delivery.proxy, encoding="utf-8")
    return {name: path.relative_to(folder) for name, path in found.items()}


def fingerprint_on(site: WorkingNode, tag: str) -> str:
    """Of the node's image with this tag; '' when there is none."""
    found = site.transport.run(("docker", "image", "inspect", "--format", FORMAT, tag))
    if found.code == 0:
        return found.output.strip()
    if not is_absent(found.errors):
        found.expect(f"{site.command.host}: asking its Docker engine for {tag}")
    return ""


def require(image: Image, sites: Sequence[WorkingNode]) -> None:
    found = each(lambda site: fingerprint_on(site, image.tag), sites)
    wrong = [site.command.host for site, there in zip(sites, found, strict=True) if there != image.fingerprint]
    if wrong:
        raise NodeFailed(f"after building, {', '.join(wrong)} does not have {image.tag} with fingerprint {image.fingerprint[:12]}")


def advised(failure: NodeFailed) -> NodeFailed:
    advice = advice_on(str(failure))
    return NodeFailed(f"{failure}\n  what to do: {advice[0]}") if advice else failure
