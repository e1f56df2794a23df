"""The requests of the pocket corpus that work a phone's screen, in the actions of Open-AutoGLM."""

from __future__ import annotations

import pocket_words as words
from pocket_commands import (
    Intent,
    duration,
    from_list,
    loose_text,
    ordinal,
    point,
)

direction = from_list(("up", "down", "left", "right"))

PHONE_INTENTS: dict[str, Intent] = {
    "launch": Intent(
        'do(action="Launch", app="{a}")',
        {"a": from_list(words.APPS, 0.8)},
        (
            "(open|launch|start|run|load) (|the |my ){a}( app|)",
            "(bring|pull|open|start) up (|the ){a}( app|)",
            "(go|switch|change|jump) to (|the ){a}( app|)",
            "(show|get|give) me (|the ){a}( app|)",
            "i (need|want) (|to open |to start |to see )the {a} app",
            "get (|the ){a} (app |)running",
            "(make|let) the {a} app (start|run|open)",
            "~take me to the {a} app",
            "~please have the {a} app open",
        ),
        closed=True,
    ),
    "tap_index": Intent(
        'do(action="Tap", index={i})',
        {"i": ordinal},
        (
            "(tap|press|click|touch|hit|push|choose|pick) (|on )the {i} (button|icon|item|one)",
            "(tap|choose|select|pick|take) the {i} (result|option|entry|choice)",
            "i want the {i} (button|icon|item|option|result)",
            "~the {i} button, tap it",
            "~select the {i} one",
        ),
        0.5,
        closed=True,
    ),
    "tap": Intent(
        'do(action="Tap", element={p})',
        {"p": point},
        (
            "(tap|click|press) (at|on|) {p}",
            "(tap|press|touch|click|hit) (|on )the (point|spot|position) (|at ){p}",
            "(press|touch|tap) the screen at {p}",
            "~at {p} press the screen",
            "~do a tap at {p}",
        ),
    ),
    "long_press": Intent(
        'do(action="Long Press", element={p})',
        {"p": point},
        (
            "long press (at|on|) {p}",
            "(press and hold|hold down|keep pressing) (at|on|) (the point|the spot|) {p}",
            "(hold|keep) your finger (at|on) {p}",
            "(do|make) a long press (at|on) {p}",
            "~hold the point {p} down",
            "~press {p} and keep your finger down",
        ),
    ),
    "double_tap": Intent(
        'do(action="Double Tap", element={p})',
        {"p": point},
        (
            "double (tap|click|press) (at|on|) {p}",
            "(tap|click|press) (twice|two times) (at|on) {p}",
            "(do|make) a double (tap|click) (at|on) {p}",
            "(tap|click) {p} (twice|two times)",
            "~at {p} tap twice",
            "~press {p} two times",
        ),
    ),
    "type": Intent(
        'do(action="Type", text="{t}")',
        {"t": loose_text},
        (
            "(type|enter|write|input) (|in |the words |the text ){t}",
            "(type|enter|write) (down|out) (|the text |the words ){t}",
            "(fill|key) in (|the text ){t}",
            "(put|set) the text to {t}",
            "~key in the words {t}",
        ),
        1.2,
        free_text=True,
    ),
    "swipe": Intent(
        'do(action="Swipe", direction="{d}")',
        {"d": direction},
        (
            "(swipe|scroll|slide|flick) {d}( a bit| on the screen| once| again|)",
            "(move|scroll|slide|drag|push) the (page|screen|list) {d}( a bit|)",
            "(swipe|scroll|slide) to the {d} side",
            "(do|make) a swipe {d}",
            "~swipe the screen {d}",
            "~scroll {d} on this page",
        ),
        0.6,
        closed=True,
    ),
    "drag": Intent(
        'do(action="Swipe", start={p}, end={q})',
        {"p": point, "q": point},
        (
            "(swipe|drag|slide|pull|move) from {p} to {q}",
            "(drag|move|pull) (|the item at |the icon at ){p} to {q}",
            "move your finger from {p} to {q}",
            "~slide your finger from {p} to {q}",
        ),
        1.2,
    ),
    "back": Intent(
        'do(action="Back")',
        {},
        (
            "(go|step|move|take me) back( a page| one page| one step|)",
            "(press|tap|hit|push) (|the )back( button|)",
            "(return|go back|go) to the (last|previous) (screen|page)",
            "(leave|quit) this (page|screen)",
            "(back|previous screen|one step back|previous page)",
            "~take me to the previous page",
            "~bring me back one screen",
        ),
        0.4,
    ),
    "home": Intent(
        'do(action="Home")',
        {},
        (
            "(go|jump|return|get|bring me) (|back )to the (home|main) screen",
            "(press|tap|hit|push) the home button",
            "(show|open|give me) the (home|main) screen",
            "(home screen|main screen)( now|)",
            "(leave|close) (all|everything) and (show|open) the (home|main) screen",
            "~let me see the home screen",
            "~i want the main screen",
        ),
        0.4,
    ),
    "wait": Intent(
        'do(action="Wait", duration="{d}")',
        {"d": duration(("seconds",), 30)},
        (
            "(wait|pause|hold on|sleep|stay|rest) (|for ){d}",
            "do nothing for {d}",
            "(give|let) (it|the page|the screen) (|rest for |wait for ){d}",
            "(stop|take a break|hold still) for {d}",
            "~wait here for {d}",
            "~for {d} do nothing",
        ),
        closed=True,
    ),
    "take_over": Intent(
        'do(action="Take_over", message="{m}")',
        {"m": from_list(words.HANDOVERS)},
        (
            "i (will|want to|can|must) do the {m} (myself|by hand)",
            "(let|wait for|leave it to) me to (enter|do|handle|finish) the {m}",
            "(stop|wait|pause) and let me (enter|do|handle|finish) the {m}",
            "hand over (to me |)for the {m}",
            "i (take over|take care of|handle|do) the {m}",
            "~leave the {m} to me",
            "~let me do the {m} by hand",
        ),
        0.5,
        closed=True,
    ),
    "screenshot": Intent(
        'do(action="Screenshot")',
        {},
        (
            "(take|make|get|grab|save) a (screenshot|picture of the screen|screen capture)",
            "(capture|grab|save|record) (the|this) screen",
            "screenshot( this| please|)",
            "(take|get|save) me a (screenshot|picture of this screen)",
            "~i need a picture of the screen",
            "~make me a picture of this screen",
        ),
        0.4,
    ),
    "done": Intent(
        'finish(message="{m}")',
        {"m": from_list(words.CLOSINGS)},
        (
            "(that is all|we are finished|this is enough|stop here)(,| and) (say|answer) {m}",
            "(finish|end|stop|close) (the task |this |)(with|and say|and answer) {m}",
            "~that is the end, say {m}",
        ),
        0.4,
        closed=True,
    ),
}
