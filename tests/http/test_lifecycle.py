"""The process: what it says when it is ready, how it drains, how it dies; and the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from reft_runtime.errors import ConfigError
from server.banner import SHOWN
from server.cli.main import app
from server.lifecycle import FLUSH_SECONDS
from server.metrics_port import MAX_CONNECTIONS
from server.settings import Settings, load_settings
from server.variables import tell_unknown_variables
from tests.helpers.forked import Forked
from tests.http import serve_fake
from tests.http.conftest import completion

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
"""What Prometheus 2.x accepts, best first."""


class Process:
    """A server process, up to its banner."""

    def __init__(self, engine: dict[str, Any], options: dict[str, Any]) -> None:
        self.process = Forked(serve_fake.main, json.dumps(engine), json.dumps(options))
        lines = []
        for line in self.process.output:
            lines.append(line)
            if line.startswith("  -d"):
                break
        self.banner = "".join(lines)
        found = re.search(r"^Serving at (http://\S+)$", self.banner, re.MULTILINE)
        assert found, self.banner
        self.url = found[1]
        self.process.read_on()
        self.log, self.end = self.process.log, self.process.end


@contextmanager
def running(engine: dict[str, Any] | None = None, **options: Any) -> Iterator[Process]:
    process = Process(engine or {}, options)
    try:
        yield process
    finally:
        process.process.kill()
        process.end()


def stream_in_thread(url: str, results: list[str], count: int = 1) -> list[threading.Thread]:
    """Start streams; each appends all it got, once it has ended."""

    def stream() -> None:
        body = completion(max_tokens=30, stream=True)
        try:
            results.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30).text)
        except httpx.TransportError:
            results.append("cut off")

    threads = [threading.Thread(target=stream) for _ in range(count)]
    for thread in threads:
        thread.start()
    while f"reft:num_requests_running {count}.0" not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.02)
    return threads


def test_banner_and_its_command() -> None:
    with running(api_key="sesame") as server:
        assert "tiny (TinyForCausalLM" in server.banner
        assert "emoji@d1d1d1d1d1d1" in server.banner
        assert "broken.safetensors: Cut off." in server.banner
        assert "sesame" not in server.banner
        command = server.banner[server.banner.index("curl") :]
        environment = {**os.environ, "REFT_API_KEY": "sesame"}
        answer = subprocess.run(
            command, shell=True, env=environment, capture_output=True, text=True, check=True
        )
        body = json.loads(answer.stdout)
        assert body["model"] == SHOWN
        assert body["choices"][0]["message"]["content"].startswith("abc")


def test_drain() -> None:
    results: list[str] = []
    with running({"step_seconds": 0.05}) as server:
        threads = stream_in_thread(server.url, results, 8)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            time.sleep(0.02)
        assert httpx.get(f"{server.url}/readyz").json() == {"status": "draining"}
        assert httpx.get(f"{server.url}/livez").status_code == 200
        refused = httpx.post(f"{server.url}/v1/completions", json=completion())
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        for thread in threads:
            thread.join()
        assert server.end() == 0
        assert "running requests get 30 seconds to finish" in "".join(server.log)
    assert len(results) == 8
    for text in results:
        assert '"finish_reason":"length"' in text
        assert text.endswith("data: [DONE]\n\n")


def test_drain_ends_what_takes_too_long() -> None:
    results: list[str] = []
    answers: list[httpx.Response] = []
    with running({"step_seconds": 0.3}, drain_seconds=0.5) as server:
        threads = stream_in_thread(server.url, results)
        threads += answer_in_threads(server.url, answers)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.end() == 0
        log = "".join(server.log)
    assert '"code":"draining"' in results[0]
    assert results[0].endswith("data: [DONE]\n\n")
    assert_told(answers, "draining")
    assert log.count("Ending the requests that are left") == 1
    assert "Traceback" not in log


def answer_in_threads(
    url: str, answers: list[httpx.Response], count: int = 5
) -> list[threading.Thread]:
    """Ask for whole answers, and wait until they are being made, with one stream beside them."""

    def ask() -> None:
        body = completion(max_tokens=90)
        answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    while f"reft:num_requests_running {count + 1}.0" not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.02)
    return threads


def assert_told(answers: list[httpx.Response], code: str) -> None:
    """All were told to try again, and why."""
    assert len(answers) == 5
    for answer in answers:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == code


def test_second_signal() -> None:
    results: list[str] = []
    with running({"step_seconds": 0.5}) as server:
        threads = stream_in_thread(server.url, results)
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(2) != 0
        threads[0].join()
    assert results == ["cut off"]


def test_the_engines_end_is_the_servers() -> None:
    results: list[str] = []
    answers: list[httpx.Response] = []
    with running({"step_seconds": 0.3, "die_after": 2.0}) as server:
        threads = stream_in_thread(server.url, results)
        for thread in threads + answer_in_threads(server.url, answers):
            thread.join()
        assert server.end() == 1
        log = "".join(server.log)
    assert '"code":"engine_dead"' in results[0]
    assert results[0].endswith("data: [DONE]\n\n")
    assert_told(answers, "engine_dead")
    assert log.count("The engine stopped") == 1
    assert "Traceback" not in log


def test_who_does_not_take_an_answer_does_not_keep_the_server() -> None:
    with running({"names": 30_000}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            client.recv(1)
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == 0
            log = "".join(server.log)
    assert "Cutting off 1 clients that did not take an answer" in log
    assert "Traceback" not in log


def test_a_body_that_stalls_does_not_keep_the_server() -> None:
    with running() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                b"content-length: 9\r\n\r\n{"
            )
            httpx.get(f"{server.url}/readyz")  # until then it has read what came before
            server.process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            assert server.end() == 0
            assert time.monotonic() - begun < FLUSH_SECONDS
            assert b"HTTP/1.1 503 " in client.recv(1000)
            log = "".join(server.log)
    assert "Cutting off" not in log
    assert "Traceback" not in log


def test_an_upload_under_way_is_kept() -> None:
    """It is made before the registry is closed, which would keep it in a temporary folder."""
    with running() as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(
                b"PUT /v1/interventions/new HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\na"
            )
            httpx.get(f"{server.url}/readyz")  # until then it has read what came before
            server.process.send_signal(signal.SIGTERM)
            while listens(server.url):
                time.sleep(0.02)
            client.sendall(b"b")
            assert b"HTTP/1.1 201 " in client.recv(1000)
        assert server.end() == 0


def listens(url: str) -> bool:
    """Whether a server takes connections."""
    try:
        httpx.get(f"{url}/livez")
    except httpx.TransportError:
        return False
    return True


def without_times(text: str) -> str:
    """Metrics without the one whose value is the time of the scrape."""
    return re.sub(r"^vllm:lora_requests_info.*$", "", text, flags=re.MULTILINE)


def test_metrics_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running(api_key="sesame", metrics_port=port) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        headers = {"authorization": "Bearer sesame", "accept": PROMETHEUS_2}
        ours = httpx.get(f"{server.url}/metrics", headers=headers)
        other = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=headers)
        assert without_times(other.text) == without_times(ours.text)
        assert other.headers["content-type"] == ours.headers["content-type"]
        assert "\nreft:num_requests_running 0.0\n" in ours.text
        for path, status in (("metrics", 200), ("v1/models", 404)):
            head = httpx.head(f"http://127.0.0.1:{port}/{path}")
            assert (head.status_code, head.content) == (status, b"")
        assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 404
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_silent_clients_of_the_metrics_port_make_room() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with running(metrics_port=port) as server, ExitStack() as stack:
        silent = []
        for _ in range(40):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
            client.sendall(b"GET /met")
            silent.append(client)
        assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 200
        for client in silent[: 41 - MAX_CONNECTIONS]:
            with suppress(ConnectionResetError):
                assert client.recv(1) == b"", "the oldest are closed"
        silent[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[-1].recv(1)
    assert "Traceback" not in "".join(server.log)


@pytest.mark.parametrize("option", ["--port", "--metrics-port"])
def test_a_port_in_use_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("server.cli.main.start_engine", lambda settings: pytest.fail("loaded"))
    monkeypatch.setattr("server.logs.configure_logging", lambda settings: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", "--port", "0", option, str(port)])
    assert isinstance(done.exception, ConfigError)
    assert f"Cannot listen on 127.0.0.1 port {port}: Address already in use" in str(done.exception)
    assert f"and {option}." in str(done.exception)


def test_headers_are_bounded() -> None:
    with running() as server:
        headers = {"x": "y" * 40_000}
        assert httpx.get(f"{server.url}/livez", headers=headers).status_code == 431
        assert httpx.get(f"{server.url}/livez").status_code == 200


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({"port": 70_000}, ["--port (or REFT_PORT): input should be less than or equal to 65535."]),
        ({"port": "x"}, ["--port (or REFT_PORT): input should be a valid integer"]),
        ({"dtype": "int3"}, ["--dtype (or REFT_DTYPE): input should be 'auto'"]),
        ({"max_running": 0, "threads": 0}, ["--max-running", "--threads"]),
        ({"drain_seconds": -1}, ["--drain-seconds"]),
        (
            {"interventions": ["a", ""]},
            ["--interventions (or REFT_INTERVENTIONS): give folders or"],
        ),
    ],
)
def test_bad_settings(options: dict[str, Any], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(options)
    given = caught.value.message.splitlines()
    assert len(given) == len(lines)
    assert all(got.startswith(wanted) for got, wanted in zip(given, lines, strict=True))


def test_a_variable_that_is_no_setting_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for known in ("REFT_PORT", "reft_model", "REFT_CACHE", "REFT_URL"):
        monkeypatch.setenv(known, "secret")
    for service in ("REFT_SERVICE_HOST", "REFT_SERVICE_PORT_HTTP", "REFT_X_PORT_80_TCP_ADDR"):
        monkeypatch.setenv(service, "secret")
    for unknown in ("REFT_PROT", "reft_api_kye", "REFT_DRAIN"):
        monkeypatch.setenv(unknown, "secret")
    tell_unknown_variables()
    told = [line for line in caplog.messages if "_PYTHON" not in line]  # the clients' tests' own
    assert told == [
        "REFT_DRAIN is no setting of this server, and is ignored.",
        "REFT_PROT is no setting of this server, and is ignored. Did you mean REFT_PORT?",
        "reft_api_kye is no setting of this server, and is ignored. Did you mean REFT_API_KEY?",
    ]


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_a_mistyped_variable_is_told_before_the_model_is_loaded(
    command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(settings: Settings) -> None:
        raise ConfigError("loaded")

    monkeypatch.setattr("server.cli.main.start_engine", start)
    monkeypatch.setattr("server.logs.configure_logging", lambda settings: None)
    monkeypatch.setenv("REFT_DRIAN_SECONDS", "60")
    arguments = ["serve", "--port", "0"] if command == "serve" else ["generate", "Hi"]
    CliRunner().invoke(app, arguments)
    assert any("Did you mean REFT_DRAIN_SECONDS?" in line for line in caplog.messages)


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_PORT", "9000")
    monkeypatch.setenv("REFT_API_KEY", "")
    monkeypatch.setenv("REFT_MAX_RUNNING", "3")
    settings = load_settings({"max_running": None, "host": "::1"})
    assert (settings.port, settings.max_running, settings.host) == (9000, 3, "::1")
    assert settings.api_key is None
    assert settings.engine_options()["max_running"] == 3
    assert "threads" not in settings.engine_options()


@pytest.mark.parametrize(
    ("value", "sources"),
    [
        ("a", ("a",)),
        ("a, s3://bucket/b", ("a", "s3://bucket/b")),
        ('["a,b", "c"]', ("a,b", "c")),
        ("", ()),
    ],
)
def test_sources_in_the_environment(
    value: str, sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFT_INTERVENTIONS", value)
    assert load_settings({}).interventions == sources
    assert load_settings({"interventions": ["x,y", "file:///z", "gs://b"]}).folders == [
        Path("x,y"),
        Path("/z"),
    ]


def test_sources_may_be_given_several_times(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = []

    def record(model: str, **options: Any) -> None:
        given.append(options)
        raise ConfigError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REFT_INTERVENTIONS", "z")
    monkeypatch.setattr("reft_runtime.front.engine.Engine", record)
    monkeypatch.setattr("server.logs.configure_logging", print)  # it would be for all tests
    for folder in ("a,b", "z"):
        (tmp_path / folder).mkdir()
    several = ["--interventions", "a,b", "--interventions", "s3://bucket/c"]
    for arguments in (several, []):
        with pytest.raises(ConfigError, match="enough"):
            app(["serve", "--port", "0", *arguments], standalone_mode=False)
    assert [options["interventions"] for options in given] == [("a,b", "s3://bucket/c"), ("z",)]


def test_the_prefix_cache_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def record(model: str, **options: Any) -> None:
        given.append(options)
        raise ConfigError("enough")

    monkeypatch.setattr("reft_runtime.front.engine.Engine", record)
    monkeypatch.setattr("server.logs.configure_logging", print)  # it would be for all tests
    for arguments in (["--no-prefix-cache"], ["--prefix-cache"], []):
        with pytest.raises(ConfigError, match="enough"):
            app(["serve", "--port", "0", *arguments], standalone_mode=False)
    assert [options["prefix_cache"] for options in given] == [False, True, True]


def test_help_names_every_option_and_loads_no_model() -> None:
    code = "import sys; from server.cli.main import main; sys.argv = ['reft', *sys.argv[1:]]\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    for arguments in (["--help"], ["serve", "--help"], ["--version"]):
        command = [sys.executable, "-c", code, *arguments]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "Undefined" not in shown
        if arguments[0] == "serve":
            for name in Settings.model_fields:
                assert f"--{name.replace('_', '-')}" in shown
                assert f"REFT_{name.upper()}" in shown


AS_IF_TORCH = "sys.modules['torch'] = sys\n"
"""As where torch is loaded, which takes seconds: what is looked at is its name."""


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_servers_words_are_the_last(status: int) -> None:
    # A library that would speak at the very end, after Python itself, is stood for by an abort.
    code = "import sys, atexit, ctypes\nfrom server.cli import main as cli\n" + AS_IF_TORCH
    code += "libc = ctypes.CDLL(None); libc.__cxa_atexit(libc.abort, None, None)\n"
    code += "def app(**_): print('served'); atexit.register(print, 'left')\n"
    code += f"cli.app = lambda **_: (app(), sys.exit({status}))\ncli.main()"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "served\nleft\n", "")


@pytest.mark.parametrize("closing", [">&-", ">&- 2>&-"])
def test_a_process_without_standard_output_ends_as_any_other(closing: str) -> None:
    code = "import sys; from server.cli import main as cli\n" + AS_IF_TORCH
    code += "cli.app = lambda **_: sys.exit(0 if print('x') is None else 3)\ncli.main()"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} {closing}"
    assert subprocess.run(command, shell=True, check=False).returncode == 0


def test_output_that_is_lost_is_told_by_the_status() -> None:
    code = "import sys; from server.cli import main as cli\n" + AS_IF_TORCH
    code += "sys.stdout = open('/dev/full', 'w')\n"
    code += "cli.app = lambda **_: print('x')\ncli.main()"
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_a_banner_that_nobody_takes_is_no_reason_to_end() -> None:
    process = Forked(serve_fake.main, "{}", "{}", stdout="/dev/full")
    said = ""
    for line in process.output:
        said += line
        if "Standard output cannot be written: No space left" in line:
            process.send_signal(signal.SIGTERM)
    process.end()
    assert "Shutting down" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["serve", "--port", "70000"],
            "--port (or REFT_PORT): input should be less than or equal to 65535.",
        ),
        (
            ["generate", "Hi", "-i", "pirate=much"],
            "intervention: 'pirate=much': what is behind = must be a finite number, the strength, "
            "such as pirate=0.5.",
        ),
    ],
)
def test_command_line_mistakes_give_no_traceback(arguments: list[str], message: str) -> None:
    code = "import sys; from server.cli.main import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"reft: {message}\n"
