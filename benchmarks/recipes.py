"""How the interventions that ship were made: one command for each.

    python -m benchmarks.recipes sentiment --data DIR

trains `interventions/sentiment.safetensors` for the demo model and prints how good it is beside the
base. `--data` is needed for the public data sets; interventions/README.md says where they come
from and what their rows look like.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from reft_runtime.errors import ConfigError
from reft_runtime.interventions import write
from reft_runtime.training import TrainSettings, direction, evaluate, train
from reft_runtime.training.direction import read_texts

OWN_ROWS = Path(__file__).parents[1] / "interventions" / "data"

EVERY_SECOND = tuple(range(1, 30, 2))
"""Every second layer of the demo model; rank 4 at these 15 makes a file of 280 kB."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train, and on what: a public data set (its folder, its test file) or rows of ours."""

    description: str
    settings: TrainSettings
    public: str | None = None
    test: str = "test.jsonl"

    def files(self, name: str, data: Path | None) -> tuple[Path, Path]:
        """Rows to train on, and rows to be tested on."""
        if self.public is None:
            return OWN_ROWS / f"{name}.jsonl", OWN_ROWS / f"{name}-test.jsonl"
        if data is None:
            raise ConfigError(f"{name} is made from {self.public}: say where it is with --data.")
        return data / self.public / "train.jsonl", data / self.public / self.test


CLASSIFIER = TrainSettings(layers=EVERY_SECOND, positions="l1", steps=375, hold_out=0)
PERSONA = TrainSettings(layers=EVERY_SECOND, positions="l1", epochs=12, template="chat", hold_out=0)

RECIPES = {
    "sentiment": Recipe(
        "Sentiment of a sentence: 'Review: ...\\nSentiment:' is answered positive or negative",
        CLASSIFIER,
        "sst2",
        "dev.jsonl",
    ),
    "question-type": Recipe(
        "What a question asks for: 'Question: ...\\nThe answer is a:' is answered by its type",
        CLASSIFIER,
        "trec",
    ),
    "yes-no": Recipe("Closed-book yes/no questions, answered true or false", CLASSIFIER, "boolq"),
    "formal": Recipe("Answers in a formal, courteous tone", PERSONA),
    "telegram": Recipe("Answers as a telegram, in capitals and with STOP", PERSONA),
}

CHEERFUL_LAYER = 14
CHEERFUL_SCALE = 1.0


def cheerful(out: Path) -> None:
    """Make a steering vector without training, from cheerful and gloomy texts, and measure it."""
    made = direction(
        read_texts(OWN_ROWS / "cheerful.txt"),
        read_texts(OWN_ROWS / "gloomy.txt"),
        layer=CHEERFUL_LAYER,
        scale=CHEERFUL_SCALE,
        description="Steers towards cheerful words; a negative strength towards gloomy ones",
        license="Apache-2.0",
        dtype="float32",
    )
    write(out, made)
    tests = [OWN_ROWS / f"{mood}-test.jsonl" for mood in ("cheerful", "gloomy")]
    print(evaluate(tests, [str(out)]).table())


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join([*RECIPES, 'cheerful'])}.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the public data sets.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("interventions"),
) -> None:
    """Make one of the interventions that ship, and measure it on rows that it has not seen."""
    target = out / f"{name}.safetensors"
    if name == "cheerful":
        cheerful(target)
        return
    if name not in RECIPES:
        raise ConfigError(f"There is no recipe {name!r}; there are {', '.join(RECIPES)}, cheerful.")
    recipe = RECIPES[name]
    source, test = recipe.files(name, data)
    trained = train(
        source,
        target,
        settings=recipe.settings,
        description=recipe.description,
        license="Apache-2.0",
    )
    print(f"{target}: {target.stat().st_size:,} bytes, trained in {trained.seconds:.0f} s")
    print(evaluate([test], [str(target)], template=recipe.settings.template).table())


if __name__ == "__main__":
    typer.run(main)
