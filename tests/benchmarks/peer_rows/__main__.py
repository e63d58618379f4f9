"""Make the golden files of the peers again, or compare rows that are not kept.

    python -m tests.benchmarks.peer_rows make --peers FOLDER [--only NAME ...]     expected.jsonl of each set in tests/golden/peers
    python -m tests.benchmarks.peer_rows compare --peers FOLDER [--most 1000]      all rows of LLaMA-Factory's data folder, in a temporary folder
    python -m tests.benchmarks.peer_rows share                                     the share of equal rows of the golden files

FOLDER has the environments and checkouts that tests/golden/peers/README.md lists.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.peer_rows.compare import Compared, compare, image_token_id, open_once, summarise, train_spec
from tests.benchmarks.peer_rows.demo import DEMO_SETS, copy_set
from tests.benchmarks.peer_rows.golden import GOLDEN, Expected, PeerSet, find_sets, fold, write_expected
from tests.benchmarks.peer_rows.model import MODELS, write_model
from tests.benchmarks.peer_rows.peer import PEERS

MARK = "ROW "


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peer_rows")
    parser.add_argument("verb", choices=("make", "compare", "share"))
    parser.add_argument("--peers", type=Path, help="the folder with the environments and checkouts")
    parser.add_argument("--only", nargs="*", default=[], help="names of sets, or their beginnings")
    parser.add_argument("--most", type=int, default=1000, help="rows of each file to compare")
    given = parser.parse_args(arguments)
    if given.verb != "share" and not given.peers:
        parser.error("--peers is needed")
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        for name in MODELS:
            write_model(name, models / name)
        if given.verb == "make":
            make(given.peers, models, tuple(given.only))
        else:
            where = GOLDEN if given.verb == "share" else copy_whole(given.peers, models, Path(folder) / "sets", given)
            found = {each.name: compare(each, models / each.model) for each in find_sets(where) if wanted(each, given.only)}
            print(summarise(found))
            show_differences(found)
    return 0


def wanted(each: PeerSet, only: Sequence[str]) -> bool:
    return not only or any(each.name.startswith(name) for name in only)


def make(peers: Path, models: Path, only: Sequence[str]) -> None:
    for name in DEMO_SETS:
        if not only or any(f"llamafactory/{name}".startswith(start) for start in only):
            copy_set(peers, name, GOLDEN / "llamafactory" / name)
    for each in find_sets():
        if wanted(each, only):
            rows = list(ask_peer(peers, models, each))
            write_expected(each.folder, iter(rows))
            print(f"{each.name}: {len(rows)} rows, {sum(bool(made.refused) for _, made in rows)} refused by the peer", flush=True)


def copy_whole(peers: Path, models: Path, target: Path, given: argparse.Namespace) -> Path:
    for name in DEMO_SETS:
        if not given.only or any(f"llamafactory/{name}".startswith(start) for start in given.only):
            copy_set(peers, name, target / "llamafactory" / name, most=given.most, longest=10**9)
    for each in find_sets(target):
        write_expected(each.folder, ask_peer(peers, models, each))
    return target


def ask_peer(peers: Path, models: Path, each: PeerSet) -> Iterator[tuple[int, Expected]]:
    """The rows as the peer reads them. Raises RuntimeError with its own words when it ends without any."""
    command, environment = PEERS[each.folder.parent.name].command(peers, models / each.model, each)
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=each.folder)
    lines = [json.loads(line.removeprefix(MARK)) for line in ended.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise RuntimeError(f"{each.name}: {' '.join(map(str, command))}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    spec = train_spec(each, models / each.model)
    image = image_token_id(spec, open_once(each.model, models / each.model))
    for row in lines:
        why = "dropped" if row.get("dropped") else row.get("refused", "")
        yield row["row"], Expected(refused=why) if why else fold(row["input_ids"], row["labels"], image)


def show_differences(found: dict[str, tuple[Compared, ...]]) -> None:
    for name, rows in found.items():
        for each in [each for each in rows if each.outcome not in ("equal", "both refuse")][:12]:
            print(f"{name} row {each.row}: {each.outcome}: {each.why[:300]}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
