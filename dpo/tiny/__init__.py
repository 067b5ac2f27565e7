"""The embedded world: a small Stable-Diffusion-shaped pipeline, preference pairs it drew, and judges that ship with the package.

paths.py where it lies | prompts.py captions and seeds to draw: "tuning" to choose settings with, "report" for figures that are shown
world.py what a picture can show; sprites.py its drawings | judge.py judges: "a" labelled the pairs, "b" is for reported figures
evaluate.py draws and compares; outcome.py what the second judge says of a run | build.py makes all of it again; making/ the work of that
"""
