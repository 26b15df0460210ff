"""Schemas of typical extraction tasks and tools, written as pydantic models."""

# ruff: noqa: D101 (a docstring would become part of the schema)

from __future__ import annotations

import copy
from datetime import date, datetime
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, HttpUrl

Email = Annotated[str, Field(json_schema_extra={"format": "email"})]


class Sentiment(BaseModel):
    label: Literal["positive", "negative", "neutral"]
    confidence: float = Field(ge=0, le=1)


class Address(BaseModel):
    street: str
    city: str
    postcode: str = Field(pattern=r"^[0-9]{5}$")
    country: str = Field(min_length=2, max_length=2)


class Person(BaseModel):
    name: str
    age: int | None = Field(default=None, ge=0, le=150)
    email: Email | None = None
    addresses: list[Address] = []


class LineItem(BaseModel):
    description: str
    quantity: int = Field(ge=1)
    unit_price: float = Field(ge=0)


class Invoice(BaseModel):
    number: str
    issued: date
    seller: Person
    buyer: Person
    items: list[LineItem] = Field(min_length=1, max_length=50)
    currency: Literal["EUR", "USD", "GBP"]
    total: float


class Ticket(BaseModel):
    queue: Literal["billing", "technical", "sales", "other"]
    priority: int = Field(ge=1, le=5)
    summary: str = Field(max_length=200)
    tags: list[str] = Field(default=[], max_length=5)


class Entity(BaseModel):
    text: str
    kind: Literal["person", "place", "organisation", "date", "amount"]
    start: int
    end: int


class Entities(BaseModel):
    entities: list[Entity]


class Relation(BaseModel):
    subject: Entity
    predicate: str
    object: Entity


class Graph(BaseModel):
    nodes: list[Entity]
    edges: list[Relation]


class Colour(Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Circle(BaseModel):
    shape: Literal["circle"]
    radius: float = Field(gt=0)
    colour: Colour


class Square(BaseModel):
    shape: Literal["square"]
    side: float = Field(gt=0)
    colour: Colour


class Drawing(BaseModel):
    shapes: list[Annotated[Circle | Square, Field(discriminator="shape")]]


class Comment(BaseModel):
    author: str
    text: str
    replies: list[Comment] = []


class Event(BaseModel):
    title: str
    begins: datetime
    ends: datetime
    attendees: list[Email]
    link: HttpUrl | None = None


class Review(BaseModel):
    product: str
    stars: Literal[1, 2, 3, 4, 5]
    pros: list[str]
    cons: list[str]
    recommended: bool


class Step(BaseModel):
    explanation: str
    output: str


class Reasoning(BaseModel):
    steps: list[Step]
    final_answer: str


class Answer(BaseModel):
    answer: str
    citations: list[int] = Field(max_length=10)
    found: bool


class Settings(BaseModel):
    name: str
    values: dict[str, str | int | float | bool | None]


class Recipe(BaseModel):
    title: str
    minutes: int = Field(multiple_of=5, ge=5, le=600)
    ingredients: list[tuple[str, float, Literal["g", "ml", "pcs"]]]
    steps: list[str] = Field(min_length=1)


class GetWeather(BaseModel):
    """The weather at a place."""

    location: str
    unit: Literal["celsius", "fahrenheit"] = "celsius"


class SearchFlights(BaseModel):
    """Flights between two airports."""

    origin: str = Field(pattern=r"^[A-Z]{3}$")
    destination: str = Field(pattern=r"^[A-Z]{3}$")
    departs: date
    passengers: int = Field(default=1, ge=1, le=9)
    cabin: Literal["economy", "business", "first"] = "economy"


class RunQuery(BaseModel):
    """Rows of a table."""

    table: Literal["customers", "orders", "products"]
    columns: list[str] = Field(min_length=1)
    where: list[Condition] = []
    limit: int = Field(default=100, ge=1, le=1000)


class Condition(BaseModel):
    column: str
    operator: Literal["=", "<", ">", "<=", ">=", "!=", "like"]
    value: str | int | float | bool


class SendMail(BaseModel):
    """Send a mail."""

    to: list[Email] = Field(min_length=1)
    subject: str = Field(max_length=120)
    body: str
    attachments: list[HttpUrl] = []


MODELS: tuple[type[BaseModel], ...] = (
    Sentiment,
    Address,
    Person,
    Invoice,
    Ticket,
    Entities,
    Graph,
    Drawing,
    Comment,
    Event,
    Review,
    Reasoning,
    Answer,
    Settings,
    Recipe,
    GetWeather,
    SearchFlights,
    RunQuery,
    SendMail,
)


def task_schemas() -> dict[str, dict[str, Any]]:
    """Every model's schema by its name, and again as `NAME, strict`."""
    schemas = {}
    for model in MODELS:
        schema = model.model_json_schema()
        schemas[model.__name__] = schema
        schemas[f"{model.__name__}, strict"] = strict(schema)
    return schemas


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy in OpenAI's strict form: objects are closed, all properties required, no defaults."""
    made = copy.deepcopy(schema)
    stack: list[Any] = [made]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("properties"), dict):
                node |= {"additionalProperties": False, "required": list(node["properties"])}
            if "type" in node or "$ref" in node or "anyOf" in node:
                node.pop("default", None)
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)
    return made
