"""HTTP: the FastAPI application, its routes, settings and command line. Imports no torch."""
