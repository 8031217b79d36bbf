"""evaluate.py from folders to results.json: every number is the one its metric gives on the same images, every image
passes a network once, whatever is wrong is answered by name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

import evaluate
from nanomed import weights
from nanomed.data import toy
from nanomed.data.readers import clef
from nanomed.data.table import DataError
from nanomed.evaluation import final, imagesets, measuring, statistics, toyworld
from nanomed.metrics import clef as organisers
from nanomed.metrics import diversity, entries, features, frd, scores
from nanomed.metrics.features import inception_features
from nanomed.metrics.networks import inception, vit
from nanomed.run import files, ranks
from nanomed.run.flags import UsageError

ROOT = Path(__file__).parents[1]
OWN = {"frd"}  # metrics that need no file


@pytest.fixture(scope="module", autouse=True)
def small_inception():
    """Images come to the network at 96 x 96 here instead of 299 x 299, a tenth of the time; test_features.py is where
    sizes matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "SIDE", 96)
        yield


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """An Inception of random weights whose features tell images apart, as the file that a user would have."""
    torch.manual_seed(0)
    net = inception.Inception()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.nn.init.normal_(net.fc.weight, std=0.2)
    path = tmp_path_factory.mktemp("network") / "inception.safetensors"
    files.write_tensors(path, dict(net.state_dict()))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """40 real scenes as JPEG, 12 others, 20 "generated" ones as PNG."""
    root = tmp_path_factory.mktemp("folders")
    for name, first, count, suffix in (("real", 0, 40, "jpg"), ("other", 50, 12, "jpg"), ("fake", 100, 20, "png")):
        (root / name).mkdir()
        for i in range(count):
            Image.fromarray(toy.render(toy.scene(first + i), 64)).save(root / name / f"{i:03d}.{suffix}", quality=95)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache, network, monkeypatch):
    """Run evaluate.py's main in this process: run("--real", ...) -> results.json."""

    def call(*words, inception: bool = True, keep: Path = cache, out: str = "out") -> dict:
        known = ["--inception", str(network)] if inception else []
        words = [*map(str, words), "--out", str(tmp_path / out), "--cache", str(keep), *known]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        evaluate.main()
        path = tmp_path / out / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    return call


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """How many images each call of the Inception saw."""
    seen, forward = [], inception.Inception.forward

    def counted(self, x):
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(inception.Inception, "forward", counted)
    return seen


def arrays(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]


# ------------------------------------------------------------------------------------------------------- the numbers


def test_every_number_is_its_metric_on_the_same_images(run, folders, network):
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "fid,kid,is,pr,dc")
    with torch.inference_mode():
        net = inception.load(network)
        a, _ = inception_features(net, arrays(folders / "real"))
        b, logits = inception_features(net, arrays(folders / "fake"))
    precision, recall = scores.precision_recall(a, b)
    density, coverage = scores.density_coverage(a, b)
    expected = {
        "FID": scores.frechet_distance(a, b),
        "KID": scores.kernel_distance(a, b, seed=evaluate.Config().seed)[0],
        "IS": scores.inception_score(logits)[0],
        "precision": precision,
        "recall": recall,
        "F1": scores.f1(precision, recall),
        "density": density,
        "coverage": coverage,
    }
    assert {name: entry["value"] for name, entry in results.items()} == pytest.approx(expected, rel=1e-6)


def test_every_entry_carries_what_makes_it_a_number(run, folders, network):
    """N on both sides, protocol, interval with its method, floor at the same N, hash of the network, and the flag."""
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "fid,is,pr,dc,colour")
    fingerprint = weights.fingerprint(inception.load(network))
    for name, entry in results.items():
        assert (entry["n_real"], entry["n_fake"]) == (40, 20), name
        low, high = entry["interval"]["low"], entry["interval"]["high"]
        assert low <= entry["value"] <= high and entry["interval"]["method"], name
        assert entry["floor"]["method"] and entry["floor"]["n"] == 20, name
        assert len(entry["real"]) == 64
        if "pixels" not in entry["protocol"]:
            assert entry["protocol"].startswith("Inception pool3, tf"), name
            assert entry["network"] == fingerprint
            assert "below 2,048" in entry["flag"]
    assert "biased upwards" in results["FID"]["flag"]
    with torch.inference_mode():
        a, _ = inception_features(inception.load(network), arrays(folders / "real"))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(evaluate.Config().seed))
    halves = scores.frechet_distance(a[order[:20]], a[order[20:]])
    assert results["FID"]["floor"]["value"] == pytest.approx(halves, rel=1e-6)


def test_intervals_can_be_left_out(run, folders):
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "fid,pr", "--intervals", "false")
    assert not any("interval" in entry or "floor" in entry for entry in results.values())


def test_several_real_sets_stand_in_one_table_and_a_union_costs_no_pass(run, folders, passes, tmp_path, capsys):
    """As Table 3 of the first paper: single, multi, both. The union is the folder that holds both."""
    real = f"single={folders / 'real'},multi={folders / 'other'},both={folders / 'real'}+{folders / 'other'}"
    results = run("--real", real, "--fake", folders / "fake", "--metrics", "fid", "--intervals", "no", keep=tmp_path)
    assert sum(passes) == 40 + 12 + 20
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["single", "multi", "both"]
    together = tmp_path / "together"
    shutil.copytree(folders / "real", together)
    for path in (folders / "other").iterdir():
        shutil.copy(path, together / f"z{path.name}")
    both = run("--real", together, "--fake", folders / "fake", "--metrics", "fid", "--intervals", "no")
    assert results["FID [both]"]["value"] == pytest.approx(both["FID"]["value"], rel=1e-6)
    assert results["FID [both]"]["n_real"] == 52


def test_imageclef2024_gives_the_organisers_numbers(run, folders, network):
    real = f"single={folders / 'real'},multi={folders / 'other'}"
    words = ["--real", real, "--fake", folders / "fake", "--protocol", "imageclef2024", "--limit", "10"]
    results = run(*words, "--metrics", "fid,is")
    with torch.inference_mode():
        classify = organisers.of_inception(inception.load(network))
        p, q = (organisers.probabilities(classify, arrays(folders / name)[:10]) for name in ("real", "fake"))
    assert results["FID [single]"]["value"] == pytest.approx(organisers.frechet(p, q), rel=1e-6, abs=1e-12)
    mean, deviation, median = organisers.inception_score(q)
    for name in ("single", "multi"):  # it does not depend on the real images, so the paper repeats it
        found = [results[f"{metric} [{name}]"]["value"] for metric in ("IS", "IS std", "IS med")]
        assert found == pytest.approx([mean, deviation, median], rel=1e-9)
    assert results["FID [single]"]["protocol"] == "imageclef2024"
    with pytest.raises(UsageError, match="kid: the protocol imageclef2024"):
        run(*words, "--metrics", "kid")


def test_kfd_is_the_frechet_distance_of_class_tokens(run, folders, tmp_path):
    """A small ViT in the place of the published one."""
    folder = tmp_path / "weights" / vit.KVASIR
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32)
    labels = {str(i): f"class {i}" for i in range(8)}
    files.write_json(folder / "config.json", shape | {"patch_size": 16, "id2label": labels})
    net = vit.VitClassifier(vit.VitConfig.from_json(folder))
    vit.initialise(net)
    files.write_tensors(folder / "model.safetensors", dict(net.state_dict()))
    words = ["--real", folders / "real", "--fake", folders / "fake", "--metrics", "kfd"]
    results = run(*words, "--weights", tmp_path / "weights", inception=False)
    with torch.inference_mode():
        a, b = (vit.classifier_features(vit.load(folder), arrays(folders / name)) for name in ("real", "fake"))
    assert results["KFD"]["value"] == pytest.approx(scores.frechet_distance(a, b), rel=1e-6)
    with pytest.raises(weights.WeightsNotFound, match="hf download mmuratarat/kvasir-v2-classifier"):
        run(*words, inception=False)


def test_classifiers_are_trained_on_either_kind_of_image_and_tested_on_real_ones(run, folders, tmp_path):
    for name, kind, suffix in (("train", "fake", "png"), ("generated", "fake", "png"), ("test", "real", "jpg")):
        for label in ("polyps", "cecum"):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(10):
                source = folders / kind / f"{i + 10 * (label == 'cecum'):03d}.{suffix}"
                shutil.copy(source, tmp_path / name / label / f"{i}.{suffix}")
    words = ["--real", tmp_path / "test", "--train", tmp_path / "train", "--fake", tmp_path / "generated"]
    results = run(*words, "--metrics", "classify", "--classifier", "tiny", inception=False)
    for trained in ("generated", "real"):
        for score in ("F1 macro", "F1 weighted", "balanced accuracy", "AUC macro", "AUC weighted"):
            entry = results[f"classifier {score} [{trained}]"]
            assert 0 <= entry["value"] <= 1 and (entry["n_real"], entry["n_fake"]) == (20, 20)
    generated, real = (
        [e["value"] for n, e in results.items() if n.endswith(f"[{kind}]")] for kind in ("generated", "real")
    )
    assert generated == real  # the same images here, so the same classifier


# ---------------------------------------------------------------------------------------------------------- the cache


def test_one_pass_serves_all_metrics_and_a_cached_set_none(run, folders, passes, tmp_path):
    words = ["--real", folders / "real", "--fake", folders / "fake", "--intervals", "no"]
    first = run(*words, "--metrics", "fid,kid,is,pr", keep=tmp_path / "cache")
    assert sum(passes) == 40 + 20
    passes.clear()
    again = run(*words, "--metrics", "fid,kid,is,pr,dc,memorisation", keep=tmp_path / "cache")
    assert not passes and {name: again[name] for name in first} == first

    other = run("--real", folders / "real", "--fake", folders / "other", *words[4:], "--metrics", "fid",
                keep=tmp_path / "cache")  # fmt: skip
    assert sum(passes) == 12 and other["FID"]["value"] != first["FID"]["value"]  # the real images pass no more


def test_another_image_network_or_protocol_is_another_entry(run, folders, passes, tmp_path):
    """Nothing stale is read: not even where a file keeps its name, size and date."""
    fake = tmp_path / "fake"
    shutil.copytree(folders / "other", fake)
    words = ["--real", folders / "other", "--fake", fake, "--metrics", "fid", "--intervals", "no"]
    assert run(*words, keep=tmp_path / "cache")["FID"]["value"] == pytest.approx(0, abs=1e-6)
    passes.clear()
    path = fake / "003.jpg"
    stamp = path.stat().st_mtime_ns
    shutil.copy(folders / "real" / "000.jpg", path)
    os.utime(path, ns=(stamp, stamp))
    changed = run(*words, keep=tmp_path / "cache")["FID"]["value"]
    assert sum(passes) == 12 and changed > 1e-3
    passes.clear()
    run(*words, "--protocol", "clean", keep=tmp_path / "cache")
    assert sum(passes) == 24


def test_a_damaged_entry_is_named_and_computed_again(run, folders, passes, tmp_path, capsys):
    words = ["--real", folders / "other", "--fake", folders / "fake", "--metrics", "fid", "--intervals", "no"]
    before = run(*words, keep=tmp_path / "cache")
    sizes = {path: path.stat().st_size for path in (tmp_path / "cache" / "features").rglob("*.safetensors")}
    shard = min(sizes, key=sizes.get)  # of the smaller set
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    passes.clear()
    capsys.readouterr()
    assert run(*words, keep=tmp_path / "cache") == before
    assert sum(passes) == 12
    assert re.search(
        rf"{shard.name}: damaged or unfinished; 12 images of .*other are computed", capsys.readouterr().out
    )


def test_two_ranks_share_the_images_and_give_the_results_of_one(tmp_path):
    """More images than one shard, so that both ranks have some; the shipped classifier of the toy world keeps it quick.
    The page, with its pictures, is the same to the byte."""
    fake = tmp_path / "fake"
    fake.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (270, 16, 16, 3), dtype=np.uint8)):
        Image.fromarray(image).save(fake / f"{i:05d}.png")
    (fake / "00007.png").write_bytes(b"")  # damage that rank 0 sees stops or bends both
    words = [str(ROOT / "evaluate.py"), "--real", "toy", "--fake", "fake", "--metrics", "fid,pr,colour", "--skip_bad"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        more = ["--intervals", "no", "--cache", str(tmp_path / f"cache-{name}"), "--out", name]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, *words, *more], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "270 images skipped, damaged: 00007.png" in done.stdout
    for name in ("results.json", "report.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    shards = list((tmp_path / "cache-two" / "features").rglob("*.safetensors"))
    assert len(shards) == 4  # two a set


# ---------------------------------------------------------------------------------------------------------- bad input


def spoilt(folders: Path, to: Path) -> Path:
    """The generated images, some of them unusual or damaged."""
    shutil.copytree(folders / "fake", to)
    Image.open(to / "001.png").convert("L").save(to / "001.png")
    Image.open(to / "002.png").resize((48, 40)).save(to / "002.png")
    Image.open(to / "003.png").convert("RGBA").save(to / "003.png")
    Image.fromarray(np.full((64, 64), 3000, np.uint16)).save(to / "004.png")
    Image.open(to / "005.png").convert("CMYK").save(to / "005.jpg")
    shutil.copy(to / "006.png", to / "twin.png")
    return to


def test_what_is_unusual_is_reported_by_name(run, folders, tmp_path, capsys):
    fake = spoilt(folders, tmp_path / "fake")
    run("--real", folders / "real", "--fake", fake, "--metrics", "colour", inception=False)
    said = capsys.readouterr().out
    for line in (
        "1 of 22 images is greyscale, measured as RGB: 001.png",
        "2 sizes, 21 images of 64 x 64 and 1 of another: 002.png",
        "1 of 22 images is transparent, composited over black: 003.png",
        "1 of 22 images is 16 bit or float, scaled to 8 bit: 004.png",
        "1 of 22 images is CMYK or of another mode, measured as RGB: 005.jpg",
        "1 lossy (JPEG, WebP) and 21 lossless files in one set, the former: 005.jpg",
        "1 of 22 images is another one's copy: twin.png = 006.png",
        f"{folders / 'real'} is JPEG or WebP, {fake} is lossless",
    ):
        assert line in said, line
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "greyscale" in page and "twin.png" in page


def test_files_that_both_sets_hold_are_named(run, folders, tmp_path, capsys):
    shutil.copytree(folders / "other", tmp_path / "fake")
    shutil.copy(folders / "real" / "005.jpg", tmp_path / "fake" / "copied.jpg")
    run("--real", folders / "real", "--fake", tmp_path / "fake", "--metrics", "colour", inception=False)
    assert (
        "1 of 13 images of" in (said := capsys.readouterr().out) and "byte for byte in" in said and "copied.jpg" in said
    )


def test_damaged_images_stop_by_name_or_are_skipped_by_name(run, folders, tmp_path, capsys):
    """PNG and JPEG cut at several places, an empty file and a text: all are found before a network runs."""
    fake, bad = tmp_path / "fake", []
    shutil.copytree(folders / "fake", fake)
    for number, share in enumerate((0.02, 0.3, 0.6, 0.97)):
        for source in (folders / "fake" / "010.png", folders / "real" / "010.jpg"):
            content = source.read_bytes()
            bad.append(fake / f"cut{number}{source.suffix}")
            bad[-1].write_bytes(content[: int(share * len(content))])
    (fake / "empty.png").write_bytes(b"")
    (fake / "text.png").write_text("not an image")
    bad += [fake / "empty.png", fake / "text.png"]
    with pytest.raises(DataError, match=r"10 of 30 images cannot be read.*--skip_bad.*cut0\.jpg.*and 5 more"):
        run("--real", folders / "real", "--fake", fake, "--metrics", "fid")
    words = ["--real", folders / "real", "--metrics", "fid", "--intervals", "no"]
    skipped = run(*words, "--fake", fake, "--skip_bad")
    assert "10 of 30 images skipped, damaged: " in capsys.readouterr().out
    assert skipped == run(*words, "--fake", folders / "fake")


def test_a_set_without_one_sound_image_is_refused(run, folders, tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="none of the 1 images can be read.*a.png"):
        run("--real", folders / "real", "--fake", tmp_path / "fake", "--skip_bad", "--metrics", "colour")


@pytest.mark.parametrize("words, error, said", [
    (["--fake", "FAKE"], UsageError, "--real DIR --fake DIR"),
    (["--real", "REAL", "--fake", "nowhere"], DataError, "nowhere: no such folder"),
    (["--real", "EMPTY", "--fake", "FAKE"], DataError, "empty: no images"),
    (["--real", "ONE", "--fake", "FAKE", "--metrics", "fid"], DataError, "fid needs at least 2 images.*smallest has 1"),
    (["--real", "ONE", "--fake", "FAKE", "--metrics", "pr"], DataError, "pr needs at least 4 images"),
    (["--real", "REAL", "--fake", "ONE", "--metrics", "is"], DataError, "is needs at least 10 images"),
    (["--real", "ONE", "--fake", "FAKE", "--metrics", "memorisation"], DataError, "at least 20 training images"),
    (["--real", "toy", "--fake", "FAKE", "--metrics", "memorisation"], DataError, "--train DIR"),
    (["--real", "REAL", "--fake", "FAKE", "--metrics", "faithfulness"], DataError, "needs the prompts.*--prompts"),
    (["--real", "REAL", "--fake", "FAKE", "--metrics", "classify"], DataError, "class of every image"),
    (["--real", "REAL", "--fake", "FAKE", "--metrics", "fid,fib"], UsageError, "--metrics fib: choose among"),
    (["--real", "REAL", "--fake", "FAKE", "--protocol", "new"], UsageError, "--protocol new: choose tf, pytorch-fid"),
    (["--real", "REAL", "--fake", "FAKE", "--paper", "x"], UsageError, "--paper x: choose mmcp, medart"),
    (["--paper", "mmcp"], UsageError, "clef:DIR"),
    (["--real", "a=REAL,a=ONE", "--fake", "FAKE"], UsageError, "two sets are called a"),
    (["--real", "REAL", "--fake", "FAKE", "--prompts", "SHORT"], DataError, r"2 prompts for the 20 images"),
])  # fmt: skip
def test_what_cannot_be_measured_is_answered_in_one_line(run, folders, tmp_path, words, error, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    shutil.copy(folders / "fake" / "000.png", tmp_path / "one")
    (tmp_path / "short.csv").write_text("prompt\na\nb\n")
    places = {"REAL": folders / "real", "FAKE": folders / "fake", "EMPTY": tmp_path / "empty", "ONE": tmp_path / "one",
              "SHORT": tmp_path / "short.csv"}  # fmt: skip
    words = [re.sub("|".join(places), lambda match: str(places[match.group()]), word) for word in words]
    with pytest.raises(error, match=said) as caught:
        run(*words)
    assert "\n" not in str(caught.value)


def test_a_network_that_makes_no_numbers_is_answered_in_one_line(run, folders, tmp_path, monkeypatch):
    made = features.inception_features

    def broken(*arguments):
        found, logits = made(*arguments)
        return found.index_fill(0, torch.tensor([3]), torch.nan), logits

    monkeypatch.setattr(features, "inception_features", broken)
    with pytest.raises(DataError, match="features of image 3 are not finite.*check the network's file"):
        run("--real", folders / "other", "--fake", folders / "fake", "--metrics", "fid", keep=tmp_path / "cache")


def test_a_manifest_that_does_not_know_an_image_is_refused(run, folders, tmp_path):
    shutil.copytree(folders / "other", tmp_path / "fake")
    (tmp_path / "fake" / "manifest.jsonl").write_text('{"file": "000.jpg", "prompt": "a"}\n')
    words = ["--real", folders / "real", "--fake", tmp_path / "fake", "--metrics", "colour"]
    with pytest.raises(DataError, match=r"manifest.jsonl: knows no 001.jpg"):
        run(*words)
    (tmp_path / "fake" / "manifest.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"manifest.jsonl:1: "):
        run(*words)


def test_the_script_ends_with_one_line_and_the_code_of_its_reason(tmp_path):
    command = [sys.executable, str(ROOT / "evaluate.py"), "--real", "a", "--fake", "b"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 3 and done.stderr == "evaluate.py: b: no such folder\n"


# --------------------------------------------------------------------------------- memorisation, the toy world, a run


def test_planted_copies_are_found_and_listed(run, folders, tmp_path, capsys):
    """An exact, a blurred and a flipped training image among the generated ones."""
    fake = tmp_path / "fake"
    shutil.copytree(folders / "fake", fake)
    shutil.copy(folders / "real" / "001.jpg", fake / "exact.jpg")
    Image.open(folders / "real" / "002.jpg").filter(ImageFilter.GaussianBlur(1)).save(fake / "blurred.png")
    ImageOps.mirror(Image.open(folders / "real" / "003.jpg")).save(fake / "flipped.png")
    results = run("--real", folders / "real", "--fake", fake, "--metrics", "memorisation")
    pairs = [json.loads(line) for line in (tmp_path / "out" / "nearest.jsonl").read_text().splitlines()]
    found = {(pair["generated"], pair["training"]) for pair in pairs if pair["flagged"]}
    assert found == {("exact.jpg", "001.jpg"), ("blurred.png", "002.jpg"), ("flipped.png", "003.jpg")}
    assert results["copies of training images"]["value"] == pytest.approx(3 / 23)
    assert results["copies of training images"]["statistics"]["flagged"] == [20, 21, 22]
    said = capsys.readouterr().out
    assert "3 of 23 samples are copies" in said and "count as the training images" in said
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count('class="pair copy"') == 3 and "verdict alarm" in page


def test_held_out_images_say_how_near_is_chance_where_the_training_images_are_named(run, folders, capsys):
    words = ["--real", folders / "fake", "--fake", folders / "other", "--train", folders / "real"]
    words += ["--metrics", "memorisation"]
    entry = run(*words, inception=False)["copies of training images"]  # in pixels alone, and it says so
    assert entry["value"] == 0 and entry["n_real"] == 40 and entry["statistics"]["reference"] == "held-out images"
    assert "memorisation in pixels only" in capsys.readouterr().out


def test_real_images_that_were_trained_on_are_not_taken_for_held_out(run, folders, tmp_path):
    """All of them: then the training images are measured against each other. Most of them: too few are left."""
    words = ["--fake", folders / "other", "--train", folders / "real", "--metrics", "memorisation"]
    entry = run("--real", folders / "real", *words, inception=False)["copies of training images"]
    assert entry["statistics"]["reference"].startswith("training images")
    shutil.copytree(folders / "real", tmp_path / "mixed")
    shutil.copy(folders / "fake" / "000.png", tmp_path / "mixed")
    with pytest.raises(DataError, match="--metrics memorisation: 1 held-out images that are no training images"):
        run("--real", tmp_path / "mixed", *words, inception=False)


def test_scenes_drawn_to_their_prompts_are_faithful_and_others_are_not(run, tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    scenes = [toy.scene(i) for i in range(40)]
    lines = []
    for i, scene in enumerate(scenes):
        Image.fromarray(toy.render(scene, 64)).save(fake / f"{i:05d}.png")
        lines.append({"file": f"{i:05d}.png", "prompt": toy.prompts(scene)[i % 7]})
    (fake / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--real", "toy", "--fake", fake, "--metrics", "faithfulness"]
    right = run(*words, inception=False)["prompt faithfulness"]
    assert right["value"] >= 0.99 and right["interval"]["high"] == 1
    texts = [line["prompt"] for line in lines]
    (tmp_path / "shuffled.txt").write_text("\n".join(texts[1:] + texts[:1]))
    wrong = run(*words, "--prompts", tmp_path / "shuffled.txt", inception=False)["prompt faithfulness"]
    assert wrong["value"] < 0.9 and wrong["n_fake"] == right["n_fake"]


def test_the_stand_in_serves_the_toy_world_alone_and_is_never_called_fid(run, folders, capsys):
    results = run("--real", "toy", "--fake", folders / "fake", inception=False)
    assert "toy-classifier Frechet distance" in results and "FID" not in results and "IS" not in results
    assert results["precision"]["protocol"].startswith("toy classifier")
    assert "FID needs the Inception network" in capsys.readouterr().out
    with pytest.raises(weights.WeightsNotFound, match="weights/inception/"):
        run("--real", folders / "real", "--fake", folders / "fake", inception=False)


def test_the_end_of_a_training_run_measures_what_it_drew(folders, tmp_path):
    """With the stand-in in the toy world; on other data without the Inception file it names the file and goes on."""

    settings = measuring.Settings(cache=str(tmp_path / "cache"))
    drawn = tmp_path / "drawn"
    shutil.copytree(folders / "fake", drawn)
    prompts = [{"file": path.name, "prompt": "Generate an image containing text."} for path in drawn.glob("*.png")]
    (drawn / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    said, _ = final.measure(drawn, [], True, settings)
    assert re.fullmatch(r"[\d.]+ \(N = 20, toy classifier\)", said["toy-classifier Frechet distance"])
    assert (drawn / "report.html").is_file() and (drawn / "results.json").is_file()

    said, shown = final.measure(drawn, sorted((folders / "real").iterdir()), False, settings)
    assert "colour mean distance" in said and "weights/inception/" in shown


def test_the_stand_in_is_trained_by_one_call(tmp_path):
    """Far too short to learn anything: it says what share it gets right and leaves a file that loads."""
    from nanomed.metrics.networks import classifier

    share = toyworld.train_stand_in(str(tmp_path / "classifier.safetensors"), images=24, steps=2, batch=4)
    assert 0 <= share <= 1
    classifier.load(tmp_path / "classifier.safetensors")


# ----------------------------------------------------------------------------------------------- the papers' set-ups


@pytest.fixture(scope="module")
def challenge(tmp_path_factory) -> Path:
    """A small data set in the organisers' layout: 300 images, 8 prompts each, 2,400 pairs."""
    root = tmp_path_factory.mktemp("challenge")
    (root / "images").mkdir()
    lines = ["Prompt;Filename"]
    for i in range(300):
        colour = tuple(int(v) for v in np.random.default_rng(i).integers(0, 256, 3))
        Image.new("RGB", (24, 16), colour).save(root / "images" / f"{i:03d}.jpg")
        lines += [f"prompt {(i + 7 * k) % 90};{i:03d}.jpg" for k in range(8)]
    (root / "prompt-gt.csv").write_text("\r\n".join(lines) + "\r\n")
    return root


def test_mmcp_draws_2000_rows_of_all_pairs_and_takes_all_images_squashed(challenge, run, tmp_path, capsys):
    run("--paper", "mmcp", "--real", f"clef:{challenge}", inception=False)
    text = (tmp_path / "out" / "prompts.csv").read_text()
    prompts = text.splitlines()[1:]
    assert len(prompts) == 2000
    pairs = [prompt for row in clef.load(challenge).rows for prompt in row.prompts]
    assert all(prompts.count(prompt) <= pairs.count(prompt) for prompt in set(prompts))  # without replacement
    said = capsys.readouterr().out
    assert f"sample.py --prompts {tmp_path / 'out' / 'prompts.csv'}" in said and "--minmax" in said
    run("--paper", "mmcp", "--real", f"clef:{challenge}", inception=False)
    assert (tmp_path / "out" / "prompts.csv").read_text() == text  # the same rows for the same seed
    run("--paper", "mmcp", "--real", f"clef:{challenge}", "--seed", "1", inception=False)
    assert (tmp_path / "out" / "prompts.csv").read_text() != text

    from nanomed.evaluation import papers

    setup = papers.find("mmcp", f"clef:{challenge}", str(tmp_path), evaluate.Config().seed)
    assert len(setup.real) == 300 and setup.train is setup.real
    assert setup.real.image(0).shape == (256, 256, 3)
    expected = np.asarray(Image.open(challenge / "images" / "000.jpg").resize((256, 256), Image.Resampling.BILINEAR))
    assert (setup.real.image(0) == expected).all()


def test_a_paper_refuses_images_drawn_for_other_prompts(challenge, run, tmp_path):
    fake = tmp_path / "fake"
    fake.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8)).save(fake / f"{i}.png")
    with pytest.raises(DataError, match=r"3 images, but --paper mmcp needs 2,000"):
        run("--paper", "mmcp", "--real", f"clef:{challenge}", "--fake", fake)


def test_medart_splits_every_class_and_draws_captions_of_training_images(folders, run, tmp_path, capsys):
    """80/20 of every class, one caption of a random training image for each test image, and a measure against the test
    images that knows the training images."""
    for label, first in (("polyps", 0), ("normal-cecum", 50)):
        (tmp_path / "kvasir" / label).mkdir(parents=True)
        for i in range(15):
            image = np.random.default_rng(first + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "kvasir" / label / f"{i:02d}.png")
    data = f"kvasir:{tmp_path / 'kvasir'}"
    run("--paper", "medart", "--real", data, inception=False)
    lines = (tmp_path / "out" / "prompts.csv").read_text().splitlines()
    assert lines[0] == "prompt,label" and len(lines) == 7
    assert all(line in ("An endoscopic image of polyps,polyps", "An endoscopic image of normal cecum,normal-cecum")
               for line in lines[1:])  # fmt: skip
    fake = tmp_path / "fake"
    fake.mkdir()
    for i in range(6):
        shutil.copy(folders / "fake" / f"{i:03d}.png", fake)
    words = ["--paper", "medart", "--real", data, "--fake", fake, "--metrics", "fid,colour"]
    results = run(*words)
    assert (results["FID"]["n_real"], results["FID"]["n_fake"]) == (6, 6)
    assert "6 captions of 24 training images, against the 6 test images" in capsys.readouterr().out

    manifest = [{"file": f"{i:03d}.png", "prompt": line.rsplit(",", 1)[0]} for i, line in enumerate(lines[1:])]
    manifest[4]["prompt"] = "something else"
    (fake / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in manifest))
    with pytest.raises(DataError, match="004.png was drawn from 'something else', but row 4"):
        run(*words)


# --------------------------------------------------------------------------------------------------------- comparing


def test_results_stand_side_by_side_with_the_best_marked(run, folders, tmp_path, capsys, monkeypatch):
    for name in ("fake", "other"):
        run(
            "--real",
            folders / "real",
            "--fake",
            folders / name,
            "--metrics",
            "fid,colour",
            "--intervals",
            "no",
            out=name,
        )
    values = {
        name: json.loads((tmp_path / name / "results.json").read_text())["FID"]["value"] for name in ("fake", "other")
    }
    best = min(values, key=values.get)
    capsys.readouterr()
    words = ["--compare", tmp_path / "fake", f"second={tmp_path / 'other'}", "--out", tmp_path / "compared"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    said = capsys.readouterr().out
    row = next(
        line for line in said.splitlines() if line.startswith(str(tmp_path / "fake") if best == "fake" else "second")
    )
    assert f"*{values[best]:.4f}" in row
    assert "computed at different N (12, 20)" in said
    page = (tmp_path / "compared" / "compare.html").read_text(encoding="utf-8")
    assert f'<td class="best"><b><bdi>{values[best]:.4f}</bdi></b></td>' in page


@pytest.mark.parametrize("content", ["", "[]", "{", '{"FID": 3}', '{"FID": {"value": 1}}', '{"FID": {"value": "1", '
    '"protocol": "", "n_real": 1, "n_fake": 1}}'])  # fmt: skip
def test_what_is_no_result_is_not_compared(content, tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", f"a={tmp_path}", f"b={tmp_path}"])
    with pytest.raises(DataError, match="not the results of evaluate.py"):
        evaluate.main()


def test_shares_have_wilsons_interval():
    """Against scipy's."""
    from scipy.stats import binomtest

    for right, n in ((0, 9), (3, 12), (40, 40), (250, 500)):
        entry = entries.share([True] * right + [False] * (n - right), "")
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        assert (entry["interval"]["low"], entry["interval"]["high"]) == pytest.approx(
            (theirs.low, theirs.high), abs=1e-6
        )


def test_a_union_knows_what_all_of_its_parts_know(folders):
    a, b = imagesets.find(str(folders / "real")), imagesets.find(str(folders / "other"))
    both = imagesets.union("both", [a, b])
    assert len(both) == 52 and both.title(40) == "000.jpg" and (both.image(40) == b.image(0)).all()
    assert both.prompts == () and both.digest != a.digest
    assert isinstance(measuring.Sets({"a": a}, b).usual, tuple)


# ------------------------------------------------------------------------------------------- beyond the usual measures


def test_authenticity_and_vendi_are_measured_on_the_same_features(run, folders, network, passes):
    """With an interval each; beside it, what real images score against each other, or by themselves."""
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "authenticity,vendi")
    with torch.inference_mode():
        a, b = (inception_features(inception.load(network), arrays(folders / name))[0] for name in ("real", "fake"))
    assert results["authenticity"]["value"] == diversity.authenticity(a, b)
    assert results["Vendi score"]["value"] == pytest.approx(diversity.vendi(b), rel=1e-6)
    for entry in results.values():
        assert entry["interval"]["low"] <= entry["value"] <= entry["interval"]["high"]
        assert entry["floor"]["n"] == 20 and "below 2,048" in entry["flag"]
    assert results["Vendi score"]["floor"]["method"] == "the Vendi score of real images"


def test_frd_is_measured_without_a_network_once_for_every_image(run, folders, monkeypatch):
    """Both versions on the features of the same files; 12 images for 693 features have a singular covariance."""
    words = ("--real", folders / "other", "--fake", folders / "fake", "--metrics", "frd")
    seen, features_of = [], frd.features
    monkeypatch.setattr(frd, "features", lambda image: seen.append(0) or features_of(image))
    results = run(*words, inception=False)
    sides = [[features_of(np.asarray(Image.open(path).convert("RGB"))) for path in sorted(where.iterdir())]
             for where in (folders / "other", folders / "fake")]  # fmt: skip
    v1, v0 = ([torch.from_numpy(np.stack([one[key] for one in side])) for side in sides] for key in ("v1", "v0"))
    assert set(results) == {"FRD v1", "FRD v0"}
    assert results["FRD v1"]["value"] == pytest.approx(frd.distance_v1(*v1), rel=1e-12)
    assert results["FRD v0"]["value"] == pytest.approx(frd.distance_v0(*v0), rel=1e-12)
    assert results["FRD v1"]["flag"] == "N = 12 for 693 features: their covariance is singular; compare at equal N only"
    assert results["FRD v1"]["floor"]["n"] == 6 and len(seen) == 32
    assert run(*words, inception=False) == results and len(seen) == 32


def test_all_measures_what_it_can_and_says_what_is_missing(run, folders, capsys):
    """Every metric has entries or a line at the end, with the one command or flag that it needs."""
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "all", "--intervals", "false")
    assert {"FID", "KID", "IS", "precision", "density", "authenticity", "Vendi score"} <= set(results)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not measured: ")]
    lines = "\n".join(said)
    assert "kfd: mmuratarat/kvasir-v2-classifier is missing; get it with: hf download mmuratarat/kvasir" in lines
    assert "faithfulness: needs the prompts" in lines and "classify: needs the class of every image" in lines
    for name, needs, repository in (("clip", "prompts", "openai/clip-vit-base-patch32"),
                                    ("biomedclip", "prompts", "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_"),
                                    ("classify", "class", "google/vit-base-patch16-224-in21k")):  # fmt: skip
        (line,) = [line for line in said if line.startswith(f"not measured: {name}: ")]  # both that are missing
        assert needs in line and f"; and {repository}" in line and f"get it with: hf download {repository}" in line
    named = {name.strip() for line in said for name in line.removeprefix("not measured: ").split(": ")[0].split(",")}
    measured = {name for name in measuring.METRICS if name not in named}
    assert measured == {"fid", "kid", "is", "pr", "dc", "fbeta", "authenticity", "vendi", "memorisation", "colour",
                        *OWN}  # fmt: skip


def test_without_the_inception_file_all_goes_on(run, folders, capsys):
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "all", "--intervals", "false",
                  inception=False)  # fmt: skip
    assert "colour mean distance" in results and "FID" not in results
    said = capsys.readouterr().out
    assert "not measured: fid, kid, is, pr, dc, fbeta, authenticity, vendi: FID needs the Inception" in said
    lines = [line for line in said.splitlines() if line.startswith("not measured: ")]
    (dino,) = [line for line in lines if line.startswith("not measured: dino")]
    assert "facebook/dinov2-large is missing; get it with: hf download facebook/dinov2-large --include" in dino
    assert all("not found at" not in line for line in lines)  # the command, not where it was looked for


def test_generated_images_as_the_real_ones_are_named(run, folders, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    shutil.copytree(folders / "fake", drawn)
    lines = [json.dumps({"file": path.name, "prompt": "a polyp"}) for path in sorted(drawn.iterdir())]
    (drawn / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    run("--real", drawn, "--fake", folders / "real", "--metrics", "colour")
    assert f"{drawn} holds the manifest.jsonl of sample.py" in (said := capsys.readouterr().out)
    assert "are --real and --fake exchanged?" in said
    run("--real", folders / "real", "--fake", drawn, "--metrics", "colour")
    assert "holds the manifest.jsonl" not in capsys.readouterr().out
    (tmp_path / "x").mkdir()
    drawn.rename(tmp_path / "x" / "test")  # a run of train.py, and images in folders below the manifest
    run("--real", tmp_path / "x", "--fake", folders / "real", "--metrics", "colour")
    assert f"{tmp_path / 'x'} holds the manifest.jsonl of sample.py" in capsys.readouterr().out
    (tmp_path / "x" / "test" / "manifest.jsonl").rename(tmp_path / "x" / "manifest.jsonl")
    assert imagesets.drawn_here(tmp_path / "x" / "test") is None  # names none of these images
    names = [json.dumps({"file": f"test/{path.name}"}) for path in (tmp_path / "x" / "test").iterdir()]
    (tmp_path / "x" / "manifest.jsonl").write_text("\n".join(names))
    run("--real", tmp_path / "x" / "test", "--fake", folders / "real", "--metrics", "colour")
    assert f"{tmp_path / 'x' / 'test'} holds the manifest.jsonl" in capsys.readouterr().out


@pytest.mark.parametrize("real, fake, said", [
    ("fake_{}", "{}", "4 of 4 images of A do not sound real (fake_0): are --real and --fake exchanged?"),
    ("{}", "real-{}", "4 of 4 images of B do not sound generated (real-0): are --real and --fake exchanged?"),
    ("ISIC_{}", "ISIC_{}", "4 of 4 images of B bear the names of images of A (ISIC_0): are they made from these"),
    ("{}", "{}", ""),
    ("real_{}", "sample_{}", ""),
    ("img_{}", "0{}", ""),
])  # fmt: skip
def test_names_of_images_that_say_the_contrary_are_named(folders, tmp_path, capsys, run, real, fake, said):
    for name, spelled, source in (("A", real, "real"), ("B", fake, "fake")):
        (tmp_path / name).mkdir()
        for i, image in enumerate(sorted((folders / source).iterdir())[:4]):
            shutil.copy(image, tmp_path / name / f"{spelled.format(i)}{image.suffix}")
    run("--real", f"A={tmp_path / 'A'}", "--fake", tmp_path / "B", "--metrics", "colour", "--intervals", "no")
    told = capsys.readouterr().out
    assert said.replace("of A", f"of {tmp_path / 'A'}").replace("of B", f"of {tmp_path / 'B'}") in told
    assert said or ("exchanged" not in told and "bear the names" not in told)


def test_statistics_of_pytorch_fid_and_clean_fid_stand_for_real_images(run, folders, network, tmp_path, capsys):
    """mu and sigma of an .npz: FID is that to the images they are of, the rest is left out by name, and the page is
    written without real pictures."""
    with torch.inference_mode():
        a, b = (inception_features(inception.load(network), arrays(folders / name))[0] for name in ("real", "fake"))
    file = tmp_path / "real.npz"
    np.savez(file, mu=a.double().numpy().mean(0), sigma=np.cov(a.double().numpy(), rowvar=False))
    results = run("--real", f"published={file}", "--fake", folders / "fake")
    assert results["FID"]["value"] == pytest.approx(scores.frechet_distance(a, b), rel=1e-6)
    assert results["FID"]["protocol"] == "Inception pool3, tf, to statistics"
    assert results["FID"]["real"] == files.sha256(file) and "floor" not in results["FID"]
    assert results["FID"]["interval"]["low"] <= results["FID"]["value"] <= results["FID"]["interval"]["high"]
    assert set(results) == {"FID"}
    assert "pr is left out: it needs real images, and published holds statistics" in capsys.readouterr().out
    both = run("--real", f"published={file},images={folders / 'real'}", "--fake", folders / "fake", "--metrics", "fid")
    assert both["FID [published]"]["value"] == pytest.approx(both["FID [images]"]["value"], rel=1e-6)
    with pytest.raises(DataError, match="--metrics pr needs real images"):
        run("--real", file, "--fake", folders / "fake", "--metrics", "pr")


def test_own_cached_features_stand_for_real_images(run, folders, tmp_path):
    """The folder of an earlier evaluation gives the FID to the images it is of; of another protocol it is refused."""
    keep = tmp_path / "cache"
    direct = run("--real", folders / "other", "--fake", folders / "fake", "--metrics", "fid", keep=keep)
    (entry,) = [x for x in (keep / "features").iterdir() if len(torch_file(next(x.glob("*/*.safetensors")))) == 12]
    results = run("--real", f"earlier={entry}", "--fake", folders / "fake", "--metrics", "fid")
    assert results["FID"]["value"] == pytest.approx(direct["FID"]["value"], rel=1e-6)
    with pytest.raises(DataError, match="holds features of inception-pool3-tf, and those of the images are of incep"):
        run("--real", entry, "--fake", folders / "fake", "--metrics", "fid", "--protocol", "clean")
    next(entry.glob("*/*.sha256")).write_text("no")
    with pytest.raises(DataError, match="damaged or unfinished"):
        run("--real", entry, "--fake", folders / "fake", "--metrics", "fid")


def torch_file(path: Path):
    return weights.read(path)["features"]


def test_k_is_the_count_of_neighbours_of_precision_and_recall(run, folders, network):
    words = ("--real", folders / "real", "--fake", folders / "fake", "--metrics", "pr,fbeta")
    results = run(*words, "--k", 5)
    with torch.inference_mode():
        a, b = (inception_features(inception.load(network), arrays(folders / name))[0] for name in ("real", "fake"))
    precision, recall = scores.precision_recall(a, b, 5)
    assert results["precision"]["value"] == pytest.approx(precision)
    assert results["precision"]["protocol"].endswith("k = 5")
    assert results["recall"]["value"] == pytest.approx(recall)
    assert 0 < results["F8"]["value"] <= 1 and len(results["F8"]["curve"]) == 21 and "floor" in results["F1/8"]
    with pytest.raises(DataError, match="needs at least 21 images"):
        run(*words, "--k", 20)
    with pytest.raises(UsageError, match="--k 0"):
        run(*words, "--k", 0)


@pytest.mark.parametrize("real, fake, said", [
    ("runs/generated_2", "polyps", "generated_2 does not sound real"),
    ("polyps", "clef-real", "clef-real does not sound generated"),
    ("real", "samples/a", ""),
    ("clef:data/train", "runs/x/test", ""),
    ("real_samples", "fake", ""),
    ("resampled", "unreal", ""),
])  # fmt: skip
def test_names_of_folders_that_say_the_contrary_are_named(real, fake, said):
    found = imagesets.exchanged(real, fake)
    assert found == (f"{said}: are --real and --fake exchanged?" if said else "")


def test_an_evaluation_says_that_folders_sound_exchanged(run, folders, tmp_path, capsys):
    shutil.copytree(folders / "fake", tmp_path / "generated")
    run("--real", tmp_path / "generated", "--fake", folders / "other", "--metrics", "colour", "--intervals", "no")
    assert "note: generated does not sound real: are --real and --fake exchanged?" in capsys.readouterr().out


def test_damaged_statistics_are_refused_by_name(run, folders, tmp_path):
    def refused(match: str, **tables) -> None:
        file = tmp_path / "bad.npz"
        np.savez(file, **tables)
        with pytest.raises(DataError, match=match):
            run("--real", file, "--fake", folders / "fake", "--metrics", "fid")

    refused("not a file of statistics", mean=np.zeros(3))
    refused(r"mu \(3,\) and sigma \(2, 2\)", mu=np.zeros(3), sigma=np.eye(2))
    refused("not finite", mu=np.array([1.0, np.nan]), sigma=np.eye(2))
    refused("not symmetric", mu=np.zeros(2), sigma=np.array([[1.0, 2.0], [0.0, 1.0]]))
    refused("have no distance to a mean", mu=np.zeros(2), sigma=np.eye(2))
    refused("not a file of statistics", mu=np.array([{}], dtype=object), sigma=np.eye(2))  # a pickle is not opened
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="not a file of statistics"):
        run("--real", tmp_path / "text.npz", "--fake", folders / "fake", "--metrics", "fid")


def test_nothing_is_written_over_what_evaluate_did_not_write(folders, tmp_path, monkeypatch):
    """Its own files it writes again; another's, or its own that somebody has changed, it refuses before it measures."""
    import evaluate

    monkeypatch.chdir(tmp_path)
    words = ["evaluate.py", "--real", str(folders / "real"), "--fake", str(folders / "fake"), "--metrics", "colour",
             "--out", "out", "--intervals", "no"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    evaluate.main()
    for name in ("results.json", "report.html", "nearest.jsonl"):
        before = (tmp_path / "out" / name).read_bytes() if (tmp_path / "out" / name).exists() else None
        (tmp_path / "out" / name).write_text("{}")
        with pytest.raises(UsageError, match=f"{name} is there already"):
            evaluate.main()
        assert (tmp_path / "out" / name).read_text() == "{}"
        (tmp_path / "out" / name).unlink()
        if before is not None:
            (tmp_path / "out" / name).write_bytes(before)
    for name in ("compare.html", "x.safetensors"):
        (tmp_path / "out" / name).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--compare", "a=out,b=out", "--out", "out"])
    with pytest.raises(UsageError, match="compare.html is there already"):
        evaluate.main()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--stand_in", "out/x.safetensors"])
    with pytest.raises(UsageError, match="x.safetensors is there already"):
        evaluate.main()
    assert {(tmp_path / "out" / name).read_text() for name in ("compare.html", "x.safetensors")} == {"mine"}


def test_two_sets_of_the_same_files_keep_their_own_names_and_classes(folders, tmp_path):
    """What is seen in files is kept by their hashes; what is said of them is not."""
    for name, first, second in (("one", "polyp", "normal"), ("two", "ulcer", "polyp")):
        for kind, files_of in ((first, range(6)), (second, range(6, 12))):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in files_of:
                shutil.copy(folders / "real" / f"{i:03d}.jpg", tmp_path / name / kind / f"{i:03d}.jpg")
    eyes = measuring.Eyes(measuring.Settings(cache=str(tmp_path / "cache")), ranks.ALONE)
    looked = [eyes.look(imagesets.find(str(tmp_path / name))) for name in ("one", "two")]
    assert [images.name for images in looked] == [str(tmp_path / "one"), str(tmp_path / "two")]
    assert [set(images.labels) for images in looked] == [{"polyp", "normal"}, {"ulcer", "polyp"}]
    assert eyes.look(looked[0]) is looked[0] and len(eyes.survey(looked[1]).columns["size"]) == 12


def test_too_many_neighbours_cost_the_interval_and_not_the_number(run, folders):
    """Of 20 images a group of the jackknife leaves 18; density and coverage know nothing of --k."""
    results = run("--real", folders / "real", "--fake", folders / "fake", "--metrics", "pr,dc", "--k", "18")
    assert "interval" not in results["precision"] and results["precision"]["protocol"].endswith("k = 18")
    assert "interval" in results["density"] and results["density"]["protocol"].endswith("k = 5")


def test_all_goes_on_where_images_cannot_be_looked_at(run, folders, tmp_path, capsys):
    """An image of 5 x 5 pixels has no texture: the radiomic distance is lacking, and nothing else."""
    (tmp_path / "tiny").mkdir()
    for i in range(12):
        Image.fromarray(toy.render(toy.scene(i), 64)).resize((5, 5)).save(tmp_path / "tiny" / f"{i}.png")
    results = run("--real", folders / "real", "--fake", tmp_path / "tiny", "--metrics", "all", "--intervals", "False")
    assert "FID" in results and "FRD v1" not in results and "5 x 5 pixels has no texture" in capsys.readouterr().out


def test_is_is_lacking_where_the_stand_in_has_no_classes(run, folders, capsys):
    words = ["--real", "toy:20", "--fake", folders / "fake"]
    results = run(*words, "--metrics", "all", "--intervals", "False", inception=False)
    assert "toy-classifier KID" in results and re.search(r"\bis\b: .*Inception", capsys.readouterr().out)
    with pytest.raises(FileNotFoundError, match="Inception"):
        run(*words, "--metrics", "is", inception=False)


@pytest.mark.parametrize("mu, sigma, said", [
    (np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), "a direction of variance -1"),
    (np.zeros(3), np.eye(3) * 1j, "complex"), (np.array([None]), np.eye(1), "no arrays of numbers"),
])  # fmt: skip
def test_a_sigma_that_is_no_covariance_is_refused(tmp_path, mu, sigma, said):
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    with pytest.raises(DataError, match=said) as refused:
        statistics.read(tmp_path / "x.npz")
    assert "allow_pickle" not in str(refused.value)


@pytest.mark.parametrize("kind", ["full", "few samples", "float32", "one", "none"])
def test_the_factor_of_a_file_gives_its_covariance_back(tmp_path, kind):
    """To 1e-12 of the largest entry, whatever its rank; of one that was kept in float32, where variances of 0 have
    become rounding of either sign, to that rounding. Lower triangular where it is square, as distances take it."""
    draw = np.random.default_rng(1)
    sigma = np.cov(draw.normal(size=({"full": 90, "one": 2}.get(kind, 20), 30)) * np.arange(1, 31), rowvar=False)
    sigma = sigma.astype(np.float32) if kind == "float32" else sigma * (kind != "none")
    np.savez(tmp_path / "x.npz", mu=np.zeros(30), sigma=sigma)
    factor = statistics.read(tmp_path / "x.npz").factor
    close = 3e-7 if kind == "float32" else 1e-12
    assert np.abs((factor @ factor.T).numpy() - sigma).max() <= close * np.abs(sigma).max()
    assert factor.shape[1] == {"full": 30, "few samples": 19, "one": 1, "none": 0}.get(kind, factor.shape[1])
    assert factor.shape[1] < 30 or not factor.triu(1).any()


def test_statistics_do_not_say_their_protocol_and_join_with_nothing(run, folders, network, tmp_path, capsys):
    with torch.inference_mode():
        features, _ = inception_features(inception.load(network), arrays(folders / "real"))
    mean, covariance = scores.moments(features.double())
    for name in ("one+two.npz", "a=b.npz", "a,b.npz"):  # a file's name is no formula
        np.savez(tmp_path / name, mu=mean, sigma=covariance)
        results = run("--real", tmp_path / name, "--fake", folders / "fake", "--metrics", "fid", "--intervals", "False")
        assert list(results) == ["FID"]
    assert "does not say how its features were made" in capsys.readouterr().out
    with pytest.raises(UsageError, match="join with nothing"):
        run("--real", f"x={tmp_path / 'a=b.npz'}+{folders / 'real'}", "--fake", folders / "fake")
    with pytest.raises(DataError, match="is a file"):
        run("--real", folders / "real", "--fake", tmp_path / "a=b.npz")
