"""Keys of rows, messages and blocks: those that are read, those that change nothing, and those that would change what is learned.

Any other key is ignored and counted. A value that is null or empty is no value.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.rows.message.loss_flag import FLAGS
from trainer.data.rows.message.reasoning import BLOCK_KEYS, KEYS as REASONING_KEYS
from trainer.data.rows.message.role import find_role
from trainer.data.rows.message.tool import TOOL_KEYS
from trainer.data.rows.message.turn import PATH_KEYS
from trainer.data.rows.parsed_row import SUFFIXES, AddProblem, ParsedRow, Row, printable, shorten

LOOKED_AT = 8  # paths of a list
SHOWN = 60  # characters of a key

# ------------------------------------------------------------------------------------------------- keys that change nothing

HARMLESS = frozenset({
    "id", "ids", "_id", "uid", "uuid", "guid", "idx", "index", "row_id", "sample_id", "item_id", "data_id", "question_id", "image_id",
    "conversation_id", "conv_id", "dialog_id", "doc_id", "message_id", "session_id", "task_id", "timestamp", "date", "created",
    "created_at", "create_time", "author", "annotator", "source", "sources", "dataset", "dataset_name", "data_source", "datasource",
    "origin", "license", "licence", "citation", "metadata", "meta", "meta_data", "meta_info", "info", "extra_info", "comment", "notes",
    "version", "tags", "task", "task_type", "task_name", "type", "category", "categories", "subcategory", "subject", "topic", "domain",
    "language", "lang", "width", "height", "image_width", "image_height", "image_size", "length", "num_tokens", "num_turns", "token_count",
    "n_tokens", "model", "model_name", "difficulty",
})  # fmt: skip
# Beside the keys of a format's texts (trainer.data.rows.row_format).
READ_IN_ROW = frozenset({"image", "images", "system", "answers", "objects", *TOOL_KEYS})
READ_IN_MESSAGE = frozenset(
    {
        "from",
        "value",
        "role",
        "content",
        "tool_calls",
        "function_call",
        "tool_call_id",
        "human",
        "user",
        "assistant",
        *FLAGS,
        *REASONING_KEYS,
    }
)
READ_IN_BLOCK = frozenset({"type", *PATH_KEYS, *BLOCK_KEYS})

# --------------------------------------------------------------------------------------- keys that change what is learned


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """`when`: for which values."""

    problem: str
    fix: str
    when: Callable[[Any], bool] = bool


def is_false(value: Any) -> bool:
    return value is False


def is_not_one(value: Any) -> bool:
    return isinstance(value, int | float) and value != 1


def is_setting(value: Any) -> bool:
    return bool(value) and value != "auto"


OTHER_MEDIA = Refusal(problem="only images are supported", fix="remove the row, or give frames of it as images")
PREFERENCE = Refusal(problem="preference data is not supported", fix="give one answer for each question")
BAD_ANSWER = Refusal(problem="false marks an answer that must not be learned", fix="remove the row, or give a good answer", when=is_false)
NOT_TRAINED = Refusal(problem="false excludes the whole row from the loss", fix="remove the row", when=is_false)
ROW_WEIGHT = Refusal(
    problem="weights of rows are not supported",
    fix="remove the key; a meta file with repeat_time uses a set several times",
    when=is_not_one,
)
ROW_SETTING = Refusal(problem="settings of a single row are not supported", fix="remove them, and set data.max_pixels for all images")
IMAGE_SETTING = Refusal(
    problem="settings of a single image are not supported",
    fix="remove the key; data.max_pixels or data.max_tiles limits all images",
    when=is_setting,
)
IN_THE_ROW = Refusal(problem="images of a message are read from its content or from the row", fix="move them to images of the row")
SPAN = Refusal(problem="only a whole answer can be excluded from the loss", fix='remove the key, or write "loss": false')
UNCLEAR = Refusal(
    problem="does not say whether 1 is learned or left out", fix='write "loss": true or "loss": false', when=lambda value: True
)
CHANNEL = Refusal(
    problem="an answer of this channel is not what the model says",
    fix="write it as reasoning_content of the answer that follows, and remove the key",
    when=lambda value: value not in ("final", ""),
)

MEDIA_KEYS = (
    *("video", "videos", "audio", "audios", "video_path", "video_paths", "audio_path", "audio_paths", "video_url", "audio_url"),
    *("video_file", "audio_file", "video_files", "audio_files"),
)
# modelscope/ms-swift: swift/llm/dataset/preprocessor/core.py, and its documents of RLHF and KTO; hiyouga/LLaMA-Factory: data/README.md.
# max_pixels and the like: qwen_vl_utils.
PIXEL_KEYS = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "fps", "nframes", "max_dynamic_patch")
PAIR_KEYS = tuple(
    f"{prefix}_{name}"
    for prefix in ("chosen", "rejected", "positive", "negative")
    for name in ("messages", "images", "videos", "audios", "tools", "objects", "response", "answer", "conversations")
)
REFUSED_IN_ROW = {
    **dict.fromkeys(MEDIA_KEYS, OTHER_MEDIA),
    **dict.fromkeys(("chosen", "rejected", "margin", *PAIR_KEYS), PREFERENCE),
    **dict.fromkeys(("label", "kto_tag", "kto_label"), BAD_ANSWER),
    **dict.fromkeys(("loss", "train", "trainable", "learnable"), NOT_TRAINED),
    **dict.fromkeys(("weight", "sample_weight", "loss_weight", "loss_scale"), ROW_WEIGHT),
    **dict.fromkeys(("chat_template_kwargs", *PIXEL_KEYS), ROW_SETTING),
}
REFUSED_IN_MESSAGE = {
    **dict.fromkeys(MEDIA_KEYS, OTHER_MEDIA),
    **dict.fromkeys(("image", "images"), IN_THE_ROW),
    **dict.fromkeys(("chosen", "rejected"), PREFERENCE),
    **dict.fromkeys(("label", "kto_tag"), BAD_ANSWER),
    **dict.fromkeys(("train_detail", "training_detail"), SPAN),
    **dict.fromkeys(("mask", "loss_mask"), UNCLEAR),
    "channel": CHANNEL,
    "tools": Refusal(problem="tools of a message are not supported", fix="move them to tools of the row"),
}
REFUSED_IN_BLOCK = dict.fromkeys(("detail", *PIXEL_KEYS), IMAGE_SETTING)

KNOWN_IN_ROW = READ_IN_ROW | HARMLESS
KNOWN_IN_MESSAGE = READ_IN_MESSAGE | HARMLESS
KNOWN_IN_BLOCK = READ_IN_BLOCK | HARMLESS


# Keys, in any case, under which other data has its images, and the keys here.
IMAGE_MEANT = {
    "image": "image", "img": "image", "picture": "image", "photo": "image", "image_path": "image", "img_path": "image", "image_file": "image",
    "images": "images", "imgs": "images", "pictures": "images", "photos": "images", "image_paths": "images",
}  # fmt: skip


def refuse_keys(row: Row, add_problem: AddProblem) -> None:
    """Keys of a row that would change what is learned, whatever its format."""
    for key in row.keys() - KNOWN_IN_ROW:
        if (refusal := REFUSED_IN_ROW.get(key)) and refusal.when(row[key]):
            add_problem(key, refusal.problem, refusal.fix)


# ------------------------------------------------------------------------------------------------- keys that nothing reads


def check_keys(row: Row, known: frozenset[str], parsed: ParsedRow, folders: tuple[Path, ...], add_problem: AddProblem) -> tuple[str, ...]:
    """The keys that are ignored, as paths without numbers. `known`: of the row's format, with HARMLESS. Reports those of messages and blocks that
    would change what is learned, and those of a row that name an image file which is not read. `folders`: where a relative path may start."""
    ignored: dict[str, None] = {}
    for key in filled(row, known):
        if (refusal := REFUSED_IN_ROW.get(key)) and refusal.when(row[key]):
            continue  # reported by `refuse_keys`
        if not parsed.images and is_image_key(key, row):
            continue  # reported by trainer.data.rows.row_check.check_image_key
        if path := find_unread_image(row[key], parsed, folders):
            add_problem(key, f"{path!r} is an image file that is not read from this key", advise(parsed, row[key]))
        else:
            ignored[name_of(key)] = None
    messages = [parsed.field, "completion"] if parsed.field == "prompt" else [parsed.field]
    for field, name, item, usual, refused in (found for key in messages for found in walk(row.get(key), key)):
        for key in filled(item, usual):
            refusal = refused.get(key)
            if refusal and refusal.when(item[key]):
                add_problem(f"{field}.{key}", refusal.problem, refusal.fix)
            else:
                ignored[f"{name}.{name_of(key)}"] = None
    return tuple(ignored)


def name_of(key: str) -> str:
    return printable(shorten(key, SHOWN))


def filled(item: Row, known: frozenset[str]) -> Iterator[str]:
    unknown = item.keys() - known
    return (key for key in item if key in unknown and not is_empty(item[key])) if unknown else iter(())


def is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, list | tuple) and all(map(is_empty, value)))


def walk(items: Any, key: str) -> Iterator[tuple[str, str, Row, frozenset[str], dict[str, Refusal]]]:
    """(field, the same without numbers, object, its known keys, refused keys) of messages and blocks with more than two keys."""
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if not isinstance(item, dict):
            continue
        if len(item) > 2:
            yield f"{key}[{index}]", f"{key}[]", item, known_in_message(item), REFUSED_IN_MESSAGE
        for text_key in ("content", "value"):
            if isinstance(blocks := item.get(text_key), list):
                yield from walk_blocks(blocks, f"{key}[{index}].{text_key}", f"{key}[].{text_key}")


def walk_blocks(blocks: Iterable[Any], field: str, name: str) -> Iterator[tuple[str, str, Row, frozenset[str], dict[str, Refusal]]]:
    for number, block in enumerate(blocks):
        if isinstance(block, dict):
            yield f"{field}[{number}]", f"{name}[]", block, KNOWN_IN_BLOCK, REFUSED_IN_BLOCK
            for key in PATH_KEYS:
                if isinstance(inner := block.get(key), dict):  # OpenAI's {"image_url": {"url": ..., "detail": ...}}
                    yield f"{field}[{number}].{key}", f"{name}[].{key}", inner, KNOWN_IN_BLOCK | {"bytes"}, REFUSED_IN_BLOCK


def known_in_message(item: Row) -> frozenset[str]:
    """With the name of the tool that a result is from."""
    role = find_role(item.get("role", item.get("from")))
    return KNOWN_IN_MESSAGE | {"name"} if role is not None and role.role == "tool" else KNOWN_IN_MESSAGE


# ------------------------------------------------------------------------------------------------------- images elsewhere


def is_image_key(key: str, row: Row) -> bool:
    """Whether it is another name of image or images, in a row without these."""
    return (
        key.lower() in IMAGE_MEANT
        and bool(row[key])
        and isinstance(row[key], str | list)
        and not row.get("image")
        and not row.get("images")
    )


def find_unread_image(value: Any, parsed: ParsedRow, folders: tuple[Path, ...]) -> str:
    """The first path of an image file that exists and is none of the row's images; ''."""
    for path in value[:LOOKED_AT] if isinstance(value, list) else (value,):
        if isinstance(path, str) and path.lower().endswith(SUFFIXES) and (found := find_file(path, folders)):
            used = {folder / image.name for image in parsed.images if isinstance(image.name, str) for folder in folders}
            if found not in used:
                return path
    return ""


def find_file(path: str, folders: tuple[Path, ...]) -> Path | None:
    try:
        return next((folder / path for folder in folders if (folder / path).is_file()), None)
    except (OSError, ValueError):  # too long for a file name
        return None


def advise(parsed: ParsedRow, value: Any) -> str:
    if parsed.images:
        return "add it to images, with an <image> mark at its position in a question; or remove the key"
    return f"rename the key to {'images' if isinstance(value, list) else 'image'}, or remove it"
