"""Engines laid out for a server."""
