"""Images of coloured shapes, and what can be said about them.

Everything the demo checkpoint learns comes from here: a `Scene` says what is in
an image, `draw` paints it, and `caption`, `detail`, `ask` and `conversation`
put it into words. Nothing is downloaded and nothing is read from disk.

A fixed tenth of all short captions is held out (see `is_held_out`): training
never sees an image with such a caption, the sample images and the accuracy
figures use no others.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (215, 35, 40),
    "green": (35, 150, 60),
    "blue": (40, 75, 215),
    "yellow": (245, 220, 45),
    "purple": (135, 45, 165),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
}
BACKGROUNDS = {
    "grey": (150, 150, 150),
    "pink": (250, 180, 205),
    "cyan": (140, 225, 235),
    "brown": (125, 85, 55),
}
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
    "middle": (0.5, 0.5),
}
OUTLINE = (15, 15, 15)
RADII = {"large": 0.25, "small": 0.17}
NUMBERS = ("no", "one", "two", "three")
ORDINALS = ("first", "second", "third")
SUPERSAMPLE = 2

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Shape:
    """One shape: what it is, how large, and which of `PLACES` it is at."""

    kind: str
    colour: str
    size: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """One image: its shapes in reading order, its background, its size in pixels."""

    shapes: tuple[Shape, ...]
    background: str
    shaded: bool
    width: int
    height: int

    @property
    def backdrop(self) -> str:
        return f"{'shaded' if self.shaded else 'plain'} {self.background} background"


@dataclass(frozen=True)
class Conversation:
    """Images, shown in the first user turn, and the turns about them."""

    scenes: tuple[Scene, ...]
    turns: tuple[Turn, ...]


def a(words: str) -> str:
    """`words` behind the right indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(number: int, noun: str) -> str:
    """'one noun', 'two nouns'."""
    return f"{NUMBERS[number]} {noun}{'s' if number > 1 else ''}"


def listed(items: list[str]) -> str:
    """'x', 'x and y' or 'x, y and z'."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def where(shape: Shape) -> str:
    return f"{'in' if shape.place == 'middle' else 'at'} the {shape.place}"


def sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


# ---------------------------------------------------------------- images


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's short caption belongs to the tenth kept from training."""
    return zlib.crc32(caption(scene).encode()) % 10 == 0


def random_size(rng: random.Random) -> tuple[int, int]:
    """An image size, (width, height): short side 56 to 104, at most twice as long as short."""
    short = rng.randint(56, 104)
    long = round(short * math.exp(rng.uniform(0.0, math.log(2.0))))
    return (long, short) if rng.random() < 0.5 else (short, long)


def random_scene(
    rng: random.Random,
    *,
    held_out: bool = False,
    count: int | None = None,
    size: tuple[int, int] | None = None,
) -> Scene:
    """A scene of `count` shapes (1 to 3 by chance), no two alike in kind, colour or place.

    Shapes come in reading order. Only a shape on its own can be in the middle.
    """
    while True:
        number = rng.randint(1, 3) if count is None else count
        places = sorted(rng.sample(range(5 if number == 1 else 4), number))
        kinds, colours = rng.sample(KINDS, number), rng.sample(list(COLOURS), number)
        shapes = tuple(
            Shape(kind, colour, rng.choice(("large", "small")), list(PLACES)[place])
            for kind, colour, place in zip(kinds, colours, places, strict=True)
        )
        width, height = random_size(rng) if size is None else size
        background = rng.choice(list(BACKGROUNDS))
        scene = Scene(shapes, background, rng.random() < 0.4, width, height)
        if is_held_out(scene) == held_out:
            return scene


def corners_of(kind: str, radius: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape about the origin, turned by `turn` radians."""
    if kind == "star":
        spokes = [(radius * (1.0 if i % 2 == 0 else 0.42), i / 10) for i in range(10)]
    elif kind == "triangle":
        spokes = [(radius * 1.05, i / 3) for i in range(3)]
    else:
        spokes = [(radius * 1.15, (i + 0.5) / 4) for i in range(4)]
    return [(r * math.sin(math.tau * part + turn), -r * math.cos(math.tau * part + turn)) for r, part in spokes]


def jittered(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.randint(-10, 10))) for level in colour)
    return red, green, blue


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Paint a scene; `rng` decides its small accidents (shade, offset, size, tilt).

    Returns an RGB image of `scene.width` x `scene.height`.
    """
    width, height = scene.width * SUPERSAMPLE, scene.height * SUPERSAMPLE
    base = np.array(jittered(BACKGROUNDS[scene.background], rng), dtype=np.float32)
    light = np.linspace(1.0, 0.6 if scene.shaded else 1.0, height, dtype=np.float32)
    column = Image.fromarray((light[:, None, None] * base).astype(np.uint8))
    image = column.resize((width, height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for shape in scene.shapes:
        part = RADII[shape.size] * rng.uniform(0.94, 1.04)
        radius = part * min(width, height)
        x, y = (
            (centre + rng.uniform(-0.02, 0.02)) * side
            for centre, side in zip(PLACES[shape.place], (width, height), strict=True)
        )
        ink, stroke = jittered(COLOURS[shape.colour], rng), round(0.12 * radius)
        if shape.kind == "circle":
            box = (x - radius, y - radius, x + radius, y + radius)
            pen.ellipse(box, fill=ink, outline=OUTLINE, width=stroke)
        else:
            corners = corners_of(shape.kind, radius, rng.uniform(-0.08, 0.08))
            pen.polygon([(x + dx, y + dy) for dx, dy in corners], fill=ink, outline=OUTLINE, width=stroke)
    return image.resize((scene.width, scene.height), Image.Resampling.BOX)


def cells(scene: Scene, rows: int, columns: int) -> list[tuple[str, ...]]:
    """What is in each cell of a `rows` x `columns` grid over the image, row by row.

    Words for the shape that reaches well into the cell, or for the background.
    """
    cell_words = []
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        words: tuple[str, ...] = ("shaded" if scene.shaded else "plain", scene.background)
        nearest = math.inf
        for shape in scene.shapes:
            x, y = PLACES[shape.place]
            dx = (x - min(max(x, column / columns), (column + 1) / columns)) * scene.width
            dy = (y - min(max(y, row / rows), (row + 1) / rows)) * scene.height
            radius = RADII[shape.size] * min(scene.width, scene.height)
            if math.hypot(dx, dy) < min(nearest, 0.6 * radius):
                nearest, words = math.hypot(dx, dy), (shape.size, shape.colour, shape.kind)
        cell_words.append(words)
    return cell_words


# ---------------------------------------------------------------- words


def caption(scene: Scene) -> str:
    """The short description, without its capital and full stop."""
    return f"{listed([a(shape.name) for shape in scene.shapes])} on {a(scene.background)} background"


def detail(scene: Scene) -> str:
    """The long description: never less than 70 tokens, whatever the image."""
    number = len(scene.shapes)
    words = [f"The picture shows {plural(number, 'shape')} on {a(scene.backdrop)}."]
    for ordinal, shape in zip(ORDINALS, scene.shapes, strict=False):
        words.append(
            f"The {ordinal} shape is {a(shape.kind)}. It is {shape.colour}, it is {shape.size}, "
            f"and it is {where(shape)} of the picture."
        )
    light = "gets darker from the top to the bottom" if scene.shaded else "has the same colour all over"
    words.append(f"The background is {scene.background} and it {light}.")
    words.append(f"There is nothing else in the picture besides the shape{'s' if number > 1 else ''}.")
    summary = listed([a(f"{shape.size} {shape.name} {where(shape)}") for shape in scene.shapes])
    words.append(f"In summary, the picture shows {summary}, on {a(scene.backdrop)}.")
    return " ".join(words)


def ask(scene: Scene, rng: random.Random) -> Turn:
    """A question with a short answer about one image."""
    shape, number = rng.choice(scene.shapes), len(scene.shapes)
    match rng.randrange(7):
        case 0:
            return f"What colour is the {shape.kind}?", f"The {shape.kind} is {shape.colour}."
        case 1:
            return f"Where is the {shape.kind}?", f"The {shape.kind} is {where(shape)}."
        case 2:
            return f"What shape is {shape.colour}?", f"The {shape.kind} is {shape.colour}."
        case 3:
            verb = "is" if number == 1 else "are"
            return "How many shapes are there?", f"There {verb} {plural(number, 'shape')}."
        case 4:
            return "What colour is the background?", f"The background is {scene.background}."
        case 5:
            return f"Is the {shape.kind} large or small?", f"The {shape.kind} is {shape.size}."
        case _:
            kind = rng.choice(KINDS)
            if kind in {other.kind for other in scene.shapes}:
                return f"Is there {a(kind)}?", f"Yes, there is {a(kind)}."
            return f"Is there {a(kind)}?", f"No, there is no {kind}."


def describe(scene: Scene, rng: random.Random) -> Turn:
    """A request for the short description, and that description."""
    requests = ("Describe the picture.", "Describe this picture.", "Describe the image.", "What do you see?")
    return rng.choice(requests), sentence(caption(scene))


def describe_in_detail(scene: Scene, rng: random.Random) -> Turn:
    """A request for the long description, and that description."""
    requests = ("Describe the picture in detail.", "Describe this picture in detail.", "Describe the image in detail.")
    return rng.choice(requests), detail(scene)


def describe_each(scenes: tuple[Scene, ...]) -> str:
    """The answer to "Describe each picture."."""
    return " ".join(f"Picture {i}: {caption(scene)}." for i, scene in enumerate(scenes, 1))


def ask_many(scenes: tuple[Scene, ...], rng: random.Random) -> Turn:
    """A question with a short answer about several images."""
    index = rng.randrange(len(scenes))
    scene, number = scenes[index], index + 1
    shape = rng.choice(scene.shapes)
    match rng.randrange(5):
        case 0:
            return "How many pictures are there?", f"There are {NUMBERS[len(scenes)]} pictures."
        case 1:
            answer = f"Picture {number} has {plural(len(scene.shapes), 'shape')}."
            return f"How many shapes are in picture {number}?", answer
        case 2:
            return f"Describe picture {number}.", sentence(caption(scene))
        case 3:
            question = f"What colour is the {shape.kind} in picture {number}?"
            return question, f"The {shape.kind} in picture {number} is {shape.colour}."
        case _:
            holders = [str(i) for i, other in enumerate(scenes, 1) if shape.kind in {s.kind for s in other.shapes}]
            which = f"Picture{'s' if len(holders) > 1 else ''} {listed(holders)}."
            return f"Which pictures show {a(shape.kind)}?", which


SMALL_TALK: tuple[Turn, ...] = (
    ("Hello", "Hello! Show me a picture and I will tell you what is in it."),
    ("Hi", "Hello! Show me a picture and I will tell you what is in it."),
    ("Good morning", "Good morning! Do you have a picture for me?"),
    ("How are you?", "I am well, thank you. Do you have a picture for me?"),
    ("Who are you?", "I am a very small model. I look at pictures of coloured shapes and describe them in words."),
    ("What can you do?", "I can name the shapes in a picture, their colours, their sizes and their places."),
    ("Which shapes do you know?", f"I know four shapes: the {listed(list(KINDS)).replace(', ', ', the ')}."),
    ("Which colours do you know?", f"I know these colours: {listed(list(COLOURS))}."),
    ("Which backgrounds do you know?", f"I know these backgrounds: {listed(list(BACKGROUNDS))}."),
    ("Count to three.", "One, two, three."),
    ("What is a circle?", "A circle is a round shape without corners."),
    ("What is a square?", "A square is a shape with four equal sides and four corners."),
    ("What is a triangle?", "A triangle is a shape with three sides and three corners."),
    ("What is a star?", "A star is a shape with five points."),
    ("Describe the picture.", "I see no picture. Please show me one."),
    ("What do you see?", "I see no picture. Please show me one."),
    ("Thank you", "You are welcome. Show me another picture if you like."),
    ("Goodbye", "Goodbye! It was nice to talk about shapes with you."),
)


def conversation(rng: random.Random, *, easy: bool = False) -> Conversation:
    """A conversation to learn from: one to four turns about none to three images.

    An easy one is always about one image of one or two shapes.
    """
    if easy:
        scene = random_scene(rng, count=rng.randint(1, 2))
        return Conversation((scene,), (describe(scene, rng), *(ask(scene, rng) for _ in range(2))))
    kind = rng.random()
    if kind < 0.06:
        return Conversation((), tuple(rng.sample(SMALL_TALK, rng.randint(1, 3))))
    if kind < 0.72:
        scene = random_scene(rng)
        if rng.random() < 0.25:
            return Conversation((scene,), (describe_in_detail(scene, rng),))
        first = describe(scene, rng) if rng.random() < 0.4 else ask(scene, rng)
        return Conversation((scene,), (first, *(ask(scene, rng) for _ in range(rng.randint(1, 3)))))
    scenes = tuple(random_scene(rng) for _ in range(rng.choice((2, 2, 3))))
    first = ("Describe each picture.", describe_each(scenes)) if rng.random() < 0.5 else ask_many(scenes, rng)
    return Conversation(scenes, (first, *(ask_many(scenes, rng) for _ in range(rng.randint(0, 2)))))


def exam(name: str, rng: random.Random) -> Conversation:
    """A held-out conversation of one turn: "short", "question", "detail" or "each"."""
    scenes = tuple(random_scene(rng, held_out=True) for _ in range(2 if name == "each" else 1))
    match name:
        case "short":
            turn = describe(scenes[0], rng)
        case "question":
            turn = ask(scenes[0], rng)
        case "detail":
            turn = describe_in_detail(scenes[0], rng)
        case _:
            turn = ("Describe each picture.", describe_each(scenes))
    return Conversation(scenes, (turn,))


# ---------------------------------------------------------------- samples


def samples() -> tuple[tuple[Scene, ...], tuple[str, ...]]:
    """The sample images, all held out, and their file names."""
    plan = ((1, (221, 147)), (2, (131, 203)), (3, (109, 97)), (2, (310, 173)), (3, (190, 205)))
    scenes, names = [], []
    for number, (count, size) in enumerate(plan):
        scene = random_scene(random.Random(f"sample {number}"), held_out=True, count=count, size=size)
        scenes.append(scene)
        names.append("-".join(f"{shape.colour}-{shape.kind}" for shape in scene.shapes) + ".png")
    return tuple(scenes), tuple(names)


def sample_prompts(scenes: tuple[Scene, ...]) -> list[tuple[tuple[int, ...], str, str]]:
    """What the sample images are asked: (numbers of the images shown, prompt, answer)."""
    prompts: list[tuple[tuple[int, ...], str, str]] = []
    for number, scene in enumerate(scenes):
        prompts.append(((number,), "Describe the picture.", sentence(caption(scene))))
    for number, scene in enumerate(scenes[:2]):
        prompts.append(((number,), "Describe the picture in detail.", detail(scene)))
    one, two = scenes[0].shapes[0], scenes[1].shapes[1]
    prompts += [
        ((0,), f"What colour is the {one.kind}?", f"The {one.kind} is {one.colour}."),
        ((1,), f"Where is the {two.kind}?", f"The {two.kind} is {where(two)}."),
        ((2,), "How many shapes are there?", "There are three shapes."),
        ((3,), "What colour is the background?", f"The background is {scenes[3].background}."),
    ]
    for indices in ((0, 1), (3, 2), (1, 0, 3), (4, 3, 0)):
        prompts.append((indices, "Describe each picture.", describe_each(tuple(scenes[i] for i in indices))))
    prompts.append(((0, 2), "How many shapes are in picture 2?", "Picture 2 has three shapes."))
    prompts.append(((0, 3, 4), "Describe picture 3.", sentence(caption(scenes[4]))))
    prompts += [((), question, answer) for question, answer in (SMALL_TALK[0], SMALL_TALK[4])]
    return prompts
