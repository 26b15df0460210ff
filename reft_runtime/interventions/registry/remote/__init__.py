"""Intervention files at URLs: in object stores and on hubs, read through fsspec."""
