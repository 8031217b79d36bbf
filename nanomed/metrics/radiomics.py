"""Radiomic features of a grey image under a mask: what radiologists' software calls texture, in numpy.

The definitions are pyradiomics 3.0.1's (van Griethuysen et al. 2017; www.radiomics.io lists every formula), in 2D at
distance 1. An image is cut into grey levels of a fixed width, and five tables are counted on the levels:

glcm     pairs of neighbours in four directions, both ways          24 features, means over the directions
glrlm    runs of one level along four directions, by length          16, means over the directions
glszm    connected zones of one level (8 neighbours), by size        16
gldm     pixels by how many of their 8 neighbours are of their level 14
ngtdm    per level the distance to the mean of the 8 neighbours       5

with 18 first-order features of the values themselves. Tables are kept as lists of what occurs in them (level, length,
count), never dense, so that an image of 250 levels costs no more than its pixels.
"""

import functools

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

EPS = np.spacing(1.0)  # pyradiomics adds it inside logarithms
STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))  # the four directions: rows down, columns to the right

FIRST_ORDER = (
    "Energy TotalEnergy Entropy Minimum 10Percentile 90Percentile Maximum Mean Median InterquartileRange Range "
    "MeanAbsoluteDeviation RobustMeanAbsoluteDeviation RootMeanSquared Skewness Kurtosis Variance Uniformity"
).split()
GLCM = (
    "Autocorrelation JointAverage ClusterProminence ClusterShade ClusterTendency Contrast Correlation "
    "DifferenceAverage DifferenceEntropy DifferenceVariance JointEnergy JointEntropy Imc1 Imc2 Idm Idmn Id Idn "
    "InverseVariance MaximumProbability SumEntropy SumSquares"
).split()  # those of FRD v1
GLCM_MORE = ["SumAverage", "MCC"]  # and those that only v0 has
_OF_TABLES = (  # {0}: short and long, {1}: of what
    "{short}Emphasis {long}Emphasis GrayLevelNonUniformity GrayLevelNonUniformityNormalized {one}NonUniformity "
    "{one}NonUniformityNormalized {part}Percentage GrayLevelVariance {part}Variance {part}Entropy "
    "LowGrayLevel{which}Emphasis HighGrayLevel{which}Emphasis {short}LowGrayLevelEmphasis "
    "{short}HighGrayLevelEmphasis {long}LowGrayLevelEmphasis {long}HighGrayLevelEmphasis"
)
GLRLM = _OF_TABLES.format(short="ShortRun", long="LongRun", one="RunLength", part="Run", which="Run").split()
GLSZM = _OF_TABLES.format(short="SmallArea", long="LargeArea", one="SizeZone", part="Zone", which="Zone").split()
_GLDM = _OF_TABLES.format(
    short="SmallDependence", long="LargeDependence", one="Dependence", part="Dependence", which=""
).split()
GLDM = [name for name in _GLDM if name not in ("GrayLevelNonUniformityNormalized", "DependencePercentage")]
NGTDM = ["Coarseness", "Contrast", "Busyness", "Complexity", "Strength"]


def quantised(image: np.ndarray, mask: np.ndarray, width: float) -> np.ndarray:
    """Grey levels (H, W) from 1 upwards inside the mask, 0 outside: level edges lie at multiples of `width`."""
    bins = np.floor(image / width)
    if mask.all():
        return (bins - (bins.min() - 1)).astype(np.int64)
    return np.where(mask, bins - bins[mask].min() + 1, 0).astype(np.int64)


def framed(x: np.ndarray) -> np.ndarray:
    """With a frame of zeros, one wide, around (H, W)."""
    out = np.zeros((x.shape[0] + 2, x.shape[1] + 2), dtype=x.dtype)
    out[1:-1, 1:-1] = x
    return out


def first_order(values: np.ndarray, levels: np.ndarray, shift: float = 0.0, area: float = 1.0) -> list[float]:
    """FIRST_ORDER of the values (N,) under a mask of pixels of size `area` and their grey levels (N,); `shift` is added
    before squares of values, so that they count from above 0."""
    x = np.sort(values.astype(np.float64))
    p = np.bincount(levels) / len(levels)
    low, p10, p25, p50, p75, p90, high = _quantiles(x, (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1))
    mean, shifted = x.mean(), x + shift
    energy, off = shifted @ shifted, x - mean
    squares = off * off
    m2, m3, m4 = squares.mean(), squares @ off / len(x), squares @ squares / len(x)
    flat = m2 or 1.0
    inner = x[np.searchsorted(x, p10) : np.searchsorted(x, p90, "right")]  # none of two
    robust = np.abs(inner - inner.mean()).mean() if len(inner) else np.nan
    return [
        energy, energy * area, entropy(p), low, p10, p90, high, mean, p50, p75 - p25, high - low, np.abs(off).mean(),
        robust, np.sqrt(energy / len(x)), m3 / flat**1.5, m4 / flat**2, m2, p @ p,
    ]  # fmt: skip


def _quantiles(x: np.ndarray, shares: tuple[float, ...]) -> np.ndarray:
    """Of sorted values, between two of them in proportion."""
    place = np.array(shares) * (len(x) - 1)
    below = place.astype(int)
    above = np.minimum(below + 1, len(x) - 1)
    return x[below] + (x[above] - x[below]) * (place - below)


def entropy(p: np.ndarray) -> float:
    """In bits, of shares p (N,)."""
    return -(p @ np.log2(p + EPS))


# ------------------------------------------------------------------------------------------------------------- pairs


def glcm(levels: np.ndarray, more: bool = False) -> list[float]:
    """GLCM (and GLCM_MORE) of grey levels (H, W): means over the directions in which there are pairs, else NaN."""
    flat, steps = _flat(levels)
    top, found = int(levels.max()), []
    for step in steps:
        a, b = flat[:-step], flat[step:]
        counts = np.bincount(np.minimum(a, b) * (top + 1) + np.maximum(a, b))
        counts[: top + 1] = 0  # pairs with a pixel of no level
        if counts.any():
            found.append(_of_pairs(counts, top, more))
    return np.mean(found, 0).tolist() if found else [np.nan] * (len(GLCM) + len(GLCM_MORE) * more)


def _flat(levels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The pixels one after the other with a 0 behind each row, and how far apart the two of a pair are in each of
    STEPS: whatever leaves the image meets a 0."""
    padded = framed(levels)[1:, 1:]
    return padded.ravel(), [down * padded.shape[1] + right for down, right in STEPS]


def _of_pairs(counts: np.ndarray, top: int, more: bool) -> list[float]:
    """The features of one direction, from how often levels i <= j are a pair, at i (top + 1) + j. A pair counts both
    ways: of P, entry (i, j) and (j, i) hold half of the share c of the pairs each, entry (i, i) the whole."""
    codes = np.flatnonzero(counts > 0)  # of booleans: ten times as fast
    i = codes // (top + 1)
    j, counted = codes - i * (top + 1), counts[codes]
    c = counted / counted.sum()
    entry = np.where(i == j, c, c / 2)
    px = (np.bincount(i, c, top + 1) + np.bincount(j, c, top + 1)) / 2
    sums, differences = np.bincount(i + j, c), np.bincount(j - i, c)
    k, d, level = (np.arange(n, dtype=np.float64) for n in (len(sums), len(differences), top + 1))
    mean, average = level @ px, d @ differences
    off, dd = k - 2 * mean, d * d
    squares = off * off
    weighted = sums * squares
    variance = px @ (level - mean) ** 2
    joint, hx = -(c @ np.log2(entry + EPS)), entropy(px)
    # HXY1 and HXY2, the entropies of px(i) px(j) under P and under itself, are both twice that of px, but for EPS in
    # the logarithms, which moves them by some 1e-8.
    imc2 = np.sqrt(max(1 - np.exp(-2 * max(2 * hx - joint, 0.0)), 0.0))
    found = [
        c @ (i * j), mean, weighted @ squares, weighted @ off, weighted.sum(), differences @ dd,
        c @ ((i - mean) * (j - mean)) / (variance + EPS) if variance else 1.0,
        average, entropy(differences), differences @ (d - average) ** 2,
        c @ entry, joint, (joint - 2 * hx) / hx if hx > 1e-12 else 0.0, imc2,
        differences @ (1 / (1 + dd)), differences @ (1 / (1 + dd / top**2)),
        differences @ (1 / (1 + d)), differences @ (1 / (1 + d / top)),
        differences[1:] @ (1 / dd[1:]), entry.max(), entropy(sums), variance,
    ]  # fmt: skip
    return [*found, k @ sums, _correlation(i, j, entry, px)] if more else found


def _correlation(i: np.ndarray, j: np.ndarray, entry: np.ndarray, px: np.ndarray) -> float:
    """MCC, the maximal correlation: the second singular value of P_ij / sqrt(px_i px_j)."""
    present = np.flatnonzero(px)
    place = np.zeros(len(px), dtype=int)
    place[present] = np.arange(len(present))
    table = np.zeros((len(present),) * 2)
    scaled = entry / np.sqrt(px[i] * px[j])
    table[place[i], place[j]] = table[place[j], place[i]] = scaled
    return float(np.linalg.svd(table, compute_uv=False)[1]) if len(present) > 1 else 1.0


# ------------------------------------------------------------------------------------- runs, zones and dependences


def glrlm(levels: np.ndarray) -> list[float]:
    """GLRLM of grey levels (H, W): means over the directions in which two pixels lie on a line, else NaN."""
    flat, found = np.append(levels.ravel(), 0), []
    for order in _lines(levels.shape):
        values = flat[order]  # the lines after each other, a 0 behind each
        starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
        lengths, level = np.diff(starts, append=len(values)), values[starts]
        runs = level > 0
        lengths, level = lengths[runs], level[runs]
        if lengths.max() > 1 or np.bincount(np.cumsum(order == levels.size)[values > 0]).max() > 1:
            found.append(_of_table(level, lengths, int(lengths.sum())))
    return np.mean(found, 0).tolist() if found else [np.nan] * len(GLRLM)


@functools.lru_cache(8)
def _lines(shape: tuple[int, int]) -> list[np.ndarray]:
    """For each direction the pixels of an image, line after line; the number of pixels stands for a line's end."""
    row, column = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    orders = []
    for down, right in STEPS:
        line = row if not down else column if not right else column - right * row
        order = np.lexsort((row * down + column * (not down), line))
        ends = np.flatnonzero(np.diff(line[order])) + 1
        orders.append(np.append(np.insert(order, ends, len(row)), len(row)))
    return orders


def zones(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level and size of every connected zone of one grey level: pixels touch along sides and at corners."""
    flat, (one, row, back, slash) = _flat(levels)
    n, inside = len(flat), flat > 0
    joined = np.zeros((4, n), dtype=bool)  # every pixel with four of its neighbours
    right, slashes, below, backs = joined
    for step, same in ((one, right), (slash, slashes), (row, below), (back, backs)):
        np.equal(flat[:-step], flat[step:], out=same[:-step])
    joined &= inside
    # A corner says nothing new where a side joins its pixels, nor does a side below one that joins the same two rows.
    backs[:-back] &= ~(right[:-back] | right[row : n - one])
    slashes[1:-slash] &= ~(right[: -slash - 1] | right[slash + 1 :])
    below[1:-row] &= ~(right[: -row - 1] & right[row:-1] & below[: -row - 1])
    starts = np.zeros(n + 1, dtype=np.int32)  # of each pixel's neighbours in one list of all
    joined.view(np.uint8).sum(0, dtype=np.uint8).cumsum(dtype=np.int32, out=starts[1:])
    ends, place = np.empty(starts[-1], dtype=np.int32), starts[:-1].copy()
    for step, same in ((one, right), (slash, slashes), (row, below), (back, backs)):
        pixels = np.flatnonzero(same)
        ends[place[pixels]] = pixels + step
        place += same
    graph = csr_array((np.ones(len(ends)), ends, starts), shape=(n, n))
    labels = connected_components(graph, directed=False)[1]
    size = np.bincount(labels)
    level = np.zeros(len(size), dtype=np.int64)
    level[labels] = flat
    return level[level > 0], size[level > 0]


def glszm(levels: np.ndarray) -> list[float]:
    """GLSZM of grey levels (H, W)."""
    level, size = zones(levels)
    return _of_table(level, size, int(size.sum()))


def gldm(levels: np.ndarray) -> list[float]:
    """GLDM of grey levels (H, W): a pixel depends on itself and on the neighbours of its level."""
    around, inside = _neighbours(levels), levels > 0
    depends = 1 + (around == levels).sum(0)[inside]
    found = dict(zip(_GLDM, _of_table(levels[inside], depends, 1)))
    return [found[name] for name in GLDM]


def _of_table(level: np.ndarray, size: np.ndarray, pixels: int) -> list[float]:
    """The 16 features that runs, zones and dependences share, from the level (N,) and size (N,) of each."""
    n, rows, most = len(level), int(level.max()) + 1, int(size.max())
    if rows * most <= 4 * n:
        j, place = np.arange(1, most + 1), size - 1
    else:  # a few large ones: only sizes that occur
        occurs = np.bincount(size) > 0
        j, place = np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[size]
    counts = np.bincount(level * len(j) + place, minlength=rows * len(j))
    by_level, by_size = (counts.reshape(rows, len(j)).sum(axis) for axis in (1, 0))
    i, codes = np.arange(rows, dtype=np.float64), np.flatnonzero(counts > 0)
    row = codes // len(j)
    squares = j * (j * 1.0)
    p, light, long = counts[codes] / n, (i * i)[row], squares[codes - row * len(j)]
    inverse = p / long
    pg, ps = by_level / n, by_size / n
    return [
        ps @ (1 / squares), ps @ squares, pg @ by_level, pg @ pg, ps @ by_size, ps @ ps, n / pixels,
        pg @ (i - pg @ i) ** 2, ps @ (j - ps @ j) ** 2, entropy(p), pg[1:] @ (1 / i[1:] ** 2), pg @ (i * i),
        inverse @ (1 / light), inverse @ light, (p * long) @ (1 / light), (p * long) @ light,
    ]  # fmt: skip


def _neighbours(levels: np.ndarray) -> np.ndarray:
    """The 8 neighbours (8, H, W) of every pixel, 0 beyond the image."""
    padded, (height, width) = framed(levels), levels.shape
    steps = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
    return np.stack([padded[y : y + height, x : x + width] for y, x in steps])


def _sums(x: np.ndarray) -> np.ndarray:
    """Sums over the 3 x 3 pixels around each that has them all."""
    x = x[:-2] + x[1:-1] + x[2:]
    return x[:, :-2] + x[:, 1:-1] + x[:, 2:]


@functools.lru_cache(8)
def _known(shape: tuple[int, int]) -> np.ndarray:
    """How many of the 3 x 3 pixels around each lie in an image."""
    return _sums(np.pad(np.ones(shape, dtype=np.int64), 1))


def ngtdm(levels: np.ndarray) -> list[float]:
    """NGTDM of grey levels (H, W)."""
    inside, around = levels > 0, _sums(framed(levels))
    if inside.all():
        known, around, level = _known(levels.shape).ravel() - 1, around.ravel(), levels.ravel()
    else:
        known, around, level = (x[inside] for x in (_sums(framed(inside.astype(np.int64))) - 1, around, levels))
    average = (around - level) / np.maximum(known, 1)
    apart = np.abs(level - average) * (known > 0)
    counts = np.bincount(level)
    i = np.flatnonzero(counts)
    s, p = np.bincount(level, apart)[i], counts[i] / len(level)
    coarse, n, between = (p * s).sum(), len(i), np.abs(i[:, None] - i)
    contrast = 2 * (p * (i - (p * i).sum()) ** 2).sum() * s.sum() / len(level)
    busy = np.abs((i * p)[:, None] - i * p).sum()
    both = p[:, None] + p
    complexity = (between * ((p * s)[:, None] + p * s) / both).sum() / len(level)
    return [
        1 / coarse if coarse else 1e6,
        contrast / (n * (n - 1)) if n > 1 else 0.0,
        coarse / busy if busy else 0.0,
        complexity,
        (both * between * between).sum() / s.sum() if s.sum() else 0.0,
    ]


CLASSES = {"firstorder": FIRST_ORDER, "glcm": GLCM, "glrlm": GLRLM, "glszm": GLSZM, "ngtdm": NGTDM}
NAMES = [f"{name}_{feature}" for name, features in CLASSES.items() for feature in features]  # 77, of FRD v1
_ALL = CLASSES | {"glcm": GLCM + GLCM_MORE, "gldm": GLDM}
ALL_NAMES = [f"{name}_{feature}" for name, features in _ALL.items() for feature in features]  # 93, of FRD v0


def features(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    width: float = 5.0,
    shift: float = 0.0,
    area: float = 1.0,
    everything: bool = False,
) -> np.ndarray:
    """NAMES, or ALL_NAMES with `everything`, of a grey image (H, W) under a mask (H, W); no mask: the whole image.

    width       of a grey level
    shift       added to values before their squares are summed
    area        of a pixel
    everything  also what FRD v0 has besides

    Returns float64 (77,) or (93,). NaN where a feature is not defined: pairs and runs of isolated pixels. Raises
    ValueError for an empty mask, one of another shape, and values that are not finite.
    """
    mask = np.ones(image.shape, dtype=bool) if mask is None else mask.astype(bool)
    if image.ndim != 2 or mask.shape != image.shape or not mask.any():
        raise ValueError(f"an image {image.shape} with a mask {mask.shape} of {mask.sum()} pixels has no features")
    if not np.isfinite(image[mask]).all():
        raise ValueError("an image with values that are not finite has no features")
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image, mask = image[inner], mask[inner]
    levels = quantised(image, mask, width)
    values, of_them = (image.ravel(), levels.ravel()) if mask.all() else (image[mask], levels[mask])
    found = [
        *first_order(values, of_them, shift, area), *glcm(levels, everything), *glrlm(levels), *glszm(levels),
        *ngtdm(levels), *(gldm(levels) if everything else []),
    ]  # fmt: skip
    return np.array(found, dtype=np.float64)
