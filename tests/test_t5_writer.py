"""T5's decoder and beam search against transformers: logits, tokens and scores, whole batches at a time."""

import json

import pytest
import torch
import transformers
from conftest import close
from manifests import about, config, names_and_shapes
from safetensors.torch import load_file, save_file

from nanomed import weights
from nanomed.captions.networks import t5
from nanomed.captions.networks.decoder import Cache
from nanomed.text.unigram import train_unigram

SHAPE = dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
             decoder_start_token_id=0)  # fmt: skip
KINDS = {"v1.0": dict(feed_forward_proj="relu"),
         "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)}  # fmt: skip
TEXTS = ["a red polyp", "a red polyp in the middle of a wide view of the colon", "green box"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model with weights far from the start, and ours read from what it saves."""
    torch.manual_seed(0)
    reference = transformers.T5ForConditionalGeneration(transformers.T5Config(**SHAPE, **KINDS[request.param])).eval()
    for name, parameter in reference.named_parameters():
        parameter.data += (0.3 if "layer" in name else 0.1) * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    train_unigram(TEXTS, 57).save(folder)
    return reference, t5.load(folder)


def batch(ours):
    return ours.tokenizer(TEXTS, 24)


def test_logits_equal_with_a_cache_and_without(pair):
    reference, ours = pair
    ids, mask = batch(ours)
    written = torch.randint(2, 60, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = reference(ids, attention_mask=mask.long(), decoder_input_ids=written).logits
    remembered = ours.network.remember(ours.network(ids, mask))
    close(ours.network.logits(written, remembered, mask), expected, 1e-4)
    cache = Cache()
    steps = [ours.network.logits(part, remembered, mask, cache) for part in written.split([5, *[1] * 30, 5], dim=1)]
    close(torch.cat(steps, dim=1), expected, 1e-4)


@pytest.mark.parametrize("how", [
    dict(num_beams=4, min_length=9, max_length=14, early_stopping=True),  # as Med-Art, in small
    dict(num_beams=4, max_length=25, early_stopping=False),
    dict(num_beams=3, max_length=25, early_stopping=False, length_penalty=2.0),
    dict(num_beams=3, max_length=25, early_stopping="never", length_penalty=-0.5),
    dict(num_beams=5, max_length=30, early_stopping="never", length_penalty=1.5, min_length=4),
    dict(num_beams=2, max_length=6, early_stopping=True, min_length=12),
    dict(num_beams=6, max_length=40, early_stopping=True, length_penalty=0.0),
])  # fmt: skip
@pytest.mark.parametrize("loud", [0.0, 4.0])
def test_beams_equal_in_tokens_and_scores(pair, how, loud):
    """Also where the end is likely (its embedding made loud), so that sequences of many lengths compete."""
    reference, ours = pair
    ids, mask = batch(ours)
    heads = [reference.lm_head.weight.data, (getattr(ours.network, "lm_head", ours.network.shared)).weight.data]
    before = heads[0][1].clone()
    for head in {head.data_ptr(): head for head in heads}.values():
        head[1] = before + loud * heads[0][5:15].mean(0)
    try:
        expected = reference.generate(ids, attention_mask=mask.long(), do_sample=False, return_dict_in_generate=True,
                                      output_scores=True, **how)  # fmt: skip
        tokens, scores = ours.network.write(ids, mask, **{"beams" if k == "num_beams" else k: how[k] for k in how})
    finally:
        for head in heads:
            head[1] = before
    assert torch.equal(tokens, expected.sequences)
    close(scores, expected.sequences_scores, 1e-5)


def test_a_batch_writes_what_single_texts_do(pair):
    _, ours = pair
    how = dict(beams=4, max_length=20, early_stopping=True)
    assert ours.generate(TEXTS, **how) == [ours.generate([text], **how)[0] for text in TEXTS]


def test_decoding_gives_the_text_back():
    tokenizer = train_unigram(TEXTS, 60)
    for text in TEXTS:
        assert tokenizer.decode([0, *tokenizer.encode(text), 1, 0]) == text


@pytest.mark.parametrize("component, count", [("t5_small", 60_506_624), ("t5_base", 222_903_552),
                                              ("t5_large", 737_668_096)])  # fmt: skip
def test_published_files_load_strictly_at_full_size(component, count, tmp_path):
    """With every duplicate of the embedding, and the tensor that nothing uses."""
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    settings = t5.T5WholeConfig.from_json(tmp_path)
    network = weights.build(t5.T5, settings)
    shapes = names_and_shapes(component)
    extra = {name: tuple(shape) for name, shape in about(component)["optional"].items()}
    extra |= {name: shapes[source] for name, source in about(component)["tied_or_duplicate"].items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in (shapes | extra).items()}
    kept = t5.whole(tensors, settings)
    assert kept.keys() - network.state_dict().keys() == {t5.UNUSED}
    assert {n: t.shape for n, t in network.state_dict().items()} == {n: kept[n].shape for n in network.state_dict()}
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_a_head_of_its_own_is_read(tmp_path):
    """v1.1's files have one; transformers of late ties it all the same, so the oracle is the product itself."""
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(transformers.T5Config(**SHAPE, **KINDS["v1.1"])).save_pretrained(tmp_path)
    train_unigram(TEXTS, 57).save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text()) | dict(tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(said))
    first = t5.load(tmp_path)
    head = torch.randn(60, 32)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    ids, mask = batch(first)
    states = []
    ours = t5.load(tmp_path)
    ours.network.decoder.final_layer_norm.register_forward_hook(lambda m, i, out: states.append(out))
    logits = ours.network.logits(ids[:, :4], ours.network.remember(ours.network(ids, mask)), mask)
    close(logits, states[0] @ head.T, 1e-6)
