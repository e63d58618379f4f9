"""The chat template as Jinja, for the files of a checkpoint, so that servers build the same text as in training."""

from trainer.contract import Template

CONTENT = "{content}"
TEXT = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for part in content -%}{{ image_mark if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
"""
TURNS = """\
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{{ user_before }}{{ text(message['content']) }}{{ user_after }}
  {%- elif message['role'] == 'assistant' -%}{{ open }}{{ text(message['content']) }}{{ close }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ prompt }}{%- endif -%}"""


def chat_template(template: Template, image_token: str) -> str:
    """Produces the same text as trainer.data.chat.segment.frame. As there, a generation prompt ends without the spaces of `assistant_open`."""
    before, _, after = template.user.partition(CONTENT)
    values = {
        "image_mark": image_token,
        "user_before": before,
        "user_after": after,
        "open": template.assistant_open,
        "close": template.end_mark + template.separator,
        "prompt": template.assistant_open.rstrip(" "),
    }
    settings = "".join(f"{{%- set {name} = {quote(value)} -%}}\n" for name, value in values.items())
    return settings + TEXT + system_turn(template.system) + TURNS


def system_turn(system: str) -> str:
    before, placeholder, after = system.partition(CONTENT)
    if not placeholder:
        return f"{{{{- {quote(system)} -}}}}\n" if system else ""
    own = f"{quote(before)} ~ text(messages[0]['content']) ~ {quote(after)}"
    return f"{{%- if messages[0]['role'] == 'system' -%}}{{{{- {own} -}}}}{{%- endif -%}}\n"


def quote(text: str) -> str:
    """A Jinja string literal, with the escapes of Python."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f"'{escaped}'"
