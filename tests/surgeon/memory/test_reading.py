"""What one call's grafts read, where its layers lie on several devices."""

from dataclasses import replace

import torch

from surgeon.memory.reading import Reading


def devices(reading: Reading) -> dict[str, set[str]]:
    """Of every field that holds tensors."""

    def of(value: object) -> set[str]:
        if isinstance(value, torch.Tensor):
            return {value.device.type}
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
        return set().union(*map(of, inner))

    return {name: each for name, value in vars(reading).items() if (each := of(value))}


def test_all_but_the_entries_goes_along_to_the_layers_device() -> None:
    """Entries are where their layer computed them; what a call brings is made beside the first layer."""
    angles = {"mixin": (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))}
    reading = Reading(
        entries={"1.mixin": (torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8))},
        mask=torch.ones((1, 3), dtype=torch.bool),
        visual_token_mask=torch.ones((1, 2), dtype=torch.bool),
        rotary=angles,
        entering=torch.zeros(1, 2, 16),
        entering_rotary=angles,
    )
    assert set().union(*devices(reading).values()) == {"cpu"}
    brought = {"mask", "visual_token_mask", "rotary", "entering", "entering_rotary"}
    assert devices(reading.to("meta")) == {"entries": {"cpu"}} | {name: {"meta"} for name in brought}
    words = replace(reading, visual_token_mask=None, entering=None, entering_rotary={}).to("meta")
    assert devices(words) == {"entries": {"cpu"}, "mask": {"meta"}, "rotary": {"meta"}}
