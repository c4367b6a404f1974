"""Answer a prompt about images with a bundle of Qwen3-VL or Qwen2.5-VL: without surgeon, torch and transformers.

Written from docs/bundle.md and docs/bundle-runtime.md. Needs numpy, onnxruntime, tokenizers, Pillow and Jinja2, and a
bundle in fp32 or fp16:

    python examples/bundle_runtime.py BUNDLE --image cat.png --prompt "What is this?"
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image, ImageOps
from tokenizers import Tokenizer

Arrays = dict[str, np.ndarray]
FAMILIES = ("qwen3_vl", "qwen2_5_vl")
VISION = {"spatial_merge_size": 2, "num_position_embeddings": 2304, "patch_size": 14, "window_size": 112}
IMAGE_PROCESSOR: dict[str, Any] = {
    **{"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "resample": 3, "rescale_factor": 1 / 255},
    **{"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
    "size": {"shortest_edge": 3136, "longest_edge": 1003520},
}


class Graph:
    """One graph of a bundle. What `caches` holds is read and written in place."""

    def __init__(self, bundle: Path, description: dict[str, Any]) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(bundle / description["file"], options, providers=["CPUExecutionProvider"])
        self.inputs = {port["name"]: port for port in description["inputs"]}
        self.outputs = [port["name"] for port in description["outputs"]]
        self.caches: dict[str, ort.OrtValue] = {}

    def zeros(self, name: str, **sizes: int) -> np.ndarray:
        """Zeros of an input's shape; sizes: of its symbols."""
        port = self.inputs[name]
        return np.zeros([sizes.get(size, size) for size in port["shape"]], port["dtype"])

    def __call__(self, feeds: Arrays) -> Arrays:
        """The outputs but for caches. Feeds that the graph does not take are left out."""
        binding = self.session.io_binding()
        for name, port in self.inputs.items():
            if name in self.caches:
                binding.bind_ortvalue_input(name, self.caches[name])
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], port["dtype"]))
        for name in self.outputs:
            cache = self.caches.get(name.replace("present_", "past_"))
            binding.bind_ortvalue_output(name, cache) if cache else binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        values = zip(self.outputs, binding.get_outputs(), strict=True)
        return {name: value.numpy() for name, value in values if not name.startswith("present_")}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# -- images ------------------------------------------------------------------------------------------------------------
def patches(path: Path, settings: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """An image's `pixel_values` [N, C], and its grid: rows and columns of patches."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    patch, merge = settings["patch_size"], settings["merge_size"]
    block, sides, pixels = patch * merge, (image.height, image.width), image.height * image.width
    least = settings.get("min_pixels") or settings["size"]["shortest_edge"]
    most = settings.get("max_pixels") or settings["size"]["longest_edge"]
    h, w = (round(side / block) * block for side in sides)
    if h * w > most:
        h, w = (max(block, math.floor(side / math.sqrt(pixels / most) / block) * block) for side in sides)
    elif h * w < least:
        h, w = (math.ceil(side * math.sqrt(least / pixels) / block) * block for side in sides)
    scaled = np.asarray(image.resize((w, h), settings["resample"]), np.float64) * settings["rescale_factor"]
    mean, std = (np.array(settings[name], np.float32) for name in ("image_mean", "image_std"))
    x = (scaled.astype(np.float32) - mean) / std
    x = x.reshape(h // block, merge, patch, w // block, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    x = np.repeat(x[:, :, :, :, :, None], settings["temporal_patch_size"], axis=5)
    return x.reshape(h // patch * (w // patch), -1), (h // patch, w // patch)


def patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Row and column of each patch [N, 2], in the order of `pixel_values`."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    block, within = row // merge * (columns // merge) + column // merge, row % merge * merge + column % merge
    return np.stack((row, column), 1)[np.lexsort((within, block))]


def learned_positions(positions: np.ndarray, rows: int, columns: int, side: int) -> Arrays:
    """Of Qwen3-VL: four places in its table of positions for each patch, and their weights."""
    index, weight = np.zeros(1, np.int64), np.ones(1, np.float32)
    for axis, length, step in ((0, rows, [0, 0, 1, 1]), (1, columns, [0, 1, 0, 1])):
        place = positions[:, axis, None].astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
        floor = np.floor(place)
        weight = weight * np.maximum(1 - np.abs(place - floor - np.array(step, np.float32)), np.float32(0))
        index = index * side + np.minimum(floor.astype(np.int64) + step, side - 1)
    return {"pos_index": index, "pos_weight": weight}


def windows(rows: int, columns: int, merge: int, side: int) -> Arrays:
    """Of Qwen2.5-VL: merged blocks by window, and each window's patches."""
    row, column = np.divmod(np.arange(rows // merge * (columns // merge)), columns // merge)
    window = row // side * math.ceil(columns // merge / side) + column // side
    order, lengths = np.argsort(window, kind="stable"), np.bincount(window) * merge**2
    first, slot = (np.cumsum(lengths) - lengths)[:, None], np.arange((side * merge) ** 2)
    filled = slot < lengths[:, None]
    gather = {"window_gather": np.where(filled, first + slot, first), "window_scatter": np.flatnonzero(filled)}
    return gather | {"window_index": order, "window_inverse": np.argsort(order), "window_kv_len": lengths}


# -- prompts -----------------------------------------------------------------------------------------------------------
def chat(folder: Path, prompt: str, images: int) -> str:
    """The chat template's text, with a placeholder for each image."""
    config, older = read(folder / "tokenizer_config.json"), read(folder / "chat_template.json")
    file = folder / "chat_template.jinja"
    template = older.get("chat_template") or (file.read_text("utf-8") if file.is_file() else config["chat_template"])
    special = {name: token for name, token in config.items() if name.endswith("_token") and token is not None}
    special = {name: token["content"] if isinstance(token, dict) else token for name, token in special.items()}
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return jinja.from_string(template).render(messages=messages, add_generation_prompt=True, **special)


def position_ids(token_ids: list[int], image: int, sizes: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """Time, height and width of each token [3, 1, S], and the id of the first generated one; sizes: rows and columns of
    each image's visual tokens."""
    ids: list[tuple[int, int, int]] = []
    n, images = 0, iter(sizes)
    while len(ids) < len(token_ids):
        if token_ids[len(ids)] != image:
            ids.append((n, n, n))
            n += 1
        else:
            h, w = next(images)
            ids += [(n, n + r, n + c) for r in range(h) for c in range(w)]
            n += max(h, w)
    return np.array(ids).T[:, None], n


# -- answers -----------------------------------------------------------------------------------------------------------
def generate(bundle: Path, prompt: str, images: list[Path], max_new_tokens: int) -> tuple[list[int], str]:
    """The greedy answer: its token ids and its text. Raises ValueError for what this example does not run."""
    manifest, folder = json.loads((bundle / "bundle.json").read_text()), bundle / "processor"
    family, dtype, limit = manifest["source"]["model_type"], manifest["dtype"], manifest["max_length"]
    if family not in FAMILIES or dtype == "bfloat16":
        raise ValueError(f"{bundle} is of {family} in {dtype}; this example runs {FAMILIES} in float32 and float16")
    graphs = {name: Graph(bundle, description) for name, description in manifest["graphs"].items()}
    decoder, causal, image_token = graphs["decoder"], manifest["visibility"] == "causal", manifest["tokens"]["image"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vision = VISION | read(folder / "config.json")["vision_config"]
    own = read(folder / "processor_config.json").get("image_processor") or read(folder / "preprocessor_config.json")

    # Images: features [M, d] and deepstack [K, M, d] of each
    encoded, sizes, merge = [], [], vision["spatial_merge_size"]
    for path in images:
        pixel_values, grid = patches(path, IMAGE_PROCESSOR | own)
        feeds = {"pixel_values": pixel_values, "position_ids": patch_positions(*grid, merge)}
        if family == "qwen3_vl":
            feeds |= learned_positions(feeds["position_ids"], *grid, math.isqrt(vision["num_position_embeddings"]))
        else:
            feeds |= windows(*grid, merge, vision["window_size"] // vision["patch_size"] // merge)
        encoded.append(graphs["vision"](feeds))
        sizes.append((grid[0] // merge, grid[1] // merge))

    # The prompt: token ids and position ids
    placeholder = tokenizer.id_to_token(image_token)
    text, *parts = chat(folder, prompt, len(images)).split(placeholder)
    if len(parts) != len(images):
        raise ValueError(f"the prompt has {placeholder} in its text: name images with --image instead")
    for (h, w), part in zip(sizes, parts, strict=True):
        text += placeholder * (h * w) + part
    ids = tokenizer.encode(text).ids
    if len(ids) > limit:
        raise ValueError(f"the prompt has {len(ids)} tokens, and the bundle was exported for {limit}")
    positions, n = position_ids(ids, image_token, sizes)

    # Prefill
    visual, length = np.array([ids]) == image_token, len(ids)
    feeds = graphs["embed"]({"input_ids": np.array([ids])})
    feeds |= {"position_ids": positions, "write_indices": np.array([0]), "logits_indices": np.array([[length - 1]])}
    feeds["visual_token_mask"] = visual
    if "deepstack" in decoder.inputs:
        feeds["deepstack"] = decoder.zeros("deepstack", B=1, S=length)
    if images:
        features = np.concatenate([outputs["features"] for outputs in encoded])
        feeds["inputs_embeds"][visual] = features
        if "deepstack" in feeds:
            feeds["deepstack"][:, visual] = np.concatenate([outputs["deepstack"] for outputs in encoded], axis=1)
    if "memory" in graphs and images:
        places = np.flatnonzero(visual)
        feeds |= graphs["memory"]({"visual_embeds": features[None], "media_position_ids": positions[:, :, places]})
        feeds["memory_mask"] = (places <= np.arange(length)[:, None] if causal else np.full(len(places), True))[None]
    elif "memory" in graphs:  # one slot that no token sees: keys, values and mask are zero
        names = [name for name in decoder.inputs if name.startswith("memory_")]
        feeds |= {name: decoder.zeros(name, B=1, S=length, M=1) for name in names}
    pasts = [name for name in decoder.inputs if name.startswith("past_")]
    decoder.caches = {name: ort.OrtValue.ortvalue_from_numpy(decoder.zeros(name, B=1)) for name in pasts}
    logits = decoder(feeds)["logits"]

    # Decode
    feeds |= {"logits_indices": np.array([[0]]), "visual_token_mask": np.array([[False]])}
    if "deepstack" in feeds:
        feeds["deepstack"] = decoder.zeros("deepstack", B=1, S=1)
    if "memory_mask" in feeds and causal:
        feeds["memory_mask"] = feeds["memory_mask"][:, -1:]  # a prompt's last token sees what all after it see
    answer: list[int] = []
    while len(answer) < min(max_new_tokens, limit - length):
        if answer:
            feeds |= graphs["embed"]({"input_ids": np.array([answer[-1:]])})
            feeds["position_ids"] = np.full((3, 1, 1), n + len(answer) - 1)
            feeds["write_indices"] = np.array([length + len(answer) - 1])
            logits = decoder(feeds)["logits"]
        answer.append(int(logits[0, 0].argmax()))
        if answer[-1] in manifest["tokens"]["eos"]:
            break
    return answer, tokenizer.decode(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a prompt about images with a bundle of a Qwen-VL model.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("--image", dest="images", type=Path, action="append", default=[], help="repeat for more")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print the token ids too")
    options = parser.parse_args()
    try:
        ids, text = generate(options.bundle, options.prompt, options.images, options.max_new_tokens)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps({"text": text, "token_ids": ids}) if options.json else text)


if __name__ == "__main__":
    main()
