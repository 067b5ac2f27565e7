"""The addresses of a study, over real connections on loopback: what they serve, and what they refuse in one line."""

import hashlib
import io
import json
import logging
import re
import socket
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.voting import raters, server, study
from dpo.voting.answers import Journal, read
from dpo.voting.desk import Desk
from dpo.voting.server import FIELDS, HEADERS, MOST_BODY, Place, content_policy, is_ours, parsed
from dpo.voting.shown import Gallery
from tests.help.votes import answered, make_study, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of 30 prompts, whose answers are taken away before each test."""
    place = tmp_path_factory.mktemp("served") / "study"
    make_study(place, 30, repeats=0.1)
    return place


@pytest.fixture
def web(folder):
    (folder / "answers.jsonl").unlink(missing_ok=True)
    with served(folder) as running:
        yield running


def refused(answer):
    """The one line of a refusal."""
    _, headers, body = answer
    assert headers["content-type"] == "application/json" and all(
        headers[name.lower()] == value for name, value in HEADERS.items()
    )
    said = json.loads(body)
    assert list(said) == ["error"] and "\n" not in said["error"] and 0 < len(said["error"]) < 120
    assert not any(name.startswith("access-control") for name in headers)
    return said["error"]


def alive(web, folder):
    """The server still asks, and the file is whole."""
    status, reply = web.post("next", **web.enter("Anna"))
    assert status == 200 and reply["state"] == "question"
    assert all(one.rater for one in read(folder))
    return reply


def test_a_rater_comes_in_sees_and_answers(web, folder):
    status, headers, page = web.request("GET", "/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8" and b"basemodel" not in page
    status, reply = web.post("enter", link="", name="")
    assert status == 200 and reply["rater"] is None and reply["title"] == "Which image is better?"
    me = web.enter("Anna")
    _, reply = web.post("next", **me)
    assert (reply["state"], reply["done"], reply["last"]) == ("question", 0, None)
    sizes, seen = set(), []
    for address in [*reply["question"]["images"], *reply["ahead"]]:
        status, headers, data = web.request("GET", address)
        assert status == 200 and headers["content-type"] == "image/png" and "etag" not in headers
        assert headers["cache-control"] == "private, max-age=3600" and "last-modified" not in headers
        with Image.open(io.BytesIO(data)) as image:
            sizes.add(image.size)
            seen.append(image.convert("RGB").getpixel((20, 40)))
    assert sizes == {(48, 48)} and set(seen) == {(200, 30, 30), (30, 200, 30)}
    _, after = web.post("answer", **me, **answered(reply, 1))
    assert after["done"] == 1 and after["question"]["images"] == reply["ahead"]
    _, back = web.post("undo", **me, id=after["last"])
    assert back["question"] == reply["question"] and read(folder) == []


def test_nothing_that_is_served_names_a_model_or_a_file(web):
    me = web.enter("Anna")
    _, reply = web.post("next", **me)
    said = [json.dumps(web.post("enter", link="", name="Anna")), json.dumps(reply)]
    for number in range(30):
        _, reply = web.post("answer", **me, **answered(reply, number))
        said.append(json.dumps(reply))
        for address in reply["question"]["images"]:
            _, headers, data = web.request("GET", address)
            said.append(json.dumps(headers) + data.decode("latin-1"))
            assert re.fullmatch(r"/image/[0-9a-f]{32}\.png", address)
    for text in said:
        assert not re.search(r"basemodel|newmodel|checks|broken|model", text)


def test_an_image_has_another_address_for_everybody(web):
    found = set()
    for name in ("Anna", "Ben", "Cleo"):
        _, reply = web.post("next", **web.enter(name))
        found |= {*reply["question"]["images"], *reply["ahead"]}
    assert len(found) == 12


@pytest.mark.parametrize(
    "path",
    [
        "/..", "/../study.json", "/study.json", "/image/../../study.json", "/image/..%2f..%2fstudy.json", "/image/%2e%2e/secret.png",
        "/image/..\\..\\secret.png", "//etc/passwd", "/image//etc/passwd.png", "/image/.png", "/image/0.png", "/answers.jsonl",
        "/image/%00.png", "/image/" + "a" * 5000 + ".png", "/api", "/api/", "/api/enter/", "/page.html", "/%ff", "/image/" + "0" * 32 + ".png",
        "/?x=../study.json#../study.json", "http://127.0.0.1/study.json", "/image/~root.png", "/static/x",
    ],
)  # fmt: skip
def test_nothing_else_is_served(web, folder, path):
    answer = web.request("GET", path)
    if path.startswith("/?"):
        assert answer[2] == web.request("GET", "/")[2]
    else:
        assert answer[0] in (404, 405) and refused(answer) in ("nothing is here", "no image is here", "not in this way")
    alive(web, folder)


def test_other_methods_are_refused(web, folder):
    for method, path in (
        ("POST", "/"),
        ("PUT", "/"),
        ("DELETE", "/image/0.png"),
        ("GET", "/api/next"),
        ("OPTIONS", "/api/next"),
    ):
        answer = web.request(method, path)
        assert answer[0] == 405 and refused(answer) == "not in this way"
    alive(web, folder)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
        "127.0.0.1:80:80",
        "10.0.0.7",
        "[::2]",
    ],
)
def test_another_host_is_refused(web, folder, host):
    answer = web.request("GET", "/", host=host)
    assert answer[0] == 421 and refused(answer) == "this host is not served here"
    body = json.dumps({"link": "", "name": "Eve"}).encode()
    assert web.request("POST", "/api/enter", body, host=host, content_type="application/json")[0] == 421
    alive(web, folder)


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://127.0.0.1:1", "http://localhost:{port}", ""],
)
def test_another_hosts_page_is_refused(web, folder, origin):
    me = web.enter("Anna")
    body = json.dumps({**me, **answered(web.post("next", **me)[1], 1)}).encode()
    origin = origin.format(port=web.port)
    answer = web.request("POST", "/api/answer", body, content_type="application/json", origin=origin)
    assert answer[0] == 403 and refused(answer) == "pages of other hosts may not ask" and read(folder) == []
    own = web.request(
        "POST", "/api/answer", body, content_type="application/json", origin=f"http://127.0.0.1:{web.port}"
    )
    assert own[0] == 200 and len(read(folder)) == 1
    alive(web, folder)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_what_a_form_of_another_page_can_send_is_refused(web, folder, kind):
    answer = web.request("POST", "/api/enter", b'{"link": "", "name": "Eve"}', content_type=kind)
    assert answer[0] == 415 and "application/json" in refused(answer)
    alive(web, folder)


def test_large_bodies_are_refused_however_they_come(web, folder):
    large = b'{"link": "", "name": "' + b"x" * MOST_BODY + b'"}'
    answer = web.request("POST", "/api/enter", large, content_type="application/json")
    assert answer[0] == 413 and refused(answer) == "the body is larger than 16384 bytes"
    with socket.create_connection(("127.0.0.1", web.port), timeout=60) as connection:  # no length is said
        connection.sendall(
            b"POST /api/enter HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(5):
            connection.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", web.port), timeout=60) as connection:  # and never sent
        connection.sendall(
            b"POST /api/enter HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
    with socket.create_connection(("127.0.0.1", web.port), timeout=60) as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    alive(web, folder)


MALFORMED = [
    b"", b"{", b"[]", b"null", b'"text"', b"{}", b"\xff\xfe", b"[" * 10_000, b'{"link": "", "name": 1}', b'{"link": ""}',
    b'{"link": "", "name": "", "more": ""}', b'{"link": "", "name": "\\ud800"}', b'{"link": null, "name": ""}',
    b'{"link": "", "name": ["a"]}', b'{"link": {"a": 1}, "name": ""}', b"NaN", b"1" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_bodies_are_refused(web, folder, body):
    answer = web.request("POST", "/api/enter", body, content_type="application/json")
    assert answer[0] == 400 and refused(answer)
    alive(web, folder)


@pytest.mark.parametrize("seconds", ["true", '"1"', "null", "NaN", "Infinity", "1e400", "9" * 400, "-1", "[]"])
def test_seconds_are_a_number(web, folder, seconds):
    me = web.enter("Anna")
    said = {**me, **answered(web.post("next", **me)[1], 1), "seconds": 0}
    body = json.dumps(said).replace('"seconds": 0', f'"seconds": {seconds}').encode()
    answer = web.request("POST", "/api/answer", body, content_type="application/json")
    assert answer[0] == 400 and refused(answer) and read(folder) == []


def test_unknown_raters_and_questions(web, folder):
    me = web.enter("Anna")
    said = answered(web.post("next", **me)[1], 1)
    for who in ({"rater": "Eve", "key": me["key"]}, {"rater": "Anna", "key": "0" * 32}, {"rater": "", "key": ""}):
        for what, more in (("next", {}), ("answer", said), ("undo", {"id": "0" * 32})):
            status, reply = web.post(what, **who, **more)
            assert status == 403 and reply == {"error": "unknown rater: open the page anew"}
    for change, status in (
        ({"item": "0" * 16}, 404),
        ({"question": "x"}, 404),
        ({"ticket": "0" * 32}, 403),
        ({"choice": "up"}, 400),
    ):
        assert web.post("answer", **me, **{**said, **change})[0] == status
    assert web.post("undo", **me, id="0" * 32)[0] == 404 and web.post("forget", **me)[0] == 404
    assert read(folder) == []
    alive(web, folder)


@pytest.mark.long
def test_two_hundred_requests_at_once(web, folder):
    people = [web.enter(f"rater {number}") for number in range(25)]

    def one(number):
        me = people[number % 25]
        if number % 8 < 2:
            return web.request("GET", "/")[0]
        if number % 8 < 4:
            address = web.post("next", **me)[1]["question"]["images"][0]
            return web.request("GET", address)[0]
        if number % 8 < 6:
            return web.request("POST", "/api/answer", b"{", content_type="application/json")[0]
        status, reply = web.post("next", **me)
        return web.post("answer", **me, **answered(reply, number))[0] if status == 200 else status

    with ThreadPoolExecutor(200) as pool:
        statuses = list(pool.map(one, range(200)))
    assert {status: statuses.count(status) for status in set(statuses)} == {200: 150, 400: 50}
    found = read(folder)
    assert len({(one.rater, one.item, one.question) for one in found if not one.repeat}) == len(
        [one for one in found if not one.repeat]
    )
    assert 25 <= len(found) <= 50  # two tabs of a rater may answer the same question at once
    alive(web, folder)


def test_an_image_that_was_changed_is_not_shown(web, folder, caplog):
    _, reply = web.post("next", **web.enter("Anna"))
    item = next(item for item in study.read(folder).items if item.id == reply["question"]["item"])
    kept = {path: (folder / path).read_bytes() for path in item.images}
    try:
        for path in kept:
            Image.new("RGB", (48, 48), "blue").save(folder / path)
        with caplog.at_level(logging.ERROR, "dpo"):
            answer = web.request("GET", reply["question"]["images"][0])
        assert answer[0] == 410 and refused(answer) == "this image cannot be shown: tell the person who runs the study"
        assert "was changed since the study was declared" in caplog.text
    finally:
        for path, data in kept.items():
            (folder / path).write_bytes(data)
    alive(web, folder)


def test_a_full_disk_and_a_fault_are_one_line_each(web, folder, caplog, monkeypatch):
    me = web.enter("Anna")
    reply = alive(web, folder)

    def full(line):
        raise UserError("the disk is full (0.0 GiB left at /): free some space, then start the same command again")

    monkeypatch.setattr(web.desk._journal, "add", full)
    with caplog.at_level(logging.ERROR, "dpo"):
        status, said = web.post("answer", **me, **answered(reply, 1))
        assert status == 507 and said == {
            "error": "the answer could not be written: tell the person who runs the study"
        }
        monkeypatch.setattr(web.desk._journal, "add", lambda line: 1 / 0)
        status, said = web.post("answer", **me, **answered(reply, 1))
    assert (
        status == 500
        and list(said) == ["error"]
        and "the disk is full" in caplog.text
        and "ZeroDivisionError" in caplog.text
    )
    assert "Traceback" not in caplog.text
    monkeypatch.undo()
    assert web.post("answer", **me, **answered(reply, 1))[0] == 200 and len(read(folder)) == 1


def test_beyond_loopback_a_link_is_needed(folder):
    (folder / "answers.jsonl").unlink(missing_ok=True)
    with served(folder, Place("0.0.0.0", 0)) as web:
        status, reply = web.post("enter", link="", name="Anna")
        assert status == 403 and "by link alone" in reply["error"]
        link = raters.key_of_all(study.secret(folder))
        assert web.post("enter", link=link, name="Anna")[1]["rater"] == "Anna"
        assert b"prompt number" not in web.request("GET", "/")[2]  # the page itself holds nothing
    with served(folder, Place("0.0.0.0", 0), invited=("Anna",)) as web:
        assert web.post("enter", link=link, name="Anna")[0] == 403
        assert web.post("enter", link=raters.key_of(study.secret(folder), "Anna"), name="")[1]["rater"] == "Anna"


@pytest.mark.parametrize(
    ("host", "place", "ours"),
    [
        ("localhost:8765", Place(), True), ("LOCALHOST", Place(), True), ("127.0.0.1:1", Place(), True), ("[::1]:8765", Place(), True),
        ("127.0.0.2", Place("127.0.0.2"), True), ("192.168.1.7:80", Place(), False), ("evil.example", Place(), False),
        ("192.168.1.7:80", Place("0.0.0.0"), True), ("[fe80::1]", Place("::"), True), ("evil.example", Place("0.0.0.0"), False),
        ("box.lan:8765", Place("box.lan"), True), ("box.lan.evil", Place("box.lan"), False), (socket.gethostname(), Place("0.0.0.0"), True),
        (socket.gethostname() + "x", Place(), False), ("a b", Place("0.0.0.0"), False),
    ],
)  # fmt: skip
def test_which_hosts_mean_this_server(host, place, ours):
    assert is_ours(host, place) == ours


def test_what_is_loopback():
    assert [Place(host).is_loopback for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9", "0.0.0.0", "::", "10.0.0.1", "box")] == [
        True, True, True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_port_that_is_taken_and_an_address_that_is_not_ours():
    with server.listening(Place(port=0)) as taken:
        for place in (
            Place(port=taken.getsockname()[1]),
            Place("192.0.2.1"),
            Place("no such host.invalid"),
            Place(port=70_000),
        ):
            with pytest.raises(UserError, match=r"cannot serve at .* port \d+ \(.*\): choose another --port") as error:
                server.listening(place)
            assert "\n" not in str(error.value)


def test_images_that_are_gone_are_said_before_the_page_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "web", None)  # it comes to no page
    make_study(tmp_path / "study", 3)
    (tmp_path / "newmodel" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1 of \d+ images is gone, the first is .*1\.png: put them back"):
        server.serve(tmp_path / "study", Place(port=0))


def test_what_is_said_when_the_page_is_there(folder):
    secret, declared = study.secret(folder), study.read(folder)
    with Journal(folder) as journal:
        desk = Desk(declared, secret, journal)

    def said(place, names=()):
        return server._greeting(declared, desk, secret, names, place, 9)

    here = said(Place())
    assert [level for level, _ in here] == [logging.INFO] * 3
    assert (
        "0 of 450 votes are given, 90 questions want 5 each" in here[0][1]
        and "open http://127.0.0.1:9/ here" in here[1][1]
    )
    there = said(Place("0.0.0.0"))
    assert there[1][0] == logging.WARNING and "whoever can reach this machine" in there[1][1]
    assert there[2][1].endswith(f":9/#{raters.key_of_all(secret)}") and "0.0.0.0" not in there[2][1]
    links = said(Place("::1"), ["Anna", "Ben"])
    assert links[1][1] == f"link of Anna: http://[::1]:9/#{raters.key_of(secret, 'Anna')}" and len(links) == 4


class _Page(HTMLParser):
    """What of a page could run or be loaded."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]


def test_the_page_stands_alone_and_its_policy_lets_nothing_else_run():
    text = files("dpo.voting").joinpath("page.html").read_text("utf-8")
    page = _Page(text)
    assert not [entry for entry in page.attributes if entry[1].startswith("on") or entry[1] == "style"]
    assert [entry for entry in page.attributes if entry[1] in ("src", "href", "action")] == [("link", "href", "data:,")]
    assert (
        page.tags.count("script") == 1
        and page.tags.count("style") == 1
        and not {"iframe", "form", "object"} & set(page.tags)
    )
    script = re.search(r"<script>(.*)</script>", text, re.S)[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|https?://", script)
    policy = content_policy(text)
    assert f"script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
    assert {part.split()[0] for part in policy.split(";")} >= {
        "base-uri",
        "form-action",
        "frame-ancestors",
        "connect-src",
    }


def test_the_fields_of_a_request():
    assert parsed(b'{"link": "a", "name": "b"}', FIELDS["enter"]) == {"link": "a", "name": "b"}
    assert set(FIELDS) == {"enter", "next", "answer", "undo"}


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_one_line_says_what_to_install(monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "dpo.voting.server")
    with pytest.raises(
        UserError, match=r"needs starlette and uvicorn .*pip install 'diffusion-dpo\[vote\]', or -e '\.\[vote\]'"
    ) as error:
        __import__("dpo.voting.server")
    assert "\n" not in str(error.value)


def test_a_gallery_is_the_folders_own(folder):
    with pytest.raises(UserError, match="cannot be read|No such file|put the image back"):
        Gallery(folder / "elsewhere").png(next(item for item in study.read(folder).items if item.kind == "broken"), 0)
