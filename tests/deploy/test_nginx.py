"""The provisioned nginx configurations in a real nginx on loopback: what passes the proxy, and what does not."""

import http.server
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.consortium_files import client_context, server_context, write_document
from tests.system_tools import require
from urna.server.provision import provision

START_SECONDS = 30.0
FLOWER_FRAME_BYTES = 5_243_032  # what Flower sends for an object of 5 MiB


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextmanager
def running(*command: str, cwd: Path, port: int | None = None, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A process that is ended afterwards; with ``port``, once it listens there."""
    log = cwd / f"{Path(command[0]).name}.{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while port is not None and not listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listens(port: int) -> bool:
    with closing(socket.socket()) as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def nginx(folder: Path, port: int) -> AbstractContextManager[None]:
    """An nginx with the configuration of a folder, in the foreground."""
    command = (require("nginx"), "-p", str(folder), "-e", "error.log", "-c", "nginx.conf", "-g", "daemon off;")
    return running(*command, cwd=folder, port=port)


@dataclass
class Upstream:
    """Answers 200 to everything, over TLS, in the SuperLink's place; remembers what it was asked."""

    port: int
    seen: list[tuple[str, str, int]] = field(default_factory=list)  # method, path as it came, bytes of the body

    @contextmanager
    def serving(self, made: Path) -> Iterator[None]:
        upstream = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                upstream.seen.append((self.command, self.path, len(body)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_PUT = do_DELETE = do_OPTIONS = do_PATCH = do_HEAD = do_POST  # noqa: N815 - as the library calls them

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        context = server_context(made / "operator" / "superlink.pem", made / "operator" / "superlink.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@dataclass
class Consortium:
    """A provisioned folder with its proxy in front of an upstream."""

    made: Path
    proxy_port: int
    egress_port: int
    upstream: Upstream

    def member(self, name: str = "hospital-a") -> ssl.SSLContext:
        egress = self.made / "sites" / name / "egress"
        return client_context(self.made / "authority" / "ca.pem", egress / "client.pem", egress / "tls.key")

    def ask(
        self, target: str, context: ssl.SSLContext | None = None, *, method: str = "POST", body: bytes = b"", headers: str = ""
    ) -> int:
        """Status of one request that is sent exactly so; 0 when the connection ended without an answer."""
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        if "ontent-" not in headers and "ransfer-" not in headers:
            headers += f"Content-Length: {len(body)}\r\n"
        return first_status(self.talk(f"{head}{headers}\r\n".encode("latin-1") + body, context))

    def talk(
        self, raw: bytes, context: ssl.SSLContext | None = None, port: int | None = None, *, until_closed: bool = False
    ) -> bytes:
        """What comes back, to the end of the first answer's head or of the connection."""
        context = context or self.member()
        answer = b""
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", port or self.proxy_port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as one,
        ):
            with suppress(OSError):  # refused before all of it was sent
                one.sendall(raw)
            while (until_closed or b"\r\n\r\n" not in answer) and (part := one.recv(65_536)):
                answer += part
        return answer


def first_status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3})", answer)
    return int(found.group(1)) if found else 0


def provisioned(folder: Path, name: str = "retina") -> Consortium:
    proxy, superlink, egress, other = free_ports(4)
    text = f'name = "{name}"\n[operator]\naddress = "localhost:{proxy}"\nlisten = "127.0.0.1:{proxy}"\n'
    text += f'superlink = "127.0.0.1:{superlink}"\n'
    text += f'[[site]]\nname = "hospital-a"\negress_port = {egress}\n[[site]]\nname = "hospital-b"\negress_port = {other}\n'
    provision(write_document(folder, text), folder / "made")
    return Consortium(folder / "made", proxy, egress, Upstream(superlink))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """Site, proxy and upstream, up and running."""
    require("nginx")
    consortium = provisioned(tmp_path_factory.mktemp("proxied"))
    with (
        consortium.upstream.serving(consortium.made),
        nginx(consortium.made / "proxy", consortium.proxy_port),
        nginx(consortium.made / "sites" / "hospital-a" / "egress", consortium.egress_port),
    ):
        yield consortium


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Another consortium of the same names, made by somebody else."""
    return provisioned(tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize("name", ["hospital-a", "hospital-b"])
def test_a_member_reaches_the_fleet_api(one: Consortium, name: str) -> None:
    before = len(one.upstream.seen)
    assert one.ask("/v1/fleet/pull-messages", one.member(name), body=b"hello") == 200
    assert one.upstream.seen[before:] == [("POST", "/v1/fleet/pull-messages", 5)]


TRICKS = [
    *(
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
    ),
    *(
        "/v1/fleet/",
        "//v1/fleet/x",
        "/v1//fleet/x",
        "/v1/fleet//x",
        "/v1/fleet/x/",
        "/v1/fleet/x/y",
        "/V1/FLEET/x",
        "/v1/fleetx",
    ),
    *(
        "//v1/fleet/../runtime",
        "/v1/fleet/../runtime/acquire-task",
        "/v1/fleet/../../docs",
        "/x/../v1/fleet/x",
        "/v1/fleet/./x",
    ),
    *("/v1/fleet/..%2fruntime/acquire-task", "/v1/fleet/%2e%2e/runtime", "/v1/fleet/%2e%2e%2fruntime", "/v1/%66leet/x"),
    *(
        "/v1/fleet/%252e%252e/runtime",
        "/v1/fleet/..;/runtime",
        "/v1/fleet/..\\runtime",
        "/v1/fleet\\..\\runtime",
        "/v1/fleet/x%00",
    ),
    *(
        "/v1/fleet/%c0%ae%c0%ae/runtime",
        "/v1/fleet/x?../../runtime",
        "/v1/fleet/x#/v1/control",
        "/v1/fleet/x%0a",
        "/v1/fleet%2fx",
    ),
    *("/v1/runtime/..%2ffleet/x", "/v1/fleet/x%20HTTP/1.1", "*", "v1/fleet/x", "http://localhost/v1/control/start-run"),
    *(
        "https://localhost/v1/fleet/../control",
        "/v1/fleet/x;y",
        "/v1/fleet/x.y",
        "/v1/fleet/X",
        "/v1/fleet/-x",
        "/v1/fleet/x\xff",
    ),
]


@pytest.mark.parametrize("target", TRICKS)
def test_only_fleet_reachable_through_the_proxy(one: Consortium, target: str) -> None:
    before = len(one.upstream.seen)
    assert one.ask(target) in (400, 403, 405, 414)
    assert one.upstream.seen[before:] == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "post"])
def test_only_post_passes(one: Consortium, method: str) -> None:
    before = len(one.upstream.seen)
    assert one.ask("/v1/fleet/pull-messages", method=method) in (400, 403, 405)
    assert one.upstream.seen[before:] == []


@given(
    path=st.lists(st.sampled_from([*"/.%-;?x", "..", "%2f", "%2e", "v1", "fleet", "/v1/fleet/", "runtime", "\\"]), max_size=8)
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_upstream_hears_of_the_fleet_only(one: Consortium, path: list[str]) -> None:
    before = len(one.upstream.seen)
    target = "/v1/fleet/" + "".join(path)
    status = one.ask(target)
    fine = re.fullmatch(r"/v1/fleet/[a-z]+(-[a-z]+)*|/v1/fleet/(v1|fleet)x*", target) is not None
    seen = one.upstream.seen[before:]
    assert all(re.fullmatch(r"/v1/fleet/[a-z-]+", asked) for _, asked, _ in seen)
    assert len(seen) == (status == 200)
    if not fine:
        assert status != 200


def test_a_second_request_inside_the_first_is_asked_for_itself(one: Consortium) -> None:
    """Request smuggling: lengths that two servers could read differently."""
    inner = b"POST /v1/control/start-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    head = b"POST /v1/fleet/x HTTP/1.1\r\nHost: x\r\n"
    for headers in (
        b"Content-Length: 0\r\n\r\n",
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(inner),
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    ):
        before = len(one.upstream.seen)
        one.talk(head + headers + inner, until_closed=True)
        assert {path for _, path, _ in one.upstream.seen[before:]} <= {"/v1/fleet/x"}


def test_nobody_without_a_members_certificate_is_heard(one: Consortium, foreign: Consortium) -> None:
    ca, proxy, egress = (one.made / part for part in ("authority/ca.pem", "proxy", "sites/hospital-a/egress"))
    stranger = foreign.made / "sites" / "hospital-a" / "egress"
    before = len(one.upstream.seen)
    assert one.ask("/v1/fleet/x", client_context(ca)) == 400  # none
    assert (
        one.ask("/v1/fleet/x", client_context(ca, stranger / "client.pem", stranger / "tls.key")) == 400
    )  # another authority's
    assert one.ask("/v1/fleet/x", client_context(ca, proxy / "proxy.pem", proxy / "proxy.key")) == 400  # a server's
    assert (
        one.ask("/v1/fleet/x", client_context(ca, egress / "loopback.pem", egress / "tls.key")) == 400
    )  # a member's, but a server's
    assert one.upstream.seen[before:] == []
    assert one.ask("/v1/fleet/x") == 200


def test_a_member_that_the_configuration_does_not_list_is_not_heard(tmp_path: Path) -> None:
    """How a site is shut out: its certificate is good for months, its line is gone."""
    consortium = provisioned(tmp_path)
    configuration = consortium.made / "proxy" / "nginx.conf"
    text = configuration.read_text("utf-8")
    assert text.count('"CN=hospital-b,O=retina" 1;') == 1
    configuration.write_text(text.replace('"CN=hospital-b,O=retina" 1;', ""), encoding="utf-8")
    with consortium.upstream.serving(consortium.made), nginx(consortium.made / "proxy", consortium.proxy_port):
        assert consortium.ask("/v1/fleet/x", consortium.member("hospital-b")) == 403
        assert consortium.upstream.seen == []
        assert consortium.ask("/v1/fleet/x", consortium.member("hospital-a")) == 200


def test_older_tls_is_refused(one: Consortium) -> None:
    context = one.member()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert one.talk(b"POST /v1/fleet/x HTTP/1.0\r\n\r\n", context) == b""


def test_flowers_largest_message_passes_and_a_larger_body_does_not(one: Consortium) -> None:
    before = len(one.upstream.seen)
    assert one.ask("/v1/fleet/push-object", body=bytes(FLOWER_FRAME_BYTES)) == 200
    assert one.upstream.seen[before:] == [("POST", "/v1/fleet/push-object", FLOWER_FRAME_BYTES)]
    assert one.ask("/v1/fleet/push-object", headers="Content-Length: 6291457\r\n") == 413
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    assert one.ask("/v1/fleet/push-object", body=chunk * 7 + b"0\r\n\r\n", headers="Transfer-Encoding: chunked\r\n") in (413, 0)
    assert len(one.upstream.seen) == before + 1


def test_the_proxy_believes_no_other_superlink(tmp_path: Path, foreign: Consortium) -> None:
    """Another process took the SuperLink's port, with a certificate of another authority or with a site's own."""
    consortium = provisioned(tmp_path)
    with nginx(consortium.made / "proxy", consortium.proxy_port):
        with consortium.upstream.serving(foreign.made):
            assert consortium.ask("/v1/fleet/x") == 502
        loopback = consortium.made / "sites" / "hospital-a" / "egress"
        for name, source in (("superlink.pem", "loopback.pem"), ("superlink.key", "tls.key")):
            (consortium.made / "operator" / name).write_bytes((loopback / source).read_bytes())
        with consortium.upstream.serving(consortium.made):
            assert consortium.ask("/v1/fleet/x") == 502
    assert consortium.upstream.seen == []


def test_a_sites_way_out_shows_its_certificate_for_those_who_cannot(one: Consortium) -> None:
    """As a SuperNode asks: no client certificate, the consortium's authority trusted."""
    context = client_context(one.made / "authority" / "ca.pem")
    before = len(one.upstream.seen)
    head = b"HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: "
    body = bytes(FLOWER_FRAME_BYTES)
    ask = b"POST /v1/fleet/push-object " + head + b"%d\r\n\r\n" % len(body) + body
    assert first_status(one.talk(ask, context, one.egress_port)) == 200
    assert one.upstream.seen[before:] == [("POST", "/v1/fleet/push-object", len(body))]
    for target in (b"/v1/control/start-run", b"/v1/fleet/../control", b"/"):
        assert first_status(one.talk(b"POST " + target + b" " + head + b"0\r\n\r\n", context, one.egress_port)) == 403
    assert first_status(one.talk(b"GET /health " + head + b"0\r\n\r\n", context, one.egress_port)) == 403  # the proxy's word
    assert len(one.upstream.seen) == before + 1


def test_a_sites_way_out_tells_the_doctor_what_is_wrong(tmp_path: Path, foreign: Consortium) -> None:
    """403 all is well (above), 502 no proxy there or another's, 400 the proxy does not know this site."""
    consortium = provisioned(tmp_path)
    egress = consortium.made / "sites" / "hospital-a" / "egress"
    context = client_context(consortium.made / "authority" / "ca.pem")
    health = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    stranger = foreign.made / "proxy"
    with nginx(egress, consortium.egress_port):
        assert first_status(consortium.talk(health, context, consortium.egress_port)) == 502
        with running_copy(stranger, tmp_path / "impostor", foreign.proxy_port, consortium.proxy_port):
            assert first_status(consortium.talk(health, context, consortium.egress_port)) == 502
    unknown = foreign.made / "sites" / "hospital-a" / "egress"
    (egress / "client.pem").write_bytes((unknown / "client.pem").read_bytes())
    loopback_key = (egress / "tls.key").read_bytes()
    (egress / "client.key").write_bytes((unknown / "tls.key").read_bytes())
    assert loopback_key != (egress / "client.key").read_bytes()
    text = (
        (egress / "nginx.conf")
        .read_text("utf-8")
        .replace("proxy_ssl_certificate_key tls.key", "proxy_ssl_certificate_key client.key")
    )
    (egress / "nginx.conf").write_text(text, encoding="utf-8")
    with nginx(consortium.made / "proxy", consortium.proxy_port), nginx(egress, consortium.egress_port):
        assert first_status(consortium.talk(health, context, consortium.egress_port)) == 400


@contextmanager
def running_copy(folder: Path, copy: Path, port: int, new_port: int) -> Iterator[None]:
    """An nginx of another folder, on another port."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            data = path.read_bytes()
            data = data.replace(f":{port} ".encode(), f":{new_port} ".encode()) if path.name == "nginx.conf" else data
            (copy / path.name).write_bytes(data)
    with nginx(copy, new_port):
        yield


@pytest.mark.parametrize("listen", ["0.0.0.0:8443", "[::]:8443", "127.0.0.1:8443"])
@pytest.mark.parametrize("sites", [1, 300])
def test_the_configurations_are_ones_that_nginx_takes(tmp_path: Path, listen: str, sites: int) -> None:
    """With the longest names, and many of them."""
    program = require("nginx")
    text = f'name = "{"n" * 63}"\n[operator]\naddress = "127.0.0.1:8443"\nlisten = "{listen}"\n'
    text += "".join(f'[[site]]\nname = "{"s" * 59}-{number:03}"\n' for number in range(sites))
    provision(write_document(tmp_path, text), tmp_path / "made")
    for folder in (tmp_path / "made" / "proxy", tmp_path / "made" / "sites" / f"{'s' * 59}-000" / "egress"):
        command = [program, "-t", "-p", str(folder), "-e", "error.log", "-c", "nginx.conf"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "[warn]" not in done.stderr


def test_a_supernode_comes_online_through_both_proxies(tmp_path: Path) -> None:
    """The commands of the operator's and the site's README.txt, as they stand, with the real SuperLink and SuperNode."""
    require("nginx")
    one = provisioned(tmp_path)
    operator, site = one.made / "operator", one.made / "sites" / "hospital-a"
    steps = [line[2:] for line in (operator / "README.txt").read_text("utf-8").splitlines() if line.startswith("$ ")]
    superlink, superexec, proxy, *registrations, run = steps[1:]
    for step, words in ((superlink, "flower-superlink"), (superexec, "flower-superexec"), (proxy, "nginx"), (run, "urna run")):
        assert step.startswith(words)
    assert '$ nginx -p "$PWD/egress" -e error.log -c nginx.conf' in (site / "README.txt").read_text("utf-8")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FLWR_", "PYTHON"))}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"

    def shell(step: str) -> list[str]:
        return ["bash", "-c", f"{steps[0]}; exec {step}"]

    def answer(step: str) -> str:
        done = subprocess.run(shell(step), cwd=operator, env=kept, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    supernode = f"flower-supernode --superlink 127.0.0.1:{one.egress_port} --root-certificates ca.pem"
    supernode += " --auth-supernode-private-key node.key --isolation process --superexec-auth-secret-file runner.secret"
    supernode += f" --host 127.0.0.1 --port {free_ports(1)[0]}"
    (site / "runner.secret").write_text("secret" * 8, encoding="utf-8")
    with ExitStack() as stack:
        stack.enter_context(running(*shell(superlink), cwd=operator, port=one.upstream.port, environment=kept))
        stack.enter_context(running(*shell(superexec), cwd=operator, environment=kept))
        stack.enter_context(nginx(one.made / "proxy", one.proxy_port))
        stack.enter_context(nginx(site / "egress", one.egress_port))
        for registration in registrations:
            answer(registration)
        assert '"online"' not in answer("flwr supernode list retina --format json")
        stack.enter_context(running(*shell(supernode), cwd=site, environment=kept))
        deadline = time.monotonic() + START_SECONDS
        while '"online"' not in (found := answer("flwr supernode list retina --format json")):
            assert time.monotonic() < deadline, found
            time.sleep(0.5)
    assert "POST /v1/fleet/activate-node 200" in (one.made / "proxy" / "access.log").read_text("utf-8")
    assert "CN=hospital-a,O=retina" in (one.made / "proxy" / "access.log").read_text("utf-8")
