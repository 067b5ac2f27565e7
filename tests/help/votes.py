"""Studies of small images, and what serves them in a test: a thread, or the command as a process of its own."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from dpo.evaluating.flags import Named
from dpo.voting import server, study
from dpo.voting.answers import Journal
from dpo.voting.declare import Wanted, declare
from dpo.voting.desk import Desk
from dpo.voting.shown import Gallery
from dpo.voting.study import Item, Question, Study


def make_folder(folder: Path, prompts: int, colour: tuple[int, int, int], size: tuple[int, int] = (48, 48)) -> Path:
    """A folder of images, each of another shade, with a table of file and prompt; text chunks name the folder."""
    folder.mkdir(parents=True)
    lines = ["file\tprompt\tcategory"]
    for number in range(prompts):
        pixels = np.full((size[1], size[0], 3), colour, dtype=np.uint8)
        pixels[: 8 + number % 8, :, :] = 40 + 5 * (number % 40)
        info = PngImagePlugin.PngInfo()
        info.add_text("model", f"the model {folder.name}")
        Image.fromarray(pixels).save(folder / f"{number}.png", pnginfo=info)
        lines.append(f"{number}.png\tprompt number {number} <b>&amp;\t{'odd' if number % 2 else 'even'}")
    (folder / "prompts.tsv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def make_study(folder: Path, prompts: int = 6, **wanted: Any) -> Study:
    """A declared study of two folders beside `folder`: a red base and a green model."""
    sides = [
        Named(name, str(make_folder(folder.parent / name, prompts, colour)))
        for name, colour in (("basemodel", (200, 30, 30)), ("newmodel", (30, 200, 30)))
    ]
    folder.mkdir()
    return declare(folder, Wanted(sides=tuple(sides), **wanted))


def imagined(items: int = 8, questions: str = "a", checks: int = 2, **fields: Any) -> Study:
    """A study without images: so many items, and checks of each kind."""
    kinds = [("vote", items), ("broken", checks), ("same", checks)]
    sides = {"vote": (0, 1), "broken": (-1, 1), "same": (1, 1)}
    made = tuple(
        Item(f"{kind}{number}", f"prompt {number}", "", kind, sides[kind], ("a.png", "b.png"), ("0", "1"))  # type: ignore[arg-type]
        for kind, count in kinds
        for number in range(count)
    )
    plain: dict[str, Any] = {"tie": True, "votes": 3, "repeats": 0.1, "seed": 0, "title": "Which?"}
    return Study(
        name="study", instructions="Look.", notice="Careful.", sides=("base", "new"), items=made,
        questions=tuple(Question(key, f"Question {key}?") for key in questions), **{**plain, **fields},
    )  # fmt: skip


class Served:
    """A study on loopback, in a thread of this process."""

    def __init__(self, desk: Desk, port: int) -> None:
        self.desk, self.port = desk, port
        self.address = f"http://127.0.0.1:{port}/"

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer; header names with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="host" in headers)
            for name, value in {**({"content_length": str(len(body))} if body is not None else {}), **headers}.items():
                connection.putheader(name.replace("_", "-"), value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, what: str, **said: Any) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a request of the page."""
        body = json.dumps(said).encode()
        status, _, data = self.request("POST", f"/api/{what}", body, content_type="application/json")
        return status, json.loads(data)

    def enter(self, name: str) -> dict[str, str]:
        """Rater and key of a name, as every later request needs them."""
        status, reply = self.post("enter", link="", name=name)
        assert status == 200, reply
        return {"rater": reply["rater"], "key": reply["key"]}


@contextmanager
def served(folder: Path, place: server.Place | None = None, invited: tuple[str, ...] = ()) -> Iterator[Served]:
    """The study of `folder` on a free port while the block lasts."""
    place = place or server.Place(port=0)
    with Journal(folder) as journal, server.listening(place) as listening:
        desk = Desk(study.read(folder), study.secret(folder), journal, invited, closed=not place.is_loopback)
        running = server.web(server.application(desk, Gallery(folder), place))
        thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
        thread.start()
        try:
            yield Served(desk, listening.getsockname()[1])
        finally:
            running.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def answered(reply: dict[str, Any], number: int, choice: str = "left", seconds: float = 1.5) -> dict[str, Any]:
    """The fields of an answer to what `reply` asks."""
    question = reply["question"]
    return {
        "id": f"{number:032x}", "item": question["item"], "question": question["question"], "ticket": question["ticket"],
        "choice": choice, "seconds": seconds,
    }  # fmt: skip
