"""T5's encoder against transformers, value for value and gradient for gradient, and the published files' tensors."""

import json
import math

import pytest
import torch
import transformers
from conftest import close
from manifests import about, config, names_and_shapes
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanomed import weights
from nanomed.text.t5 import T5Config, T5Encoder, encoder_half, load_t5, relative_buckets

KINDS = {
    "v1.0": dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, feed_forward_proj="relu"),
    "v1.1": dict(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"),
    "ul2": dict(vocab_size=50, d_model=32, d_kv=24, d_ff=80, num_layers=2, num_heads=2, feed_forward_proj="gated-silu"),
    "mt5": dict(vocab_size=90, d_model=16, d_kv=8, d_ff=40, num_layers=4, num_heads=6, feed_forward_proj="gated-gelu"),
}
REAL = [20, 7, 13, 1]  # tokens of the rows of a batch


def pair(kind: str, **settings) -> tuple[transformers.T5EncoderModel, T5Encoder]:
    """transformers' encoder at its default initialisation, and ours with the same weights."""
    torch.manual_seed(0)
    reference = transformers.T5EncoderModel(transformers.T5Config(**KINDS[kind] | settings)).eval()
    ours = T5Encoder(T5Config(**KINDS[kind] | settings))
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    weights.load(ours, encoder_half(tensors))
    return reference, ours.eval()


def batch(kind: str = "v1.1", length: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids with </s> at the end of the text and padding behind it, and their mask."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, KINDS[kind]["vocab_size"], (len(REAL), length), generator=draw)
    mask = torch.arange(length) < torch.tensor(REAL)[:, None]
    ids[torch.arange(len(REAL)), torch.tensor(REAL) - 1] = 1
    return ids.masked_fill(~mask, 0), mask


def assert_gradients_equal(ours: T5Encoder, reference: torch.nn.Module, tolerance: float = 1e-5) -> None:
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert expected.keys() == {name for name, _ in ours.named_parameters()} and largest > 0
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() <= tolerance * largest, name


# --------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_gradients_equal_transformers(kind, masked):
    """Rows of padding included."""
    reference, ours = pair(kind)
    ids, mask = batch(kind)
    expected = reference(ids, attention_mask=mask.long() if masked else None).last_hidden_state
    states = ours(ids, mask if masked else None)
    close(states, expected, 1e-5)
    probe = torch.randn_like(states)
    (states * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_gradients_equal(ours, reference)


def test_texts_beyond_the_furthest_distance_equal_transformers():
    reference, ours = pair("v1.1")
    ids = torch.randint(3, 50, (1, 300))
    with torch.no_grad():
        close(ours(ids), reference(ids).last_hidden_state, 1e-5)


def test_a_mask_with_holes_equals_transformers():
    reference, ours = pair("v1.1")
    ids, mask = batch()
    mask[0, 3:6] = False
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long()).last_hidden_state
        close(ours(ids, mask), expected, 1e-5)
        close(ours.trimmed(ids, mask)[mask], expected[mask], 1e-5)


def test_a_row_without_any_text_sees_all_places_alike():
    """As in transformers, and in bfloat16 autocast too, where float32's lowest number would be minus infinity."""
    reference, ours = pair("v1.1")
    ids, mask = batch()
    mask[1] = False
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long()).last_hidden_state
        close(ours(ids, mask), expected, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            close(ours(ids, mask).float(), expected, 0.05)
        assert (ours.trimmed(ids, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (32, 64), (16, 100), (8, 20)])
def test_every_distance_falls_into_transformers_bucket(buckets, furthest):
    distances = torch.arange(-3000, 3001)
    attention = transformers.models.t5.modeling_t5.T5Attention
    expected = attention._relative_position_bucket(distances, True, buckets, furthest)
    assert torch.equal(relative_buckets(distances, buckets, furthest), expected)


def test_a_token_sees_both_sides_and_no_padding():
    _, ours = pair("v1.1")
    ids, mask = batch()
    with torch.no_grad():
        states = ours(ids, mask)
        other = ids.masked_fill(~mask, 7)
        assert torch.equal(ours(other, mask)[mask], states[mask])
        later = ids.clone()
        later[0, 10] += 1
        moved = (ours(later, mask)[0] - states[0]).abs().amax(-1)
    assert (moved[mask[0]] > 1e-6).all()


# ------------------------------------------------------------------------------------------------------------- trimming


def test_trimmed_states_equal_transformers_where_there_is_text_and_are_zero_elsewhere():
    reference, ours = pair("v1.1")
    ids, mask = batch(length=120)
    computed = []
    ours.encoder.final_layer_norm.register_forward_hook(lambda module, inputs, out: computed.append(out.shape[1]))
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long()).last_hidden_state
        states = ours.trimmed(ids, mask)
        assert states.shape == expected.shape
        close(states[mask], expected[mask], 1e-5)
        assert (states[~mask] == 0).all()
        ours.trimmed(ids[1:2], mask[1:2])
        ours.trimmed(ids[1:2, :7], mask[1:2, :7])
        ours.trimmed(ids, mask, multiple=64)
    assert computed == [24, 8, 7, 64]  # 20 tokens and 7, in steps of 8; no more than there are; in steps of 64


def test_trimming_is_exact_for_who_reads_through_the_mask():
    """Cross-attention with the mask gives the same from the trimmed states, to 1e-5; its gradients are the same."""
    reference, ours = pair("v1.1")
    ids, mask = batch(length=120)
    query = torch.randn(4, 2, 9, 16)
    bias = (1 - mask.float())[:, None, None, :] * -10_000  # as PixArt-alpha masks

    def read(states: Tensor) -> Tensor:
        heads = states.unflatten(-1, (2, 16)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(query, heads, heads, bias)

    expected, out = read(reference(ids, attention_mask=mask.long()).last_hidden_state), read(ours.trimmed(ids, mask))
    close(out, expected, 1e-5)
    probe = torch.randn_like(out)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    assert_gradients_equal(ours, reference)


def test_a_text_is_encoded_alike_in_every_batch():
    _, ours = pair("v1.1")
    ids, mask = batch(length=120)
    with torch.no_grad():
        together = ours.trimmed(ids, mask)
        for i in range(len(ids)):
            close(ours.trimmed(ids[i : i + 1], mask[i : i + 1]), together[i : i + 1], 1e-5)


# ------------------------------------------------------------------------------------------------- memory and precision


def test_checkpointing_changes_no_gradient_and_keeps_less():
    def backward(checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        _, ours = pair("v1.1", num_layers=6)
        ours.checkpointing = checkpointing
        ids, mask = batch()
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = ours(ids, mask).square().sum()
        during = kept
        out.backward()
        return {name: parameter.grad for name, parameter in ours.named_parameters()}, during

    plain, all_kept = backward(False)
    again, few_kept = backward(True)
    largest = max(gradient.abs().max() for gradient in plain.values())
    for name, gradient in plain.items():
        assert (again[name] - gradient).abs().max() <= 1e-6 * largest, name
    assert few_kept < all_kept / 4


def test_bfloat16_is_close_and_stays_bfloat16():
    reference, ours = pair("v1.1")
    ids, mask = batch()
    with torch.no_grad():
        expected = ours(ids, mask)
        ours.bfloat16()
        states = ours(ids, mask)
        assert states.dtype == torch.bfloat16
        close(states, reference.bfloat16()(ids, attention_mask=mask.long()).last_hidden_state, 0.02)
        close(states, expected, 0.05)


def test_float16_is_refused_but_with_wo_in_float32():
    """Where what leaves `wo` is beyond float16, as in the published T5s, `half` still gives the right states."""

    def loud() -> T5Encoder:
        _, ours = pair("v1.1")
        for block in ours.encoder.block:
            for name, factor in (("wi_0", 10), ("wi_1", 10), ("wo", 1e4)):
                getattr(block.layer[1].DenseReluDense, name).weight *= factor
        return ours

    ids, mask = batch()
    with torch.no_grad():
        ours = loud()
        expected = ours(ids, mask)
        with pytest.raises(ValueError, match="bfloat16, or encoder.half"), torch.autocast("cpu", torch.float16):
            ours(ids, mask)
        with pytest.raises(ValueError, match="overflows in the feed-forward's wo"):
            ours.to(torch.float16)(ids, mask)
        feed_forward = ours.encoder.block[0].layer[1]
        x = feed_forward.layer_norm(ours.shared(ids))
        assert feed_forward.DenseReluDense.wo.weight.isfinite().all()
        assert feed_forward.DenseReluDense(x).isinf().any()
        halved = loud().half()
        states = halved(ids, mask)
        wo = [p.dtype for name, p in halved.named_parameters() if name.endswith("wo.weight")]
        rest = {p.dtype for name, p in halved.named_parameters() if not name.endswith("wo.weight")}
    assert wo == [torch.float32] * 3 and rest == {torch.float16} and states.dtype == torch.float16
    close(states, expected, 0.02)


def test_a_fresh_encoder_has_the_published_spread_and_learns():
    torch.manual_seed(0)
    ours = T5Encoder(T5Config(**KINDS["ul2"] | dict(d_model=256, vocab_size=300)))
    reference, _ = pair("ul2", d_model=256, vocab_size=300)
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.numel() > 1000:
            assert math.isclose(parameter.data.std(), expected[name].data.std(), rel_tol=0.05), name
    ids, mask = batch("ul2")
    target = torch.randn(1, 1, 256)
    optimizer = torch.optim.Adam(ours.parameters(), 1e-3)
    losses = []
    for _ in range(30):
        loss = (ours(ids, mask) - target)[mask].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


# --------------------------------------------------------------------------------------------- files of the publishers


@pytest.mark.parametrize("component, count", [
    ("t5_v1_1_xxl_encoder", 4_762_310_656),
    ("kandinsky3_flan_ul2_encoder", 8_721_797_632),
    ("hunyuandit_text_encoder_2_mt5_xl", 1_669_958_656),
    ("t5_small", 35_330_816),
    ("t5_base", 109_628_544),
    ("t5_large", 334_939_648),
])  # fmt: skip
def test_published_encoders_load_strictly(component, count, tmp_path):
    """With duplicates of the embedding and, in a whole T5, a decoder, a head and one tensor that nothing uses."""
    (tmp_path / "config.json").write_text(json.dumps(config(component)))
    encoder = weights.build(T5Encoder, T5Config.from_json(tmp_path))
    whole = names_and_shapes(component)
    extra = {name: tuple(shape) for name, shape in about(component).get("optional", {}).items()}
    extra |= {name: whole[source] for name, source in about(component)["tied_or_duplicate"].items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in (whole | extra).items()}
    published = encoder_half(tensors)
    assert {n: t.shape for n, t in encoder.state_dict().items()} == {n: t.shape for n, t in published.items()}
    assert sum(parameter.numel() for parameter in encoder.parameters()) == count
    if not any(name.startswith("decoder.") for name in whole):
        assert count == about(component)["params"]


def test_the_published_config_is_the_default():
    defaults = T5Config()
    assert {name: config("t5_v1_1_xxl_encoder")[name] for name in vars(defaults)} == vars(defaults)


def test_what_a_config_leaves_unsaid_is_what_transformers_takes(tmp_path):
    (tmp_path / "config.json").write_text('{"num_layers": null}')
    unsaid = transformers.T5Config()
    assert all(getattr(unsaid, name) == value for name, value in vars(T5Config.from_json(tmp_path)).items())


def test_loads_the_encoder_of_a_whole_t5(tmp_path):
    """As transformers saves it, and with the tensor besides that the first releases carry."""
    torch.manual_seed(0)
    reference = transformers.T5ForConditionalGeneration(transformers.T5Config(**KINDS["v1.0"])).eval()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(32, 4)
    tensors["lm_head.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ours = load_t5(tmp_path)
    assert not ours.training
    ids, mask = batch("v1.0")
    with torch.no_grad():
        expected = reference.encoder(ids, attention_mask=mask.long()).last_hidden_state
        close(ours(ids, mask), expected, 1e-5)
        close(load_t5(tmp_path, torch.bfloat16)(ids, mask), expected, 0.05)


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"],
                                   ["shared.weight", "encoder.embed_tokens.weight"]])  # fmt: skip
def test_the_embedding_may_stand_under_either_name_or_both(tmp_path, names):
    reference, ours = pair("v1.1")
    reference.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    embedding = tensors.pop("shared.weight")
    save_file(tensors | {name: embedding.clone() for name in names}, tmp_path / "model.safetensors")
    ids, mask = batch()
    with torch.no_grad():
        assert torch.equal(load_t5(tmp_path)(ids, mask), ours(ids, mask))


def test_loads_shards_and_half_precision_files_with_wo_in_float32(tmp_path):
    """Kandinsky 3's files: shards, only the fp16 variant, `wo` in float32 inside."""
    reference, ours = pair("ul2")
    reference.config.save_pretrained(tmp_path)
    tensors = {n: t.clone() if n.endswith("wo.weight") else t.half() for n, t in ours.state_dict().items()}
    names = sorted(tensors)
    shards = {"model.fp16-00001-of-00002.safetensors": names[::2], "model.fp16-00002-of-00002.safetensors": names[1::2]}
    for shard, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, inside in shards.items() for name in inside}}
    (tmp_path / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    ids, mask = batch("ul2")
    with torch.no_grad():
        expected = ours(ids, mask)
        for dtype, tolerance in ((None, 0.02), (torch.float16, 0.02), (torch.float32, 0.02), (torch.bfloat16, 0.05)):
            encoder = load_t5(tmp_path, dtype)
            wo = encoder.encoder.block[1].layer[1].DenseReluDense.wo.weight
            assert encoder.shared.weight.dtype == (dtype or torch.float16)
            assert wo.dtype == (torch.float32 if dtype in (None, torch.float16) else dtype)
            close(encoder(ids, mask), expected, tolerance)
        kept = load_t5(tmp_path, torch.float16).encoder.block[1].layer[1].DenseReluDense.wo.weight
        assert torch.equal(kept, ours.encoder.block[1].layer[1].DenseReluDense.wo.weight)  # never was float16 between


def test_wrong_configs_and_files_are_named(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json is missing"):
        load_t5(tmp_path)
    for content in ("[]", "{", "3"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(weights.WeightsError, match="config.json"):
            load_t5(tmp_path)
    reference, ours = pair("v1.1")
    reference.config.save_pretrained(tmp_path)
    with pytest.raises(weights.WeightsNotFound, match="model.safetensors"):
        load_t5(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    save_file(tensors | {"encoder.surprise": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(weights.WeightsError, match="encoder.surprise"):
        load_t5(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"feed_forward_proj": "gated-tanh"}))
    with pytest.raises(weights.WeightsError, match="'gated-tanh' is not one of relu, gated-gelu, gated-silu"):
        load_t5(tmp_path)
