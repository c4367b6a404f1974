"""A patched checkpoint's processors are found as its source's are, and code of the source stays behind."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from checkpoints import FAMILIES, has_tokenizer, tiny_checkpoint
from command import assert_refused, run
from family_case import family_cases
from patching import apply

PVM = "pvm:layers=1,latent=32"
pytestmark = pytest.mark.skipif(not has_tokenizer(), reason="needs the demo's tokenizer")


@pytest.fixture(scope="module")
def original_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("side") / "source", "qwen3_vl")


@pytest.fixture
def source(original_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original_checkpoint, tmp_path / "source"))


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**(read(path) if path.exists() else {}), **changes}))


def outcome(auto: Any, directory: Path) -> str:
    """The class that comes out, with those within a processor; or that torchvision is missing."""
    try:
        loaded = auto.from_pretrained(directory)
    except (ImportError, ValueError) as error:
        assert "torchvision" in str(error).lower()
        return "needs torchvision"
    parts = [getattr(loaded, name, None) for name in ("tokenizer", "image_processor", "video_processor")]
    return " ".join(type(part).__name__ for part in (loaded, *parts))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_auto_classes_give_what_they_give_for_the_source(model_type: str, tmp_path: Path) -> None:
    source, patched = tiny_checkpoint(tmp_path / "source", model_type), tmp_path / "patched"
    apply(source, patched, PVM)
    for auto in (AutoProcessor, AutoTokenizer, AutoImageProcessor):
        assert outcome(auto, patched) == outcome(auto, source)
    # a source that names its classes is copied as it is
    for path in source.glob("*processor_config.json"):
        assert read(patched / path.name).items() >= read(path).items()
    described = [read(path) for path in patched.glob("*processor_config.json")]
    named = [each["processor_class"] for each in described if "processor_class" in each]
    assert named == [family_cases()[model_type].processor_class]
    if model_type == "ovis2":  # the one that needs no video processor, which would need torchvision
        assert outcome(AutoProcessor, patched).startswith("Ovis2Processor Qwen2Tokenizer Ovis2ImageProcessor")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_processors_agree_with_torchvision(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    from pairs import image

    source, patched = tiny_checkpoint(tmp_path / "source", model_type), tmp_path / "patched"
    if model_type == "llava_onevision":  # which cannot count its tokens without
        edit(source / "processor_config.json", num_image_tokens=9, vision_feature_select_strategy="full")
    apply(source, patched, PVM)
    plain, processor = (AutoProcessor.from_pretrained(directory) for directory in (source, patched))
    assert type(processor).__name__ == family_cases()[model_type].processor_class
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = plain.apply_chat_template(messages, add_generation_prompt=True)
    photo = image(90, 60)
    expected, inputs = (each(images=[photo], text=[text], return_tensors="pt") for each in (plain, processor))
    assert expected.keys() == inputs.keys()
    assert all(bool((expected[key] == inputs[key]).all()) for key in expected)


def test_model_and_processor_that_are_saved_again_are_found(tmp_path: Path) -> None:
    apply(tiny_checkpoint(tmp_path / "source", "ovis2"), tmp_path / "patched", PVM)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "patched", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "patched")
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert outcome(AutoProcessor, tmp_path / "again") == outcome(AutoProcessor, tmp_path / "source")


def test_classes_that_the_config_alone_implied_are_written_down(source: Path, tmp_path: Path) -> None:
    for name, key in (
        ("tokenizer_config.json", "tokenizer_class"),
        ("preprocessor_config.json", "image_processor_type"),
    ):
        content = read(source / name)
        del content[key]
        (source / name).write_text(json.dumps(content))
    apply(source, tmp_path / "patched", PVM)
    assert outcome(AutoTokenizer, tmp_path / "patched") == outcome(AutoTokenizer, source)
    assert read(tmp_path / "patched" / "tokenizer_config.json")["tokenizer_class"] == "Qwen2Tokenizer"
    assert outcome(AutoImageProcessor, tmp_path / "patched") == outcome(AutoImageProcessor, source)
    described = read(tmp_path / "patched" / "preprocessor_config.json")
    assert described["image_processor_type"] == "Qwen2VLImageProcessor"


def test_the_class_goes_where_it_is_looked_for_first(source: Path, tmp_path: Path) -> None:
    """processor_config.json, as transformers writes it now: the image processor within."""
    described = read(source / "preprocessor_config.json")
    (source / "preprocessor_config.json").unlink()
    edit(source / "processor_config.json", image_processor=described)
    apply(source, tmp_path / "patched", PVM)
    assert read(tmp_path / "patched" / "processor_config.json")["processor_class"] == "Qwen3VLProcessor"
    assert not (tmp_path / "patched" / "preprocessor_config.json").exists()
    edit(source / "processor_config.json", processor_class="Qwen2VLProcessor")  # the source's word holds
    apply(source, tmp_path / "other", PVM)
    assert read(tmp_path / "other" / "processor_config.json")["processor_class"] == "Qwen2VLProcessor"


def test_a_checkpoint_without_a_processor_gets_none(source: Path, tmp_path: Path) -> None:
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            path.unlink()
    apply(source, tmp_path / "patched", PVM)
    assert {path.name for path in (tmp_path / "patched").glob("*config.json")} == {"config.json"}


CODE = {
    "AutoConfig": "configuration_theirs.TheirConfig",
    "AutoModel": "modeling_theirs.TheirModel",
    "AutoProcessor": "processing_theirs.TheirProcessor",
}


@pytest.fixture
def with_code(source: Path) -> Path:
    """A source with code of its own, and every way in which its files lead to it."""
    for name in ("configuration_theirs.py", "modeling_theirs.py", "processing_theirs.py"):
        (source / name).write_text("raise SystemExit('run')\n")
    edit(source / "config.json", auto_map=CODE)
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["processing_theirs.Slow", None]})
    edit(source / "preprocessor_config.json", auto_map={"AutoImageProcessor": "processing_theirs.Images"})
    edit(
        source / "processor_config.json",
        processor_class="TheirProcessor",
        auto_map={"AutoProcessor": "processing_theirs.TheirProcessor"},
        video_processor={"auto_map": {"AutoVideoProcessor": "processing_theirs.Videos"}},
    )
    return source


def test_code_of_the_source_stays_behind_and_is_named(with_code: Path, tmp_path: Path) -> None:
    done = run("patch", with_code, tmp_path / "out", "--pass", PVM, "--json")
    assert done.exit_code == 0
    (warning,) = done.stderr.splitlines()
    for part in (
        "warning: left out",
        "modeling_theirs.py",
        "auto_map of tokenizer_config.json",
        "auto_map of preprocessor_config.json",
        "auto_map of processor_config.json",
        "auto_map of config.json (AutoConfig, AutoModel, AutoProcessor)",
        "--trust-remote-code keeps them",
    ):
        assert part in warning
    assert json.loads(done.stdout)["left_out"][0] == "configuration_theirs.py"
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".safetensors"}
    assert not [name for name in written if "_theirs" in name]
    assert not [name for name, text in written.items() if "_theirs" in text]
    auto_map = read(tmp_path / "out" / "config.json")["auto_map"]
    assert auto_map["AutoConfig"] == "modeling_surgeon.SurgeonConfig"
    assert "AutoProcessor" not in auto_map
    assert read(tmp_path / "out" / "processor_config.json")["processor_class"] == "Qwen3VLProcessor"
    assert outcome(AutoTokenizer, tmp_path / "out").startswith("Qwen2Tokenizer")


def test_code_of_the_source_is_kept_where_that_is_asked_for(with_code: Path, tmp_path: Path) -> None:
    done = run("patch", with_code, tmp_path / "out", "--pass", PVM, "--trust-remote-code")
    assert (done.exit_code, done.stderr) == (0, "")
    for name in ("modeling_theirs.py", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_text() == (with_code / name).read_text()
    auto_map = read(tmp_path / "out" / "config.json")["auto_map"]
    assert auto_map["AutoProcessor"] == CODE["AutoProcessor"]
    assert auto_map["AutoConfig"] == "modeling_surgeon.SurgeonConfig"  # its own come first


def test_this_tools_own_code_is_no_code_of_the_source(source: Path, tmp_path: Path) -> None:
    """A patched checkpoint that is patched again."""
    apply(source, tmp_path / "once", PVM)
    (tmp_path / "once" / "modeling_surgeon.py").write_text("an older one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = apply(tmp_path / "once", tmp_path / "twice", "mixin:layers=0")
    assert report.left_out == []
    assert "SurgeonModel" in (tmp_path / "twice" / "modeling_surgeon.py").read_text()
    assert (tmp_path / "twice" / "surgeon_memory_mixin.py").is_file()


def test_a_processor_file_that_is_not_json_is_one_line(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer_config.json").write_text("{")
    assert_refused(run("patch", source, tmp_path / "out", "--pass", PVM), "tokenizer_config.json", "is not JSON")
    assert not (tmp_path / "out").exists()


def test_every_family_names_video_processors_that_there_are() -> None:
    from surgeon.families import family, supported

    named = {name: family(name).video_processor_class for name in supported()}
    assert named["internvl"] == "InternVLVideoProcessor"
    assert all(hasattr(transformers, name) for name in named.values() if name is not None)
