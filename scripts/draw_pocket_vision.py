"""Draws where `pocket-vision` taps: `python scripts/draw_pocket_vision.py --out docs/pocket_vision.png`.

The bundled model is asked, on this project's own runtime, about held-out screens; each picture shows the
instruction, the screen and the tap that came back. A screen whose task is done has no tap.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from pocket_vision_score import MAX_TOKENS, is_right, tap_pixel
from pocket_vision_screens import HEIGHT, WIDTH, Screen
from pocket_vision_tasks import Task, held_out_examples

from mlx_edge.decoding.multimodal import MultimodalGenerator

PAGE, INK, TAP = (255, 255, 255), (30, 30, 36), (255, 0, 110)
MARGIN, CAPTION = 14, 40
ZOOM = 2


def draw_card(screen: Screen, task: Task, answer: str) -> Image.Image:
    """Return one screen, enlarged, with its instruction above, its answer below and the tap on it."""
    width, height = WIDTH * ZOOM, HEIGHT * ZOOM
    card = Image.new("RGB", (width + 2 * MARGIN, height + 2 * CAPTION), PAGE)
    shown = screen.image.resize((width, height), Image.Resampling.NEAREST)
    card.paste(shown, (MARGIN, CAPTION))
    draw = ImageDraw.Draw(card)
    draw.rectangle((MARGIN - 1, CAPTION - 1, MARGIN + width, CAPTION + height), outline=INK)
    font = ImageFont.load_default(size=18)
    for text, top in ((task.instruction, 10), (answer, CAPTION + height + 8)):
        left = (card.width - draw.textlength(text, font)) // 2
        draw.text((left, top), text, fill=INK, font=font)
    pixel = tap_pixel(answer)
    if pixel is not None:
        x, y = MARGIN + pixel[0] * ZOOM, CAPTION + pixel[1] * ZOOM
        for reach in (18, 8):
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=TAP, width=4)
        draw.line((x - 26, y, x + 26, y), fill=TAP, width=2)
        draw.line((x, y - 26, x, y + 26), fill=TAP, width=2)
    return card


def main() -> None:
    """Ask about the chosen screens and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket-vision")
    parser.add_argument(
        "--screens", type=int, nargs="+", default=[2, 7, 13, 1], help="held-out numbers"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    generator = MultimodalGenerator(options.model)
    examples = held_out_examples(max(options.screens) + 1)
    cards = []
    for number in options.screens:
        screen, task = examples[number]
        answer = generator.generate(task.instruction, [screen.pixels], max_tokens=MAX_TOKENS)
        print(
            f"{number}: {task.instruction} -> {answer} ({'right' if is_right(task, answer) else 'wrong'})"
        )
        cards.append(draw_card(screen, task, answer))
    page = Image.new("RGB", (sum(card.width for card in cards), cards[0].height), PAGE)
    for index, card in enumerate(cards):
        page.paste(card, (index * card.width, 0))
    page.quantize(64, dither=Image.Dither.NONE).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
