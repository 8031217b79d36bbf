"""What a training run reports at its end: the images it drew from test prompts, against images it has not seen."""

from collections.abc import Sequence
from pathlib import Path

import torch

from nanomed import weights
from nanomed.evaluation import imagesets, measuring, reports
from nanomed.run.ranks import Ranks, device_of


def measure(
    fake: Path, held_out: Sequence[Path], toy_world: bool, settings: measuring.Settings, spans: Sequence[str] = (),
    device: str = "",
) -> tuple[dict, str]:
    """Measure the images that were drawn into `fake`, write the results beside them, and return ({metric: value with N
    and protocol}, the table for the terminal). Not collective.

    held_out   files of real images; fresh scenes take their place in the toy world
    spans      the range of each of them (data/ranges.py); empty: none
    """
    drawn = imagesets.with_prompts(imagesets.find(str(fake), "generated"), str(fake), "")
    if toy_world:
        real = imagesets.fresh_scenes(len(drawn), imagesets.side_of(drawn))
    else:
        real = imagesets.of_files(held_out, "held out", spans)
    sets = measuring.Sets({real.name: real}, drawn, toy_world=toy_world)
    alone = Ranks(device=device_of("" if device == "mps" else device, float64=True))
    measuring.exactly()
    with torch.inference_mode():
        try:
            outcome = measuring.measure(sets, (), settings, alone)
        except weights.WeightsNotFound as error:  # a run of weeks does not end in an error for want of a metric's file
            sets.usual, sets.notes = ("colour",), [str(error)]
            outcome = measuring.measure(sets, (), settings)
    said = reports.publish(outcome, fake)
    return {
        name: f"{entry['value']:.4f} (N = {entry['n_fake']}, {entry['protocol']})"
        for name, entry in outcome.results.items()
    }, said
