"""The embedded world: a small Stable Diffusion pipeline, preference pairs that it drew, and judges.

What a run uses:
    paths.py     where pipeline and pairs lie
    prompts.py   captions and seeds to draw: "tuning" to choose settings with, "report" for figures that are shown
    world.py     what a picture can show, what its caption names, what the hidden taste prefers
    detail.py    a second taste, of fine detail
    unchanged.py what the unchanged model draws for the judged prompts, as it comes with the package
    judge.py     networks that read pictures: "a" labelled the pairs, "b" is kept for reported figures
    scorer.py    judges and tastes as scorers of python -m dpo.evaluate
    outcome.py   how a model is judged on it, and what a run's summary keeps of that

What makes the world again, which nothing else imports:
    build.py     the command, python -m dpo.tiny.build
    making/      its work
"""
