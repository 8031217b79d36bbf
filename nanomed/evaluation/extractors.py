"""The feature networks of evaluation, each under its protocol, ready for the store.

inception   pool3 and logits of the FID network: FID, KID, IS, precision and recall, density and coverage
organisers  its 1000 class probabilities under imageclef2024
vit         class tokens of a published classifier: KFD, HFD
dino        class tokens of DINOv2: FD-DINOv2, and neighbours among them
swav        pooled features of SwAV's ResNet-50
cmmd        image embeddings of CLIP ViT-L/14 at 336 pixels
fbd         class tokens of BiomedCLIP, and its image embeddings
biomedclip  the same, for the cosine of embeddings with embeddings of the prompts
clip        image embeddings of CLIP ViT-B/32, which CLIPScore takes the cosine of with those of the prompts
radiomic    radiomic features, without a network: FRD
stand_in    features of the toy world's classifier, where there is no Inception file
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from nanomed import weights
from nanomed.data.table import DataError
from nanomed.evaluation.store import Extractor
from nanomed.metrics import clef, features, frd
from nanomed.metrics.networks import biomedclip as biomedclip_vision
from nanomed.metrics.networks import classifier, dinov2, resnet
from nanomed.metrics.networks import inception as published
from nanomed.metrics.networks import vit as transformers
from nanomed.text import clip_vision
from nanomed.text.bert import OPTIONAL, Bert, BertConfig
from nanomed.text.clip import ClipText, ClipTextConfig
from nanomed.text.tokenizers import ClipTokenizer
from nanomed.text.wordpiece import WordPiece

Device = torch.device | str
CLIP = "openai/clip-vit-large-patch14-336"  # CMMD
CLIP_SCORE = "openai/clip-vit-base-patch32"  # CLIPScore
SAID = "A photo depicts "  # what CLIPScore puts before a prompt


def inception(file: str, folder: str, protocol: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 2048), "logits": (N, 1008)}. Raises WeightsNotFound with the place where the file goes."""
    network = published.load(file or None, folder or None)
    fingerprint = weights.fingerprint(network)
    network.to(device)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        found, logits = features.inception_features(network, images, protocol, batch)
        return {"features": found, "logits": logits}

    return Extractor("Inception pool3", protocol, fingerprint, columns)


def organisers(file: str, folder: str, batch: int, device: Device) -> Extractor:
    """{"probabilities": (N, 1000)} as imageclef2024 takes them. Raises WeightsNotFound."""
    network = published.load(file or None, folder or None)
    fingerprint = weights.fingerprint(network)
    classify = clef.of_inception(network.to(device))

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"probabilities": clef.probabilities(classify, images, batch)}

    return Extractor("Inception classes", "imageclef2024", fingerprint, columns)


def vit(repository: str, folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 768)}: class tokens of a published ViT. Raises WeightsNotFound with the download command."""
    network = transformers.load(weights.find(repository, folder or None))
    fingerprint = weights.fingerprint(network)
    network.to(device)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"features": transformers.classifier_features(network, images, batch)}

    return Extractor(f"{repository.rsplit('/', 1)[-1]} class token", "224", fingerprint, columns)


def dino(folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 1024)} of DINOv2 ViT-L/14: the repository, or the hub's file where that is there. Raises
    WeightsNotFound with the download command."""
    try:
        place = weights.find(dinov2.HUB, folder or None)
    except weights.WeightsNotFound:
        place = weights.find(dinov2.REPOSITORY, folder or None)
    network = dinov2.load(place)
    fingerprint = weights.fingerprint(network)
    network.to(device)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"features": features.embedded(network, images, features.for_dino, batch, device)}

    return Extractor("DINOv2 class token", "224, bicubic", fingerprint, columns)


def swav(folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 2048)} of SwAV's ResNet-50. Raises WeightsNotFound with the download command."""
    network = resnet.load(weights.find(resnet.FILE, folder or None))
    fingerprint = weights.fingerprint(network)
    network.to(device)

    def see(pixels: Tensor) -> Tensor:  # images of other shapes stay so, and only features of them go together
        return network(features.for_swav(pixels).contiguous(memory_format=torch.channels_last))

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"features": features.embedded(torch.nn.Identity(), images, see, batch, device)}

    return Extractor("SwAV ResNet-50 pool", "shorter side 224, bilinear", fingerprint, columns)


def cmmd(folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 768)}: image embeddings of the CLIP that CMMD is defined on, not normalised. Raises
    WeightsNotFound with the download command."""
    network = image_tower(weights.find(CLIP, folder or None))
    fingerprint, size = weights.fingerprint(network), network.config.image_size
    network.to(device)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"features": features.embedded(network, images, lambda x: squashed(x, size), batch, device)}

    return Extractor(f"{CLIP.rsplit('/', 1)[-1]} embedding", "bicubic, not antialiased", fingerprint, columns)


def squashed(pixels: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) as CMMD's code brings them to CLIP: stretched to size x size, bicubic without antialiasing,
    what overshoots [0, 1] left as it is, then CLIP's mean and deviation."""
    x = F.interpolate(pixels.float() / 255, (size, size), mode="bicubic")
    mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (clip_vision.MEAN, clip_vision.STD))
    return (x - mean) / std


def fbd(folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 512), "tokens": (N, 768)}: BiomedCLIP's image embeddings as they are, and its class tokens at
    length 1, which MEDVQA-GI 2025 takes FBD of. Raises WeightsNotFound with the download command."""
    network = biomedclip_vision.load(weights.find(biomedclip_vision.REPOSITORY, folder or None))
    fingerprint, size = weights.fingerprint(network), network.config.image_size
    network.to(device)

    def see(pixels: Tensor) -> Tensor:
        tokens, embeddings = network.both(pixels)
        return torch.cat([F.normalize(tokens, dim=1), embeddings], 1)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        both = features.embedded(see, images, lambda x: cropped(x, size), batch, device)
        tokens, embeddings = both.tensor_split([network.config.hidden_size], dim=1)
        return {"features": embeddings.clone(), "tokens": tokens.clone()}

    return Extractor("BiomedCLIP", "224, bicubic, centre crop", fingerprint, columns)


BIOMED_TEXT = BertConfig(30522, 768, 12, 12, 3072)  # PubMedBERT's shape
BIOMED_LENGTH = 256  # tokens


def biomedclip(folder: str, batch: int, device: Device) -> Extractor:
    """As `fbd`, where the files that read prompts are there too. Raises WeightsNotFound."""
    WordPiece.from_folder(weights.find(biomedclip_vision.REPOSITORY, folder or None))
    return fbd(folder, batch, device)


def biomedclip_prompts(
    prompts: Sequence[str], folder: str, batch: int, device: Device, config: BertConfig = BIOMED_TEXT
) -> Tensor:
    """Embeddings (N, 512) of prompts by BiomedCLIP's text tower, cut at 256 tokens: a BERT, the state of [CLS], two
    layers without bias (OpenCLIP's text encoder of Hugging Face models, with an "mlp" projection). On the CPU."""
    place = weights.find(biomedclip_vision.REPOSITORY, folder or None)
    known = {name.removeprefix("text."): t.float() for name, t in biomedclip_vision.tensors(place).items()
             if name.startswith("text.")}  # fmt: skip
    first, second = (known[f"proj.{i}.weight"].to(device) for i in (0, 2))
    mine = {name.removeprefix("transformer."): t for name, t in known.items() if name.startswith("transformer.")}
    tower = weights.build(Bert, config)
    tower = weights.load(tower, mine, (*OPTIONAL, "embeddings.position_ids")).requires_grad_(False).eval().to(device)
    ids, mask = WordPiece.from_folder(place)(list(prompts), BIOMED_LENGTH)
    used = int(mask.sum(1).max())  # what is padding in every prompt changes nothing
    found = []
    for rows in torch.arange(len(ids)).split(batch):
        states = tower(ids[rows, :used].to(device), mask[rows, :used].to(device))[:, 0]
        found.append((F.gelu(states @ first.T) @ second.T).cpu())
    return torch.cat(found)


def clip(folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 512)}: image embeddings of the CLIP that CLIPScore is published with. Raises WeightsNotFound."""
    network = image_tower(weights.find(CLIP_SCORE, folder or None))
    fingerprint, size = weights.fingerprint(network), network.config.image_size
    network.to(device)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"features": features.embedded(network, images, lambda x: cropped(x, size), batch, device)}

    return Extractor("CLIP ViT-B/32 embedding", "224, bicubic, centre crop", fingerprint, columns)


def clip_prompts(prompts: Sequence[str], folder: str, batch: int, device: Device) -> Tensor:
    """Embeddings (N, 512) of prompts by the text tower beside `clip`, after "A photo depicts " as in CLIPScore; cut at
    77 tokens. On the CPU."""
    place = weights.find(CLIP_SCORE, folder or None)
    mine = {name: t.float() for name, t in tensors(place).items() if name.startswith(("text_model.", "text_proj"))}
    config = ClipTextConfig.from_json(place)
    if "text_projection.weight" in mine:
        config = replace(config, projection_dim=len(mine["text_projection.weight"]))
    tower = weights.load(weights.build(ClipText, config, projection=True), mine).requires_grad_(False).eval().to(device)
    ids, _ = ClipTokenizer.from_folder(place)([SAID + said for said in prompts], config.max_position_embeddings)
    return torch.cat([tower.features(part.to(device)).embeds.cpu() for part in ids.split(batch)])


def image_tower(place: Path) -> clip_vision.ClipVision:
    """The image tower of a whole published CLIP, ready to run."""
    config = clip_vision.ClipVisionConfig.from_json(place)
    mine = {name: t.float() for name, t in tensors(place).items() if name.startswith(("vision_model.", "visual_proj"))}
    if "visual_projection.weight" in mine:  # a whole CLIP says its width outside of the tower's settings
        config = replace(config, projection_dim=len(mine["visual_projection.weight"]))
    return weights.load(weights.build(clip_vision.ClipVision, config), mine).requires_grad_(False).eval()


def cropped(pixels: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) by CLIP's own preprocessing: shorter side to `size`, bicubic, and the middle of it."""
    images = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return torch.stack([clip_vision.preprocess(Image.fromarray(x), size) for x in images]).to(pixels.device)


def tensors(folder: Path) -> dict[str, Tensor]:
    """Those of a repository's safetensors, or of its `pytorch_model.bin` where there are none."""
    pickle = folder / transformers.PICKLE
    return weights.read_pickle(pickle) if pickle.is_file() and not any(folder.glob("model*.safetensors*")) else (
        weights.read(folder, "model"))  # fmt: skip


def radiomic(folder: str, batch: int, device: Device) -> Extractor:
    """{"features": (N, 693), "v0": (N, 93)} in float64, of images of any size, one after the other; no file is needed
    and no device used. Raises DataError for an image that is too small."""

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        try:
            found = [frd.features(image) for image in images]
        except ValueError as error:
            raise DataError(f"--metrics frd: {error}") from None
        names = {"features": "v1", "v0": "v0"}
        return {name: torch.from_numpy(np.stack([one[key] for one in found])) for name, key in names.items()}

    return Extractor("Radiomics", "as pyradiomics 3.0.1", "", columns)


def stand_in(folder: str, batch: int, device: Device) -> Extractor | None:
    """{"features": (N, 128)} of the classifier that ships with weights/msdm-tiny; None where it is not there."""
    try:
        file = weights.find("msdm-tiny", folder or None) / "classifier.safetensors"
    except weights.WeightsNotFound:
        return None
    if not Path(file).is_file():
        return None
    network = classifier.load(file)
    fingerprint = weights.fingerprint(network)
    network.to(device)

    def columns(images: Iterable[np.ndarray]) -> dict[str, Tensor]:
        return {"features": features.toy_features(network, images, batch)}

    return Extractor("toy classifier", "64", fingerprint, columns)
