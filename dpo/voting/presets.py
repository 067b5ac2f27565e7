"""What is asked unless the user says otherwise: the published studies, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo.voting.study import Question

INSTRUCTIONS = (
    "You will see a prompt, and two images that were made for it. Answer the question that stands above them. There is no right "
    "answer but your own; look at both images first. You may stop at any time and go on later: every answer is kept at once."
)
NOTICE = (
    "The images were made by machines, from prompts that people wrote. Some may be disturbing or not suitable for children. "
    "If you would rather not see an image, close the page."
)
THREE = (
    Question("general", "Which image do you prefer given the prompt?"),
    Question("appeal", "Prompt not considered: which image is more visually appealing?"),
    Question("alignment", "Which image better fits the text description?"),
)


@dataclass(frozen=True)
class Preset:
    """A published study."""

    title: str
    questions: tuple[Question, ...]
    tie: bool
    votes: int
    published: Mapping[int, str]  # number of prompts -> what was shown
    remedy: str = ""  # how to come to such a number


PRESETS = {
    "dpo": Preset(
        title="Which image is better?",
        questions=THREE,
        tie=False,
        votes=5,
        published={
            1632: "PartiPrompts, all of them",
            3200: "HPSv2's benchmark, all of it",
            800: "as many of HPSv2's prompts as the blog on Diffusion-DPO showed",
        },
        remedy="draw --prompts partiprompts or hpsv2; of hpsv2, --each 200 keeps 200 keyed prompts of each style, 800",
    ),
    "versus": Preset(
        title="Which image do you prefer?",
        questions=(Question("prefer", "Which image do you prefer?"),),
        tie=False,
        votes=5,
        published={
            346: "as many as the blog showed of Midjourney 5.1's images",
            200: "as many of PartiPrompts as the blog showed of Emu's images",
        },
        remedy="give the closed model's images as a folder with a table of file and prompt; --subset 200 keeps 200 keyed prompts",
    ),
}  # fmt: skip
