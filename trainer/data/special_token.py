"""Special tokens of the model in the texts of a row: the tokenizer makes control tokens of them, not text."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from trainer.contract import DataProblem, Template
from trainer.data.rows.parsed_row import MARK
from trainer.data.rows.sample import Sample

TOKEN = re.compile(r"<\|[^|<>\s]+\|>|<[^<>{}\s]{1,20}>")
# Tokens that rows write on purpose: places in an image, calls of tools, thoughts.
MEANT = re.compile(r"box|ref|quad|point|object|tool|think", re.IGNORECASE)
# Tokens that divide a conversation or stand for media. Others, such as <pad> and <unk>, change one place of the text.
DIVIDING = re.compile(r"im_start|im_end|endoftext|eot|turn|header|vision|image|video|audio|img|slice", re.IGNORECASE)
WARNING = "special token of the model in a text"


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """`refused`: those that are a problem of the row; `counted`: the others. `pattern`: any of them; None without one. `angled`: all of them start
    with <, so that most texts need no search."""

    refused: frozenset[str]
    counted: frozenset[str]
    pattern: re.Pattern[str] | None
    angled: bool

    def find(self, sample: Sample) -> tuple[tuple[DataProblem, ...], tuple[str, ...]]:
        """The problems of a sample, one for each token and message, and what is counted."""
        problems: list[DataProblem] = []
        counted: dict[str, None] = {}
        for number, message in enumerate(sample.messages if self.pattern else (), start=1):
            text = f"{message.reasoning}{message.content}" if message.reasoning else message.content
            if self.angled and "<" not in text:
                continue
            for token in dict.fromkeys(self.pattern.findall(text) if self.pattern else ()):
                if token in self.refused:
                    problems.append(describe(sample, f"message {number} ({message.role})", token))
                else:
                    counted[f"{WARNING}: {token}"] = None
        return tuple(problems), tuple(counted)


def describe(sample: Sample, where: str, token: str) -> DataProblem:
    problem = f"{where} contains {token!r}, a special token of the model, which is read as a mark, not as text"
    fix = "remove it: the template adds its own marks; or write it differently"
    return DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix)


@lru_cache(maxsize=8)  # called for every chunk of rows
def tokens_of_template(template: Template, image_token: str) -> SpecialTokens:
    """Those that the template writes, without its end mark (trainer.data.sample_check.find_end_marks). Needs no tokenizer."""
    texts = (template.system, template.user, template.assistant_open, template.end_mark, template.separator)
    found = {token for text in texts for token in TOKEN.findall(text)}
    return make_tokens(found, frozenset(), template, image_token)


def tokens_of_tokenizer(tokenizer: Any, template: Template, image_token: str) -> SpecialTokens:
    """Its special tokens, without those that rows write on purpose."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())} | {token.content for token in added if token.special}
    ends = {getattr(tokenizer, name, None) for name in ("bos_token", "eos_token")}
    usual = {token for token in special if token and (token in ends or not MEANT.search(token))}
    refused = {token for token in usual if token in ends or DIVIDING.search(token)}
    return make_tokens(refused, frozenset(usual - refused), template, image_token)


def make_tokens(refused: set[str], counted: frozenset[str], template: Template, image_token: str) -> SpecialTokens:
    others = {MARK, image_token, template.end_mark.strip(), ""}
    refused, counted = refused - others, counted - others
    tokens = sorted(refused | counted, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
    return SpecialTokens(
        refused=frozenset(refused), counted=counted, pattern=pattern, angled=all(token.startswith("<") for token in tokens)
    )
