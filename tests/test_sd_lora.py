"""Adapters of other programs on Stable Diffusion: files in diffusers' and kohya's layouts, in Stability's names of
blocks too, of every layer that an adapter can be on, against the images that diffusers' pipelines draw with them; and
kohya's files turned into the others without a network.
"""

import json
import re
import sys

import peft
import pytest
import torch
from conftest import close
from manifests import components, names_and_shapes
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sd_system import IMAGES, PROMPTS, SETTINGS, folders, ours, pipeline, watch  # noqa: F401  (a fixture)
from torch import Tensor, nn

import nanomed
import sample
from nanomed.adapters import kohya
from nanomed.adapters.__main__ import main
from nanomed.weights import WeightsError

KINDS = ("sd15", "sdxl")
LAYOUTS = ("diffusers", "kohya", "stability")


def adapted(part: nn.Module, seed: int) -> tuple[dict[str, Tensor], dict]:
    """An adapter by peft on every linear layer and convolution of a part: rank 4 with alpha 6, of the convolutions of
    residual blocks rank 2 with alpha 1. Its tensors and settings in peft's words; the part then computes with them."""
    names = [name for name, layer in part.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, rank_pattern={"conv1": 2, "conv2": 2},
                             alpha_pattern={"conv1": 1, "conv2": 1})  # fmt: skip
    peft.inject_adapter_in_model(config, part)
    torch.manual_seed(seed)
    tensors = {name.replace(".default.", "."): p for name, p in part.named_parameters() if ".lora_" in name}
    with torch.no_grad():
        for name, param in tensors.items():
            param.copy_(torch.randn_like(param) * (0.2 if "lora_A" in name else 0.05))
    assert len(tensors) == 2 * len(names)
    settings = json.loads(json.dumps(config.to_dict(), default=list))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, settings


def alpha(name: str) -> float:
    return 1.0 if re.search(r"\.conv[12]\.", name) else 6.0


def of_stability(config: dict) -> dict[str, str]:
    """Where diffusers' blocks are in Stability's U-Net, which counts them through all levels: walked as that network is
    built, for a number of residual blocks a level."""
    per, places, n = config["layers_per_block"], {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}, 1
    for side in ("time_embedding", "time_embed"), ("add_embedding", "label_emb.0"):
        places |= {f"{side[0]}.linear_1": f"{side[1]}.0", f"{side[0]}.linear_2": f"{side[1]}.2"}
    last = len(config["block_out_channels"]) - 1
    for level in range(last + 1):
        for j in range(per):
            places |= {f"down_blocks.{level}.resnets.{j}": f"input_blocks.{n}.0"}
            places |= {f"down_blocks.{level}.attentions.{j}": f"input_blocks.{n}.1"}
            n += 1
        if level < last:
            places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    for name, place in (("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)):
        places[f"mid_block.{name}"] = f"middle_block.{place}"
    n = 0
    for level, kind in enumerate(config["up_block_types"]):
        for j in range(per + 1):
            places |= {f"up_blocks.{level}.resnets.{j}": f"output_blocks.{n}.0"}
            places |= {f"up_blocks.{level}.attentions.{j}": f"output_blocks.{n}.1"}
            n += 1
        if level < last:
            column = 2 if kind.startswith("CrossAttn") else 1
            places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{column}.conv"
    return places


INSIDE = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3",
          "conv_shortcut": "skip_connection"}  # fmt: skip


def in_kohyas_keys(parts: dict[str, dict[str, Tensor]], places: dict[str, str]) -> dict[str, Tensor]:
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
    if "text_encoder_2" in parts:
        prefixes["text_encoder"] = "lora_te1_"
    found = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            layer, factor = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name).groups()
            if part != "unet" and not layer.startswith(("text_model.", "text_projection")):
                layer = f"text_model.{layer}"  # the published name, which transformers 5 leaves out
            if part == "unet" and places:
                head = next(place for place in sorted(places, key=len, reverse=True) if layer.startswith(place))
                rest = layer[len(head) + 1 :]
                rest = INSIDE.get(rest, rest) if "resnets" in head else rest
                layer = ".".join(filter(None, (places[head], rest)))
            key = prefixes[part] + layer.replace(".", "_")
            found |= {f"{key}.{ {'A': 'lora_down', 'B': 'lora_up'}[factor] }.weight": tensor}
            found[f"{key}.alpha"] = torch.tensor(alpha(name))
    return found


@torch.no_grad()
def diffusers_draws(pipe) -> tuple[Tensor, Tensor]:
    """Images before the clamp, and images."""
    seen, how = watch(pipe.vae), SETTINGS
    given = dict(num_inference_steps=how["steps"], guidance_scale=how["guidance"], height=64, width=64)
    images = pipe(PROMPTS, generator=torch.Generator().manual_seed(5), output_type="pt", **given).images
    return seen[1], images


@pytest.fixture(scope="module")
def files(folders, tmp_path_factory) -> dict[str, tuple]:  # noqa: F811
    """Of both kinds: a file in each layout, what diffusers draws with the adapter, and its U-Net with it."""
    found = {}
    for kind in KINDS:
        out, pipe = tmp_path_factory.mktemp(f"lora-{kind}"), pipeline(kind, folders[kind])
        before = diffusers_draws(pipe)
        names = [name for name in ("unet", "text_encoder", "text_encoder_2") if getattr(pipe, name, None) is not None]
        made = {name: adapted(getattr(pipe, name), i) for i, name in enumerate(names)}
        said = {f"{name}_lora_adapter_metadata": settings for name, (_, settings) in made.items()}
        parts = {name: tensors for name, (tensors, _) in made.items()}
        layers = {f"{name}_lora_layers": tensors for name, tensors in parts.items()}
        type(pipe).save_lora_weights(out / "diffusers", **layers, **said)
        save_file(in_kohyas_keys(parts, {}), out / "kohya.safetensors")
        save_file(in_kohyas_keys(parts, of_stability(dict(pipe.unet.config))), out / "stability.safetensors")
        drawn = diffusers_draws(pipe)
        assert (drawn[1] - before[1]).abs().max() > 0.1, "the adapter shows"
        paths = {"diffusers": out / "diffusers" / "pytorch_lora_weights.safetensors"}
        paths |= {name: out / f"{name}.safetensors" for name in ("kohya", "stability")}
        found[kind] = paths, drawn, pipe.unet
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_every_layer_draw_what_diffusers_draws(kind, layout, files, folders):  # noqa: F811
    """conv_in, conv_out, time_embedding, convolutions of 3 x 3 and 1 x 1 (LoCon), changes of resolution, attention and
    feed-forward, the text encoders: pixels, and images before the clamp, to 1e-4."""
    paths, expected, _ = files[kind]
    system = nanomed.load(kind, weights=folders[kind], lora=str(paths[layout]))
    _, raw, images = ours(kind, system, **SETTINGS)
    close(raw, expected[0], IMAGES)
    close(images, expected[1], IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout", [("sd15", "diffusers"), ("sd15", "kohya"), ("sdxl", "diffusers"),
                                          ("sdxl", "stability")])  # fmt: skip
def test_diffusers_reads_these_files_alike(kind, layout, files, folders):  # noqa: F811
    """The U-Net's part of the same files through the pipeline's own reader, so they are what other programs write. (It
    knows Stability's names for SDXL alone, and there leaves out `add_embedding` in kohya's spelling of diffusers'.)"""
    paths, _, expected = files[kind]
    pipe = pipeline(kind, folders[kind])
    given = {} if kind == "sd15" else dict(unet_config=pipe.unet.config)
    state, alphas, metadata = type(pipe).lora_state_dict(paths[layout], return_lora_metadata=True, **given)
    pipe.load_lora_into_unet(state, alphas, pipe.unet, metadata=metadata)
    torch.manual_seed(1)
    width = pipe.unet.config.cross_attention_dim
    added = dict(text_embeds=torch.randn(2, 16), time_ids=torch.ones(2, 6))
    more = {} if kind == "sd15" else dict(added_cond_kwargs=added)
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, width)
    with torch.no_grad():
        close(pipe.unet(*given, **more).sample, expected(*given, **more).sample, 1e-5)


def test_sample_draws_with_a_file(files, folders, tmp_path, monkeypatch):  # noqa: F811
    """`sample.py --lora FILE=0.5`: the pixels of `nanomed.load(lora=...)`, and not those without it."""
    kind = "sd15"
    (tmp_path / "p.csv").write_text("prompt\na polyp\n")
    lora = f"{files[kind][0]['kohya']}=0.5"
    words = ["--model", kind, "--weights", str(folders[kind]), "--prompts", str(tmp_path / "p.csv"), "--steps", "2"]
    for name, more in (("with", ["--lora", lora]), ("without", [])):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words, *more, "--out", str(tmp_path / name)])
        assert not sample.main()
    (image,) = nanomed.load(kind, weights=folders[kind], lora=lora)(["a polyp"], seed=0, steps=2)
    pixels = [(tmp_path / name).read_bytes() for name in ("with/00000.png", "without/00000.png")]
    with Image.open(tmp_path / "with/00000.png") as found:
        assert found.tobytes() == image.tobytes()
    assert pixels[0] != pixels[1]


# -------------------------------------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("kind", KINDS)
def test_a_kohya_file_becomes_the_others_and_comes_back_to_the_bit(kind, files, folders, tmp_path):  # noqa: F811
    """`python -m nanomed.adapters FILE --to diffusers` with no network at hand: tensors, alphas and names are those of
    the file that diffusers wrote; PEFT's folders too; and from either kohya's file again, every bit and every key."""
    paths, expected, _ = files[kind]
    original = load_file(paths["kohya"])
    assert main([str(paths["kohya"]), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")]) == 0
    with safe_open(tmp_path / "d.safetensors", framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["unet.r"] == 4 and settings["unet.lora_alpha"] == 6

    def published(name: str) -> str:  # transformers 5 leaves a prefix of CLIP's names out
        return re.sub(r"^(text_encoder(?:_2)?)\.(?!text_model\.|text_projection)", r"\1.text_model.", name)

    mine, theirs = load_file(tmp_path / "d.safetensors"), load_file(paths["diffusers"])
    for there, here in ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B.")):
        theirs = {published(name.replace(there, here)): tensor for name, tensor in theirs.items()}
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    system = nanomed.load(kind, weights=folders[kind], lora=str(tmp_path / "d.safetensors"))
    close(ours(kind, system, **SETTINGS)[2], expected[1], IMAGES)
    assert main([str(paths["kohya"]), "--to", "peft", "--out", str(tmp_path / "p")]) == 0
    for way in ("d.safetensors", "p"):
        assert main([str(tmp_path / way), "--to", "kohya", "--out", str(tmp_path / f"{way}-k.safetensors")]) == 0
        again = load_file(tmp_path / f"{way}-k.safetensors")
        assert again.keys() == original.keys()
        for name, tensor in original.items():
            assert tensor.dtype == again[name].dtype and torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_stabilitys_names_become_diffusers(kind, files, tmp_path):
    """A file in Stability's names gives the bytes that the one in diffusers' gives: the changes of resolution in it
    tell how many blocks a level has."""
    paths = files[kind][0]
    for layout in ("kohya", "stability"):
        assert main([str(paths[layout]), "--to", "diffusers", "--out", str(tmp_path / f"{layout}.safetensors")]) == 0
    one, other = (load_file(tmp_path / f"{layout}.safetensors") for layout in ("kohya", "stability"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


NETWORKS = [name for name in components() if re.search(
    "clip_vit_large_patch14_text|dit_s_8|hunyuandit_(v1|text)|kandinsky.*(unet|prior_t|ul2)|msdm_unet|pixart_alpha|"
    "sd(14|15|xl)_(unet|text)|t5_v1_1", name) and "/" not in name]  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_every_published_name_is_cut_where_its_dots_were(network):
    """All layers that can have an adapter, of all the networks that can be adapted here."""
    layers = {name.removesuffix(".weight") for name, shape in names_and_shapes(network).items()
              if name.endswith(".weight") and len(shape) in (2, 4)}  # fmt: skip
    assert len(layers) > 10
    for name in layers:
        assert kohya.dotted(name.replace(".", "_"), "a file") == name


@pytest.mark.parametrize("network, up", [("sd15_unet", (1, 2, 2)), ("sdxl_unet", (2, 2))])
def test_stabilitys_names_of_the_published_unets(network, up):
    """All layers; and attention alone, as in most adapters, or one change of resolution, which do not tell how many
    blocks a level has."""
    layers = {name.removesuffix(".weight") for name, shape in names_and_shapes(network).items()
              if name.endswith(".weight") and len(shape) in (2, 4)}  # fmt: skip
    kinds = {"sd15_unet": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3], "sdxl_unet": [*["CrossAttnUpBlock2D"] * 2, "Up"]}
    places = of_stability(dict(layers_per_block=2, block_out_channels=kinds[network], up_block_types=kinds[network]))
    spelled = {}
    for layer in layers:
        head = next(place for place in sorted(places, key=len, reverse=True) if layer.startswith(place))
        rest = layer[len(head) + 1 :]
        rest = INSIDE.get(rest, rest) if "resnets" in head else rest
        spelled[".".join(filter(None, (places[head], rest))).replace(".", "_")] = layer
    assert len(spelled) == len(layers) and ("input_blocks_4_1_proj_in" in spelled)
    assert kohya.named(spelled, "a file") == spelled
    for some in ("attentions", "down_blocks.1.downsamplers", "up_blocks.1.upsamplers", "resnets"):
        part = {key: layer for key, layer in spelled.items() if some in layer}
        assert part and kohya.named(part, "a file") == part


@pytest.mark.parametrize("key, said", [
    ("lora_unet_down_blocks_0_strange_layer", "no network that is known here has a layer down_blocks_0_strange_layer"),
    ("lora_unet_input_blocks_3_1_proj_in", "input_blocks_3_1_proj_in is at no place"),
    ("lora_unet_output_blocks_3_2_proj_in", "output_blocks_3_2_proj_in is no layer"),
])  # fmt: skip
def test_names_that_are_not_known_are_refused(key, said, tmp_path):
    save_file({f"{key}.lora_down.weight": torch.ones(1, 2), f"{key}.lora_up.weight": torch.ones(2, 1)},
              tmp_path / "a.safetensors")  # fmt: skip
    from nanomed.adapters import convert

    with pytest.raises(WeightsError, match=said):
        convert.read(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=said):
        main([str(tmp_path / "a.safetensors"), "--to", "peft", "--out", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()
