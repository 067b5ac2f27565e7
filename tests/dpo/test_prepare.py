"""dpo.prepare end to end: training from a store is training from the images; restarts, parts, refusals."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dpo import prepare
from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.data.store.files import HIDDEN, LATENTS, SPAN, TEXT, write_index
from dpo.data.store.fill import fill
from dpo.data.store.store import read_contents, verify
from dpo.models.ready import load_named
from dpo.planning.sketch import sketch
from dpo.settings.config import Config, Data, Model, change
from dpo.settings.flags import parse
from dpo.tiny.paths import train_pairs_path
from dpo.training import preparing
from dpo.training.build import build
from tests.help.children import in_child, kill_until_done
from tests.help.fake_run import write_run
from tests.help.flow import SMALL, TRAINED
from tests.help.running import QUIET, advance, everything, make_run
from tests.help.stores import Synthetic, task
from tests.help.worlds import make_pickapic, make_pipeline

EXACT = [
    "--vae-batch",
    "1",
    "--batch-size",
    "1",
    "--accumulation",
    "4",
]  # images and captions are encoded one by one in both


def command(store: Path, *flags: str) -> int:
    return prepare.main(["--store", str(store), "--pairs-per-shard", "16", "--workers", "0", *flags])


def prepared(world, kind: str, store: Path, *flags: str, pairs: str | None = None) -> Path:
    assert command(store, "--model", world(kind), "--data", pairs or world("pairs"), *flags) == 0
    return store


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


OFTEN = (("sd35", []), ("qwen-image", ["--lora"]))  # text that is kept whole, and text behind a mask


@pytest.mark.parametrize(
    "kind, flags",
    [
        pytest.param("sd15", [], marks=pytest.mark.slow),
        pytest.param("sd15", ["--lora"], marks=pytest.mark.slow),
        ("sd15", ["--flip", "--caption-dropout", "0.3"]),
        pytest.param("sd2v", ["--method", "dde"], marks=pytest.mark.slow),
        pytest.param(
            "sdxl",
            ["--method", "dde-step", "--caption-dropout", "0.5", "--dropped-caption", "zeros"],
            marks=pytest.mark.slow,
        ),
        pytest.param("sdxl", ["--lora", "--method", "dde"], marks=pytest.mark.slow),
        pytest.param("sd2v", ["--lora", "--method", "discounted"], marks=pytest.mark.slow),
        pytest.param("sd15", ["--method", "dde-single"], marks=pytest.mark.slow),
        pytest.param("sd15", ["--method", "sft"], marks=pytest.mark.slow),
        *(
            pytest.param(
                kind,
                ["--method", "dde", "--caption-dropout", "0.3", *low_rank, *SMALL],
                marks=pytest.mark.long if (kind, low_rank) in OFTEN else pytest.mark.slow,
            )
            for kind in TRAINED
            for low_rank in ([], ["--lora"])
        ),
    ],
)
def test_training_from_the_store_is_training_from_the_images(world, tmp_path, kind, flags):
    """Weights, optimizer states and tables are equal, bit for bit, when images are encoded in the same batches."""
    own = [*(flag for flag in flags if flag == "--flip"), *(SMALL if kind in TRAINED else ())]
    store = prepared(world, kind, tmp_path / "store", "--dtype", "fp32", "--vae-batch", "1", "--text-batch", "1", *own)
    runs = [make_run(world(kind), data, tmp_path / "run", *EXACT, *flags) for data in (world("pairs"), str(store))]
    figures = [advance(run, 3) for run in runs]
    assert same(*map(everything, runs))
    assert figures[0] == figures[1]


def test_half_precision_costs_only_its_rounding(world, tmp_path):
    store = prepared(world, "sd15", tmp_path / "store")
    exact, rounded = (make_run(world("sd15"), data, tmp_path / "run") for data in (world("pairs"), str(store)))
    for run in (exact, rounded):
        run.stream = next(run.batches())
    mean = exact.encoder.inputs(exact.stream).latent_mean
    stored = rounded.encoder.inputs(rounded.stream).latent_mean
    assert stored.dtype == torch.float16
    assert (stored - mean).abs().max() <= mean.abs().max() * 2**-11


@pytest.mark.long
def test_a_store_needs_no_resolution_and_holds_out_the_same_pairs(world, tmp_path):
    store = prepared(world, "sd15", tmp_path / "store", "--resolution", "16", "--dtype", "fp32")
    flags = [
        "--model",
        world("sd15"),
        "--output",
        str(tmp_path / "run"),
        *QUIET,
        "--validation-fraction",
        "0.2",
        "--validate-every",
        "9",
    ]
    fresh = build(parse([*flags, "--data", str(store)])[0], [])
    images = build(parse([*flags, "--data", world("pairs"), "--resolution", "16"])[0], [])
    assert fresh.config.data.resolution == 16
    assert len(fresh.held_out_source) == len(images.held_out_source) > 0
    assert torch.allclose(fresh.held_out.reference_errors, images.held_out.reference_errors, rtol=1e-4)


def test_the_command_says_when_it_is_done_and_verifies(world, tmp_path, caplog, capsys):
    store = prepared(world, "sd15", tmp_path / "store")
    before = sums(store)
    prepared(world, "sd15", store)
    assert sums(store) == before and command(store, "--verify") == 0
    path = store / "000001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert command(store, "--verify") == 1 and "1 file is damaged" in capsys.readouterr().err
    assert any("000001.safetensors was altered" in line for line in verify(store))


@pytest.mark.parametrize(
    ("name", "caption", "image"),
    [
        ("stabilityai/stable-diffusion-3.5-medium", 2.61, 1.0),
        ("black-forest-labs/FLUX.1-dev", 4.0, 1.0),
        ("black-forest-labs/FLUX.2-klein-4B", 7.5, 2.0),
        ("Qwen/Qwen-Image", 3.5, 1.0),
    ],
)
def test_the_sizes_of_published_models(name, caption, image):
    """In MiB: SD 3.5 has 333 tokens of 4096 numbers, and 2048 more; FLUX.2 512 of 7680, and latents of 128 x 64 x 64."""
    model = sketch(Model(model=name))
    assert preparing._caption_bytes(model, 2) / 2**20 == pytest.approx(caption, abs=0.005)
    assert preparing._image_bytes(model, Data(resolution=1024), 2) / 2**20 == image


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    ["sd15", *(pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qwen-image")) for kind in ("sdxl", *TRAINED))],
)
def test_the_size_of_a_store_is_said_before_it_is_made(world, tmp_path, capsys, kind):
    """It is that of the tensors in the store, which a caption with a mask may stay below."""
    store = prepared(world, kind, tmp_path / "store", "--resolution", "32")
    before, _, _ = capsys.readouterr().err.partition("prepared ")
    model, rows, taken = load_named(change(Config(), model=world(kind))), Counter(), 0
    for path in sorted(store.glob("*.safetensors")):
        shard = load_file(path)
        rows["images"] += len(shard[LATENTS[0]])
        rows["captions"] += len(shard[SPAN if SPAN in shard else HIDDEN])
        taken += sum(shard[name].nbytes for name in (*LATENTS, *TEXT) if name in shard)
    image, caption = preparing._image_bytes(model, Data(resolution=32), 2), preparing._caption_bytes(model, 2)
    most = rows["images"] * image + rows["captions"] * caption
    assert taken < most if SPAN in shard else taken == most
    assert f"store: a caption takes {caption / 2**20:.2f} MiB" in before
    assert f"; {rows['captions']} captions and {rows['images']} images take at most {most / 1e9:.3g} GB" in before


def refused(world, store, *flags, kind="sd15", model=None) -> str:
    with pytest.raises(UserError) as caught:
        make_run(model or world(kind), str(store), store.parent / "run", *flags)
    return str(caught.value)


@pytest.mark.long
def test_stores_of_another_model_are_refused(world, tmp_path):
    import json
    import shutil

    store = prepared(world, "sd15", tmp_path / "store")
    assert "another model family" in refused(world, store, kind="sdxl")
    assert "another text encoder" in refused(world, store, kind="sd2v") or "another VAE" in refused(
        world, store, kind="sd2v"
    )
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    assert "another VAE" in refused(world, store, model=str(other))
    words = Path(shutil.copytree(world("sd15"), tmp_path / "words"))
    settings = words / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 20}))
    assert "another tokenizer" in refused(world, store, model=str(words))
    assert "images of 32 pixels: --resolution 64" in refused(world, store, "--resolution", "64")
    assert "no mirrored images" in refused(world, store, "--flip")
    assert "centre crops" in refused(world, store, "--crop", "random")


def test_mistakes_are_one_line(world, tmp_path, capsys):
    store = tmp_path / "store"
    flags = ["--model", world("sd15"), "--data", world("pairs")]
    capsys.readouterr()  # what making the pipelines said
    for wrong, message in [
        ([*flags, "--crop", "random"], "one crop of each image"),
        ([*flags, "--shard", "4/4"], "expected I/N"),
        ([*flags, "--draws", "0"], "0 is below 1"),
        ([*flags, "--draws", "x"], "argument --draws: invalid whole number value: 'x'"),
        ([*flags, "--frobnicate"], "unknown flag --frobnicate"),
        ([*flags, "--verfy"], "did you mean --verify?"),
        (["--verify"], "nothing to check"),
        (["--merge"], "has no parts"),
        (["--model", world("sd15")], "is no prepared store: correct --store, or give the --data"),
    ]:
        assert command(store, *wrong) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error and error.count("\n") == 1


def test_parts_are_not_made_below_an_ordinary_store(tmp_path, capsys):
    """It is said before anything is loaded: the last process would merge them."""
    fill(task(tmp_path / "store", Synthetic(5)))
    before = sums(tmp_path / "store")
    assert command(tmp_path / "store", "--model", "m", "--data", "d", "--shard", "0/2") == 2
    error = capsys.readouterr().err
    assert "store is a prepared store of its own" in error and error.count("\n") == 1
    assert sums(tmp_path / "store") == before


def test_a_store_is_not_prepared_from_a_store(tmp_path, capsys):
    for i, name in enumerate(("one", "two")):
        fill(task(tmp_path / name, Synthetic(5, start=50 * i)))
    before = sums(tmp_path)
    for store in ("two", "new"):
        assert command(tmp_path / store, "--model", "m", "--data", str(tmp_path / "one")) == 2
        error = capsys.readouterr().err
        assert f"--data {tmp_path / 'one'} is a prepared store, which keeps no images: name the pairs it was" in error
        assert error.count("\n") == 1 and "--merge" in error
    assert sums(tmp_path) == before and not (tmp_path / "new").exists()


@pytest.mark.long
def test_sharded_over_processes_and_merged(world, tmp_path, monkeypatch):
    flags = [
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--dtype",
        "fp32",
        "--vae-batch",
        "1",
        "--text-batch",
        "1",
    ]
    store = tmp_path / "store"
    assert command(store, *flags, "--shard", "1/2") == 0
    assert not (store / "store.json").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(store, *flags) == 0  # as torchrun starts it; the last one merges
    monkeypatch.delenv("WORLD_SIZE")
    assert verify(store) == [] and len(read_contents(store).key) == 48
    runs = [make_run(world("sd15"), data, tmp_path / "run", *EXACT) for data in (world("pairs"), str(store))]
    for run in runs:
        advance(run, 2)
    assert same(*map(everything, runs))
    before = sums(store)
    assert command(store, "--merge") == 0 and sums(store) == before


@pytest.mark.long
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(world, tmp_path, kills):
    pairs = str(make_pickapic(tmp_path / "pairs", 24, 1, broken=("truncated",), captions=5))
    prepared(world, "sd15", tmp_path / "whole", "--pairs-per-shard", "4", pairs=pairs)
    took = in_child(
        lambda: _seconds(lambda: prepared(world, "sd15", tmp_path / "timed", "--pairs-per-shard", "4", pairs=pairs))
    )
    work = lambda: prepared(world, "sd15", tmp_path / "killed", "--pairs-per-shard", "4", pairs=pairs)  # noqa: E731
    kill_until_done(work, random.Random(kills), kills, took)
    assert sums(tmp_path / "killed") == sums(tmp_path / "whole")


def _seconds(work) -> float:
    import time

    began = time.monotonic()
    work()
    return time.monotonic() - began


@pytest.mark.long
def test_verify_tells_unfinished_from_damaged(world, tmp_path, monkeypatch, capsys):
    """First a store, then a record on it."""
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "progress_line", lambda *a: interrupt)
        assert command(tmp_path / "s", "--model", world("sd15"), "--data", world("pairs")) == 130
    capsys.readouterr()
    assert command(tmp_path / "s", "--verify") == 1
    said = capsys.readouterr().err
    assert "is not finished, 16 pairs are prepared: run the same" in said and "damaged" not in said
    store = prepared(world, "sd15", tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "progress_line", lambda *a: interrupt)
        assert command(store, "--model", world("sd15"), "--reference", "--draws", "1") == 130
    capsys.readouterr()
    assert command(store, "--verify") == 1
    said = capsys.readouterr().err
    assert "is not finished: run the same python -m dpo.prepare --reference" in said and "damaged" not in said
    assert command(store, "--model", world("sd15"), "--reference", "--draws", "1") == 0
    assert command(store, "--verify") == 0


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_a_link_to_itself_and_what_else_is_left_out_is_counted(world, tmp_path, capsys):
    """Both images of a pair; the link is as unreadable as the rest, and no path that can be followed."""
    rows = [{"caption": "a fox", "chosen": f"{i}-a.png", "rejected": f"{i}-b.png"} for i in range(40)]
    for row in rows:
        for name in (row["chosen"], row["rejected"]):
            Image.effect_noise((40, 40), 90).save(tmp_path / name)
    (tmp_path / "7-a.png").unlink()
    (tmp_path / "7-a.png").symlink_to(tmp_path / "7-a.png")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = tmp_path / "store"
    flags = ["--store", store, "--model", world("sd15"), "--data", tmp_path / "pairs.jsonl", "--resolution", "32"]
    assert prepare.main([*map(str, flags), "--bad-image-limit", "0.5"]) == 0
    assert f"{store}: finished, 39 pairs; left out: 1" in capsys.readouterr().err


def test_a_store_of_the_embedded_world_is_said_and_gone_on_with(tmp_path, monkeypatch, capsys):
    """A mistyped --store without other flags would be one."""
    encoded, recorded = [], []
    monkeypatch.setattr(preparing, "encode_pairs", lambda config, *a, **k: encoded.append(config.data.data))
    monkeypatch.setattr(preparing, "record_reference", lambda config, *a, **k: recorded.append(config.data.data))
    store = tmp_path / "s"
    assert command(store, "--reference") == 0
    assert f"no --model and no --data: {store} is a store of the small world" in capsys.readouterr().err
    write_index(store, {"sources": [{"name": str(train_pairs_path())}], "shards": [], "finished": True})
    assert command(store, "--reference") == 0 and encoded == recorded == [None, None]
    write_index(store, {"sources": [{"name": "pairs.csv"}], "shards": [], "finished": True})
    assert command(store, "--reference") == 2
    assert "give the --model that it was prepared with" in capsys.readouterr().err


def test_a_model_without_pairs_and_without_a_store(world, tmp_path, capsys):
    assert command(tmp_path / "mistyped", "--model", world("sd15"), "--reference") == 2
    assert "mistyped is no prepared store: correct --store, or give the --data" in capsys.readouterr().err


def test_a_store_is_not_put_into_a_model_or_a_run(world, tmp_path, capsys):
    flags = ["--model", world("sd15"), "--data", world("pairs")]
    model = Path(shutil.copytree(world("sd15"), tmp_path / "model"))
    write_run(tmp_path / "run", "dde", updates=4)
    capsys.readouterr()
    for place, what in ((model, "a model"), (model / "unet", "a model"), (tmp_path / "run", "a run")):
        before = sums(place)
        assert command(place, *flags) == 2
        said = capsys.readouterr().err
        assert f"--store {place} holds {what}: name a folder of its own" in said and said.count("\n") == 1
        assert sums(place) == before


def test_nothing_asked_of_a_store_is_said(world, tmp_path, capsys):
    store = prepared(world, "sd15", tmp_path / "store")
    model = ["--model", world("sd15")]
    for flags in (model, [*model, "--data", str(store)], [*model, "--preset", "tiny"]):  # that preset names no pairs
        capsys.readouterr()
        assert command(store, *flags) == 2
        said = capsys.readouterr().err
        assert "is the prepared store itself" in said and "--reference" in said and said.count("\n") == 1


def test_wrong_data_is_said_before_a_model_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda *a, **k: pytest.fail("fetched"))
    assert command(tmp_path / "store", "--model", "nobody/no-such-model", "--data", str(tmp_path / "nowhere")) == 2
    assert "nowhere" in capsys.readouterr().err
