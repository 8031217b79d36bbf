"""kohya's names of layers, whose dots have become underscores, with their dots again, where no network is at hand.

    named(["down_blocks_0_attentions_1_proj_in"])    {...: "down_blocks.0.attentions.1.proj_in"}

Every network here is made of words that are known, so a name is cut at the longest known words; that no published name
is cut wrongly is a test. Names in Stability's own code (`input_blocks_4_1_...`) become diffusers', of a U-Net with as
many residual blocks a level as the names show, or two, as Stable Diffusion 1, 2 and XL have.
"""

import math
import re
from collections.abc import Iterable

from nanomed.weights import WeightsError

WORDS = {*"""adaLN_modulation adaln_single add_embedding add_k_proj add_time_condition add_v_proj aspect_ratio_embedder
basic_block block_seq c_proj caption_projection cond_pooling cond_projection_linear cond_projection_linear2 context_mlp
conv_in conv_out conv_res conv_shortcut down_blocks down_op down_sample embedding_proj embedding_table encoder_hid_proj
encoder_hidden_states_proj extra_embedder feed_forward final_layer group_norm image_embeds image_proj in_blocks in_conv
in_norm k_proj linear_1 linear_2 local_embedder mid_block middle_block norm_out out_blocks out_norm out_proj pos_embed
position_embedding position_embeddings proj_in proj_out proj_to_clip_embeddings projection_linear q_proj
relative_attention_bias resnet_blocks resnets_in resnets_out resolution_embedder self_attn shortcut_down_sample
shortcut_projection shortcut_up_sample skip_linear style_embedder t_embedder text_embedder text_model text_projection
time_emb time_emb_proj time_embedder time_embedding time_extra_emb timestep_embedder to_k to_out to_q to_v
token_embedding token_type_embeddings transformer_blocks up_blocks up_op up_sample v_proj wi_0 wi_1 word_embeddings
x_embedder y_embedder DenseReluDense SelfAttention attention attentions attn attn1 attn2 block blocks conv conv1 conv2
dense downsamplers emb embeddings encoder fc1 fc2 ff intermediate k key layer layers linear mlp net norm1 o outc output
pooler proj projection q qkv query resnets self shared upsamplers v value wo""".split()}  # fmt: skip
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks|conv_(in|out)|(time|add)_embedding|encoder_hid_proj)\b")

# Stability's names outside its blocks, and inside a residual block.
_AT_ENDS = {"time_embed_0": "time_embedding.linear_1", "time_embed_2": "time_embedding.linear_2", "out_2": "conv_out",
            "label_emb_0_0": "add_embedding.linear_1", "label_emb_0_2": "add_embedding.linear_2",
            "input_blocks_0_0": "conv_in"}  # fmt: skip
_IN_RESNET = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2",
              "skip_connection": "conv_shortcut"}  # fmt: skip
_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d)_(.+)|middle_block_([012])_(.+)")


def named(keys: Iterable[str], file: object) -> dict[str, str]:
    """{kohya's name of a layer, without its prefix: the name with dots}. Raises WeightsError, which names `file`, for a
    name that is not made of known words."""
    keys = list(keys)
    stability = any(key in _AT_ENDS or _BLOCK.fullmatch(key) for key in keys)
    if stability and not any(key.startswith(("down_blocks", "up_blocks", "mid_block")) for key in keys):
        resnets = _resnets(keys)
        return {key: _of_stability(key, resnets, file) for key in keys}
    return {key: dotted(key, file) for key in keys}


def dotted(key: str, file: object) -> str:
    """A name cut at the longest known words; numbers are words, too."""
    pieces, found = key.split("_"), []
    while pieces:
        length = next((n for n in range(len(pieces), 0, -1) if "_".join(pieces[:n]) in WORDS), int(pieces[0].isdigit()))
        if not length:
            raise WeightsError(
                f"{file}: no network that is known here has a layer {key}, of which kohya's keys do not say where its "
                f"dots are; a run that starts from it (train.py --lora) can be written in every format"
            )
        found.append("_".join(pieces[:length]))
        pieces = pieces[length:]
    return ".".join(found)


def is_unet(name: str) -> bool:
    """Whether a layer, by its name with dots, is a U-Net's."""
    return _UNET.match(name) is not None


def _resnets(keys: Iterable[str]) -> int:
    """Residual blocks of a level on the way down: two, unless changes of resolution are at other places. They are at
    every (n + 1)-th place, on the way up with the last block before it."""
    found = [match for key in keys if (match := _BLOCK.fullmatch(key))]
    changes = [int(match[2]) for match in found if match[1] == "input" and match[4] == "op"]
    changes += [int(match[2]) + 1 for match in found if match[1] == "output" and match[4] == "conv"]
    return 2 if math.gcd(*changes) % 3 == 0 else max(math.gcd(*changes) - 1, 1)


def _of_stability(key: str, resnets: int, file: object) -> str:
    if key in _AT_ENDS:
        return _AT_ENDS[key]
    if not (match := _BLOCK.fullmatch(key)):
        return dotted(key, file)
    if match[5]:
        middle = ("resnets.0", "attentions.0", "resnets.1")[int(match[5])]
        return f"mid_block.{middle}.{_inside(match[6], file)}"
    column, rest = int(match[3]), match[4]
    if match[1] == "input":
        level, place = divmod(int(match[2]) - 1, resnets + 1)
        if (place == resnets) != (rest == "op") or level < 0:
            raise WeightsError(f"{file}: {key} is at no place of a U-Net with {resnets} residual blocks a level")
        where = "downsamplers.0.conv" if rest == "op" else f"{('resnets', 'attentions')[column]}.{place}"
        return f"down_blocks.{level}.{where}" + ("" if rest == "op" else f".{_inside(rest, file)}")
    level, place = divmod(int(match[2]), resnets + 1)
    if rest == "conv":
        return f"up_blocks.{level}.upsamplers.0.conv"
    if column > 1:
        raise WeightsError(f"{file}: {key} is no layer of a U-Net in Stability's names")
    return f"up_blocks.{level}.{('resnets', 'attentions')[column]}.{place}.{_inside(rest, file)}"


def _inside(rest: str, file: object) -> str:
    return _IN_RESNET.get(rest) or dotted(rest, file)
