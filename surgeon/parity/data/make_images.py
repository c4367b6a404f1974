"""Draws the validator's default images: a chart, a landscape and a page of text, of unlike sizes and contents.

Run it to make them anew: python surgeon/parity/data/make_image.py
"""

import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont

HERE = Path(__file__).parent


def chart() -> Image.Image:
    """Bars with labels: fine lines, flat colours, small text."""
    image = Image.new("RGB", (360, 240), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=13)
    draw.text((90, 8), "Visitors per month (thousands)", fill="black", font=font)
    draw.line([(40, 30), (40, 205), (350, 205)], fill="black", width=2)
    values = {"Jan": 31, "Feb": 46, "Mar": 28, "Apr": 73, "May": 88, "Jun": 64}
    colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
    for i, ((label, value), colour) in enumerate(zip(values.items(), colours, strict=True)):
        x, top = 55 + i * 49, 205 - value * 1.8
        draw.rectangle([x, top, x + 30, 204], fill=colour, outline="black")
        draw.text((x + 4, 210), label, fill="black", font=font)
        draw.text((x + 7, top - 16), str(value), fill="black", font=font)
    return image


def landscape() -> Image.Image:
    """Hills under a sky: gradients, texture, soft edges, high contrast at the sun."""
    rng = random.Random(7)
    image = Image.new("RGB", (300, 420))
    pixels = image.load()
    assert pixels is not None
    for y in range(420):
        for x in range(300):
            ridge = 250 + 40 * math.sin(x / 47) + 14 * math.sin(x / 11)
            near = 330 + 25 * math.sin(x / 31 + 2)
            noise = rng.randrange(-12, 13)
            if y > near:
                pixels[x, y] = (40 + noise, 90 + noise + (y - int(near)) // 2, 30 + noise)
            elif y > ridge:
                pixels[x, y] = (70 + noise, 100 + noise, 90 + noise)
            else:
                pixels[x, y] = (255 - y // 3, 190 - y // 4, 120 + y // 3)
    draw = ImageDraw.Draw(image)
    draw.ellipse([190, 60, 250, 120], fill=(255, 250, 220))
    draw.polygon([(60, 330), (95, 250), (130, 330)], fill=(120, 40, 40))
    draw.rectangle([72, 330, 118, 375], fill=(225, 215, 190), outline=(60, 50, 40))
    return image.filter(ImageFilter.GaussianBlur(0.6))


def page() -> Image.Image:
    """A wide strip of text: what a reading task looks like."""
    image = Image.new("RGB", (560, 130), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    draw.text((20, 14), "Notice to all passengers", fill=(20, 20, 60), font=ImageFont.load_default(size=24))
    body = ImageFont.load_default(size=15)
    draw.text((20, 54), "Train 4711 to Lisbon leaves at 18:45 from platform 9.", fill="black", font=body)
    draw.text((20, 78), "Please keep your luggage with you. Tickets: window 3.", fill="black", font=body)
    draw.line([(20, 108), (540, 108)], fill=(150, 30, 30), width=3)
    return image


if __name__ == "__main__":
    for make in (chart, landscape, page):
        make().save(HERE / f"{make.__name__}.png", optimize=True)
