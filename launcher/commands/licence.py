"""`omnilaunch licence [ACTION]`: list, show, accept and withdraw the licences of software inside the images."""

import argparse
import os
from pathlib import Path

from launcher.commands.plan import PROJECT
from launcher.redact import show
from trainer.contract import Exit

WHEELHOUSE = "wheelhouse"  # where `image fetch` writes when --to is omitted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action=list_licences)
    actions = parser.add_subparsers(metavar="[ACTION]", title="actions")
    for name, (action, text) in ACTIONS.items():
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        if name != "list":
            sub.add_argument("name", metavar="NAME", help="a name that `omnilaunch licence` lists, such as cann")
        if name == "show":
            sub.add_argument(
                "--from", dest="folder", default="", metavar="FOLDER", help="a wheelhouse with the text; wheelhouse/ when omitted"
            )
        sub.set_defaults(action=action, parser=sub)


def run(arguments: argparse.Namespace) -> int:
    return int(arguments.action(arguments))


def list_licences(arguments: argparse.Namespace) -> int:
    from launcher.image.licence import load_licences, read_acceptances, store_path

    path = store_path(os.environ)
    accepted = read_acceptances(path)
    for licence in load_licences().values():
        found = accepted.get(licence.name)
        show(f"{licence.name:8}{licence.title}")
        if found is None:
            show(
                f"{'':8}not accepted; to read it: omnilaunch licence show {licence.name}; to accept it: omnilaunch licence accept {licence.name}"
            )
        elif found.sha256 != licence.sha256:
            show(
                f"{'':8}accepted at {found.accepted_at} as {found.sha256[:12]}, and has changed since: omnilaunch licence accept {licence.name}"
            )
        else:
            show(f"{'':8}accepted at {found.accepted_at} by {found.user} on {found.host}, sha256 {found.sha256}")
    show(f"kept in {path}")
    return Exit.OK


def show_licence(arguments: argparse.Namespace) -> int:
    """The text where a package here has it, and always what an acceptance is about."""
    from hashlib import sha256

    from launcher.image.licence import find_licence, find_text

    licence = find_licence(arguments.name)
    folders = (Path(arguments.folder),) if arguments.folder else (Path.cwd() / WHEELHOUSE, PROJECT / WHEELHOUSE)
    found = find_text(licence, folders)
    if found:
        show(f"{found[0].rstrip()}\n\n---")
    show(f"{licence.title}\npublished at {licence.url}")
    if found:
        same = sha256(found[0].encode()).hexdigest() == licence.text_sha256
        show(f"this text is from {found[1]}, and {'is' if same else 'is NOT'} the one that this project was made with")
    elif licence.packages:
        show(
            f"its text is not part of this project, but of these wheels: {', '.join(licence.packages)}. To read it here: "
            f"pip download --no-deps --dest FOLDER {licence.packages[0]}, then omnilaunch licence show {licence.name} --from FOLDER"
        )
    else:
        show(
            "its text is not part of this project, and no package of the locks has it: it comes with the base image. Read it at the address above"
        )
    of = (
        "name, title, address and the SHA-256 of the text"
        if licence.text_sha256
        else "name, title and address; the text itself was not read"
    )
    show(f"an acceptance is of sha256 {licence.sha256}\n  (of {of})\nto accept it: omnilaunch licence accept {licence.name}")
    return Exit.OK


def accept_licence(arguments: argparse.Namespace) -> int:
    import platform

    from launcher.image.licence import accept, find_licence, store_path, valid_acceptance
    from launcher.plan.local_context import user_name
    from launcher.record.record import utc_now

    licence, path = find_licence(arguments.name), store_path(os.environ)
    if earlier := valid_acceptance(licence, path):
        show(f"{licence.name} is accepted already, at {earlier.accepted_at} by {earlier.user}")
        return Exit.OK
    made = accept(licence, path, at=utc_now().isoformat(timespec="seconds"), user=user_name() or str(os.getuid()), host=platform.node())
    show(f"accepted: {licence.title}, sha256 {made.sha256}\n  {licence.url}\n  for {made.user} on {made.host}, in {path}")
    show(f"to take it back: omnilaunch licence withdraw {licence.name}")
    return Exit.OK


def withdraw_licence(arguments: argparse.Namespace) -> int:
    from launcher.image.licence import find_licence, store_path, withdraw

    licence, path = find_licence(arguments.name), store_path(os.environ)
    removed = withdraw(licence.name, path)
    show(
        f"{licence.name}: {'the acceptance is removed; images that were built stay' if removed else 'was not accepted; nothing to remove'}"
    )
    return Exit.OK


ACTIONS = {
    "list": (list_licences, "list the licences, and which of them you have accepted"),
    "show": (show_licence, "show what a licence is, and its text where a package here has it"),
    "accept": (accept_licence, "accept a licence, once for you on this machine"),
    "withdraw": (withdraw_licence, "remove an acceptance"),
}
