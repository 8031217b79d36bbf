"""How each family of language models wants to be asked: the chat templates of their published files, as functions.

A conversation is what the user and the assistant say in turn, the user first and last; what comes back ends where the
assistant is to go on. The mark that a tokenizer puts before every text (`<|begin_of_text|>`, `<s>`, `<bos>`) is left to
it, but for `llava_llama3`: LLaVA's own template says it, and its tokenizer may put another before it.
"""

from collections.abc import Callable, Sequence

from nanomed.weights import WeightsError

LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
QWEN2_SYSTEM = "You are a helpful assistant."  # of Qwen 2, and of Ovis 2


def llama3(turns: Sequence[str], system: str = "") -> str:
    """Llama 3 Instruct."""
    said = [("system", system)] if system else []
    said += [(("user", "assistant")[i % 2], text) for i, text in enumerate(turns)]
    text = "".join(f"<|start_header_id|>{who}<|end_header_id|>\n\n{text.strip()}<|eot_id|>" for who, text in said)
    return f"{text}<|start_header_id|>assistant<|end_header_id|>\n\n"


def llama31(turns: Sequence[str], system: str = "") -> str:
    """Llama 3.1 Instruct, without tools. Its system always names two dates, the second by default that of the files."""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    first = f"<|start_header_id|>system<|end_header_id|>\n\n{dates}{system.strip()}<|eot_id|>"
    return first + llama3(turns)


def mistral(turns: Sequence[str], system: str = "") -> str:
    """Mistral Instruct v0.1 and v0.2, which know no system: what it would say stands before the first question."""
    turns = [f"{system}\n\n{turns[0]}", *turns[1:]] if system else turns
    return "".join(f"{text}</s>" if i % 2 else f"[INST] {text} [/INST]" for i, text in enumerate(turns))


def mistral3(turns: Sequence[str], system: str = "") -> str:
    """Mistral Instruct v0.3, whose `[INST]` is a token of its own; its system stands before the last question."""
    turns = [*turns[:-1], f"{system}\n\n{turns[-1]}"] if system else turns
    return "".join(f" {text}</s>" if i % 2 else f"[INST] {text}[/INST]" for i, text in enumerate(turns))


def qwen2(turns: Sequence[str], system: str = QWEN_SYSTEM) -> str:
    """Qwen 2.5 Instruct."""
    said = [("system", system), *((("user", "assistant")[i % 2], text) for i, text in enumerate(turns))]
    return "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in said) + "<|im_start|>assistant\n"


def gemma2(turns: Sequence[str], system: str = "") -> str:
    """Gemma 2 Instruct, which knows no system: what it would say stands before the first question."""
    turns = [f"{system}\n\n{turns[0]}", *turns[1:]] if system else turns
    said = ((("user", "model")[i % 2], text.strip()) for i, text in enumerate(turns))
    return "".join(f"<start_of_turn>{who}\n{text}<end_of_turn>\n" for who, text in said) + "<start_of_turn>model\n"


def llava_llama3(question: str) -> str:
    """LLaVA's `llava_llama_3`, with the image before the question: what Med-Art asked `llama3-llava-next-8b`."""
    return "<|begin_of_text|>" + llama3([f"<image>\n{question}"], LLAVA_SYSTEM)


def llava_llama3_hf(question: str) -> str:
    """The same for transformers' layout, whose tokenizer says the mark."""
    return llama3([f"<image>\n{question}"], LLAVA_SYSTEM)


def llava_mistral(question: str) -> str:
    """LLaVA's `mistral_instruct`, and transformers' template of llava-v1.6-mistral."""
    return mistral([f"<image>\n{question}"])


def ovis_gemma2(question: str) -> str:
    """Ovis 1.6, whose own code says the mark and lets the tokenizer say none."""
    return "<bos>" + gemma2([f"<image>\n{question}"])


def ovis_qwen2(question: str) -> str:
    """Ovis 2."""
    return qwen2([f"<image>\n{question}"], QWEN2_SYSTEM)


PLAIN: dict[str, Callable[..., str]] = {"llama": llama3, "mistral": mistral, "qwen2": qwen2, "gemma2": gemma2}
MARKS = {"llama": "<|start_header_id|>", "qwen2": "<|im_start|>", "gemma2": "<start_of_turn>"}


def template(family: str, has: Callable[[str], bool]) -> Callable[..., str]:
    """The template of a family, for a tokenizer that `has` a token or not. WeightsError where it has not been taught
    to converse."""
    if family in MARKS and not has(MARKS[family]):
        raise WeightsError(f"this {family} cannot be asked: its tokenizer has no {MARKS[family]}, as those of Instruct "
                           f"models have")  # fmt: skip
    newer = {"mistral": ("[INST]", mistral3), "llama": ("<|eom_id|>", llama31)}  # tokens that the first ones lack
    mark, function = newer.get(family, ("", None))
    return function if mark and has(mark) else PLAIN[family]
