"""LLaVA-NeXT against transformers: pixels, logits and tokens in the published layouts, tiled as each layout has it."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import close
from manifests import config, names_and_shapes
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import nanomed.captions
from nanomed import weights
from nanomed.captions.generation import generate
from nanomed.captions.memory import Int8Linear
from nanomed.captions.networks.llava import LlavaConfig, LlavaNext, renamed
from nanomed.captions.networks.tiles import Tiles
from nanomed.weights import WeightsError

GRIDS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
VISION = dict(hidden_size=64, intermediate_size=48, num_hidden_layers=3, num_attention_heads=1, image_size=28,
              patch_size=7, projection_dim=16)  # fmt: skip
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            pad_token_id=0)  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, dict(rope_parameters=dict(rope_type="default", rope_theta=5e5))),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None)),
}
SIZES = [(72, 57), (60, 45), (19, 11), (11, 19), (28, 28), (17, 17), (28, 56), (200, 31), (31, 200), (56, 56)]
PROMPT = "USER: <image>\nwhat is seen? ASSISTANT:"


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def picture(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save_tokenizer(folder, image: bool) -> int:
    """Bytes and special tokens, a mark before every text; returns how many tokens there are."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in ("<s>", "</s>", *["<image>"][:image])])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 256)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


class Miniature:
    """transformers' model with weights far from the start, its folder in one of the layouts, and ours read from it."""

    def __init__(self, folder, layout: str):
        self.layout = layout
        family = "mistral" if "mistral" in layout else "llama"
        kind, more = FAMILIES[family]
        vocabulary = save_tokenizer(folder, image=layout != "lmms")
        self.grids = [pair[::-1] for pair in GRIDS] if layout == "lmms" else GRIDS  # read by transformers as (h, w)
        settings = transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION), image_token_index=258,
            image_grid_pinpoints=self.grids,
            text_config=kind(vocab_size=max(vocabulary, 259), eos_token_id=None, **TEXT, **more))  # fmt: skip
        torch.manual_seed(0)
        self.reference = transformers.LlavaNextForConditionalGeneration(settings).eval()
        for parameter in self.reference.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        self.processor = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                                    image_grid_pinpoints=self.grids)  # fmt: skip
        self.reference.save_pretrained(folder, max_shard_size="60KB")
        if layout == "lmms":
            self.as_llava(folder)
        else:
            self.processor.save_pretrained(folder)
        self.ours = nanomed.captions.load(folder)

    def as_llava(self, folder):
        """The same tensors under the names of `lmms-lab`, and what its config.json says."""
        names = {"multi_modal_projector.linear_1": "model.mm_projector.0", "image_newline": "model.image_newline",
                 "multi_modal_projector.linear_2": "model.mm_projector.2", "language_model.lm_head": "lm_head",
                 "language_model.model.": "model.",
                 "vision_tower.": "model.vision_tower.vision_tower.vision_model."}  # fmt: skip
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                old = next(old for old in names if name.startswith(old))
                tensors[names[old] + name[len(old) :]] = tensor
            file.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        save_file(tensors, folder / "model.safetensors")
        text = json.loads((folder / "config.json").read_text())["text_config"]
        said = {**text, "model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
                "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
                "mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": str(GRIDS)}  # fmt: skip  # a text, as some of LLaVA's files have it
        (folder / "config.json").write_text(json.dumps(said))

    def inputs(self, image, text=PROMPT):
        """The reference's own preprocessing, and a prompt of its tokens, the image's repeated as often as it needs."""
        found = self.processor(image, return_tensors="pt")
        before, after = self.ours.pieces(text)
        count = self.reference.model.get_image_features(**found).pooler_output[0].shape[0]
        ids = torch.tensor([[*before, *[258] * count, *after]])
        return dict(found, input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.fixture(scope="module", params=["llama-hf", "mistral-hf", "lmms"])
def miniature(request, tmp_path_factory):
    with torch.no_grad():
        return Miniature(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_references_to_the_bit(miniature, size):
    expected = miniature.processor(picture(size), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(miniature.ours.network.tiles.cut(picture(size)), expected)


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_for_every_shape(miniature, size):
    expected = miniature.reference(**miniature.inputs(picture(size))).logits
    close(miniature.ours.logits(picture(size), PROMPT), expected, 1e-4)
    assert expected.shape[1] == miniature.ours.network.tiles.tokens(size) + sum(map(len, miniature.ours.pieces(PROMPT)))


def test_ties_are_tiled_as_the_layout_has_it(miniature):
    """A small square image fits upright and lying canvases alike: the first pair of the list wins, read in its way."""
    tall = miniature.layout == "lmms"
    assert miniature.ours.network.tiles.canvas((28, 28)) == ((28, 56) if tall else (56, 28))


def test_greedy_tokens_equal_over_64_steps(miniature):
    inputs = miniature.inputs(picture((60, 45)))
    tokens = miniature.reference.generate(**inputs, max_new_tokens=64, do_sample=False)[0]
    tokens = tokens[inputs["input_ids"].shape[1] :]
    text = miniature.ours.generate([picture((60, 45))], [PROMPT], max_new_tokens=64)[0]
    assert len(tokens) == 64 and text == miniature.ours.tokenizer.decode(tokens.tolist())
    assert len(set(tokens.tolist())) > 3  # no stuck one


def test_batches_of_unequal_prompts_equal_single_ones_drawn_too(miniature):
    images, texts = [picture((60, 45)), picture((19, 11), 1)], [PROMPT, "<image>and a longer question about it?"]
    how = dict(max_new_tokens=24, temperature=0.8, top_k=50, top_p=0.9, seed=5)
    together = miniature.ours.generate(images, texts, keys=[("a", 1), ("b", 1)], **how)
    alone = [miniature.ours.generate([i], [t], keys=[(k, 1)], **how)[0] for i, t, k in zip(images, texts, "ab")]
    assert together == alone
    assert miniature.ours.generate(images, texts, keys=[("a", 2), ("b", 2)], **how) != together


def test_a_refused_answer_is_drawn_again_without_another_look(miniature):
    """The retry is that of a model that never saw the prompt before; other images, or none, are looked at anew."""
    ours, images = miniature.ours, [picture((60, 45)), picture((19, 11), 1), picture((56, 56), 2)]
    texts = [PROMPT, "<image>and a longer question about it?", PROMPT]
    how, known, looks = dict(max_new_tokens=12, temperature=0.8, seed=5), {}, []
    hook = ours.network.vision_tower.vision_model.embeddings.register_forward_hook(lambda *_: looks.append(1))
    ours.generate(images, texts, keys=[(k, 1) for k in "abc"], known=known, **how)
    assert len(looks) == 1
    for rows in ([0, 2], [2], [2, 2]):
        some, said, keys = [images[i] for i in rows], [texts[i] for i in rows], [("abc"[i], i, n) for n, i in
                                                                                   enumerate(rows)]  # fmt: skip
        again = ours.generate(some, said, keys=keys, known=known, **how)
        assert len(looks) == 1
        assert again == [ours.generate([i], [t], keys=[k], **how)[0] for i, t, k in zip(some, said, keys)]
        del looks[1:]
    ours.generate([images[2], images[0].copy()], [PROMPT] * 2, known=known, **how)
    ours.generate([None], ["words alone"], known=known, **how)
    hook.remove()
    assert len(looks) == 2 and len(known["asked"]) == 1
    assert ours.generate([], []) == []


def test_the_prompt_and_its_images_must_agree(miniature):
    with pytest.raises(ValueError, match="0 <image> for 1 image"):
        miniature.ours.logits(picture((20, 20)), "no image")
    with pytest.raises(ValueError, match="1 <image> for 0 image"):
        miniature.ours.logits(None, PROMPT)
    assert miniature.ours.logits(None, "words alone").shape[:2] == (1, 12)
    with pytest.raises(ValueError, match="2000 x 1 pixels is too narrow"):
        miniature.ours.network.tiles.cut(picture((2000, 1)))


def test_the_mark_before_a_text_is_there_once(miniature):
    before, after = miniature.ours.pieces("ab<image>c")
    assert (before[0], len(before), len(after)) == (256, 3, 1)


def test_loads_in_another_dtype(tmp_path):
    small = Miniature(tmp_path, "llama-hf")
    half = nanomed.captions.load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    close(half.logits(picture((60, 45)), PROMPT).float(), small.ours.logits(picture((60, 45)), PROMPT), 0.05)


def test_int8_rows_are_within_half_a_step_and_their_logits_near(tmp_path):
    """A weight is off by 1/254 of its row's largest at most; logits of the miniature by some per cent."""
    small = Miniature(tmp_path, "mistral-hf")
    eight = nanomed.captions.load(tmp_path, int8=True)
    count = 0
    for name, module in eight.network.named_modules():
        if isinstance(module, Int8Linear):
            plain = small.ours.network.get_submodule(name).weight
            error = (module.weight.float() * module.scale[:, None] - plain).abs()
            assert (error <= plain.abs().amax(1, keepdim=True) * (1 / 254 + 1e-6)).all() and error.max() > 0
            assert module.weight.dtype == torch.int8
            count += 1
    assert count == 2 * 7
    close(eight.logits(picture((60, 45)), PROMPT), small.ours.logits(picture((60, 45)), PROMPT), 0.05)


def test_a_tower_that_is_not_in_the_files_is_read_from_its_repository(tmp_path):
    small = Miniature(tmp_path / "lmms-lab" / "a", "lmms")
    file = tmp_path / "lmms-lab" / "a" / "model.safetensors"
    tensors = load_file(file)
    tower = {n.split("vision_tower.vision_tower.")[1]: t for n, t in tensors.items() if "vision_tower" in n}
    save_file({n: t for n, t in tensors.items() if "vision_tower" not in n}, file)
    repository = tmp_path / "openai" / "clip-vit-large-patch14-336"
    repository.mkdir(parents=True)
    save_file(tower, repository / "model.safetensors")
    again = nanomed.captions.load(file.parent)
    assert torch.equal(again.logits(picture((20, 30)), PROMPT), small.ours.logits(picture((20, 30)), PROMPT))


@pytest.fixture
def plain(tmp_path):
    """A Mistral's folder, and transformers' model of it."""
    vocabulary = save_tokenizer(tmp_path, image=False)
    torch.manual_seed(0)
    settings = transformers.MistralConfig(vocab_size=vocabulary, eos_token_id=257, **TEXT)
    reference = transformers.MistralForCausalLM(settings).eval()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    reference.save_pretrained(tmp_path)
    return reference, tmp_path


def test_a_plain_language_model_is_read_by_the_same_word(plain):
    reference, folder = plain
    ours = nanomed.captions.load(folder)
    ids = torch.tensor([ours.tokenizer.encode("[INST] why? [/INST]").ids])
    close(ours.logits(None, "[INST] why? [/INST]"), reference(ids).logits, 1e-4)
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
                                  pad_token_id=0)[0, ids.shape[1] :].tolist()  # fmt: skip
    assert ours.generate(None, ["[INST] why? [/INST]"], max_new_tokens=30) == [ours.tokenizer.decode(expected)]
    with pytest.raises(ValueError, match="reads text alone"):
        ours.generate([picture((9, 9))], [PROMPT])


def test_a_text_ends_where_the_files_say(plain):
    """At the tokens of generation_config.json, else of config.json; what stands behind them is not handed out."""
    _, folder = plain
    (folder / "generation_config.json").unlink()
    assert nanomed.captions.load(folder).ends == (257,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 257]}')
    ours = nanomed.captions.load(folder)
    assert ours.ends == (5, 257)
    ids = generate(ours.writer, *ours.read([None], ["ab"]), 30)[0].tolist()
    ours.ends = (ids[4],)
    first = ids.index(ids[4])
    assert ours.generate(None, ["ab"], max_new_tokens=30)[0] == ours.tokenizer.decode(ids[:first])


def test_a_folder_without_a_tokenizer_is_named(plain):
    _, folder = plain
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="tokenizer.json: not a tokenizer"):
        nanomed.captions.load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match="tokenizer.json is missing"):
        nanomed.captions.load(folder)


@pytest.mark.parametrize("size, tokens", [((720, 576), 2438), ((512, 512), 2928), ((600, 450), 2340),
                                          ((1920, 1072), 1850), ((224, 224), 1176)])  # fmt: skip
def test_published_sizes_take_the_published_number_of_places(size, tokens):
    assert Tiles().tokens(size) == Tiles(wide=True).tokens(size) == tokens


def test_the_size_without_border_is_rounded_as_the_layout_has_it():
    """205 * (48 / 656) is 14.999999999999998: 14 columns of patches without rounding, as in LLaVA's code, so 5 of 24
    are cut off on either side; 15 after transformers' rounding to 7 digits, so 4."""
    assert Tiles().kept((205, 656)) == (1, 2, 4, 0) and Tiles(wide=True).kept((205, 656)) == (1, 2, 5, 0)


@pytest.mark.parametrize("component", ["llava_next_llama3_8b_lmms", "llava_next_llama3_8b", "llava_next_mistral_7b"])
def test_published_files_load_strictly_at_full_size(component):
    said = config(component)
    shapes = names_and_shapes(component)
    if "original_layout" in said:
        said = said["text_config"] | said["original_layout"] | dict(model_type="llava_llama")
    else:
        said = said | dict(model_type="llava_next")
        said["text_config"] = said["text_config"] | dict(model_type="mistral" if "mistral" in component else "llama")
    tensors = renamed({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    read = LlavaConfig.from_settings(said, component, {name: tensor.shape for name, tensor in tensors.items()})
    network = weights.build(LlavaNext, read, Tiles())
    assert {n: t.shape for n, t in network.state_dict().items()} == {n: t.shape for n, t in tensors.items()}
    assert read.vision == LlavaConfig.vision and read.layer == -2
    assert read.text.rope_theta == (1e6 if "mistral" in component else 5e5) and read.text.sliding_window is None
    assert read.image_token == said.get("image_token_index")


@pytest.mark.parametrize("said", [dict(vision_feature_select_strategy="full"), dict(projector_hidden_act="relu"),
                                  dict(vision_feature_layer=[-2, -1]), dict(vision_feature_layer=-9)])  # fmt: skip
def test_what_is_not_known_is_refused_by_name(said):
    base = transformers.LlavaNextConfig(vision_config=transformers.CLIPVisionConfig(**VISION)).to_dict()
    with pytest.raises(WeightsError, match="select_strategy|hidden_act|no states"):
        LlavaConfig.from_settings(base | said, "config.json")
    with pytest.raises(WeightsError, match="mm_projector_type"):
        LlavaConfig.from_settings(dict(model_type="llava_llama", mm_projector_type="linear"), "config.json")


@pytest.mark.parametrize("content, message", [
    (dict(crop_size=dict(height=14, width=14)), "tiles of 14 pixels for a tower that looks at 28"),
    (dict(image_grid_pinpoints=[[28, 40]]), "28, 40.* is not made of tiles"),
    (dict(image_grid_pinpoints="(1x1),(6x6)"), "preprocessor_config.json"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_by_file(tmp_path, content, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=message):
        Tiles.of(tmp_path, {}, 28, 7, wide=False)
