"""FBD's BiomedCLIP against a plain ViT by timm's names, CLIPScore against transformers, both from pixels."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import close
from PIL import Image
from safetensors.torch import save_file

from nanomed import weights
from nanomed.evaluation import extractors, imagesets, measuring
from nanomed.metrics import entries, medvqa, scores
from nanomed.metrics.networks import biomedclip
from nanomed.metrics.networks.vit import VitConfig
from nanomed.text.bert import BertConfig
from nanomed.text.clip_vision import MEAN, STD, preprocess
from nanomed.text.tokenizers import train_bpe
from nanomed.text.wordpiece import train_wordpiece

SMALL = VitConfig(32, 2, 4, 64, layer_norm_eps=1e-6, image_size=32, patch_size=8)


def open_clip_file(folder, kind: str) -> dict[str, torch.Tensor]:
    """A whole model of random weights by the published names, with a text tower that is not read."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, 32), "pos_embed": (1, 17, 32), "patch_embed.proj.weight": (32, 3, 8, 8),
              "patch_embed.proj.bias": (32,), "norm.weight": (32,), "norm.bias": (32,)}  # fmt: skip
    for i in range(2):
        for name, shape in {"norm1": (32,), "norm2": (32,), "attn.qkv": (96, 32), "attn.proj": (32, 32),
                            "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    tensors = {f"visual.trunk.{name}": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"visual.head.proj.weight": torch.randn(12, 32), "text.proj.0.weight": torch.zeros(3, 3),
                "logit_scale": torch.tensor(4.6)}  # fmt: skip
    if kind == "pickle":
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(tensors, folder / "open_clip_model.safetensors")
    return tensors


def timm_vit(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What timm's VisionTransformer and OpenCLIP's head compute, step by step."""
    t = {name.removeprefix("visual.trunk."): tensor for name, tensor in t.items()}

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (32,), t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = F.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], 8).flatten(2).transpose(1, 2)
    x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1) + t["pos_embed"]
    for i in range(2):
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).reshape(len(x), 17, 3, 4, 8)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(-1, -2)) * 8**-0.5).softmax(-1) @ v
        x = x + linear(f"blocks.{i}.attn.proj", attended.transpose(1, 2).reshape(len(x), 17, 32))
        x = x + linear(f"blocks.{i}.mlp.fc2", F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))))
    return norm("norm", x)[:, 0] @ t["visual.head.proj.weight"].T


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_biomedclip_is_timms_vit_with_its_head(tmp_path, kind):
    tensors = open_clip_file(tmp_path, kind)
    ours = biomedclip.load(tmp_path, SMALL)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        close(ours(x), timm_vit(tensors, x), 1e-5)
    assert not any(p.requires_grad for p in ours.parameters())


def test_the_published_shape_is_the_default():
    network = weights.build(biomedclip.BiomedClipVision)
    assert sum(p.numel() for p in network.parameters()) == 85_798_656 + 512 * 768


def test_a_folder_without_the_file_says_which():
    with pytest.raises(weights.WeightsNotFound, match="open_clip_pytorch_model.bin"):
        biomedclip.load("/nowhere")


def test_fbd_sees_images_by_clips_preprocessing(tmp_path, monkeypatch):
    place = tmp_path / biomedclip.REPOSITORY
    place.mkdir(parents=True)
    tensors, load = open_clip_file(place, "pickle"), biomedclip.load
    monkeypatch.setattr(biomedclip, "load", lambda folder: load(folder, SMALL))
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 50), (64, 64), (40, 50))]
    found = extractors.fbd(str(tmp_path), 2, "cpu").columns(images)["features"]
    x = torch.stack([preprocess(Image.fromarray(image), 32) for image in images])
    close(found, timm_vit(tensors, x), 1e-5)


# -------------------------------------------------------------------------------------------------------- CLIPScore


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole CLIP of random weights with a tokenizer, as the published repository lies in a folder of weights."""
    root = tmp_path_factory.mktemp("weights")
    place = root / extractors.CLIP_SCORE
    place.mkdir(parents=True)
    tokenizer = train_bpe(["A photo depicts a polyp", "an instrument in the cecum"] * 3, 300)
    tokenizer.save(place)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=len(tokenizer), eos_token_id=2),
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           image_size=32, patch_size=8),
        projection_dim=24,
    )  # fmt: skip
    reference = transformers.CLIPModel(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(place)
    return root, place, reference, tokenizer


def test_clip_score_is_the_published_one(folder):
    """2.5 max(cos, 0) of transformers' embeddings of "A photo depicts ..." and of images by CLIP's preprocessing."""
    root, place, reference, tokenizer = folder
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    prompts = ["a polyp", "an instrument", "a polyp in the cecum"]
    extractor = extractors.clip(str(root), 2, "cpu")
    found = extractor.columns(images)["features"]
    texts = extractors.clip_prompts(prompts, str(root), 2, "cpu")
    x = torch.stack([preprocess(Image.fromarray(image), 32) for image in images])
    ids, _ = tokenizer(["A photo depicts " + prompt for prompt in prompts])
    with torch.no_grad():
        expected = reference.visual_projection(reference.vision_model(x).pooler_output)
        close(found, expected, 1e-5)
        said = reference.text_projection(reference.text_model(ids).pooler_output)
        close(texts, said, 1e-5)
    cosine = F.cosine_similarity(expected.double(), said.double())
    each = scores.clip_scores(found, texts)
    close(each, 2.5 * cosine.clamp(min=0), 1e-5)
    entry = entries.clip_score(found, texts, "p", "hash", each)["CLIPScore"]
    assert entry["value"] == pytest.approx(each.mean().item()) and entry["floor"]["value"] == entry["value"]
    assert entry["interval"]["low"] <= entry["value"] <= entry["interval"]["high"]


def test_clip_score_of_opposites_is_0_and_of_equals_two_and_a_half():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scores.clip_scores(x, 3 * x), torch.full((4,), 2.5).double())
    assert torch.equal(scores.clip_scores(x, -x), torch.zeros(4).double())
    with pytest.raises(ValueError, match="4 images have no score with 3 prompts"):
        scores.clip_scores(x, x[:3])


def test_the_numbers_of_clips_preprocessing_are_openais():
    assert MEAN == (0.48145466, 0.4578275, 0.40821073) and STD == (0.26862954, 0.26130258, 0.27577711)


# -------------------------------------------------------------------------------------------------- BiomedCLIP's text


@pytest.fixture
def biomed(tmp_path):
    """A whole BiomedCLIP of random weights by OpenCLIP's names, with its tokenizer's vocabulary."""
    place = tmp_path / biomedclip.REPOSITORY
    place.mkdir(parents=True)
    tensors = open_clip_file(place, "safetensors")
    tokenizer = train_wordpiece(["a polyp in the caecum", "biopsy forceps"], 120)
    tokenizer.save(place)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        max_position_embeddings=300,
    )  # fmt: skip
    torch.manual_seed(1)
    reference = transformers.BertModel(config, add_pooling_layer=False).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    first, second = torch.nn.Linear(24, 18, bias=False), torch.nn.Linear(18, 12, bias=False)
    head = torch.nn.Sequential(first, torch.nn.GELU(), second)
    del tensors["text.proj.0.weight"]
    tensors |= {f"text.transformer.{name}": t for name, t in reference.state_dict().items()}
    tensors |= {"text.transformer.embeddings.position_ids": torch.arange(300)[None]}  # which older files hold
    tensors |= {f"text.proj.{name}": t for name, t in head.state_dict().items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, place / "open_clip_model.safetensors")
    return tmp_path, tokenizer, reference, head, BertConfig(len(tokenizer), 24, 2, 4, 40, 300)


def test_biomedclip_reads_prompts_as_transformers_bert_with_openclips_head(biomed):
    """The state of [CLS] of prompts padded to 256 tokens, a long one cut there, through Linear, GELU, Linear."""
    root, tokenizer, reference, head, config = biomed
    prompts = ["A polyp in the caecum.", "biopsy forceps", "a polyp " * 200]
    found = extractors.biomedclip_prompts(prompts, str(root), 2, "cpu", config)
    ids, mask = tokenizer(prompts, 256)
    assert mask.sum(1).tolist()[2] == 256 and not mask[:2].all(1).any()
    with torch.no_grad():
        close(found, head(reference(ids, mask.long()).last_hidden_state[:, 0]), 1e-5)


def test_the_published_text_shape_is_pubmedberts():
    tower = weights.build(extractors.Bert, extractors.BIOMED_TEXT)
    assert sum(p.numel() for p in tower.parameters()) == 109_482_240 - 768 * 769  # bert-base-uncased without its pooler


def test_biomedclip_score_is_asked_for_by_name(biomed, monkeypatch):
    """From images and prompts to the entry: 2.5 max(cos, 0) as CLIPScore, of the two towers of one file."""
    root, tokenizer, reference, head, config = biomed
    load, read = biomedclip.load, extractors.biomedclip_prompts
    monkeypatch.setattr(biomedclip, "load", lambda folder: load(folder, SMALL))
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (40, 50, 3), dtype=np.uint8) for _ in range(3)]
    prompts = ["a polyp", "biopsy forceps", "a polyp"]
    network = extractors.biomedclip(str(root), 2, "cpu")
    found = {("x",): network.columns(images)}
    label = measuring.OF_PROMPTS["biomedclip"][0]
    monkeypatch.setitem(measuring.OF_PROMPTS, "biomedclip", (label, lambda *words: read(*words, config)))
    fake = imagesets.ImageSet("fake", tuple(range(3)), tuple((prompt,) for prompt in prompts), hashes=("x",))
    settings = measuring.Settings(weights=str(root))
    seen = measuring.Seen({"biomedclip": network}, {"biomedclip": found}, settings, torch.device("cpu"))
    entry = measuring._clip_score(measuring.Sets({}, fake), "biomedclip", seen)
    ids, mask = tokenizer(prompts, 256)
    with torch.no_grad():
        said = head(reference(ids, mask.long()).last_hidden_state[:, 0])
    cosine = F.cosine_similarity(found[("x",)]["features"].double(), said.double())
    assert entry["BiomedCLIP score"]["value"] == pytest.approx((2.5 * cosine.clamp(min=0)).mean().item(), rel=1e-5)
    (root / biomedclip.REPOSITORY / "vocab.txt").unlink()
    with pytest.raises(weights.WeightsNotFound, match="neither vocab.txt nor tokenizer.json"):
        extractors.biomedclip(str(root), 2, "cpu")


# ------------------------------------------------------------------------------------------------------ MEDVQA-GI 2025


def test_the_organisers_numbers_by_their_own_steps():
    """Fidelity, agreement, diversity with scipy and scikit-learn as the scoring script has them, on all objectives."""
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import pdist
    from sklearn.metrics.pairwise import cosine_similarity

    def fid(a, b):
        s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)

    draw = torch.Generator().manual_seed(3)
    sides = [[F.normalize(torch.randn(n, 6, generator=draw) + i, dim=1) for n in (10, 12, 25)] for i in range(3)]
    objectives = [medvqa.Objective(*three) for three in sides]
    prompts = [x for three in sides for x in three[:2]]
    found = entries.medvqa2025(objectives, prompts, "p", "n", (75, 66))
    numpy = [[x.double().numpy() for x in three] for three in sides]
    fidelity = np.mean([100 / (1 + (fid(a, real) + fid(b, real)) / 2) for a, b, real in numpy])
    agreement = np.mean([cosine_similarity(a, b).mean() for a, b, _ in numpy])
    diversity = np.mean([pdist(x).mean() for three in numpy for x in three[:2]])
    for name, theirs in (("fidelity", fidelity), ("agreement", agreement), ("diversity", diversity)):
        entry = found[f"MEDVQA-GI {name}"]
        assert entry["value"] == pytest.approx(theirs, rel=1e-6), name
        assert entry["interval"]["low"] <= entry["value"] <= entry["interval"]["high"] and "flag" in entry
        assert entry["floor"]["n"] == 8 and entry["floor"]["value"] > 0  # a third of 25 real images
    assert entries.medvqa2025([], [], "p", "n", (3, 3)) == {}


def test_fbd_is_of_unit_class_tokens_and_objectives_are_neighbours_that_share_real_images(tmp_path, monkeypatch):
    place = tmp_path / biomedclip.REPOSITORY
    place.mkdir(parents=True)
    tensors, load = open_clip_file(place, "pickle"), biomedclip.load
    monkeypatch.setattr(biomedclip, "load", lambda folder: load(folder, SMALL))
    draw = np.random.default_rng(1)
    told = [(prompt,) for prompt in ("a polyp", "one polyp", "nothing", "an instrument") for _ in range(2)]
    sides = {"real": [("a polyp", "one polyp")] * 4 + [("nothing",)] * 2, "fake": told}
    sets, tokens = {}, {}
    for name, prompts in sides.items():
        images = [draw.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in prompts]
        (tmp_path / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        sets[name] = dataclasses.replace(imagesets.find(str(tmp_path / name)), prompts=tuple(prompts))
        head = tensors | {"visual.head.proj.weight": torch.eye(32)}  # so that the token itself comes out
        x = torch.stack([preprocess(Image.fromarray(image), 32) for image in images])
        tokens[name] = F.normalize(timm_vit(head, x), dim=1)
    settings = measuring.Settings(weights=str(tmp_path), cache=str(tmp_path / "cache"), intervals=False)
    with torch.inference_mode():
        outcome = measuring.measure(measuring.Sets({"real": sets["real"]}, sets["fake"]), ("fbd",), settings)
        plain = dataclasses.replace(sets["fake"], prompts=())
        untold = measuring.measure(measuring.Sets({"real": sets["real"]}, plain), ("fbd",), settings)
    found, left_out = outcome.results, "fidelity and agreement of MEDVQA-GI are left out"
    assert list(untold.results) == ["FBD"] and any(note.startswith(left_out) for note in untold.notes)
    assert not any(note.startswith(left_out) for note in outcome.notes)
    assert found["FBD"]["value"] == pytest.approx(scores.frechet_distance(tokens["real"], tokens["fake"]), abs=1e-5)
    assert "length 1" in found["FBD"]["protocol"] and "1 objectives" in found["MEDVQA-GI fidelity"]["protocol"]
    one = medvqa.Objective(tokens["fake"][:2], tokens["fake"][2:4], tokens["real"][:4])
    assert found["MEDVQA-GI fidelity"]["value"] == pytest.approx(medvqa.fidelity(one), rel=1e-5)
    assert found["MEDVQA-GI agreement"]["value"] == pytest.approx(medvqa.agreement(one), rel=1e-5)
    pairs = [medvqa.diversity(tokens["fake"][i : i + 2]) for i in (0, 2, 4, 6)]
    assert found["MEDVQA-GI diversity"]["value"] == pytest.approx(np.mean(pairs), rel=1e-4)
