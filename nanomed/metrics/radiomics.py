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


def _entropies(p: np.ndarray) -> np.ndarray:
    """Of each row of p (R, N)."""
    return -(p * np.log2(p + EPS)).sum(1)


# ------------------------------------------------------------------------------------------------------------- pairs


def glcm(levels: np.ndarray, more: bool = False) -> list[float]:
    """GLCM (and GLCM_MORE) of grey levels (H, W): means over the directions in which there are pairs, else NaN."""
    flat, steps = _flat(levels)
    top, found = int(levels.max()), []
    times = flat * (top + 1)
    for step in steps:
        counts = np.bincount(np.minimum(times[:-step], times[step:]) + np.maximum(flat[:-step], flat[step:]))
        counts[: top + 1] = 0  # pairs with a pixel of no level
        codes = np.flatnonzero(counts > 0)  # of booleans: ten times as fast
        if len(codes):
            found.append((codes, counts[codes]))
    return _of_pairs(found, top, more).mean(0).tolist() if found else [np.nan] * (len(GLCM) + len(GLCM_MORE) * more)


def _flat(levels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The pixels one after the other with a 0 behind each row, and how far apart the two of a pair are in each of
    STEPS: whatever leaves the image meets a 0."""
    padded = framed(levels)[1:, 1:]
    return padded.ravel(), [down * padded.shape[1] + right for down, right in STEPS]


def _of_pairs(directions: list[tuple[np.ndarray, np.ndarray]], top: int, more: bool) -> np.ndarray:
    """The features (directions, 22 or 24) from, for each direction, which levels i <= j are pairs, as i (top + 1) + j,
    and how often. A pair counts both ways: of P, entry (i, j) and (j, i) hold half of the share c of the pairs each,
    entry (i, i) the whole."""
    codes = np.concatenate([codes for codes, _ in directions])
    c = np.concatenate([counts / counts.sum() for _, counts in directions])
    first = np.cumsum([0, *(len(codes) for codes, _ in directions)])  # of each direction
    way = np.repeat(np.arange(len(directions)), np.diff(first))
    i = codes // (top + 1)
    j = codes - i * (top + 1)
    entry = np.where(i == j, c, c / 2)

    def over(place: np.ndarray, bins: int) -> np.ndarray:
        """c added up by place, for each direction (directions, bins)."""
        return np.bincount(way * bins + place, c, len(directions) * bins).reshape(-1, bins)

    def total(of_entries: np.ndarray) -> np.ndarray:
        return np.add.reduceat(of_entries, first[:-1])

    px = (over(i, top + 1) + over(j, top + 1)) / 2
    sums, differences = over(i + j, 2 * top + 1), over(j - i, top + 1)
    k, level = np.arange(2 * top + 1.0), np.arange(top + 1.0)  # differences are counted like levels
    dd = level * level
    mean, average = px @ level, differences @ level
    off = k - 2 * mean[:, None]
    squares = off * off
    weighted = sums * squares
    tendency, contrast = weighted.sum(1), differences @ dd
    variance = (px * (level - mean[:, None]) ** 2).sum(1)
    joint, hx = -total(c * np.log2(entry + EPS)), _entropies(px)
    # HXY1 and HXY2, the entropies of px(i) px(j) under P and under itself, are both twice that of px, but for EPS in
    # the logarithms, which moves them by some 1e-8.
    imc1 = np.where(hx > 1e-12, (joint - 2 * hx) / np.where(hx > 1e-12, hx, 1.0), 0.0)
    imc2 = np.sqrt(np.maximum(1 - np.exp(-2 * np.maximum(2 * hx - joint, 0.0)), 0.0))
    covariance = (tendency - contrast) / 4  # of i and j; (i - m + j - m)^2 - (i - j)^2 is four times their product
    found = [
        covariance + mean * mean, mean, (weighted * squares).sum(1), (weighted * off).sum(1), tendency, contrast,
        np.where(variance > 0, covariance / (variance + EPS), 1.0),
        average, _entropies(differences), (differences * (level - average[:, None]) ** 2).sum(1),
        total(c * entry), joint, imc1, imc2,
        differences @ (1 / (1 + dd)), differences @ (1 / (1 + dd / top**2)),
        differences @ (1 / (1 + level)), differences @ (1 / (1 + level / top)),
        differences[:, 1:] @ (1 / dd[1:]), np.maximum.reduceat(entry, first[:-1]), _entropies(sums), variance,
    ]  # fmt: skip
    if more:
        each = [slice(*ends) for ends in zip(first, first[1:])]
        found += [sums @ k, [_correlation(i[one], j[one], entry[one], row) for one, row in zip(each, px)]]
    return np.stack(found, 1)


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
    flat, found = np.append(levels, 0), []
    inside = np.count_nonzero(levels)
    for order in _lines(levels.shape):
        values = flat.take(order)
        begins = np.flatnonzero(values[1:] != values[:-1]) + 1  # of runs, and of the last line's end
        level, lengths = values.take(begins[:-1]), begins[1:] - begins[:-1]
        if np.count_nonzero(level) < inside or _pairs_on_lines(order, values):
            found.append(_of_table(level, lengths))
    return np.mean(found, 0).tolist() if found else [np.nan] * len(GLRLM)


def _pairs_on_lines(order: np.ndarray, values: np.ndarray) -> bool:
    line = np.cumsum(order == order[0])[values > 0]
    return bool((line[1:] == line[:-1]).any())


@functools.lru_cache(8)
def _lines(shape: tuple[int, int]) -> list[np.ndarray]:
    """For each direction the pixels of an image, line after line; the number of pixels stands before, between and
    behind the lines."""
    row, column = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    orders = []
    for down, right in STEPS:
        line = row if not down else column if not right else column - right * row
        order = np.lexsort((row * down + column * (not down), line))
        ends = np.flatnonzero(np.diff(line[order])) + 1
        orders.append(np.pad(np.insert(order, ends, len(row)), 1, constant_values=len(row)))
    return orders


def zones(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Level and size of every connected zone of one grey level, those of level 0 in pieces: pixels touch along sides
    and at corners."""
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
    # The nodes of the graph are runs along rows. Its edges go from a pixel to the row below; runs being in the order of
    # their pixels, edges in the order of pixels are in that of runs.
    run = np.empty(n, dtype=np.int32)  # of each pixel
    run[0] = 0
    np.cumsum(~right[:-1], dtype=np.int32, out=run[1:])
    begins = np.append(0, np.flatnonzero(~right[:-1]) + 1)
    starts = np.zeros(n + 1, dtype=np.int32)  # of each pixel's edges in one list of all
    joined[1:].view(np.uint8).sum(0, dtype=np.uint8).cumsum(dtype=np.int32, out=starts[1:])
    ends, place = np.empty(starts[-1], dtype=np.int32), starts[:-1].copy()
    for step, same in ((slash, slashes), (row, below), (back, backs)):
        pixels = np.flatnonzero(same)
        ends[place[pixels]] = run[pixels + step]
        place += same
    graph = csr_array((np.ones(len(ends)), ends, np.append(starts[begins], starts[-1])), shape=(len(begins),) * 2)
    count, labels = connected_components(graph, directed=False)
    level = np.empty(count, dtype=np.int64)
    level[labels] = flat[begins]
    return level, np.bincount(labels, np.diff(begins, append=n)).astype(np.int64)


def glszm(levels: np.ndarray) -> list[float]:
    """GLSZM of grey levels (H, W)."""
    return _of_table(*zones(levels))


def gldm(levels: np.ndarray) -> list[float]:
    """GLDM of grey levels (H, W): a pixel depends on itself and on the neighbours of its level."""
    flat, steps = _flat(levels)
    depends = np.ones(len(flat), dtype=np.int64)
    for step in steps:
        same = flat[:-step] == flat[step:]
        depends[:-step] += same
        depends[step:] += same
    found = dict(zip(_GLDM, _of_table(flat, depends)))
    return [found[name] for name in GLDM]


def _of_table(level: np.ndarray, size: np.ndarray) -> list[float]:
    """The 16 features that runs, zones and dependences share, from the level (N,) and size (N,) of each; level 0 is
    none."""
    rows, most = int(level.max()) + 1, int(size.max())
    if rows * most <= 4 * len(level):
        j, place = np.arange(1, most + 1), size - 1
    else:  # a few large ones: only sizes that occur
        occurs = np.bincount(size) > 0
        j, place = np.flatnonzero(occurs), (np.cumsum(occurs) - 1).take(size)
    counts = np.bincount(level * len(j) + place, minlength=rows * len(j))
    counts[: len(j)] = 0
    by_level, by_size = (counts.reshape(rows, len(j)).sum(axis) for axis in (1, 0))
    n = by_level.sum()
    i, codes = np.arange(rows, dtype=np.float64), np.flatnonzero(counts > 0)
    row = codes // len(j)
    squares = j * (j * 1.0)
    p, light, long = counts[codes] / n, (i * i)[row], squares[codes - row * len(j)]
    inverse, longer = p / long, p * long
    pg, ps = by_level / n, by_size / n
    return [
        ps @ (1 / squares), ps @ squares, pg @ by_level, pg @ pg, ps @ by_size, ps @ ps, n / (by_size @ j),
        pg @ (i - pg @ i) ** 2, ps @ (j - ps @ j) ** 2, entropy(p), pg[1:] @ (1 / i[1:] ** 2), pg @ (i * i),
        inverse @ (1 / light), inverse @ light, longer @ (1 / light), longer @ light,
    ]  # fmt: skip


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
    coarse, n, off = (p * s).sum(), len(i), i - i.mean()
    contrast = 2 * (p * (i - (p * i).sum()) ** 2).sum() * s.sum() / len(level)
    # Sums over all pairs of levels: |x - y| by the ranks of x = i p; (p_i + p_j) (i - j)^2 by parts, as sum(off) is 0;
    # |i - j| (p_i s_i + p_j s_j) / (p_i + p_j) twice by its first half.
    busy = 2 * (np.arange(1 - n, n, 2) @ np.sort(i * p))
    strength = 2 * (n * (p @ (off * off)) + p.sum() * (off @ off))
    shares = np.abs(i[:, None] - i) / (p[:, None] + p)
    complexity = 2 * ((p * s) @ shares.sum(1)) / len(level)
    return [
        1 / coarse if coarse else 1e6,
        contrast / (n * (n - 1)) if n > 1 else 0.0,
        coarse / busy if busy else 0.0,
        complexity,
        strength / s.sum() if s.sum() else 0.0,
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
    if not mask.all():
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        inner = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        image, mask = image[inner], mask[inner]
    whole = bool(mask.all())
    values = image.ravel() if whole else image[mask]
    if not np.isfinite(values).all():
        raise ValueError("an image with values that are not finite has no features")
    levels = quantised(image, mask, width)
    of_them = levels.ravel() if whole else levels[mask]
    found = [
        *first_order(values, of_them, shift, area), *glcm(levels, everything), *glrlm(levels), *glszm(levels),
        *ngtdm(levels), *(gldm(levels) if everything else []),
    ]  # fmt: skip
    return np.array(found, dtype=np.float64)
