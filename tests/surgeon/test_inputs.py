"""Prompts and images as model inputs, with the demo's tokenizer and image processor."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLProcessor,
    LlavaOnevisionProcessor,
    Ovis2Processor,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen3VLProcessor,
)

from checkpoints import DEMO, PLAIN_TYPES, TILED_TYPES, has_tokenizer, tiny_checkpoint
from surgeon.errors import CheckpointError, InputError
from surgeon.inputs import Inputs, Prompt

pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")


def noise(width, height, mode="RGB", seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode).resize((width, height))


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def checkpoint(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def inputs(checkpoint):
    return Inputs.from_directory(checkpoint)


@pytest.fixture(scope="module")
def demo():
    return Inputs.from_directory(DEMO)


def test_a_batch_with_two_images_one_and_none(checkpoint, inputs):
    prompts = [
        Prompt("What is it?", (noise(120, 90), noise(64, 200, seed=1))),
        Prompt("And this?", (noise(90, 90),), system="Be brief."),
        Prompt("Hello"),
    ]
    batch = inputs.prepare(prompts)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.mm_token_type_ids.dtype == np.int64
    assert [len(row) for row in batch.grids] == [len(row) for row in batch.pixel_values] == [2, 1, 0]
    for i, prompt in enumerate(prompts):
        tokens = batch.input_ids[i, -batch.lengths[i] :]  # padded on the left
        assert (batch.input_ids[i, : -batch.lengths[i]] == tokenizer.pad_token_id).all()
        expected = ""
        if prompt.system:
            expected += f"<|im_start|>system\n{prompt.system}<|im_end|>\n"
        expected += "<|im_start|>user\n"
        for image, pixels, grid in zip(prompt.images, batch.pixel_values[i], batch.grids[i], strict=True):
            alone = processor(images=image, return_tensors="np")
            np.testing.assert_array_equal(pixels, alone["pixel_values"])
            assert list(grid) == alone["image_grid_thw"][0].tolist()
            expected += "<|vision_start|>" + "<|image_pad|>" * (grid[1] * grid[2] // 4) + "<|vision_end|>"
        expected += f"{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokens) == expected
        np.testing.assert_array_equal(batch.mm_token_type_ids[i], batch.input_ids[i] == image_token_id)
    right = inputs.prepare(prompts, padding_side="right")
    for i, length in enumerate(batch.lengths):
        np.testing.assert_array_equal(right.input_ids[i, :length], batch.input_ids[i, -length:])
        assert right.attention_mask[i].tolist() == [1] * length + [0] * (right.input_ids.shape[1] - length)


def test_model_kwargs_run_the_model(checkpoint, inputs):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    batch = inputs.prepare([Prompt("One", (noise(80, 120),)), Prompt("None at all, but longer")])
    kwargs = batch.model_kwargs(torch.float32)
    with torch.no_grad():
        together = model(**kwargs).logits[:, -1]
        generated = model.generate(**kwargs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == batch.input_ids.shape[1] + 4
    alone = inputs.prepare([Prompt("One", (noise(80, 120),))])
    with torch.no_grad():
        logits = model(**alone.model_kwargs(torch.float32)).logits[0, -1]
    torch.testing.assert_close(together[0], logits, rtol=0, atol=1e-4)


def test_model_kwargs_dtypes_and_absent_images(inputs):
    with_image = inputs.prepare([Prompt("a", (noise(80, 80),))]).model_kwargs(torch.bfloat16)
    assert with_image["pixel_values"].dtype == torch.bfloat16
    assert with_image["image_grid_thw"].dtype == with_image["input_ids"].dtype == torch.int64
    without = inputs.prepare([Prompt("a")]).model_kwargs(torch.bfloat16)
    assert set(without) == {"input_ids", "attention_mask", "mm_token_type_ids"}


def test_conversations_with_images_in_several_turns(demo):
    first, second = noise(80, 80), noise(100, 80, seed=1)
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "image": first}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "image", "image": second}, {"type": "text", "text": "And now?"}]},
    ]
    batch = demo.prepare([conversation])
    text = demo.decode(batch.input_ids[0], skip_special_tokens=False)
    assert text.index("See") < text.index("<|image_pad|>") < text.index("Yes.") < text.rindex("<|image_pad|>")
    assert len(batch.grids[0]) == 2
    assert conversation[0]["content"][1]["image"] is first  # the caller's conversation is left alone


def test_a_patched_checkpoints_inputs_are_its_sources(checkpoint, inputs, tmp_path):
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = f"surgeon_{config['model_type']}"
    config["surgeon"] = {"grafts": [{"kind": "pvm", "layers": [1], "latent": 16}]}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]  # so that it must be found by the family's config
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    patched = Inputs.from_directory(tmp_path)
    prompt = [Prompt("What is it?", (noise(120, 90),))]
    ours, theirs = patched.prepare(prompt), inputs.prepare(prompt)
    np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
    np.testing.assert_array_equal(ours.pixel_values[0][0], theirs.pixel_values[0][0])
    assert patched.family is inputs.family and patched.config.model_type == inputs.config.model_type


def test_special_ids(demo):
    settings = json.loads((DEMO / "generation_config.json").read_text())
    assert demo.eos_token_ids == tuple(settings["eos_token_id"])
    assert demo.pad_token_id == settings["pad_token_id"]
    ids = demo.tokenizer("a red star").input_ids
    assert demo.decode([*ids, demo.eos_token_ids[0]]) == "a red star"


def test_an_older_chat_template_file_goes_first(tmp_path):
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    template = "{% for m in messages %}{{ m.content[-1].text }}!{% endfor %}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert Inputs.from_directory(tmp_path).render(Prompt("Hi").messages()) == "Hi!"


# ---------------------------------------------------------------- images


def bad_image(kind, folder):
    path = folder / f"{kind}.png"
    if kind == "text":
        path.write_text("not an image")
    elif kind == "truncated":
        noise(200, 200).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "animated":
        path = folder / "moving.gif"
        noise(20, 20).save(path, save_all=True, append_images=[noise(20, 20, seed=1), noise(20, 20, seed=2)])
    elif kind == "huge":
        noise(40, 30).save(path)
    elif kind == "long":
        noise(900, 4).save(path)
    elif kind == "video":
        path = folder / "film.MP4"
    elif kind == "folder":
        path = folder
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("text", "is not an image"),
        ("truncated", "cannot be read: .*truncated"),
        ("animated", "has 3 frames: video is not supported yet"),
        ("huge", "is too large"),
        ("long", "aspect ratio"),
        ("video", "video is not supported yet"),
        ("folder", "cannot be read"),
    ],
)
def test_bad_images_are_told_by_name_and_reason(demo, tmp_path, monkeypatch, kind, reason):
    path = bad_image(kind, tmp_path)
    if kind == "huge":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match=reason) as caught:
        demo.prepare([Prompt("What?", (path,))])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- prompts and directories that cannot be used


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("see <|image_pad|>"), "1 image placeholder.s. .* for 0 image"),
        (Prompt("see <|video_pad|>"), "video is not supported yet"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "video is not supported yet"),
        (
            [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "a"}}]}],
            "video is not supported yet",
        ),
        ([{"role": "user", "content": [{"video": "a.mp4"}]}], "video is not supported yet"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}], "a part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}], "of type 'image_url'"),
        ([{"role": "user", "content": [{"words": "hello"}]}], "a part of type None"),
        ([{"role": "user", "content": ["hello"]}], "a part of the conversation is 'hello'"),
        ([{"role": "user", "content": [{"type": "image", "image": "https://a.b/c.png"}]}], "is not a file"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], "its keys: .'image', 'type'"),
    ],
)
def test_prompts_that_cannot_be_used(demo, prompt, message):
    with pytest.raises(InputError, match=message) as caught:
        demo.prepare([prompt])
    assert "\n" not in str(caught.value)


def test_parts_need_no_type(demo):
    """`text` and `image` alone say what a part is, as the published chat templates take them."""
    with_types = Prompt("What?", (noise(64, 64),)).messages()
    without = [
        {"role": m["role"], "content": [{k: v for k, v in c.items() if k != "type"} for c in m["content"]]}
        for m in with_types
    ]
    expected, prepared = (demo.prepare([messages]) for messages in (with_types, without))
    assert prepared.input_ids.tolist() == expected.input_ids.tolist()


def test_no_prompt(demo):
    with pytest.raises(InputError, match="no prompt"):
        demo.prepare([])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer .*tokenizer.json"),
        ("preprocessor_config.json", "no image processor .*preprocessor_config.json"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_directories_without_a_part(tmp_path, missing, message):
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", missing))
    with pytest.raises(CheckpointError, match=message) as caught:
        Inputs.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_damaged_files(tmp_path):
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Inputs.from_directory(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        Inputs.from_directory(tmp_path)


# ---------------------------------------------------------------- tiles


@pytest.fixture(scope="module", params=PLAIN_TYPES)
def plain_checkpoint(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=TILED_TYPES)
def tiled_checkpoint(request, tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def tiled(tiled_checkpoint):
    return Inputs.from_directory(tiled_checkpoint)


# rows and columns, where 42 pixels a side make a tile and six tiles are the most
TILE_GRIDS = {
    "internvl": {(40, 40): (1, 1), (100, 50): (1, 2), (50, 100): (2, 1), (130, 90): (2, 3), (900, 4): (1, 6)},
    # transformers takes the rows that this family's rule finds for columns, and the other way round
    "ovis2": {(40, 40): (1, 1), (100, 50): (3, 2), (50, 100): (2, 3), (130, 90): (3, 2), (900, 4): (6, 1)},
}


@pytest.mark.parametrize("size", [(40, 40), (100, 50), (50, 100), (130, 90), (900, 4)])
def test_a_tiled_images_grid_is_rows_and_columns(tiled, size):
    grid = TILE_GRIDS[tiled.family.model_type][size]
    image = noise(*size)
    pixels, tile_grid = tiled.process_image(image)
    assert tile_grid == (1, *grid)
    layout = tiled.family.tile_layout(tiled.config)
    assert pixels.shape == (layout.tiles(tile_grid), 3, 42, 42) and pixels.dtype == np.float32
    rows, columns = grid
    # the tiles, put together by the grid, are the image as scaled onto the canvas
    settings = {"crop_to_patches": False, "size": {"height": 42 * rows, "width": 42 * columns}}
    canvas = tiled.image_processor(image, return_tensors="np", **settings)["pixel_values"][0]
    tiles = pixels[-rows * columns :] if layout.thumbnail == "first" else pixels[: rows * columns]
    together = tiles.reshape(rows, columns, 3, 42, 42).transpose(2, 0, 3, 1, 4).reshape(canvas.shape)
    np.testing.assert_array_equal(together, canvas)
    thumbnail = tiled.image_processor(image, return_tensors="np", crop_to_patches=False)["pixel_values"][0]
    np.testing.assert_array_equal(pixels[0 if layout.thumbnail == "first" else -1], thumbnail)


@pytest.mark.parametrize(("settings", "grid"), [({"max_patches": 1}, (1, 1, 1)), ({"min_patches": 4}, (1, 2, 2))])
def test_the_image_processors_own_limits_hold(tiled_checkpoint, tmp_path, settings, grid):
    shutil.copytree(tiled_checkpoint, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    pixels, tile_grid = Inputs.from_directory(tmp_path).process_image(noise(90, 90))
    assert tile_grid == grid and len(pixels) == (5 if grid[1] == 2 else 1)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": {"height": 28, "width": 28}}, InputError, "tiles are 28 x 28 pixels, the vision tower takes 42 x 42"),
        ({"image_processor_type": "CLIPImageProcessor"}, CheckpointError, "CLIPImageProcessor.*should name"),
    ],
)
def test_an_image_processor_that_does_not_fit(tiled_checkpoint, tmp_path, settings, error, message):
    shutil.copytree(tiled_checkpoint, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(error, match=message):
        Inputs.from_directory(tmp_path).process_image(noise(90, 90))


def test_model_kwargs_of_mixed_rows_run_the_model(plain_checkpoint):
    inputs = Inputs.from_directory(plain_checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(plain_checkpoint, dtype=torch.float32)
    prompts = [Prompt("Two", (noise(80, 120), noise(90, 90))), Prompt("One", (noise(100, 50),)), Prompt("None")]
    batch = inputs.prepare(prompts)
    kwargs = batch.model_kwargs(torch.float32)
    with torch.no_grad():
        together = model(**kwargs).logits[:, -1]
        generated = model.generate(**kwargs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == batch.input_ids.shape[1] + 4
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = model(**inputs.prepare([prompt]).model_kwargs(torch.float32)).logits[0, -1]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- against transformers' processor


@pytest.mark.parametrize("named", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", None])
def test_the_image_processor_is_the_same_on_every_machine(tmp_path, named):
    """transformers takes torchvision's where it is installed, as here, whatever the settings say."""
    pytest.importorskip("torchvision")
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings.pop("image_processor_type", None)
    path.write_text(json.dumps(settings | ({} if named is None else {"image_processor_type": named})))
    assert type(AutoImageProcessor.from_pretrained(tmp_path)).__name__ == "Qwen2VLImageProcessor"
    inputs, image = Inputs.from_directory(tmp_path), noise(300, 200)
    assert type(inputs.image_processor).__name__ == "Qwen2VLImageProcessorPil"
    expected = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image, return_tensors="np")
    np.testing.assert_array_equal(inputs.process_image(image)[0], expected["pixel_values"])


class NoVideoProcessor:
    """Stands in for the one that cannot be made without torchvision; no video reaches it."""

    merge_size = temporal_patch_size = 2


PROCESSORS = {
    "qwen3_vl": Qwen3VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "internvl": InternVLProcessor,
    "ovis2": Ovis2Processor,
    "llava_onevision": LlavaOnevisionProcessor,
}


def make_processor(checkpoint, inputs, monkeypatch, stand_in):
    """The checkpoint's processor: whole where torchvision is there, or with a stand-in for its video processor. Both
    have the image processor that computes with Pillow: torchvision's pixels are slightly other ones."""
    pillow = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    if not stand_in:
        pytest.importorskip("torchvision")
        processor = AutoProcessor.from_pretrained(checkpoint)
        assert type(processor) is PROCESSORS[inputs.family.model_type]
        processor.image_processor = pillow
        return processor
    processor_class = PROCESSORS[inputs.family.model_type]
    taken = inspect.signature(processor_class).parameters
    path = checkpoint / "processor_config.json"
    options = json.loads(path.read_text()) if path.is_file() else {}
    monkeypatch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
    if "video_processor" in taken:
        options["video_processor"] = NoVideoProcessor()
    return processor_class(pillow, inputs.tokenizer, chat_template=inputs.tokenizer.chat_template, **options)


def assert_as_the_processor_does(inputs, processor, conversations):
    expected = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    kwargs = inputs.prepare(conversations).model_kwargs()
    assert set(kwargs) == set(expected)
    for name, tensor in kwargs.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("stand_in", [False, True], ids=["torchvision", "pillow"])
def test_tokens_and_pixels_are_the_processors(checkpoint, inputs, tmp_path, monkeypatch, stand_in):
    processor = make_processor(checkpoint, inputs, monkeypatch, stand_in)
    transparent = noise(64, 200, "RGBA", seed=2)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    noise(120, 90).save(files[0])
    transparent.save(files[1])
    noise(80, 80).convert("P").save(files[2])
    conversations = [
        Prompt("What is it?", (noise(120, 90), transparent)).messages(),
        Prompt("And these?", tuple(map(str, files)), system="Be brief.").messages(),
        Prompt("Hello").messages(),
    ]
    assert_as_the_processor_does(inputs, processor, conversations)


@pytest.mark.parametrize("stand_in", [False, True], ids=["torchvision", "pillow"])
def test_tiles_and_tokens_are_the_processors(plain_checkpoint, tmp_path, monkeypatch, stand_in):
    inputs = Inputs.from_directory(plain_checkpoint)
    processor = make_processor(plain_checkpoint, inputs, monkeypatch, stand_in)
    transparent = noise(64, 200, "RGBA", seed=2)
    transparent.save(tmp_path / "0.png")
    noise(80, 80).convert("P").save(tmp_path / "1.png")
    conversations = [
        Prompt("What is it?", (noise(130, 90), transparent, noise(40, 40))).messages(),
        Prompt("And these?", (str(tmp_path / "0.png"), str(tmp_path / "1.png")), system="Be brief.").messages(),
        Prompt("And this?", (noise(300, 250),)).messages(),
        [
            {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "image": noise(90, 30)}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
            {"role": "user", "content": [{"type": "image", "image": noise(30, 90)}, {"type": "text", "text": "Now?"}]},
        ],
        Prompt("Hello").messages(),
    ]
    assert_as_the_processor_does(inputs, processor, conversations)
