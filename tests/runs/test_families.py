"""What every family of flow matching does besides its step: results in its pipeline, processes, shards, replay, export."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from dpo.common.errors import UserError
from dpo.exporting import asked as exporting
from dpo.exporting.extracting import Asked, extract
from dpo.exporting.work import export
from dpo.models import lora_files
from dpo.models.adapter import merge_into
from dpo.models.load import load
from dpo.pages.folder import ADAPTER_FILE
from dpo.replaying import work
from dpo.train import train_step
from dpo.training.results import write
from tests.help.commands import SMALL as FEW
from tests.help.commands import command
from tests.help.flow import SMALL, TRAINED
from tests.help.processes import together
from tests.help.running import advance, everything, leave, make_run

EXACT = ["--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4", "--seed", "3", *SMALL]
QUICK = [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "qwen-image")) for kind in TRAINED]


@torch.no_grad()
def predicted(model, denoiser) -> torch.Tensor:
    """A prediction of a denoiser, for a caption and noise of its own."""
    text = model.family.encode(model, ["a red fox"])
    x = torch.randn(1, model.geometry.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.denoise(denoiser)(x, torch.tensor([500.0]), text, None)


def pipeline(folder, **options):
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


RESULTS = [(kind, low_rank) for kind in TRAINED for low_rank in (False, True)]
OFTEN = (("sd35", False), ("flux2-klein-base", True))


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "low_rank"), [pytest.param(*case, marks=[pytest.mark.slow] * (case not in OFTEN)) for case in RESULTS]
)
def test_the_result_in_its_pipeline_is_what_was_trained(world, tmp_path, capsys, kind, low_rank):
    """The command from start to end; diffusers then predicts as the run's own model, and draws."""
    flags = ["--lora", "--learning-rate", "1e-2"] if low_rank else ["--learning-rate", "1e-3"]
    out = tmp_path / "out"
    words = ["--model", world(kind), "--data", world("pairs"), "--output", out, "--steps", "2", "--batch-size", "2"]
    said = command(capsys, *words, *flags, *SMALL, *FEW, "--sample-steps", "2", "--no-judge")
    assert said.code == 0 and said.errors == [], said
    base, model = pipeline(world(kind)), load(world(kind), text_tokens=64)
    if low_rank:
        adapter = lora_files.read(out / ADAPTER_FILE, model.denoiser, model.family)
        names = {name.removeprefix("transformer.").split(".lora_")[0] for name in load_file(out / ADAPTER_FILE)}
        assert adapter.keys() == names, "the layout that its pipeline reads"
        before = predicted(model, model.denoiser)
        merge_into(model.denoiser, adapter)
        base.load_lora_weights(out, weight_name=ADAPTER_FILE)
    else:
        before = predicted(model, base.transformer)
        base = pipeline(out)
        model = load(str(out), text_tokens=64)
    own, theirs = predicted(model, model.denoiser), predicted(model, base.transformer)
    torch.testing.assert_close(theirs, own, rtol=1e-4, atol=1e-5)
    assert (own - before).abs().max() > 1e-4
    drawn = base(prompt="a red fox", height=32, width=32, num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and drawn.std() > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("flags", [["--lora"], ["--sharding", "on"]], ids=["lora", "sharded"])
def test_two_processes_train_the_run_of_one(world, tmp_path, kind, flags):
    flags = [*EXACT, "--method", "dde", "--batch-size", "1", "--effective-batch", "4", *flags]
    model, pairs = world(kind), world("pairs")

    def trained(processes, folder):
        run = make_run(model, pairs, folder, *flags, processes=processes)
        advance(run, 2)
        return {"table": run.table.table.clone(), **{n: v.clone() for n, v in whole(run).items()}}

    def whole(run):
        if run.updater.shards is None:
            return dict(zip(run.updater.names, (p.detach() for p in run.updater.parameters), strict=True))
        return dict(run.updater.shards.whole(run.updater.parameters))

    one = trained(None, tmp_path / "one")
    two = together(2, lambda processes: trained(processes, tmp_path / "two"), tmp_path)[0]
    assert one.keys() == two.keys()
    assert max(float((two[name] - value).abs().max()) for name, value in one.items()) < 1e-9


@pytest.mark.long
@pytest.mark.parametrize("kind", QUICK)
def test_a_replay_is_the_run(world, tmp_path, kind):
    flags = ["--batch-size", "2", "--steps", "6", "--learning-rate", "1e-4", "--method", "dde", "--lora", *SMALL]
    run = make_run(world(kind), world("pairs"), tmp_path / "run", *flags)
    leave(run, 5, 3)
    found = work.replay(work.Asked(run.output, 4, tmp_path / "found"), train_step)
    assert found["compared"] == {"updates": found["from"]["updates"], "first": None}


@pytest.mark.long
@pytest.mark.parametrize("kind", QUICK)
def test_an_extracted_lora_is_the_change_that_it_can_hold(world, tmp_path, kind):
    flags = ["--batch-size", "2", "--steps", "2", "--learning-rate", "1e-3", *SMALL]
    run = make_run(world(kind), world("pairs"), tmp_path / "run", *flags)
    advance(run, 2)
    write(run)
    file = tmp_path / "lora.safetensors"
    found = extract(Asked(str(run.output), world(kind), file, rank=1000, device="cpu"))
    assert found.kept > 0.5 and all(row.kept == pytest.approx(1) for row in found.rows)
    model, wanted = load(world(kind)), load(str(run.output)).denoiser.state_dict()
    merge_into(model.denoiser, lora_files.read(file, model.denoiser, model.family))
    for row in found.rows:
        one, other = model.denoiser.state_dict()[f"{row.layer}.weight"], wanted[f"{row.layer}.weight"]
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="is written in diffusers' layout alone"):
        export(exporting.Asked(str(run.output), exporting.SINGLE))
    with pytest.raises(UserError, match="sd-scripts has no such names"):
        extract(Asked(str(run.output), world(kind), tmp_path / "b.safetensors", rank=4, kohya=True, device="cpu"))


def test_a_lora_in_other_layouts_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="--lora-format kohya: sd-scripts has no such names for family"):
        make_run(world("sd35"), world("pairs"), tmp_path / "a", "--lora", "--lora-format", "kohya", *SMALL)
    with pytest.raises(UserError, match="--checkpointing down_blocks.0 names blocks of a UNet"):
        make_run(world("sd35"), world("pairs"), tmp_path / "b", "--checkpointing", "down_blocks.0", *SMALL)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prediction-type", "epsilon"], "--prediction-type epsilon: the model is of family sd3"),
        (["--zero-snr", "on"], "a flow's levels end in pure noise"),
        (["--precision", "fp16"], "--precision fp16: the text encoders"),
        (["--timesteps", "turbo", "--timestep-draw", "uniform"], "four timesteps, which are drawn alike"),
        (["--train-guidance", "2"], "--train-guidance is for models that take their guidance as an input"),
        (["--text-tokens", "600"], "takes captions of 512 at most"),
        (["--resolution", "256"], "--resolution 256 is more than the model can take: 192 pixels"),
        (["--resolution", "144", "--buckets"], "whose buckets are up to 1.42 times as long"),
    ],
)
def test_what_a_flow_cannot_do_is_one_line(world, tmp_path, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        make_run(world("sd35"), world("pairs"), tmp_path, *(() if "--resolution" in flags else SMALL[:2]), *flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags", [["--timestep-draw", "uniform"], ["--text-tokens", "64"], ["--prediction-type", "flow_prediction"]]
)
def test_what_only_a_flow_can_do_is_one_line(world, tmp_path, flags):
    with pytest.raises(UserError, match=flags[0]):
        make_run(world("sd15"), world("pairs"), tmp_path, *flags)


def test_a_transformer_of_another_family_is_named_as_such(world, tmp_path):
    with pytest.raises(UserError, match="is a FluxTransformer2DModel: this trainer knows SD3Transformer2DModel"):
        make_run(world("sd35"), world("pairs"), tmp_path, "--unet-init", world("flux-dev"), *SMALL)


@pytest.mark.long
def test_a_distilled_model_is_trained_at_its_own_steps(world, tmp_path):
    run = make_run(world("flux-schnell"), world("pairs"), tmp_path / "a", "--batch-size", "2", *SMALL)
    assert run.step.path.timesteps.tolist() == [249, 499, 749, 999]
    run = make_run(world("sd35"), world("pairs"), tmp_path / "b", "--batch-size", "2", "--timesteps", "turbo", *SMALL)
    scheduler = run.model.scheduler_config
    own = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler)
    own.set_timesteps(4)
    levels = run.step.path.spread[run.step.path.timesteps].flip(0).double()
    torch.testing.assert_close(levels, own.sigmas[:-1].double(), rtol=0, atol=2e-3)
    assert len(everything(run)) > 0
