"""The intents of the pocket corpus: a table of requests and actions, and the draw of one command."""

from __future__ import annotations

import re

import pocket_words as words
from pocket_commands import (
    HELD_COMBINATION_PERCENT,
    REFUSAL,
    Intent,
    Item,
    Template,
    clock_time,
    contact,
    duration,
    from_list,
    loose_text,
    message,
    number,
    ordinal,
    point,
    query,
)
from pocket_words import Draw, capitalize_first, hash_share, split

on_off = from_list(("on", "off"))
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

HOME_INTENTS: dict[str, Intent] = {
    "alarm": Intent(
        'do(action="Set_Alarm", time="{t}")',
        {"t": clock_time},
        (
            "(set|create|make|add|start|schedule) (an|the|my) alarm (for|at|to) {t}",
            "(wake|get) me (|up )at {t}",
            "(alarm|ring|wake up call) (at|for) {t}",
            "i (need|want|would like) an alarm (for|at) {t}",
            "(i|we) (must|have to|need to|want to) (get up|wake up|be up) at {t}",
            "(let|make) the alarm ring at {t}",
            "~at {t} wake me up",
            "~ring the alarm at {t}",
        ),
        2.0,
    ),
    "timer": Intent(
        'do(action="Set_Timer", duration="{d}")',
        {"d": duration(("seconds", "minutes", "minutes", "hours"), 59)},
        (
            "(set|start|begin|run|make|add) (a|the|my) timer (for|of|to) {d}",
            "(set|start|begin|run|give me) a {d} timer",
            "(timer|count down|count) (|for ){d}",
            "(tell|call|warn) me (when|after) {d} are over",
            "i (need|want|would like) a timer (for|of) {d}",
            "(put|set) {d} on the timer",
            "~let the timer run for {d}",
            "~count down from {d}",
        ),
    ),
    "call": Intent(
        'do(action="Call", contact="{n}")',
        {"n": contact},
        (
            "(call|phone|ring|dial) {n}",
            "(make|place|start|begin) a (|phone )call (to|with) {n}",
            "(give|make) {n} a (call|ring|phone call|quick call)",
            "(get|put) {n} on the (phone|line)( for me|)",
            "i (want|need|would like|have) to (talk|speak) (to|with) {n}",
            "(connect|put) me (|through )(to|with) {n}",
            "~i need {n} on the phone",
            "~start to dial {n}",
        ),
        2.2,
    ),
    "message": Intent(
        'do(action="Send_Message", contact="{n}", text="{t}")',
        {"n": contact, "t": message},
        (
            "(send|write) a (message|text|note) to {n} (saying|that says) {t}",
            "(text|tell|message) {n} (|that ){t}",
            "(text|message) {n} saying {t}",
            "(write|say) to {n} (|that ){t}",
            "(send|write|give) {n} the (message|text|words) {t}",
            "let {n} know (|that ){t}",
            "(send|write) {n} a (message|text|note|line) (saying|that says) {t}",
            "~give {n} a message saying {t}",
            "~message {n} the words {t}",
        ),
        2.2,
        free_text=True,
    ),
    "volume": Intent(
        'do(action="Set_Volume", level={v})',
        {"v": number(0, 100)},
        (
            "(set|change|turn|bring|put|move) the (volume|sound) (to|at) {v}( percent|)",
            "(volume|sound|sound level) (|to |at ){v}( percent|)",
            "(make|get) the (volume|sound) {v}( percent|)",
            "i (want|need|would like) the (volume|sound) (at|to be) {v}( percent|)",
            "~let the sound be at {v}",
            "~turn the sound level to {v}",
        ),
        closed=True,
    ),
    "brightness": Intent(
        'do(action="Set_Brightness", level={v})',
        {"v": number(0, 100)},
        (
            "(set|change|turn|bring|put|dim|move) the (brightness|screen brightness) (to|at) {v}"
            "( percent|)",
            "(brightness|screen brightness) (|to |at ){v}( percent|)",
            "(dim|light up|set) the screen (to|at) {v} percent",
            "(make|get) the (brightness|screen brightness) {v}( percent|)",
            "i (want|need|would like) the (brightness|screen brightness) (at|to be) {v}( percent|)",
            "~let the brightness be at {v}",
            "~screen to {v} percent brightness",
        ),
        closed=True,
    ),
    "toggle": Intent(
        'do(action="Toggle", setting="{s}", state="{o}")',
        {"s": from_list(words.DEVICES), "o": on_off},
        (
            "(turn|switch|flip) {o} (|the |my ){s}",
            "(turn|switch|put|flip|change|set) (|the |my ){s} (|to ){o}",
            "i (want|need) (|the |to have ){s} {o}",
            "(make sure|see to it that) {s} is {o}",
            "{s} {o}",
            "~let {s} be {o}",
            "~{o} with the {s}",
        ),
    ),
    "light": Intent(
        'do(action="Light", room="{r}", state="{o}")',
        {"r": from_list(words.ROOMS), "o": on_off},
        (
            "(turn|switch) {o} the {r} (light|lights|lamp)",
            "(turn|switch|put|flip) the {r} (light|lights|lamp) {o}",
            "(turn|switch) {o} the (light|lights|lamp) in the {r}",
            "(lights|light|lamp) {o} in the {r}",
            "{r} (light|lights|lamp) {o}",
            "(make|let) the (light|lamp) in the {r} go {o}",
            "i (want|need) the (light|lights|lamp) in the {r} {o}",
            "~in the {r} turn the light {o}",
            "~make sure the lamp in the {r} is {o}",
        ),
    ),
    "thermostat": Intent(
        'do(action="Thermostat", room="{r}", degrees={v})',
        {"r": from_list(words.ROOMS), "v": number(10, 30)},
        (
            "(set|heat|warm|bring|cool) the {r} (|up |down )to {v} degrees",
            "(make|get) the {r} {v} degrees",
            "(set|put|turn|change) the (heating|thermostat) in the {r} to {v}( degrees|)",
            "(set|put|turn|change) the {r} (heating|thermostat|temperature) to {v}( degrees|)",
            "{r} (temperature|heating|thermostat) {v}( degrees|)",
            "i (want|need|would like) {v} degrees in the {r}",
            "~in the {r} set the heating to {v} degrees",
            "~let the {r} be at {v} degrees",
        ),
    ),
    "play": Intent(
        'do(action="Play", query="{q}")',
        {"q": from_list(words.GENRES)},
        (
            "(play|put on|turn on|start|start playing) (|some |the best ){q}( for me|)",
            "i (want|need|would like) to (hear|listen to) (|some ){q}",
            "(let me|let us) (hear|listen to) (|some ){q}",
            "(give me|get me|find me) some {q}( to hear|)",
            "~make it play {q}",
            "~i need some {q}",
        ),
        closed=True,
    ),
    "play_room": Intent(
        'do(action="Play", query="{q}", room="{r}")',
        {"q": from_list(words.GENRES), "r": from_list(words.ROOMS)},
        (
            "(play|put on|turn on|start) (|some ){q} in the {r}",
            "i (want|need|would like) (|to hear ){q} in the {r}",
            "in the {r} (play|put on|start) (|some ){q}",
            "(let me|let us) (hear|listen to) {q} in the {r}",
            "~give me some {q} in the {r}",
            "~start playing {q} in the {r}",
        ),
    ),
    "reminder": Intent(
        'do(action="Set_Reminder", text="{x}", time="{t}")',
        {"x": from_list(words.TASKS), "t": clock_time},
        (
            "(remind|tell) me to {x} at {t}",
            "at {t} (remind|tell) me to {x}",
            "(set|add|make|create) a reminder (to {x} at {t}|at {t} to {x}|for {t} to {x})",
            "i (must|have to|need to) {x} at {t}, (remind|tell) me",
            "reminder (at|for) {t}: {x}",
            "(do not|never) let me forget to {x} at {t}",
            "~at {t} do not let me forget to {x}",
            "~i need a reminder to {x} at {t}",
        ),
        1.8,
    ),
    "list": Intent(
        'do(action="Add_Item", list="{l}", item="{i}")',
        {"l": from_list(words.LISTS), "i": from_list(words.ITEMS)},
        (
            "(add|put|write|note|include|place) (|some ){i} (to|on|in) (the|my) {l} list",
            "(my|the|) {l} list: (add|put|write) {i}",
            "i need (|some ){i} (on|in) (the|my) {l} list",
            "(the|my) {l} list (needs|should have|must have) {i}",
            "~on my {l} list write {i}",
            "~make sure {i} is on the {l} list",
        ),
    ),
    "weather": Intent(
        'do(action="Weather", city="{c}")',
        {"c": from_list(words.CITIES)},
        (
            "(what|how) is the weather (like |)in {c}( today| now|)",
            "(weather|forecast) (in|for|of) {c}( today| now|)",
            "(is it|will it be) (raining|sunny|cold|warm|windy) in {c}( today| now|)",
            "(tell|show|give) me the (weather|forecast) (in|for) {c}( today|)",
            "(do|will) i need (an umbrella|a coat) in {c}( today|)",
            "~how cold is it in {c}",
            "~show me how the weather is in {c}",
        ),
        closed=True,
    ),
    "navigate": Intent(
        'do(action="Navigate", to="{p}")',
        {"p": from_list(words.PLACES)},
        (
            "(take|guide|bring|lead) me to {p}( now|)",
            "(navigate|directions|route|drive) to {p}( now|)",
            "how do i (get|drive|walk|go) to {p}",
            "(show|tell|find) (|me )(the way|a route|the road) to {p}",
            "(start|begin) navigation to {p}",
            "i (want|need|have|would like) to (drive|go|walk|get) to {p}",
            "~how do i find the way to {p}",
            "~start a route to {p}",
        ),
        closed=True,
    ),
    "search": Intent(
        'do(action="Search", query="{q}")',
        {"q": query},
        (
            "(search|look) (|the web |the internet )for {q}",
            "(look up|find|google|search|find me|get me) {q}( on the web| on the internet| online|)",
            "(do|start|run) a (|web )search for {q}",
            "i (want|need|would like) to (find|look up|search for) {q}",
            "~look on the web for {q}",
            "~start to search for {q}",
        ),
        free_text=True,
    ),
    "note": Intent(
        'do(action="Note", message="{t}")',
        {"t": loose_text},
        (
            "(take|make|write|save|add) a note (saying|that|that says) {t}",
            "(take|make|new|save|add) (a |)note: {t}",
            "(note|remember|note down|write down) that {t}",
            "(save|keep) the note {t}",
            "~note: {t}",
            "~keep a note saying {t}",
        ),
        free_text=True,
    ),
    "refuse": Intent(
        REFUSAL,
        {},
        (
            "(cook|bake|make|bring|buy) (me|us) (a pizza|a cake|some dinner|a sandwich|lunch|soup)",
            "(fly|drive|carry|send) (me|us|my dog|the cat) to (the moon|mars|the sun|space)",
            "(who|what|how old|how tall) (are you|is the king|is the president|is the moon)",
            "(clean|paint|build|repair|sell) my (house|car|roof|bike|room|boat)",
            "(write|sing|say) (me |)a (poem|song|joke|rhyme)( about love| about cats|)",
            "(tell me|what is) (a joke|the meaning of life|your name|your age|a secret)",
            "(hello|hi|good morning|good evening)(|, who are you|, how are you| there| my friend)",
            "(do|can) you (love|like|know|see|hear) (me|cats|people|the news|the future)",
            "(why|when|how) (is|was) the (sky|sea|sun|moon|world) (blue|so big|made|born)",
            "(solve|do|finish) my (homework|work|taxes|math)",
            "(marry|kiss|hug|feed|wash) (me|my cat|my baby)",
            "~sing us a song",
            "~what do you like",
            "~can you cook dinner",
        ),
        1.6,
    ),
}

INTENTS = PHONE_INTENTS | HOME_INTENTS
TEMPLATES: dict[str, list[list[Template]]] = {
    name: intent.templates(name) for name, intent in INTENTS.items()
}
PREFIXES = split(
    "||||||please |can you |could you |hey, |hey, please |could you please |would you |ok, |now "
    "|quick, |assistant, |hi, can you "
)
POLITE_STATEMENTS = split("||||||hey, |ok, |please, |quick, |assistant, |hi, |now ")
SUFFIXES = split("|||||||, please|, thanks| right away|, thank you| if you can")
STATEMENT = re.compile(
    r"(i|we|what|how|who|why|when|is|will|do|does|which|my|the|home|main|back|previous|hello|hi|good"
    r"|at|in|on|for|that|this|one|weather|forecast|volume|sound|brightness|screen|alarm|timer"
    r"|reminder|lights?|lamp|directions|route|new|note:|can|let us|off|see)\b"
)
QUESTION = re.compile(r"(?i)(hey, |ok, |hi, )?(can|could|would|what|how|is it|will|do i|who|which)\b")


def dress(draw: Draw, intent: Intent, sentence: str) -> str:
    """Return the sentence with a polite beginning and end, and a capital or stop now and then."""
    if intent.answer == REFUSAL:
        text = sentence
    else:
        noun = STATEMENT.match(sentence) or not re.match(r"[a-z]", sentence)
        text = draw.pick(POLITE_STATEMENTS if noun else PREFIXES) + sentence
        if not intent.free_text:
            text += draw.pick(SUFFIXES)
    if draw.chance(0.3):
        text = capitalize_first(text)
    if not intent.free_text and draw.chance(0.25):
        text += "?" if QUESTION.match(text) else "."
    return text


def draw_command(draw: Draw, kind: str | None = None, held_share: float = 0.0) -> Item:
    """Return one command; with `held_share` that share of the templates are held-out ones."""
    if kind is None:
        kind = draw.choices(list(INTENTS), [i.weight for i in INTENTS.values()])[0]
    intent = INTENTS[kind]
    wanted = draw.chance(held_share)
    groups = [[t for t in group if t.held == wanted] for group in TEMPLATES[kind]]
    template = draw.choice(draw.choice([group for group in groups if group]))
    values = {name: slot(draw) for name, slot in intent.slots.items()}
    sentence = template.text.format(**{name: said for name, (said, _) in values.items()})
    prompt = dress(draw, intent, " ".join(sentence.split()))
    written = [value for _, value in values.values()]
    if not values:
        key: list[object] = [prompt.lower().rstrip(".?")]
    else:
        key = [template.text, *written] if intent.closed else [*written]
    return Item(
        kind,
        prompt,
        intent.answer.format(**{name: value for name, (_, value) in values.items()})
        if values
        else intent.answer,
        template.held,
        hash_share(kind, *key) < HELD_COMBINATION_PERCENT,
    )


def contact_command(draw: Draw, name: str) -> Item:
    """Return a call or a message to this contact, from the templates of training."""
    kind = draw.pick(("call", "message"))
    while True:
        item = draw_command(draw, kind)
        match = re.search(r'contact="(.*?)"', item.answer)
        old = match.group(1) if match else ""
        if old and item.prompt.count(old) == 1 and item.answer.count(old) == 1:
            return Item("name", item.prompt.replace(old, name), item.answer.replace(old, name))


def draw_screen(draw: Draw) -> Item:
    """Return a request to tap one of the buttons of a stated screen."""
    count = draw.randint(2, 4)
    labels = draw.sample(words.BUTTONS, count)
    places = [f"[{draw.randrange(1000)},{draw.randrange(1000)}]" for _ in labels]
    index = draw.randrange(count)
    verb = draw.pick(("tap", "press", "click", "choose", "hit", "select"))
    form = draw.pick(("{v} {b}", "{v} the {b} button", "{v} on {b}", "{v} {b} on the screen"))
    screen = "Screen: " + ", ".join(f"{b} {p}" for b, p in zip(labels, places, strict=True))
    return Item(
        "screen",
        f"{screen}. {capitalize_first(form.format(v=verb, b=labels[index]))}.",
        f'do(action="Tap", element={places[index]})',
        held_combination=hash_share("screen", labels[index], places[index]) < 10,
    )
