"""How images are joined to questions: found in the training rows, and repeated where a question comes without marks."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from trainer.contract import ImageForm
from trainer.data.rows.parsed_row import MARK

NAMES = {"": "nothing", "\n": "a line feed", " ": "a space", "\n\n": "two line feeds"}
WITHIN = "within the question"


def find_form(question: str) -> ImageForm | None:
    """None without an image, without text, and where text is on both sides of an image."""
    if MARK not in question:
        return None
    before, *gaps, after = question.split(MARK)
    if any(map(str.strip, gaps)) or bool(before.strip()) == bool(after.strip()):
        return None
    between = gaps[0] if gaps else ""
    if after.strip():
        return ImageForm(place="before", separator=after[: len(after) - len(after.lstrip())], between=between)
    return ImageForm(place="after", separator=before[len(before.rstrip()) :], between=between)


def join_images(question: str, images: int, form: ImageForm) -> str:
    """The text with a MARK for each of `images`."""
    marks = form.between.join((MARK,) * images)
    return f"{marks}{form.separator}{question}" if form.place == "before" else f"{question}{form.separator}{marks}"


def as_trained(question: str, form: ImageForm) -> str:
    """A question that was sent in parts, in the form of the training rows, if they were counted and its images are all on one side of it."""
    found = find_form(question)
    if found is None or not form.counted:
        return question
    text = question.rpartition(MARK)[2].lstrip() if found.place == "before" else question.partition(MARK)[0].rstrip()
    return join_images(text, question.count(MARK), form)


def most_frequent(questions: Iterable[str]) -> ImageForm | None:
    """The form of most of the questions with images; of equally frequent ones the first. None if no question has one."""
    forms = count_forms(questions)
    known = [(form, count) for form, count in forms.items() if form is not None]
    sides: Counter[tuple[str, str]] = Counter()
    for form, count in known:
        sides[form.place, form.separator] += count
    if not sides:
        return None
    (place, separator), most = sides.most_common(1)[0]
    # A single image says nothing about what is between two, and `find_form` then says ''.
    gaps = Counter({form.between: count for form, count in known if (form.place, form.separator) == (place, separator) and form.between})
    found = next(form for form, _ in known if (form.place, form.separator) == (place, separator))
    return replace(found, between=gaps.most_common(1)[0][0] if gaps else "", questions=most, counted=sum(forms.values()))


def count_forms(questions: Iterable[str]) -> Counter[ImageForm | None]:
    """Of the questions with text and images. None: text is on both sides of an image."""
    texts = (question for question in questions if MARK in question and question.replace(MARK, "").strip())
    return Counter(map(find_form, texts))


def name_form(question: str) -> str:
    """Where its images are, in words; '' for a question without text or images."""
    (form,) = count_forms([question]) or ("",)
    return describe_side(form) if form else WITHIN if form is None else ""


def describe_side(form: ImageForm) -> str:
    name = NAMES.get(form.separator, repr(form.separator))
    return f"before the question, followed by {name}" if form.place == "before" else f"after the question, preceded by {name}"


def describe(form: ImageForm) -> str:
    """One sentence, for the start of a stage that answers."""
    why = (
        "as in the training rows" if form.questions == form.counted else f"as in {form.questions:,} of {form.counted:,} training questions"
    )
    between = f", with {NAMES.get(form.between, repr(form.between))} between two of them" if form.between else ""
    return (
        f"images are put {describe_side(form)}{between}, {why if form.counted else 'since these weights have no record of training rows'}"
    )


# --------------------------------------------------------------------------------------------------------- data.image_place


def place_images(question: str, place: str) -> str:
    """The text of a training question, with as many marks as before. The same rows are read otherwise by the code of their owners:

    row    as it is written
    front  the marks at the beginning, each on a line of its own, as haotian-liu/LLaVA: llava/train/train.py, preprocess_multimodal
    bare   without white space around each image and text, as QwenLM/Qwen3-VL: qwen-vl-finetune/qwenvl/data/data_processor.py, _build_messages
    """
    return PLACES[place](question)


def put_first(question: str) -> str:
    """A question without an image stays as it is, as in the script of LLaVA."""
    text = question.replace(MARK, "").strip()
    return (f"{MARK}\n" * question.count(MARK) + text).strip() if MARK in question else question


def strip_parts(question: str) -> str:
    return MARK.join(map(str.strip, question.split(MARK)))


PLACES: dict[str, Callable[[str], str]] = {"row": str, "front": put_first, "bare": strip_parts}
MOVED = {
    "front": "questions whose images were put first, on lines of their own",
    "bare": "questions with white space around images and texts, removed",
}
