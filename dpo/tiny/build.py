"""Build the embedded world: sprites -> autoencoder -> judges -> base pipeline -> preference pairs -> what ships.

    python -m dpo.tiny.build                          # everything, hours on two cores; run again to resume
    python -m dpo.tiny.build --stage vae              # one stage; `--stage judges` can run beside it in another terminal
    python -m dpo.tiny.build --stage unchanged        # only draw the shipped pictures of the unchanged model again
    python -m dpo.tiny.build --detail DIR             # only pairs of the second taste, of the shipped ones, in seconds
    python -m dpo.tiny.build --miniature --out DIR    # a few objects, offline: for tests, draws poorly

Working files go to --work, artefacts to --out. Every stage resumes from its last checkpoint and is a function of the
seed; the base stage also depends on its number of processes (their draws differ). build.json says what was built,
how, and how well it does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from transformers import CLIPTokenizer

from dpo.common import command, files
from dpo.drawing.draw import sample
from dpo.tiny import judge, outcome
from dpo.tiny.making import detail, judges, loop, pairs, pipeline, sprites, text, unchanged, vae
from dpo.tiny.making.scenes import CANVAS, PHRASES, Renderer, Scenes, World, caption, world
from dpo.tiny.paths import ASSETS
from dpo.tiny.world import COLOURS

log = logging.getLogger("dpo.tiny")
RECORD = "build.json"
NOTICES = ("NOTICE", "LICENSE-fluent-emoji")
LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "pillow", "numpy")
BANK_SEED = 20
CHECK_SEED = 50_000_000  # first of those that figures are drawn with
KL_START, KL_FINISH = 1e-4, 1e-6  # weight of the KL term, summed over a latent
Figures = dict[str, Any]  # what a stage says of itself, as JSON


@dataclass(frozen=True)
class Recipe:
    """How large the world is and how long each part trains."""

    objects: int
    offline: bool  # stand-in shapes instead of the sprite packages
    vae: loop.Plan
    vae_finish: loop.Plan
    judges: dict[str, loop.Plan]
    bank: int  # chunks of pipeline.CHUNK pictures
    decoder: loop.Plan
    base: loop.Plan
    pairs: dict[str, int]  # kind -> number
    prompts: dict[str, int]
    check: int  # pictures that a figure is measured on


FULL = Recipe(
    objects=24,
    offline=False,
    vae=loop.Plan(steps=1300, batch=12, lr=2.5e-3, seed=1),
    vae_finish=loop.Plan(steps=500, batch=24, lr=1.5e-3, seed=2, ema=0.98, warmup=20, processes=2),
    judges=judges.PLANS,
    bank=7,
    decoder=loop.Plan(steps=400, batch=24, lr=2e-3, seed=4, ema=0.98, warmup=20, processes=2),
    base=loop.Plan(steps=5000, batch=32, lr=1e-3, seed=3, ema=0.998, warmup=100, processes=2),
    pairs={"train": 740, "validation": 200},
    prompts={"tuning": 160, "report": 256},
    check=256,
)
MINIATURE = Recipe(
    objects=3,
    offline=True,
    vae=loop.Plan(steps=150, batch=8, lr=4e-3, seed=1, save_every=50),
    vae_finish=loop.Plan(steps=50, batch=8, lr=2e-3, seed=2, warmup=5),
    judges={name: replace(plan, steps=150, batch=32) for name, plan in judges.PLANS.items()},
    bank=1,
    decoder=loop.Plan(steps=50, batch=8, lr=2e-3, seed=4, warmup=5),
    base=loop.Plan(steps=150, batch=16, lr=2e-3, seed=3, ema=0.98, warmup=10, save_every=50),
    pairs={"train": 24, "validation": 8},
    prompts={"tuning": 8, "report": 8},
    check=24,
)


@dataclass(frozen=True)
class Job:
    """One build: a recipe, and where everything lies. The methods read what an earlier stage left in `work`."""

    recipe: Recipe
    seed: int
    work: Path
    out: Path

    @property
    def world(self) -> World:
        return world(self.recipe.objects, self.seed)

    def render(self) -> Renderer:
        return Renderer(np.load(self.work / "sprites.npz")["sprites"])

    def plan(self, plan: loop.Plan) -> loop.Plan:
        """With a seed of its own for every seed of the build."""
        return replace(plan, seed=plan.seed + 1000 * self.seed)

    def tokenizer(self) -> CLIPTokenizer:
        return text.tokenizer(self.work / "tokenizer")

    def vae(self) -> AutoencoderKL:
        """The one with the refined decoder, as soon as there is one."""
        refined = self.work / "decoder" / "final"
        folder = refined if refined.exists() else self.work / "vae" / "final"
        found: AutoencoderKL = AutoencoderKL.from_pretrained(folder)
        return found.eval().requires_grad_(False)

    def pipeline(self) -> StableDiffusionPipeline:
        return StableDiffusionPipeline.from_pretrained(self.work / "base" / "pipeline")

    def judge(self, name: str) -> judge.Judge:
        return judge.load_judge_file(self.work / "judges" / f"{name}.safetensors")


def build_sprites(job: Job) -> Figures:
    objects = list(job.world.objects)
    made = sprites.stand_ins(objects) if job.recipe.offline else sprites.fluent(job.work / "packages", objects)
    np.savez_compressed(job.work / "sprites.npz", sprites=made)
    return {"objects": objects, "packages": {} if job.recipe.offline else sprites.PACKAGES}


def start_vae(rank: int, job: Job) -> None:
    vae.train(rank, job.world, job.render(), job.plan(job.recipe.vae), KL_START, job.work / "vae" / "start")


def finish_vae(rank: int, job: Job) -> None:
    start = job.work / "vae" / "start" / "final"
    vae.train(rank, job.world, job.render(), job.plan(job.recipe.vae_finish), KL_FINISH, job.work / "vae", start)


def build_vae(job: Job) -> Figures:
    """A strong KL term first, which makes the latents smooth; then next to none, which makes them precise."""
    if not (job.work / "vae" / "start" / "final").exists():
        run(job.recipe.vae.processes, start_vae, job)
    run(job.recipe.vae_finish.processes, finish_vae, job)
    trained, render, plans = job.vae(), job.render(), (job.recipe.vae, job.recipe.vae_finish)
    check = render(job.world.sample(np.random.default_rng((job.seed, 9)), job.recipe.check, combinations="all"))
    figures = {"psnr_db": round(vae.psnr(trained, check), 2), "scaling_factor": trained.config["scaling_factor"]}
    return {"plans": [asdict(job.plan(plan)) for plan in plans], "kl": [KL_START, KL_FINISH], **figures}


def build_judges(job: Job) -> Figures:
    render = job.render()
    figures: Figures = {}
    scenes = job.world.sample(np.random.default_rng((job.seed, 10)), 4 * job.recipe.check, combinations="all")
    for name, plan in job.recipe.judges.items():
        path = job.work / "judges" / f"{name}.safetensors"
        if not path.exists():
            trained = judges.train(name, job.world, render, job.plan(plan), job.work / "judges" / name)
            judges.save_judge(trained, name, path)
        figures[name] = {"plan": asdict(job.plan(plan)), **judges.accuracy(job.judge(name), render(scenes), scenes)}
    return figures


def encode_share(rank: int, job: Job) -> None:
    autoencoder, render = job.vae(), job.render()
    for index in range(rank, job.recipe.bank, job.recipe.base.processes):
        pipeline.encode_chunk(job.world, render, autoencoder, job.seed + BANK_SEED, index, job.work / "bank")


def build_bank(job: Job) -> Figures:
    run(job.recipe.base.processes, encode_share, job)
    return {"renders": job.recipe.bank * pipeline.CHUNK}


def refine_share(rank: int, job: Job) -> None:
    parts = [pipeline.chunk_scenes(job.world, job.seed + BANK_SEED, index) for index in range(job.recipe.bank)]
    scenes = Scenes(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Scenes)))
    latents = pipeline.bank(job.work / "bank")["latents"]
    autoencoder = AutoencoderKL.from_pretrained(job.work / "vae" / "final")
    vae.refine(rank, autoencoder, latents, scenes, job.render(), job.plan(job.recipe.decoder), job.work / "decoder")


def refine_decoder(job: Job) -> Figures:
    plan = job.plan(job.recipe.decoder)
    run(plan.processes, refine_share, job)
    check = job.render()(job.world.sample(np.random.default_rng((job.seed, 9)), job.recipe.check, combinations="all"))
    return {"plan": asdict(plan), "psnr_db": round(vae.psnr(job.vae(), check), 2)}


def train_share(rank: int, job: Job) -> None:
    plan, work = job.plan(job.recipe.base), job.work
    pipeline.train(rank, job.world, job.tokenizer(), job.vae(), plan, work / "bank", work / "base")


def build_base(job: Job) -> Figures:
    run(job.recipe.base.processes, train_share, job)
    pipeline.assemble(job.tokenizer(), job.vae(), job.work / "base")
    return {"plan": asdict(job.plan(job.recipe.base)), **fidelity(job)}


def drawn(pipe: StableDiffusionPipeline, captions: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] of N captions and seeds, drawn as the world's judges see a model."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    images = sample(
        pipe,
        list(zip(captions, seeds, strict=True)),
        device="cpu",
        steps=outcome.STEPS,
        guidance=outcome.GUIDANCE,
        batch=outcome.BATCH,
    )
    return np.stack([np.asarray(image) for image in images])


def fidelity(job: Job) -> Figures:
    """Share of drawings with the caption's object and colour, by judge, on combinations trained on and held out."""
    pipe, scenery = job.pipeline(), job.world
    figures: Figures = {}
    rng = np.random.default_rng((job.seed, 11))
    for kind, allowed in {"seen": ~scenery.held_out, "held_out": scenery.held_out}.items():
        chosen = np.argwhere(allowed)[rng.integers(allowed.sum(), size=job.recipe.check)]
        captions = [caption(scenery.objects[o], list(COLOURS)[c], int(rng.integers(len(PHRASES)))) for o, c in chosen]
        images = drawn(pipe, captions, range(CHECK_SEED, CHECK_SEED + len(captions)))
        for name in job.recipe.judges:
            found = job.judge(name)
            reading = found.read(images)
            figures[f"{kind}_faithful_{name}"] = round(float(found.faithful(reading, captions).mean()), 4)
            if kind == "seen":
                traits = {"three_d": reading.three_d > 0.5, "plain": reading.plain > 0.5, "size": reading.size}
                means = {trait: round(float(values.mean()), 3) for trait, values in traits.items()}
                figures[f"drawn_traits_{name}"] = means
    return figures


def draw_share(rank: int, job: Job) -> None:
    """Draw one share of the pictures: 2n for n pairs, first the first of each pair, then the second of each."""
    pipe = job.pipeline()
    for kind, n in job.recipe.pairs.items():
        prompts = pairs.prompts_of(job.world, kind, 2 * n)
        share = slice(rank, None, job.recipe.base.processes)
        images = drawn(pipe, (prompts.captions[:n] * 2)[share], prompts.seeds[share])
        np.save(job.work / "drawn" / f"{kind}-{rank}.npy", images)


def build_pairs(job: Job) -> Figures:
    labeller, processes = job.judge("a"), job.recipe.base.processes
    figures: Figures = {}
    (job.work / "drawn").mkdir(exist_ok=True)
    run(processes, draw_share, job)
    for number, (kind, n) in enumerate(job.recipe.pairs.items()):
        captions = pairs.prompts_of(job.world, kind, n).captions
        images = np.empty((2 * n, CANVAS, CANVAS, 3), np.uint8)
        for rank in range(processes):
            images[rank::processes] = np.load(job.work / "drawn" / f"{kind}-{rank}.npy")
        rng = np.random.default_rng((job.seed, 12, number))
        rows, figures[kind] = pairs.judged(kind, captions, images[:n], images[n:], labeller, rng)
        pairs.write(rows, job.work / "pairs" / f"{kind}.parquet")
    return figures


def publish(job: Job) -> Figures:
    """Copy what ships to --out."""
    job.out.mkdir(parents=True, exist_ok=True)
    for kind in ("pipeline", "pairs", "judges"):
        shutil.rmtree(job.out / kind, ignore_errors=True)
    shutil.copytree(job.work / "base" / "pipeline", job.out / "pipeline")
    shutil.copytree(job.work / "pairs", job.out / "pairs")
    (job.out / "judges").mkdir()
    for name in job.recipe.judges:
        shutil.copyfile(job.work / "judges" / f"{name}.safetensors", job.out / "judges" / f"{name}.safetensors")
    pairs.write_prompts(job.world, job.recipe.prompts, job.out / "prompts.json")
    if job.out.resolve() != ASSETS.resolve():
        for name in NOTICES:
            shutil.copyfile(ASSETS / name, job.out / name)
    return {}


def draw_unchanged(job: Job) -> Figures:
    """The shipped pictures of the unchanged model, where it is the package's: a run is judged by no other's."""
    return {"pictures": unchanged.draw(job.work / "unchanged") if job.out.resolve() == ASSETS.resolve() else 0}


def sums(out: Path) -> dict[str, str]:
    """The SHA-256 of every file that ships, by its path; of build.json, which holds them, none."""
    written = sorted(path for path in out.rglob("*") if path.is_file() and path.name != RECORD)
    return {path.relative_to(out).as_posix(): files.checksum(path) for path in written}


STAGES: dict[str, Callable[[Job], Figures]] = {
    "sprites": build_sprites,
    "vae": build_vae,
    "judges": build_judges,
    "bank": build_bank,
    "decoder": refine_decoder,
    "base": build_base,
    "pairs": build_pairs,
    "publish": publish,
    "unchanged": draw_unchanged,
}
OF_SHIPPED = ("publish", "unchanged")  # always run: what they take may be another by now


def run(processes: int, work: Callable[[int, Job], None], job: Job) -> None:
    """`work(rank, job)` in so many processes, or here where it is one."""
    if processes > 1:
        loop.spawn(work, processes, job)
    else:
        work(0, job)


def run_stage(name: str, job: Job) -> Figures:
    """The figures of a stage, which runs unless they are there already, or it works on what ships."""
    path = job.work / "figures" / f"{name}.json"
    if path.exists() and name not in OF_SHIPPED:
        return json.loads(path.read_text("utf-8"))
    began = time.monotonic()
    figures = STAGES[name](job) | {"minutes": round((time.monotonic() - began) / 60, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, json.dumps(figures, indent=1))
    return figures


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 when all is built, 2 after a mistake of the user's, 130 when interrupted."""
    chosen = sys.argv[1:] if arguments is None else arguments
    return command.run("dpo.tiny.build", lambda: build(chosen), command.GOES_ON)


def build(arguments: list[str]) -> int:
    """What the command line asks for."""
    layout = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m dpo.tiny.build", description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, help="artefacts (default: the package's assets; WORK/out for --miniature)")
    parser.add_argument(
        "--work", type=Path, help="working files and checkpoints (default: build/tiny, or build/miniature)"
    )
    parser.add_argument("--stage", choices=list(STAGES), help="run this stage alone; those before it must be done")
    parser.add_argument("--objects", type=int, help=f"objects in the world, at most {len(sprites.ICONS)}")
    parser.add_argument("--steps", type=int, help="steps of base training")
    parser.add_argument("--processes", type=int, help="processes of base training, one thread each")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    parser.add_argument("--miniature", action="store_true", help="a tiny offline world, for tests")
    parser.add_argument("--detail", type=Path, help="write the pairs of the second taste there, and build nothing")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.detail:
        if options.detail.exists() and not options.detail.is_dir():
            parser.error(f"--detail {options.detail}: a folder is needed")
        log.info("%s: %s", options.detail, json.dumps(detail.write(options.detail)))
        return 0

    recipe = MINIATURE if options.miniature else FULL
    changed = {name: getattr(options, name) for name in ("steps", "processes") if getattr(options, name) is not None}
    recipe = replace(recipe, base=replace(recipe.base, **changed), objects=options.objects or recipe.objects)
    work = options.work or Path("build/miniature" if options.miniature else "build/tiny")
    job = Job(recipe, options.seed, work, options.out or (work / "out" if options.miniature else ASSETS))
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    figures = {}
    for name in [options.stage] if options.stage else STAGES:
        figures[name] = run_stage(name, job)
        log.info("%s: %s", name, json.dumps(figures[name]))
    if not options.stage:
        libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
        record = {
            "command": shlex.join(["python", "-m", "dpo.tiny.build", *arguments]),
            "seed": options.seed,
            "versions": {"python": platform.python_version()} | libraries,
            "sha256": sums(job.out),
            "stages": figures,
        }
        files.write_text(job.out / RECORD, json.dumps(record, indent=1) + "\n")
    elif options.stage == "unchanged" and (job.out / RECORD).is_file():
        record = json.loads((job.out / RECORD).read_text("utf-8"))
        files.write_text(job.out / RECORD, json.dumps(record | {"sha256": sums(job.out)}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
