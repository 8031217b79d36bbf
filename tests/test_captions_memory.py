"""Language models on cards that are too small: layers that come in turn, shares over processes, and the arithmetic."""

import multiprocessing

import pytest
import torch
from conftest import close

import nanomed.captions
from nanomed.captions import generation, sizes, tiny
from nanomed.captions.memory import Int8Linear, LayersInTurn, compiled, tensors_of, to_int8
from nanomed.captions.networks.decoder import Cache, Decoder, DecoderConfig
from nanomed.captions.sizes import Needs
from nanomed.run.ranks import Ranks
from nanomed.weights import build

CONFIG = DecoderConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
                       num_key_value_heads=2, head_dim=8)  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def decoder(**more) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**{**vars(CONFIG), **more})).eval()


def ids(rows=2, length=9):
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------ layers in turn


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_layers_in_turn_give_the_same_bits(layers, int8):
    """An odd number of layers among them, so that a layer does not always come to the same place."""
    plain, turned = decoder(num_hidden_layers=layers), decoder(num_hidden_layers=layers)
    if int8:
        to_int8(plain), to_int8(turned)
    before = turned(ids())
    LayersInTurn(turned, "cpu")
    for _ in range(3):
        assert torch.equal(turned(ids()), before) and torch.equal(plain(ids()), before)
    state = plain.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in turned.state_dict().items())


def test_at_most_two_layers_are_on_the_device_and_the_next_is_there_before_its_turn():
    network = decoder()
    turns, seen = LayersInTurn(network, "cpu"), []
    layers = list(network.model.layers)

    def inside(tensor, block):
        return block.data_ptr() <= tensor.data_ptr() < block.data_ptr() + len(block)

    def look(i, layer):
        places = [
            [k for k, slot in enumerate(turns.slots) if inside(tensor, slot)] for _, _, tensor in tensors_of(layer)
        ]
        assert places and all(place == places[0] and len(place) == 1 for place in places)  # it works from one slot
        for other, home in zip(layers, turns.homes):  # the others' weights are the host's
            assert other is layer or all(inside(tensor, home) for _, _, tensor in tensors_of(other))
        assert set(turns.holds) == {i, (i + 1) % len(layers)}  # and the two slots hold it and the next
        seen.append((i, places[0][0]))

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda module, given, i=i: look(i, module))
    network(ids())
    network(ids())
    assert [i for i, _ in seen] == [*range(5), *range(5)]
    assert len({slot for i, slot in seen if i == 0}) == 2  # of five, each comes to the other slot the next time
    one = max(sum(t.nbytes for _, _, t in tensors_of(layer)) for layer in layers)
    assert sum(map(len, turns.slots)) <= 2 * (one + 64 * 16)


def test_an_interrupted_pass_leaves_nothing_wrong():
    network, plain = decoder(), decoder()
    LayersInTurn(network, "cpu")
    broken = network.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        network(ids())
    broken.remove()
    assert torch.equal(network(ids()), plain(ids()))


def test_a_captioner_writes_the_same_with_its_layers_in_turn(tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    tiny.save(tiny.build(), tmp_path)
    images, how = [Image.new("RGB", (60, 50), color) for color in ("red", "blue")], dict(max_new_tokens=12)
    here, there = (nanomed.captions.load(tmp_path, place=place) for place in ("device", "cpu"))
    for sampling in (dict(), dict(temperature=0.8, top_k=9)):
        expected = here.generate(images, [tiny.PROMPT] * 2, **how, **sampling)
        assert there.generate(images, [tiny.PROMPT] * 2, **how, **sampling) == expected


# --------------------------------------------------------------------------------------------------- shares of layers


def write_in_shares(rank, world, folder, queue):
    """Each process writes other numbers of texts, of other lengths; the first also weighs its layers."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with torch.no_grad():
        model = nanomed.captions.load(folder, place="share", ranks=Ranks(rank, world))
        texts = [model.generate(None, ["ab"] * (1 + rank), max_new_tokens=5 + 7 * i, temperature=1.0,
                                keys=[(rank, i, k) for k in range(1 + rank)]) for i in range(1 + 2 * rank)]  # fmt: skip
        model.finish()
        held = sum(getattr(p, "_local_tensor", p).nbytes for p in model.writer.model.layers.parameters())
    queue.put((rank, held, texts))


def test_shares_over_processes_write_what_a_whole_model_writes(tmp_path):
    """Two processes with half of every layer each. One has three calls where the other has one, and waits for none."""
    torch.manual_seed(0)
    tiny.save(tiny.build(), tmp_path)
    whole = nanomed.captions.load(tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    running = [context.Process(target=write_in_shares, args=(rank, 2, tmp_path, queue)) for rank in range(2)]
    for process in running:
        process.start()
    results = sorted(queue.get(timeout=120) for _ in running)
    for process in running:
        process.join(30)
    assert [process.exitcode for process in running] == [0, 0]
    total = sum(p.nbytes for p in whole.writer.model.layers.parameters())
    assert [held for _, held, _ in results] == [total / 2] * 2
    for rank, _, texts in results:
        for i, written in enumerate(texts):
            assert written == whole.generate(None, ["ab"] * (1 + rank), max_new_tokens=5 + 7 * i, temperature=1.0,
                                             keys=[(rank, i, k) for k in range(1 + rank)])  # fmt: skip


def test_whole_numbers_are_not_shared(tmp_path):
    tiny.save(tiny.build(), tmp_path)
    with pytest.raises(ValueError, match="int8 or place share"):
        nanomed.captions.load(tmp_path, int8=True, place="share")


@pytest.mark.slow
def test_compiled_layers_compute_the_same():
    """One program for all lengths: with a cache, and token by token. A minute, mostly of the compiler's."""
    plain, fused = decoder(), decoder()
    compiled(fused)
    for length in (9, 17, 1):
        close(fused(ids(2, length)), plain(ids(2, length)), 1e-5)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_needs_are_the_bytes_that_are_there():
    """Weights to the byte: whole, in turn (two layers in the device's memory), shared, and in whole numbers."""
    real = decoder()
    total = sum(p.nbytes for p in real.parameters())
    layer = sum(p.nbytes for p in real.model.layers[0].parameters())
    meta = build(Decoder, CONFIG)
    for place, world, expected in (("device", 1, total), ("cpu", 1, total - 3 * layer),
                                   ("share", 5, total - 5 * layer + 2 * layer)):  # fmt: skip
        needs = Needs.of(meta, 2, 100, 20, place, world)
        assert needs.weights * 1e9 == pytest.approx(expected, abs=1)
    to_int8(real), to_int8(meta)
    held = sum(tensor.nbytes for _, _, tensor in tensors_of(real))
    assert Needs.of(meta, 2, 100, 20).weights * 1e9 == pytest.approx(held, abs=1)
    assert any(isinstance(m, Int8Linear) for m in meta.modules()) and held < total


def test_the_cache_takes_what_it_is_said_to_take(monkeypatch):
    """To the byte: it has room for the prompt and what is to be written from the start."""
    made = []

    class Watched(Cache):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(generation, "Cache", Watched)
    generation.generate(decoder(), ids(2, 9), torch.ones(2, 9), 7)
    taken = sum(block.nbytes for pair in made[0].blocks for block in pair)
    assert taken == pytest.approx(Needs.of(decoder(), 2, 9, 7).cache * 1e9, abs=1)


@pytest.mark.parametrize("name, billions, card, int8", [("llava-llama3", 8.4, 24, 16), ("llava-mistral", 7.6, 24, 16),
                                                        ("ovis", 10.2, 32, 24), ("ovis2", 8.9, 24, 16)])  # fmt: skip
def test_what_the_known_captioners_need_in_bfloat16(name, billions, card, int8):
    """Four images at a time: all but Ovis 1.6 fit 24 GB whole, and that does in whole numbers or in turn."""
    text = sizes.report(name, sizes.sketch(name), torch.bfloat16, sizes.Job(1000))
    assert f"{billions} billion weights" in text
    assert f"{card} GB" in text.split("--place device")[1].splitlines()[0]
    assert f"{int8} GB" in text.split("--place device --int8")[1].splitlines()[0]


def test_the_dry_run_needs_no_weights(tmp_path, monkeypatch, capsys):
    from nanomed.captions import __main__ as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["captions", "vsg", "toy:6", "--model", "ovis", "--dry_run"])
    assert command.main() == 0
    said = capsys.readouterr().out
    assert "6 images" in said and "--place cpu" in said and not (tmp_path / "captions.csv.jsonl").exists()
    tiny.save(tiny.build(), tmp_path / "tiny")
    monkeypatch.setattr("sys.argv", ["captions", "vsg", "toy:6", "--model", str(tmp_path / "tiny"), "--dry_run"])
    assert command.main() == 0 and "0.0 billion weights" in capsys.readouterr().out
