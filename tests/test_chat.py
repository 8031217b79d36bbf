"""Chat templates against transformers' rendering of the published Jinja templates."""

from types import SimpleNamespace

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nanomed.captions import chat
from nanomed.captions.models import Model
from nanomed.weights import WeightsError

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (  # without its part about tools
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = \"26 Jul 2024\" %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = \"\" %}{%- endif %}"
    "{{- \"<|start_header_id|>system<|end_header_id|>\\n\\n\" }}{{- \"Cutting Knowledge Date: December 2023\\n\" }}"
    "{{- \"Today Date: \" + date_string + \"\\n\\n\" }}{{- system_message }}{{- \"<|eot_id|>\" }}"
    "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # v0.3
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    "<|im_end|>\n' }}{%- endif %}{%- for message in messages %}{%- if (message.role == \"user\") or (message.role == "
    "\"system\" and not loop.first) or (message.role == \"assistant\") %}{{- '<|im_start|>' + message.role + '\n' + "
    "message.content + '<|im_end|>' + '\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | "
    "trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
TEMPLATES = {"llama": LLAMA3, "llama31": LLAMA31, "mistral": MISTRAL, "mistral3": MISTRAL3, "qwen2": QWEN,
             "gemma2": GEMMA}  # fmt: skip


FUNCTIONS = chat.PLAIN | {"mistral3": chat.mistral3, "llama31": chat.llama31}


def rendered(family: str, turns, system: str = "") -> str:
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    texts, _ = render_jinja_template([messages], chat_template=TEMPLATES[family], add_generation_prompt=True,
                                     bos_token="", eos_token="</s>")  # fmt: skip
    return texts[0]


@pytest.mark.parametrize("turns", [["What is seen?"], ["Say it\nanew.", "A polyp.", "Again, 'shorter' <5mm & {x}"]])
@pytest.mark.parametrize("family", TEMPLATES)
def test_templates_equal_the_published_ones(family, turns):
    assert FUNCTIONS[family](turns) == rendered(family, turns)
    if family in ("llama", "llama31", "qwen2"):
        assert FUNCTIONS[family](turns, system="Be brief.") == rendered(family, turns, "Be brief.")


def test_spaces_around_a_text_are_cut_where_the_template_does():
    for family in TEMPLATES:
        assert FUNCTIONS[family]([" two \n"]) == rendered(family, [" two \n"])


def test_llavas_conversations():
    """Of its own code: the system's text, then the image, a newline and the question."""
    plain = rendered("llama", ["<image>\nWhat?"], chat.LLAVA_SYSTEM)
    assert chat.llava_llama3_hf("What?") == plain and chat.llava_llama3("What?") == "<|begin_of_text|>" + plain
    assert chat.llava_mistral("What?") == "[INST] <image>\nWhat? [/INST]"


def test_the_tokenizer_tells_which_template_and_whether_there_is_one():
    assert chat.template("mistral", {"[INST]"}.__contains__) is chat.mistral3
    assert chat.template("mistral", set().__contains__) is chat.mistral
    assert chat.template("llama", {chat.MARKS["llama"], "<|eom_id|>"}.__contains__) is chat.llama31
    for family, mark in chat.MARKS.items():
        assert chat.template(family, {mark}.__contains__) is chat.PLAIN[family]
        with pytest.raises(WeightsError, match="Instruct"):
            chat.template(family, set().__contains__)
    assert chat.mistral3(["a", "b", "c"], "Be brief.") == "[INST] a[/INST] b</s>[INST] Be brief.\n\nc[/INST]"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
def test_a_model_asks_as_its_template_does_with_a_system_and_without(family):
    """Qwen's says who it is where nobody says it: an empty system would be another conversation."""
    tokenizer = SimpleNamespace(token_to_id=lambda mark: 1 if mark == chat.MARKS.get(family) else None)
    model = SimpleNamespace(writer=SimpleNamespace(config=SimpleNamespace(model_type=family)), tokenizer=tokenizer)
    assert Model.say(model, "What is seen?") == rendered(family, ["What is seen?"])
    if family in ("llama", "qwen2"):
        assert Model.say(model, "What?", "Be brief.") == rendered(family, ["What?"], "Be brief.")


def test_the_conversations_of_ovis():
    """Ovis 2's system is Qwen 2's; Ovis 1.6 says Gemma's mark by itself."""
    assert chat.ovis_qwen2("What?") == rendered("qwen2", ["<image>\nWhat?"], "You are a helpful assistant.")
    assert chat.ovis_gemma2("What?") == "<bos>" + rendered("gemma2", ["<image>\nWhat?"])
