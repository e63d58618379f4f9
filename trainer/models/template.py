"""The chat template as Jinja, for the files of a checkpoint, so that servers build the same text as in training."""

from trainer.contract import Template
from trainer.data.chat.segment import CONTENT, frame_of_system

# What the template cannot express is refused (raise_exception is transformers', vLLM has it too): left out, the model would answer without it.
TEXT = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is iterable and content is not mapping -%}
    {%- for part in content -%}
      {%- if part is string -%}{{ part }}
      {%- elif part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}{{ image_mark }}
      {%- elif 'text' in part -%}{{ part['text'] }}
      {%- else -%}{{ raise_exception('This chat template supports texts and images, and no ' ~ part['type'] ~ '.') }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}{{ raise_exception('This chat template does not support tools.') }}{%- endif -%}
"""
TURNS = """\
{%- for message in messages -%}
  {%- if message['tool_calls'] -%}{{ raise_exception('This chat template does not support tool calls.') }}{%- endif -%}
  {%- if message['role'] == 'user' -%}{{ user_before }}{{ text(message['content']) }}{{ user_after }}
  {%- elif message['role'] == 'assistant' -%}{{ open }}{{ thought(message) }}{{ text(message['content']) }}{{ close }}
  {%- elif message['role'] == 'tool' and tool_frame -%}{{ tool_before }}{{ text(message['content']) }}{{ tool_after }}
  {%- elif message['role'] != 'system' or not loop.first -%}
    {{- raise_exception('This chat template does not support a message of the role ' ~ message['role'] ~ ' at this place.') }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ prompt }}{%- endif -%}"""


def chat_template(template: Template, image_token: str) -> str:
    """Produces the same text as trainer.data.chat.segment.frame. As there, a generation prompt ends without the spaces of `assistant_open`."""
    before, _, after = template.user.partition(CONTENT)
    tool_before, tool_frame, tool_after = template.tool.partition(CONTENT)
    values = {
        "image_mark": image_token,
        "user_before": before,
        "user_after": after,
        "open": template.assistant_open,
        "close": template.end_mark + template.separator,
        "prompt": template.assistant_open.rstrip(" "),
        "tool_frame": "yes" if tool_frame else "",
        "tool_before": tool_before,
        "tool_after": tool_after,
    }
    settings = "".join(f"{{%- set {name} = {quote(value)} -%}}\n" for name, value in values.items())
    return settings + TEXT + reasoning_macro(template.reasoning) + system_turn(template) + TURNS


def reasoning_macro(frame: str) -> str:
    before, placeholder, after = frame.partition(CONTENT)
    given = f"{quote(before)} ~ message['reasoning_content'] ~ {quote(after)}"
    written = given if placeholder else "raise_exception('This chat template does not support reasoning_content.')"
    return (
        f"{{%- macro thought(message) -%}}{{%- if message['reasoning_content'] -%}}{{{{ {written} }}}}{{%- endif -%}}{{%- endmacro -%}}\n"
    )


def system_turn(template: Template) -> str:
    """The system message, or else the default text. An empty one is none at all, as in `frame`."""
    before, placeholder, after = frame_of_system(template).partition(CONTENT)
    written = f"{quote(before)} ~ text(messages[0]['content']) ~ {quote(after)}"
    own = written if placeholder else "raise_exception('This chat template does not support a system message.')"
    default = template.system if CONTENT not in template.system else ""
    otherwise = f"{{%- else -%}}{{{{- {quote(default)} -}}}}" if default else ""
    return (
        "{%- if messages[0]['role'] == 'system' -%}{%- if text(messages[0]['content']) -%}"
        f"{{{{- {own} -}}}}{{%- endif -%}}{otherwise}{{%- endif -%}}\n"
    )


def quote(text: str) -> str:
    """A Jinja string literal, with the escapes of Python."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f"'{escaped}'"
