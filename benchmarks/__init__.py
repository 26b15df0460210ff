"""Side-by-side measurements; every figure in README comes from a script here."""
