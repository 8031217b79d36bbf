"""Ovis 1.6 and 2: transformers' layout against transformers, the published one against its code's arithmetic.

The published code cannot be imported, so `published` writes its steps out, patch by patch and piece by piece, from the
table of facts in networks/ovis.py; towers and language models in it are transformers' own.
"""

import json
import re

import pytest
import torch
import transformers
from conftest import close
from safetensors.torch import load_file, save_file
from test_llava import picture, save_tokenizer
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import nanomed.captions
from nanomed.captions.networks.decoder import DecoderConfig
from nanomed.captions.networks.ovis import Ovis, OvisConfig, Partition
from nanomed.captions.networks.towers import SIGLIP, TowerConfig
from nanomed.weights import WeightsError, build

TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, eos_token_id=257, bos_token_id=256)  # fmt: skip
ATOM, SIGNS, ENTRIES = 290, (291, 292, 293, 294, 295), 41
SIZES = [(28, 28), (60, 45), (45, 60), (11, 19), (200, 31), (31, 200), (56, 56), (90, 88), (85, 29)]
PROMPT = "USER: <image>\nwhat is seen?"


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def shaken(network):
    """Weights far from the start, so that softmax has something to choose."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return network.eval()


# ------------------------------------------------------------------------------------------ the published arithmetic


def published_grid(size, side, most=9):
    """(rows, columns): the fewest tiles that cover more than 90%, among these the best; else the best of all."""
    found = []
    for rows in range(1, most + 1):
        for columns in range(1, most // rows + 1):
            area = 0.0
            for r in range(rows):
                for c in range(columns):
                    width = size[0] // columns if c < columns - 1 else size[0] - c * (size[0] // columns)
                    height = size[1] // rows if r < rows - 1 else size[1] - r * (size[1] // rows)
                    shrunk = min(1.0, side / max(width, height))
                    area += width * height * shrunk**2
            found.append((rows * columns, area / (size[0] * size[1]), (rows, columns)))
    good = [x for x in found if x[1] > 0.9]
    return min(good, key=lambda x: (x[0], -x[1]))[2] if good else min(found, key=lambda x: (-x[1], x[0]))[2]


def published_pixels(image, side, processor):
    """The overview and the tiles, each fitted by the processor and put amid zeros."""
    rows, columns = published_grid(image.size, side)
    width, height = image.size
    parts = [image]
    if rows * columns > 1:
        for r in range(rows):
            for c in range(columns):
                left, above = c * (width // columns), r * (height // rows)
                right = width if c == columns - 1 else left + width // columns
                parts.append(image.crop((left, above, right, height if r == rows - 1 else above + height // rows)))
    out = torch.zeros(len(parts), 3, side, side)
    for i, part in enumerate(parts):
        w, h = part.size
        w, h = (side, side) if w == h else (side, int(h / w * side)) if w > h else (int(w / h * side), side)
        shown = processor.preprocess(part, size=dict(height=h, width=w), return_tensors="pt")["pixel_values"][0]
        out[i, :, (side - h) // 2 : (side - h) // 2 + h, (side - w) // 2 : (side - w) // 2 + w] = shown
    return out, rows, columns


def published(image, before, after, side, processor, tower, head, norm, table, llm, stride, scale=1.0):
    """Logits of a prompt with an image: states merged, a distribution for each, its mean embedding, signs between.

    scale   of what is not text: Gemma 2 multiplied all that it was given by sqrt(width) when Ovis 1.6 was published,
            while transformers' embedding does it now, and for text alone
    """
    pixels, rows, columns = published_pixels(image, side, processor)
    tiles = []
    for states in tower(pixels):
        count = int(len(states) ** 0.5)
        tokens = []
        for y in range(0, count, stride):
            for x in range(0, count, stride):
                merged = [states[(y + i) * count + x + j] if y + i < count and x + j < count
                          else torch.zeros(states.shape[1]) for i in range(stride) for j in range(stride)]  # fmt: skip
                likely = norm(head(torch.cat(merged))).softmax(-1)
                tokens.append(torch.cat([likely, torch.zeros(5)]) @ table)
        tiles.append(torch.stack(tokens))
    tiles, sign = [tile * scale for tile in tiles], scale * table[len(table) - 5 :].unsqueeze(1)
    parts = [sign[0], tiles[0], sign[1]]
    for r in range(rows if len(tiles) > 1 else 0):
        for c in range(columns):
            parts.append(tiles[1 + r * columns + c])
            if c < columns - 1:
                parts.append(sign[2])
        if r < rows - 1:
            parts.append(sign[3])
    embed = llm.get_input_embeddings()
    parts = [embed(torch.tensor(before)), *parts, sign[4], embed(torch.tensor(after))]
    return llm(inputs_embeds=torch.cat(parts)[None]).logits


# -------------------------------------------------------------------------------------------------------- miniatures


class Ovis16:
    """SigLIP and Gemma 2 of transformers under the published names; 7 x 7 patches merged by 2, so zeros fill up."""

    def __init__(self, folder):
        vision = transformers.SiglipVisionConfig(**TOWER, patch_size=4, image_size=28)
        text = transformers.Gemma2Config(**TEXT, head_dim=16, query_pre_attn_scalar=24, sliding_window=64,
                                         attn_implementation="eager")  # fmt: skip
        self.tower = shaken(transformers.SiglipVisionModel(vision))
        self.llm = shaken(transformers.Gemma2ForCausalLM(text))
        self.rest = shaken(Rest(16 * 4))
        self.processor = SiglipImageProcessorPil(size=dict(height=28, width=28))
        tensors = prefixed("visual_tokenizer.backbone.vision_model.", self.tower.state_dict())
        tensors = {name.replace("vision_model.vision_model", "vision_model"): t for name, t in tensors.items()}
        tensors |= prefixed("llm.", self.llm.state_dict()) | named(self.rest)
        write(folder, tensors, text, dict(vision.to_dict(), model_type="siglip_vision_model"), self.processor)
        self.ours = nanomed.captions.load(folder)

    def logits(self, image):
        states = []
        hook = self.tower.encoder if hasattr(self.tower, "encoder") else self.tower.vision_model.encoder
        hook = hook.register_forward_hook(lambda module, given, out: states.append(out.last_hidden_state))

        def tower(pixels):
            self.tower(pixels)  # what the encoder gives, before the last norm and the pooling head
            return states.pop()

        found = published(image, *self.ours.pieces(PROMPT), 28, self.processor, tower, *self.rest.children(),
                          self.rest.table, self.llm, 2, 32**0.5)  # fmt: skip
        hook.remove()
        return found

    def pixels(self, image):
        return published_pixels(image, 28, self.processor)[0]


class Rest(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.head = torch.nn.Linear(width, ENTRIES - 5, bias=False)
        self.norm = torch.nn.LayerNorm(ENTRIES - 5)
        self.table = torch.nn.Parameter(torch.randn(ENTRIES, 32))


def named(rest):
    return {"visual_tokenizer.head.0.weight": rest.head.weight, "visual_tokenizer.head.1.weight": rest.norm.weight,
            "visual_tokenizer.head.1.bias": rest.norm.bias, "vte.weight": rest.table}  # fmt: skip


def prefixed(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write(folder, tensors, text, tower, processor):
    save_tokenizer(folder, image=False)
    processor.save_pretrained(folder)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    said = {"model_type": "ovis", "hidden_size": 32, "llm_config": json.loads(text.to_json_string(use_diff=False)),
            "visual_tokenizer_config": {"backbone_config": tower, "hidden_stride": 2, "vocab_size": ENTRIES,
                                        "tokenize_function": "softmax", "drop_cls_token": False}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))


class Ovis2Hf:
    """transformers' own model and layout; 8 x 8 patches, for it fills up no others rightly."""

    def __init__(self, folder, side=32):
        settings = transformers.Ovis2Config(
            vision_config=dict(**TOWER, patch_size=4, image_size=side, vocab_size=ENTRIES, hidden_stride=2),
            text_config=dict(model_type="qwen2", **TEXT), hidden_size=32, vocab_size=300, image_token_id=ATOM,
            visual_indicator_token_ids=SIGNS)  # fmt: skip
        self.reference = shaken(transformers.Ovis2ForConditionalGeneration(settings))
        self.processor = Ovis2ImageProcessorPil(size=dict(height=side, width=side), crop_to_patches=True)
        save_tokenizer(folder, image=False)
        self.reference.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        self.ours = nanomed.captions.load(folder)

    def pixels(self, image):
        return self.processor(image, return_tensors="pt")["pixel_values"]

    def logits(self, image):
        return self.reference(**self.inputs(image)).logits

    def inputs(self, image):
        found = self.processor(image, return_tensors="pt")
        rows, columns = found["grids"][0].tolist()
        tile, (before, after) = [ATOM] * 16, self.ours.pieces(PROMPT)
        ids = [*before, SIGNS[0], *tile, SIGNS[1]]
        if rows * columns > 1:
            for r in range(rows):
                for c in range(columns):
                    ids += tile + [SIGNS[2]] * (c < columns - 1)
                ids += [SIGNS[3]] * (r < rows - 1)
        ids = torch.tensor([[*ids, SIGNS[4], *after]])
        return dict(input_ids=ids, pixel_values=found["pixel_values"], attention_mask=torch.ones_like(ids))


class Ovis2:
    """The same networks under the published names, whose code reads the state before the trunk's last norm; 7 x 7
    patches."""

    NAMES = (("model.vision_tower.transformer.embeddings.patch_embedding", "B.preprocessor.patchifier.proj"),
             ("model.vision_tower.transformer.embeddings.rms_norm", "B.preprocessor.patchifier.norm"),
             ("model.vision_tower.transformer.embeddings.position_embedding.weight", "B.preprocessor.pos_embed"),
             ("model.vision_tower.transformer.rms_norm", "B.trunk.post_trunk_norm"),
             ("model.vision_tower.transformer.encoder.layers", "B.trunk.blocks"),
             ("attention.out_proj", "attn.proj"), ("rms_norm1", "norm_1"), ("rms_norm2", "norm_2"),
             ("ffn.gate_proj", "mlp.fc1"), ("ffn.down_proj", "mlp.fc2"), ("ffn.up_proj", "mlp.fc3"),
             ("model.vision_tower.head_linear", "visual_tokenizer.head.0"),
             ("model.vision_tower.head_norm", "visual_tokenizer.head.1"),
             ("model.visual_embeddings_table", "vte"), ("model.language_model", "llm.model"),
             ("lm_head", "llm.lm_head"))  # fmt: skip

    def __init__(self, folder):
        (folder / "hf").mkdir()
        other = Ovis2Hf(folder / "hf", 28)
        tensors = load_file(folder / "hf" / "model.safetensors")
        for layer in range(2):
            place = f"model.vision_tower.transformer.encoder.layers.{layer}.attention."
            fused = torch.cat([tensors.pop(f"{place}{letter}_proj.weight") for letter in "qkv"])
            tensors[f"B.trunk.blocks.{layer}.attn.qkv.weight"] = fused
        renamed = {}
        for name, tensor in tensors.items():
            for old, new in self.NAMES:
                name = name.replace(old, new)
            renamed[re.sub("^B", "visual_tokenizer.backbone", name)] = tensor[None] if "pos_embed" in name else tensor
        config = other.reference.config
        config.text_config.tie_word_embeddings = True
        self.processor = transformers.CLIPImageProcessorPil(do_center_crop=False, size=dict(shortest_edge=28),
                                                            crop_size=dict(height=28, width=28))  # fmt: skip
        tower = dict(
            TOWER, patch_size=4, image_size=28, model_type="aimv2", qkv_bias=False, use_bias=False, rms_norm_eps=1e-5
        )
        write(folder, renamed, config.text_config, tower, self.processor)
        self.reference = other.reference
        self.ours = nanomed.captions.load(folder)

    def pixels(self, image):
        return published_pixels(image, 28, self.processor)[0]

    def logits(self, image):
        model, tower = self.reference.model, self.reference.model.vision_tower
        transformer = tower.transformer
        llm = transformers.Qwen2ForCausalLM(self.reference.config.text_config).eval()
        llm.model.load_state_dict(model.language_model.state_dict())

        def states(pixels):
            return transformer.encoder(inputs_embeds=transformer.embeddings(pixels)).last_hidden_state

        return published(image, *self.ours.pieces(PROMPT), 28, self.processor, states, tower.head_linear,
                         tower.head_norm, model.visual_embeddings_table.weight, llm, 2)  # fmt: skip


@pytest.fixture(scope="module", params=[Ovis16, Ovis2, Ovis2Hf], ids=["1.6", "2", "2-hf"])
def miniature(request, tmp_path_factory):
    with torch.no_grad():
        return request.param(tmp_path_factory.mktemp("ovis"))


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_the_references(miniature, size):
    """To float32's last place: the same values in the same order."""
    close(miniature.ours.network.partition.cut(picture(size)), miniature.pixels(picture(size)), 1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal(miniature, size):
    close(miniature.ours.logits(picture(size), PROMPT), miniature.logits(picture(size)), 1e-4)


def test_the_layouts_differ_in_the_last_norm_and_in_tiling(tmp_path):
    """The same weights in both layouts: an image of one square tile is cut alike, and still read otherwise."""
    (published := tmp_path / "a").mkdir()
    theirs = Ovis2(published)
    hf = nanomed.captions.load(published / "hf")
    assert torch.equal(
        hf.network.partition.cut(picture((28, 28))), theirs.ours.network.partition.cut(picture((28, 28)))
    )
    assert not torch.allclose(hf.logits(picture((28, 28)), PROMPT), theirs.ours.logits(picture((28, 28)), PROMPT))
    assert theirs.ours.network.partition.grid((85, 29)) == hf.network.partition.grid((85, 29))[::-1] == (1, 3)


def test_greedy_tokens_equal_over_64_steps(tmp_path):
    small = Ovis2Hf(tmp_path)
    inputs = small.inputs(picture((60, 45)))
    length = inputs["input_ids"].shape[1]
    small.ours.ends, small.reference.generation_config.eos_token_id = (), None
    tokens = small.reference.generate(**inputs, max_new_tokens=64, do_sample=False, eos_token_id=None)[0, length:]
    text = small.ours.generate([picture((60, 45))], [PROMPT], max_new_tokens=64)[0]
    assert len(tokens) == 64 and text == small.ours.tokenizer.decode(tokens.tolist())


def test_batches_of_unequal_images_equal_single_ones(miniature):
    images, texts = [picture((60, 45)), picture((19, 11), 1)], [PROMPT, "<image>and a longer question about it?"]
    how = dict(max_new_tokens=16, temperature=0.8, top_k=50, top_p=0.9, seed=5)
    together = miniature.ours.generate(images, texts, keys=[("a",), ("b",)], **how)
    alone = [miniature.ours.generate([i], [t], keys=[(k,)], **how)[0] for i, t, k in zip(images, texts, "ab")]
    assert together == alone


def test_each_asks_in_its_own_conversation(miniature):
    asked = miniature.ours.ask("What?")
    if isinstance(miniature, Ovis16):
        assert asked == "<bos><start_of_turn>user\n<image>\nWhat?<end_of_turn>\n<start_of_turn>model\n"
    else:
        assert asked == ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?"
                         "<|im_end|>\n<|im_start|>assistant\n")  # fmt: skip


@pytest.mark.parametrize("size, grid", [((448, 448), (1, 1)), ((720, 576), (2, 2)), ((1920, 1072), (2, 4)),
                                        ((600, 450), (1, 2)), ((4000, 500), (1, 8))])  # fmt: skip
def test_grids_of_the_published_rule(size, grid):
    assert Partition().grid(size) == published_grid(size, 448) == grid


@pytest.mark.parametrize(
    "part, change",
    [
        ("llm_config", dict(model_type="llama")),
        ("visual_tokenizer_config", dict(tokenize_function="st_argmax")),
        ("visual_tokenizer_config", dict(drop_cls_token=True)),
        ("visual_tokenizer_config", dict(backbone_config=dict(model_type="clip"))),
    ],
)
def test_what_is_not_known_is_refused_by_name(part, change):
    said = {"llm_config": {"model_type": "gemma2"},
            "visual_tokenizer_config": {"backbone_config": {"model_type": "siglip_vision_model"}}}  # fmt: skip
    OvisConfig.from_settings(said, "x")
    said[part] = said[part] | change
    with pytest.raises(WeightsError, match="is not known here"):
        OvisConfig.from_settings(said, "x")


def test_full_sizes_have_the_published_numbers_of_parameters():
    """Ovis 1.6 Gemma 2 9B: 10.2 billion, as its card says; Ovis 2 8B: 8.9 billion."""
    gemma = DecoderConfig.from_settings(dict(
        model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256))  # fmt: skip
    qwen = DecoderConfig.from_settings(dict(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, rope_theta=1e6))  # fmt: skip
    huge = TowerConfig(hidden_size=1536, intermediate_size=4096, num_attention_heads=12)
    for config, expected in ((OvisConfig(gemma, SIGLIP, 65536, 2), 10.2e9), (OvisConfig(qwen, huge, 65536), 8.9e9)):
        network = build(Ovis, config, Partition())
        assert abs(sum(p.numel() for p in network.parameters()) / expected - 1) < 0.01
