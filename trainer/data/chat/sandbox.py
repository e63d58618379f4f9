"""Run a chat template that somebody else wrote: in Jinja's sandbox as transformers does, with limits on loops, texts and numbers.

The environment is that of transformers 5.23 (utils/chat_template_utils.py): blocks are trimmed, loopcontrols, `tojson` without HTML escapes,
`raise_exception`, and `{% generation %}` around what an assistant writes. Jinja has no endless loop of its own, but nested loops, macros that call
each other and texts that grow in a loop take days: every loop, call of a macro and joined text is counted.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache, wraps
from typing import Any

MOST_STEPS = 300_000  # loops, calls, and CHARACTERS_A_STEP characters of a text; a conversation of 1,000 messages takes some 20,000
CHARACTERS_A_STEP = 256
MOST_CHARACTERS = 16 * 2**20  # of a rendered conversation, and of any text on the way
MOST_NUMBER = 10**6  # in a call, such as the width of a text
MOST_SECONDS = 20.0
BEGIN, END = "\U000f0210", "\U000f0211"  # around what `{% generation %}` encloses: private characters that no tokenizer has
FROZEN = datetime(2024, 7, 26, tzinfo=UTC)  # what strftime_now prints: the date that Llama 3.2's own template falls back to
LONG_WIDTH = re.compile(r"\d{6,}")
STEP, JOIN = "count_step_", "join_texts_"  # names of the functions that are put into a template
FILTERS_THAT_REPEAT = frozenset({"center", "indent", "replace", "join", "format", "wordwrap", "batch", "tojson", "string", "truncate"})


class TemplateRefused(Exception):
    """The template cannot be used for a conversation. The text says why, as the end of a sentence about the template."""


budget = threading.local()  # `steps` and `until` of the rendering that runs in a thread


def spend(steps: int = 1) -> str:
    """Raises TemplateRefused. '' so that a template can call it."""
    budget.steps = getattr(budget, "steps", 0) + steps
    if budget.steps > MOST_STEPS or time.monotonic() > getattr(budget, "until", math.inf):
        raise TemplateRefused("does not end: it takes more loops than any conversation needs")
    return ""


def spend_text(length: int) -> None:
    if length > MOST_CHARACTERS:
        raise TemplateRefused(f"makes a text of more than {MOST_CHARACTERS:,} characters")
    spend(1 + length // CHARACTERS_A_STEP)


def join_texts(*parts: Any) -> str:
    texts = [str(part) for part in parts]
    spend_text(sum(map(len, texts)))
    return "".join(texts)


def render(source: str, values: Mapping[str, Any], *, marks: bool = False) -> str:
    """The text. `marks`: with BEGIN and END around what `{% generation %}` encloses. Raises TemplateRefused."""
    from jinja2 import TemplateError

    template = compile_template(source)
    budget.steps, budget.until = 0, time.monotonic() + MOST_SECONDS
    pieces, size = [], 0
    try:
        for piece in template.generate(values):
            size += len(piece)
            if size > MOST_CHARACTERS:
                raise TemplateRefused(f"writes more than {MOST_CHARACTERS:,} characters")
            pieces.append(piece)
    except (TemplateError, *ERRORS) as error:
        raise TemplateRefused(describe(error)) from error
    text = "".join(pieces)
    return text if marks or BEGIN not in text else text.replace(BEGIN, "").replace(END, "")


# What the code of a template can raise, beside Jinja's own errors.
ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError, RuntimeError)


def describe(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "does not end: its macros call each other"
    text = str(error).strip().partition("\n")[0][:300] or type(error).__name__
    return f"cannot write this conversation: {text}"


@lru_cache(maxsize=16)
def compile_template(source: str) -> Any:
    """A jinja2.Template. Raises TemplateRefused for what is not Jinja."""
    from jinja2 import TemplateError

    environment = make_environment()
    try:
        tree = instrument(environment.parse(source))
        return environment.from_string(tree)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise TemplateRefused(f"is not valid Jinja{f' in line {line}' if line else ''}: {str(error)[:300]}") from error
    except ERRORS as error:
        raise TemplateRefused(f"is not valid Jinja: {type(error).__name__}") from error


def instrument(tree: Any) -> Any:
    """The same template, in which loops, macros and joined texts are counted."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def call(name: str, arguments: list[Any]) -> Any:
        return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)

    class Counted(NodeTransformer):
        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return call(JOIN, list(node.nodes))

        def visit_Macro(self, node: Any) -> Any:
            self.generic_visit(node)
            node.body.insert(0, nodes.Output([call(STEP, [])]))
            return node

        visit_For = visit_CallBlock = visit_Macro

    changed = Counted().visit(tree)
    changed.set_lineno(1)
    return changed


def make_environment() -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # Jinja's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("enclose"), [], [], body).set_lineno(line)

        def enclose(self, caller: Callable[[], str]) -> str:
            return f"{BEGIN}{caller()}{END}"

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            check_operands(operator, left, right)
            value = super().call_binop(context, operator, left, right)
            return counted(value)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            if function is spend:
                return spend()
            check_arguments(function, (*args, *kwargs.values()))
            return counted(super().call(context, function, *args, **kwargs))

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters.update({name: bounded(function) for name, function in environment.filters.items() if name in FILTERS_THAT_REPEAT})
    environment.filters["tojson"] = bounded(to_json)
    environment.globals.pop("lipsum")
    environment.globals.update({"raise_exception": raise_exception, "strftime_now": FROZEN.strftime, STEP: spend, JOIN: join_texts})
    return environment


def to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# --------------------------------------------------------------------------------------------------------------- limits


def counted(value: Any) -> Any:
    spend_text(len(value)) if isinstance(value, str | list | tuple) else spend()
    return value


def check_operands(operator: str, left: Any, right: Any) -> None:
    sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    numbers = [abs(side) for side in (left, right) if isinstance(side, int)]
    if operator == "*" and sizes and numbers:
        spend_text(sizes[0] * numbers[0])
    elif operator in ("*", "**") and len(numbers) == 2 and (max(numbers) > 10**18 or (operator == "**" and numbers[1] > 64)):
        raise TemplateRefused("computes a number that is too large")
    elif operator == "%" and isinstance(left, str):
        check_arguments(left, right if isinstance(right, tuple) else (right,))


def check_arguments(function: Any, arguments: tuple[Any, ...]) -> None:
    """Of a method of a text, and of a format: what they would make is not longer than MOST_CHARACTERS."""
    function = getattr(function, "__wrapped__", function)  # str.format, as the sandbox has it
    text = function if isinstance(function, str) else getattr(function, "__self__", None)
    if any(isinstance(each, int) and abs(each) > MOST_NUMBER for each in arguments):
        raise TemplateRefused(f"uses a number above {MOST_NUMBER:,}")
    if not isinstance(text, str):
        return
    if LONG_WIDTH.search(text) and ("%" in text or "{" in text):
        raise TemplateRefused("formats a text with a width that is too large")
    texts = [each for each in arguments if isinstance(each, str)]
    if len(texts) == 2 and getattr(function, "__name__", "") == "replace":
        spend_text((text.count(texts[0]) if texts[0] else len(text) + 1) * len(texts[1]))
    elif arguments and getattr(function, "__name__", "") == "join":
        spend_text(len(text) * len(arguments[0]) if hasattr(arguments[0], "__len__") else 0)


def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is not called with what would make too long a text."""

    @wraps(function)
    def apply(*args: Any, **kwargs: Any) -> Any:
        given = [each for each in (*args, *kwargs.values()) if isinstance(each, str | int)]
        if any(isinstance(each, int) and abs(each) > MOST_NUMBER for each in given):
            raise TemplateRefused(f"uses a number above {MOST_NUMBER:,}")
        texts = [each for each in given if isinstance(each, str)]
        if function.__name__ == "do_replace" and len(texts) >= 3:
            spend_text((texts[0].count(texts[1]) if texts[1] else len(texts[0]) + 1) * len(texts[2]))
        elif function.__name__ == "do_format" and texts and LONG_WIDTH.search(texts[0]):
            raise TemplateRefused("formats a text with a width that is too large")
        return counted(function(*args, **kwargs))

    return apply
