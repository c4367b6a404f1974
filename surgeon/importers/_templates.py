"""Conversation templates of InternVL checkpoints as chat templates.

A checkpoint names its template, and ships the definition as Python. That is read, as literals, and never run.
"""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMAGE_TOKEN = "<IMG_CONTEXT>"


@dataclass(frozen=True)
class Conversation:
    """A turn is its role's prefix, the text and `end`; a system turn always comes first."""

    system: str
    """With "{system_message}" where the message goes."""
    system_message: str
    user: str
    assistant: str
    end: str

    def jinja(self, bos_token: str | None = None) -> str:
        """The chat template: strings or lists of {"type": "image"} and {"type": "text"} items; one `IMAGE_TOKEN` and a
        line break for an image, as `model.chat` of the published code puts it."""
        before, _, after = self.system.partition("{system_message}")
        quoted = {
            key: json.dumps(value, ensure_ascii=False)
            for key, value in {
                "BOS": bos_token or "",
                "IMAGE": IMAGE_TOKEN + "\n",
                "SYSTEM_BEFORE": before,
                "SYSTEM_AFTER": after + self.end,
                "SYSTEM": self.system_message,
                "USER": self.user,
                "ASSISTANT": self.assistant,
                "END": self.end,
            }.items()
        }
        text = _JINJA
        for key, value in quoted.items():
            text = text.replace(f"@{key}@", value)
        return text


_JINJA = """\
{%- macro content(message) -%}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for item in message['content'] -%}
      {%- if item['type'] == 'image' -%}
        {{- @IMAGE@ -}}
      {%- elif item['type'] == 'text' -%}
        {{- item['text'] -}}
      {%- else -%}
        {{- raise_exception('content of type ' ~ item['type'] ~ ' is not supported') -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- @BOS@ -}}
{%- if messages[0]['role'] != 'system' -%}
  {{- @SYSTEM_BEFORE@ + @SYSTEM@ + @SYSTEM_AFTER@ -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- @SYSTEM_BEFORE@ + content(message) + @SYSTEM_AFTER@ -}}
  {%- elif message['role'] == 'user' -%}
    {{- @USER@ + content(message) + @END@ -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- @ASSISTANT@ + content(message) + @END@ -}}
  {%- else -%}
    {{- raise_exception('role ' ~ message['role'] ~ ' is not supported') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- @ASSISTANT@ -}}
{%- endif -%}
"""

_VL2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
_VL2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")
PUBLISHED = {
    "Hermes-2": Conversation("<|im_start|>system\n{system_message}", _VL2, *_CHATML, "<|im_end|>"),
    "internlm2-chat": Conversation("<|im_start|>system\n{system_message}", _VL2, *_CHATML, "<|im_end|>"),
    "internvl2_5": Conversation("<|im_start|>system\n{system_message}", _VL2_5, *_CHATML, "<|im_end|>\n"),
}
"""As InternVL2 and 2.5 were published, for a checkpoint without its conversation.py: releases before had other system
messages under the same names."""


def conversation(directory: Path, name: str | None) -> Conversation | None:
    """The conversation template of a checkpoint; None where it is not known."""
    return _defined(directory / "conversation.py", name) or PUBLISHED.get(name or "")


def _defined(file: Path, name: str | None) -> Conversation | None:
    """The template in a conversation.py, where it is one whose turns are prefix, text and separator."""
    if not file.is_file():
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Conversation":
            arguments = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
            style = arguments.get("sep_style")
            if _literal(arguments.get("name")) == name and isinstance(style, ast.Attribute) and style.attr == "MPT":
                return _conversation({key: _literal(value) for key, value in arguments.items()})
    return None


def _conversation(arguments: dict[str, Any]) -> Conversation | None:
    system, message, end = arguments.get("system_template"), arguments.get("system_message", ""), arguments.get("sep")
    match arguments.get("roles"):
        case (str(user), str(assistant)) if all(isinstance(text, str) for text in (system, message, end)):
            return Conversation(str(system), str(message), user, assistant, str(end))
    return None


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
