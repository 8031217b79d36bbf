"""Weights on disk: found where users keep them, refused when they are not sound, loaded whole or not at all."""

import gzip
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch
from manifests import about, components, names_and_shapes
from safetensors.torch import load_file, save_file
from torch import nn

from nanomed import weights
from nanomed.run import files
from nanomed.weights import WeightsError, WeightsNotFound, check_header, find, fingerprint, load, read
from nanomed.weights import __main__ as command

TENSORS = {
    "encoder.layers.0.weight": torch.arange(12.0).view(3, 4),
    "encoder.layers.0.bias": torch.arange(3, dtype=torch.float16),
    "encoder.position_ids": torch.arange(5)[None],
    "scale": torch.tensor(2.5),
}


def one_line(raised) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


# -------------------------------------------------------------------------------------------------------------- find


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty working folder and an empty Hugging Face cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path


def snapshot(hub: Path, repo: str, commit: str, main: bool = True) -> Path:
    """A repository as `hf download` caches it: blobs, and a snapshot of links to them."""
    cached = hub / f"models--{repo.replace('/', '--')}"
    save_to = cached / "blobs" / f"{commit}0123"
    save_to.parent.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, save_to)
    folder = cached / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(f"../../blobs/{commit}0123")
    if main:
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / "main").write_text(commit)
    return folder


def test_every_place_is_looked_at_in_order(places, monkeypatch):
    cache = snapshot(places / "hf" / "hub", "org/name", "abc1")
    assert find("org/name").samefile(cache)
    other = snapshot(places / "elsewhere", "org/name", "abc2")
    monkeypatch.setenv("HF_HUB_CACHE", str(places / "elsewhere"))
    assert find("org/name").samefile(other)
    for place in ("weights/name", "weights/org/name", "mine/name", "mine/org/name", "org/name"):
        (places / place).mkdir(parents=True)
        assert find("org/name", "mine").samefile(places / place)
    assert find(places / "mine" / "name").samefile(places / "mine" / "name")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(places))
    usual = snapshot(places / ".cache" / "huggingface" / "hub", "another/name2", "abc3")
    assert find("another/name2").samefile(usual)
    assert find("msdm-tiny").samefile(weights.published.SHIPPED / "msdm-tiny")  # from any working folder


def test_of_two_snapshots_main_is_taken(places):
    first = snapshot(places / "hf" / "hub", "org/name", "aaa1")
    second = snapshot(places / "hf" / "hub", "org/name", "bbb2", main=False)
    assert find("org/name").samefile(first)
    os.utime(first, (1, 1))
    (places / "hf" / "hub" / "models--org--name" / "refs" / "main").write_text("../../../etc")
    assert find("org/name").samefile(second)


def test_nothing_found_says_where_and_what_to_do(places):
    with pytest.raises(FileNotFoundError) as raised:
        find("openai/clip-vit-large-patch14", "mine")
    message = one_line(raised)
    for place in (
        "mine/openai/clip-vit-large-patch14",
        "mine/clip-vit",
        "weights/clip-vit",
        "models--openai--clip-vit",
    ):
        assert place in message
    assert 'get it with: hf download openai/clip-vit-large-patch14 --include "*.json"' in message
    assert message.endswith("--local-dir weights/openai/clip-vit-large-patch14")
    assert isinstance(raised.value, WeightsError)
    with pytest.raises(WeightsError, match="hf download some/thing --local-dir weights/some/thing"):
        find("some/thing")
    with pytest.raises(WeightsError) as raised:
        find("nothing")
    assert "hf download" not in one_line(raised)  # not the name of a repository


# -------------------------------------------------------------------------------------------------------------- read


def test_reads_a_file_or_the_folder_around_it(tmp_path):
    for stem in ("model", "diffusion_pytorch_model"):
        files.write_tensors(tmp_path / stem / f"{stem}.safetensors", TENSORS)
        same(read(tmp_path / stem / f"{stem}.safetensors"), TENSORS)
        same(read(tmp_path / stem), TENSORS)
        same(read(tmp_path / stem, stem), TENSORS)
    with pytest.raises(WeightsNotFound, match="diffusion_pytorch_model.safetensors"):
        read(tmp_path / "model", "diffusion_pytorch_model")
    with pytest.raises(WeightsNotFound, match="missing"):
        read(tmp_path / "nowhere.safetensors")


def test_the_half_precision_variant_is_second_choice(tmp_path):
    half = {name: t.half() if t.is_floating_point() else t for name, t in TENSORS.items()}
    save_file(half, tmp_path / "model.fp16.safetensors")
    same(read(tmp_path), half)
    save_file(TENSORS, tmp_path / "model.safetensors")
    same(read(tmp_path), TENSORS)


def test_prefix_selects_and_names_stay_whole(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    same(
        read(tmp_path, prefix="encoder.layers."), {n: t for n, t in TENSORS.items() if n.startswith("encoder.layers.")}
    )
    with pytest.raises(WeightsError, match="decoder"):
        read(tmp_path, prefix="decoder.")


def test_conversion_leaves_integers_alone(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    tensors = read(tmp_path, dtype=torch.bfloat16)
    same(tensors, {n: t.bfloat16() if t.is_floating_point() else t for n, t in TENSORS.items()})


def test_writing_to_a_tensor_does_not_write_to_the_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    before = files.sha256(tmp_path / "model.safetensors")
    for tensor in read(tmp_path).values():
        tensor.add_(1)
    assert files.sha256(tmp_path / "model.safetensors") == before
    same(read(tmp_path), TENSORS)


MEASURE = """
import re, sys, torch
from pathlib import Path
from nanomed import weights

def resident():
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"{kind}:\\s+(\\d+)", status).group(1)) >> 10 for kind in ("RssAnon", "RssFile", "VmHWM")]

weights.tensors.CHUNK = 16 << 20
anon, mapped, _ = resident()
half = weights.read(sys.argv[1], dtype=torch.float16)
converted = resident()
whole = weights.read(sys.argv[1])
read = resident()
assert half["layer.127"][0, 0] == whole["layer.127"][0, 0] == 127
print(converted[0] - anon, converted[1] - mapped, converted[2] - anon - mapped, read[0] - converted[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from Linux")
def test_reading_takes_no_memory_and_conversion_little_more_than_its_result(tmp_path):
    save_file({f"layer.{i}": torch.full((512, 512), float(i)) for i in range(128)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, tmp_path]
    root = Path(weights.__file__).parents[1]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    taken, mapped, peak, reading = map(int, out.stdout.split())  # MiB, for 128 MiB of float32
    assert 62 <= taken <= 72
    assert mapped <= 16
    assert peak <= 64 + 16 + 16
    assert reading <= 2


def shards(folder: Path, spelling: str = "model.safetensors.index.json", variant: str = "") -> dict[str, str]:
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for i, name in enumerate(TENSORS):
        file = f"model{variant}-0000{i % 2 + 1}-of-00002.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in weight_map if weight_map[name] == file}, folder / file)
    (folder / spelling).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "spelling, variant",
    [
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.fp16.json", ".fp16"),
        ("model.fp16.safetensors.index.json", ".fp16"),
    ],
)
def test_shards_in_every_published_spelling(tmp_path, spelling, variant):
    shards(tmp_path, spelling, variant)
    same(read(tmp_path), TENSORS)
    same(read(tmp_path, "model", prefix="encoder."), {n: t for n, t in TENSORS.items() if n.startswith("encoder.")})


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.update({"scale": "../secret.safetensors"}), r"scale is said to be in '\.\./secret"),
        (lambda m: m.update({"scale": "/etc/passwd.safetensors"}), "not a file of this folder"),
        (lambda m: m.update({"scale": "sub/model.safetensors"}), "not a file of this folder"),
        (lambda m: m.update({"scale": "..\\model.safetensors"}), "not a file of this folder"),
        (lambda m: m.update({"scale": "model.bin"}), "not a file of this folder"),
        (lambda m: m.update({"scale": 3}), "scale is said to be in 3"),
        (
            lambda m: m.update({"scale": "model-00003-of-00003.safetensors"}),
            "model-00003-of-00003.safetensors is missing",
        ),
        (lambda m: m.update({"more": FIRST}), f"{FIRST}: 1 not in it though its index says so .more."),
        (lambda m: m.update({"scale": FIRST}), "index"),
        (lambda m: m.pop("scale"), f"{SECOND}: 1 in it though its index does not say so .scale."),
        (lambda m: m.clear(), "no tensor"),
    ],
)
def test_an_index_that_does_not_fit_is_refused_with_key_and_file(tmp_path, change, says):
    weight_map = shards(tmp_path)
    change(weight_map)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=says) as raised:
        read(tmp_path)
    assert str(tmp_path) in one_line(raised)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "b", "a": "c"}}', "[" * 99999]
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="not an index"):
        read(tmp_path)


def test_links_may_not_leave_a_cached_repository(places):
    folder = snapshot(places / "hf" / "hub", "org/name", "abc1")
    same(read(find("org/name")), TENSORS)  # the links of the cache itself are fine
    save_file(TENSORS, places / "outside.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(places / "outside.safetensors")
    with pytest.raises(WeightsError, match="leaves .*models--org--name"):
        read(find("org/name"))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")  # a link to itself
    with pytest.raises(WeightsError):
        read(find("org/name"))


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, length):
    """Its first two bytes are then 0x80 and a protocol number."""
    path = tmp_path / "a.safetensors"
    for padding in range(length):
        save_file({"x": torch.ones(2)}, path, {"note": "a" * padding})
        if int.from_bytes(path.read_bytes()[:8], "little") == length:
            break
    assert path.read_bytes()[:2] == bytes([0x80, length // 256])
    same(weights.read(path), {"x": torch.ones(2)})


def test_only_a_pickle_there_is_said(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsNotFound, match="pytorch_model.bin is a pickle"):
        read(tmp_path)


# ------------------------------------------------------------------------------------------------------------ pickles


class Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_but_never_run(tmp_path, zipped):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    same(weights.read_pickle(path), TENSORS)
    same(weights.read_pickle(path, prefix="scale", dtype=torch.float16), {"scale": TENSORS["scale"].half()})
    torch.save({"weight": Bomb(tmp_path / "ran")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="a.pth: not a plain pickle of tensors") as raised:
        weights.read_pickle(path)
    one_line(raised)
    torch.save({"model": TENSORS}, path)
    with pytest.raises(WeightsError, match="model is not a tensor"):
        weights.read_pickle(path)
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    for reader in (weights.read_pickle, read, check_header):
        with pytest.raises(WeightsError):
            reader(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # the bomb is live: anything else would have set it off
    assert (tmp_path / "ran").exists()


def test_the_package_unpickles_nothing_else():
    for path in Path(weights.__file__).parent.rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        assert not re.search(
            r"weights_only\s*=\s*False|pickle\.loads?\(|import pickle|allow_pickle\s*=\s*True", code
        ), path
        for call in re.findall(r"torch\.load\((?:[^()]|\([^()]*\))*\)", code):
            assert "weights_only=True" in call, f"{path}: {call}"


# ------------------------------------------------------------------------------------------------------------ headers


def raw(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_sound_header_tells_names_dtypes_and_shapes(tmp_path):
    files.write_tensors(tmp_path / "a.safetensors", TENSORS, {"step": "3"})
    header = check_header(tmp_path / "a.safetensors")
    assert header == {
        "encoder.layers.0.weight": ("F32", (3, 4)),
        "encoder.layers.0.bias": ("F16", (3,)),
        "encoder.position_ids": ("I64", (1, 5)),
        "scale": ("F32", ()),
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_what_is_not_safetensors_is_called_by_its_name(tmp_path):
    cases = {
        "is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3438167536\n",
        "is a web page": b"<!DOCTYPE html>\n<html><head><title>Sign in</title>",
        "is gzip-compressed": gzip.compress(b"weights"),
        "is empty": b"",
    }
    for message, content in cases.items():
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=message) as raised:
            read(tmp_path / "a.safetensors")
        assert "a.safetensors" in one_line(raised)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert zipfile.is_zipfile(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="is a zip or pickle such as torch.save writes"):
        read(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(WeightsError, match="is a folder"):
        check_header(tmp_path / "b.safetensors")
    os.mkfifo(tmp_path / "c.safetensors")  # must not wait for a writer
    with pytest.raises(WeightsError, match="not a regular file"):
        check_header(tmp_path / "c.safetensors")


LONG = "x" * 256
CASES = {  # name: (file, what is said); the library accepts those marked *
    "short": (b"\x02\0\0\0\0\0\0", "ends after 7 bytes"),
    "no header": (struct.pack("<Q", 0) + b"  ", "begin with"),
    "huge header": (struct.pack("<Q", 1 << 60) + b"{}" * 9, "header of 1152921504606846976 bytes"),
    "header above 16 MB *": (raw(b"{}" + b" " * (16 << 20)), "above 16777216"),
    "cut header": (raw({"a": entry()})[:30], "ends inside its header"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "not JSON": (raw(b'{"a": }'), "not JSON"),
    "trailing text": (raw(b"{} {}"), "not JSON"),
    "no table": (raw([1]), "begin with"),
    "leading space *": (raw(b" " + json.dumps({"a": entry()}).encode(), bytes(8)), "begin with"),
    "NaN": (raw(b'{"a": NaN}'), "NaN"),
    "deep": (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "name twice *": (
        raw(b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "'a' stands twice",
    ),
    "dtype twice": (raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), "twice"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata list": (raw({"__metadata__": ["a"]}), "__metadata__"),
    "parent folder *": (raw({"../a": entry(), **{}}, bytes(8)), None),  # a name of dots and slashes is only a name
    "NUL *": (raw({"a\0b": entry()}, bytes(8)), "named"),
    "newline *": (raw({"a\n": entry()}, bytes(8)), "named"),
    "space *": (raw({"a b": entry()}, bytes(8)), "named"),
    "empty name *": (raw({"": entry()}, bytes(8)), "named ''"),
    "long name *": (raw({LONG: entry()}, bytes(8)), "named 'xxx"),
    "extra field *": (raw({"a": {**entry(), "more": 1}}, bytes(8)), "alone"),
    "lacking field": (raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "alone"),
    "no entry": (raw({"a": 3}), "alone"),
    "unknown dtype": (raw({"a": entry("F31")}, bytes(8)), "dtype 'F31'"),
    "odd dtype *": (raw({"a": entry("F8_E4M3", (8,))}, bytes(8)), "dtype 'F8_E4M3'"),
    "dtype a list": (raw({"a": entry(["F32"])}, bytes(8)), "dtype"),
    "negative size": (raw({"a": entry(shape=(-2,))}, bytes(8)), "shape"),
    "float size": (raw({"a": entry(shape=(2.0,))}, bytes(8)), "shape"),
    "bool size": (raw({"a": entry(shape=(True, 2))}, bytes(8)), "shape"),
    "size 2^62 *": (raw({"a": entry(shape=(0, 2**62), offsets=(0, 0))}), "shape"),
    "size 2^31 *": (raw({"a": entry(shape=(0, 2**31), offsets=(0, 0))}), "shape"),
    "overflow": (raw({"a": entry(shape=(2**30,) * 8)}, bytes(8)), "8 bytes for the shape"),
    "nine dimensions *": (raw({"a": entry(shape=(1,) * 8 + (2,))}, bytes(8)), "shape"),
    "endless number": (raw(b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 9999)), "digit|shape"),
    "reversed": (raw({"a": entry(offsets=(8, 0))}, bytes(8)), "bytes for the shape"),
    "negative offset": (raw({"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets"),
    "float offset": (raw({"a": entry(offsets=(0.0, 8.0))}, bytes(8)), "data_offsets"),
    "three offsets": (raw({"a": entry(offsets=(0, 4, 8))}, bytes(8)), "data_offsets"),
    "wrong size": (raw({"a": entry(offsets=(0, 4))}, bytes(8)), "4 bytes for the shape"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "b begins at byte 4"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "b begins at byte 12"),
    "hole at the start": (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "a begins at byte 4"),
    "cut body": (raw({"a": entry()}, bytes(7)), "7 bytes of tensors where the header names 8"),
    "bytes behind": (raw({"a": entry()}, bytes(9)), "1 bytes behind"),
    "many tensors *": (raw({f"t{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(20_001)}), "20001 tensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_headers_by_hand(tmp_path, case):
    content, says = CASES[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    accepted = library_accepts(path)
    assert accepted == case.endswith("*"), "the library has changed its mind"
    if says is None:
        assert check_header(path)
        return
    with pytest.raises(WeightsError, match=says) as raised:
        check_header(path)
    assert str(path) in one_line(raised) and len(str(raised.value)) < 500


def library_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            for name in opened.keys():
                opened.get_tensor(name)
        return True
    except Exception:
        return False


def mutate(header: dict, body: bytes, draw: random.Random) -> bytes:
    """Damage that knows the format: a field of an entry, a name, the length, the text, or the body."""
    header, kind = json.loads(json.dumps(header)), draw.randrange(9)
    name = draw.choice([name for name in header if name != "__metadata__"])
    numbers = [
        -1,
        0,
        1,
        2,
        3,
        7,
        8,
        255,
        2**31 - 1,
        2**31,
        2**32,
        2**62,
        2**63,
        2**64,
        2**200,
        0.5,
        True,
        None,
        "8",
        [],
        {},
    ]
    if kind == 0:
        header[name][draw.choice(["dtype", "shape", "data_offsets"])] = draw.choice(
            [*numbers, "F16", "I4", [1], [2, 2]]
        )
    elif kind == 1:
        field = header[name][draw.choice(["shape", "data_offsets"])]
        field[draw.randrange(len(field) + 1) - 1 :] = [draw.choice(numbers) for _ in range(draw.randint(0, 2))]
    elif kind == 2:
        header[draw.choice(["", "a\0", "é", "\ud800", "../" * 9, "x" * 300, "a b", name + "\n"])] = header.pop(name)
    elif kind == 3:
        header[name][draw.choice(["dtype", "more", "shape "])] = header[name].pop(draw.choice(list(header[name])))
    elif kind == 4:
        other = draw.choice([name for name in header if name != "__metadata__"])
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 5:
        header["__metadata__"] = draw.choice([*numbers, {"a": "b"}, {"a": 1}, {"a": {"b": "c"}}])
    content = raw(header, body)
    if kind == 6:
        at = draw.randrange(len(content))
        content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
    elif kind == 7:
        content = (
            content[: draw.randrange(len(content))] if draw.random() < 0.7 else content + bytes(draw.randint(1, 9))
        )
    elif kind == 8:
        length = draw.choice([*range(12), 2**16, 2**24, 2**24 + 1, 2**31, 2**32, 2**63, 2**64 - 1])
        content = struct.pack("<Q", length) + content[8:]
    return content


def test_two_thousand_damaged_headers(tmp_path):
    """Each is refused with one line, or is one that the library accepts too and reads alike: never anything else."""
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, {"format": "pt"})
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    draw, refused = random.Random(0), 0
    for i in range(2000):
        content = mutate(header, body, draw)
        path = tmp_path / f"{i}.safetensors"  # a new file: the one before may still be mapped
        path.write_bytes(content)
        try:
            found = check_header(path)
        except WeightsError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500
        else:
            assert library_accepts(path), content[:300]
            tensors = load_file(path)
            assert {name: tuple(t.shape) for name, t in tensors.items()} == {n: e.shape for n, e in found.items()}
        path.unlink()
    assert 1000 < refused < 1950


# -------------------------------------------------------------------------------------------------------------- load


class Net(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.first = nn.Linear(width, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 2)
        self.last.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def test_loading_fills_a_module_on_the_meta_device_without_copies(tmp_path):
    reference = Net().eval()
    files.write_tensors(tmp_path / "model.safetensors", reference.state_dict())
    module = weights.build(Net, width=4)
    assert all(parameter.is_meta for parameter in module.parameters())
    tensors = read(tmp_path)
    assert load(module, tensors) is module
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr()
    assert module.first.weight.requires_grad and not module.last.weight.requires_grad
    x = torch.randn(5, 4)
    assert torch.equal(module.eval()(x), reference(x))
    module.train()(x).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()  # the mapped tensors train like any other


def test_tables_that_files_hold_or_not_are_no_matter():
    state = Net().state_dict()
    counter = state.pop("norm.num_batches_tracked")
    module = load(weights.build(Net), state)
    assert module.norm.num_batches_tracked == 0 and not module.norm.num_batches_tracked.is_meta
    state |= {
        "norm.num_batches_tracked": counter + 7,
        "first.position_ids": torch.arange(3),
        "rotary.inv_freq": torch.ones(2),
    }
    assert load(weights.build(Net), state).norm.num_batches_tracked == 7


def test_one_error_lists_all_that_does_not_fit():
    state = Net().state_dict()
    del state["first.bias"], state["norm.running_mean"]
    state |= {"first.weight": torch.ones(4, 3), "more": torch.ones(1), "ema.more": torch.ones(1)}
    module = Net()
    before = fingerprint(module)
    with pytest.raises(WeightsError) as raised:
        load(module, state)
    assert one_line(raised) == (
        "these are not the weights of this Net: 2 missing (first.bias, norm.running_mean); "
        "2 not expected (ema.more, more); 1 of another shape (first.weight (4, 3) for (3, 4))"
    )
    assert fingerprint(module) == before  # nothing was loaded
    with pytest.raises(WeightsError, match=r"^[^;]*: 1 not expected \(more\)$"):
        load(Net(), Net().state_dict() | {"more": torch.ones(1), "ema.more": torch.ones(1)}, optional=["ema.*"])
    load(Net(), Net().state_dict() | {"more": torch.ones(1), "ema.more": torch.ones(1)}, optional=["ema.*", "more"])
    many = {f"layer.{i}": torch.ones(1) for i in range(1000)}
    with pytest.raises(WeightsError) as raised:
        load(Net(), Net().state_dict() | many)
    assert "1000 not expected" in one_line(raised) and len(str(raised.value)) < 300


def test_a_buffer_that_no_file_holds_may_not_stay_on_meta():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("table", torch.arange(2.0), persistent=False)

    with pytest.raises(WeightsError, match="table"):
        load(weights.build(Table), {"weight": torch.ones(2)})
    assert load(Table(), {"weight": torch.zeros(2)}).table.tolist() == [0, 1]  # not on meta: nothing to fill


# ------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprints_tell_every_bit_and_nothing_else(tmp_path):
    state = {name: tensor.clone() for name, tensor in TENSORS.items()} | {"half": torch.randn(3, 5).bfloat16()}
    value = fingerprint(state)
    assert re.fullmatch("[0-9a-f]{64}", value)
    save_file(state, tmp_path / "a.safetensors")
    assert fingerprint(read(tmp_path / "a.safetensors")) == value
    assert fingerprint(dict(reversed(state.items()))) == value
    assert fingerprint(state | {"half": state["half"].t().contiguous().t()}) == value  # memory layout does not count
    for other in (
        state | {"scale": torch.nextafter(state["scale"], torch.tensor(9.0))},
        state | {"scale": state["scale"].double()},
        state | {"scale": state["scale"].view(1)},
        state | {"encoder.position_ids": state["encoder.position_ids"].flip(1)},
        state | {"empty": torch.ones(0)},
        {("Scale" if name == "scale" else name): tensor for name, tensor in state.items()},
        {name: tensor for name, tensor in state.items() if name != "half"},
    ):
        assert fingerprint(other) != value
    net = Net()
    assert fingerprint(net) == fingerprint(net.state_dict())
    assert (
        fingerprint({}) == fingerprint(nn.ReLU()) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


# --------------------------------------------------------------------------------------------- catalogue and manifests


def test_the_catalogue_names_every_repository_the_manifests_come_from():
    table = weights.catalogue()
    repositories = {item.repo for item in table}
    assert len(repositories) == len(table) >= 19
    for component in components():
        repo = about(component).get("repo", "").split(" ")[0]
        if re.fullmatch(r"[\w-]+/[\w.-]+", repo) and not repo.startswith(("llava-hf/", "google-t5/t5-")):
            assert repo in repositories, component
    for item in table:
        assert item.use and item.licence and 0 < item.gigabytes < 40
        assert item.download.startswith(("hf download ", "curl ")) and f"weights/{item.repo}" in item.download
    by_name = {item.repo: item for item in table}
    assert by_name["google-t5/t5-large"].download == (
        'hf download google-t5/t5-large --include "*.json" --include "spiece.model" --include "model.safetensors"'
        " --local-dir weights/google-t5/t5-large"
    )


def test_list_check_and_verify(places, capsys):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    assert "openai/clip-vit-large-patch14" in out and "hf download" in out and "here:" not in out
    assert command.main(["check"]) == 0 and "no published weights are here" in capsys.readouterr().out

    folder = places / "weights" / "openai" / "clip-vit-large-patch14"
    files.write_tensors(folder / "model.safetensors", TENSORS)
    record = folder / ".cache/huggingface/download/model.safetensors.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{'0' * 40}\n{files.sha256(folder / 'model.safetensors')}\n1732000000.0\n")
    assert command.main(["list"]) == 0 and "here: weights/openai/clip-vit-large-patch14" in capsys.readouterr().out
    assert command.main(["check"]) == 0 and "sound, 4 tensors, 21 values" in capsys.readouterr().out
    assert command.main(["verify"]) == 0 and "as downloaded" in capsys.readouterr().out

    files.write_tensors(folder / "model.safetensors", TENSORS | {"scale": torch.tensor(2.6)})
    assert command.main(["check"]) == 0  # sound, only not the published one
    assert command.main(["verify"]) == 4 and "fetch it again" in capsys.readouterr().out
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])
    assert command.main(["check", "openai/clip-vit-large-patch14"]) == 4
    assert "the download is not complete" in capsys.readouterr().out
    assert command.main(["check", str(folder / "model.safetensors")]) == 4
    assert command.main(["check", "some/thing"]) == 4 and "hf download some/thing" in capsys.readouterr().out
    (folder.parent / "none").mkdir()
    assert command.main(["verify", str(folder.parent / "none")]) == 4
    assert "no file of weights" in capsys.readouterr().out


def test_verify_reads_the_hash_from_the_names_of_the_cache(places):
    folder = snapshot(places / ".cache" / "huggingface" / "hub", "org/name", "abc1")
    blob = (folder / "model.safetensors").resolve()
    digest = files.sha256(blob)
    (folder / "model.safetensors").unlink()
    blob.rename(blob.with_name(digest))
    (folder / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    assert weights.digests(folder) == {folder / "model.safetensors": digest}
    (places / "vgg16-397923af.pth").write_bytes(b"")
    assert list(weights.digests(places / "vgg16-397923af.pth").values()) == ["397923af"]


def test_manifests_count_what_they_say():
    assert len(components()) == 53
    for component in components():
        tensors = names_and_shapes(component)
        count = sum(torch.Size(shape).numel() for shape in tensors.values())
        head = about(component)
        assert count == head.get("params", head.get("trainable")), component
