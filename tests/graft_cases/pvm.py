"""Persistent Visual Memory."""

from graft_case import GraftCase

CASE = GraftCase("pvm:layers=1,2,latent=32")
