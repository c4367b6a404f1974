"""Memory that the model calls for, in a runtime: formed by the bundle's graphs, and fed in one chunk.

In torch latents are fed one a step, because rows of a batch call for memory when they like. A row that is fed alone
takes them all at once, with the same cache afterwards.
"""

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.onnx.manifest import Manifest
from exporters.runtime.remembered import Remembered
from exporters.runtime.state import State, Tokens
from surgeon.errors import InputError
from surgeon.inputs import ModelInputs
from surgeon.memory.memory_tokens import SHORT, Kind
from surgeon.memory.query_builder import POSITIONS

if TYPE_CHECKING:
    from exporters.runtime.runtime import GraphName, Runtime


def invoke(runtime: "Runtime", state: State, row: int, kind: Kind) -> np.ndarray:
    """As `Runtime.invoke`."""
    assert runtime.memory_tokens is not None
    count = runtime.memory_tokens.latents[kind] + 1
    runtime.check_room(state, [np.zeros(count if each == row else 0) for each in range(state.batch_size)])
    remembered = state.remembered[row]
    start = time.perf_counter()
    latents = form(runtime, remembered, kind)
    remembered.forming_seconds.append(time.perf_counter() - start)

    ids = np.full(count, runtime.memory_tokens.placeholder, dtype=np.int64)
    ids[-1] = runtime.memory_tokens.end[kind]
    tokens = Tokens(
        inputs_embeds=np.concatenate((latents, runtime.embed_tokens(ids[None, -1:])), axis=1),
        position_ids=runtime.text_positions(state.next_positions[row] + np.arange(count)[None]),
        write_indices=state.lengths[row : row + 1].copy(),
        logits_indices=np.array([[count - 1]], dtype=np.int64),
        visual_token_mask=np.zeros((1, count), dtype=bool),
        deepstack=runtime.no_deepstack(1, count),
    )
    logits = runtime.prefill(state, slice(row, row + 1), tokens)
    remembered.since = remembered.length + count - 1
    state.lengths[row] += count
    state.next_positions[row] += count
    remember(runtime, state, row, 0, ids)
    last: np.ndarray = logits[0, -1]
    return last


def form(runtime: "Runtime", remembered: Remembered, kind: Kind) -> np.ndarray:
    """The latents of one invocation, fp32 [1, N, d]."""
    vismem = runtime.manifest.vismem
    assert vismem is not None
    hidden_states = remembered.seen_and_said()[None]
    queries = runtime.run("query_builder", {"hidden_states": hidden_states})["queries"]
    feeds = {"hidden_states": hidden_states, "queries": queries}
    if kind == SHORT and vismem.short_former == "vision":
        if not remembered.images:
            raise InputError("short memory looks at an image again, and this row has none; call for long memory")
        feeds = {"queries": queries, **runtime.family.short_former_inputs(runtime.config, remembered.images)}
    graph: GraphName = "short_former" if kind == SHORT else "long_former"
    latents = runtime.run(graph, feeds)["latents"]  # type: ignore[arg-type]  # arrays: nothing stays on the device
    return latents  # type: ignore[return-value]


def remember(runtime: "Runtime", state: State, row: int, batch_row: int, ids: np.ndarray) -> None:
    """The text tokens `ids` [n] of a row were fed, as row `batch_row` of the latest call."""
    _add(runtime, state, row, batch_row, ids, np.zeros(len(ids), dtype=bool))


def remember_prompt(
    runtime: "Runtime",
    state: State,
    row: int,
    batch_row: int,
    ids: np.ndarray,
    visual_token_mask: np.ndarray,
    inputs: ModelInputs,
) -> None:
    """A row's prompt was fed, with its images; visual_token_mask bool [S], padded as the batch is."""
    _add(runtime, state, row, batch_row, ids, visual_token_mask[: len(ids)])
    state.remembered[row].images += zip(inputs.pixel_values[row], inputs.grids[row], strict=True)


def _add(runtime: "Runtime", state: State, row: int, batch_row: int, ids: np.ndarray, is_visual: np.ndarray) -> None:
    assert state.last_hidden_state is not None and runtime.memory_tokens is not None
    is_text = ~is_visual & (ids != runtime.memory_tokens.placeholder)
    state.remembered[row].add(state.last_hidden_state[batch_row, : len(ids)], is_visual, is_text)


def nothing_remembered(manifest: Manifest, rows: int) -> list[Remembered]:
    """Of each row of a new request; an empty list for a model that calls for no memory."""
    vismem = manifest.vismem
    if vismem is None:
        return []
    return [Remembered(vismem.window, POSITIONS - vismem.query - vismem.window) for _ in range(rows)]


def former_shapes(manifest: Manifest) -> dict[str, tuple[Any, Any]]:
    """What the graphs that form memory are, and what the record says of them, by the words of a message."""
    vismem = manifest.vismem
    if vismem is None:
        return {}
    expected = {
        "query_builder": ("queries", vismem.query),
        "short_former": ("latents", vismem.short),
        "long_former": ("latents", vismem.long),
    }
    compared: dict[str, tuple[Any, Any]] = {}
    for name, (output, count) in expected.items():
        graph = manifest.graphs.get(name)
        if graph is not None:
            counts = [port.shape[1] for port in graph.outputs if port.name == output]
            compared[f"graphs.{name} ({output})"] = (counts, [count])
    if (short := manifest.graphs.get("short_former")) is not None:
        reads_states = any(port.name == "hidden_states" for port in short.inputs)
        former = "language" if reads_states else "vision"
        compared["graphs.short_former"] = (former, vismem.short_former)
    return compared
