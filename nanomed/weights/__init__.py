"""Published weights: where they are, whether the files are sound, and how they get into a module.

    folder = weights.find("openai/clip-vit-large-patch14")
    encoder = weights.build(ClipText, ClipTextConfig.from_json(folder))
    weights.load(encoder, weights.read(folder, "model", prefix="text_model."))

Modules carry the names of their published files, so there is no table of names between them: the module is built on
the meta device, the file is memory-mapped, and its tensors become the parameters. Nothing here uses the network.

places.py finds, header.py judges, tensors.py reads, modules.py fills, published.py knows what there is. May import
`run`; must not know any network.
"""

from nanomed.weights.header import Entry, WeightsError, WeightsNotFound, check_header
from nanomed.weights.modules import build, fingerprint, load
from nanomed.weights.places import find, hub_cache
from nanomed.weights.published import Published, catalogue, digests
from nanomed.weights.tensors import arguments, configured, read, read_pickle, settings

__all__ = [
    "Entry", "Published", "WeightsError", "WeightsNotFound", "arguments", "build", "catalogue", "check_header",
    "configured", "digests", "find", "fingerprint", "hub_cache", "load", "read", "read_pickle", "settings",
]  # fmt: skip
