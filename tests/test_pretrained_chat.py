"""Chat templates: what they may name, and what they may not do."""

import datetime
import json

import pytest

from pretrained import Chat, ModelError, open_model
from tests.checkpoints import write_folder

TALK = [{"role": "user", "content": "a <b>"}, {"role": "assistant", "content": "ja, é"}]
CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' -}}
{% endif %}
"""


def test_a_conversation_is_written_as_the_template_says():
    assert Chat(CHATML).render(TALK, generate=False) == (
        "<|im_start|>user\na <b><|im_end|>\n<|im_start|>assistant\nja, é<|im_end|>\n"
    )


def test_a_prompt_ends_with_the_words_that_open_an_answer():
    assert Chat(CHATML).render(TALK[:1], generate=True) == (
        "<|im_start|>user\na <b><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ tools is none }}{{ documents is none }}", "<s>TrueTrue"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a <b>"}'),
        ("{{ messages[1].content | tojson }}", '"ja, é"'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% for m in messages %}{% generation %}{{ m.role }};{% endgeneration %}{% endfor %}",
         "user;assistant;"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
    ],
)  # fmt: skip
def test_a_template_may_name_what_transformers_lets_it_name(template, text):
    assert Chat(template, {"bos_token": "<s>"}).render(TALK, generate=False) == text


def test_a_template_may_name_the_day():
    year = Chat("{{ strftime_now('%Y') }}").render([], generate=False)
    assert abs(int(year) - datetime.datetime.now().year) <= 1
    moon = Chat("{{ strftime_now('%d %b %Y') }}", now=datetime.datetime(1969, 7, 20))
    assert moon.render([], generate=False) == "20 Jul 1969"


def test_a_template_may_refuse_messages():
    chat = Chat("{{ raise_exception('Roles must take turns.') }}")
    with pytest.raises(ModelError, match=r"roles \['user', 'assistant'\]: Roles must take turns"):
        chat.render(TALK, generate=False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages.append(1) }}", r"access to attribute 'append' .* is unsafe"),
        ("{{ ''.__class__.__mro__ }}", r"access to attribute '__class__' .* is unsafe"),
        ("{{ messages[0].content + 1 }}", r"can only concatenate str"),
        ("{{ messages[9].content.upper() }}", r"has no element 9"),
    ],
)
def test_a_template_that_reaches_for_more_is_stopped(template, message):
    with pytest.raises(ModelError, match=r"The chat template refuses messages .*" + message):
        Chat(template).render(TALK, generate=False)


def test_a_broken_template_is_refused_when_it_is_read():
    with pytest.raises(ModelError, match=r"line 2 of the chat template: .*unknown tag 'fi'"):
        Chat("a\n{% fi %}")


NAMED = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]


@pytest.mark.parametrize(("said", "text"), [("a", "a"), (NAMED, "c"), (NAMED[:1], None)])
def test_a_folder_says_its_template_in_the_settings_of_the_tokenizer(tmp_path, said, text):
    folder = write_folder(tmp_path / "tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    chat = open_model(folder).chat
    assert (chat and chat.render([], generate=False)) == text


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path):
    folder = write_folder(tmp_path / "tiny")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "a"}))
    (folder / "chat_template.jinja").write_text("f")
    assert open_model(folder).chat.render([], generate=False) == "f"


def test_a_folder_may_have_no_template(tmp_path):
    assert open_model(write_folder(tmp_path / "tiny")).chat is None
