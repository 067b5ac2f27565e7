"""The web page of a study, its addresses and what they refuse. Needs starlette and uvicorn, the extra "vote".

    GET  /                  the page: the same bytes for everybody, and no word of the study in it
    GET  /image/CODE.png    an image of a question that was asked
    POST /api/enter         {link, name}                                            what stands before the first question
    POST /api/next          {rater, key}                                            the question
    POST /api/answer        {rater, key, id, item, question, ticket, choice, seconds}
    POST /api/undo          {rater, key, id}

Every refusal is {"error": one line}. A page of another host cannot reach any of it: Host and Origin are checked, nothing
is allowed across origins, and no cookie speaks for a rater.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpo.common.errors import UserError
from dpo.common.words import counted_of, first_line, is_unicode

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise UserError(
        f"dpo.vote needs starlette and uvicorn ({first_line(error)}): pip install 'diffusion-dpo[vote]', or -e '.[vote]' where "
        "you have the source"
    ) from error

from dpo.voting import raters, study
from dpo.voting.answers import FILE as ANSWERS
from dpo.voting.answers import Journal
from dpo.voting.desk import Desk, Refused
from dpo.voting.shown import Gallery

MOST_BODY = 16 << 10  # bytes of a request
LOOPBACK = ("localhost", "127.0.0.1", "::1")
FIELDS: dict[str, dict[str, type]] = {  # of each request, and what each holds
    "enter": {"link": str, "name": str},
    "next": {"rater": str, "key": str},
    "answer": {
        "rater": str, "key": str, "id": str, "item": str, "question": str, "ticket": str, "choice": str, "seconds": float
    },
    "undo": {"rater": str, "key": str, "id": str},
}  # fmt: skip
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}

log = logging.getLogger("dpo")


@dataclass(frozen=True)
class Place:
    """Where the page is served."""

    host: str = "127.0.0.1"
    port: int = 8765  # 0: any free one

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(folder: Path, place: Place, invite: Sequence[str] = ()) -> None:
    """Serves the study of `folder`, which the caller holds, until Ctrl-C, which is raised as KeyboardInterrupt.

    Raises UserError where the study cannot be read, its images are gone, or the port is taken.
    """
    declared = study.read(folder)
    if not (folder / study.SECRET).exists() and (folder / ANSWERS).exists():
        log.warning(
            "%s is gone: links that were given before open nothing, so give the raters those of now",
            folder / study.SECRET,
        )
    secret = study.secret(folder)
    _check_images(folder, declared)
    names = raters.invited(folder, invite)
    with Journal(folder) as journal, listening(place) as ear:
        desk = Desk(declared, secret, journal, names, closed=not place.is_loopback)
        for line in _greeting(declared, desk, secret, names, place, ear.getsockname()[1]):
            log.log(*line)
        running = web(application(desk, Gallery(folder), place))
        asyncio.run(running.serve([ear]))


def web(application: ASGIApp) -> uvicorn.Server:
    """A server of the application that says nothing of its own: what matters is said in words by `_unexpected`."""
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return uvicorn.Server(
        uvicorn.Config(
            application,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
    )


def application(desk: Desk, gallery: Gallery, place: Place) -> ASGIApp:
    """The study as an ASGI application."""
    page = files("dpo.voting").joinpath("page.html").read_text(encoding="utf-8")
    policy = content_policy(page)

    async def get_page(request: Request) -> Response:
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return Response(page, media_type="text/html", headers=headers)

    async def get_image(request: Request) -> Response:
        item, which = desk.image(request.path_params["code"])
        try:
            data = await run_in_threadpool(gallery.png, item, which)
        except UserError as error:
            log.error("%s", error)
            raise Refused(410, "this image cannot be shown: tell the person who runs the study") from error
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    async def post(request: Request) -> Response:
        what = request.path_params["what"]
        if what not in FIELDS:
            raise Refused(404, "nothing is here")
        said = parsed(await _body(request), FIELDS[what])
        if what == "enter":
            work = partial(desk.enter, said["link"], said["name"])
        elif what == "next":
            work = partial(desk.following, said["rater"], said["key"])
        elif what == "answer":
            work = partial(desk.answer, said["rater"], said["key"], said)
        else:
            work = partial(desk.undo, said["rater"], said["key"], said["id"])
        try:
            return JSONResponse(await run_in_threadpool(work), headers={"Cache-Control": "no-store"})
        except (UserError, OSError) as error:
            log.error("%s", first_line(error))
            raise Refused(507, "the answer could not be written: tell the person who runs the study") from error

    application = Starlette(
        routes=[
            Route("/", get_page),
            Route("/image/{code:str}.png", get_image),
            Route("/api/{what:str}", post, methods=["POST"]),
        ],
        exception_handlers={Refused: _refused, HTTPException: _http, Exception: _unexpected},
    )
    application.router.redirect_slashes = False
    return _Guard(application, place)


def content_policy(page: str) -> str:
    """The content security policy of the page: its own script and style by their hashes, its own host, nothing else."""

    def own(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{one}'" for one in hashes)

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def parsed(body: bytes, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A request's body: a JSON object with just these fields. Raises Refused."""
    try:
        said = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is no JSON") from error
    if not isinstance(said, dict) or said.keys() != kinds.keys():
        raise Refused(400, f"the body needs an object of {', '.join(kinds)}")
    for name, kind in kinds.items():
        value = said[name]
        if kind is float:
            good = type(value) in (int, float) and abs(value) < 1e12  # no NaN either
        else:
            good = type(value) is str and is_unicode(value)
        if not good:
            raise Refused(400, f"{name} needs {'a number' if kind is float else 'text'}")
    return said


async def _body(request: Request) -> bytes:
    """The body of a request. Raises Refused for a kind that a form of another page could send, and for a large one."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the body needs the type application/json")
    data = b""
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MOST_BODY:
                raise Refused(413, f"the body is larger than {MOST_BODY} bytes")
    except ClientDisconnect as error:
        raise Refused(400, "the connection ended") from error
    return data


async def _refused(request: Request, error: Exception) -> Response:
    return _error(error.status if isinstance(error, Refused) else 500, str(error))


async def _http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return _error(status, "nothing is here" if status == 404 else "not in this way")


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("a request failed, nothing was lost (%s: %s)", type(error).__name__, first_line(error))
    return _error(500, "something went wrong: tell the person who runs the study")


def _error(status: int, line: str) -> Response:
    return JSONResponse({"error": line}, status, headers={"Cache-Control": "no-store"})


class _Guard:
    """Around the application: refuses what was meant for another host, or comes from another's page; adds HEADERS."""

    def __init__(self, application: ASGIApp, place: Place) -> None:
        self._application, self._place = application, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if scope["type"] != "http":
            return
        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not is_ours(host, self._place):
            await _error(421, "this host is not served here")(scope, receive, sent)
        elif origin is not None and origin != f"http://{host}":
            await _error(403, "pages of other hosts may not ask")(scope, receive, sent)
        else:
            await self._application(scope, receive, sent)


def is_ours(host: str, place: Place) -> bool:
    """Whether a Host header means this server, whatever its port: a name that an attacker has can be made to point here.

    Served beyond loopback any address in numbers will do, since no name server is asked for those.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]@/]+))(?::\d{1,5})?", host)
    if found is None:
        return False
    name = (found[1] or found[2]).lower()
    if name in LOOPBACK:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name == place.host.lower() or (
            not place.is_loopback and name in (socket.gethostname().lower(), socket.getfqdn().lower())
        )
    return not place.is_loopback or address.is_loopback


def listening(place: Place) -> socket.socket:
    """A listening socket. Raises UserError."""
    try:
        family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
        return socket.create_server((place.host, place.port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot serve at {place.host} port {place.port} ({getattr(error, 'strerror', None) or error}): choose another --port "
            "(0 takes a free one) or --host"
        ) from error


def _check_images(folder: Path, declared: study.Study) -> None:
    """Raises UserError where an image file is gone."""
    paths = dict.fromkeys(folder / image for item in declared.items for image in item.images)
    gone = [path for path in paths if not path.is_file()]
    if gone:
        raise UserError(
            f"{counted_of(len(gone), len(paths), 'images', 'is', 'are')} gone, the first is {gone[0]}: put them back as they were"
        )


def _greeting(
    declared: study.Study, desk: Desk, secret: bytes, names: Sequence[str], place: Place, port: int
) -> list[tuple[int, str]]:
    """What is said when the page is there, each with its level."""
    votes = sum(item.kind == "vote" for item in declared.items) * len(declared.questions)
    given = sum(desk.tally.votes.values())
    lines = [
        (
            logging.INFO,
            f"{declared.name}: {given} of {votes * declared.votes} votes are given, {votes} questions want {declared.votes} each",
        )
    ]
    shown = f"[{place.host}]" if ":" in place.host else place.host
    if place.host in ("0.0.0.0", "::"):
        shown = _own_address()
    base = f"http://{shown}:{port}/"
    if not place.is_loopback:
        lines.append(
            (
                logging.WARNING,
                f"--host {place.host}: whoever can reach this machine and has the link can vote, and nothing is encrypted on the way",
            )
        )
    if names:
        lines += [(logging.INFO, f"link of {name}: {base}#{raters.key_of(secret, name)}") for name in names]
    elif place.is_loopback:
        lines.append((logging.INFO, f"open {base} here; each rater gives a name"))
    else:
        lines.append((logging.INFO, f"secret link, for all raters: {base}#{raters.key_of_all(secret)}"))
    lines.append((logging.INFO, "Ctrl-C ends it; every answer is kept as it is given"))
    return lines


def _own_address() -> str:
    """This machine's address in its network, in numbers: a phone finds that where it knows no names. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of documentation; only the way to it is looked up
            return str(probe.getsockname()[0])
        except OSError:  # no network
            return socket.gethostname()
