"""A chat template that does not end costs one line before anything starts."""

import json
from pathlib import Path

import pytest

from megatron_vcppo.data.template_check import check_chat_template
from megatron_vcppo.errors import UserError

SOUND = "{% for m in messages %}{% generation %}{{ m.role }}: {{ m.content }}{% endgeneration %}{% break %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "3 s of processor time are"),
        ("{% generation %}{{ 'x' * 99999999999 }}{% endgeneration %}", "2 GiB of memory are"),
    ],
    ids=["time", "memory"],
)
def test_one_without_end_is_refused(template: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(UserError, match=f"tokenizer_config.json: the chat template does not end: {message} not enough"):
        check_chat_template(tmp_path)


@pytest.mark.parametrize(
    "template", [SOUND, "{{ raise_exception('no') }}", "{% if %}", "\ud800", 7, None, [{"name": 1}]]
)
def test_others_pass_or_are_the_tokenizers_to_refuse(template: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    check_chat_template(tmp_path)
    check_chat_template(tmp_path / "nowhere")


def test_a_file_of_its_own_is_checked_too(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ 'x' * 99999999999 }}")
    with pytest.raises(UserError, match=r"chat_template\.jinja: the chat template does not end"):
        check_chat_template(tmp_path)
