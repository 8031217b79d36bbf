"""The evaluation suite against its peers, interleaved in one run: medians, ratios, extra memory.

    python tests/bench/bench_metrics.py                          all of it; about ten minutes on two cores
    python tests/bench/bench_metrics.py --only frechet,kid       frechet | statistics | kid | pr | inception | frd |
                                                                 cmmd | uncertainty
    python tests/bench/bench_metrics.py --small                  seconds: does it run
    python tests/bench/bench_metrics.py --only large             precision, recall and KID of 50,000 x 50,000 alone

Features are Gaussian with a power-law spectrum, as pooled features have one. Every way of a row sees the same tensors
and its value is compared. Extra memory is the rise of the process's peak during a call in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
import conftest  # noqa: E402, F401  (lets torchvision import beside a CPU build of torch)
from test_protocols import pictures, random_inception  # noqa: E402

from nanomed.data import toy  # noqa: E402
from nanomed.metrics import entries, frd, scores, uncertainty  # noqa: E402
from nanomed.metrics.networks import inception  # noqa: E402

WIDTH = 2048


def gaussian(n: int, width: int, seed: int, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, width + 1).float() ** -0.6
    out = torch.empty(n, width)
    for rows in out.split(4096):
        rows.copy_(scale * torch.randn(len(rows), width, generator=draw) * spectrum + 0.4)
    return out


def interleaved(title: str, ways: dict[str, Callable[[], object]], repeats: int) -> None:
    """The first way is ours. Median wall and CPU seconds, ratios of both to ours (on a busy machine the second is the
    steadier), and what each returns."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    values = {}
    for _ in range(repeats):
        for name, way in ways.items():
            start, busy = time.perf_counter(), time.process_time()
            values[name] = way()
            wall[name].append(time.perf_counter() - start)
            work[name].append(time.process_time() - busy)
    ours, our_work = (statistics.median(next(iter(times.values()))) for times in (wall, work))
    print(f"\n{title}, median of {repeats}{'wall':>24}{'CPU':>21}")
    for name in ways:
        seconds, busy = statistics.median(wall[name]), statistics.median(work[name])
        ratios = f"{seconds:9.3f} s {seconds / ours:6.2f} x {busy:9.3f} s {busy / our_work:6.2f} x"
        print(f"{name:>34} {ratios}   {values[name]}", flush=True)


def peak(call: Callable[..., object], *arguments: object) -> tuple[float, float, object]:
    """(GB that the peak rises above what is held before the call, seconds, value), in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (torch.get_num_threads(), call, *arguments))


def _peak(threads: int, call: Callable[..., object], *arguments: object) -> tuple[float, float, object]:
    torch.set_num_threads(threads)
    n, width, *rest = arguments
    real, fake = gaussian(n, width, 0), gaussian(n, width, 1, 1.05)
    call(real[:64], fake[:64], *rest)  # libraries and threads are there before the count
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here

    def field(name: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) / 2**20

    before, start = field("VmRSS"), time.perf_counter()
    value = call(real, fake, *rest)
    return field("VmHWM") - before, time.perf_counter() - start, value


# ------------------------------------------------------------------------------------------------------------- rows


def frechet(width: int, repeats: int) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torchmetrics.image.fid import _compute_fid

    for n in (width * 5 // 4, width // 2):
        a, b = gaussian(n, width, 0), gaussian(n, width, 1, 1.05)
        moments = *scores.moments(a), *scores.moments(b)
        arrays = [m.numpy() for m in moments]
        ways = {"from moments": lambda m=moments: scores.frechet_from_moments(*m)}
        if n < width:
            ways = {"from features": lambda a=a, b=b: scores.frechet_distance(a, b)} | ways
        ways["torchmetrics (eigvals)"] = lambda m=moments: _compute_fid(*m).item()
        ways["pytorch-fid (scipy sqrtm)"] = lambda m=arrays: float(calculate_frechet_distance(*m))
        interleaved(f"Frechet distance, {width} dimensions, N = {n}", ways, repeats)


def to_statistics(width: int, repeats: int) -> None:
    """What `--real FILE.npz` costs against `--real FOLDER` of the images that the file is of: reading the file, then
    the distance of N generated images, fewer than dimensions, to M real ones, then the same with its interval."""
    from nanomed.evaluation import statistics as of_files

    n, counts = width // 4, (width // 4, width, 5 * width)
    a, everything = gaussian(n, width, 0), gaussian(counts[-1], width, 1, 1.05)
    known, ways, sure = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for m in counts:
            b, file = everything[:m], f"{folder}/{m}.npz"
            mean, covariance = scores.moments(b)
            np.savez(file, mu=mean.numpy(), sigma=covariance.numpy())
            start = time.process_time()
            known[m] = of_files.read(file)
            print(f"read and checked, of {m} images: {time.process_time() - start:.3f} s CPU")
            ways[f"to moments of {m}"] = lambda m=m: scores.frechet_to_moments(a, known[m].mean, known[m].factor)
            ways[f"from features of {m}"] = lambda b=b: scores.frechet_distance(a, b)
            sure[f"to moments of {m}"] = lambda m=m: entries.frechet_to_statistics(
                a, known[m].mean, known[m].factor, "", "")["interval"]["high"]  # fmt: skip
            if m < counts[-1]:
                sure[f"from features of {m}"] = lambda b=b: uncertainty.frechet_interval(a, b)[1]
        interleaved(f"Frechet distance to statistics, {width} dimensions, N = {n}", ways, repeats)
        interleaved("the same with intervals", sure, repeats)


def kid(n: int, width: int, subsets: int, size: int, repeats: int) -> None:
    from torchmetrics.image.kid import poly_mmd

    a, b = gaussian(n, width, 0), gaussian(n, width, 1, 1.05)

    def theirs() -> tuple[float, float]:
        values = []
        for _ in range(subsets):
            i, j = torch.randperm(n)[:size], torch.randperm(n)[:size]
            values.append(poly_mmd(a[i], b[j]))
        values = torch.stack(values)
        return values.mean().item(), values.std(correction=0).item()

    ways = {"ours": lambda: scores.kernel_distance(a, b, subsets, size), "torchmetrics": theirs}
    interleaved(f"KID, {subsets} subsets of {size} of N = {n}", ways, repeats)


def dense_precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """The papers' computation: full matrices of negative-clamped squared distances, Euclidean, and for every column a
    test against all radii."""

    def distances(x: Tensor, y: Tensor) -> Tensor:
        square = x.square().sum(1, keepdim=True) + y.square().sum(1)[None] - 2 * x @ y.T
        return square.clamp(min=0).sqrt()

    def radii(x: Tensor) -> Tensor:
        return distances(x, x).topk(k + 1, dim=1, largest=False).values.amax(1)

    def covered(centres: Tensor, reach: Tensor, points: Tensor) -> float:
        table, inside = distances(centres, points), 0
        for column in range(len(points)):
            inside += bool((table[:, column] < reach).any())
        return inside / len(points)

    return covered(real, radii(real), fake), covered(fake, radii(fake), real)


def precision_recall(n: int, width: int, repeats: int) -> None:
    a, b = gaussian(n, width, 0), gaussian(n, width, 1, 1.05)
    ways = {
        "tiles, mirrored once": lambda: scores.precision_recall(a, b),
        "dense, as in the papers' code": lambda: dense_precision_recall(a, b),
    }
    interleaved(f"precision and recall, {n} + {n} of {width}", ways, repeats)
    for name, call in (("tiles", scores.precision_recall), ("dense", dense_precision_recall)):
        print(f"{name:>34} {peak(call, n, width)[0]:9.3f} GB extra", flush=True)


def large(n: int, width: int) -> None:
    print(f"\n{n} x {n} of {width} (the features themselves are {8 * n * width / 2**30:.2f} GB)")
    for name, call, rest in (
        ("precision and recall", scores.precision_recall, ()),
        ("KID, 100 subsets of 1000", scores.kernel_distance, ()),
        ("Frechet distance", scores.frechet_distance, ()),
    ):
        extra, seconds, value = peak(call, n, width, *rest)
        print(f"{name:>34} {seconds:9.1f} s {extra:8.3f} GB extra   {value}", flush=True)


def radiomic(count: int, repeats: int) -> None:
    """Toy scenes of 256 pixels to the features of FRD v1 and v0; a core's seconds."""
    images, rates = [toy.render(toy.scene(i), 256) for i in range(count)], []
    for _ in range(repeats):
        start = time.process_time()
        for image in images:
            frd.features(image)
        rates.append(count / (time.process_time() - start))
    print(f"\nFRD: {statistics.median(rates):.1f} images a second a core, median of {repeats} turns of {count}")


def cmmd_in_tiles(n: int) -> None:
    """CMMD of n x n embeddings with its interval and floor: what memory it takes besides the embeddings."""
    extra, seconds, value = peak(_cmmd, n, 768)
    print(f"\nCMMD of {n} x {n}, interval and floor: {seconds:.1f} s, {extra:.3f} GB extra   {value}")


def _cmmd(real: Tensor, fake: Tensor) -> tuple[float, float]:
    found = entries.Measured(real, fake, "", "").cmmd()["CMMD"]
    return found["value"], found.get("interval", {}).get("high", 0.0)


def network(batch: int, repeats: int) -> None:
    """pytorch-fid's network and ours with the same random weights and inputs."""
    peer = random_inception()
    x = torch.from_numpy(np.stack(pictures(batch, (299, 299), 0))).permute(0, 3, 1, 2) / 127.5 - 1
    x = x.contiguous()  # channels first, as torchvision's ToTensor and so pytorch-fid have it
    ours = inception.Inception()
    ours.load_state_dict(peer.state_dict())
    ours.requires_grad_(False).fast()
    peer.fc = torch.nn.Identity()
    last = x.contiguous(memory_format=torch.channels_last)
    expected = peer(x)
    error = ((ours(last)[0] - expected).norm() / expected.norm()).item()
    ways = {"ours": lambda: ours(last)[0].sum().item(), "pytorch-fid": lambda: peer(x).sum().item()}
    interleaved(f"Inception, batch {batch}, fp32 (features differ by {error:.1e} relative)", ways, repeats)


def sure(n: int, width: int) -> None:
    """What an interval and a floor cost on top of a value."""
    a, b = gaussian(n, width, 0), gaussian(n, width, 1, 1.05)
    print(f"\nintervals, N = {n}, {width} dimensions")
    for name, call in (
        ("Frechet distance", lambda: scores.frechet_distance(a, b)),
        ("its interval, 10 groups", lambda: uncertainty.frechet_interval(a, b)),
        ("its floor", lambda: uncertainty.floor(scores.frechet_distance, a, n)),
        ("KID's interval, 20 groups", lambda: uncertainty.kernel_interval(a, b)),
        ("precision and recall", lambda: scores.precision_recall(a, b)),
        ("their intervals, evaluated anew", lambda: uncertainty.intervals(scores.precision_recall, a, b)),
        ("P, R, F1, D, C and intervals", lambda: uncertainty.neighbour_intervals(a, b)),
    ):
        start = time.perf_counter()
        value = call()
        print(f"{name:>34} {time.perf_counter() - start:9.3f} s   {value}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="frechet,statistics,kid,pr,inception,frd,uncertainty")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    width, n = (128, 300) if args.small else (WIDTH, 10_000)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = {
        "frechet": lambda: frechet(width, args.repeats),
        "statistics": lambda: to_statistics(width, args.repeats),
        "kid": lambda: kid(200 if args.small else 2000, width, 100, 100 if args.small else 1000, args.repeats),
        "pr": lambda: precision_recall(n, width, args.repeats),
        "inception": lambda: network(2 if args.small else 16, args.repeats + 2),
        "frd": lambda: radiomic(2 if args.small else 50, args.repeats),
        "cmmd": lambda: cmmd_in_tiles(500 if args.small else 50_000),
        "uncertainty": lambda: sure(200 if args.small else 2000, width),
        "large": lambda: large(500 if args.small else 50_000, width),
    }
    for name in args.only.split(","):
        rows[name]()


if __name__ == "__main__":
    main()
