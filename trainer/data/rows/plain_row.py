"""Rows without messages: questions and answers under keys of their own, pairs, and images with a caption."""

import json
from collections import Counter
from dataclasses import replace

from trainer.data.rows.adjustment import shorten_texts
from trainer.data.rows.message.turn import pair, read_system, read_turns
from trainer.data.rows.parsed_row import SUFFIXES, AddProblem, ImageReference, ParsedRow, Row
from trainer.data.rows.row_images import IMAGE_KEYS, choose_images, read_images

QUESTION = "Describe the image."  # LLaVA's pre-training asks this and ten other ways of saying it
ASKED, MOST_FREQUENT = "caption, with data.question as its question", "most frequent of several answers, taken as the answer"


def read_pairs(row: Row, add_problem: AddProblem, *, key: str, asked: str) -> ParsedRow:
    """[{"human": question, "assistant": answer}, ...]; `asked`: the key of a question. A list of messages is read as such, as ms-swift does."""
    pairs = row[key]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(item, dict) for item in pairs):
        add_problem(key, "is not a list of questions and answers", f'write [{{"{asked}": "...", "assistant": "..."}}]')
        return ParsedRow(field=key, turns=None, images=read_images(row, add_problem))
    if all(has_message_keys(item) for item in pairs):
        turns, in_blocks = read_turns(row, key, add_problem)
        images = choose_images(in_blocks, read_images(row, add_problem), add_problem)
        return ParsedRow(
            field=key, turns=read_system(row, turns, add_problem), images=images, adjustments=(f"key {key!r} read as messages",)
        )
    fields = [(f"{key}[{index}].{asked}", f"{key}[{index}].assistant") for index in range(len(pairs))]
    read = [pair(item.get(asked), item.get("assistant"), names, add_problem) for item, names in zip(pairs, fields, strict=True)]
    turns = tuple(turn for turns in read if turns for turn in turns) if all(read) else None
    return ParsedRow(field=key, turns=read_system(row, turns, add_problem), images=read_images(row, add_problem))


def has_message_keys(item: Row) -> bool:
    """Whether it is one message, with a role, and not a pair of ms-swift."""
    return not {"human", "assistant"} & item.keys() and bool({"from", "role"} & item.keys())


def read_instruction(row: Row, add_problem: AddProblem) -> ParsedRow:
    """LLaMA-Factory joins instruction and input with a line feed."""
    question, more = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n{more}" if question else more
    elif more not in (None, ""):
        question = more  # not a string: reported by `pair`
    return read_pair(row, "instruction", question, "output", add_problem)


def read_pair(
    row: Row, question_key: str, question: object, answer_key: str, add_problem: AddProblem, *, file_name: bool = False
) -> ParsedRow:
    """A question and an answer under keys of their own, after the pairs of `history`. `file_name`: the image may be under this key."""
    images = read_images(row, add_problem) or (read_file_name(row) if file_name else ())
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(item, list) and len(item) == 2 for item in history):
        add_problem("history", "is not a list of pairs", 'write [["question", "answer"], ...]')
        return ParsedRow(field=question_key, turns=None, images=images)
    past = [(item[0], item[1], (f"history[{index}][0]", f"history[{index}][1]")) for index, item in enumerate(history)]
    pairs = (*past, (question, row.get(answer_key), (question_key, answer_key)))
    read = [pair(first, second, fields, add_problem) for first, second, fields in pairs]
    turns = tuple(turn for turns in read if turns for turn in turns) if all(read) else None
    return ParsedRow(field=question_key, turns=read_system(row, turns, add_problem), images=images)


def read_question(row: Row, add_problem: AddProblem) -> ParsedRow:
    """{"question", "answer"} of sets for visual questions. TextVQA and DocVQA have a list of answers instead: the most frequent one is learned."""
    answers = row.get("answers")
    if row.get("answer") is None and isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers):
        row = {**row, "answer": Counter(answers).most_common(1)[0][0]}
        parsed = read_pair(row, "question", row["question"], "answer", add_problem, file_name=True)
        return replace(parsed, adjustments=(MOST_FREQUENT,)) if len(set(answers)) > 1 else parsed
    return read_pair(row, "question", row["question"], "answer", add_problem, file_name=True)


def read_prompt(row: Row, add_problem: AddProblem) -> ParsedRow:
    """TRL's prompt and completion, as texts or as lists of messages, of which only the completion is learned."""
    answer_key = next((key for key in ("completion", "response") if key in row), "answer")
    if not isinstance(row["prompt"], list):
        return read_pair(row, "prompt", row["prompt"], answer_key, add_problem, file_name=True)
    asked, first = read_turns(row, "prompt", add_problem)
    said, second = read_turns(row, answer_key, add_problem)
    images = choose_images((*first, *second), read_images(row, add_problem), add_problem)
    if asked is None or said is None:
        return ParsedRow(field="prompt", turns=None, images=images)
    context = tuple(replace(turn, in_loss=False) if turn.role == "assistant" else turn for turn in asked)
    return ParsedRow(field="prompt", turns=read_system(row, (*context, *said), add_problem), images=images)


def read_caption(row: Row, add_problem: AddProblem, *, key: str) -> ParsedRow:
    """Its question is empty: see `ask`. `file_name` is the key of the image in the folders of the datasets library."""
    images = read_images(row, add_problem) or read_file_name(row)
    turns = pair("", row[key], (key, key), add_problem)
    return ParsedRow(field=key, turns=read_system(row, turns, add_problem), images=images)


def read_file_name(row: Row) -> tuple[ImageReference, ...]:
    name = row.get("file_name")
    return (ImageReference(name=name, field="file_name"),) if isinstance(name, str) and name.lower().endswith(SUFFIXES) else ()


def has_image(row: Row) -> bool:
    return any(row.get(key) for key in IMAGE_KEYS) or bool(read_file_name(row))


def ask(parsed: ParsedRow, question: str, add_problem: AddProblem) -> ParsedRow:
    """A caption with `question` before it. '' is a problem, whose fix shows the row rewritten."""
    turns = parsed.turns or ()
    if not question:
        names = [image.name for image in parsed.images]
        caption = "".join(turn.content for turn in turns if turn.role == "assistant")
        row = {"image": names[0] if len(names) == 1 else names, "query": f"<image>\n{QUESTION}", "response": caption}
        rewritten = json.dumps(shorten_texts(row), ensure_ascii=False, default=str)
        add_problem(parsed.field, "a caption without a question", f"set data.question={QUESTION!r} for all of them, or write {rewritten}")
        return replace(parsed, turns=None)
    asked = tuple(replace(turn, content=question) if turn.role == "user" else turn for turn in turns)
    return replace(parsed, turns=asked, adjustments=(*parsed.adjustments, ASKED))
