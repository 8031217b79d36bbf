"""Paraphrases by a language model: what a free text states, why an answer is refused, and a run that survives kills."""

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import close
from test_llava import save_tokenizer

from nanomed.captions import paraphrase, rewording
from nanomed.captions.journal import Journal
from nanomed.captions.reading import facts, facts_of
from nanomed.captions.rewording import Effort, Encoder, Rules, cleaned, reword
from nanomed.data import grammar
from nanomed.data.table import Row, Table, with_paraphrases
from nanomed.run.flags import UsageError

TWO = grammar.count("polyp", 2)
FREE = "A dermoscopic image of a dark, irregular mole on pale skin."


# --------------------------------------------------------------------------------------------------------- the reader


def test_every_wording_of_the_grammar_is_read_as_what_it_says():
    """Of all 483 prompts: their own words, and a few of all that the rules make of them."""
    draw = random.Random(0)
    for prompt in [*grammar.all_prompts(), grammar.STRAY]:
        texts = paraphrase.paraphrases(prompt, None)
        for text in [prompt, *draw.sample(texts, min(5, len(texts)))]:
            assert facts(text, grammar.parse(prompt).get("colors", ())) == facts_of(prompt), text


@pytest.mark.parametrize("prompt, texts", [
    (TWO, ["Show a colon image where two polyps can be seen.", "Create a frame that displays exactly 2 polyps."]),
    (grammar.count("polyp", 0), ["An endoscopic picture free of polyps.", "Draw an image without any polyps, please."]),
    (grammar.count("finding", 1), ["Produce an image showing a single abnormality.", "Show one lesion."]),
    (grammar.containing(grammar.BOX), ["Please make an image that has a green or black box in it.",
                                       "Include a black box artifact in the picture."]),
    (grammar.not_containing("text"), ["An image in which no text is visible.", "Make a picture without written text."]),
    (grammar.containing("a polyp", "oesophagitis"), ["An image with a polyp as well as esophagitis."]),
    (grammar.located("abnormality", ["upper-left"]), ["Show an abnormality in the top left corner of the picture."]),
    (grammar.located("instrument", ["center", "lower-right"]),
     ["An instrument should be visible in the middle and at the bottom right."]),
    (grammar.colors(["pink", "pale red"]), ["Draw an abnormal area whose colours are pink and pale red."]),
    (grammar.sizes(["< 5mm"]), ["A polyp smaller than 5 mm.", "Show a polyp that measures less than 5mm across."]),
    (grammar.paris(["ip", "is"]), ["Show polyps of Paris type Ip and Is."]),
    (grammar.procedure("colonoscopy"), ["Make a picture taken during a colonoscopy."]),
])  # fmt: skip
def test_free_wordings_are_read(prompt, texts):
    for text in texts:
        assert facts(text, grammar.parse(prompt).get("colors", ())) == facts_of(prompt), text


@pytest.mark.parametrize("text", [
    "Show three polyps.", "Show a polyp.", "Show polyps.", "Show no polyps.", "Show two instruments.",
    "Show two red polyps.", "Show two polyps and a tube.", "Show two polyps from a colonoscopy.",
    "Show two polyps in the upper left.", "Show two polyps smaller than 5 mm.", "Show two or three polyps.",
    "Show two polyps, but no text.", "Show several polyps.", "Show two bleeding polyps.",
    "Show two small polyps.", "Show two polyps on inflamed mucosa.", "Show a stomach.",
])  # fmt: skip
def test_a_fact_more_or_another_is_seen(text):
    assert facts(text) != facts_of(TWO)


@pytest.mark.parametrize("prompt, text", [
    (grammar.colors(["red"]), "Draw a red instrument beside an abnormality."),
    (grammar.colors(["red"]), "Draw a red polyp."),
    (grammar.procedure("colonoscopy"), "A polyp as seen in a colonoscopy."),
    (grammar.not_containing("text"), "An image with neither text nor a tube."),
    (grammar.containing("tube"), "An image with a tube and an instrument."),
    (grammar.containing("a polyp"), "An image."),
    (grammar.paris(["is"]), "A polyp whose type is unclear."),
    (grammar.located("abnormality", ["center"]), "An abnormality and an instrument in the center."),
    (grammar.located("abnormality", ["center"]), "An abnormality left of the center."),
])  # fmt: skip
def test_a_thing_more_or_another_is_seen(prompt, text):
    assert facts(text, grammar.parse(prompt).get("colors", ())) != facts_of(prompt)


def test_no_two_prompts_that_differ_are_taken_for_each_other():
    """A wording of one, read, is none of the others' facts."""
    prompts = random.Random(1).sample(grammar.all_prompts(), 120)
    for prompt in prompts:
        read = facts(paraphrase.paraphrases(prompt, 1)[0], grammar.parse(prompt).get("colors", ()))
        same = [other for other in prompts if facts_of(other) == read]
        assert prompt in same and all(facts_of(other) == facts_of(prompt) for other in same)


# ---------------------------------------------------------------------------------------------------------- the rules


def agree(prompt, texts):
    return [(0.5, 0.1) if "else" in text else (0.9, 0.95) if "other" in text else (0.9, 0.3) for text in texts]


@pytest.mark.parametrize("prompt, answer, why", [
    (TWO, "Draw a picture with two polyps.", ""),
    (TWO, " \n", "empty"),
    (TWO, "Generate an image with 2 polyps!", "same"),
    (TWO, "Show 2 polyps", "double"),
    (TWO, "Polyps: 2.", "short"),
    (TWO, "Please be so kind as to draw for me an image in which one can see very clearly two polyps.", "long"),
    (TWO, "Draw a picture with three polyps.", "meaning"),
    (FREE, "A dark mole with an irregular border on light skin, by dermoscopy.", ""),
    (FREE, "A dermoscopic image of something else on the same pale skin.", "agreement 0.50"),
    (FREE, "A dermoscopic image of an other, dark mole on pale skin.", "nearer"),
])  # fmt: skip
def test_an_answer_is_refused_for_its_reason(prompt, answer, why):
    assert Rules(agree).judge(prompt, answer, ["Show 2 polyps."])[1] == why


def test_without_an_encoder_only_the_grammar_can_be_judged():
    with pytest.raises(ValueError, match="no text encoder"):
        Rules().judge(FREE, "A dark mole with an irregular border on light skin.", [])


@pytest.mark.parametrize(
    "answer",
    [
        '"Show two polyps."',
        "Sure, here is a rewording: Show two polyps.",
        "1. Show two polyps.",
        "\n\nShow  two\tpolyps.\n\nI hope this helps!",
        "Here's one:\n- Show two polyps.",
    ],
)
def test_what_stands_around_a_wording_is_cut(answer):
    assert cleaned(answer) == "Show two polyps."


# ----------------------------------------------------------------------------------------------------------- the loop


class Canned:
    """A language model that answers by the attempt, whatever it is asked together with."""

    def __init__(self, slow: float = 0.0):
        self.slow, self.asked = slow, []

    def say(self, question, system=""):
        return f"{system}|{question}"

    def generate(self, images, texts, keys, **how):
        time.sleep(self.slow)
        self.asked += keys
        texts = paraphrase.paraphrases(keys[0][1], 40)
        return [texts[(attempt // 2) % 40] if attempt % 3 else "no idea at all, sorry" for _, _, attempt in keys]


def test_wordings_do_not_depend_on_how_many_are_drawn_together():
    records = [reword(Canned(), TWO, Rules(), Effort(5, 40, batch)) for batch in (1, 3, 10)]
    assert records[0] == records[1] == records[2]
    assert len(records[0]["texts"]) == 5 == len(set(records[0]["texts"]))
    assert {refusal["why"] for refusal in records[0]["refused"]} >= {"meaning", "double"}
    few = reword(Canned(), TWO, Rules(), Effort(50, 6, 4))
    assert few["attempts"] == 6 and len(few["texts"]) + len(few["refused"]) == 6
    said = rewording.statistics([few], 50)
    assert "of 6 answers" in said and "meaning: 2" in said and f"of {TWO!r}" in said


PROMPTS = grammar.all_prompts()[:24]


def work(out: Path, rank: int = 0, world: int = 1, slow: float = 0.0) -> None:
    """What the command does, with a canned model."""
    journal, model = Journal(out, {"seed": 0}, "prompt"), Canned(slow)
    done = journal.records()
    for prompt in PROMPTS[rank::world]:
        if prompt not in done:
            journal.append(reword(model, prompt, Rules(), Effort(2, 9, 9)))
    rewording.write_csv(journal, PROMPTS)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_killed_at_random_moments_no_prompt_is_lost_or_doubled(tmp_path):
    """Two processes at a time, killed with SIGKILL after a few milliseconds, again and again; then one to the end."""
    work(whole := tmp_path / "whole.csv")
    out, context, draw = tmp_path / "p.csv", multiprocessing.get_context("fork"), random.Random(0)
    killed = 0
    for _ in range(8):
        running = [context.Process(target=work, args=(out, rank, 2, 0.01)) for rank in range(2)]
        for process in running:
            process.start()
        time.sleep(draw.uniform(0.0, 0.05))
        for process in running:
            killed += process.is_alive()
            os.kill(process.pid, signal.SIGKILL) if process.is_alive() else None
            process.join()
    assert killed >= 4
    work(out)
    assert out.read_bytes() == whole.read_bytes()
    lines = [json.loads(line) for line in out.with_name("p.csv.jsonl").read_text().splitlines()[1:]]
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS)
    table = with_paraphrases(Table("t", (Row(Path("a.jpg"), tuple(PROMPTS)),)), out, "all")
    for prompt, other in zip(PROMPTS, table.rows[0].paraphrases):
        assert facts(other, grammar.parse(prompt).get("colors", ())) == facts_of(prompt)


def test_a_prompt_without_a_wording_stands_for_itself(tmp_path):
    journal = Journal(tmp_path / "p.csv", {}, "prompt")
    journal.append({"prompt": TWO, "texts": [], "attempts": 3, "refused": []})
    rewording.write_csv(journal, [TWO, FREE])
    assert list(csv.reader(open(tmp_path / "p.csv"))) == [["Prompt", "Paraphrase"], [TWO, TWO]]


# -------------------------------------------------------------------------------------------------- encoder, command


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from nanomed.text.tokenizers import train_bpe

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_bpe([FREE, TWO], 300)
    tokenizer.save(folder)
    torch.manual_seed(0)
    end = tokenizer(["a"], 8)[0].max().item()
    config = transformers.CLIPTextConfig(vocab_size=end + 1, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                         num_attention_heads=2, eos_token_id=end)  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    return folder


def test_agreement_is_the_cosine_of_the_encoders_embeddings(clip):
    with torch.no_grad():
        encoder = Encoder(clip, [FREE, TWO])
        reference = transformers.CLIPTextModel.from_pretrained(clip).eval()
        text = "A dark mole."
        ids = encoder.tokenizer([FREE, TWO, text], 77)[0]
        pooled = torch.nn.functional.normalize(reference(ids).pooler_output, dim=-1)
        own, other = encoder.agree(FREE, [text])[0]
        close(torch.tensor([own, other]), torch.stack([pooled[2] @ pooled[0], pooled[2] @ pooled[1]]), 1e-5)
        assert encoder.agree(FREE, [FREE])[0][0] == pytest.approx(1, abs=1e-5)
        assert Encoder(clip, [FREE]).agree(FREE, [text])[0][1] == -1  # nothing else to be nearer to


@pytest.fixture
def model(tmp_path):
    """The folder of an untrained Mistral that writes letters."""
    torch.manual_seed(0)
    vocabulary = save_tokenizer(tmp_path / "m", image=False)
    config = transformers.MistralConfig(vocab_size=vocabulary, hidden_size=16, intermediate_size=16, eos_token_id=257,
                                        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_the_command_lists_what_it_refuses_and_goes_on(model, clip, tmp_path, monkeypatch, capsys):
    """An untrained model says nothing that is kept; every answer stands there with its reason, none is asked twice."""
    from nanomed.captions import __main__ as command

    (tmp_path / "prompts.txt").write_text(f"{TWO}\n{FREE}\n{TWO}\n")
    out = tmp_path / "p.csv"
    words = ["paraphrase", str(tmp_path / "prompts.txt"), "--model", str(model), "--out", str(out), "--count", "2",
             "--attempts", "3", "--judge", str(clip), "--precision", "fp32"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["captions", *words])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "0 paraphrases of 2 prompts, of 6 answers" in said and "refused" in said and "p.csv.jsonl" in said
    lines = [json.loads(line) for line in out.with_name("p.csv.jsonl").read_text().splitlines()]
    assert [len(line["refused"]) for line in lines[1:]] == [3, 3]
    assert list(csv.reader(open(out)))[1:] == [[TWO, TWO], [FREE, FREE]]
    monkeypatch.setattr(rewording, "reword", lambda *a: 1 / 0)
    assert command.main() == 0 and capsys.readouterr().out == said
    monkeypatch.setattr("sys.argv", ["captions", *words, "--seed", "1"])
    with pytest.raises(UsageError, match="other settings"):
        command.main()


def test_the_rules_are_a_model_too(tmp_path, monkeypatch, capsys):
    from nanomed.captions import __main__ as command

    (tmp_path / "prompts.txt").write_text(f"{TWO}\n")
    words = ["paraphrase", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "p.csv"), "--count", "4"]
    monkeypatch.setattr("sys.argv", ["captions", *words])
    assert command.main() == 0 and "4 paraphrases of 1 prompts" in capsys.readouterr().out
    assert [row["Paraphrase"] for row in csv.DictReader(open(tmp_path / "p.csv"))] == paraphrase.paraphrases(TWO, 4)
