"""Recorded reference errors: equal to live ones, shared by methods, windows and restarts, refused where unfit."""

import dataclasses
import random
import shutil
from pathlib import Path

import pytest
import torch

from csrc_triton.philox import Stream, integers
from dpo import prepare
from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.data.sources import open_source
from dpo.data.store import recorded, recording
from dpo.data.store.files import DamagedStore
from dpo.data.store.store import read_contents
from dpo.methods import SHAPES
from dpo.models import lora
from dpo.models.load import load
from dpo.models.save import save_lora
from dpo.schedule import Schedule
from dpo.settings.config import Data
from dpo.settings.flags import parse
from dpo.training import build, preparing, stored
from tests.dpo.models.test_lora import train
from tests.help.children import kill_until_done
from tests.help.flow import SMALL, TRAINED
from tests.help.running import advance, everything, make_run
from tests.help.worlds import alter_one, make_pickapic, make_pipeline

FLAGS = ["--batch-size", "4", "--seed", "3"]


@pytest.fixture(scope="module")
def stores(world, tmp_path_factory):
    """A function from the kind of pipeline to a store of 48 pairs with two recorded draws."""
    made: dict[str, Path] = {}

    def place(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("store") / kind
            flags = ["--model", world(kind), "--data", world("pairs"), "--dtype", "fp32", "--workers", "0", *FLAGS]
            flags += SMALL if kind in TRAINED else ()
            assert prepare.main(["--store", str(made[kind]), "--reference", "--draws", "2", *flags]) == 0
        return made[kind]

    return place


def recorded_run(world, store, tmp_path, *flags, kind="sd15"):
    return make_run(world(kind), str(store), tmp_path / "run", *FLAGS, "--reference", "recorded", *flags)


class TwoErrors:
    """A live step that forms d from the four errors, as a recorded one must, instead of from the four predictions."""

    def __init__(self, step) -> None:
        self.step = dataclasses.replace(step, reference=None)
        self.alone = dataclasses.replace(step, policy=step.reference, reference=None)

    def __getattr__(self, name):
        return getattr(self.step, name)

    def __call__(self, x, correction, recorded=None):
        with torch.no_grad():
            errors = self.alone.errors(x, torch.zeros_like(correction))[0].errors[:2]
        return self.step(x, correction, recorded=errors)


METHODS = [
    ("sd15", []),
    ("sd15", ["--lora", "--method", "dde"]),
    ("sdxl", ["--method", "dde-single"]),
    ("qwen-image", []),
]
REST = (
    [
        (kind, ["--method", method, *lora])
        for kind in ("sd15", "sd2v", "sdxl")
        for method in ("dpo", "discounted", "dde-single", "dde-step", "dde")
        for lora in ([], ["--lora"])
    ]
    + [("sd15", ["--loss", shape]) for shape in ("robust", "poly", "dmpo")]
    + [("sd15", ["--method", "sdpo"])]
    + [(kind, ["--method", "dde", *lora]) for kind in TRAINED for lora in ([], ["--lora"])]
    + [(kind, []) for kind in TRAINED if kind != "qwen-image"]
)


@pytest.mark.parametrize("kind, flags", METHODS + [pytest.param(*case, marks=pytest.mark.slow) for case in REST])
def test_recorded_errors_train_as_live_ones(world, stores, tmp_path, kind, flags):
    """Equal bit for bit after 14 updates, over the end of an epoch of 12, with neither a reference model nor its forward."""
    live = make_run(world(kind), str(stores(kind)), tmp_path / "run", *FLAGS, *flags)
    live.step = TwoErrors(live.step)
    recorded = recorded_run(world, stores(kind), tmp_path, *flags, kind=kind)
    assert recorded.step.reference is None
    figures = [advance(run, 14) for run in (live, recorded)]
    assert (
        figures[0][0]["loss"] == pytest.approx(SHAPES[live.config.method.loss].start_of().loss, abs=1e-6)
        and figures[0][-1]["loss"] != figures[0][0]["loss"]
    )
    ours, other = everything(live), everything(recorded)
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--precision", "bf16", "--lora"]])
def test_the_logit_at_step_0_is_exactly_0(world, stores, tmp_path, flags):
    store = stores("sd15")
    precision = ["--precision", "bf16", *FLAGS]
    assert (
        prepare.main(["--store", str(store), "--model", world("sd15"), "--reference", "--draws", "2", *precision]) == 0
    )
    run = recorded_run(world, store, tmp_path, *flags)
    assert "exactly 0" in stored.noise(run.step, run.encoder, run.batches(), "")


def test_a_store_in_half_precision_trains_in_another(world, tmp_path):
    """A store is fp16 and a GPU trains in bf16: autocast refuses to mix the two where SDXL's pooled text meets the sizes."""
    store, model = tmp_path / "store", ["--model", world("sdxl"), "--data", world("pairs"), "--max-pairs", "8"]
    assert prepare.main(["--store", str(store), "--dtype", "fp16", "--workers", "0", *model, *FLAGS]) == 0
    run = make_run(world("sdxl"), str(store), tmp_path / "run", *FLAGS, "--precision", "bf16")
    assert advance(run, 1)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_other_batches_show_their_noise(world, stores, tmp_path):
    """Bits may differ with another batch size; the logged noise is small beside a margin of 0.1."""
    run = recorded_run(world, stores("sd15"), tmp_path, "--batch-size", "7")
    for batch in (next(run.batches()),):
        terms = run.step(run.encoder.inputs(batch), torch.zeros_like(run.step.weight), recorded=batch.recorded)
        assert terms.logit.abs().max() < 1e-3
    shifted = dataclasses.replace(
        run.recorded, pieces=tuple((piece, errors + torch.tensor([1e-5, 0])) for piece, errors in run.recorded.pieces)
    )
    run.recorded = shifted
    text = stored.noise(run.step, run.encoder, run.batches(), "")
    assert "noise on the logit of the first 28 pairs: sd 0.01" in text  # beta / 2 * 1e-5


# --- draws and windows


def test_an_epoch_uses_the_draw_of_its_number(world, stores, tmp_path):
    run = recorded_run(world, stores("sd15"), tmp_path)
    batches = run.batches()
    draws = [next(batches).draws for _ in range(36)]  # 48 pairs, 12 batches an epoch
    assert [int(d.unique()) for d in draws] == [0] * 12 + [1] * 12 + [0] * 12


def test_a_window_filters_the_recorded_draws(world, stores, tmp_path):
    run = recorded_run(world, stores("sd15"), tmp_path, "--window-low", "200", "--window-high", "700")
    inside = {key: [] for key in read_contents(stores("sd15")).key.tolist()}
    for key in inside:
        t = run.recorded.timesteps[integers(torch.tensor([key] * 2), torch.arange(2), Stream.TIMESTEP, 3, 0, 1000)]
        inside[key] = [draw for draw in range(2) if 200 <= t[draw] < 700]
    assert len(run.source) == sum(map(bool, inside.values())) < 48
    batches, seen = run.batches(), 0
    for _ in range(40):
        batch = next(batches)
        t = run.step.path.draw(batch.keys, batch.draws, run.step.seed)
        assert ((t >= 200) & (t < 700)).all()
        for i, (key, draw) in enumerate(zip(batch.keys.tolist(), batch.draws.tolist(), strict=True)):
            epoch = (batch.position + i) // len(run.source)
            assert draw == inside[key][epoch % len(inside[key])]
            seen += 1
    assert seen == 160
    assert advance(run, 2)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    with pytest.raises(UserError, match="no recorded draw lies in the timestep window"):
        recorded_run(world, stores("sd15"), tmp_path, "--window-low", "500", "--window-high", "501")


def test_a_record_of_a_window_serves_that_window_and_narrower_ones(world, stores, tmp_path):
    window = ["--window-low", "100", "--window-high", "900", "--seed", "5"]
    store = str(stores("sd15"))
    assert (
        prepare.main(
            ["--store", store, "--model", world("sd15"), "--reference", "--draws", "1", "--batch-size", "4", *window]
        )
        == 0
    )
    run = recorded_run(world, store, tmp_path, *window)
    assert run.recorded.inside is None and "exactly 0" in stored.noise(run.step, run.encoder, run.batches(), "")
    narrow = recorded_run(world, store, tmp_path, *window, "--window-high", "400")
    assert narrow.recorded.inside is not None
    with pytest.raises(UserError, match="its timesteps lack 100 of the run's"):
        recorded_run(world, store, tmp_path, *window, "--window-high", "1000")


def test_held_out_accuracy_is_that_of_a_live_run(world, stores, tmp_path):
    flags = ["--validation-fraction", "0.3", "--validate-every", "1", "--window-low", "300"]
    live = make_run(world("sd15"), str(stores("sd15")), tmp_path / "run", *FLAGS, *flags)
    ours = recorded_run(world, stores("sd15"), tmp_path, *flags)
    assert torch.equal(live.held_out.reference_errors, ours.held_out.reference_errors)
    from dpo.training import validation

    assert validation.accuracy(ours.step, ours.held_out)["heldout_difference"] == 0.0


# --- refusals


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", "4"], "it was recorded with --seed 3, the run has 4"),
        (["--precision", "fp64"], "--precision"),
        (["--caption-dropout", "0.1"], "it was recorded with --caption-dropout 0.0, the run has 0.1"),
        (["--zero-snr", "on"], "another schedule"),
        (["--prediction-type", "v_prediction"], "another prediction type, epsilon"),
    ],
)
def test_a_run_that_differs_is_refused(world, stores, tmp_path, flags, message):
    with pytest.raises(UserError, match="no recorded reference in .* suits this run") as caught:
        recorded_run(world, stores("sd15"), tmp_path, *flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recorded", "asked"),
    [(["--timestep-draw", "uniform"], []), ([], ["--timestep-draw", "uniform"]), ([], ["--text-tokens", "32"])],
)
def test_other_levels_or_captions_are_another_record(world, tmp_path, recorded, asked):
    """The list of levels that were drawn holds every timestep: the record must say how it was drawn."""
    words = ["--model", world("sd35"), "--data", world("pairs"), "--max-pairs", "8", "--workers", "0", *FLAGS, *SMALL]
    assert prepare.main(["--store", str(tmp_path / "store"), "--reference", "--draws", "1", *words, *recorded]) == 0
    with pytest.raises(UserError, match="timestep-draw|text-tokens"):
        make_run(
            world("sd35"), str(tmp_path / "store"), tmp_path / "run", *FLAGS, *SMALL, "--reference", "recorded", *asked
        )


def test_dropped_captions_as_zeros_are_another_record(world, stores, tmp_path):
    from dpo.data.store.recorded import UNNAMED, identity
    from dpo.settings.config import Data, Runtime

    run = recorded_run(world, stores("sdxl"), tmp_path, kind="sdxl")
    plan = Schedule(torch.ones(3, dtype=torch.float64), "epsilon")

    def named(**settings):
        return identity(Data(**settings), Runtime(), plan, "weights")

    assert "dropped_caption" not in named(caption_dropout=0.1) and UNNAMED["dropped_caption"] == "empty"
    assert named(dropped_caption="zeros") == named(), "nothing is dropped"
    assert named(caption_dropout=0.1, dropped_caption="zeros")["dropped_caption"] == "zeros"
    wanted = identity(run.config.data, run.config.runtime, plan, "weights") | {"dropped_caption": "zeros"}
    with pytest.raises(UserError, match="recorded with --dropped-caption empty, the run has zeros"):
        recorded.find(run.source, wanted, run.step.path.timesteps)


def test_what_the_model_decides_is_not_known_before_it_is_loaded():
    """A GPU without bf16 trains a flow in fp32 and other models in fp16."""
    from dpo.settings.config import Config
    from dpo.settings.resolve import DeviceFacts

    known = [stored._known(Config(), DeviceFacts(name, bf16=bf16)) for name, bf16 in (("cuda", False), ("cuda", True))]
    assert [one.get("precision") for one in known] == [None, "bf16"]
    assert known[0] == {"seed": 0, "flip": False, "caption_dropout": 0.0}


def test_another_reference_is_refused_and_another_start_is_not(world, stores, tmp_path):
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    with pytest.raises(UserError, match="another reference"):
        recorded_run(world, stores("sd15"), tmp_path, "--unet-init", str(other))
    run = recorded_run(world, stores("sd15"), tmp_path, "--unet-init", str(other), "--reference-model", "base")
    assert advance(run, 1)[0]["loss"] != pytest.approx(0.6931472, abs=1e-3)


def test_a_record_of_a_supervised_lora(world, stores, tmp_path, caplog):
    """The reference that is recorded with --lora-init is the one that a run with it has: the UNet it is merged into."""
    model = load(world("sd15"))
    lora.add(model.denoiser, rank=2, alpha=2, target_modules=("to_q",), dropout=0.0, seed=0)
    train(model.denoiser)
    save_lora(model, model.denoiser, tmp_path / "sft", layout="diffusers")
    start = ["--lora-init", str(tmp_path / "sft")]
    with pytest.raises(UserError, match="another reference"):
        recorded_run(world, stores("sd15"), tmp_path, "--lora", *start)
    with caplog.at_level("INFO", "dpo"):
        assert recorded_run(world, stores("sd15"), tmp_path, "--lora", *start, "--reference-model", "base").recorded
    assert "noise on the logit" not in caplog.text  # the adapter moves it, not the recording
    config, _ = parse(["--model", world("sd15"), "--data", str(stores("sd15")), *FLAGS, *start])
    preparing.record_reference(config, stores("sd15"), 1)
    for flags in ([], ["--lora"]):
        run = recorded_run(world, stores("sd15"), tmp_path, *start, *flags)
        assert "exactly 0" in stored.noise(run.step, run.encoder, run.batches(), "")


def test_a_store_without_a_record_and_pairs_without_a_store(world, tmp_path):
    assert (
        prepare.main(
            ["--store", str(tmp_path / "s"), "--model", world("sd15"), "--data", world("pairs"), "--workers", "0"]
        )
        == 0
    )
    with pytest.raises(UserError, match=r"there is none yet\): make one with"):
        recorded_run(world, tmp_path / "s", tmp_path)
    with pytest.raises(UserError, match="needs a prepared store"):
        recorded_run(world, world("pairs"), tmp_path)


# --- growing, parts, kills, damage


@pytest.fixture
def small(world, tmp_path):
    """A store of 10 pairs and the command that records on it."""
    pairs = str(make_pickapic(tmp_path / "pairs", 10, 2))
    store = tmp_path / "small"
    flags = ["--model", world("sd15"), *FLAGS, "--workers", "0"]
    assert prepare.main(["--store", str(store), "--data", pairs, *flags]) == 0

    def make(draws: int, folder: Path = store, shard=(0, 1), pairs: str | None = None, block: int = 4) -> Path:
        config = parse([*flags, "--data", pairs or str(folder)])[0]
        return preparing.record_reference(config, folder, draws, shard=shard, block=block)

    return store, make


def sums(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def errors_of(folder: Path, store: Path, world, tmp_path) -> torch.Tensor:
    """The recorded errors [draws, pairs, 2]."""
    run = recorded_run(world, store, tmp_path)
    n = len(read_contents(store).key)
    import numpy as np

    return torch.stack(
        [run.recorded.errors(np.arange(n), torch.full((n,), draw)).T for draw in range(run.recorded.distinct)]
    )


def test_more_draws_and_more_pairs_are_added(world, small, tmp_path):
    store, make = small
    folder = make(2)
    before, files = errors_of(folder, store, world, tmp_path), sums(folder)
    make(3)
    more = errors_of(folder, store, world, tmp_path)
    assert more.shape == (3, 10, 2) and torch.equal(more[:2], before) and not torch.equal(more[2], more[0])
    assert {
        name: value for name, value in sums(folder).items() if name in files and name != "record.json"
    }.items() <= files.items()
    grown = str(make_pickapic(tmp_path / "grown", 16, 2))
    assert (
        prepare.main(["--store", str(store), "--data", grown, "--model", world("sd15"), *FLAGS, "--workers", "0"]) == 0
    )
    with pytest.raises(UserError, match="lacks 6 pairs of the store"):
        recorded_run(world, store, tmp_path)
    make(3)
    most = errors_of(folder, store, world, tmp_path)
    assert most.shape == (3, 16, 2) and torch.equal(most[:, :10], more) and most.isfinite().all()


def test_processes_share_the_work(small):
    _, make = small
    folder = make(2, shard=(1, 2))
    assert not (folder / "record.json").exists()
    make(2, shard=(0, 2))
    shared = sums(folder)
    shutil.rmtree(folder)
    assert sums(make(2)) == shared


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_record_is_the_same(small, tmp_path, kills):
    import time

    store, make = small
    killed = Path(shutil.copytree(store, tmp_path / "killed"))
    began = time.monotonic()
    whole = make(3)
    took = time.monotonic() - began
    kill_until_done(lambda: make(3, killed), random.Random(kills), kills, took)
    assert sums(killed / "reference") == sums(store / "reference")
    assert whole.is_dir() and recorded.verify(killed) == []


def test_ctrl_c_keeps_what_is_finished_of_a_block(small, monkeypatch):
    """The errors are asked for again from the batch after it, and the progress is said batch by batch."""
    store, make = small
    straight = sums(make(2))
    shutil.rmtree(store / "reference")
    asked, said, errors_of_batch = [], [], preparing._errors_of

    def at_most(count):
        def errors_of(step, encoder):
            def errors(batch):
                if len(asked) == count:
                    raise KeyboardInterrupt
                asked.append(batch.position)
                return inner(batch)

            inner = errors_of_batch(step, encoder)
            return errors

        monkeypatch.setattr(preparing, "_errors_of", errors_of)

    monkeypatch.setattr(preparing, "progress_line", lambda *a: lambda done, total: said.append((done, total)))
    for count in (1, 4):
        at_most(count)
        with pytest.raises(KeyboardInterrupt):
            make(2, block=12)
    at_most(99)
    folder = make(2, block=12)
    assert sums(folder) == straight
    assert asked == [0, 4, 8, 12, 16] and said == [(4, 20), (8, 20), (12, 20), (16, 20), (20, 20)]


def spoil(path: Path) -> None:
    """Alters one byte near the end of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])


@pytest.mark.parametrize("kept", ["batch-00004-000000000008.safetensors", "batch-00004-000000000008.json"])
def test_an_altered_block_is_recorded_again(small, caplog, monkeypatch, kept):
    """A number changed on disk between two runs of the command is not sealed as right."""
    store, make = small
    straight = sums(make(2))
    shutil.rmtree(store / "reference")
    write = recording.write_shard

    def at_last(path, tensors):
        if path.name.startswith("pairs-"):
            raise KeyboardInterrupt
        return write(path, tensors)

    monkeypatch.setattr(recording, "write_shard", at_last)
    with pytest.raises(KeyboardInterrupt):
        make(2)
    monkeypatch.undo()
    spoil(next((store / "reference").rglob(kept)))
    folder = make(2)
    assert sums(folder) == straight
    assert "batch-00004-000000000008" in caplog.text and "altered" in caplog.text and "is recorded again" in caplog.text


def test_what_was_begun_of_a_block_is_not_trusted_when_altered(small, monkeypatch):
    store, make = small
    straight = sums(make(2))
    shutil.rmtree(store / "reference")
    errors_of, calls = preparing._errors_of, []

    def once(step, encoder):
        inner = errors_of(step, encoder)

        def errors(batch):
            if calls:
                raise KeyboardInterrupt
            calls.append(batch)
            return inner(batch)

        return errors

    monkeypatch.setattr(preparing, "_errors_of", once)
    with pytest.raises(KeyboardInterrupt):
        make(2, block=12)
    monkeypatch.undo()
    spoil(next((store / "reference").rglob("*.begun.safetensors")))
    assert sums(make(2, block=12)) == straight


def test_a_reference_that_differs_in_one_weight_is_another(world, small, tmp_path):
    """Also where the few values that its short fingerprint reads are equal."""
    store, make = small
    make(2)
    model = shutil.copytree(world("sd15"), tmp_path / "model")
    alter_one(model / "unet" / "diffusion_pytorch_model.safetensors")
    flags = ["--model", str(model), "--data", str(store), "--output", str(tmp_path / "run"), *FLAGS]
    config, notes = parse([*flags, "--reference", "recorded"])
    with pytest.raises(UserError, match="it was recorded with another reference"):
        build.build(config, notes)
    with pytest.raises(UserError, match="recorded with another reference, which differs in few weights"):
        preparing.record_reference(config, store, 3)


def test_what_a_kill_left_behind_is_cleared(small):
    _, make = small
    folder = make(2)
    before = sums(folder)
    (piece,) = folder.glob("pairs-*.safetensors")
    (folder / piece.stem).mkdir()
    for name in (
        ".record.json.part-7",
        ".tmpUmJTBN",
        f".{piece.name}.part-7",
        f"{piece.stem}/batch-00004-000000000000.safetensors",
    ):
        (folder / name).write_bytes(b"half")
    make(2)
    assert sums(folder) == before and not (folder / piece.stem).exists()


def test_damage_is_found_and_named(world, small, tmp_path):
    store, make = small
    folder = make(1)
    path = next(folder.glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(DamagedStore, match=f"{path.name} was altered"):
        recorded_run(world, store, tmp_path)
    assert f"{path.name} was altered" in recorded.verify(store)[0]
    assert prepare.main(["--store", str(store), "--verify"]) == 1
    path.unlink()
    with pytest.raises(DamagedStore, match="is missing"):
        recorded_run(world, store, tmp_path)
    path.write_bytes(whole)
    index = folder / "record.json"
    index.write_text(index.read_text()[:200])
    with pytest.raises(DamagedStore, match="record.json was truncated or altered"):
        recorded_run(world, store, tmp_path)


def test_a_record_of_other_latents_is_refused(world, small, tmp_path):
    store, make = small
    make(1)
    other = tmp_path / "other"
    flags = ["--model", world("sd15"), "--data", str(tmp_path / "pairs"), *FLAGS, "--workers", "0", "--dtype", "bf16"]
    assert prepare.main(["--store", str(other), *flags]) == 0
    shutil.copytree(store / "reference", other / "reference")
    with pytest.raises(UserError, match="was recorded from other pairs"):
        recorded_run(world, other, tmp_path)


def test_out_of_memory_halves_the_batch():
    @dataclasses.dataclass
    class Task:
        batch_size: int

    tried = []

    def work(task):
        tried.append(task.batch_size)
        if task.batch_size > 3:
            raise torch.OutOfMemoryError
        return "done"

    assert preparing._record_smaller(work, Task(16), halve_it=True) == "done" and tried == [16, 8, 4, 2]
    with pytest.raises(UserError, match="smaller --record-batch"):
        preparing._record_smaller(work, Task(16), halve_it=False)


def test_an_error_that_is_not_finite_is_refused(small, monkeypatch):
    _, make = small
    monkeypatch.setattr(recording, "_block", lambda task, pairs, positions, *_: _poisoned(positions))
    with pytest.raises(UserError, match="not finite in 10 draws: try another --precision"):
        make(1)


def _poisoned(positions: range) -> dict[str, torch.Tensor]:
    position = torch.tensor(positions)
    return {"pair": position % 10, "draw": position // 10, "errors": torch.full((2, len(position)), torch.inf)}


def test_a_held_out_store_of_another_resolution_is_refused(recorded_store):
    source = open_source(Data(data=str(recorded_store), data_format="store"))
    own = source.contents.settings["resolution"]
    stored.check_resolution(source, own)
    stored.check_resolution(None, 512)
    with pytest.raises(
        UserError, match=rf"holds images of {own} pixels, and the run trains at {2 * own}.*--resolution {2 * own}"
    ):
        stored.check_resolution(source, 2 * own)
