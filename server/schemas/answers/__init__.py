"""The one description of what the routes answer, from which `openapi.json` is made.

Nothing is checked against it while the server runs: answers are written as plain dictionaries,
which mypy checks where they are literals; the tests hold every answer that they get to it
(`tests/helpers/published.py`).
"""
