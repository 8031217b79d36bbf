"""Decoders against transformers: logits, greedy tokens, cache and padding; sampling's filters in its order."""

import json

import pytest
import torch
import transformers
from conftest import close

from nanomed.captions.generation import Prompts, Writing, draw, filtered, generate
from nanomed.captions.networks.decoder import Cache, DecoderConfig, load_decoder
from nanomed.weights import WeightsError

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, pad_token_id=0)  # fmt: skip
KINDS = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, dict(rope_theta=5e5)),
    "llama31": (transformers.LlamaForCausalLM, transformers.LlamaConfig,
                dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
                                          high_freq_factor=4.0, original_max_position_embeddings=64))),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, dict(sliding_window=7, rope_theta=1e6)),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config,
               dict(sliding_window=6, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0,
                    final_logit_softcapping=1.5, attn_implementation="eager")),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model with weights far from the start, and ours read from what it saves."""
    model, config, more = KINDS[request.param]
    torch.manual_seed(0)
    reference = model(config(**SHAPE, **more)).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, load_decoder(folder)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def ids(rows=2, length=21):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def test_logits_equal(pair):
    reference, ours = pair
    close(ours(ids()), reference(ids()).logits, 1e-4)


def test_with_a_cache_and_without_are_equal(pair):
    _, ours = pair
    cache = Cache()
    steps = [ours(part, cache=cache) for part in ids(2, 90).split([9, *[1] * 70, 11], dim=1)]
    close(torch.cat(steps, dim=1), ours(ids(2, 90)), 1e-5)


def test_greedy_tokens_equal_over_64_steps(pair):
    reference, ours = pair
    expected = reference.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=64, do_sample=False)
    assert torch.equal(generate(ours, ids(), torch.ones(2, 21), 64), expected[:, 21:])


def test_left_padded_batches_equal_single_ones(pair):
    _, ours = pair
    prompt, mask = ids(2, 21), torch.ones(2, 21, dtype=torch.bool)
    mask[0, :8] = False
    close(ours(prompt, mask)[:1, 8:], ours(prompt[:1, 8:]), 1e-5)
    single = generate(ours, prompt[:1, 8:], torch.ones(1, 13), 24)
    assert torch.equal(generate(ours, prompt, mask, 24)[:1], single)


def test_the_last_places_logits_are_those_of_a_whole_pass(pair):
    """Of a prompt padded on the left, too; and behind a cache, whose last layer has the keys and values of all."""
    _, ours = pair
    prompt, mask = ids(3, 21), torch.ones(3, 21, dtype=torch.bool)
    mask[0, :8] = mask[1, :20] = False
    for told in (None, mask):
        whole, cache = ours(prompt, told), Cache()
        close(ours(prompt, told, cache=cache, last=True), whole[:, -1:], 1e-5)
        more = None if told is None else torch.cat([told, told[:, -1:].expand(-1, 5)], dim=1)
        longer = ours(torch.cat([prompt, prompt[:, :5]], dim=1), more)
        close(ours(prompt[:, :5], more, cache=cache, last=True), longer[:, -1:], 1e-5)


def test_the_last_layer_computes_the_last_place_alone(pair):
    """Rows that its matrices multiply: keys and values of all places, all else of one; the other layers of all."""
    _, ours = pair
    rows: dict[str, int] = {}
    hooks = [module.register_forward_hook(lambda _, given, made, name=name: rows.update({name: given[0].shape[1]}))
             for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear)]  # fmt: skip
    ours(ids(), last=True)
    for hook in hooks:
        hook.remove()
    final = f"model.layers.{len(ours.model.layers) - 1}."
    for name, count in rows.items():
        if name.startswith("model.layers."):
            one = name.startswith(final) and not name.endswith(("k_proj", "v_proj"))
            assert count == (1 if one else 21), name
    assert len(rows) >= 3 * 7


def test_a_prompt_of_several_texts_is_read_once_and_each_goes_on_from_it(pair):
    """As if each stood in the batch by itself, drawn with the same numbers; the passes count the prompts once."""
    _, ours = pair
    numbers = torch.rand(12, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    how = Writing((), 0.9, 0, 0.95, uniform=lambda step: numbers[step])
    prompt, mask, rows = ids(2, 15), torch.ones(2, 15, dtype=torch.bool), [0, 1, 1, 0]
    mask[1, :6] = False
    passes = []
    hook = ours.register_forward_pre_hook(lambda _, given: passes.append(tuple(given[0].shape)))
    prompts = Prompts(ours, prompt, mask, 12)
    prompts.choose(rows)
    together = prompts.write(12, how)
    assert passes == [(2, 15), *[(4, 1)] * 11]
    assert torch.equal(together, generate(ours, prompt[rows], mask[rows], 12, how))
    del passes[:]
    assert torch.equal(prompts.write(12, how), together)  # and again, from where they ended
    prompts.choose([2, 3])
    likeliest = prompts.write(12)
    hook.remove()
    assert passes == [(4, 1)] * 11 + [(2, 1)] * 11
    assert torch.equal(likeliest, generate(ours, prompt[[1, 0]], mask[[1, 0]], 12))
    assert not torch.equal(together[1], together[2])


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.8, 50, 0.9), (1.0, 0, 1.0), (1.7, 5, 1.0), (0.3, 0, 0.5),
                                                       (0.8, 500, 0.01), (0.8, 1, 0.9)])  # fmt: skip
def test_filters_equal_transformers_in_its_order(temperature, top_k, top_p):
    """To the bit, ties at the k-th place among them; a k above the vocabulary, a p that leaves the likeliest alone."""
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(8, 97, generator=torch.Generator().manual_seed(2))
    logits[:4] = logits[:4].round()
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    assert torch.equal(filtered(logits, temperature, top_k, top_p), expected)


def test_sampling_equals_transformers_when_fed_the_same_uniform_numbers(pair, monkeypatch):
    """Its whole `generate` with do_sample, whose one source of chance (torch.multinomial) is made to invert the summed
    probabilities at these numbers: the same tokens over 40 steps, a left-padded prompt among them."""
    reference, ours = pair
    numbers = torch.rand(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prompt, mask = ids(3, 17), torch.ones(3, 17, dtype=torch.long)
    mask[1, :6] = 0
    steps = iter(numbers)

    def multinomial(probabilities, num_samples):
        assert num_samples == 1
        passed = probabilities.double().cumsum(-1) > next(steps)[:, None] * probabilities.double().sum(-1, True)
        return passed.int().argmax(-1, keepdim=True)  # the first place

    monkeypatch.setattr(torch, "multinomial", multinomial)
    expected = reference.generate(prompt, attention_mask=mask, max_new_tokens=40, do_sample=True, temperature=0.8,
                                  top_k=50, top_p=0.9)[:, 17:]  # fmt: skip
    drawn = generate(ours, prompt, mask, 40, Writing((), 0.8, 50, 0.9, uniform=lambda step: numbers[step]))
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, generate(ours, prompt, mask, 40))  # not the likeliest ones


def test_draws_invert_the_summed_probabilities():
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(4, -1)
    assert draw(logits, torch.tensor([0.0, 0.21, 0.69, 0.71])).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize("said", [dict(model_type="falcon"), dict(rope_scaling=dict(rope_type="yarn")),
                                  dict(rope_scaling=dict(rope_type="llama3", factor=8)),
                                  dict(attention_bias=True), dict(hidden_act="relu")])  # fmt: skip
def test_what_is_not_known_is_refused_by_name(said):
    with pytest.raises(WeightsError, match=str(next(iter(said))).replace("rope_scaling", "rope_type")):
        DecoderConfig.from_settings(dict(model_type="llama", num_attention_heads=4) | json.loads(json.dumps(said)))
