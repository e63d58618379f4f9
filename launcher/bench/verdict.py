"""Whether a published result was reproduced: its figures are compared with those of its rerun, by the bands that the cell had stated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.bench.measure import summarise
from launcher.bench.result import PublishedResult, Repeat, is_unsteady
from launcher.config.schema import Bands
from launcher.errors import RecordRefused
from launcher.record.comparison import Figure, Level
from launcher.record.verdict import judge_figure, judge_losses
from trainer import contract
from trainer.contract import SpecError
from trainer.contract.environment_facts import changed_facts
from trainer.contract.wording import plural

# Figure of a summary -> (name, which is also that of its band; unit; which change is worse, as in record.verdict; divisor).
JUDGED: dict[str, tuple[str, str, int, float]] = {
    "samples_per_s": ("throughput", "samples/s", -1, 1.0),
    "peak_bytes": ("memory", "GiB", 1, 2.0**30),
}
MAX_LISTED = 20


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """`facts`: key -> (then, now) of the environment facts that differ. `losses`: of the repeat that differs most. `rows_equal`,
    `weights_equal`: how many repeats are bitwise identical to a published one. `fewer`: why there are fewer repeats than published, else ''."""

    result_id: str
    repeats: tuple[Repeat, ...]
    figures: tuple[Figure, ...]
    losses: Level
    loss_change: float
    loss_limit: str
    rows_equal: int
    weights_equal: int
    facts: dict[str, tuple[str, str]]
    fewer: str

    @property
    def reproduced(self) -> bool:
        return Level.OUTSIDE not in (self.losses, *(figure.level for figure in self.figures))


def judge(result: PublishedResult, repeats: Sequence[Repeat], facts: Mapping[str, str], *, fewer: str) -> Reproduction:
    """`facts`: of the rerun, as `add_code_facts` makes them. Raises RecordRefused for a line that states no bands."""
    bands = bands_of(result)
    change, level, limit = max(
        (judge_repeat(result, repeat, bands) for repeat in repeats), key=lambda found: (found[1] is Level.OUTSIDE, found[0])
    )
    return Reproduction(
        result_id=result.result_id,
        repeats=tuple(repeats),
        figures=judge_figures(result, repeats, bands),
        losses=level,
        loss_change=change,
        loss_limit=limit,
        rows_equal=sum(repeat.rows_sha256 in {each.rows_sha256 for each in result.repeats} for repeat in repeats),
        weights_equal=sum(repeat.weights_sha256 in {each.weights_sha256 for each in result.repeats} for repeat in repeats),
        facts=changed_facts(result.facts, facts),
        fewer=fewer,
    )


def bands_of(result: PublishedResult) -> Bands:
    try:
        bands: Bands = contract.decode(Bands, result.config["run"]["bands"], "config.run.bands")
    except (SpecError, KeyError, TypeError) as error:
        raise RecordRefused(f"the bands of result {result.result_id} cannot be read by this version: {error}") from error
    missing = [name for name in ("loss", "throughput", "memory") if getattr(bands, name) is None]
    if missing or (bands.evaluation is None and result.repeats[0].evaluation):
        raise RecordRefused(
            f"result {result.result_id} stated no band of {', '.join(missing) or 'evaluation'} before it ran, so a rerun cannot be judged. "
            "Compare the runs themselves: omnilaunch compare"
        )
    return bands


def judge_repeat(result: PublishedResult, repeat: Repeat, bands: Bands) -> tuple[float, Level, str]:
    """(largest relative change of the mean loss of a tenth of the steps, level, limit)."""
    if repeat.rows_sha256 in {each.rows_sha256 for each in result.repeats}:
        return 0.0, Level.EQUAL, ""
    change, level, limit = judge_losses(result.repeats[0].windows, repeat.windows, (), bands.loss)
    return float("inf") if change is None else change, level, limit


def judge_figures(result: PublishedResult, repeats: Sequence[Repeat], bands: Bands) -> tuple[Figure, ...]:
    """By the medians."""
    now, found = summarise(repeats), []
    for key, then in result.summary.items():
        name, unit, worse, scale = JUDGED.get(key, (key.removeprefix("evaluation."), "", 0, 1.0))
        if key not in JUDGED and not key.startswith("evaluation."):
            continue
        band: Any = getattr(bands, name) if key in JUDGED else bands.evaluation
        right = now[key].median / scale if key in now else None
        found.append(judge_figure(name, unit, then.median / scale, right, (), band, worse))
    return tuple(found)


def add_code_facts(facts: Mapping[str, str], *, data: str, lock: str, image: str, fingerprint: str) -> dict[str, str]:
    """The environment facts with those of code and data."""
    more = {"data": data, "lock": lock, "image": image, "code": fingerprint}
    return {**facts, **{key: value for key, value in more.items() if value}}


def with_all_facts(result: PublishedResult) -> PublishedResult:
    code = result.code
    facts = add_code_facts(result.facts, data=result.data_sha256, lock=code.lock_sha256, image=code.image_id, fingerprint=code.fingerprint)
    return replace(result, facts=facts)


# ------------------------------------------------------------------------------------------------------------------- text


def describe_reproduction(found: Reproduction, result: PublishedResult) -> str:
    count = len(found.repeats)
    lines = [f"result {found.result_id}, of {result.made_at[:10]}, commit {result.code.commit[:12]}", ""]
    lines.append(f"  {'':14} {'published':>12} {'now':>12} {'change':>9}")
    lines += [describe_figure(figure) for figure in found.figures]
    lines.append(f"  {'losses':14} {describe_losses(found)}")
    lines.append(
        f"  {'bitwise':14} rows identical in {found.rows_equal} of {count} repeats, final weights in {found.weights_equal} of {count}"
    )
    lines.append("")
    if found.facts:
        lines.append(f"  {plural(len(found.facts), 'difference')} in the environment, the code or the data:")
        lines += [f"    {key}: {then or 'missing'} -> {now or 'missing'}" for key, (then, now) in list(found.facts.items())[:MAX_LISTED]]
        lines += [f"    and {len(found.facts) - MAX_LISTED} more"] if len(found.facts) > MAX_LISTED else []
    else:
        lines.append(f"  all {len(result.facts)} values of the environment, the code and the data are the same")
    if is_unsteady(result):
        span = result.summary["samples_per_s"]
        speeds = f"{span.lowest:,.4g} to {span.highest:,.4g}"
        lines += ["", f"  the published speeds ({speeds}) vary more than the band: other work on that machine disturbed them"]
    fewer = f", from {count} repeats in place of {len(result.repeats)}: {found.fewer}" if found.fewer else ""
    lines += ["", f"verdict: {'reproduced' if found.reproduced else 'not reproduced'}{fewer}"]
    outside = [figure.name for figure in found.figures if figure.level is Level.OUTSIDE]
    outside += ["losses"] if found.losses is Level.OUTSIDE else []
    return "\n".join([*lines, *([f"  outside: {', '.join(outside)}"] if outside else [])])


def describe_figure(figure: Figure) -> str:
    left, right = (f"{value:,.4g}" if value is not None else "none" for value in (figure.left, figure.right))
    change = "" if figure.change is None else f"{figure.change:{'+.2%' if figure.unit else '+.4g'}}"
    judged = {Level.EQUAL: "equal", Level.WITHIN: f"within {figure.limit}"}.get(figure.level, f"OUTSIDE {figure.limit}")
    return f"  {figure.name.replace('_', ' '):14} {left:>12} {right:>12} {change:>9}  {figure.unit}  {judged}".rstrip()


def describe_losses(found: Reproduction) -> str:
    if found.losses is Level.EQUAL:
        return "bitwise identical in every repeat"
    level = "within" if found.losses is Level.WITHIN else "OUTSIDE"
    return f"the mean loss of a tenth of the steps differs by at most {found.loss_change:.3%}, {level} {found.loss_limit}"
