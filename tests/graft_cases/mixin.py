"""CoMemo's mixin layer, whose frequencies are not the backbone's."""

from graft_case import GraftCase

CASE = GraftCase("mixin:layers=0,2,num_heads=3,intermediate=48,rope_theta=5000")
