"""KTO on images without partners, each with a label of its own: what is computed, and what else holds of every run."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from csrc_triton.philox import Stream, integers, normal
from dpo import evaluate, label, prepare, replay
from dpo.common.errors import UserError
from dpo.data.store.store import open_store
from dpo.replaying.pairs import measured
from dpo.settings.config import Data
from dpo.settings.flags import parse
from dpo.training import preparing, validation
from dpo.training.state import snapshot
from tests.help.commands import SMALL, command
from tests.help.labelling import GREY
from tests.help.processes import together
from tests.help.running import advance, everything, leave, make_run, weights
from tests.help.worlds import make_labelled, make_table
from tests.runs.test_parity import RATE, SEED, UPDATES, Plain

IMAGES, BETA, WEIGHTS = 4, 500.0, (1.5, 0.5)
KTO = ("--method", "kto", "--seed", str(SEED), "--beta", str(BETA), "--learning-rate", str(RATE))
EXACT = (*KTO, "--precision", "fp64", "--eps", "1e-4", "--batch-size", str(IMAGES))
HELD_OUT = (
    "--validation-fraction",
    "0.3",
    "--validation-draws",
    "2",
    "--validation-by",
    "pair",
    "--validate-every",
    "2",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """24 images of 24 prompts, two of three liked."""
    return str(make_labelled(tmp_path_factory.mktemp("images"), 24))


@pytest.fixture(scope="module")
def stored(world, images, tmp_path_factory):
    """A store of them with two recorded draws of its reference, in float64."""
    place = str(tmp_path_factory.mktemp("store") / "store")
    flags = ["--model", world("sd15"), "--data", images, "--dtype", "fp32", "--workers", "0", "--seed", str(SEED)]
    assert prepare.main(["--store", place, *flags, "--reference", "--draws", "2", "--precision", "fp64"]) == 0
    return place


@pytest.mark.long
@pytest.mark.parametrize("what", ["images", "pairs"])
def test_a_store_that_holds_another_label_is_refused(world, tmp_path, capsys, what):
    """Their keys are the same: the old label would be trained on. Pairs of other captions are not read for it."""
    table = make_labelled(tmp_path / "images", 6) if what == "images" else make_table(tmp_path / "pairs", 6)
    old, new = ("true", "false") if what == "images" else ('"p": 0.9', '"p": 0.8')
    rows = table.read_text("utf-8").splitlines()
    if what == "pairs":
        rows = [json.dumps({**json.loads(row), "p": 0.9}) for row in rows]
    table.write_text("\n".join(rows), "utf-8")
    flags = ["--model", world("sd15"), "--data", str(table), "--store", str(tmp_path / "store"), "--workers", "0"]
    assert prepare.main(flags) == 0
    changed = "\n".join([rows[0].replace(old, new), *rows[1:]])
    assert changed != "\n".join(rows)
    table.write_text(changed, "utf-8")
    capsys.readouterr()
    assert prepare.main(flags) == 2
    assert f"holds 1 of the {what} of" in (said := capsys.readouterr().err) and "with another label" in said
    more = (make_labelled if what == "images" else make_table)(tmp_path / "more", 9, seed=7)
    table.write_text("\n".join(rows), "utf-8")
    assert prepare.main([*flags[:3], str(more), *flags[4:]]) == 0, "others are added"
    assert open_store(tmp_path / "store", Data()).summary["pairs"] == 15


def test_pairs_that_a_store_holds_the_other_way_round_are_said(world, tmp_path, capsys):
    """They are pairs of their own, as in a set that was judged twice; where a label was mended the old one stays beside it."""
    table = make_table(tmp_path / "pairs", 4)
    flags = ["--model", world("sd15"), "--data", str(table), "--store", str(tmp_path / "store"), "--workers", "0"]
    assert prepare.main(flags) == 0
    first, *rows = map(json.loads, table.read_text("utf-8").splitlines())
    first |= {"chosen": first["rejected"], "rejected": first["chosen"]}
    table.write_text("\n".join(map(json.dumps, [first, *rows])), "utf-8")
    capsys.readouterr()
    assert prepare.main(flags) == 0
    assert "store holds 1 of the pairs of" in (said := capsys.readouterr().err) and "the other way round" in said
    assert open_store(tmp_path / "store", Data()).summary["pairs"] == 5


def plain_errors(plain: Plain, batch, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's and the reference's error of an image, from the model's own modules."""
    key, draw = batch.keys[i : i + 1], batch.draws[i : i + 1]
    side = batch.pixels.shape[-1] // 2 ** (len(plain.vae.config.block_out_channels) - 1)
    t = integers(key, draw, Stream.TIMESTEP, SEED, 0, 1000)[0]
    noise, extra = (normal(key, draw, s, SEED, (4, side, side), torch.float64) for s in (Stream.NOISE, Stream.VAE_WIN))
    arguments = batch.pixels[i], batch.captions[i], batch.micro[i], t, noise, extra
    with torch.no_grad():
        reference = plain.error(plain.reference, *arguments)
    return plain.error(plain.policy, *arguments), reference


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_five_updates_equal_a_plain_loop(world, images, tmp_path, kind):
    liked_weight, disliked_weight = WEIGHTS
    flags = ("--kto-liked-weight", str(liked_weight), "--kto-disliked-weight", str(disliked_weight))
    run = make_run(world(kind), images, tmp_path, *KTO, *flags, "--precision", "fp64", "--batch-size", str(IMAGES))
    batches = run.batches()
    data = [next(batches) for _ in range(UPDATES)]
    batches.close()
    assert all(len(batch.pixels) == len(batch.micro) == IMAGES for batch in data)  # no partner is made up
    plain = Plain(world(kind), kind == "sdxl")
    trained = dict(plain.policy.named_parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    center, centers, losses, right = 0.0, [], [], []
    for batch in data:
        gains, loss = [], 0.0
        for i in range(IMAGES):
            policy, reference = plain_errors(plain, batch, i)
            gains.append(reference - policy)
            liked = bool(batch.prob[i] == 1.0)
            margin = (1 if liked else -1) * (BETA * (reference - policy) - center)
            loss = loss + (liked_weight if liked else disliked_weight) * (1 - logsigmoid(margin).exp()) / IMAGES
            right.append(0.5 if margin == 0 else float(margin > 0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        centers.append(center)
        center = max(BETA * torch.stack(gains).mean().item(), 0.0)
    figures = advance(run, UPDATES)
    assert [one["loss"] for one in figures] == pytest.approx(losses, rel=1e-9)
    assert [one["kto_center"] for one in figures] == pytest.approx(centers, rel=1e-6, abs=1e-10) and max(centers) > 0
    assert [one["implicit_accuracy"] for one in figures] == [sum(right[i : i + 4]) / 4 for i in range(0, len(right), 4)]
    found = weights(run)
    assert max((found[name] - trained[name]).abs().max().item() for name in trained) < 1e-2 * RATE
    start = dict(plain.reference.named_parameters())
    assert max((found[name] - start[name]).abs().max().item() for name in found) > RATE


def test_step_zero_is_exact_and_the_sides_are_those_of_the_labels(world, images, tmp_path):
    for flags in (("--precision", "fp32"), ("--precision", "bf16", "--lora", "--lora-dropout", "0.1")):
        run = make_run(world("sd15"), images, tmp_path, *KTO, *flags, "--batch-size", "12")
        (first, second) = advance(run, 2)
        assert first["loss"] == 0.5 and first["implicit_accuracy"] == 0.5 and first["margin_p90"] == 0.0
        assert first["win_error_vs_reference"] == first["lose_error_vs_reference"] == first["kto_center"] == 0.0
        assert first["disliked_images"] > 0 and first["pairs"] == 12 and first["tied_pairs"] == 0
        assert second["loss"] != 0.5 and first["prediction_norm_ratio"] == 1.0


@pytest.mark.long
def test_the_cut_of_an_update_does_not_matter_and_a_resume_goes_on(world, images, tmp_path):
    whole = make_run(world("sd15"), images, tmp_path / "run", *EXACT)
    figures = advance(whole, 2)
    snapshot(whole)
    resumed = make_run(world("sd15"), images, tmp_path / "run", *EXACT, "--resume", "latest")
    cut = make_run(world("sd15"), images, tmp_path / "cut", *EXACT, "--batch-size", "1", "--accumulation", str(IMAGES))
    figures += advance(whole, 2)
    assert [one["kto_center"] for one in advance(resumed, 2)] == [one["kto_center"] for one in figures[2:]]
    assert any(one["kto_center"] > 0 for one in figures)
    ours, theirs, parts = everything(whole), everything(resumed), advance(cut, 4)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for one, other in zip(figures, parts, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert one["kto_center"] == pytest.approx(other["kto_center"], rel=1e-7, abs=1e-12)
    ours, theirs = weights(whole), weights(cut)
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in ours)


def test_a_store_gives_the_run_of_the_images_and_recorded_errors_that_of_live_ones(world, images, stored, tmp_path):
    runs = {
        name: make_run(world("sd15"), data, tmp_path / name, *EXACT, *flags)
        for name, data, flags in (
            ("images", images, ()), ("store", stored, ()), ("recorded", stored, ("--reference", "recorded")),
        )
    }  # fmt: skip
    figures = {name: advance(run, 4) for name, run in runs.items()}
    ours = weights(runs["images"])
    for name, far in (("store", 1e-9), ("recorded", 1e-6)):  # recorded errors are kept in fp32
        theirs = weights(runs[name])
        assert max((ours[each] - theirs[each]).abs().max().item() for each in ours) < far
        for one, other in zip(figures["images"], figures[name], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e3 * far)
            assert one["kto_center"] == pytest.approx(other["kto_center"], abs=1e4 * far)
    assert runs["store"].source.sides == 1 and len(runs["store"].source) == 24


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [("--flip", "--caption-dropout", "0.3"), pytest.param(("--buckets",), marks=pytest.mark.slow)],
    ids=["flip", "buckets"],
)
def test_mirrored_dropped_and_of_several_shapes_they_are_the_same_from_a_store_and_from_memory(world, tmp_path, flags):
    images = str(make_labelled(tmp_path / "images", 6, odd_sizes=True, captions=3))
    next((tmp_path / "images" / "images").glob("*-l.jpg")).write_bytes(b"no image")  # a hole, from wherever it is read
    store, own = str(tmp_path / "store"), [flag for flag in flags if flag in ("--flip", "--buckets")]
    given = ["--precision", "fp64", "--workers", "0", "--bad-image-limit", "1"]
    words = ["--model", world("sd15"), "--data", images, "--dtype", "fp32", *given, *own]
    assert prepare.main(["--store", store, *words]) == 0
    wanted = {"images": (images, "off"), "kept": (images, "on"), "store": (store, "off")}
    found = {}
    for name, (data, keep) in wanted.items():
        place, more = tmp_path / "runs" / name, ("--steps", "9", "--keep-encoded", keep, *given, *flags)
        run = make_run(world("sd15"), data, place, *EXACT, *more)
        figures = advance(run, 9)
        assert (run.kept.take() if run.kept else 0) > 0 or name != "kept"
        found[name] = [[one["loss"], one["pairs"], one.get("disliked_images")] for one in figures]
    assert found["kept"] == found["images"] and sum(one[1] for one in found["images"]) == 30
    assert [one[1:] for one in found["store"]] == [one[1:] for one in found["images"]]
    assert [one[0] for one in found["store"]] == pytest.approx([one[0] for one in found["images"]], abs=1e-6)
    if "--flip" in own:
        with pytest.raises(UserError, match="store holds images without partners, and .* pairs: name another --store"):
            config, _ = parse(["--model", world("sd15"), "--data", world("pairs"), *given, *own])
            preparing.encode_pairs(config, Path(store), "fp32", text_batch=8)


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(world, images, tmp_path):
    flags = (*EXACT, "--batch-size", "1", "--effective-batch", str(IMAGES), *HELD_OUT)

    def work(processes=None) -> dict:
        run = make_run(world("sd15"), images, tmp_path / "run", *flags, processes=processes)
        figures = advance(run, 3)
        found = validation.accuracy(run.step, run.held_out)
        return {"loss": [one["loss"] for one in figures], "center": [one["kto_center"] for one in figures],
                "state": everything(run), "held out": found}  # fmt: skip

    alone = work()
    assert max(alone["center"]) > 0 and alone["held out"]["heldout_accuracy"] != 0.5
    for found in together(2, work, tmp_path):
        assert found["loss"] == pytest.approx(alone["loss"], rel=1e-9)
        assert found["center"] == pytest.approx(alone["center"], rel=1e-7, abs=1e-12)
        assert found["held out"]["heldout_accuracy"] == alone["held out"]["heldout_accuracy"]
        far = max(
            float((found["state"][name].double() - value.double()).abs().max())
            for name, value in alone["state"].items()
        )
        assert far < 1e-9


@pytest.mark.long
def test_held_out_accuracy_is_the_share_of_gains_on_the_side_of_their_labels(world, images, tmp_path, caplog):
    caplog.set_level("INFO")
    for center in ("update", "batch"):
        run = make_run(world("sd15"), images, tmp_path, *EXACT, *HELD_OUT, "--kto-center", center)
        held = run.held_out
        assert "one answer for all gives one half" in caplog.text
        assert validation.accuracy(run.step, held)["heldout_accuracy"] == 0.5
        advance(run, 3)
        liked, d = held.liked[held.labelled], validation.differences(run.step, held)
        assert d.shape == (2, int(held.labelled.sum())) and liked.any() and not liked.all()
        raw, zero = torch.where(liked, -d, d), torch.zeros(1000)  # the gain over the mean
        right = ((raw.mean(0) > 0) == liked).double()
        found = validation.accuracy(run.step, held)
        assert (
            found["heldout_balanced"] and found["heldout_accuracy"] == (right[liked].mean() + right[~liked].mean()) / 2
        )
        gains = torch.stack(
            [
                torch.cat(
                    [
                        (found[2] - found[0]).detach()
                        for x in held.batches
                        for found in [run.step.errors(x._replace(draws=torch.full_like(x.draws, draw)), zero)[0].errors]
                    ]
                )[held.labelled]
                for draw in (0, 1)
            ]
        )
        torch.testing.assert_close(raw, gains - gains.mean().clamp_min(0), rtol=0, atol=1e-12)


def test_other_methods_and_mixed_sets_are_refused_in_a_line(world, images, tmp_path):
    with pytest.raises(
        UserError, match="images without partners, and method dpo compares the two of a pair: use --method kto"
    ):
        make_run(world("sd15"), images, tmp_path)
    with pytest.raises(
        UserError, match="partners, and method sft trains on the preferred image of a pair: use --method kto"
    ):
        make_run(world("sd15"), images, tmp_path, "--method", "sft")
    with pytest.raises(UserError, match="has pairs and .* images without partners, whose accuracy needs a centre"):
        make_run(world("sd15"), world("pairs"), tmp_path, *KTO, "--validation-data", images)


def test_pairs_may_be_held_out_of_a_run_on_images(world, images, tmp_path):
    """Their accuracy is that of any method on pairs: both images of one share their noise, and no centre is in it."""
    held = ("--validation-data", world("pairs"), "--validation-split", "train", "--validation-pairs", "5")
    run = make_run(world("sd15"), images, tmp_path, *EXACT, *held, "--validation-draws", "1", "--validate-every", "2")
    assert not run.held_out.single and run.held_out.liked.all() and run.source.sides == 1
    run.step.kto.center.fill_(7.0)
    advance(run, 1)
    errors = [
        run.step.errors(x._replace(draws=torch.zeros_like(x.draws)), torch.zeros(1000))[0] for x in run.held_out.batches
    ]
    d = torch.cat([one.difference.detach() for one in errors])
    torch.testing.assert_close(validation.differences(run.step, run.held_out)[0], d, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("main", "words", "said"),
    [
        (label.main, ["--data", "IMAGES", *GREY], "and labels are of pairs"),
        (evaluate.main, ["base=MODEL", "other=MODEL", "--pairs", "IMAGES"], "and this accuracy is of pairs"),
    ],
    ids=["label", "evaluate"],
)
def test_commands_on_pairs_refuse_them_in_a_line(world, images, tmp_path, capsys, main, words, said):
    names = {"IMAGES": images, "MODEL": world("sd15")}
    assert (
        main(
            [
                *(re.sub("IMAGES|MODEL", lambda found: names[found[0]], word) for word in words),
                "--output",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"\d\d:\d\d:\d\d", line)]
    assert (
        said in lines[-1]
        and "has images without partners (docs/data.md)" in lines[-1]
        and "Traceback" not in str(lines)
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [(), ("--kto-center", "batch"), ("--lora", "--flip", "--caption-dropout", "0.5")],
    ids=["own", "batch", "lora"],
)
def test_the_gradients_of_the_images_add_up_to_that_of_the_update(world, images, tmp_path, flags):
    """With KTO's centre above 0, which every image's part depends on. Measuring changes nothing."""
    run, other = (make_run(world("sd15"), images, tmp_path / name, *EXACT, *flags) for name in "ab")
    for one in (run, other):
        advance(one, 2)
    found = measured(run)
    after = advance(run, 1)[0]
    assert after == advance(other, 1)[0] and len(found) == IMAGES
    assert sum(one.gradient_norm * one.cosine for one in found) == pytest.approx(after["grad_norm"], rel=1e-8)
    assert sum(one.share for one in found) == pytest.approx(1) and {one.prob for one in found} <= {0.0, 1.0}
    assert sum(one.loss for one in found) / IMAGES == pytest.approx(after["loss"], rel=1e-12)


@pytest.mark.long
def test_an_update_is_replayed_and_told_of_images(world, images, stored, tmp_path, capsys):
    for name, data in (("files", images), ("store", stored)):
        out, found = tmp_path / name, tmp_path / f"{name}-replay"
        leave(make_run(world("sd15"), data, out, *EXACT), 4, 2)
        assert replay.main([str(out), "--update", "4", "--output", str(found)]) == 0
        said = capsys.readouterr().out
        assert "All figures of 2 logged updates equal the run's bit for bit" in said and "pair" not in said
        result = json.loads((found / "replay.json").read_text("utf-8"))
        assert result["things"] == "images" and len(result["pairs"]) == IMAGES
        assert sorted(path.name for path in (found / "images").iterdir()) == [f"0{i}-image.png" for i in range(1, 5)]
        page = re.sub(r"<style.*?</style>", "", (found / "replay.html").read_text("utf-8"), flags=re.DOTALL)
        assert "The images that weigh most" in page
        assert page.count("<img ") == IMAGES and not re.search(r"\bpairs?\b(?!\")", page)
    key = result["pairs"][0]["key"]
    words = [str(out), "--update", "4", "--around", "0", "--output", str(tmp_path / "changed"), "--without", key]
    assert replay.main(words) == 0
    first, second = json.loads((tmp_path / "changed" / "replay.json").read_text("utf-8"))["curves"]
    assert (first["updates"][-1]["pairs"], second["updates"][-1]["pairs"]) == (IMAGES, IMAGES - 1)


@pytest.mark.long
def test_log_report_and_card_speak_of_images(world, images, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", world("sd15"), "--data", images, "--output", out, *KTO, *SMALL, "--no-judge"]
    more = ["--steps", "2", "--batch-size", "2", "--validation-fraction", "0.3", "--validation-draws", "1"]
    said = command(capsys, *words, *more, "--validate-every", "1")
    assert said.code == 0 and "images/s" in said.log[-1] + "".join(said.log)
    aside = re.compile(r"published: 2048 pairs|preference pairs|stable-diffusion pairs")
    assert [line for line in said.log if "pair" in aside.sub("", line)] == []
    page = re.sub(r"<(style|svg|code).*?</\1>|<[^>]*>", " ", (out / "report.html").read_text("utf-8"), flags=re.DOTALL)
    settings = re.compile(r"validation.pairs|max.pairs|published: 2048 pairs|pairs.per.s")
    assert [line.strip() for line in page.splitlines() if "pair" in settings.sub("", line)] == []
    card = (out / "README.md").read_text("utf-8")
    assert "| data: images |" in card and "implicit accuracy, training images" in card


def test_labels_of_one_kind_are_said(world, tmp_path, caplog):
    path = make_labelled(tmp_path / "images", 6, liked=3)
    caplog.set_level("INFO")
    run = make_run(world("sd15"), str(path), tmp_path / "run", *KTO, "--batch-size", "3")
    assert "images: 6 rows: 6 images, 6 of them liked" in caplog.text
    assert "each of the 6 images is liked: with labels of one kind nothing says what to prefer" in caplog.text
    first, second = advance(run, 2)
    assert first["lose_error_vs_reference"] is None and second["win_error_vs_reference"] != 0.0
    gain = -second["win_error_vs_reference"]
    assert run.following[0].gain == max(gain, 0.0)
