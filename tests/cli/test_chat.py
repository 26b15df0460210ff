"""`reft chat`, `compare` and `sweep`: the same of a server and of a model in the process."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_runtime import Engine, SamplingParams
from reft_runtime.client import Server
from reft_runtime.errors import ConfigError, InvalidRequest, NotFound
from reft_runtime.interventions import Edit, Intervention, write
from reft_runtime.reaching import NotServed
from server.cli import backend as backends
from server.cli.backend import BASE, Ask, Backend, LocalBackend, RemoteBackend
from server.cli.conversation import Chat, read_message
from server.cli.main import app
from server.cli.sweep import read_strengths
from server.settings import Settings
from tests.e2e.conftest import served
from tests.helpers.tokenizer import tiny_tokenizer
from tests.interventions.make import loreft_tensors
from tests.training.make import ROWS, SHAPE, folder, jsonl, model

OPTIONS = dict.fromkeys(
    ("model", "interventions", "state_dir", "device", "dtype", "max_model_len", "threads")
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and two interventions, one of which takes one message."""
    path = tmp_path_factory.mktemp("chat")
    folder(path / "model")
    (path / "served").mkdir()
    for seed, (name, template) in enumerate([("talk", "chat"), ("once", "a {prompt}")]):
        edits = [Edit(2, "f1+l2", loreft_tensors(seed, SHAPE.hidden_size))]
        made = Intervention.build(SHAPE, edits, template=template)
        write(path / "served" / f"{name}.safetensors", made)
    return path


@pytest.fixture(scope="module")
def options(place: Path) -> list[str]:
    given = ["--model", str(place / "model"), "--interventions", str(place / "served")]
    return [*given, "--dtype", "float32"]


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    with (
        Engine(model(), tokenizer=tiny_tokenizer(), interventions=place / "served") as engine,
        served(engine, Settings()) as address,
    ):
        yield address
        engine.check_integrity()


@pytest.fixture(scope="module")
def local(place: Path) -> Iterator[Backend]:
    given = {"model": str(place / "model"), "interventions": str(place / "served")}
    backend = LocalBackend({**OPTIONS, **given, "dtype": "float32"})
    yield backend
    backend.close()


@pytest.fixture(params=["server", "process"])
def backend(request: pytest.FixtureRequest, url: str, local: Backend) -> Backend:
    return RemoteBackend(Server(url)) if request.param == "server" else local


def reft(*arguments: str, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, arguments, input=stdin)


def talk(backend: Backend, *lines: str, options: tuple[str, ...] = (), tokens: int = 4) -> Chat:
    """A chat after these lines, whose input has ended."""
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    sampling = SamplingParams(max_tokens=tokens, temperature=0)
    chat = Chat(backend, sampling, list(options), None)
    chat.run(read)
    return chat


def test_both_answer_alike(url: str, local: Backend, backend: Backend) -> None:
    sampling = SamplingParams(max_tokens=6, temperature=0)
    messages = [{"role": "user", "content": "good"}]
    asks = [
        Ask(messages, applied, sampling, trace=True)
        for applied in (BASE, backend.resolve(["talk"]), backend.resolve(["talk=0.5", "talk=-1"]))
    ]
    replies = backend.answers(asks)
    wanted = (BASE, local.resolve(["talk"]), local.resolve(["talk=0.5", "talk=-1"]))
    own = local.answers([Ask(messages, applied, sampling, trace=True) for applied in wanted])
    for reply, same in zip(replies, own, strict=True):
        assert (reply.text, reply.tokens) == (same.text, same.tokens)
        assert reply.trace.kl == pytest.approx(same.trace.kl, rel=1e-4, abs=1e-6)
        assert len(reply.trace.edits) == len(same.trace.edits)
        [ratios], [wanted_ratios] = reply.trace.log_ratios, same.trace.log_ratios
        assert ratios == pytest.approx(wanted_ratios, abs=1e-4)
        assert len(ratios) == reply.tokens
    assert replies[0].trace.kl == pytest.approx(0, abs=1e-6)
    assert replies[1].trace.kl > 0
    pieces: list[str] = []
    streamed = backend.answer(Ask(messages, asks[1].applied, sampling), pieces.append)
    assert "".join(pieces) == streamed.text == replies[1].text
    assert streamed.tokens == replies[1].tokens
    assert streamed.prompt_tokens == replies[1].prompt_tokens
    pieces.clear()
    traced = backend.answer(asks[1], pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == traced.text == replies[1].text
    assert traced.trace.edits == replies[1].trace.edits
    assert traced.trace.kl == pytest.approx(replies[1].trace.kl, rel=1e-4)
    [ratios], [again] = replies[1].trace.log_ratios, traced.trace.log_ratios
    assert again == pytest.approx(ratios, abs=1e-4)


def test_turns_and_commands(
    backend: Backend, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    talk(
        backend,
        "good",
        "",
        "/use talk=2",
        "bad",
        "/strength -0.5",
        "/system the end",
        f"/save {file}",
        f"/save {file}",
        "/compare talk talk+talk=0.5",
        "/reset",
        "/compare",
        "/uze",
        "/use tallk",
        "/strength once 1",
        "/use -",
        "/strength 1",
        "/help",
        "/quit",
        "never",
    )
    said = capsys.readouterr()
    row = json.loads(file.read_text())
    assert row["interventions"] == ["talk=-0.5"]
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in row["messages"]][0:4:3] == ["the end", "bad"]
    for message in row["messages"]:
        if message["role"] == "assistant":
            assert message["content"] in said.out
    heads = [line for line in said.out.splitlines() if "cut off at" in line]
    assert [head.split("  ")[0] for head in heads] == ["base", "talk", "talk+talk=0.5"]
    assert "first token" in heads[1]
    assert "first token" not in heads[0]
    assert "/strength [NAME] NUMBER" in said.out
    for message in (
        "Applied: talk=2.",
        "Applied: talk=-0.5.",
        "Cut off at 4 tokens",
        f"/save: {file} cannot be written: File exists.",
        "there is none yet",
        "there is no command /uze. Did you mean `/use`?",
        "Did you mean `talk`?",
        "/strength: once is not applied.",
        "/strength: nothing is applied",
    ):
        assert message in said.err
    assert "never" not in said.out


def test_a_template_for_one_message(backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    alone = talk(backend, "good", options=("once",))._turns
    later = talk(backend, "bad", "/trace", "good", options=("once",))._turns
    assert later[-2:] == alone
    said = capsys.readouterr().err
    assert said.count("each question is asked by itself") == 2
    assert re.search(r"once +2 +block_output", said)


def test_a_question_that_is_refused_is_forgotten(
    backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = talk(backend, "good " * 300, "good")
    assert [turn["role"] for turn in chat._turns] == ["user", "assistant"]
    assert capsys.readouterr().err.count("reft: ") == 1


def test_an_answer_is_stopped_and_the_chat_goes_on(
    backend: Backend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, signals = type(backend).answer, [signal.SIGINT]

    def interrupted(self: Backend, ask: Ask, say: Any, think: Any) -> Any:
        def told(piece: str) -> None:
            say(piece)
            if signals and piece:
                os.kill(os.getpid(), signals.pop())

        return answer(self, ask, told)

    monkeypatch.setattr(type(backend), "answer", interrupted)
    chat = talk(backend, "good", "/reset", "good", tokens=200)
    said = capsys.readouterr()
    assert said.err.count("Stopped.") == 1
    stopped = said.out.splitlines()[0]
    assert len(stopped) < len(chat._turns[1]["content"])
    assert chat._turns[1]["content"].startswith(stopped)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", '"""'], "one"),
        (['"""one"""'], "one"),
        (['""""""'], ""),
    ],
)
def test_a_message_of_several_lines(lines: list[str], message: str) -> None:
    left = iter(lines)
    assert read_message(lambda prompt: next(left)) == message
    assert not list(left)


def test_control_characters_do_not_reach_the_terminal(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteBackend(Server(url))

    def answer(ask: Ask, say: Any, think: Any) -> Any:
        say("a\x1b]0;title\x07b\n")
        return backends.Reply("", 1, 1, "stop")

    monkeypatch.setattr(remote, "answer", answer)
    talk(remote, "Hi")
    assert capsys.readouterr().out.startswith("a\ufffd]0;title\ufffdb\n")


def test_what_is_thought_is_shown_apart_and_an_empty_answer_is_one(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteBackend(Server(url))

    def answer(ask: Ask, say: Any, think: Any) -> Any:
        empty = ask.messages[-1]["content"] == "Quiet"
        for thought, piece in [("", ""), ("Hm", ""), (".", ""), ("", "" if empty else "Yes.")]:
            think(thought)
            say(piece)
        return backends.Reply("", 1, 1, "stop")

    monkeypatch.setattr(remote, "answer", answer)
    chat = talk(remote, "Quiet", "Well?")
    assert [turn["content"] for turn in chat._turns] == ["Quiet", "", "Well?", "Yes."]
    said = capsys.readouterr()
    assert said.out == "\nYes.\n\n"
    assert "Hm.Hm.\n\n" in said.err


def test_compare(url: str, options: list[str]) -> None:
    columns = ["-i", "talk", "-i", "once=0.5", "-i", "talk+talk=2", "--max-tokens", "4"]
    theirs = reft("compare", "good", *columns, "--url", url, "--json")
    mine = reft("compare", "good", *columns, *options, "--json")
    answers = json.loads(theirs.stdout)
    assert [a["interventions"] for a in answers] == ["base", "talk", "once=0.5", "talk+talk=2"]
    for one, other in zip(answers, json.loads(mine.stdout), strict=True):
        # The two are computed in batches of their own, which may round otherwise.
        nats = {
            name: pytest.approx(other[name], rel=1e-4, abs=1e-6)
            for name in ("kl", "mean_log_ratio")
        }
        assert one == {**other, **nats}
    shown = reft("compare", "good", *columns, "--url", url, "--no-base").stdout
    heads = [line.split("  ")[0] for line in shown.splitlines() if "first token" in line]
    assert heads == ["talk", "once=0.5", "talk+talk=2"]
    for column in ("tallk", "talk+tallk"):
        ended = reft("compare", "good", "-i", column, "--url", url)
        assert isinstance(ended.exception, NotServed)
        assert "Did you mean `talk`?" in ended.exception.message
    assert isinstance(reft("compare", "good", "--no-base", "--url", url).exception, ConfigError)
    file = reft("compare", "good", "-i", "./x.safetensors", "--url", url)
    assert "reft push ./x.safetensors" in str(file.exception)


def test_sweep(url: str, options: list[str], tmp_path: Path) -> None:
    common = ["sweep", "good", "-i", "talk", "--strengths=-1:1:1", "--max-tokens", "4"]
    data = str(jsonl(tmp_path / "rows.jsonl", ROWS[:4]))
    picture = tmp_path / "sweep.svg"
    theirs = reft(*common, "--url", url, "--json", "--eval", data, "--plot", str(picture))
    points = json.loads(theirs.stdout)
    assert [point["strength"] for point in points] == [-1, 0, 1]
    assert points[1]["kl"] == pytest.approx(0, abs=1e-6)
    assert points[2]["kl"] > 0
    assert points[1]["mean_log_ratio"] == 0 != points[2]["mean_log_ratio"]
    assert {point["metric"] for point in points} == {"accuracy"}
    assert all(point["score"] in (0, 0.25, 0.5, 0.75, 1) for point in points)
    assert "strength" in picture.read_text()
    assert isinstance(reft(*common, "--json", "--plot", "-").exception, ConfigError)
    drawn = reft(*common, "--url", url, "--plot", "-")
    assert drawn.stdout_bytes.startswith(b"\x89PNG")
    shown = reft(*common, *options)
    assert drawn.stderr == shown.stdout
    head, *lines = shown.stdout.splitlines()
    assert head.split() == ["strength", "tokens", "first", "mean", "answer"]
    assert [line.split()[:2] for line in lines[:3]] == [["-1", "4"], ["0", "4"], ["1", "4"]]


def test_a_sweep_with_scores_loads_the_model_once(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, begun = Engine.__init__, list[object]()

    def counted(self: Engine, *given: Any, **named: Any) -> None:
        begun.append(self)
        begin(self, *given, **named)

    monkeypatch.setattr(Engine, "__init__", counted)
    data = str(jsonl(tmp_path / "rows.jsonl", ROWS[:4]))
    common = ["sweep", "good", "-i", "talk", "--strengths=0,1", "--max-tokens", "2"]
    points = json.loads(reft(*common, *options, "--eval", data, "--json").stdout)
    assert [point["metric"] for point in points] == ["accuracy"] * 2
    assert len(begun) == 1


def test_a_sweep_that_cannot_be_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nowhere = ["sweep", "good", "--url", "http://127.0.0.1:9", "-i"]
    for arguments, message in (
        (["talk=2"], "one name, without a strength"),
        (["a+b"], "one name"),
        (["talk", "--strengths", "1:2"], "write FROM:TO:STEP"),
        (["talk", "--plot", "x.txt"], "must end with .png"),
        (["talk"], "no answer from"),
    ):
        ended = reft(*nowhere, *arguments)
        assert isinstance(ended.exception, ConfigError | InvalidRequest)
        assert message in ended.exception.message
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ended = reft(*nowhere, "talk", "--plot", str(tmp_path / "x.png"))
    assert "reft-server[plot]" in str(ended.exception)


@pytest.mark.parametrize(
    ("text", "strengths"),
    [
        ("-1:2:0.75", [-1, -0.25, 0.5, 1.25, 2]),
        ("0:0.3:0.1", [0, 0.1, 0.2, 0.3]),
        ("1:0:-0.5", [1, 0.5, 0]),
        ("0,1", [0, 1]),
        ("0.5", [0.5]),
    ],
)
def test_strengths(text: str, strengths: list[float]) -> None:
    assert read_strengths(text) == strengths


@pytest.mark.parametrize("text", ["", "a", "0:1", "0:1:0", "1:0:1", "0:1:nan", "0:999:500"])
def test_strengths_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="strengths: write FROM:TO:STEP"):
        read_strengths(text)
    with pytest.raises(ConfigError, match="are 1,001, and at most 101 are answered"):
        read_strengths("0:1:0.001")


def test_who_is_asked(url: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that is named; without a model in the process the one of this machine."""
    with pytest.raises(NotFound, match="tallk"):
        backends.open_backend(url, None, OPTIONS).resolve(["tallk"])
    monkeypatch.setattr(backends, "LOCAL_URL", url)
    assert backends.open_backend(None, None, OPTIONS).url == url
    piped = reft("chat", "-i", "talk", *options, "--max-tokens", "2", stdin="good\nbad\n")
    assert "in this process. Applied: talk." in piped.stderr
    assert piped.exit_code == 0
    assert not Server("http://127.0.0.1:9").answers_at_all()


def test_a_terminal(url: str, tmp_path: Path) -> None:
    """Ctrl-C clears what is typed, the history is kept, and Ctrl-D ends."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)  # a key for a command that has just ended would wait for ever
    command = "from server.cli.main import main; main()"
    environment = {**os.environ, "REFT_URL": url, "REFT_CACHE": str(tmp_path), "TERM": "dumb"}
    chat = subprocess.Popen(
        [sys.executable, "-c", command, "chat", "--max-tokens", "2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(theirs)
    try:
        said = _until(ours, "> ")
        assert f"on the server at {url}" in said
        os.write(ours, b"not this\x03")
        _until(ours, "> ", again=b"\x03")
        os.write(ours, b"good\n")
        _until(ours, "> ")
        _ended(chat, ours)
        assert chat.wait() == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(ours)
    assert (tmp_path / "chat_history").read_text() == "good\n"
    assert (tmp_path / "chat_history").stat().st_mode & 0o777 == 0o600


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _ended(chat: subprocess.Popen[bytes], terminal: int) -> None:
    """Press Ctrl-D until the command ends: between two prompts a key may go unseen."""
    deadline = time.monotonic() + 60
    while chat.poll() is None:
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):  # the other side has gone
            os.write(terminal, b"\x04")
            while select.select([terminal], [], [], 1)[0] and os.read(terminal, 4096):
                pass


def _until(terminal: int, end: str, again: bytes = b"") -> str:
    """What is said up to `end`; where it does not come, the key `again` is pressed once more.

    A signal just before readline waits for a key is seen with the next one only.
    """
    said, deadline = "", time.monotonic() + 60
    while not said.endswith(end):
        assert time.monotonic() < deadline, said
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 4096).decode()
        else:
            os.write(terminal, again)
    return said


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "Hi", "-i", "talk+./no.safetensors"],
        ["sweep", "Hi", "-i", "./no.safetensors"],
        ["classify", "Hi", "-i", "./no.safetensors"],
        ["chat", "-i", "./no.safetensors"],
    ],
    ids=lambda command: command[0],
)
def test_a_file_that_is_not_there_is_told_before_a_model_is_loaded(
    options: list[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def load(settings: Settings) -> Engine:
        raise AssertionError("loaded")

    monkeypatch.setattr(backends, "start_engine", load)
    error = reft(*command, *options).exception
    assert isinstance(error, NotFound)
    assert error.message == "no.safetensors: No such file or directory."
