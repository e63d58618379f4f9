"""A plan on one screen: the verdict, the choice, memory, image, ranks, batch and cost, notes, and the next command."""

from collections.abc import Iterator

from launcher.check.rules import Verdict
from launcher.check.start import name_run
from launcher.config.schema import AXES
from launcher.memory.estimate import SURE_SHARE, Memory, estimate_memory
from launcher.memory.states import GIB, device_count
from launcher.memory.tokens import read_load
from launcher.plan.data.rows import rows_of
from launcher.plan.host_memory import asks_for_host, describe_host
from launcher.plan.plan import Plan
from launcher.plan.text import command_line, measure, paint, size, wrap
from trainer.contract import TrainSpec
from trainer.contract.wording import plural

LABEL = 10  # columns of the names at the left
LINES = 30  # of a whole description, notes cut to fit, where the height of the terminal is not known
TIGHT = "tight: this run can be launched, but it may end for lack of memory"
IF_IMAGE = "ok, if every node has the image: this machine cannot send it (below)"
OK, IF_HOST = "ok: this run can be launched", "ok, if the nodes have the host memory that it needs"
ALWAYS = 3  # notes that are shown, however long the rest is
CUT = " ..."
# Words of a note -> its place among all: 0 = shown first.
OTHER = 4
COSTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (0, ("run.save_every=0",)),
    (1, ("uses each of the", "will learn almost nothing")),
    (2, ("each container downloads the weights",)),
    (3, ("is loaded in float16", "not on this machine, so that", "is read on the nodes", "no Docker engine")),
    (5, ("the learning rate rises for",)),
    (6, ("model.source.revision is empty",)),
)
BAR = 24  # characters of a full bar
LARGEST = 3  # items of the estimate that are named
# What brings an image to the nodes, where this machine's engine does not have it.
DELIVERY = {
    "build": "launch builds it, and sends it to the nodes that lack it",
    "ship": "build it first: cluster.delivery.kind=ship only sends it",
    "pull": "each node pulls it from cluster.delivery.registry",
    "build_on_nodes": "each node that lacks it builds it",
}


def describe_short(
    plan: Plan,
    *,
    colours: bool = False,
    width: int = 100,
    height: int = LINES,
    built: bool | None = None,
    launching: bool = False,
    notes: tuple[str, ...] = (),
    own_bytes: int = 0,
    unsent: str = "",
    named: str = "",
) -> str:
    """One screen of `width` columns and `height` lines; of more, where the first notes need them. `built`: whether this machine's Docker engine
    has the image, None = not known. `launching`: printed by `launch`, which needs no next command. `notes`: of this machine, before those of
    the plan; never left out. `own_bytes`: this machine's memory, 0 = not known. `unsent`: why this machine cannot send the image, '' = it can.
    `named`: the run id that was typed."""
    choice = " ".join(f"{axis}={getattr(plan.config, axis).name}" for axis in AXES)
    lines = [
        *describe_short_verdict(plan, colours=colours, own_bytes=own_bytes, unsent=unsent),
        *wrap(choice, width, indent="  "),
        *describe_bar(plan, colours=colours, width=width),
    ]
    for name, text in describe_rows(plan, built=built, own_bytes=own_bytes, unsent=unsent).items():
        lines += wrap(text, width, first=f"{name:{LABEL}}", indent=" " * LABEL)
    assumed = tuple(list_assumptions(plan))
    lines += ["assumptions:"] if assumed else []
    lines += [line for text in assumed for line in wrap(text, width, first="  ", indent="    ")]
    words = (*plan.overrides, *(("--run-id", named) if named else ()), *plan.options)
    last = [f"next: {command_line('launch', *words)}"] if plan.verdict.launchable and not launching else []
    last += [] if launching else [f"more: {command_line('plan', '--full', *words)}"]
    free = height - sum(-(-max(1, measure(line)) // width) for part in (*lines, *last) for line in part.splitlines())
    own = [line for note in notes for line in wrap(f"note: {note}", width, indent="  ")]
    return "\n".join((*lines, *own, *describe_notes(plan.verdict.notes, width, free - len(own)), *last))


def describe_short_verdict(plan: Plan, *, colours: bool, own_bytes: int = 0, unsent: str = "") -> Iterator[str]:
    verdict, memory = plan.verdict, plan.memory or estimate_memory(plan.config)
    if not verdict.launchable:
        yield paint("planned; a launch is refused:", "red", colours=colours)
        yield from map(str, verdict.problems)
    elif verdict.forced:
        yield paint(f"forced ({plan.config.run.force}):", "yellow", colours=colours)
        yield from map(str, verdict.forced)
    elif unsent and not verdict.tight:
        yield paint(IF_IMAGE, "yellow", colours=colours)
    else:
        word = name_verdict(plan, memory, own_bytes)
        yield paint(f"{word} (below)" if word == IF_HOST else word, "green" if word == OK else "yellow", colours=colours)


def name_verdict(plan: Plan, memory: Memory, own_bytes: int = 0) -> str:
    """The verdict of a plan that can be launched."""
    unsure = asks_for_host(plan.config, memory, own_bytes)
    if plan.verdict.tight:
        return f"{TIGHT}, and needs host memory that is not known to be there" if unsure else TIGHT
    return IF_HOST if unsure else OK


def describe_tight(verdict: Verdict) -> str:
    """Why the peak is tight, and what leaves a margin; '' where it is not."""
    if not verdict.tight:
        return ""
    changes = f". With a margin: {'  or  '.join(verdict.roomier)}" if verdict.roomier else ""
    return f"tight: the estimate may be off by {1 - SURE_SHARE:.0%}, more than what is free{changes}"


def describe_bar(plan: Plan, *, colours: bool, width: int) -> Iterator[str]:
    """The peak of each device as one bar, and its largest items."""
    memory = plan.memory or estimate_memory(plan.config)
    if not memory.total_bytes:
        return  # a stage that rewrites weights file by file
    used, limit = memory.total_bytes / GIB, memory.limit_bytes
    if limit:
        share = memory.total_bytes / limit
        length = max(8, min(BAR, width - 62))
        bar = ("#" * min(length, round(share * length))).ljust(length, "-")
        colour = "green" if memory.fits_within(SURE_SHARE) else "yellow" if memory.fits else "red"
        margin = (limit - memory.total_bytes) / GIB
        text = f"[{paint(bar, colour, colours=colours)}] {used:.1f} of {limit / GIB:g} GiB on each device ({share:.0%}), {margin:.1f} free"
    else:
        text = f"{size(memory.total_bytes)} on each device; its memory is not known, so nothing was compared with it"
    yield f"{'memory':{LABEL}}{text}"
    unit = "GiB" if memory.total_bytes >= GIB else "MiB"
    yield from wrap("; ".join(largest_items(memory)), width, first=f"{'':{LABEL}}largest, in {unit}: ", indent=" " * LABEL)
    if tight := describe_tight(plan.verdict):
        yield from wrap(tight, width, first=" " * LABEL, indent=" " * LABEL)


def largest_items(memory: Memory) -> Iterator[str]:
    for item in sorted(memory.items, key=lambda item: -item.size_bytes)[:LARGEST]:
        if item.size_bytes:
            small = memory.total_bytes < GIB
            yield f"{item.name} {item.size_bytes / 2**20:.0f}" if small else f"{item.name} {item.size_bytes / GIB:.2f}"


def describe_rows(plan: Plan, *, built: bool | None, own_bytes: int = 0, unsent: str = "") -> dict[str, str]:
    config, spec, memory = plan.config, plan.spec, plan.memory or estimate_memory(plan.config)
    trains, nodes = spec.stage.kind == "train", len(config.cluster.working)
    rows = {
        "host": describe_host(config, memory, own_bytes),
        "strategy": plan.choice if trains else "",
        "image": describe_unsent(plan, unsent) if unsent and plan.image.lock else describe_image_state(plan, built),
        "ranks": f"{plural(nodes, 'node')} x {plural(device_count(config), 'device')}, {plural(spec.device.world_size, 'rank')}",
        "batch" if trains else "work": describe_work(spec),
        "cost": describe_cost(plan) if trains else "",
    }
    return {name: text for name, text in rows.items() if text}


def list_assumptions(plan: Plan) -> Iterator[str]:
    """What the plan took from the record of the checkpoint, and the sizes of images, rows and batches that the memory was judged for."""
    recorded, memory = plan.config.stage.recorded, plan.memory or estimate_memory(plan.config)
    if recorded is not None and recorded.taken:
        yield f"from the record of {name_run(recorded)}: {', '.join(recorded.taken)}"
    if memory.assumption:
        yield memory.assumption
    if plan.settled:
        yield plan.settled


def describe_unsent(plan: Plan, why: str) -> str:
    """Where this machine cannot send the image to the nodes of a cluster: the ways that are left."""
    chosen = (override for override in plan.overrides if override.startswith(("hardware", "cluster")))
    return (
        f"{plan.image.tag}: {why}. Unless every node has it, take one of these: cluster.delivery.kind=build_on_nodes (each node builds it); "
        "cluster.delivery.kind=pull with cluster.delivery.registry=HOST/PATH; or on a machine with an engine of the nodes' architecture "
        f"{command_line('image', 'build', *chosen, *plan.options)}, then docker save, and docker load on each node"
    )


def describe_image_state(plan: Plan, built: bool | None) -> str:
    image, kind = plan.image, plan.config.cluster.delivery.kind
    if plan.config.cluster.runtime == "process":
        return "not used: cluster.runtime=process runs in the Python environment of this command"
    if not image.lock:
        return f"{image.tag}, cannot be built: there is no lock for this architecture"
    if built:
        return f"{image.tag}, built"
    delivery = "launch builds it" if kind == "build" and plan.is_local else DELIVERY[kind]
    state = f"{image.tag}, {'no Docker engine answers here, so it may be built or not' if built is None else 'not built'}; {delivery}"
    chosen = (override for override in plan.overrides if override.startswith(("hardware", "cluster")))
    return f"{state}. To build it now: {command_line('image', 'build', *chosen, *plan.options)}" if kind in ("build", "ship") else state


def describe_work(spec: TrainSpec) -> str:
    """What the ranks will do, in one line."""
    stage, batch, ranks = spec.stage, spec.batch, spec.device.world_size
    where = f"on {plural(ranks, 'device')}" if spec.device.cards == 1 else f"over the {spec.device.cards} devices of one node"
    source = spec.model.source
    weights = stage.checkpoint or (source.path if source.kind == "path" else source.id)
    if stage.kind == "merge":
        return f"the adapter {weights} is merged into its base model, file by file"
    if stage.conversion is not None:
        return f"{weights} in {stage.conversion.dtype}, file by file; values that do not fit: {stage.conversion.unfit}"
    if stage.quantization is not None:
        return f"{weights} in {stage.quantization.scheme}, except {', '.join(stage.quantization.keep) or 'nothing'}"
    if stage.inference is not None:
        rows = f"the rows of {stage.inference.input}, {stage.inference.batch} at a time"
        return f"{rows if stage.inference.input else 'one question'}, {where}"
    if stage.serving is not None:
        return f"http://{stage.serving.address}:{stage.serving.port} on the node, {stage.serving.max_batch} answers at a time, {where}"
    if stage.kind == "evaluate":
        return f"{', '.join(spec.evaluation.metrics)} of {weights}, {spec.evaluation.batch} questions at a time, {where}"
    shares = f"micro-batch {batch.micro_batch} x {batch.accumulation} accumulated x {plural(ranks, 'rank')}"
    return f"{batch.global_batch} samples a step = {shares}, {spec.steps} steps"


def describe_cost(plan: Plan) -> str:
    """Samples of the whole run, epochs where the rows are known, and tokens: a sample is never longer than data.max_length."""
    config, samples, rows = plan.config, plan.spec.steps * plan.spec.batch.global_batch, rows_of(plan.config)
    epochs = f" = {samples / rows:,.1f} epochs of {rows:,} rows" if rows else ""
    asked = f" (run.epochs={config.run.epochs:g}, rounded up)" if config.run.epochs is not None else ""
    tokens = samples * read_load(config, rows=1).length
    return f"{plan.spec.steps:,} steps{asked} = {samples:,} samples{epochs}, at most {tokens:,} tokens"


def describe_notes(notes: tuple[str, ...], width: int, free: int) -> list[str]:
    """In `free` lines, the dearest first: what is left out is counted. The first three are there in any case, each cut to a line where there
    is no room for all of it."""
    lines: list[str] = []
    ordered = order_notes(notes)
    for place, note in enumerate(ordered):
        wrapped = list(wrap(f"note: {note}", width, indent="  "))
        waiting = max(0, min(ALWAYS, len(ordered)) - place - 1) + (max(ALWAYS, place + 1) < len(ordered))  # lines for what follows
        if len(lines) + len(wrapped) > free - waiting:
            if place >= ALWAYS:
                return [*lines, f"and {plural(len(ordered) - place, 'more note')}, with --full"]
            wrapped = cut(wrapped, width)
        lines += wrapped
    return lines


def cut(wrapped: list[str], width: int) -> list[str]:
    """The first line, with a mark that more follows."""
    return wrapped if len(wrapped) == 1 else [f"{wrapped[0][: width - len(CUT)].rstrip()}{CUT}"]


def order_notes(notes: tuple[str, ...]) -> tuple[str, ...]:
    """By what they may cost: a run that is lost, hours, downloads, answers; notes that name no cost; what may change between two runs."""
    return tuple(sorted(notes, key=lambda note: next((place for place, words in COSTS if any(map(note.count, words))), OTHER)))
