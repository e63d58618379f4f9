"""Help with "the loss does not fall": what the data and the recipe of a run are, and what stands out about them, in plain words.

Computed from a config and the report of the data check, both as plain data: those of a record may lack keys, or have any value.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from launcher.config.defaults import load_random_rate
from launcher.record.metrics import Curve
from launcher.record.reader import nested

RECIPES_FILE = "published_recipes.yaml"
SMALL_MODEL = 10**8  # parameters; no recipe was published for less
FEW_ANSWERS = 20  # of which a share says little
HALF, FEW_TRAINED, MANY_COPIES = 0.5, 0.01, 0.01  # shares from which, or up to which, something stands out
FAR = 10  # times a published learning rate
CHARACTERS = 6  # of an answer that one generated token holds at most, about
FLAT, FEW_STEPS = 0.98, 20  # mean loss of the last tenth of the steps over that of the first, and steps that are enough to say so

WITHIN = "within the question"  # as the trainer calls a form that no other question can be given

LARGEST = 2**53  # a count beyond it is a damaged record

Trains = Literal["lora", "projector", "model"]


@dataclass(frozen=True, kw_only=True)
class PublishedRecipe:
    """`families` of models, () = all that have no recipe of their own. `lr`: peak learning rate of AdamW."""

    name: str
    families: tuple[str, ...]
    trains: Trains
    lr: float
    source: str


@cache
def load_recipes() -> tuple[PublishedRecipe, ...]:
    import yaml

    rows = yaml.safe_load(Path(__file__).with_name(RECIPES_FILE).read_text(encoding="utf-8"))
    return tuple(PublishedRecipe(**{**row, "families": tuple(row["families"])}) for row in rows)


def describe_learning(config: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(name, value) of what decides how a run learns. Empty without a report of the data."""
    facts, summary = nested(data, "learning"), nested(data, "summary")
    if not isinstance(facts, dict) or not count_of(facts, "answers"):
        return ()
    lengths = [f"{count_of(facts, f'characters_{name}'):,}" for name in ("p50", "p95", "max")]
    rows = {
        "answers": f"{count_of(facts, 'answers'):,}, {count_of(facts, 'distinct'):,} different; {'; '.join(list_common(facts))}",
        "characters": f"of an answer: p50 {lengths[0]}, p95 {lengths[1]}, longest {lengths[2]}",
        "trained": describe_trained(summary if isinstance(summary, dict) else {}),
        "duplicates": describe_duplicates(facts),
        "questions": describe_image_forms(facts),
        "lr": describe_rate(config),
    }
    return tuple((name, text) for name, text in rows.items() if text)


def list_common(facts: Mapping[str, Any]) -> Iterator[str]:
    total = count_of(facts, "answers")
    common = facts.get("common")
    for answer in common if isinstance(common, (list, tuple)) else ():
        if isinstance(answer, dict):
            yield f"{percent(count_of(answer, 'count') / total)} {answer.get('text')!r:.80}"


def describe_duplicates(facts: Mapping[str, Any]) -> str:
    repeated, shared, images = (count_of(facts, name) for name in ("repeated_rows", "shared_rows", "shared_images"))
    parts = (
        f"{repeated:,} training rows are copies of another one" * bool(repeated),
        f"{shared:,} held-out rows are training rows too" * bool(shared),
        f"{images:,} images are in training rows and in held-out rows" * bool(images),
    )
    return "; ".join(filter(None, parts)) or "none"


def describe_image_forms(facts: Mapping[str, Any]) -> str:
    """Where images are, and by which form a trained model will be asked if there are several."""
    forms = forms_of(facts)
    listed = "; ".join(f"{count:,} images {form}" if len(forms) > 1 else f"images {form}" for form, count in forms.items())
    usable = next((form for form in forms if form != WITHIN), "")
    return f"{listed}; infer and serve put them {usable}" if len(forms) > 1 and usable else listed


def forms_of(facts: Mapping[str, Any]) -> dict[str, int]:
    forms = facts.get("image_forms")
    return {str(form)[:80]: count_of(forms, form) for form in forms if count_of(forms, form)} if isinstance(forms, dict) else {}


def describe_trained(summary: Mapping[str, Any]) -> str:
    trained, tokens = count_of(summary, "trained_tokens"), count_of(summary, "tokens")
    return f"{percent(trained / tokens)} of {tokens:,} tokens are in the loss" if trained and tokens else ""


def describe_rate(config: Mapping[str, Any]) -> str:
    rate = number_of(nested(config, "stage", "optimizer", "lr"))
    if rate is None or nested(config, "stage", "kind") not in (None, "train"):
        return ""
    published = [f"{recipe.lr:g} ({recipe.name})" for recipe in find_recipes(config)]
    if published:
        return f"{rate:g}; published: {', '.join(published)}"
    if is_random(config):
        usual = load_random_rate()
        return f"{rate:g}; random weights: a rate of {usual.low:g} to {usual.high:g} is usual here"
    return f"{rate:g}; no recipe was published for a model of this size"


# ----------------------------------------------------------------------------------------------------------- what stands out


def find_standouts(config: Mapping[str, Any], data: Mapping[str, Any], curve: Curve | None = None) -> tuple[str, ...]:
    """One sentence each. None of them must be wrong, but each can be why a loss does not fall, or a score says nothing."""
    facts, summary = (found if isinstance(found := nested(data, name), dict) else {} for name in ("learning", "summary"))
    return (
        *of_answers(config, facts),
        *of_tokens(summary),
        *of_rows(data, facts),
        *of_rate(config),
        *of_sides(config, facts),
        *of_curve(curve),
    )


def of_answers(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    answers, common = count_of(facts, "answers"), facts.get("common")
    first = common[0] if isinstance(common, (list, tuple)) and common and isinstance(common[0], dict) else {}
    if answers >= FEW_ANSWERS and count_of(first, "count") / answers >= HALF:
        share, text = percent(count_of(first, "count") / answers), f"{first.get('text')!s:.80}"
        yield f"{share} of the answers are {text!r}: a model that always says so is right that often"
    limit, half = number_of(nested(config, "run", "evaluation", "max_new_tokens")) or 0, count_of(facts, "characters_p50")
    if limit and nested(config, "run", "evaluation", "enabled") and half > CHARACTERS * limit:
        yield (
            f"half of the answers have {half:,} characters or more, but an evaluation generates run.evaluation.max_new_tokens={limit:g} tokens: "
            "exact_match stays low"
        )


def of_tokens(summary: Mapping[str, Any]) -> Iterator[str]:
    trained, tokens, images = (count_of(summary, name) for name in ("trained_tokens", "tokens", "image_tokens"))
    if trained and tokens and trained / tokens < FEW_TRAINED:
        yield f"{percent(trained / tokens)} of the tokens are trained: the answers are short, and {percent(images / tokens)} are image tokens"


def of_rows(data: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    rows = count_of(data, "train_rows")
    if rows and count_of(facts, "repeated_rows") / rows >= MANY_COPIES:
        yield f"{percent(count_of(facts, 'repeated_rows') / rows)} of the training rows are exact copies of another one"
    shared, images = count_of(facts, "shared_rows"), count_of(facts, "shared_images")
    if shared:
        yield f"{shared:,} held-out rows are training rows too: their score says what the model remembers"
    elif images:
        yield f"{images:,} images are both in training rows and in held-out rows"


def of_rate(config: Mapping[str, Any]) -> Iterator[str]:
    rate, recipes, trains = number_of(nested(config, "stage", "optimizer", "lr")), find_recipes(config), nested(config, "stage", "kind")
    own = nested(config, "data", "builtin") == ""  # a built-in set is for trying a config, with the rates of conf/stage
    if (
        rate
        and own
        and not recipes
        and trains == "train"
        and is_random(config)
        and not (usual := load_random_rate()).low <= rate <= usual.high
    ):
        yield f"the learning rate is {rate:g}: the weights are random, and {usual.low:g} to {usual.high:g} is usual for these (stage.optimizer.lr)"
    if not rate or not recipes:
        return
    high, low = (choose(recipes, key=lambda recipe: recipe.lr) for choose in (max, min))
    if rate >= FAR * high.lr:
        yield f"the learning rate is {rate:g}, {rate / high.lr:,.0f} × the published recipe ({high.lr:g}, {high.name})"
    elif rate <= low.lr / FAR:
        yield f"the learning rate is {rate:g}, 1/{low.lr / rate:,.0f} of the published recipe ({low.lr:g}, {low.name})"


def is_random(config: Mapping[str, Any]) -> bool:
    return nested(config, "model", "source", "kind") == "random" and not nested(config, "stage", "checkpoint")


def of_sides(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[str]:
    sided = count_of(facts, "sided_rows")
    if sided and number_of(nested(config, "data", "augmentation", "flip")):
        yield f"{sided:,} training rows speak of left or right, which data.augmentation.flip turns round"


def of_curve(curve: Curve | None) -> Iterator[str]:
    if curve is None or len(curve.loss) < FEW_STEPS:
        return
    part = len(curve.loss) // 10
    first, last = (sum(losses) / part for losses in (curve.loss[:part], curve.loss[-part:]))
    if last >= FLAT * first:
        yield f"the loss did not fall: {first:.4g} in the first tenth of the steps, {last:.4g} in the last"


def find_recipes(config: Mapping[str, Any]) -> tuple[PublishedRecipe, ...]:
    """Of the model's family, else those of all others; () for a small model, and for a stage that does not train."""
    stage, family = nested(config, "stage"), nested(config, "model", "family")
    parameters = number_of(nested(config, "model", "parameters", "total")) or 0
    if not isinstance(stage, dict) or stage.get("kind") != "train" or parameters < SMALL_MODEL:
        return ()
    trains: Trains = "lora" if stage.get("lora") else "projector" if stage.get("trainable") in (["projector"], ("projector",)) else "model"
    fitting = [recipe for recipe in load_recipes() if recipe.trains == trains]
    own = tuple(recipe for recipe in fitting if family in recipe.families)
    return own or tuple(recipe for recipe in fitting if not recipe.families)


# ------------------------------------------------------------------------------------------------------------------- numbers


def number_of(value: Any) -> float | None:
    """None for what is not a number, NaN, and what no setting can be."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST else None


def count_of(data: Mapping[str, Any], key: str) -> int:
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST else 0


def percent(share: float) -> str:
    """With one decimal below 10 %."""
    return f"{100 * share:.0f} %" if share >= 0.0995 or not share else f"{100 * share:.1f} %"
